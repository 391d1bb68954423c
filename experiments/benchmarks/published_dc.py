"""DC-Solver's ratio search as its authors released it, for comparison only.

AdamW through the network, unbounded, last iterate, no held-out check; and targets that repeat two
slips: a state of the teacher is filed under the time its step STARTED at, so the one taken for
time t is up to one teacher step past t, and the last step but one is matched to the final image.
What the library does instead: `predictors.compensate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.samplers.ode import Progress, sample
from fewstep.space.baselines import dpm, grid, multistep
from fewstep.space.errors import StudyError
from fewstep.space.schedule import OdeSchedule
from fewstep.space.solve import Call, Choices, Number, Tape, solve
from fewstep.space.unknowns import with_ratios

RATE, DECAY = 0.1, 0.01  # AdamW's learning rate, and its pull of a ratio towards 0


@dataclass(frozen=True)
class Published:
    """What the released recipe gives.

    Args:
        schedule: with its ratios.
        ratios: one per step.
        losses: per ratio, the loss at its first and its last iterate.
        calls: network evaluations spent, in samples x calls.
    """

    schedule: OdeSchedule
    ratios: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]
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


def as_published(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    targets: Sequence[Tensor],
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    iterations: int = 40,
) -> Published:
    """The original's recipe: AdamW through the network, unbounded, last iterate, no check.

    Args:
        schedule: the base.
        denoiser: the model; gradients must pass through it.
        x_T: start states (the original uses 10).
        targets: N + 1 states; `published_targets` for the original's.
        cond: conditioning tensors.
        guidance: guidance scale where the schedule sets none.
        iterations: AdamW steps per ratio.
    """
    trace = Trace(schedule, denoiser, x_T, cond=cond, guidance=guidance)
    ratios, outputs = [1.0] * schedule.n_steps, list[Tensor]()
    first_and_last: list[tuple[float, float]] = []
    for i in range(schedule.n_steps):
        calls, landed = trace.plan(ratios)
        with torch.no_grad():
            outputs = trace.ask(calls, outputs, trace.known(landed, i))
        if i < schedule.compensation_order:
            continue
        rho = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.AdamW([rho], lr=RATE, weight_decay=DECAY)
        losses = []
        for _ in range(iterations):
            mixed: list[Number] = [*ratios[:i], rho, *ratios[i + 1 :]]
            calls, landed = trace.plan(mixed)
            vector, n = landed[i]
            x = trace.value(vector, trace.ask(calls, outputs, n))
            loss = (x - targets[i + 1].to(x)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        ratios[i] = float(rho.detach())
        first_and_last.append((losses[0], losses[-1]))
    made = with_ratios(schedule, ratios)
    return Published(made, tuple(ratios), tuple(first_and_last), trace.calls)


def published_targets(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    steps: int = 200,
    cond: Cond | None = None,
    guidance: float | None = None,
) -> list[Tensor]:
    """The original's targets: DDIM of `steps` steps, uniform in time, with both slips."""
    first, last = schedule.times[0], schedule.times[-1]
    times = grid(schedule.noise, steps, "time", t_start=first, t_end=last)
    teacher = multistep(schedule.noise, times, 1, spec=dpm("data", 1))
    states = states_on_the_way(teacher, denoiser, x_T, set(range(steps)), cond, guidance)
    wanted = published_indices(schedule.times, times)
    return [states[0], *(states[k] for k in wanted)]


def published_indices(student: Sequence[float], teacher: Sequence[float]) -> list[int]:
    """Which teacher state the released search takes as the target of every step."""
    n, tolerance = len(student) - 1, 1e-9 * abs(student[0])
    found = []
    for i in range(n):
        t = student[i + 1] if i < n - 2 else student[-1]
        label = max(k for k, s in enumerate(teacher) if s >= t - tolerance)
        found.append(min(label + 1, len(teacher) - 1))
    return found


def states_on_the_way(
    teacher: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    at: set[int],
    cond: Cond | None,
    guidance: float | None,
) -> list[Tensor]:
    """States (B, *shape) of a run at the calls `at`, and its end point."""
    states: list[Tensor] = []

    def keep(progress: Progress) -> None:
        if progress.call in at:
            states.append(progress.state)

    end = sample(teacher, denoiser, x_T, cond=cond, guidance=guidance, callback=keep)
    return [*states, end]
