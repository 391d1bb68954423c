"""Guidance of every call in a diffusers pipeline, by the callback that pipelines offer.

    scale = pipe.scheduler.guidance_scales[0]
    pipe(..., guidance_scale=scale, callback_on_step_end=pipe.scheduler.guidance_callback())

A pipeline that reads its scale once, or feeds it to the network as an embedding, would ignore the
change: such pipelines are refused.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import TYPE_CHECKING, Any

from fewstep.space.errors import ScheduleError

if TYPE_CHECKING:
    from fewstep.samplers.diffusers import FewstepScheduler

_READS = re.compile(r"self\._?guidance_scale\s*\*|\*\s*self\._?guidance_scale\b")


class GuidanceCallback:
    """Sets a pipeline's guidance scale for the next call from the schedule's program."""

    def __init__(self, scheduler: FewstepScheduler) -> None:
        self._scheduler = scheduler

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
