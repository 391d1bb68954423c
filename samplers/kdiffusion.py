"""A sampler of k-diffusion's signature, as ComfyUI and others call it.

    x = sample_fewstep(model, x, sigmas, schedule=load_schedule("nfe05.json"))

`model(x, sigma, **extra_args)` is a k-diffusion denoiser that returns x0. Its states x and levels
sigma follow one of two conventions, and so do ours at the border:

    ve     x = x0 + sigma eps, sigma = sigma_t / alpha_t of the schedule (diffusion models)
    flow   x = (1 - sigma) x0 + sigma eps, sigma in 0..1 (rectified flows, as ComfyUI has them)

The caller's list is honoured at both ends: it says from which of the schedule's levels to start
(image to image) and at which to stop (split samplers, experts for high and low noise). Every value
of it must be a level of the schedule, because between its ends the file's own times hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, bcast
from fewstep.samplers.ode import Loop, Progress
from fewstep.samplers.replay import Replayed, from_call, step_starts
from fewstep.space import OdeSchedule, Program, ScheduleError
from fewstep.space.noise import NoiseSchedule, RectifiedFlow


def boundaries(schedule: Replayed) -> list[tuple[int, float]]:
    """(network call, time) where a run may start or stop, in order; the last is the end.

    The first call of every step; of a file with only a program, every call.
    """
    if isinstance(schedule, OdeSchedule):
        found = [(call, schedule.times[i]) for call, i in step_starts(schedule).items()]
    else:
        found = [(call, t) for call, t in enumerate((schedule.start, *schedule.times[1:]))]
    return [*found, (schedule.nfe, schedule.end)]


def sigmas_of(schedule: Replayed) -> Tensor:
    """The list that a caller hands in for the whole schedule, float32, shape (steps + 1,).

    Levels sigma / alpha, of a rectified flow its sigma in 0..1; 0 at the end if the schedule ends
    at clean data.
    """
    flow = isinstance(schedule.noise, RectifiedFlow)
    times = torch.tensor([t for _, t in boundaries(schedule)], dtype=torch.float64)
    return _levels(schedule.noise, times, flow=flow).float()


def _levels(noise: NoiseSchedule, t: Tensor, *, flow: bool) -> Tensor:
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    return sigma / (alpha + sigma) if flow else sigma / alpha


class KDiffusionDenoiser:
    """A k-diffusion denoiser behind the Denoiser contract, in the frame of `noise`.

    Args:
        model: (x, sigma (B,), **extra_args) -> x0.
        noise: the frame.
        extra_args: passed on to the model; "cond_scale" is set where a schedule sets guidance.
        flow: the model's convention is "flow" (module docstring).
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        noise: NoiseSchedule,
        extra_args: Mapping[str, Any],
        *,
        flow: bool = False,
    ) -> None:
        self.noise = noise
        self._model, self._extra, self._flow = model, dict(extra_args), flow

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser`; conditions are the model's own `extra_args`."""
        t = t.to(torch.float64)
        scale = _scale(self.noise, t, flow=self._flow)
        extra = dict(self._extra)
        if guidance is not None:
            extra["cond_scale"] = float(torch.as_tensor(guidance).flatten()[0])
        return self._model(
            x / bcast(scale, x), _levels(self.noise, t, flow=self._flow).to(x), **extra
        )


def _scale(noise: NoiseSchedule, t: Tensor, *, flow: bool) -> Tensor:
    """Our state over the model's state."""
    return noise.alpha(t) + noise.sigma(t) if flow else noise.alpha(t)


@torch.no_grad()
def sample_fewstep(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    schedule: Replayed,
    tolerance: float = 0.05,
) -> Tensor:
    """Sample with a schedule file through k-diffusion's interface.

    Args:
        model: (x, sigma (B,), **extra_args) -> x0.
        x: start state at sigmas[0], shape (B, *shape).
        sigmas: the caller's list, decreasing, each a level of the schedule; its first and its last
            value say where to start and to stop. A last 0 is the schedule's own end.
        extra_args: passed on to the model. "seed" seeds the fresh noise of stochastic schedules;
            "cond_scale" is set where the schedule sets guidance.
        callback: called with {"x", "i", "sigma", "sigma_hat", "denoised"} after every call.
        disable: accepted for the signature; there is no progress bar to disable.
        schedule: the schedule to replay.
        tolerance: allowed distance, in log sigma, of a value from a level of the schedule.

    Returns:
        The state at the last value of the list, in the model's convention.

    Raises:
        ScheduleError: a value that is no level of the schedule, a model of the other convention,
            or guidance of every call that the model does not take.
    """
    extra = dict(extra_args or {})
    levels = [float(s) for s in torch.as_tensor(sigmas).detach().flatten().cpu()]
    if len(levels) < 2:
        return x
    flow = _convention(schedule, levels, tolerance)
    _check_model(model, flow=flow)
    _check_guidance(schedule, extra)
    ends, (first, last) = boundaries(schedule), _place(schedule, levels, tolerance, flow=flow)
    (begin, t_first), (stop, t_last) = ends[first], ends[last]
    part = from_call(schedule, begin)
    program = _head(part.program, stop - begin)
    noise = schedule.noise

    seeded = program.stochastic and "seed" in extra
    generator = torch.Generator(x.device).manual_seed(int(extra["seed"])) if seeded else None
    t = torch.tensor([t_first, t_last], dtype=torch.float64)
    start, end = _scale(noise, t, flow=flow).tolist()
    denoiser = KDiffusionDenoiser(model, noise, extra, flow=flow)
    told = None if callback is None else _told(callback, noise, flow=flow)
    loop = Loop(program, x * start, part.constant, generator)
    found: Tensor = loop.through(denoiser, None, None, part.options, callback=told) / end
    return found


def _told(
    callback: Callable[[dict[str, Any]], None], noise: NoiseSchedule, *, flow: bool
) -> Callable[[Progress], None]:
    """A k-diffusion callback as one of ours."""

    def tell(progress: Progress) -> None:
        t = progress.t.double()
        state = progress.state / bcast(_scale(noise, t, flow=flow), progress.state)
        sigma = _levels(noise, t, flow=flow)[0]
        facts = {"x": state, "i": progress.call, "sigma": sigma, "sigma_hat": sigma}
        callback(facts | {"denoised": progress.denoised})

    return tell


def _head(program: Program, calls: int) -> Program:
    """The first `calls` rows; a later row never changes an earlier state."""
    if calls == program.nfe:
        return program
    names = ("t", "label", "alpha", "sigma", "r", "e", "k", "g")
    cut = {name: getattr(program, name)[:calls] for name in names}
    guidance = None if program.guidance is None else program.guidance[:calls]
    return replace(program, **cut, b=program.b[:calls, :calls], guidance=guidance)


def _place(
    schedule: Replayed, levels: list[float], tolerance: float, *, flow: bool
) -> tuple[int, int]:
    """The boundaries at which the caller's list starts and stops."""
    own = [float(s) for s in _own(schedule, flow=flow)]
    found = [_nearest(own, s, tolerance, last=i == len(levels) - 1) for i, s in enumerate(levels)]
    for i, (s, at) in enumerate(zip(levels, found, strict=True)):
        if at is None:
            listed = ", ".join(f"{level:.4g}" for level in own)
            raise ScheduleError(
                f"sigmas[{i}] = {s:.4g} is not one of the schedule's levels ({listed}): give "
                "levels of the schedule, or set tolerance"
            )
        if i > 0 and at <= (found[i - 1] or 0):
            raise ScheduleError(
                f"sigmas[{i}] = {s:.4g} is not a level below sigmas[{i - 1}] = "
                f"{levels[i - 1]:.4g}: levels must decrease"
            )
    return found[0] or 0, found[-1] or 0


def _own(schedule: Replayed, *, flow: bool) -> Tensor:
    times = torch.tensor([t for _, t in boundaries(schedule)], dtype=torch.float64)
    return _levels(schedule.noise, times, flow=flow)


def _nearest(own: list[float], sigma: float, tolerance: float, *, last: bool) -> int | None:
    """Index of the level that `sigma` is, or None."""
    if sigma == 0:
        return len(own) - 1 if last else None
    gaps = [
        abs(torch.log(torch.tensor(level / sigma)).item()) if 0 < level < float("inf") else 1e9
        for level in own
    ]
    at = min(range(len(own)), key=gaps.__getitem__)
    return at if gaps[at] <= tolerance else None


def _convention(schedule: Replayed, levels: list[float], tolerance: float) -> bool:
    """Whether the caller's list is in the flow convention.

    Only a rectified flow has it; there, the convention whose levels the list holds.
    """
    if not isinstance(schedule.noise, RectifiedFlow):
        return False
    fits = []
    for flow in (True, False):
        try:
            _place(schedule, levels, tolerance, flow=flow)
        except ScheduleError:
            continue
        fits.append(flow)
    if len(fits) == 2:
        raise ScheduleError(
            f"sigmas from {levels[0]:.4g} to {levels[-1]:.4g} are levels of this rectified flow "
            "both as sigma in 0..1 and as sigma / alpha: pass more of its levels"
        )
    return fits[0] if fits else max(levels) <= 1


def _check_guidance(schedule: Replayed, extra: Mapping[str, Any]) -> None:
    """Refuse guidance of every call where the model takes none."""
    if schedule.program.guidance is not None and "cond_scale" not in extra:
        raise ScheduleError(
            "the schedule sets the guidance scale of every call, which this model does not take: "
            "pass cond_scale in extra_args, or use a schedule without guidance of its own"
        )


def _check_model(model: object, *, flow: bool) -> None:
    """Refuse a ComfyUI model of the other convention, where it says what it is."""
    inner: Any = model
    for _ in range(4):
        sampling = getattr(inner, "model_sampling", None)
        if sampling is not None:
            break
        inner = getattr(inner, "inner_model", None)
    else:
        return
    top = getattr(sampling, "sigma_max", None)
    if top is not None and (float(top) <= 1.0) != flow:
        kinds = ("a rectified flow", "a diffusion model")
        raise ScheduleError(
            f"the schedule is for {kinds[not flow]} but the model's sigma_max is "
            f"{float(top):.4g}, that of {kinds[flow]}: this schedule was made for another model"
        )
