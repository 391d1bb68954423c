"""Gauss-Newton on the numbers of a program.

A program of C calls has C (C + 5) / 2 + 1 numbers that matter: the time of every query, the start
p_0 and, with each state written as y_c = p_c x_T + k_c m + sum_j W_cj D_j, the weights p_c and
W_cj; with a constant image m also the weights k_c, C + 1 more. One forward difference for each
gives how the samples move,

    J_theta = J_program  d(program)/d(theta),

the second factor by automatic differentiation of `theta -> program`. As a number of row c changes
no call before c, candidates share their prefixes, and a Jacobian costs about a third of running
every perturbed program (50 calls a sample at C = 5, 148 at C = 8). No gradient of the network is
needed: ONNX and remote models can be fitted.

The loss is a mean over samples of rho(e), e the mean squared residual of one sample. rho(e) = e is
least squares, which a handful of samples that end in another mode of the data can rule. Huber's

    rho(e) = e  for e <= d^2,      2 d sqrt(e) - d^2  beyond

lets them count by their distance, not its square; it is fitted as least squares with the weights
rho'(e) = min(1, d / sqrt(e)) (Huber 1964; Holland and Welsch 1977).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.samplers import Denoiser, run
from fewstep.samplers.asking import prefix_groups
from fewstep.search.strategies.levenberg import Quadratic
from fewstep.space import OdeSchedule, Program, compile, stack
from fewstep.space.costs import stages
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.program import at_times, written_out

_DIFFERENCE = 2e-3  # far above float32 rounding of the samples, far below where samples bend


@dataclass(frozen=True)
class Batch:
    """Noise, what the teacher made of it, and how schedules run on it.

    Args:
        x_T: start states, (n, *shape).
        target: the teacher's samples, (n, *shape).
        cond: conditioning tensors with leading axis n.
        guidance: guidance scale where a program sets none.
        constant: the constant image m that programs may use.
        options: run-time options that programs run with (`OdeSchedule.options`).
        features: samples (m, *shape) -> (m, f): residuals are differences of features; None
            compares the samples themselves.
        piece: samples that run as one piece.
    """

    x_T: Tensor
    target: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float | None = None
    constant: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] | None = None
    piece: int = 64

    def __len__(self) -> int:
        return len(self.x_T)

    def first(self, count: int) -> Batch:
        """Its first `count` samples."""
        return self.take(slice(0, count))

    def pieces(self) -> list[Batch]:
        """Its samples in pieces, in order."""
        return [self.take(slice(k, k + self.piece)) for k in range(0, len(self), self.piece)]

    def take(self, at: slice | Tensor) -> Batch:
        """Some of its samples."""
        cond = {name: value[at] for name, value in self.cond.items()}
        return dataclasses.replace(self, x_T=self.x_T[at], target=self.target[at], cond=cond)

    @torch.no_grad()
    def residuals(self, programs: Sequence[Program], denoiser: Denoiser) -> Tensor:
        """Differences to the target of every program, (M, n, numbers)."""
        x = run(
            stack(programs),
            denoiser,
            self.x_T,
            cond=dict(self.cond) or None,
            guidance=self.guidance,
            m=self.constant,
            options=dict(self.options),
            check=False,
            share=True,
        )
        target = self.target.to(x)
        if self.features is None:
            return (x - target).flatten(2)
        found = self.features(x.flatten(0, 1)).reshape(len(programs), len(self), -1)
        return found - self.features(target).reshape(1, len(self), -1)


class Model(Protocol):
    """Numbers theta and the program they mean; theta = 0 is the start."""

    @property
    def size(self) -> int:
        """How many numbers."""
        ...

    def program(self, theta: Tensor) -> Program:
        """The program at theta, differentiable.

        Raises:
            ScheduleError: there is none.
        """
        ...


@dataclass(frozen=True)
class FreeProgram:
    """Every number of a program is its own unknown; theta = 0 is the program itself.

    Args:
        base: a canonical program (`canonical`).
        noise: its noise schedule; queries stay within its times.
        guided: the guidance scale of every guided call is unknown, too; `base` sets it. A call at
            scale 1 is unguided and stays so: it costs less.
        constant: so are k_0 and the weights k of a constant image.
        staged: the zeros that make stages (`space.costs`) stay.
    """

    base: Program
    noise: NoiseSchedule
    guided: bool = False
    constant: bool = False
    staged: bool = False

    @property
    def _sizes(self) -> list[int]:
        C = self.base.nfe
        return [C, 1, C, C * (C + 1) // 2, C if self.guided else 0, C + 1 if self.constant else 0]

    @property
    def size(self) -> int:
        """How many unknowns."""
        return sum(self._sizes)

    def nearer(self) -> Tensor:
        """theta with a first query at pure noise moved to at most 1 in lam before the second.

        Named solvers ask first at pure noise, where the network hardly depends on the time it is
        told: from there a fit finds no way to the better optimum.
        """
        theta = torch.zeros(self.size, dtype=torch.float64)
        if self.base.nfe > 1 and bool(self.base.t[0] == self.noise.t_range[0]):
            lam = finite_lam(self.noise, self.base.t)
            theta[0] = (lam[1] - lam[0] - 1).clamp(min=0)
        return theta

    def program(self, theta: Tensor) -> Program:
        """Queries moved in lam, weights of x_T and of the outputs as they are, log guidance."""
        base, C = self.base, self.base.nfe
        rows, columns = torch.tril_indices(C, C)
        by_t, by_p, by_e, by_b, by_w, by_k = theta.split(self._sizes)
        ends = torch.tensor(self.noise.t_range, dtype=torch.float64)
        low, high = finite_lam(self.noise, ends)
        lam = reflected(finite_lam(self.noise, base.t) + by_t, low, high)
        t = self.noise.t_of_lam(lam)
        t = torch.where(by_t == 0, t - t.detach() + base.t, t)  # neutral to the bit
        if self.staged:
            by_b = by_b * _open(base)[rows, columns]
        b = base.b.index_put((rows, columns), base.b[rows, columns] + by_b)
        by_init = torch.cat([by_p, by_k[:1] if self.constant else torch.zeros_like(by_p)])
        changes = {"init": base.init + by_init, "e": base.e + by_e, "b": b}
        if self.constant:
            changes["k"] = base.k + by_k[1:]
        if self.guided and base.guidance is not None:
            scales = base.guidance * torch.exp(by_w)
            changes["guidance"] = torch.where(base.guidance == 1, base.guidance, scales)
        return at_times(dataclasses.replace(base, **changes), self.noise, t)


def _open(program: Program) -> Tensor:
    """1 where a weight may move so that the stages of a program stay, else 0."""
    found = torch.ones_like(program.b)
    for stage in stages(program):
        for c in stage[1:]:
            found[c - 1, stage[0] : c] = 0
    return found


@dataclass(frozen=True)
class Retimed:
    """The inner times of a schedule are the unknowns, in lam; its choices and ends stay.

    Few numbers, so that little noise can tell them: where a fit of all numbers begins when that
    alone gains nothing (times as in LD3, arXiv 2405.15506).
    """

    schedule: OdeSchedule

    @property
    def size(self) -> int:
        """How many unknowns."""
        return self.schedule.n_steps - 1

    def times(self, theta: Tensor) -> Tensor:
        """The N+1 times at theta.

        Raises:
            ScheduleError: they would not decrease.
        """
        noise = self.schedule.noise
        times = torch.tensor(self.schedule.times, dtype=torch.float64)
        lam = finite_lam(noise, times)
        moved = lam[1:-1] + theta
        if bool((torch.cat([lam[:1], moved, lam[-1:]]).diff() <= 0).any()):
            raise ScheduleError("the times do not decrease")
        return torch.cat([times[:1], noise.t_of_lam(moved), times[-1:]])

    def program(self, theta: Tensor) -> Program:
        """The schedule's program at theta."""
        return compile(self.schedule, {"times": self.times(theta)})

    def at(self, theta: Tensor) -> OdeSchedule:
        """The schedule at theta."""
        return self.schedule.model_copy(update={"times": tuple(self.times(theta).tolist())})


