"""A sampler of k-diffusion's signature, as ComfyUI and others call it.

    x = sample_fewstep(model, x, sigmas, schedule=load_schedule("nfe05.json"))

`model(x, sigma, **extra_args)` is a k-diffusion denoiser: variance-exploding coordinates, returns
x0. The schedule may live in any frame: its state y is x alpha, so the network is asked at
(y / alpha, sigma / alpha) of the query and the sample handed back is y / alpha at the last time.
The file's own times hold; `sigmas` tells where to start (and how many steps are left of an
image-to-image run), and a first value that no time of the schedule matches is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, bcast
from fewstep.samplers.ode import Progress, run
from fewstep.space import OdeSchedule, ProgramSchedule, ScheduleError
from fewstep.space.noise import NoiseSchedule


class KDiffusionDenoiser:
    """A k-diffusion denoiser behind the Denoiser contract, in the frame of `noise`."""

    def __init__(
        self, model: Callable[..., Tensor], noise: NoiseSchedule, extra_args: Mapping[str, Any]
    ) -> None:
        self.noise = noise
        self._model, self._extra = model, dict(extra_args)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser`; conditions and guidance are the model's own `extra_args`."""
        t = t.to(torch.float64)
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        return self._model(x / bcast(alpha, x), (sigma / alpha).to(x), **self._extra)


@torch.no_grad()
def sample_fewstep(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    schedule: OdeSchedule | ProgramSchedule,
    tolerance: float = 0.05,
) -> Tensor:
    """Sample with a schedule file through k-diffusion's interface.

    Args:
        model: (x, sigma (B,), **extra_args) -> x0, in variance-exploding coordinates.
        x: start state at sigmas[0], shape (B, *shape).
        sigmas: the caller's grid; only its first value is used.
        extra_args: passed on to the model.
        callback: called with {"x", "i", "sigma", "sigma_hat", "denoised"} after every call.
        disable: accepted for the signature; there is no progress bar to disable.
        schedule: the schedule to replay.
        tolerance: allowed distance, in lam, of sigmas[0] from a time of the schedule.

    Returns:
        The sample in variance-exploding coordinates, at the schedule's last time.

    Raises:
        ScheduleError: sigmas[0] is not a level the schedule starts a step from.
    """
    noise = schedule.noise
    times = torch.tensor(schedule.times, dtype=torch.float64)
    here = -torch.log(sigmas[0].detach().double().cpu())
    gaps = (noise.lam(times) - here).abs()
    k = int(gaps[:-1].argmin()) if isinstance(schedule, OdeSchedule) else 0
    if float(gaps[k]) > tolerance:
        levels = ", ".join(f"{float(s):.4g}" for s in torch.exp(-noise.lam(times)))
        raise ScheduleError(
            f"sigmas[0] = {float(sigmas[0]):.4g} is not one of the schedule's levels ({levels}): "
            "start from one of them, or set tolerance"
        )
    if k > 0 and isinstance(schedule, OdeSchedule):
        schedule = schedule.tail(k)

    def tell(progress: Progress) -> None:
        if callback is not None:
            t = progress.t.double()
            alpha = bcast(noise.alpha(t), progress.state)
            sigma = (noise.sigma(t) / noise.alpha(t))[0]
            state = progress.state / alpha
            facts = {"x": state, "i": progress.call, "sigma": sigma, "sigma_hat": sigma}
            callback(facts | {"denoised": progress.denoised})

    ends = torch.tensor([schedule.times[0], schedule.times[-1]], dtype=torch.float64)
    first, last = noise.alpha(ends).tolist()
    if isinstance(schedule, ProgramSchedule):
        last = 1.0  # a bare program does not say where it lands; its last level is close to data
    denoiser = KDiffusionDenoiser(model, noise, extra_args or {})
    y = run(
        schedule.program,
        denoiser,
        x * first,
        m=schedule.constant,
        callback=tell,
        options=schedule.options,
    )
    found: Tensor = y / last
    return found
