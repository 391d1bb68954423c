"""The program of any diffusers scheduler: what it does to a model, read off by running it once.

A scheduler's steps are linear in the state and in the network's outputs, and its coefficients do
not depend on the image. So it runs here on symbols instead of images: tensors whose entries are
coordinates over {X_0, X_1, ..., D_0, D_1, ...}, with X_c its state before network call c and D_c
the data prediction of that call. What comes out of step c are the coefficients of a program's row.
Fresh noise is recognised by its seed. Schedulers compute in float32, so coefficients are right to
about 1e-7.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.network import NetworkFacts
from fewstep.space.errors import ScheduleError, one_line
from fewstep.space.noise import EDM, NoiseSchedule, RectifiedFlow
from fewstep.space.program import Program, ProgramSchedule

_LINEAR = 1e-5


def stock_schedule(
    scheduler: Any,
    network: NetworkFacts,
    calls: int,
    settings: Callable[[int], Mapping[str, Any]] | None = None,
) -> ProgramSchedule:
    """What a diffusers scheduler does in `calls` network calls, as a schedule.

    Args:
        scheduler: the scheduler; it is left as it is.
        network: what its network was trained as.
        calls: network calls. A scheduler of several calls a step takes fewer steps; where none
            make this number, the next lower one, and the calls left over have weight 0.
        settings: n -> what a pipeline passes to `set_timesteps` for n steps; by default the number
            alone.

    Raises:
        ScheduleError: the scheduler refuses every number of steps, or is not linear.
    """
    name = type(scheduler).__name__
    if name.startswith("DDPM") and network.learned_variance:
        raise ScheduleError(f"{name} adds noise of a learned variance, which no schedule can say")
    settings = settings or (lambda n: {"num_inference_steps": n})
    unclipped = {k: False for k in ("clip_sample", "thresholding") if k in scheduler.config}
    ready, steps = _ready(scheduler, calls, settings, unclipped)  # data predictions come clipped
    times = torch.stack([_time(network.noise, ready, c) for c in range(len(ready.timesteps))])
    alpha, sigma = network.noise.alpha(times), network.noise.sigma(times)
    rows, scale, fresh = _trace(ready, network, alpha, sigma)
    flow = isinstance(network.noise, RectifiedFlow)  # starts from unit noise
    start = network.noise.t_range[0] if flow else float(times[0])
    init = _init(ready) / network.noise.prior_scale(start)
    program = _program(network.noise, times, rows, scale, fresh, init)
    if network.clip is not None:
        _require_same(_ready(scheduler, calls, settings, {})[0], network, program, init, scale)
    provenance = {"source": f"stock:{name}", "steps": steps, "config": dict(_plain(ready.config))}
    if program.nfe < calls:
        provenance["calls"] = program.nfe
    return ProgramSchedule(
        noise=network.noise,
        program=_padded(program, calls),
        start=start,
        end=network.noise.t_data,
        provenance=provenance,
    )


def _ready(
    scheduler: Any,
    calls: int,
    settings: Callable[[int], Mapping[str, Any]],
    changes: Mapping[str, Any],
) -> tuple[Any, int]:
    """A fresh scheduler whose list of timesteps has at most `calls` entries, and its steps."""
    config = {**scheduler.config, **changes}
    config.pop("_use_default_values", None)  # from_config would undo what a pipeline changed
    name = type(scheduler).__name__
    for steps in range(calls, 0, -1):
        ready = type(scheduler).from_config(config)
        try:
            ready.set_timesteps(**settings(steps))
        except Exception as error:
            raise ScheduleError(f"{name} cannot make {steps} steps: {one_line(error)}") from error
        if len(ready.timesteps) <= calls:
            return ready, steps
    raise ScheduleError(f"{name} makes more than {calls} network calls in one step")


def _init(scheduler: Any) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def _time(noise: NoiseSchedule, scheduler: Any, c: int) -> Tensor:
    """The time of the level that the network is told at call c."""
    told: Tensor = scheduler.timesteps[c].to("cpu", torch.float64)
    if isinstance(noise, RectifiedFlow):
        sigma = told / noise.label_scale
        return sigma / (noise.shift - (noise.shift - 1) * sigma)
    if isinstance(noise, EDM):
        level: Tensor = scheduler.sigmas[c].to("cpu", torch.float64)
        return level
    return told


def _trace(
    scheduler: Any, network: NetworkFacts, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What every step does.

    Returns:
        The coefficients of X_{c+1} over (X_0..X_{C-1}, D_0..D_{C-1}), shape (C, 2C); the scales
        from X_c to the state y_c that the denoiser sees; the weights of fresh noise.
    """
    calls = len(alpha)
    rows = torch.zeros(calls, 2 * calls, dtype=torch.float64)
    scale, fresh = torch.ones(calls, dtype=torch.float64), torch.zeros(calls, dtype=torch.float64)
    for c, t in enumerate(scheduler.timesteps):
        sample, D = _unit(2 * calls, c), _unit(2 * calls, calls + c)
        scaled = sample  # flow schedulers do not scale
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, t)
        if network.sigma_data is None:
            scale[c] = float(scaled[0, c])
        out = _output(network, scale[c] * sample, D, alpha[c], sigma[c])
        after = _stepped(scheduler, out, c, sample)
        rows[c], fresh[c] = _without_noise(after, c, type(scheduler).__name__)
    return rows, scale, fresh