def reflected(lam: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`lam` folded into [low, high]; unlike a clamp it has a slope everywhere, at `low` too."""
    up = torch.where(lam < low - 1e-9, 2 * low - lam, lam)
    return torch.where(up > high, torch.maximum(2 * high - up, low), up)


def canonical(program: Program) -> Program:
    """The same sampler with r = 0: every row gives the whole state, y_c = p_c x_T + ...

    A number of a row then acts through the calls after it only, so that perturbed programs keep
    their prefixes.
    """
    p, rest, _ = written_out(program)
    return dataclasses.replace(
        program, r=torch.zeros_like(program.r), e=p[1:], k=rest[1:, 0], b=rest[1:, 1:]
    )


def _parts(program: Program) -> dict[str, Tensor]:
    parts = {"t": program.t, "init": program.init, "e": program.e, "k": program.k, "b": program.b}
    return parts if program.guidance is None else parts | {"guidance": program.guidance}


def numbers(program: Program, noise: NoiseSchedule) -> Tensor:
    """The numbers of a canonical program in one vector, queries as lam."""
    parts = _parts(program) | {"t": finite_lam(noise, program.t)}
    return torch.cat([value.reshape(-1) for value in parts.values()])


def perturbed(program: Program, noise: NoiseSchedule, index: int) -> Program:
    """Number `index` of a canonical program moved by the difference."""
    for name, value in _parts(program).items():
        if index < value.numel():
            moved = value.clone()
            if name == "t":
                moved[index] = noise.t_of_lam(finite_lam(noise, value[index]) + _DIFFERENCE)
                return at_times(program, noise, moved)
            moved.view(-1)[index] += _DIFFERENCE
            changed: dict[str, Any] = {name: moved}
            return dataclasses.replace(program, **changed)
        index -= value.numel()
    raise IndexError(index)


class Fit:
    """A model on a batch: what `levenberg` asks for, and the network evaluations it took.

    Args:
        model: what is fitted.
        noise: the noise schedule.
        denoiser: the network.
        batch: noise to fit on.
        delta: d of Huber's loss, the root mean square residual of a sample beyond which it counts
            by its distance; inf is least squares.
    """

    def __init__(
        self,
        model: Model,
        noise: NoiseSchedule,
        denoiser: Denoiser,
        batch: Batch,
        delta: float = math.inf,
    ) -> None:
        self.model, self.noise, self.denoiser, self.batch = model, noise, denoiser, batch
        self.delta, self.calls = delta, 0

    def linearise(self, theta: Tensor) -> Quadratic:
        """Normal equations at theta, by forward differences of the program's numbers."""
        model, noise = self.model, self.noise
        chain: Tensor = torch.autograd.functional.jacobian(
            lambda th: numbers(canonical(model.program(th)), noise), theta, vectorize=True
        )
        live = (chain != 0).any(dim=1) & torch.isfinite(chain).all(dim=1)
        base = canonical(model.program(theta.detach()))
        moved = [perturbed(base, noise, i) for i in live.nonzero()[:, 0].tolist()]
        programs = [base, *moved]
        asked = sum(len(set(groups)) for groups in prefix_groups(stack(programs)))
        size, total = len(moved), 0.0
        normal, slope = torch.zeros(size, size).double(), torch.zeros(size).double()
        for part in self.batch.pieces():
            r = part.residuals(programs, self.denoiser)  # (1 + P, n, numbers)
            e = r[0].double().square().mean(-1)
            total += float(self._rho(e).sum())
            root = torch.clamp(self.delta / e.sqrt(), max=1.0).sqrt().to(r)[:, None]
            J = ((r[1:] - r[0]) / _DIFFERENCE * root).flatten(1)
            J = (J * torch.isfinite(J).all(dim=1, keepdim=True)).nan_to_num(0.0)  # it stays put
            normal += (J @ J.T).double().cpu()
            slope += (J @ (r[0] * root).flatten()).double().cpu()
        count = len(self.batch) * r.shape[2]
        self.calls += asked * len(self.batch)
        chain = chain[live]
        return Quadratic(
            chain.T @ (normal / count) @ chain, chain.T @ (slope / count), total / len(self.batch)
        )

    def losses(self, thetas: Sequence[Tensor]) -> list[float]:
        """The loss at several thetas; inf where one diverges or has no program."""
        found = [math.inf] * len(thetas)
        for i, e in self._errors(thetas).items():
            value = float(self._rho(e).mean())
            found[i] = value if math.isfinite(value) else math.inf
        return found

    def _errors(self, thetas: Sequence[Tensor]) -> dict[int, Tensor]:
        programs: dict[int, Program] = {}
        for i, theta in enumerate(thetas):
            try:
                programs[i] = self.model.program(theta.detach())
            except ScheduleError:
                continue
        if not programs:
            return {}
        self.calls += sum(p.nfe for p in programs.values()) * len(self.batch)
        listed = list(programs.values())
        parts = [p.residuals(listed, self.denoiser) for p in self.batch.pieces()]
        each = torch.cat([r.double().square().mean(-1).cpu() for r in parts], dim=1)
        return dict(zip(programs, each, strict=True))

    def _rho(self, e: Tensor) -> Tensor:
        d = self.delta
        return e if math.isinf(d) else torch.where(e <= d * d, e, 2 * d * e.sqrt() - d * d)
