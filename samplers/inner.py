"""The scheduler that stands inside a diffusers pipeline while the pipeline is asked one thing.

It is a copy of the pipeline's own scheduler, so that whatever a pipeline reads from it (its
configuration, tables, class) is there, with the methods of the sampling loop replaced: there is
one timestep, the label we want; the state is the one we want; and `step` leaves the pipeline with
the network's output, as the pipeline made it (guidance, packing, control networks), instead of
making a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Caught(Exception):
    """Leaves a pipeline at its first step.

    Args:
        output: what the pipeline hands to its scheduler as the network's output.
        sample: the state it hands over with it.
    """

    def __init__(self, output: Tensor, sample: Tensor) -> None:
        super().__init__("the pipeline was asked for one step")
        self.output, self.sample = output, sample


class Asked(Exception):
    """Leaves a pipeline where it sets its scheduler up.

    Args:
        settings: what it passes to `set_timesteps`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__("the pipeline was asked for its settings")
        self.settings = settings


class Inner:
    """The methods of the sampling loop; `inner_scheduler` puts them before a scheduler's class."""

    init_noise_sigma = 1.0
    order = 1
    step_index = 0
    begin_index = None
    timesteps: Tensor
    sigmas: Tensor
    state: Tensor | None
    final: Tensor | None
    between: Tensor | None
    earlier: Tensor | None = None
    """The network's output at the first of two steps."""
    label: float
    sigma: float
    listening: bool
    scaled = False
    """Whether the pipeline ever asked for its input to be scaled."""
    shift_mu: float | None

    def ask(self, state: Tensor | None, label: float, sigma: float) -> None:
        """Make the next call of the pipeline one question.

        Args:
            state: the network's input (B, *shape), or None for the pipeline's own noise.
            label: what the network is told.
            sigma: the noise level in the scheduler's own measure.
        """
        self.state, self.label, self.sigma = state, label, sigma
        self.final, self.between, self.listening = None, None, False

    def ask_twice(self, state: Tensor, between: Tensor) -> None:
        """Make the next call of the pipeline two steps, `between` the state after the first."""
        self.ask(state, self.label, self.sigma)
        self.between = between

    def finish(self, final: Tensor) -> None:
        """Make the next call of the pipeline decode `final` (B, *shape)."""
        self.ask(final, self.label, self.sigma)
        self.final = final

    def listen(self) -> None:
        """Make the next call of the pipeline tell what it passes to `set_timesteps`."""
        self.ask(None, self.label, self.sigma)
        self.listening = True

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        """One timestep (or two alike), whatever the pipeline asks for; `mu` is kept."""
        if self.listening:
            asked: dict[str, Any] = {"num_inference_steps": num_inference_steps, **others}
            asked |= {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
            raise Asked({name: value for name, value in asked.items() if value is not None})
        self.shift_mu = mu
        self.num_inference_steps = steps = 1 if self.between is None else 2
        self.timesteps = torch.tensor([self.label] * steps, device=device)
        self.sigmas = torch.tensor([self.sigma] * steps + [0.0], device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing: there is one step."""

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """The state as it is: it comes scaled."""
        self.scaled = True
        return sample

    def add_noise(self, original_samples: Tensor, *_: Any, **__: Any) -> Tensor:
        """The state, where an image-to-image pipeline makes its own in the same layout."""
        if self.state is None or self.state.shape[1:] != original_samples.shape[1:]:
            return original_samples
        return self.state.to(original_samples)

    scale_noise = add_noise

    def step(
        self, model_output: Tensor, timestep: object, sample: Tensor, *_: Any, **k: Any
    ) -> Any:
        """Leave the pipeline, or hand it the state that follows: the final one, to decode."""
        after = self.final if self.between is None else self.between
        if after is None:
            raise Caught(model_output, sample)
        self.between, self.earlier = None, model_output
        repeats = len(sample) // len(after)
        final = after.repeat(repeats, *(1,) * (sample.ndim - 1)).to(sample)
        if k.get("return_dict", True):
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=final)
        return (final, final)  # latent consistency pipelines decode the second


def inner_scheduler(scheduler: Any) -> Any:
    """A copy of a diffusers scheduler with the loop's methods of `Inner`."""
    own: Any = type(scheduler)
    made: Any = type(own.__name__, (Inner, own), {"__module__": own.__module__})
    inner = made.__new__(made)
    inner.__dict__.update(scheduler.__dict__)
    inner.shift_mu = None
    inner.ask(None, float(scheduler.config.get("num_train_timesteps", 1000)) - 1, 1.0)
    return inner


@contextmanager
def standing_in(pipeline: Any, inner: Any, **others: Any) -> Iterator[None]:
    """The pipeline with `inner` for its scheduler, silent, and `others`; then as it was.

    Written past the pipeline's own `__setattr__`, which would note the scheduler in its
    configuration.
    """
    others = {"scheduler": inner, "_progress_bar_config": {"disable": True}, **others}
    before = {name: pipeline.__dict__.get(name) for name in others}
    pipeline.__dict__.update(others)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del pipeline.__dict__[name]
            else:
                pipeline.__dict__[name] = value


@contextmanager
def given_state(networks: Sequence[torch.nn.Module], state: Tensor | None) -> Iterator[list[bool]]:
    """Networks whose first input of the state's shape is replaced by the state.

    For pipelines that draw their own noise and take no latents. Yields a list that tells whether
    an input was replaced.
    """
    told: list[bool] = []

    def replace(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        place: Any = (
            0 if args else next((k for k in ("sample", "hidden_states") if k in kwargs), None)
        )
        held = args[0] if args else kwargs.get(place)
        if state is None or not isinstance(held, Tensor) or held.shape[1:] != state.shape[1:]:
            return None
        told.append(True)
        new = state.to(held).repeat(len(held) // len(state), *(1,) * (held.ndim - 1))
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, place: new})

    handles = [n.register_forward_pre_hook(replace, with_kwargs=True) for n in networks]
    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()
