"""The textbook loops, run on symbolic vectors over the basis {x_T, m, D_0, D_1, ..., noise}.

`solve` is the one multistep loop (any order, formulation, basis, corrector, compensation, shift)
and `_runge_kutta` its single-step branch. They are written as a paper would write them, on states
`x` and outputs `D`, `eps`; that these are coefficient vectors and not images is the only trick:
the `Tape` hands out a fresh unit vector for every network call and remembers the state it was
asked at. `space.program` reads the rows of the triangular program off the tape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.space.coefficients import (
    TABLEAUS,
    Level,
    Rule,
    base,
    first,
    lagrange_at,
    step_weights,
)
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.schedule import OdeSchedule, StepSpec

Number = float | Tensor


def times_vector(c: Tensor, vector: Tensor) -> Tensor:
    """c * vector for c of shape () or (B,) and vector of shape (..., K)."""
    return c.unsqueeze(-1) * vector


@dataclass(frozen=True)
class Call:
    """One network call: the state asked, its sigma, the sigma it arrived with, the query."""

    state: Tensor
    sigma: Tensor
    arrived: Tensor
    query: Level
    guidance: Number | None


class Tape:
    """The symbolic run: unit vectors out, network calls recorded.

    `landed[i]` is the state step i leaves, corrected if it has a corrector, and how many calls
    were made by then.

    Args:
        calls: number of network calls to come, C.
        noises: whether fresh noise occurs (then C more basis vectors).
    """

    def __init__(self, calls: int, *, noises: bool) -> None:
        self.calls: list[Call] = []
        self.landed: list[tuple[Tensor, int]] = []
        self._c = calls
        self._unit = torch.eye(2 + calls * (2 if noises else 1), dtype=torch.float64)
        self.x_T = self._unit[0]
        self.m = self._unit[1]
        self.zero = torch.zeros_like(self.m)

    def call(self, call: Call) -> Tensor:
        """Record a network call and return its data prediction's unit vector."""
        self.calls.append(call)
        return self._unit[1 + len(self.calls)]

    def noise(self) -> Tensor:
        """The noise drawn after the latest call."""
        return self._unit[1 + self._c + len(self.calls)]


@dataclass(frozen=True)
class Point:
    """An evaluated point: its level, the (corrected) state, both forms of the output."""

    level: Level
    x: Tensor
    D: Tensor
    eps: Tensor

    def output(self, formulation: str, noise: NoiseSchedule) -> Tensor:
        """F of the formulation: D, eps, or the velocity."""
        if formulation == "data":
            return self.D
        if formulation == "noise":
            return self.eps
        alpha_rate, sigma_rate = noise.rates(self.level.t)
        return times_vector(alpha_rate, self.D) + times_vector(sigma_rate, self.eps)


class Choices:
    """The numbers of the steps, some replaced by tensors that carry gradients or a batch.

    A value is a tensor with leading axis N, or N numbers and tensors of shape (B,): then the
    vectors, and the rows of the program, are per image, and a step whose entry is a plain number
    keeps its bits.
    """

    def __init__(
        self, schedule: OdeSchedule, values: Mapping[str, Tensor | Sequence[Number]]
    ) -> None:
        known = {"times", *StepSpec.model_fields}
        for name in values:
            if name not in known:
                raise ScheduleError(
                    f"values[{name!r}] is not a number of a step: use times or a field of StepSpec"
                )
        self._values = values
        self.schedule = schedule
        self.noise: NoiseSchedule = schedule.noise
        self.times = (
            torch.as_tensor(values["times"], dtype=torch.float64)
            if "times" in values
            else torch.tensor(schedule.times, dtype=torch.float64)
        )
        t = self.times
        self._nominal = list(
            zip(t, self.noise.alpha(t), self.noise.sigma(t), self.noise.lam(t), strict=True)
        )

    def get(self, name: str, i: int) -> Number:
        """Field `name` of step i: a float, or a tensor where overridden."""
        if name in self._values:
            return self._values[name][i]
        value: Number = getattr(self.schedule.steps[i], name)
        return value

    def level(self, i: int, shift: Number = 0.0) -> Level:
        """The level at times[i] + shift."""
        if isinstance(shift, float) and shift == 0.0:
            return Level(*self._nominal[i])
        return Level.at(self.noise, self.times[i] + shift)

    def rule(self, i: int, *, corrector: bool = False) -> Rule:
        """The weights rule of step i."""
        step = self.schedule.steps[i]
        if corrector:
            return Rule(
                step.formulation,
                step.basis,
                self.get("power", i),
                step.corrector_relaxation,
                slope_points=step.corrector_slope_points,
            )
        coefficient = self.get("relaxation_coefficient", i)
        return Rule(
            step.formulation,
            step.basis,
            self.get("power", i),
            step.relaxation,
            coefficient,
            step.slope_points,
        )


