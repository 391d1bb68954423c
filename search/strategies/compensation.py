"""Dynamic compensation (DC-Solver): one ratio per step, found in sampling order.

    step i >= K:  D_i <- its Lagrange interpolation at rho_i t_i + (1 - rho_i) t_{i-1}, for good
    rho_i = argmin mean |x_{i+1}(rho_i) - teacher(t_{i+1})|^2,      earlier ratios frozen

x_{i+1} is the corrected state where the step has a corrector (one network call a proposal, found
by a bounded line search), else it is a polynomial of degree K in rho_i: the loss is a polynomial
of degree 2K whose stationary points are roots, and no network is asked. What differs from the
original recipe (`experiments/benchmarks/published_dc.py`): targets at exactly the times, a
bounded search that keeps its best iterate, a held-out half that no ratio may hurt, and a few
Gauss-Newton iterations on the end point (`polish`), because matching the teacher step by step does
not bring the end point closest.

Works on any base schedule without fresh noise; numbers are float64 except the network's.

References: DC-Solver, Zhao et al. (arXiv 2409.03755) section 3; the closed form and the upstream
defects are derived in this project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.search.strategies.gauss_newton import Quadratic, levenberg
from fewstep.space.errors import StudyError
from fewstep.space.schedule import OdeSchedule
from fewstep.space.solve import Call, Choices, Number, Tape, solve

_NUDGE = 1e-3  # of a ratio, for its column of the Jacobian


@dataclass(frozen=True)
class Settings:
    """How ratios are searched.

    Args:
        low: smallest ratio, < 1.
        high: largest ratio, > 1.
        coarse: proposals of the first, even, look at [low, high]; >= 3.
        fine: golden-section proposals after it.
        held: share of the samples that only check, 0..1 (0: no check).
        polish: Gauss-Newton iterations on the end point, all ratios together.
    """

    low: float = 0.5
    high: float = 1.6
    coarse: int = 6
    fine: int = 8
    held: float = 0.5
    polish: int = 4

    def __post_init__(self) -> None:
        if not self.low < 1 < self.high:
            raise StudyError(f"compensation: bounds {self.low}..{self.high} must lie around 1")
        if self.coarse < 3 or self.fine < 0 or self.polish < 0 or not 0 <= self.held < 1:
            raise StudyError("compensation: coarse >= 3, fine >= 0, polish >= 0, 0 <= held < 1")


@dataclass(frozen=True)
class StepReport:
    """What happened to one ratio.

    Args:
        step: which.
        ratio: the value kept.
        method: "closed form", "line search", or "held out" (found, but worse on the held-out
            half).
        before: loss on the fitted half with the ratio it had.
        after: loss with the value kept.
    """

    step: int
    ratio: float
    method: str
    before: float
    after: float


@dataclass(frozen=True)
class Compensated:
    """The result.

    Args:
        schedule: with its ratios; the base itself if they do not help on the held-out half.
        ratios: one per step.
        steps: what the greedy pass did, in order.
        before: end point loss of the base, on the held-out half (all samples if there is none).
        after: end point loss of the result there.
        calls: network evaluations spent, in samples x calls.
    """

    schedule: OdeSchedule
    ratios: tuple[float, ...]
    steps: tuple[StepReport, ...]
    before: float
    after: float
    calls: int


class Trace:
    """One batch on its way through a schedule whose ratios are being chosen.

    The symbolic states of `space.solve` are combined with the network outputs obtained so far, so
    a proposal costs only the calls that it changes.
    """

    def __init__(
        self,
        schedule: OdeSchedule,
        denoiser: Denoiser,
        x_T: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | None = None,
    ) -> None:
        if any(step.eta != 0 for step in schedule.steps):
            raise StudyError("compensation: fresh noise (eta > 0) leaves no state to match")
        if schedule.options:
            raise StudyError(
                f"compensation: run-time options {sorted(schedule.options)} make the states "
                "nonlinear in the outputs: remove them"
            )
        self.schedule, self.denoiser = schedule, denoiser
        self.x_T = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        self.cond, self.guidance = cond, guidance
        m = schedule.constant
        self._m = torch.zeros_like(self.x_T[:1]) if m is None else m.to(self.x_T)[None]
        self.outputs: list[Tensor] = []
        self.calls = 0

    def plan(self, ratios: Sequence[Number]) -> tuple[list[Call], list[tuple[Tensor, int]]]:
        """Network calls, and (landing state, calls before it) per step, as symbolic vectors."""
        tape = Tape(self.schedule.nfe, noises=False)
        solve(Choices(self.schedule, {"compensation": list(ratios)}), tape)
        return tape.calls, tape.landed

    def known(self, landed: Sequence[tuple[Tensor, int]], i: int) -> int:
        """Calls made by the time the ratio of step i acts."""
        if i == 0:
            return int(self.schedule.first == "network")
        reused = self.schedule.steps[i - 1].corrector == "reuse"
        return landed[i - 1][1] + (not reused)

    def value(self, vector: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """A symbolic vector as states (B, *shape)."""
        c = vector.to(self.x_T)
        x = c[0] * self.x_T + c[1] * self._m
        for weight, D in zip(c[2:], outputs, strict=False):
            x = x + weight * D
        return x

    def ask(self, calls: Sequence[Call], outputs: Sequence[Tensor], n: int) -> list[Tensor]:
        """The outputs of the first n calls, given some of them."""
        found = list(outputs)
        for call in calls[len(found) : n]:
            x = self.value(call.state, found)
            t = call.query.t.detach().expand(len(x)).to(x.device)
            scale = self.guidance if call.guidance is None else float(call.guidance)
            found.append(self.denoiser(x, t, cond=self.cond, guidance=scale).to(x.dtype))
            self.calls += len(x)
        return found


def compensate(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    targets: Sequence[Tensor],
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    settings: Settings | None = None,
) -> Compensated:
    """Choose the ratios of a schedule.

    Args:
        schedule: the base, any schedule without fresh noise; ratios it has are the start.
        denoiser: the model.
        x_T: start states, (B, *shape); the last `held` share only checks.
        targets: the teacher's states at times[0..N], N + 1 tensors (B, *shape), from
            `aligned_targets`.
        cond: conditioning tensors with leading axis B.
        guidance: guidance scale where the schedule sets none.
        settings: see `Settings`.

    Raises:
        StudyError: targets that do not match the times, fresh noise, run-time options.
    """
    settings = settings or Settings()
    check_targets(schedule, targets, x_T)
    trace = Trace(schedule, denoiser, x_T, cond=cond, guidance=guidance)
    split = len(x_T) - int(settings.held * len(x_T))
    halves = (slice(0, split), slice(split, None) if split < len(x_T) else slice(0, split))
    search = RatioSearch(trace, targets, halves, settings)
    start = [step.compensation for step in schedule.steps]
    reports: list[StepReport] = []
    with torch.no_grad():
        best, before = start, search.endpoint(start)[1]
        lowest = before
        found = search.greedy(start, reports)
        for ratios in (found, *search.polish(found)):
            after = search.endpoint(ratios)[1]
            if after < lowest:
                best, lowest = list(ratios), after
    made = with_ratios(schedule, best)
    return Compensated(made, tuple(best), tuple(reports), before, lowest, trace.calls)


class RatioSearch:
    """The state of one search: losses on both halves, and passes over the steps."""

    def __init__(
        self,
        trace: Trace,
        targets: Sequence[Tensor],
        halves: tuple[slice, slice],
        settings: Settings,
    ) -> None:
        self.trace, self.targets, self.settings = trace, targets, settings
        self.halves = halves

    def endpoint(self, ratios: Sequence[float]) -> tuple[float, float]:
        """End point loss on the fitted and on the held-out half."""
        return self._losses(self._landing(ratios, len(ratios) - 1, []), len(ratios) - 1)

    def _landing(self, ratios: Sequence[float], i: int, outputs: Sequence[Tensor]) -> Tensor:
        calls, landed = self.trace.plan(ratios)
        vector, n = landed[i]
        return self.trace.value(vector, self.trace.ask(calls, outputs, n))

    def _losses(self, x: Tensor, i: int) -> tuple[float, float]:
        each = (x - self.targets[i + 1].to(x)).double().square().flatten(1).mean(1)
        fit, held = (float(each[half].mean()) for half in self.halves)
        return fit, held

    def greedy(self, start: Sequence[float], reports: list[StepReport]) -> list[float]:
        """One pass over the steps, each ratio chosen by the state it lands on."""
        schedule, ratios = self.trace.schedule, list(start)
        outputs: list[Tensor] = []
        for i in range(schedule.n_steps):
            calls, landed = self.trace.plan(ratios)
            known = self.trace.known(landed, i)
            outputs = self.trace.ask(calls, outputs, known)
            if i < schedule.compensation_order:
                continue

            def loss(
                rho: float, i: int = i, outputs: Sequence[Tensor] = outputs
            ) -> tuple[float, float]:
                proposal = [*ratios[:i], rho, *ratios[i + 1 :]]
                return self._losses(self._landing(proposal, i, outputs), i)

            old, bounds = ratios[i], (self.settings.low, self.settings.high)
            before = loss(old)
            if landed[i][1] == known:
                method, rho = "closed form", self._closed_form(ratios, i, outputs)
                after = loss(rho)
            else:
                method = "line search"
                rho, after = line_search(loss, bounds, old, before, self.settings)
            if not (after[0] < before[0] and after[1] <= before[1]):
                method = "held out" if after[0] < before[0] else method
                rho, after = old, before
            ratios[i] = rho
            reports.append(StepReport(i, rho, method, before[0], after[0]))
        return ratios

    def polish(self, start: Sequence[float]) -> list[list[float]]:
        """Ratios that follow one another down the end point loss of the fitted half.

        All ratios together: their effects on the end point are coupled, and one at a time they
        would crawl. The Jacobian is by forward differences, a column costing the calls after its
        step.
        """
        schedule, found = self.trace.schedule, list[list[float]]()
        free = range(schedule.compensation_order, schedule.n_steps)
        last = schedule.n_steps - 1
        if len(free) == 0:
            return found

        def ratios(theta: Tensor) -> list[float]:
            made = list(start)
            for i, d in zip(free, theta.tolist(), strict=True):
                made[i] = min(max(start[i] + d, self.settings.low), self.settings.high)
            return made

        def linearise(theta: Tensor) -> Quadratic:
            here = ratios(theta)
            calls, landed = self.trace.plan(here)
            outputs = self.trace.ask(calls, [], landed[last][1])
            end = self.trace.value(landed[last][0], outputs)
            columns = []
            for i in free:
                moved = [*here[:i], here[i] + _NUDGE, *here[i + 1 :]]
                known = outputs[: self.trace.known(landed, i)]
                columns.append((self._landing(moved, last, known) - end) / _NUDGE)
            fit = self.halves[0]
            J = torch.stack([c[fit].double().flatten() for c in columns])
            residual = (end - self.targets[-1].to(end))[fit].double().flatten()
            return Quadratic(J @ J.T, J @ residual, self._losses(end, last)[0])

        def on_round(turn: int, theta: Tensor) -> bool:
            found.append(ratios(theta))
            return False

        levenberg(
            torch.zeros(len(free)).double(),
            linearise,
            lambda thetas: [self.endpoint(ratios(theta))[0] for theta in thetas],
            rounds=self.settings.polish,
            on_round=on_round,
        )
        return found

    def _closed_form(self, ratios: list[float], i: int, outputs: Sequence[Tensor]) -> float:
        """The best ratio where the landing state is a polynomial in it."""

        def landing(rho: float) -> Tensor:
            _, landed = self.trace.plan([*ratios[:i], rho, *ratios[i + 1 :]])
            x = self.trace.value(landed[i][0], outputs)
            return (x - self.targets[i + 1].to(x)).double()[self.halves[0]]

        degree = self.trace.schedule.compensation_order
        return polynomial_minimum(landing, degree, self.settings.low, self.settings.high)


def polynomial_minimum(
    landing: Callable[[float], Tensor], degree: int, low: float, high: float
) -> float:
    """argmin over [low, high] of mean(landing(rho)^2), landing a polynomial of `degree` in rho.

    The polynomial is read off at degree + 1 ratios; the loss has degree 2 `degree`, its minimum
    lies at a root of the derivative or at a bound.
    """
    centre, scale = 0.5 * (low + high), 0.5 * (high - low)
    nodes = np.cos(np.pi * np.arange(degree + 1) / degree)  # Chebyshev: well conditioned
    rows = torch.stack([landing(centre + scale * float(u)).flatten() for u in nodes])
    gram = (rows @ rows.T / rows.shape[1]).cpu().numpy()
    inverse = np.linalg.inv(np.vander(nodes, increasing=True))  # coefficients from node values
    gram = inverse @ gram @ inverse.T
    loss = np.array(
        [
            sum(gram[j, k - j] for j in range(degree + 1) if 0 <= k - j <= degree)
            for k in range(2 * degree + 1)
        ]
    )
    p = np.polynomial.Polynomial(loss)
    roots = p.deriv().roots()
    inside = [r.real for r in map(complex, roots) if abs(r.imag) < 1e-9 and -1 < r.real < 1]
    best = min((-1.0, 1.0, *inside), key=lambda u: float(p(u)))
    return centre + scale * best


def line_search(
    loss: Callable[[float], tuple[float, float]],
    bounds: tuple[float, float],
    start: float,
    at_start: tuple[float, float],
    settings: Settings,
) -> tuple[float, tuple[float, float]]:
    """An even look at the interval, then golden section around the best; the best seen is kept."""
    low, high = bounds
    seen: dict[float, tuple[float, float]] = {start: at_start}

    def at(rho: float) -> float:
        if rho not in seen:
            seen[rho] = loss(rho)
        return seen[rho][0] if np.isfinite(seen[rho][0]) else float("inf")

    grid = [float(rho) for rho in np.linspace(low, high, settings.coarse)]
    best = min((*grid, start), key=at)
    points = sorted(seen)
    k = points.index(best)
    a, b = points[max(k - 1, 0)], points[min(k + 1, len(points) - 1)]
    share = (5**0.5 - 1) / 2
    for _ in range(settings.fine):
        left, right = b - share * (b - a), a + share * (b - a)
        if at(left) < at(right):
            b = right
        else:
            a = left
    best = min(seen, key=at)
    return best, seen[best]


def with_ratios(schedule: OdeSchedule, ratios: Sequence[float]) -> OdeSchedule:
    """The schedule with these ratios."""
    steps = tuple(
        step.model_copy(update={"compensation": float(rho)})
        for step, rho in zip(schedule.steps, ratios, strict=True)
    )
    return schedule.model_copy(update={"steps": steps})


def check_targets(schedule: OdeSchedule, targets: Sequence[Tensor], x_T: Tensor) -> None:
    """Raise a StudyError unless there is a state of x_T's shape for every time."""
    if len(targets) != schedule.n_steps + 1 or any(t.shape != x_T.shape for t in targets):
        raise StudyError(
            f"compensation: {len(targets)} targets for {schedule.n_steps + 1} times; give one "
            f"state of shape {tuple(x_T.shape)} per time, times[0] first"
        )
