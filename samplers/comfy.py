"""ComfyUI: a custom node that loads a schedule file and hands out SAMPLER and SIGMAS.

Put one line into `custom_nodes/fewstep.py` of a ComfyUI whose Python has fewstep installed:

    from fewstep.samplers.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

and connect both outputs to SamplerCustom or SamplerCustomAdvanced. SIGMAS may be split or cut
(SplitSigmas, denoise): the sampler starts and stops at the levels it is given. ComfyUI itself is
needed only where the node runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.kdiffusion import sample_fewstep, sigmas_of
from fewstep.samplers.replay import Replayed
from fewstep.space import FewstepError, OdeSchedule, ProgramSchedule, ScheduleError, load_schedule


def sampler_function(schedule: Replayed) -> Any:
    """A function of k-diffusion's signature for ComfyUI's KSAMPLER."""
    return partial(sample_fewstep, schedule=schedule)


def part_of(sigmas: Tensor, denoise: float) -> Tensor:
    """The end of a list for image to image: the share `denoise` of its steps, at least one.

    Raises:
        ScheduleError: denoise outside (0, 1].
    """
    if not 0 < denoise <= 1:
        raise ScheduleError(f"denoise {denoise:g} must lie above 0 and at most at 1")
    steps = max(1, round((len(sigmas) - 1) * denoise))
    return sigmas[-(steps + 1) :]


class FewstepSchedule:
    """The node: a schedule file in, SAMPLER and SIGMAS out."""

    CATEGORY = "sampling/custom_sampling"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    RETURN_NAMES = ("sampler", "sigmas")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs: the file, and the share of steps to run."""
        share = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "file": ("STRING", {"default": "nfe05.json"}),
                "denoise": ("FLOAT", share),
            }
        }

    def load(self, file: str, denoise: float = 1.0) -> tuple[Any, Tensor]:
        """(SAMPLER, SIGMAS) of a schedule file.

        Raises:
            FewstepError: a file that cannot be read or is of another kind, a `denoise` outside
                (0, 1], or no ComfyUI.
        """
        schedule = load_schedule(file)
        if not isinstance(schedule, OdeSchedule | ProgramSchedule):
            raise ScheduleError(f"{file}: kind {schedule.kind!r} does not run in ComfyUI: use ode")
        if schedule.constant is None and schedule.program.uses_constant:
            raise ScheduleError(
                f"{file}: its constant image is missing: put the .safetensors beside it"
            )
        try:
            from comfy.samplers import KSAMPLER
        except ImportError:
            raise FewstepError(
                "this node runs inside ComfyUI: elsewhere call sample_fewstep, of "
                "fewstep.samplers.kdiffusion"
            ) from None
        sigmas = part_of(sigmas_of(schedule), denoise)
        return KSAMPLER(sampler_function(schedule)), torch.as_tensor(sigmas)


NODE_CLASS_MAPPINGS: dict[str, type] = {"FewstepSchedule": FewstepSchedule}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"FewstepSchedule": "Fewstep schedule"}
