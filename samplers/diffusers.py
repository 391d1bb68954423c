"""A diffusers scheduler that replays a schedule file in any pipeline.

    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, schedule="nfe05.json")

The program is run as by `samplers.ode`: `timesteps` holds what the network is told (the label of
every call, shifted queries included); the rows stay private and are indexed by a counter, so
equal or non-integer timesteps are safe. The noise schedule of the FILE holds; where the pipeline's
configuration names another one, that is an error and not a silent mixture. Whole schedules live in
the configuration, so saving and loading a pipeline keeps them. A schedule with an analytical first
step starts from p_0 x_T + k_0 m, which `scale_model_input` makes: pipelines that do not call it
are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.samplers.denoiser import data_prediction
from fewstep.samplers.ode import advance_row, rows_of, start_scale, threshold
from fewstep.space import OdeSchedule, Program, ProgramSchedule, ScheduleError, load_schedule
from fewstep.space.baselines import dpm, multistep
from fewstep.space.noise import VPDiscrete, finite_lam

_KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """Replays one schedule (or one per number of steps) through diffusers' scheduler interface.

    Args:
        schedule: a schedule file's path, its parsed JSON, or a list of them with different numbers
            of calls; `set_timesteps(n)` takes the one with n calls. For an n that is not there the
            nearest schedule's times are interpolated in lam and run with DPM-Solver++ 2M.
        prediction_type: what the network returns: "epsilon", "sample", "v_prediction" or
            "flow_prediction".
        num_train_timesteps: training steps, compared with the file's noise schedule if discrete.
        beta_start: of the pipeline, compared with the file's noise schedule if discrete.
        beta_end: as `beta_start`.
        beta_schedule: as `beta_start`.
        use_flow_sigmas: true, so that flow pipelines do not pass sigmas of their own.
        constants: for each schedule its constant image as nested lists, or None; by default what
            lies beside its file.
    """

    _compatibles = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"]  # noqa: RUF012
    order = 1
    timesteps: Tensor
    sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        schedule: str | dict[str, Any] | list[Any] | None = None,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        use_flow_sigmas: bool = True,
        constants: list[Any] | None = None,
    ) -> None:
        if prediction_type not in _KINDS:
            raise ScheduleError(
                f"prediction_type {prediction_type!r} is unknown: use one of {', '.join(_KINDS)}"
            )
        if schedule is None:
            raise ScheduleError(
                "schedule is missing: give a schedule file, e.g. schedule='nfe05.json'"
            )
        files = schedule if isinstance(schedule, list) else [schedule]
        images = constants or [None] * len(files)
        if len(images) != len(files):
            raise ScheduleError(f"{len(images)} constants for {len(files)} schedules")
        loaded = [_load(f, image) for f, image in zip(files, images, strict=True)]
        self.register_to_config(
            schedule=[s.to_dict() for s in loaded],
            constants=[None if s.constant is None else s.constant.tolist() for s in loaded],
        )
        self._schedules: dict[int, OdeSchedule | ProgramSchedule] = {s.nfe: s for s in loaded}
        self._check_betas(loaded[0], beta_start, beta_end, beta_schedule, num_train_timesteps)
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self._use(self._schedules[max(self._schedules)])

    @staticmethod
    def _check_betas(
        schedule: OdeSchedule | ProgramSchedule,
        start: float | None,
        end: float | None,
        kind: str | None,
        n: int,
    ) -> None:
        noise = schedule.noise
        if not isinstance(noise, VPDiscrete) or None in (start, end, kind):
            return
        if kind not in ("linear", "scaled_linear"):
            return
        theirs = VPDiscrete(betas=kind, beta_start=start or 0.0, beta_end=end or 0.0, n=n)
        same = theirs.table.shape == noise.table.shape
        if not same or float((theirs.table - noise.table).abs().max()) > 1e-6:
            raise ScheduleError(
                f"the pipeline's betas ({kind}, {start}..{end}, {n} steps) are not the schedule "
                "file's: this schedule was made for another model"
            )

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def step_index(self) -> int | None:
        """Index of the next call; None before the first."""
        return self._c

    @property
    def begin_index(self) -> int | None:
        """Index of the first call of this run, set by image-to-image pipelines."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at call `begin_index`: times[k:] is recompiled with a fresh warm-up."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the schedule with `num_inference_steps` calls (default: the largest).

        Args:
            num_inference_steps: network calls.
            device: where the timesteps live.
            mu: accepted for flow pipelines and ignored: the file's times are final.
        """
        n = num_inference_steps or max(self._schedules)
        schedule = self._schedules.get(n) or _interpolated(self._schedules, n)
        self._use(schedule)
        self.num_inference_steps = n
        self.timesteps = self.timesteps.to(device or "cpu")
        self._begin_index = None

    def _use(self, schedule: OdeSchedule | ProgramSchedule) -> None:
        self._schedule = schedule
        program = schedule.program
        self.timesteps = program.label.to(torch.float32)
        self.sigmas = torch.cat([program.sigma / program.alpha, torch.zeros(1)]).float()
        self.init_noise_sigma = start_scale(schedule)
        self._run: Program | None = None
        self._c: int | None = None
        self._scaled = False

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """The state is given to the network as it is, but x_T as the schedule's start."""
        if self._c is not None and self._run is not None and self._c < self._run.nfe:
            return sample
        self._scaled = True
        return self._start(sample).to(sample.dtype)

    def _start(self, x_T: Tensor) -> Tensor:
        """p_0 x_T + k_0 m; itself where there is no analytical first step."""
        p, k = self._schedule.program.init.tolist()
        if (p, k) == (1.0, 0.0) or self._begin_index:
            return x_T
        y: Tensor = p * x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        return y if k == 0.0 else y + k * self._constant(y)

    def _constant(self, like: Tensor) -> Tensor:
        m = self._schedule.constant
        if m is None:
            raise ScheduleError(
                "the schedule starts from a constant image: load it from its file, with the "
                ".safetensors beside it, or give constants"
            )
        image: Tensor = m.to(like)
        return image

    def _begin(self, sample: Tensor) -> None:
        k = self._begin_index or 0
        schedule = self._schedule if k == 0 else _tail(self._schedule, k)
        self._run, self._rows = schedule.program, rows_of(schedule.program)
        self._history: list[Tensor] = []
        self._x_T = sample.to(torch.promote_types(sample.dtype, torch.float32))
        self._y = self._start(self._x_T)
        if self._y is not self._x_T and not self._scaled:
            raise ScheduleError(
                "this pipeline does not call scale_model_input, which an analytical first step "
                "needs: use a schedule whose first step asks the network"
            )
        self._m = self._constant(self._y) if bool((self._run.k != 0).any()) else None
        self._told, self._c, self._scaled = sample, 0, False

    def step(
        self,
        model_output: Tensor,
        timestep: object,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One row of the program.

        Args:
            model_output: the network's output at `sample`, kind `prediction_type`.
            timestep: ignored: calls are counted, because labels need not differ.
            sample: current state; edits between steps (inpainting) are respected.
            generator: source of fresh noise where the schedule adds any.
            return_dict: return a `SchedulerOutput` instead of a tuple.
        """
        if self._c is None or self._run is None or self._c >= self._run.nfe:
            self._begin(sample)
        run, c = self._run, self._c
        if run is None or c is None:  # set by _begin
            raise ScheduleError("set_timesteps must be called before step")
        y = sample.to(self._x_T.dtype) if sample is not self._told else self._y
        out = model_output.to(y.dtype)
        kind = _KINDS[self.config.prediction_type]
        D = data_prediction(kind, y, out, run.alpha[c].to(y), run.sigma[c].to(y))
        if "threshold" in self._schedule.options:
            D = threshold(D, **self._schedule.options["threshold"])
        self._history.append(D)
        fresh = None
        if self._rows["g"][c] != 0.0:
            fresh = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        y = advance_row(self._rows, c, y, self._x_T, self._m, self._history, fresh)
        self._y, self._told = y, y.to(sample.dtype)
        self._c = c + 1
        return SchedulerOutput(prev_sample=self._told) if return_dict else (self._told,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps at the calls whose labels are nearest (image-to-image start)."""
        program = self._schedule.program
        at = [int((program.label - float(t)).abs().argmin()) for t in timesteps.reshape(-1)]
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        alpha = program.alpha[at].to(original_samples).reshape(shape)
        sigma = program.sigma[at].to(original_samples).reshape(shape)
        return alpha * original_samples + sigma * noise


def _load(
    source: str | os.PathLike[str] | Mapping[str, Any], image: object
) -> OdeSchedule | ProgramSchedule:
    data = json.loads(json.dumps(source)) if isinstance(source, Mapping) else source
    schedule = load_schedule(data)
    if image is not None and isinstance(schedule, OdeSchedule):
        schedule = schedule.with_constant(torch.tensor(image, dtype=torch.float32))
    if not isinstance(schedule, OdeSchedule | ProgramSchedule):
        raise ScheduleError(
            f"kind {schedule.kind!r} does not run in a diffusers pipeline: use kind ode"
        )
    return schedule


def _tail(schedule: OdeSchedule | ProgramSchedule, k: int) -> OdeSchedule:
    if not isinstance(schedule, OdeSchedule):
        raise ScheduleError("a start in the middle needs a file with steps, not only a program")
    return schedule.tail(k)


def _interpolated(schedules: Mapping[int, OdeSchedule | ProgramSchedule], n: int) -> OdeSchedule:
    """DPM-Solver++ 2M on the nearest schedule's times, interpolated in lam to n calls."""
    if n < 1:
        raise ScheduleError(f"num_inference_steps {n} must be at least 1")
    near = schedules[min(schedules, key=lambda k: abs(k - n))]
    times = near.times if isinstance(near, OdeSchedule) else (*near.times, near.noise.t_range[1])
    t = torch.tensor(times, dtype=torch.float64)
    lam = finite_lam(near.noise, t)
    at = torch.linspace(0, len(t) - 1, n + 1, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(t) - 2)
    inner = near.noise.t_of_lam(lam[low] + (at - low) * (lam[low + 1] - lam[low])).tolist()
    grid = (times[0], *inner[1:-1], times[-1])
    return multistep(near.noise, grid, 2, lower_final=True, spec=dpm("data", 2))