def solve(choices: Choices, tape: Tape) -> tuple[Tensor, Tensor]:
    """Run the schedule symbolically; returns the final state and the sigma it arrived with."""
    schedule, steps = choices.schedule, choices.schedule.steps
    x, arrived = tape.x_T, choices.level(0).sigma
    history: list[Point] = []  # newest first
    pending: Point | None = None  # point i when step i-1 has already asked the network there
    for i, step in enumerate(steps):
        point = pending or (
            _analytical(choices, tape, x)
            if i == 0 and schedule.first != "network"
            else evaluate(choices, tape, x, i, arrived)
        )
        history.insert(0, replace(point, x=x))
        pending = None
        _compensate(choices, history, i)
        land = choices.level(i + 1, choices.get("dt_land", i))
        arrived = choices.level(i + 1).sigma
        eta = choices.get("eta", i)
        if isinstance(eta, Tensor) or eta != 0.0:
            land, g = _downstep(eta, history[0].level, land)
            arrived = land.sigma
            x = times_vector(g, tape.noise()) + _predict(choices, tape, history, i, land)
            tape.landed.append((x, len(tape.calls)))
            continue
        x = _predict(choices, tape, history, i, land)
        if step.corrector != "none":
            new = evaluate(choices, tape, x, i + 1, arrived)
            x = _correct(choices, history, new, i, land)
            pending = new if step.corrector == "reuse" else None
        tape.landed.append((x, len(tape.calls)))
    return x, arrived


def evaluate(choices: Choices, tape: Tape, x: Tensor, i: int, arrived: Tensor) -> Point:
    """Ask the network at state x at times[i], shifted as step i says; the end is not shifted."""
    if i < len(choices.schedule.steps):
        query_shift, start_shift, guidance = (
            choices.get("dt_query", i),
            choices.get("dt_start", i),
            choices.get("guidance", i),
        )
    else:
        query_shift, start_shift, guidance = 0.0, 0.0, choices.get("guidance", i - 1)
    nominal = choices.level(i, start_shift)
    query = (
        nominal
        if query_shift is start_shift
        or (_plain(query_shift, start_shift) and query_shift == start_shift)
        else choices.level(i, query_shift)
    )
    D = tape.call(Call(x, choices.level(i).sigma, arrived, query, guidance))
    if query is nominal or choices.schedule.shift_keeps == "x0":
        return Point(nominal, x, D, _eps(x, D, nominal))
    eps = _eps(x, D, query)
    return Point(
        nominal, x, times_vector(1 / nominal.alpha, x - times_vector(nominal.sigma, eps)), eps
    )


def _plain(*numbers: Number) -> bool:
    return all(isinstance(n, float) for n in numbers)


def _eps(x: Tensor, D: Tensor, level: Level) -> Tensor:
    return times_vector(1 / level.sigma, x - times_vector(level.alpha, D))


def _analytical(choices: Choices, tape: Tape, x: Tensor) -> Point:
    """The first point without a network call."""
    level, kind = choices.level(0), choices.schedule.first
    if (
        kind == "usf_zero"
    ):  # as released: eps = x where the model is VP; in EDM eps = x/sigma but D = x(1 - sigma)
        eps = times_vector(1 / level.alpha / level.sigma, x) if choices.noise.type == "edm" else x
        return Point(level, x, times_vector((1 - level.sigma) / level.alpha, x), eps)
    D = tape.m if kind == "mean" else tape.zero
    return Point(level, x, D, _eps(x, D, level))


def _compensate(choices: Choices, history: list[Point], i: int) -> None:
    """DC-Solver: the newest output is read at ratio t_i + (1 - ratio) t_{i-1}, for good."""
    ratio = choices.get("compensation", i)
    k = choices.schedule.compensation_order + 1
    if (isinstance(ratio, float) and ratio == 1.0) or len(history) < k:
        return
    levels = [choices.level(i - j) for j in range(k)]
    nodes = [
        level.t if choices.schedule.compensation_variable == "t" else level.lam for level in levels
    ]
    weights = lagrange_at(nodes, ratio * nodes[0] + (1 - ratio) * nodes[1])
    D = sum(
        (times_vector(w, p.D) for w, p in zip(weights, history, strict=False)),
        torch.zeros_like(history[0].D),
    )
    eps = sum(
        (times_vector(w, p.eps) for w, p in zip(weights, history, strict=False)),
        torch.zeros_like(history[0].eps),
    )
    history[0] = replace(history[0], D=D, eps=eps)


