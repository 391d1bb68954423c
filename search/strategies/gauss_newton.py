"""Gauss-Newton on the numbers of a schedule, by way of the program they compile to.

A program of C calls has C (C + 5) / 2 numbers that matter: the time of every query and, with each
state written as y_c = p_c x_T + k_c m + sum_j W_cj D_j, the weights p_c and W_cj; with a constant
image m also the weights k_c and the start, C + 2 more. One forward
difference for each gives how the samples move,

    J_theta = J_program  d(program)/d(theta),

the second factor from compile by automatic differentiation. However many knobs are open, the
network is asked the same; and as a number of row c changes no call before c, candidates share
their prefixes and a Jacobian costs about a third of running every perturbed program (50 calls a
sample at C = 5, 148 at C = 8). No gradient of the model is needed.

Where times, shifts and weights are all open, nothing but the choice of numbers holds the program
back. Then the program's own numbers are fitted first, which converges from nearly any start, and
the schedule is written afterwards: one plain step for each query found, its shifts and weights
fitted to the program without asking the network, then polished. A constant image joins where the
fit without it has ended, so that it can only help; it is written as an analytical first step.

The damping is Marquardt's, three values tried at once on a block of candidates. A fit on few
samples takes most of the way at a fraction of the cost; the fit on all of them starts where it
ends.

References: Levenberg 1944, Marquardt 1963 (J. SIAM 11, 431); Nocedal and Wright, Numerical
Optimization, section 10.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers import Denoiser
from fewstep.samplers.ode import prefix_groups
from fewstep.search.strategies.fitting import (
    Batch,
    Model,
    Refined,
    Settings,
    held_out,
    residuals,
)
from fewstep.search.strategies.knobs import Knobs, reflected
from fewstep.space import OdeSchedule, Program, StepSpec, stack
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam

_DIFFERENCE = 2e-3  # far above float32 rounding of the samples, far below where samples bend
_DAMPINGS = (0.1, 1.0, 10.0)
_FREE = frozenset({"times", "query", "start", "land", "weights"})


@dataclass(frozen=True)
class FreeProgram:
    """Every number of a program is its own unknown; theta = 0 is the program itself.

    Args:
        base: a canonical program (`canonical`).
        noise: its noise schedule; queries stay within its times.
        guided: the guidance scale of every call is unknown, too; `base` sets it.
        constant: so are p_0, k_0 and the weights k of a constant image.
    """

    base: Program
    noise: NoiseSchedule
    guided: bool = False
    constant: bool = False

    @property
    def _sizes(self) -> list[int]:
        calls = self.base.nfe
        image = [2, calls] if self.constant else [0, 0]
        return [calls, calls, calls * (calls + 1) // 2, calls if self.guided else 0, *image]

    def scale(self) -> Tensor:
        """1 for all."""
        return torch.ones(sum(self._sizes), dtype=torch.float64)

    def nearer(self) -> Tensor:
        """theta with a first query at pure noise moved to at most 1 in lam before the second.

        Named solvers ask first at pure noise, where the network hardly depends on the time it is
        told: from there a fit finds no way to the better optimum.
        """
        theta = torch.zeros_like(self.scale())
        if self.base.nfe > 1 and bool(self.base.t[0] == self.noise.t_range[0]):
            lam = finite_lam(self.noise, self.base.t)
            theta[0] = (lam[1] - lam[0] - 1).clamp(min=0)
        return theta

    def program(self, theta: Tensor) -> Program:
        """Queries moved in lam, weights of x_T and of the outputs as they are, log guidance.

        Raises:
            ScheduleError: the queries would not be in the order of their times any more.
        """
        base, calls = self.base, self.base.nfe
        rows, columns = torch.tril_indices(calls, calls)
        by_t, by_e, by_b, by_w, by_init, by_k = theta.split(self._sizes)
        low, high = finite_lam(self.noise, torch.tensor(self.noise.t_range, dtype=torch.float64))
        lam = finite_lam(self.noise, base.t)
        b = base.b.index_put((rows, columns), base.b[rows, columns] + by_b)
        lam = reflected(lam + by_t, low, high)
        if bool((lam.diff() <= 0).any()):
            raise ScheduleError("the queries are not in the order of their times")
        t = self.noise.t_of_lam(lam)
        guidance = base.guidance
        if guidance is not None and self.guided:
            guidance = guidance * torch.exp(by_w)
        init, k = base.init, base.k
        if self.constant:
            init, k = init + by_init, k + by_k
        return dataclasses.replace(
            base, t=t, init=init, e=base.e + by_e, k=k, b=b, guidance=guidance
        )


def canonical(program: Program) -> Program:
    """The same sampler with r = 0: every row gives the whole state, y_c = p_c x_T + ...

    A number of a row then acts through the calls after it only, so that perturbed programs keep
    their prefixes.
    """
    p, k = [program.init[0]], [program.init[1]]
    W = [torch.zeros_like(program.b[0])]
    for c in range(program.nfe):
        p.append(program.r[c] * p[-1] + program.e[c])
        k.append(program.r[c] * k[-1] + program.k[c])
        W.append(program.r[c] * W[-1] + program.b[c])
    return dataclasses.replace(
        program,
        r=torch.zeros_like(program.r),
        e=torch.stack(p[1:]),
        k=torch.stack(k[1:]),
        b=torch.stack(W[1:]),
    )


def _parts(program: Program) -> dict[str, Tensor]:
    parts = {"t": program.t, "init": program.init, "e": program.e, "k": program.k, "b": program.b}
    return parts if program.guidance is None else parts | {"guidance": program.guidance}


def numbers(program: Program, noise: NoiseSchedule) -> Tensor:
    """The numbers of a canonical program in one vector, queries as lam."""
    lam = finite_lam(noise, program.t)
    parts = _parts(program) | {"t": lam}
    return torch.cat([value.reshape(-1) for value in parts.values()])


def _perturbed(program: Program, noise: NoiseSchedule, index: int) -> Program:
    """Number `index` of a canonical program moved by the difference."""
    for name, value in _parts(program).items():
        if index < value.numel():
            moved = value.clone()
            if name == "t":
                lam = finite_lam(noise, value[index])
                moved[index] = noise.t_of_lam(lam + _DIFFERENCE)
            else:
                moved.view(-1)[index] += _DIFFERENCE
            return dataclasses.replace(program, **{name: moved})
        index -= value.numel()
    raise IndexError(index)


@dataclass(frozen=True)
class Linearised:
    """How the residuals move with theta on one batch; means over the residual's numbers.

    Args:
        normal: J^T J of the program's numbers that theta moves.
        slope: J^T r of these numbers.
        chain: d(numbers)/d(theta).
        live: which numbers of the program these are.
        error: mean squared residual.
        calls: network evaluations spent.
    """

    normal: Tensor
    slope: Tensor
    chain: Tensor
    live: Tensor
    error: float
    calls: int


def linearise(
    model: Model,
    noise: NoiseSchedule,
    theta: Tensor,
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> Linearised:
    """Normal equations at theta, by forward differences of the program's numbers."""
    chain: Tensor = torch.autograd.functional.jacobian(
        lambda th: numbers(canonical(model.program(th)), noise), theta, vectorize=True
    )
    live = (chain != 0).any(dim=1) & torch.isfinite(chain).all(dim=1)
    with torch.no_grad():
        base = canonical(model.program(theta))
        moved = [_perturbed(base, noise, i) for i in live.nonzero()[:, 0].tolist()]
        programs = [base, *moved]
        asked = sum(len(set(groups)) for groups in prefix_groups(stack(programs)))
        size, total = len(moved), 0.0
        normal, slope = torch.zeros(size, size).double(), torch.zeros(size).double()
        for at in range(0, len(batch), settings.batch):
            part = batch.take(slice(at, at + settings.batch))
            r = residuals(programs, denoiser, part, settings, share=True).flatten(1)
            J = (r[1:] - r[0]) / _DIFFERENCE
            J = (J * torch.isfinite(J).all(dim=1, keepdim=True)).nan_to_num(0.0)  # it stays put
            normal += (J @ J.T).double()
            slope += (J @ r[0]).double()
            total += float(r[0].square().sum(dtype=torch.float64))
        count = len(batch) * r.shape[1] / len(part)
    return Linearised(
        normal / count, slope / count, chain[live], live, total / count, asked * len(batch)
    )


