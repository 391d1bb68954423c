"""The numbers of a schedule as unknowns: what a fit may move, and the program that it means.

`FreeProgram` opens every number of a program, `Retimed` the inner times of a schedule, `Ratios`
its compensation ratios; theta = 0 is the start. `numbers` lists those of a canonical program,
`with_numbers` gives it others, and `perturbed` moves one of them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.space.costs import stages
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.program import Program, at_times, compile, written_out
from fewstep.space.schedule import OdeSchedule

__all__ = ["FreeProgram", "Ratios", "Retimed", "Unknowns", "canonical", "with_ratios"]

DIFFERENCE = 2e-3
"""Of forward differences: far above float32 rounding of samples, far below where samples bend."""


class Unknowns(ABC):
    """Numbers theta and the program they mean; theta = 0 is the start."""

    noise: NoiseSchedule

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers."""

    @abstractmethod
    def program(self, theta: Tensor) -> Program:
        """The program at theta, differentiable.

        Raises:
            ScheduleError: there is none.
        """

    def inside(self, theta: Tensor) -> Tensor:
        """The nearest theta within bounds; by default there are none."""
        return theta

    def moved(self, theta: Tensor) -> tuple[list[Program], Tensor]:
        """What tells how samples move: programs, and a Jacobian (M, size).

        Returns:
            The program at theta and M with one number moved by `DIFFERENCE` each, and how these
            numbers depend on theta.
        """

        def listed(at: Tensor) -> Tensor:
            return numbers(canonical(self.program(at)), self.noise)

        chain: Tensor = torch.autograd.functional.jacobian(listed, theta, vectorize=True)
        live = (chain != 0).any(dim=1) & torch.isfinite(chain).all(dim=1)
        base = canonical(self.program(theta.detach()))
        moved = [perturbed(base, self.noise, i) for i in live.nonzero()[:, 0].tolist()]
        return [base, *moved], chain[live]


@dataclass(frozen=True)
class FreeProgram(Unknowns):
    """Every number of a program is its own unknown; theta = 0 is the program itself.

    Args:
        base: a canonical program (`canonical`).
        noise: its noise schedule; queries stay within its times.
        guided: the guidance scale of every guided call is unknown, too; `base` sets it. A call at
            scale 1 is unguided and stays so: it costs less.
        constant: so are k_0 and the weights k of a constant image.
        staged: the zeros that make stages (`space.costs`) stay.
        plain: p_0 stays: the first query is of the start noise itself, as of pipelines that do
            not scale their input.
    """

    base: Program
    noise: NoiseSchedule
    guided: bool = False
    constant: bool = False
    staged: bool = False
    plain: bool = False

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
        by_p = by_p * (not self.plain)
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
class _OfSchedule(Unknowns):
    """Choices of a schedule's steps as unknowns."""

    schedule: OdeSchedule

    @property
    def noise(self) -> NoiseSchedule:  # type: ignore[override]
        """The schedule's."""
        noise: NoiseSchedule = self.schedule.noise
        return noise


@dataclass(frozen=True)
class Retimed(_OfSchedule):
    """The inner times of a schedule are the unknowns, in lam; its choices and ends stay.

    Few numbers, so that little noise can tell them: where a fit of all numbers begins when that
    alone gains nothing (times as in LD3, arXiv 2405.15506).
    """

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


@dataclass(frozen=True)
class Ratios(_OfSchedule):
    """The compensation ratios of a schedule (DC-Solver, arXiv 2409.03755), within bounds.

    Args:
        schedule: the base; the ratios it has are the start.
        low: smallest ratio.
        high: largest ratio.
    """

    low: float
    high: float

    @property
    def size(self) -> int:
        """How many unknowns: the first steps have too few older points."""
        return max(0, self.schedule.n_steps - self.schedule.compensation_order)

    def ratios(self, theta: Tensor) -> list[float | Tensor]:
        """One for each step."""
        found: list[float | Tensor] = [step.compensation for step in self.schedule.steps]
        for i, d in enumerate(theta, start=self.schedule.n_steps - self.size):
            found[i] = found[i] + d
        return found

    def inside(self, theta: Tensor) -> Tensor:
        """See `Unknowns`."""
        given = [step.compensation for step in self.schedule.steps]
        start = torch.tensor(given[len(given) - self.size :], dtype=torch.float64)
        return (start + theta).clamp(self.low, self.high) - start

    def program(self, theta: Tensor) -> Program:
        """The schedule's program at theta."""
        return compile(self.schedule, {"compensation": self.ratios(theta)})

    def moved(self, theta: Tensor) -> tuple[list[Program], Tensor]:
        """See `Unknowns`: ratios are few, and each is moved itself."""
        each = torch.eye(self.size, dtype=torch.float64)
        return [self.program(theta), *(self.program(theta + DIFFERENCE * d) for d in each)], each

    def at(self, theta: Tensor) -> OdeSchedule:
        """The schedule at theta."""
        return with_ratios(self.schedule, [float(rho) for rho in self.ratios(theta)])


def with_ratios(schedule: OdeSchedule, ratios: Sequence[float]) -> OdeSchedule:
    """The schedule with these compensation ratios, one for each step."""
    pairs = zip(schedule.steps, ratios, strict=True)
    steps = tuple(step.model_copy(update={"compensation": rho}) for step, rho in pairs)
    return schedule.model_copy(update={"steps": steps})


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


def with_numbers(program: Program, noise: NoiseSchedule, values: Tensor) -> Program:
    """A canonical program with other `numbers`."""
    parts, changed = _parts(program), dict[str, Any]()
    sizes = [value.numel() for value in parts.values()]
    for (name, old), new in zip(parts.items(), values.split(sizes), strict=True):
        changed[name] = new.reshape(old.shape)
    t = noise.t_of_lam(changed.pop("t"))
    return at_times(dataclasses.replace(program, **changed), noise, t)


def perturbed(program: Program, noise: NoiseSchedule, index: int) -> Program:
    """Number `index` of a canonical program moved by the difference."""
    for name, value in _parts(program).items():
        if index < value.numel():
            moved = value.clone()
            if name == "t":
                moved[index] = noise.t_of_lam(finite_lam(noise, value[index]) + DIFFERENCE)
                return at_times(program, noise, moved)
            moved.view(-1)[index] += DIFFERENCE
            changed: dict[str, Any] = {name: moved}
            return dataclasses.replace(program, **changed)
        index -= value.numel()
    raise IndexError(index)