def _predict(choices: Choices, tape: Tape, history: list[Point], i: int, land: Level) -> Tensor:
    step = choices.schedule.steps[i]
    if step.tableau is not None:
        return _runge_kutta(choices, tape, history[0], i, land)
    start = history[step.start]
    others = [p for p in history if p is not start]
    x = _advance(choices, choices.rule(i), start, others[: step.order - 1], land, implicit=False)
    extra = choices.get("weights", i)
    if len(extra) > 0:  # type: ignore[arg-type]
        total, newest = (
            first(step.formulation, start.level, land),
            start.output(step.formulation, choices.noise),
        )
        for weight, point in zip(extra, others, strict=False):  # type: ignore[arg-type]
            x = x + times_vector(
                total * weight, point.output(step.formulation, choices.noise) - newest
            )
    return x


def _correct(choices: Choices, history: list[Point], new: Point, i: int, land: Level) -> Tensor:
    step = choices.schedule.steps[i]
    start = history[step.start]
    others = [p for p in history if p is not start]
    points = [new, *others[: step.points_corrector - 2]]
    return _advance(choices, choices.rule(i, corrector=True), start, points, land, implicit=True)


def _advance(
    choices: Choices, rule: Rule, start: Point, points: list[Point], land: Level, *, implicit: bool
) -> Tensor:
    """base * x + sum of weights * outputs."""
    weights = step_weights(
        rule, choices.noise, start.level, [p.level for p in points], land, implicit=implicit
    )
    x = times_vector(base(rule.formulation, start.level, land), start.x)
    for weight, point in zip(weights, (start, *points), strict=True):
        x = x + times_vector(weight, point.output(rule.formulation, choices.noise))
    return x


def _downstep(eta: Number, start: Level, land: Level) -> tuple[Level, Tensor]:
    """Ancestral step: land at sigma_down, then add g noise.

    g = eta sigma' sqrt(1 - e^-2h), sigma_down^2 = sigma'^2 - g^2.
    """
    share = -torch.expm1(2 * (start.lam - land.lam)) * eta**2
    g, down = land.sigma * torch.sqrt(share), land.sigma * torch.sqrt(1 - share)
    return Level(land.t, land.alpha, down, torch.log(land.alpha) - torch.log(down)), g


def _runge_kutta(choices: Choices, tape: Tape, point: Point, i: int, land: Level) -> Tensor:
    """Explicit Runge-Kutta in the step's formulation.

    Stage c_i lies at a share c_i of the way in the basis variable.
    """
    step, start = choices.schedule.steps[i], point.level
    tableau = TABLEAUS[step.tableau or ""]
    outputs = [point.output(step.formulation, choices.noise)]
    for c, row in zip(tableau.c[1:], tableau.rows[1:], strict=True):
        query = (
            land
            if c == 1.0
            else Level.at(choices.noise, _between(choices.noise, step.basis, start, land, c))
        )
        stage = _truncated(choices.noise, query) if step.basis == "label" and c < 1 else query
        mix = sum(
            (a / c * f for a, f in zip(row, outputs, strict=True)), torch.zeros_like(outputs[0])
        )
        x = times_vector(base(step.formulation, start, stage), point.x) + times_vector(
            first(step.formulation, start, stage), mix
        )
        D = tape.call(Call(x, stage.sigma, stage.sigma, query, choices.get("guidance", i)))
        eps = _eps(x, D, query)
        if stage is not query:  # the network's eps is what PNDM carries to the truncated level
            D = times_vector(1 / stage.alpha, x - times_vector(stage.sigma, eps))
        outputs.append(Point(stage, x, D, eps).output(step.formulation, choices.noise))
    mix = sum(
        (b * f for b, f in zip(tableau.result, outputs, strict=True)), torch.zeros_like(outputs[0])
    )
    return times_vector(base(step.formulation, start, land), point.x) + times_vector(
        first(step.formulation, start, land), mix
    )


def _between(noise: NoiseSchedule, basis: str, start: Level, land: Level, c: float) -> Tensor:
    if basis in ("t", "label"):
        return start.t + c * (land.t - start.t)
    if basis == "lam":
        return noise.t_of_lam(start.lam + c * (land.lam - start.lam))
    return noise.t_of_lam(-torch.log(start.rho + c * (land.rho - start.rho)))


def _truncated(noise: NoiseSchedule, level: Level) -> Level:
    """The level of the training step at or below; continuous schedules have none between."""
    if noise.type != "vp_discrete":
        return level
    whole = torch.floor(level.t)
    return level if bool((whole == level.t).all()) else Level.at(noise, whole)