@dataclass
class _Found:
    """Where a fit ended: the iterate with the least held-out error, and what it cost."""

    theta: Tensor
    error: float
    curve: list[float]
    calls: int
    last: Linearised


def fit(
    model: Model,
    noise: NoiseSchedule,
    theta: Tensor,
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    settings: Settings,
    *,
    rounds: int,
    progress: Callable[[], None],
) -> _Found:
    """Levenberg-Marquardt from `theta`, until two rounds gain less than `settings.least_gain`."""
    scale, damping, tired = model.scale(), 1e-2, 0
    [error] = held_out([model], [theta], denoiser, held, settings)
    best, best_theta, curve = error, theta, [error]
    nfe = model.program(theta).nfe
    used = len(held) * nfe
    here: Linearised | None = None
    for turn in range(1, rounds + 1):
        if turn > 1 and settings.budget is not None and used >= settings.budget:
            break
        here = linearise(model, noise, theta, denoiser, train, settings)
        used += here.calls
        gain = 0.0
        for _ in range(4):
            options = [theta + _step(here, damping * m, theta, scale, settings) for m in _DAMPINGS]
            scores = held_out([model] * len(options), options, denoiser, train, settings)
            used += len(options) * len(train) * nfe
            at = int(np.argmin(scores))
            if scores[at] < here.error:
                theta, damping = options[at], max(damping * _DAMPINGS[at], 1e-7)
                gain = 1 - scores[at] / here.error
                break
            damping *= 1e3
        [error] = held_out([model], [theta], denoiser, held, settings)
        used += len(held) * nfe
        curve.append(error)
        progress()
        if error < best:
            best, best_theta = error, theta
        if gain < settings.least_gain:
            tired, damping = tired + 1, min(damping, 1e-2)
            if tired == 2:
                break
    assert here is not None
    return _Found(best_theta, best, curve, used, here)