def _stepped(scheduler: Any, out: Tensor, c: int, sample: Tensor) -> Tensor:
    """The state after step c of a scheduler, its noise of seed c."""
    more: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        more["generator"] = torch.Generator().manual_seed(c)
    try:
        after: Tensor = scheduler.step(out, scheduler.timesteps[c], sample, **more)[0]
    except Exception as error:
        line = f"{type(scheduler).__name__} takes no plain step: {one_line(error)}"
        raise ScheduleError(line) from error
    return after.to(torch.float64)


def _require_same(
    scheduler: Any, network: NetworkFacts, program: Program, init: float, scale: Tensor
) -> None:
    """Compare a scheduler that clips with its program, on outputs that are clipped.

    Raises:
        ScheduleError: they differ, as with DDIM: it clips the data prediction, but goes on with
            the noise prediction from before.
    """
    g, name, found = torch.Generator().manual_seed(0), type(scheduler).__name__, list[Tensor]()

    def drawn() -> Tensor:  # twice the same, so that fresh noise shows in the difference
        return torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64).repeat(2, 1, 1, 1)

    start = drawn()  # x_T
    state, y = init * start, program.init[0] * start
    after = _after(scale)
    for c in range(len(scheduler.timesteps)):
        out = 3 * drawn()
        found.append(network.data_at(y, out, program.alpha[c], program.sigma[c]))
        row, _ = _without_noise(_stepped(scheduler, out, c, state), c, name)
        state = row.reshape(1, *start.shape[1:]).repeat(2, 1, 1, 1)
        size = float(y.abs().max())  # schedulers compute in float32, with large terms that cancel
        parts = [program.r[c] * y, program.e[c] * start]
        parts += [b * D for b, D in zip(program.b[c], found, strict=False)]
        y, size = torch.stack(parts).sum(0), size + sum(float(p.abs().max()) for p in parts)
        if float((after[c] * state - y).abs().max()) > 1e-3 * size:
            raise ScheduleError(
                f"{name} clips data predictions in a way that no schedule can say: set "
                "clip_sample and thresholding to false in its configuration"
            )
        state = y / after[c]  # the scheduler's roundoff does not add up


def _unit(size: int, at: int) -> Tensor:
    """One symbol, twice in a batch, so that fresh noise shows in the difference."""
    unit = torch.zeros(2, size, 1, 1, dtype=torch.float64)
    unit[:, at] = 1.0
    return unit


