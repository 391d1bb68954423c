"""A diffusers scheduler that replays a masked schedule in block-wise text pipelines.

    pipe = LLaDA2Pipeline(model=model, tokenizer=tokenizer,
                          scheduler=FewstepBlockScheduler(schedule="nfe08.json"))
    pipe(prompt, num_inference_steps=8, block_length=32, temperature=1.0, threshold=1.0,
         editing_threshold=None)

The pipeline decodes blocks from left to right and hides what comes after; every block of
`schedule.length` tokens makes the schedule's calls, in place of diffusers' evenly spread counts
(`BlockRefinementScheduler`). What a call decides, and how, is the file's: settings of the pipeline
that say otherwise are not used, and named in one warning. `stock_schedule` writes the schedule
that diffusers' own scheduler runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import BlockRefinementScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from torch import Tensor

from fewstep.samplers.categorical import uniforms
from fewstep.samplers.unmasking import Unmasking
from fewstep.space import ScheduleError, load_schedule
from fewstep.space.masked import CallSpec, MaskedSchedule

__all__ = ["FewstepBlockScheduler", "stock_schedule"]

_SETTINGS = {
    "temperature", "top_p", "top_k", "sampling_method", "threshold", "editing_threshold",
    "minimal_topk", "prompt_mask",
}  # fmt: skip


class FewstepBlockScheduler(BlockRefinementScheduler):
    """Replays one masked schedule in every block.

    Args:
        schedule: a schedule file's path, or its parsed JSON; its length is the block's.
        ends: ids that end a text, for schedules with `ends_last`.

    Raises:
        ScheduleError: another kind of schedule, or one that hides the future inside a block.
    """

    @register_to_config
    def __init__(
        self,
        schedule: str | os.PathLike[str] | dict[str, Any] | None = None,
        ends: tuple[int, ...] = (),
    ) -> None:
        if schedule is None:
            raise ScheduleError("schedule is missing: give a schedule file, schedule='nfe08.json'")
        loaded = load_schedule(schedule if isinstance(schedule, dict) else os.fspath(schedule))
        if not isinstance(loaded, MaskedSchedule):
            raise ScheduleError(
                f"a schedule of kind {loaded.kind!r} cannot unmask text: give one of kind 'masked'"
            )
        for k, call in enumerate(loaded.calls):
            if call.hide_future:
                raise ScheduleError(
                    f"call {k}: hide_future cannot be run here, where the pipeline calls the "
                    "network on whole blocks: leave it out"
                )
        self.register_to_config(
            schedule=loaded.to_dict(), ends=list(ends), block_length=loaded.length,
            num_inference_steps=loaded.nfe, threshold=1.0, editing_threshold=None, minimal_topk=1,
        )  # fmt: skip
        self.schedule, self.num_inference_steps = loaded, loaded.nfe
        self.timesteps = torch.arange(loaded.nfe - 1, -1, -1)
        self._state: Unmasking | None = None
        self._warned = False

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        block_length: int | None = None,
    ) -> None:
        """Begin a run.

        Raises:
            ScheduleError: another number of calls or tokens a block than the schedule's.
        """
        made, length = self.schedule.nfe, self.schedule.length
        if num_inference_steps != made:
            raise ScheduleError(
                f"the schedule makes {made} calls a block and the pipeline asks for "
                f"{num_inference_steps}: pass num_inference_steps={made}"
            )
        if block_length not in (None, length):
            raise ScheduleError(
                f"the schedule decides blocks of {length} tokens and the pipeline asks for "
                f"{block_length}: pass block_length={length}"
            )
        self.timesteps = torch.arange(made - 1, -1, -1, device=device)
        self._state, self._warned = None, False

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **settings: Any,
    ) -> BlockRefinementSchedulerOutput | tuple[Tensor, ...]:
        """Decide what one call of the schedule decides.

        Args:
            model_output: logits `(B, block, V)`.
            timestep: index of the call in its block.
            sample: tokens `(B, block)`.
            mask_token_id: the mask.
            generator: source of randomness, one draw a block.
            return_dict: return an object instead of a tuple.
            settings: the pipeline's; the file's hold.

        Raises:
            ScheduleError: no mask token, an unknown setting, or tokens changed by a callback.
        """
        if mask_token_id is None:
            raise ScheduleError("mask_token_id is missing: only masks can be decided")
        if unknown := set(settings) - _SETTINGS:
            raise ScheduleError(f"{min(unknown)} is no setting of this scheduler")
        self._say(settings)
        k = int(timestep)
        if k == 0 or self._state is None:
            shape = (len(sample), self.schedule.uniforms, sample.shape[1])
            u = uniforms(*shape, generator=generator, device=sample.device)
            ends = tuple(self.config.ends)
            self._state = Unmasking(self.schedule, sample, mask_token_id, u, fit=True, ends=ends)
        state, tokens = self._state, sample
        changed = (state.tokens != sample) & (sample != mask_token_id)
        if bool(changed.any()):
            raise ScheduleError(
                "tokens of the block were changed between two calls: a callback may only read them"
            )
        query = state.ask(k) if k < self.schedule.nfe else None
        if query is not None:
            barred = torch.tensor([mask_token_id], device=sample.device)
            logits = model_output[query.rows].index_fill(-1, barred, float("-inf"))
            tokens = state.answer(k, query, logits, keep=False).tokens
        moved = tokens != sample
        chance = model_output.float().softmax(-1).gather(-1, tokens[..., None])[..., 0]
        parts = (tokens, moved, torch.zeros_like(moved), tokens, chance, model_output)
        return BlockRefinementSchedulerOutput(*parts) if return_dict else parts

    def check_block_should_continue(
        self, step_idx: int, masks_remaining: bool, finished: Tensor, **other: Any
    ) -> bool:
        """Whether the block needs another call: not once nothing of it is masked."""
        left = masks_remaining and self._state is not None and not self._state.done
        return left and step_idx < self.schedule.nfe and not bool(finished.all())

    def _say(self, settings: Mapping[str, Any]) -> None:
        """Warn once a run of settings that the file overrules."""
        calls = self.schedule.calls
        heat = {call.temperature for call in calls}
        agreed: dict[str, bool] = {
            "temperature": heat == {settings.get("temperature", 0.0)},
            "top_p": {call.top_p for call in calls} == {settings.get("top_p") or 1.0},
            "top_k": not settings.get("top_k"),
            "sampling_method": settings.get("sampling_method") != "greedy" or heat == {0.0},
            "threshold": {min(settings.get("threshold") or 1.0, 1.0)}
            == {call.min_confidence for call in calls},
            "editing_threshold": (settings.get("editing_threshold") or 0.0) <= 0,
            "minimal_topk": settings.get("minimal_topk", 1) == 1,
        }
        unused = [f"{k}={settings[k]}" for k, same in agreed.items() if k in settings and not same]
        if unused and not self._warned:
            self._warned = True
            warnings.warn(
                f"the schedule file decides; not used: {', '.join(unused)}", UserWarning,
                stacklevel=3,
            )  # fmt: skip


def stock_schedule(
    block_length: int = 32,
    num_inference_steps: int = 32,
    *,
    threshold: float = 1.0,
    temperature: float = 0.0,
) -> MaskedSchedule:
    """The schedule that diffusers' `BlockRefinementScheduler` runs in a block.

    Args:
        block_length: tokens of a block.
        num_inference_steps: calls of a block.
        threshold: confidence above which further tokens are decided; 1 or more is none.
        temperature: of the draws; 0 takes the most probable token. (Above 0 diffusers measures
            confidence after the temperature, and a schedule before.)
    """
    stock = BlockRefinementScheduler()
    counts = stock.get_num_transfer_tokens(block_length, num_inference_steps).tolist()
    calls = [
        CallSpec(
            count=count, positions="drawn", temperature=temperature,
            min_confidence=min(threshold, 1.0),
        )
        for count in counts
        if count
    ]  # fmt: skip
    return MaskedSchedule(
        length=block_length, calls=tuple(calls), ahead="stop",
        provenance={"source": "diffusers BlockRefinementScheduler"},
    )  # fmt: skip
