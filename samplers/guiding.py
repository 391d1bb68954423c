"""Guidance of every call in a diffusers pipeline, by the callback that pipelines offer.

    scale = pipe.scheduler.guidance_scales[0]
    pipe(..., guidance_scale=scale, callback_on_step_end=pipe.scheduler.guidance_callback())

A pipeline that reads its scale once, or feeds it to the network as an embedding, would ignore the
change: such pipelines are refused.

Where the schedule leaves calls unguided (scale 1), the callback is given the pipeline:

    callback_on_step_end=pipe.scheduler.guidance_callback(pipe)

Pipelines decide once whether they ask for both branches, with and without the condition, and then
ask for them as one batch. In an unguided call the network is shown the half with the condition
alone, and its answer stands for both: it is asked once, from the first call on, and any scale
gives the conditional prediction. Pipelines that put the branches into two batches are refused.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fewstep.samplers.network import NETWORKS
from fewstep.space.errors import ScheduleError

if TYPE_CHECKING:
    from fewstep.samplers.diffusers import FewstepScheduler

_READS = re.compile(r"self\._?guidance_scale\s*\*|\*\s*self\._?guidance_scale\b")
_HALVES = re.compile(r"noise_pred_uncond,\s*\w+\s*=\s*noise_pred\.chunk\(2\)")
_HOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class GuidanceCallback:
    """Sets a pipeline's guidance scale for the next call from the schedule's program.

    Args:
        scheduler: holds the programs.
        pipe: the pipeline, needed where calls are unguided.

    Raises:
        ScheduleError: unguided calls and no pipeline, or one that cannot ask a single branch.
    """

    def __init__(self, scheduler: FewstepScheduler, pipe: Any = None) -> None:
        self._scheduler = scheduler
        if not scheduler.leaves_unguided:
            return
        if pipe is None:
            raise ScheduleError(
                "the schedule leaves calls unguided, which the network is asked once for: pass "
                "the pipeline, callback_on_step_end=pipe.scheduler.guidance_callback(pipe)"
            )
        found = [getattr(pipe, name, None) for name in NETWORKS]
        networks = [network for network in found if isinstance(network, nn.Module)]
        if not networks or not _HALVES.search(inspect.getsource(type(pipe))):
            raise ScheduleError(
                f"{type(pipe).__name__} does not ask for both branches of guidance as one batch, "
                "so that a call cannot be left unguided: use a schedule that guides every call"
            )

        def once() -> bool:
            return pipe.scheduler is scheduler and scheduler.unguided_now

        for network in networks:
            for hook in _HOOKS.pop(network, []):
                hook.remove()
            _HOOKS[network] = _hooked(network, once)

    def __call__(self, pipe: Any, i: int, t: object, values: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after every step.

        Raises:
            ScheduleError: a pipeline that does not read its scale at every call, or that was
                started with another scale than the schedule's first.
        """
        scales = self._scheduler.guidance_scales
        if scales and i == 0:
            _check_pipeline(pipe, scales)
        after = (i + 1) % max(1, len(scales))  # after the last call, the first of another run
        if scales:
            pipe._guidance_scale = max(scales[after], math.nextafter(1.0, 2.0))
            self._scheduler.guided(after)
        return values


def _hooked(network: nn.Module, once: Callable[[], bool]) -> list[Any]:
    """Hooks that show a network the second half of its batch while `once`, and double its answer.

    Returns:
        The hooks' handles.
    """
    halved: list[int] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        halved.clear()
        state = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if not once() or state is None or state.ndim == 0 or len(state) % 2:
            return None
        size = len(state)
        halved.append(size // 2)
        cut = lambda v: v[size // 2 :] if v.ndim and len(v) == size else v  # noqa: E731
        return _mapped(args, cut), _mapped(kwargs, cut)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not halved:
            return None
        size = halved.pop()
        double = lambda v: v.repeat(2, *(1,) * (v.ndim - 1)) if len(v) == size else v  # noqa: E731
        return _mapped(output, double)

    return [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, with_kwargs=True),
    ]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A structure of tensors with each of them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):  # also the named outputs of diffusers' networks
        items = {k: _mapped(v, change) for k, v in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return value


def _check_pipeline(pipe: Any, scales: list[float]) -> None:
    name = type(pipe).__name__
    if not hasattr(pipe, "_guidance_scale") or not _READS.search(inspect.getsource(type(pipe))):
        raise ScheduleError(
            f"{name} does not read its guidance scale at every call: use a schedule without "
            "guidance of its own"
        )
    if any(w < 1 for w in scales):
        raise ScheduleError(f"guidance {min(scales):g} is below 1, which {name} takes as none")
    if not (
        pipe._guidance_scale > 1 and math.isclose(pipe._guidance_scale, scales[0], rel_tol=1e-6)
    ):
        raise ScheduleError(
            f"the schedule's first guidance scale is {scales[0]:g}: pass guidance_scale="
            f"{max(scales[0], 1 + 1e-7):.8g} to {name}, not {pipe._guidance_scale:g}"
        )
