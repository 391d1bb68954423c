"""The one loop: runs a program, or a batch of candidate programs, on a Denoiser.

    y = p_0 x_T + k_0 m
    for each row c:   D_c = denoise(y, t_c)
                      y = r_c y + e_c x_T + k_c m + sum_j b_cj D_j + g_c noise

Coefficients are float64 and cast once; the state and the history are at least float32 whatever the
network's dtype, and stay where x_T is: what a call needs besides is there before the loop begins.
There are no solver classes: a new method is a new way to fill rows. With candidates stacked (a
leading axis M in the program) the network sees M B images a call, in pieces that its denoiser's
`piece` names; candidates only share the starting noise. The calls of a stage (`space.costs`) do
not use one another's outputs, and are asked together (`samplers.asking`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.asking import ask, prefix_groups, questions, require_networks
from fewstep.samplers.denoiser import Cond, Denoiser, bcast
from fewstep.samplers.shift import Shifter
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.options import Threshold
from fewstep.space.program import Program, ProgramSchedule, stack
from fewstep.space.schedule import OdeSchedule


@dataclass(frozen=True)
class Progress:
    """What a callback gets after every network call.

    Args:
        call: index of the call.
        t: query times, one per image asked.
        state: the states asked.
        denoised: their data predictions.
    """

    call: int
    t: Tensor
    state: Tensor
    denoised: Tensor


def start(schedule: OdeSchedule | ProgramSchedule, z: Tensor) -> Tensor:
    """x_T from unit noise.

    Args:
        schedule: the schedule to start; the time it starts from sets the scale (1 for VP, sigma
            for EDM and rectified flow).
        z: standard normal, shape (B, *shape).
    """
    return start_scale(schedule) * z


def start_scale(schedule: OdeSchedule | ProgramSchedule) -> float:
    """Standard deviation of x_T."""
    return float(schedule.noise.prior_scale(schedule.start))


def on_unit_noise(schedule: OdeSchedule | ProgramSchedule) -> Program:
    """The schedule's program as it acts on unit noise: p_0 and e times `start_scale`."""
    program, scale = schedule.program, start_scale(schedule)
    if scale == 1.0:
        return program
    init = program.init * torch.tensor([scale, 1.0], dtype=torch.float64)
    return replace(program, init=init, e=program.e * scale)


