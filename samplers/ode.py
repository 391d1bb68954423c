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
from fewstep.space.program import Program, ProgramSchedule
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
    return run(
        schedule.program,
        denoiser,
        x_T,
        cond=cond,
        guidance=guidance,
        m=schedule.constant,
        generator=generator,
        callback=callback,
        options=schedule.options,
        shifter=shifter,
    )


def run(
    program: Program,
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    m: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[Progress], None] | None = None,
    options: dict[str, Any] | None = None,
    shifter: Shifter | None = None,
    check: bool = True,
    share: bool = False,
) -> Tensor:
    """Run one program on x_T (B, *shape), or M stacked ones on the same x_T: (M, B, *shape).

    `check` raises a ModelError at the first data prediction that is not finite; without it NaN
    travels to the result, so that a batch of candidates survives one that diverges. `share` asks
    the network once for candidates whose rows so far are equal: equal states, equal outputs. The
    first call is always shared by candidates that start at one time. `shifter` compiles the rows
    of one program while it runs, with a shift per image into a program per image.
    """
    if options and "time_shift" in options and shifter is None:
        raise ScheduleError(
            "options.time_shift compiles rows while it samples, from the steps: call sample() "
            "with a schedule that holds its steps"
        )
    stacked = program.r.ndim == 2
    count = program.r.shape[0] if stacked else 1
    x_T = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    batch, shape = x_T.shape[0], x_T.shape[1:]
    p = _Coefficients(program, x_T)
    if m is None and p.uses_m:
        raise ScheduleError(
            "the schedule starts from a constant image, which lies beside its file under the "
            "same name with .safetensors: copy it along, or call with_constant(m)"
        )
    require_networks(program, denoiser)
    groups = prefix_groups(program) if stacked and share else None
    batches = questions(program, groups, batch, x_T, alone=shifter is not None)
    origin = x_T.expand(count, batch, *shape)
    if m is not None and p.uses_m and not _fits(m, shape):
        raise ScheduleError(
            f"the schedule's constant image has shape {tuple(m.shape)}, but samples have "
            f"{tuple(shape)}: it belongs to another model"
        )
    constant = None if m is None else m.to(x_T)
    y = p.at("p", 0) * origin
    if constant is not None:
        y = y + p.at("k0", 0) * constant
    history: list[Tensor] = []
    finite: list[Tensor | None] = []  # read after the last call: no wait on the device in between

    def advanced(c: int) -> Tensor:
        fresh = None
        if p.noisy(c):  # one draw, shared by candidates
            fresh = torch.empty_like(x_T).normal_(generator=generator)
            fresh = fresh if shifter is None else fresh.reshape(y.shape)
        return p.advance(c, y, origin, constant, history, fresh)

    for turn in range(len(batches)):
        first, *others = batches[turn].calls
        if shifter is not None:
            now = shifter.before(first, y.reshape(x_T.shape))
            if program is not now:
                program, p = now, _Coefficients(now, x_T)
                if program.r.ndim == 2:  # from here on every image is its own candidate
                    count, batch = len(x_T), 1
                y, origin, *history = (
                    v.reshape(count, batch, *shape) for v in (y, origin, *history)
                )
                batches = questions(program, None, batch, x_T, alone=True)
        q, states = batches[turn], [y]
        for c in others:
            y = advanced(c - 1)
            states.append(y)
        flat = y if len(states) == 1 else torch.cat(states)
        flat = (flat if q.rows is None else flat[q.rows]).reshape(q.asked * batch, *shape)
        D = ask(denoiser, flat, q, cond, guidance, whole=shifter is not None)
        D = D.to(x_T.dtype)
        if options and "threshold" in options:
            D = threshold(D, **options["threshold"])
        finite.append(torch.isfinite(D).all() if check else None)
        if callback is not None and not others:
            callback(Progress(first, q.t, flat, D))
        D = D.reshape(q.asked, batch, *shape)
        outputs = (D if q.back is None else D[q.back]).split(count)
        history += outputs
        if callback is not None and others:
            for k, c in enumerate(q.calls):
                t = program.t[..., c].reshape(-1).repeat_interleave(batch).to(x_T.device)
                callback(Progress(c, t, states[k].flatten(0, 1), outputs[k].flatten(0, 1)))
        y = advanced(q.calls[-1])
    for q, good in zip(batches, finite, strict=True):
        if good is not None and not bool(good):
            raise ModelError(
                f"the data prediction of network call {q.calls[0]} "
                f"(t = {program.t[..., q.calls[0]].tolist()}) is "
                "not finite: check the model's output kind and noise schedule"
            )
    return y if stacked else y.reshape(x_T.shape)


def _fits(m: Tensor, shape: torch.Size) -> bool:
    """Whether an image can be added to samples of a shape."""
    return m.ndim <= len(shape) and all(
        a in (1, b) for a, b in zip(m.shape[::-1], shape[::-1], strict=False)
    )


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