def _step(
    here: Linearised, damping: float, theta: Tensor, scale: Tensor, settings: Settings
) -> Tensor:
    """One damped step in theta / scale, held towards theta = 0 by `pull`."""
    chain = here.chain * scale
    normal = chain.T @ here.normal @ chain
    diagonal = normal.diagonal()
    pull = settings.pull * diagonal.mean()
    matrix = normal + torch.diag(damping * diagonal + pull + 1e-12 * diagonal.max() + 1e-30)
    step: Tensor = torch.linalg.solve(matrix, chain.T @ here.slope + pull * theta / scale)
    return -step * scale


def by_gauss_newton(
    knobs: Knobs,
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
) -> Refined:
    """Refine one schedule; see the module docstring.

    Args:
        knobs: what may move; theta = 0 is its schedule.
        denoiser: the model.
        train: noise to fit on, the first `settings.batch` samples first.
        held: noise to choose the iterate by.
        settings: see `Settings`.
        progress: called with (round, rounds).
    """
    noise, done, calls = knobs.schedule.noise, 0, 0
    curve: list[float]
    few = train.take(slice(0, settings.batch))
    last = max(1, settings.rounds // 2)  # rounds on all samples, each as dear as many on few

    def told() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, max(done, settings.rounds + last))

    def go(model: Model, theta: Tensor, rounds: int, on: Batch) -> _Found:
        nonlocal calls
        found = fit(
            model, noise, theta, denoiser, on, held, settings, rounds=rounds, progress=told
        )
        calls += found.calls
        curve.extend(found.curve)
        return found

    def on_all(model: Model, found: _Found) -> _Found:
        return go(model, found.theta, last, train) if len(few) < len(train) else found

    def whole(image: Tensor | None) -> bool:
        """Fit all numbers of the program, then write them; whether the schedule expresses them."""
        model, found = dataclasses.replace(free, constant=image is not None), first_fit
        if image is not None:
            theta = torch.zeros_like(model.scale())
            theta[: len(found.theta)] = found.theta
            found = go(model, theta, last, train)
        target, aim = model.program(found.theta), found.error
        like = plain(target, knobs.schedule, image)
        steps = dataclasses.replace(knobs, schedule=like, reference=knobs.schedule.times[0])
        found = go(steps, project(steps, target, found.last, settings), last, train)
        options.append((found.error, steps.apply(found.theta)))
        return found.error <= 1.5 * min(aim, first_fit.error)

    [before] = held_out([knobs], [knobs.zeros()], denoiser, held, settings)
    curve, options, expressed = [before], [(before, knobs.schedule)], False
    if _whole(knobs):
        base, image = canonical(knobs.base.program), train.constant
        free = FreeProgram(base, noise, "guidance" in knobs.names and base.guidance is not None)
        first_fit = on_all(free, go(free, free.nearer(), settings.rounds, few))
        # what an image does for the start may lie outside what schedules reach (p_0 > 1)
        expressed = any(whole(one) for one in ([None] if image is None else [image, None]))
    if not expressed:
        found = on_all(knobs, go(knobs, knobs.zeros(), settings.rounds, few))
        options.append((found.error, knobs.apply(found.theta)))
    after, result = min(options, key=lambda option: option[0])
    return Refined(result, before, after, tuple(enumerate(curve)), calls, "gauss-newton")