@torch.no_grad()
def sample(
    schedule: OdeSchedule | ProgramSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Draw samples.

    Args:
        schedule: a loaded schedule.
        denoiser: the model.
        x_T: start states, shape (B, *shape), see `start`.
        cond: conditioning tensors with leading axis B.
        guidance: guidance scale where the schedule does not set its own; None = the conditional
            model.
        generator: source of the fresh noise of schedules with eta > 0 (on x_T's device).
        callback: called after every network call.

    Returns:
        Samples, shape of x_T, dtype at least float32.

    Raises:
        ModelError: the model returns a wrong shape or something not finite; the call is named.
        ScheduleError: the schedule needs a constant image it was loaded without.
    """
    if schedule.program.e.requires_grad:
        raise ScheduleError("the program carries gradients: call run() with a program instead")
    shifter = None
    if "time_shift" in schedule.options and isinstance(schedule, OdeSchedule):
        shifter = Shifter(schedule)
    loop = Loop(schedule.program, x_T, schedule.constant, generator, shifter)
    return loop.through(denoiser, cond, guidance, schedule.options, callback=callback)


def run(
    program: Program,
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    m: Tensor | None = None,
    options: dict[str, Any] | None = None,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Tensor:
    """Run one program on x_T (B, *shape), or M stacked ones on the same x_T: (M, B, *shape).

    See `sample`; m is the constant image, options are those of a schedule. Without `check` a
    data prediction that is not finite travels to the result instead of raising a ModelError.
    """
    loop = Loop(program, x_T, m, generator)
    return loop.through(denoiser, cond, guidance, options, check=check)


def run_candidates(
    programs: Sequence[Program],
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    m: Tensor | None = None,
    options: dict[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run M programs of equal calls side by side, (M, B, *shape); see `run`.

    The network is asked once for candidates whose rows so far are equal, as those of the first
    call are, unless they carry gradients. What is not finite travels to the result, so that the
    others survive one that diverges.
    """
    together = stack(programs)
    carried = any(v.requires_grad for v in vars(together).values() if isinstance(v, Tensor))
    loop = Loop(together, x_T, m, generator)
    return loop.through(denoiser, cond, guidance, options, check=False, share=not carried)


class Loop:
    """A run on its way: the program's numbers, the states of M candidates, and their outputs."""

    def __init__(
        self,
        program: Program,
        x_T: Tensor,
        m: Tensor | None,
        generator: torch.Generator | None,
        shifter: Shifter | None = None,
    ) -> None:
        x_T = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        self.program, self.numbers = program, _Coefficients(program, x_T)
        self.x_T, self.generator, self.shifter = x_T, generator, shifter
        self.constant = _image(m, x_T, used=self.numbers.uses_m)
        self.count, self.batch = program.r.shape[0] if program.r.ndim == 2 else 1, len(x_T)
        self.origin = x_T.expand(self.count, *x_T.shape)
        self.history: list[Tensor] = []
        self.y = self.numbers.at("p", 0) * self.origin
        if self.constant is not None:
            self.y = self.y + self.numbers.at("k0", 0) * self.constant

    def through(
        self,
        denoiser: Denoiser,
        cond: Cond | None,
        guidance: float | None,
        options: dict[str, Any] | None,
        *,
        callback: Callable[[Progress], None] | None = None,
        check: bool = True,
        share: bool = False,
    ) -> Tensor:
        """From the first call to the last.

        `check` refuses outputs that are not finite; `share` asks the network once for candidates
        whose rows so far are equal.
        """
        program, x_T, shifter = self.program, self.x_T, self.shifter
        if options and "time_shift" in options and shifter is None:
            raise ScheduleError(
                "options.time_shift compiles rows while it samples, from the steps: call sample() "
                "with a schedule that holds its steps"
            )
        require_networks(program, denoiser)
        groups = prefix_groups(program) if share else None
        batches = questions(program, groups, self.batch, x_T, alone=shifter is not None)
        finite: list[Tensor | None] = []  # read after the last call: no wait on the device between
        for turn in range(len(batches)):
            first, *others = batches[turn].calls
            if self.recompiled(first):
                batches = questions(self.program, None, self.batch, x_T, alone=True)
            q, states = batches[turn], [self.y]
            for c in others:
                states.append(self.advance(c - 1))
            flat = self.y if len(states) == 1 else torch.cat(states)
            flat = (flat if q.rows is None else flat[q.rows]).reshape(-1, *x_T.shape[1:])
            D = ask(denoiser, flat, q, cond, guidance, whole=shifter is not None).to(x_T.dtype)
            if options and "threshold" in options:
                D = threshold(D, **options["threshold"])
            finite.append(torch.isfinite(D).all() if check else None)
            if callback is not None and not others:
                callback(Progress(first, q.t, flat, D))
            D = D.reshape(q.asked, self.batch, *x_T.shape[1:])
            outputs = (D if q.back is None else D[q.back]).split(self.count)
            self.history += outputs
            if callback is not None and others:
                for c, state, output in zip(q.calls, states, outputs, strict=True):
                    callback(self._progress(c, state, output))
            self.advance(q.calls[-1])
        for q, good in zip(batches, finite, strict=True):
            if good is not None and not bool(good):
                raise _not_finite(q.calls[0], self.program)
        return self.y if program.r.ndim == 2 else self.y.reshape(x_T.shape)

    def _progress(self, c: int, state: Tensor, output: Tensor) -> Progress:
        t = self.program.t[..., c].reshape(-1).repeat_interleave(self.batch)
        return Progress(c, t.to(self.x_T.device), state.flatten(0, 1), output.flatten(0, 1))

    def advance(self, c: int) -> Tensor:
        """The states after row c; its fresh noise is one draw, shared by candidates."""
        fresh = None
        if self.numbers.noisy(c):
            fresh = torch.empty_like(self.x_T).normal_(generator=self.generator)
            fresh = fresh if self.shifter is None else fresh.reshape(self.y.shape)
        now = (self.y, self.origin, self.constant, self.history, fresh)
        self.y = self.numbers.advance(c, *now)
        return self.y

    def recompiled(self, c: int) -> bool:
        """Whether the shifter has other rows from call c on; then each image may have its own."""
        if self.shifter is None:
            return False
        now = self.shifter.before(c, self.y.reshape(self.x_T.shape))
        if self.program is now:
            return False
        self.program, self.numbers = now, _Coefficients(now, self.x_T)
        if now.r.ndim == 2:  # from here on every image is its own candidate
            self.count, self.batch = len(self.x_T), 1
        shape = (self.count, self.batch, *self.x_T.shape[1:])
        self.y, self.origin = self.y.reshape(shape), self.origin.reshape(shape)
        self.history = [v.reshape(shape) for v in self.history]
        return True


def _not_finite(call: int, program: Program) -> ModelError:
    return ModelError(
        f"the data prediction of network call {call} (t = {program.t[..., call].tolist()}) is not "
        "finite: check the model's output kind and noise schedule"
    )


def _image(m: Tensor | None, x_T: Tensor, *, used: bool) -> Tensor | None:
    """The constant image beside the states; a ScheduleError where it lacks or does not fit."""
    if m is None:
        if used:
            raise ScheduleError(
                "the schedule starts from a constant image, which lies beside its file under the "
                "same name with .safetensors: copy it along, or call with_constant(m)"
            )
        return None
    shape = x_T.shape[1:]
    sides = zip(m.shape[::-1], shape[::-1], strict=False)
    if used and not (m.ndim <= len(shape) and all(a in (1, b) for a, b in sides)):
        raise ScheduleError(
            f"the schedule's constant image has shape {tuple(m.shape)}, but samples have "
            f"{tuple(shape)}: it belongs to another model"
        )
    return m.to(x_T)


class _Coefficients:
    """A program's numbers, shaped to multiply (M, B, *shape), and which of them are zero."""

    def __init__(self, program: Program, x: Tensor) -> None:
        self._extra = (1,) * x.ndim
        lead = program if program.r.ndim == 2 else None
        values = {
            "r": program.r,
            "e": program.e,
            "k": program.k,
            "g": program.g,
            "b": program.b,
            "p": program.init[..., :1],
            "k0": program.init[..., 1:],
        }
        flat = torch.cat([v.reshape(-1) for v in values.values()]).to(x)  # one copy
        parts = flat.split([v.numel() for v in values.values()])
        self._cast: dict[str, Tensor] = {
            name: part.reshape(v.shape if lead is not None else (1, *v.shape))
            for (name, v), part in zip(values.items(), parts, strict=True)
        }
        self._live = {
            name: [bool((v[..., c] != 0).any()) or v.requires_grad for c in range(v.shape[-1])]
            for name, v in values.items()
            if name != "b"
        }
        b = values["b"]
        self._used = [
            [bool((b[..., c, j] != 0).any()) or b.requires_grad for j in range(c + 1)]
            for c in range(b.shape[-1])
        ]
        graph = any(v.requires_grad for v in values.values()) or x.requires_grad
        single = lead is None and not (graph or torch.is_grad_enabled())
        self._rows = rows_of(program) if single else None
        self.uses_m = program.uses_constant

    def noisy(self, c: int) -> bool:
        """Whether row c adds fresh noise."""
        return self._live["g"][c]

    def at(self, name: str, c: int) -> Tensor:
        value: Tensor = self._cast[name][..., c]
        return value.reshape(-1, *self._extra)

    def advance(
        self,
        c: int,
        y: Tensor,
        x_T: Tensor,
        m: Tensor | None,
        history: list[Tensor],
        fresh: Tensor | None,
    ) -> Tensor:
        if self._rows is not None:
            return advance_row(self._rows, c, y, x_T, m, history, fresh)
        y = self.at("r", c) * y
        for j, D in enumerate(history):
            if self._used[c][j]:
                y = torch.addcmul(y, self._cast["b"][:, c, j].reshape(-1, *self._extra), D)
        for name, term in (("e", x_T), ("k", m), ("g", fresh)):
            if term is not None and self._live[name][c]:
                y = torch.addcmul(y, self.at(name, c), term)
        return y


Rows = dict[str, list[Any]]


def rows_of(program: Program) -> Rows:
    """The numbers of one program as plain floats, for `advance_row`."""
    return {name: getattr(program, name).tolist() for name in ("r", "e", "k", "g", "b")}


def advance_row(
    rows: Rows,
    c: int,
    y: Tensor,
    x_T: Tensor,
    m: Tensor | None,
    history: Sequence[Tensor],
    fresh: Tensor | None,
) -> Tensor:
    """Row c of one program without gradients: one kernel a term, in place on the new state.

    Whoever replays a program step by step (pipelines, particles) calls this, so that all replays
    agree to the last bit.
    """
    y = rows["r"][c] * y
    for weight, D in zip(rows["b"][c], history, strict=False):
        if weight != 0.0:
            y.add_(D, alpha=weight)
    for name, term in (("e", x_T), ("k", m), ("g", fresh)):
        if term is not None and rows[name][c] != 0.0:
            y.add_(term, alpha=rows[name][c])
    return y


def threshold(
    D: Tensor,
    quantile: float = Threshold.quantile,
    minimum: float = Threshold.minimum,
    maximum: float = Threshold.maximum,
) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487), or plain clipping.

    Clips each sample at its |D| quantile (`minimum` to `maximum`), then scales the clip to
    `minimum`.

    Args:
        D: data predictions, shape (B, *shape).
        quantile: share of |D| below the clip, over one sample; 0 clips all at `minimum`.
        minimum: the clip is at least this.
        maximum: the clip is at most this.
    """
    if quantile == 0:
        return D.clamp(-minimum, minimum)
    clip = torch.quantile(D.abs().flatten(1), quantile, dim=1).clamp(min=minimum, max=maximum)
    s = bcast(clip, D)
    return D.clamp(-s, s) * (minimum / s)
