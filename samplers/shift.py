"""The variance-driven time shift of TS-DPM: rows compiled per image while sampling.

A sample x whose pixel variance is V looks like a clean marginal at the time tau where

    sigma_tau^2 + v alpha_tau^2 = V          (v = 0 as published: the data's variance is dropped)

so at every main call i >= 1 the rule picks, among the training steps within +-`window` of a
nominal time, the first tau that minimises |sigma_tau^2 + v alpha_tau^2 - V|:

    semantics   around        while            what moves to tau
    "paper"     times[i]      times[i-1] > c   dt_query and dt_start of step i (algorithm box)
    "pnm"       times[i+1]    times[i+1] > c   dt_land of step i only (released PNDM code)

V is the unbiased variance of the state the network is asked at, over all elements of an image. A
step's choice only enters rows after its call, so the program is compiled again with the shifts
known so far and its next row is used; no network call is added. With one shift per image the rows
are per image too. A call at the nominal time keeps its bits; a window of 0 is the base schedule.

A training step is one label of a discrete schedule and t_start/1000 of a continuous one.

References: Time-Shift Sampler, Li et al. (arXiv 2305.15583), algorithm 1; the two semantics are
two of the five that exist, the others are upstream defects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.space.coefficients import TABLEAUS
from fewstep.space.errors import ScheduleError
from fewstep.space.options import VarianceRule
from fewstep.space.program import Program, compile
from fewstep.space.schedule import OdeSchedule


def select(rule: VarianceRule, schedule: OdeSchedule, x: Tensor, centre: float) -> Tensor | float:
    """The shift in model time chosen for states x (B, *shape) around time `centre`.

    Returns:
        (B,) float64 on the CPU; a number with per = "batch", and where all choose the centre.
    """
    noise = schedule.noise
    high, low = noise.t_range
    steps = torch.arange(-rule.window, rule.window + 1, dtype=torch.float64)
    t = centre + steps * training_step(schedule)
    inside = (t >= min(low, centre)) & (t <= high)
    t, steps = t[inside], steps[inside]
    table = noise.sigma(t) ** 2 + rule.data_variance * noise.alpha(t) ** 2
    variance = x.to(torch.float64).flatten(1).var(dim=1).cpu()
    if rule.per == "batch":
        variance = variance.mean()
    gap = (variance[..., None] - table) ** 2
    # numpy's argmin is the first minimum by definition
    best = torch.from_numpy(gap.numpy().argmin(-1, keepdims=True)).squeeze(-1)
    if bool((steps[best] == 0).all()):
        return 0.0
    shift = t[best] - centre
    return float(shift) if rule.per == "batch" else shift


def training_step(schedule: OdeSchedule) -> float:
    """One training step in model time.

    Raises:
        ScheduleError: EDM, whose time is no multiple of a training step.
    """
    noise = schedule.noise
    if noise.type == "edm":
        raise ScheduleError(
            "options.time_shift needs a noise schedule whose time counts training steps, not edm: "
            "search constant shifts instead"
        )
    return 1.0 if noise.type == "vp_discrete" else float(noise.t_range[0]) / 1000


def main_calls(schedule: OdeSchedule) -> dict[int, int]:
    """Network call -> step whose start it asks at (the calls inside a step are left out)."""
    found: dict[int, int] = {}
    call = 0
    for i, step in enumerate(schedule.steps):
        if i > 0 or schedule.first == "network":
            found[call] = i
            call += 1
        if step.tableau is not None:
            call += len(TABLEAUS[step.tableau].c) - 1
        call += step.corrector == "reeval"
    return found


class Shifter:
    """The shifts chosen so far, and the program they compile to."""

    def __init__(self, schedule: OdeSchedule) -> None:
        self.schedule, self.rule = schedule, VarianceRule.of(schedule.options)
        self.program: Program = schedule.program
        training_step(schedule)  # refused before the first call
        self._step_of = main_calls(schedule)
        names = ("dt_query", "dt_start") if self.rule.semantics == "paper" else ("dt_land",)
        self._shifts: dict[str, list[Tensor | float]] = {
            name: [getattr(step, name) for step in schedule.steps] for name in names
        }

    def before(self, call: int, x: Tensor) -> Program:
        """The program of `call`, after the shift that the state asked there, (B, *shape), chooses.

        Raises:
            ScheduleError: shifts under which two points coincide.
        """
        i = self._step_of.get(call, 0)
        if i == 0 or self.rule.window == 0:
            return self.program
        times, paper = self.schedule.times, self.rule.semantics == "paper"
        deciding, centre = (times[i - 1], times[i]) if paper else (times[i + 1], times[i + 1])
        if deciding <= self.rule.cutoff or not bool(torch.isfinite(x).all()):
            return self.program  # of a state that is not finite the loop tells
        shift = select(self.rule, self.schedule, x, centre)
        if isinstance(shift, float) and shift == 0.0:
            return self.program
        for values in self._shifts.values():
            values[i] = shift + values[i]
        try:
            self.program = compile(self.schedule, self._shifts)
        except ScheduleError as error:
            raise ScheduleError(
                f"the time shift of step {i} has no program ({error}): use a smaller window"
            ) from None
        return self.program