def _whole(knobs: Knobs) -> bool:
    """Whether the knobs open all numbers of the program, and it asks in the order of times."""
    schedule = knobs.schedule
    every = set(knobs.names) >= _FREE and knobs.history >= schedule.n_steps - 1
    lam = finite_lam(schedule.noise, schedule.program.t)
    known = schedule.first in ("network", "mean")
    return every and known and bool((lam.diff() > 0).all())


def plain(
    program: Program, like: OdeSchedule, constant: Tensor | None = None, min_gap: float = 0.02
) -> OdeSchedule:
    """First-order steps from query to query of a program, those out of order set apart.

    What `Knobs` needs to express the program: shifts and weights make up for the rest. With a
    constant image an analytical first step, which costs no call, leads to the first query.
    """
    noise = like.noise
    lam = finite_lam(noise, program.t)
    top, last = finite_lam(
        noise, torch.tensor([noise.t_range[0], like.times[-1]], dtype=torch.float64)
    )
    levels = torch.sort(lam).values.tolist()
    if constant is not None:
        levels.insert(0, float(top))
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + min_gap)
    most = float(last) - min_gap
    for i in reversed(range(len(levels))):
        levels[i] = min(levels[i], most)
        most = levels[i] - min_gap
    times = noise.t_of_lam(torch.tensor(levels, dtype=torch.float64)).tolist()
    first = min(times[0], noise.t_range[0])
    scales = [None] * len(lam) if program.guidance is None else program.guidance.tolist()
    if constant is not None:
        scales.insert(0, scales[0])  # of a step without a call
    made = OdeSchedule(
        noise=noise,
        times=(first, *times[1:], like.times[-1]),
        steps=tuple(StepSpec(guidance=scale) for scale in scales),
        first="network" if constant is None else "mean",
        shift_keeps=like.shift_keeps,
        options=like.options,
    )
    return made if constant is None else made.with_constant(constant)


def project(
    knobs: Knobs, target: Program, here: Linearised, settings: Settings, rounds: int = 60
) -> Tensor:
    """The theta whose program is nearest to `target`, as the samples see it; no network call.

    Levenberg-Marquardt on numbers(theta) - numbers(target), in the metric of `here.normal`.
    """
    noise, scale, live = knobs.schedule.noise, knobs.scale(), here.live
    metric = here.normal + 1e-8 * torch.diag(here.normal.diagonal())
    wanted = numbers(canonical(target), noise)[live]

    def miss(th: Tensor) -> Tensor:
        return numbers(canonical(knobs.program(th)), noise)[live] - wanted

    theta, damping = knobs.zeros(), 1e-2
    off = miss(theta)
    error = float(off @ metric @ off)
    for _ in range(rounds):
        chain: Tensor = torch.autograd.functional.jacobian(miss, theta, vectorize=True)
        seen = Linearised(metric, metric @ off, chain, live, error, 0)
        for _ in range(6):
            option = theta + _step(seen, damping, theta, scale, settings)
            try:
                there = miss(option)
            except ScheduleError:
                damping *= 10
                continue
            lower = float(there @ metric @ there)
            if lower < error:
                break
            damping *= 10
        else:
            return theta
        gain, theta, off, error = 1 - lower / error, option, there, lower
        damping = max(damping / 10, 1e-9)
        if gain < 1e-3:
            break
    return theta