def _output(network: NetworkFacts, y: Tensor, D: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network's output whose data prediction at state y is D: inverts `NetworkFacts.data`."""
    zero = torch.zeros_like(y)
    offset = _data(network, y, zero, alpha, sigma)
    slope = _data(network, zero, torch.ones_like(y), alpha, sigma)
    return (D - offset) / slope


def _data(network: NetworkFacts, y: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return replace(network, clip=None).data_at(y, out, alpha, sigma)


def _without_noise(after: Tensor, seed: int, name: str) -> tuple[Tensor, float]:
    """The state after a step without its fresh noise, and the weight of the noise."""
    if not bool(torch.isfinite(after).all()):
        raise ScheduleError("the scheduler's steps are not finite")
    if torch.equal(after[0], after[1]):
        return after[0].flatten(), 0.0
    for dtype in (torch.float64, torch.float32):  # schedulers draw in either
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(after.shape, generator=generator, dtype=dtype).to(torch.float64)
        apart = (drawn[0] - drawn[1]).flatten()
        weight = float((after[0] - after[1]).flatten() @ apart / (apart @ apart))
        row = (after - weight * drawn).flatten(1)
        if bool((row[0] - row[1]).abs().max() < _LINEAR * (1 + abs(weight))):
            return row[0], weight
    raise ScheduleError(f"{name} draws noise in a way that no schedule of ours can say")


def _program(
    noise: NoiseSchedule,
    times: Tensor,
    rows: Tensor,
    scale: Tensor,
    fresh: Tensor,
    init: float,
) -> Program:
    """Rows over the states that the denoiser sees; older states are written out."""
    calls = len(times)
    r, e, b = torch.zeros(calls), torch.zeros(calls), torch.zeros(calls, calls)
    r, e, b = r.double(), e.double(), b.double()
    after = _after(scale)
    written = torch.zeros(calls + 1, 1 + calls, dtype=torch.float64)  # X_c over x_T, D_0, ...
    written[0, 0] = init
    for c in range(calls):
        own, older = rows[c, c], rows[c, :c]
        if bool((older.abs() > _LINEAR).any()) and bool((fresh[:c] != 0).any()):
            raise ScheduleError("a step that goes back to a state before fresh noise has no row")
        rest = older @ written[:c]
        rest[1:] += rows[c, calls:]
        written[c + 1] = own * written[c] + rest
        r[c], e[c], b[c] = after[c] * own / scale[c], after[c] * rest[0], after[c] * rest[1:]
    if not bool(torch.isfinite(written).all()):
        raise ScheduleError("the scheduler's steps are not finite")
    return Program(
        t=times,
        label=noise.label(times),
        alpha=noise.alpha(times),
        sigma=noise.sigma(times),
        init=torch.tensor([scale[0] * init, 0.0], dtype=torch.float64),
        r=r,
        e=e,
        k=torch.zeros_like(r),
        b=b.tril(),
        g=fresh * after,
    )


def _after(scale: Tensor) -> Tensor:
    """The scale of the state that each step ends in: the last is the sample itself."""
    return torch.cat([scale[1:], torch.ones(1, dtype=torch.float64)])


def _padded(program: Program, calls: int) -> Program:
    """The program with calls of weight 0 at its end."""
    more = calls - program.nfe
    if more == 0:
        return program

    def last(values: Tensor) -> Tensor:
        return torch.cat([values, values[-1:].expand(more)])

    def filled(values: Tensor, value: float) -> Tensor:
        return torch.cat([values, torch.full((more,), value, dtype=torch.float64)])

    asked = {name: last(getattr(program, name)) for name in ("t", "label", "alpha", "sigma")}
    rest: dict[str, Any] = {name: filled(getattr(program, name), 0.0) for name in ("e", "k", "g")}
    return replace(
        program,
        **asked | rest,
        r=filled(program.r, 1.0),
        b=torch.nn.functional.pad(program.b, (0, more, 0, more)),
    )


def _plain(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a configuration a JSON file can hold."""
    held = (str, int, float, bool, type(None))
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, held)
        and not key.startswith("_")
        and not (isinstance(value, float) and not math.isfinite(value))
    }
