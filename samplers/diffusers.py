"""A diffusers scheduler that replays a schedule file in any pipeline.

    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, schedule="nfe05.json")

`timesteps` holds what the network is told at every call (the label, shifted queries included); the
rows stay private and are indexed by a counter, so equal or non-integer timesteps are safe. The
pipeline's configuration says what its network is, and one table (`samplers.fits`) says whether the
file fits it: what does not is an error and not a silent mixture. Where a pipeline brings sigmas,
timesteps or a shift of its own, the FILE's times hold, and that is logged once. Whole schedules
live in the configuration, so saving and loading a pipeline keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.samplers.denoiser import bcast
from fewstep.samplers.fits import labels, require_fit
from fewstep.samplers.guiding import GuidanceCallback
from fewstep.samplers.network import FACT_KEYS, OUTPUT_KINDS, NetworkFacts, network_facts
from fewstep.samplers.ode import start_scale
from fewstep.samplers.replay import (
    Replay,
    Replayed,
    from_call,
    load_replayed,
    started,
    state_levels,
    step_starts,
)
from fewstep.space import ScheduleError
from fewstep.space.baselines import at_other_nfe
from fewstep.space.noise import RectifiedFlow, VPDiscrete
from fewstep.space.schedule import OdeSchedule

logger = logging.get_logger(__name__)

_TABLE_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """Replays one schedule (or one per number of steps) through diffusers' scheduler interface.

    Args:
        schedule: a schedule file's path, its parsed JSON, or a list of them with different numbers
            of calls; `set_timesteps(n)` takes the one with n calls. For an n that is not there the
            nearest schedule's times are interpolated in lam and run with DPM-Solver++ 2M, which is
            logged.
        prediction_type: what the network returns: "epsilon", "sample", "v_prediction" or
            "flow_prediction"; None follows from the pipeline's configuration, else from the file
            ("flow_prediction" of a rectified flow, "epsilon" otherwise).
        num_train_timesteps: training steps of the network.
        beta_start: of the pipeline, compared with the file's noise schedule.
        beta_end: as `beta_start`.
        beta_schedule: as `beta_start`.
        trained_betas: the pipeline's own betas instead of a named schedule's.
        variance_type: "learned" or "learned_range" where the network returns twice the channels.
        use_flow_sigmas: true, so that flow pipelines do not pass sigmas of their own.
        constants: for each schedule its constant image as nested lists, or None; by default what
            lies beside its file.
        origin: class of the scheduler whose configuration this was made from; set by
            `from_config`.

    Raises:
        ScheduleError: a file that cannot be read, two files of equal calls, or a file that does
            not fit the pipeline; one line naming the fact.
    """

    _compatibles = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"]  # noqa: RUF012
    order = 1
    timesteps: Tensor
    sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        schedule: str | dict[str, Any] | list[Any] | None = None,
        prediction_type: str | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        trained_betas: Sequence[float] | None = None,
        variance_type: str | None = None,
        use_flow_sigmas: bool = True,
        constants: list[Any] | None = None,
        origin: str | None = None,
    ) -> None:
        loaded = load_replayed(schedule, constants)
        self.register_to_config(
            schedule=[s.to_dict() for s in loaded],
            constants=[None if s.constant is None else s.constant.tolist() for s in loaded],
        )
        self._schedules = {s.nfe: s for s in loaded}
        self._asked_kind = prediction_type
        self._told: set[str] = set()
        self._armed = self._scale_read = False
        self._unfit: ScheduleError | None = None
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self._network = NetworkFacts(loaded[0].noise, "eps")
        try:
            if origin is None:  # else `from_config`, which knows the whole configuration, fits
                self._network = self._fit()
        except ScheduleError as error:
            # diffusers' contract asks that a scheduler can be made with any trained betas: these
            # are refused when it is used.
            if trained_betas is None:
                raise
            self._unfit = error
        self.betas, self.alphas_cumprod = _betas(loaded[0], trained_betas)
        self._use(self._schedules[max(self._schedules)])

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler for the pipeline whose scheduler has this configuration.

        Args:
            config: another scheduler's configuration, or one of ours.
            return_unused_kwargs: also return what was not used, as diffusers does.
            kwargs: `schedule` and other arguments of the class, which win over the configuration.

        Raises:
            ScheduleError: a file that does not fit the pipeline; one line naming the fact.
        """
        rest: dict[str, Any] = {}
        if isinstance(config, Mapping):
            foreign = "schedule" not in config
            if foreign:
                network = network_facts(config)
                kwargs.setdefault("origin", network.origin or "unknown")
                kwargs.setdefault("prediction_type", network.prediction_type)
            default, own = config.get("_use_default_values", ()), cls._get_init_keys(cls)
            kept = FACT_KEYS if foreign else ()  # a foreign class's defaults count
            given = {k: v for k, v in config.items() if not k.startswith("_")}
            rest = {k: v for k, v in given.items() if k not in own}  # pipelines may read it
            said = {k: v for k, v in given.items() if k not in default or k in kept}
            config = {k: v for k, v in said.items() if k in own}
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler: FewstepScheduler = made[0] if isinstance(made, tuple) else made
        scheduler.register_to_config(**rest)
        scheduler._network = scheduler._fit()
        scheduler._use(scheduler._schedule)
        return made

    def _fit(self) -> NetworkFacts:
        """What the network is; a ScheduleError unless every file fits it."""
        config = dict(self.config) | {"_class_name": type(self).__name__}
        first = next(iter(self._schedules.values()))
        kind = self._asked_kind
        if kind is not None and kind not in OUTPUT_KINDS:
            raise ScheduleError(
                f"prediction_type {kind!r} is unknown: use one of {', '.join(OUTPUT_KINDS)}"
            )
        if self.config.origin or any(config.get(key) is not None for key in _TABLE_KEYS):
            network = network_facts(config)
        else:
            flow = isinstance(first.noise, RectifiedFlow)
            output = OUTPUT_KINDS[kind or ("flow_prediction" if flow else "epsilon")]
            learned = self.config.variance_type in ("learned", "learned_range")
            network = NetworkFacts(first.noise, output, learned_variance=learned)
        for schedule in self._schedules.values():
            for fact in require_fit(schedule, network):
                if fact.verdict == "converted":
                    self._say(f"{fact.name}: {fact.line}")
        self.register_to_config(prediction_type=network.prediction_type)
        return network

    def _say(self, line: str) -> None:
        """Log a line once."""
        if line not in self._told:
            self._told.add(line)
            logger.warning(line)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies its unit noise by."""
        self._scale_read = True
        return start_scale(self._schedule)

    @property
    def step_index(self) -> int | None:
        """Index of the next call; None before the first."""
        return None if self._run is None else self._first + self._run.call

    @property
    def begin_index(self) -> int | None:
        """Index of the first call of this run, set by image-to-image pipelines."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at call `begin_index`: the schedule is recompiled from there on."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        """Choose the schedule with `num_inference_steps` calls (default: the largest).

        Args:
            num_inference_steps: network calls.
            device: where the timesteps live.
            timesteps: a pipeline's own; their number is taken, and the file's times hold.
            sigmas: as `timesteps`; a trailing 0 is not counted.
            mu: accepted from flow pipelines; the file's levels are final.
            others: what a pipeline passes to its own scheduler alone; not used, which is said.
        """
        self._network, self._unfit = self._fit(), None  # pipelines rewrite configurations
        n = num_inference_steps
        for name, given in {"timesteps": timesteps, "sigmas": sigmas, **others}.items():
            if given is None:
                continue
            if n is None and name not in others:
                values = [float(v) for v in given]
                n = len(values) - (len(values) > 1 and values[-1] == 0 and name == "sigmas")
            self._say(f"the pipeline passes {name} of its own: the schedule file's times hold")
        if mu is not None:
            self._say(f"the pipeline passes the shift mu = {mu:g}: the file's levels are final")
        n = max(self._schedules) if n is None else int(n)
        schedule = self._schedules.get(n)
        if schedule is None:
            near = self._schedules[min(self._schedules, key=lambda k: abs(k - n))]
            schedule = at_other_nfe(near, n)
            self._say(
                f"no schedule of {n} calls is here: the times of the one of {near.nfe} are "
                "interpolated and run with DPM-Solver++ 2M"
            )
        self._use(schedule)
        self.num_inference_steps = n
        self.timesteps = self.timesteps.to(device or "cpu")
        self._begin_index = None

    def _require_fit(self) -> None:
        if self._unfit is not None:
            raise self._unfit

    def _use(self, schedule: Replayed) -> None:
        self._schedule = schedule
        told = labels(schedule, self._network)
        self._labels = told.to(torch.float32)
        self.timesteps = self._labels
        self._alpha, self._sigma = state_levels(schedule)
        flow = isinstance(schedule.noise, RectifiedFlow)
        self.sigmas = (self._sigma / (self._alpha + self._sigma * flow)).float()
        self._run: Replay | None = None
        self._first = 0
        self._scaled = False
        self._guided = 0

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """What the network is given: the state, preconditioned if the pipeline's network is.

        Before the first call also the analytical first step, p_0 x_T + k_0 m.
        """
        running = self._run is not None and not self._run.done
        c = self._run.call if running and self._run is not None else 0
        x = sample
        if not running and not self._begin_index:
            wide = torch.promote_types(sample.dtype, torch.float32)
            x = started(self._schedule, sample.to(wide))
        self._scaled = True
        if self._network.sigma_data is not None:
            program = self._schedule.program
            at = min((self._first if running else self._begin_index or 0) + c, program.nfe - 1)
            edm = program.sigma[at] / program.alpha[at]
            x = self._network.network_input(x, edm.reshape(1))
        return x.to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: object,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        eta: float = 0.0,
        **others: Any,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One row of the program.

        Args:
            model_output: the network's output at `sample`, kind `prediction_type`.
            timestep: one of `timesteps`; says where the run starts if `set_begin_index` does not.
            sample: current state; edits between steps (inpainting) are respected.
            generator: source of fresh noise where the schedule adds any.
            return_dict: a `SchedulerOutput` instead of (state, data prediction or final state).
            eta: of DDIM; the schedule decides whether noise is added, which is said.
            others: of other schedulers, as `eta`.
        """
        for name, value in {"eta": eta, **others}.items():
            if value:
                self._say(f"the pipeline passes {name} = {value}: the schedule decides")
        run = self._run
        if run is None or run.done:
            run = self._begin(sample, timestep)
        elif sample.shape != run.state.shape:
            raise ScheduleError(
                f"the state changed its shape in mid-run, from {tuple(run.state.shape)} to "
                f"{tuple(sample.shape)}: call set_timesteps before another run"
            )
        else:
            self._check_order(timestep, run)
            run.edited(sample)
        self._check_guided(run)
        if self._network.sigma_data is not None and not self._scaled:
            self._need_scaling("EDM preconditioning")
        self._scaled = False
        y, levels = run.state, (run.program.alpha[run.call], run.program.sigma[run.call])
        D = self._network.data_at(y, model_output.to(y.device), *levels)
        fresh = None
        if run.noisy():
            fresh = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        now = run.advance(D.to(y.dtype), fresh).to(sample.dtype)
        if run.done:
            self._armed = self._scale_read = False
        if return_dict:
            return SchedulerOutput(prev_sample=now)
        return now, now if run.done else D  # latent consistency pipelines decode the second

    def _begin(self, sample: Tensor, timestep: object) -> Replay:
        self._require_fit()
        first = self._begin_index
        if first is None:
            first = self._call_of(timestep)
        schedule = from_call(self._schedule, first or 0)
        if not first:
            self._check_start(schedule, sample)
        self._run, self._first = Replay(schedule, sample), first or 0
        return self._run

    def _check_start(self, schedule: Replayed, sample: Tensor) -> None:
        """Refuse a pipeline that cannot start as the schedule does."""
        if schedule.program.init.tolist() != [1.0, 0.0] and not self._scaled:
            self._need_scaling("an analytical first step")
        scale = start_scale(schedule)
        if abs(scale - 1.0) < 1e-4 or self._scale_read:
            return
        found, error = float(sample.float().std()), 2 / (2 * max(1, sample.numel())) ** 0.5
        if abs(found / scale - 1) > error or abs(found - 1) <= error:
            raise ScheduleError(
                f"the schedule starts from noise of standard deviation {scale:.4g} and this "
                "pipeline does not multiply its noise by init_noise_sigma: pass it latents="
                "pipe.scheduler.init_noise_sigma * noise, or use a schedule that starts at pure "
                "noise"
            )

    def _need_scaling(self, what: str) -> None:
        raise ScheduleError(
            f"this pipeline does not call scale_model_input, which {what} needs: use a schedule "
            "and a pipeline without"
        )

    def _call_of(self, timestep: object) -> int | None:
        """The call that is told `timestep`: the next one if several are; None if none is."""
        value = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)[0].cpu()
        same = (self._labels - value).abs() <= 1e-5 * (1 + value.abs())
        found = same.nonzero().flatten().tolist()
        now = self.step_index if self._run is not None else self._begin_index
        later = [c for c in found if c >= (now or 0)]
        if now is None and isinstance(self._schedule, OdeSchedule):
            starts = step_starts(self._schedule)  # a stage may be told what the next step is
            later = [c for c in later if c in starts] or later
        ordered: list[int] = later or found
        return ordered[0] if ordered else None

    def _check_order(self, timestep: object, run: Replay) -> None:
        """Refuse another call's timestep where looking at it does not wait for a device."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return
        found, now = self._call_of(timestep), self._first + run.call
        if found is not None and found != now:
            raise ScheduleError(
                f"step was called for network call {found} but call {now} is next: a schedule is "
                "run in order; set_timesteps starts another run"
            )

    def _check_guided(self, run: Replay) -> None:
        """Refuse a file's guidance scales unless the callback sets them."""
        if run.program.guidance is None or (self._armed and self._guided == run.call):
            return
        raise ScheduleError(
            "the schedule sets the guidance scale of every call: pass guidance_scale="
            f"{float(run.program.guidance[0]):g} and callback_on_step_end="
            "pipe.scheduler.guidance_callback(pipe) to the pipeline"
        )

    def guidance_callback(self, pipe: Any = None) -> GuidanceCallback:
        """A pipeline's `callback_on_step_end` that sets the schedule's guidance scales.

        Args:
            pipe: the pipeline; needed where the schedule leaves calls unguided.

        Raises:
            ScheduleError: a pipeline that cannot leave a call unguided.
        """
        callback = GuidanceCallback(self, pipe)
        self._armed = True
        return callback

    @property
    def leaves_unguided(self) -> bool:
        """Whether a schedule has guided and unguided calls, or unguided ones alone."""
        scales = [s.program.guidance for s in self._schedules.values()]
        return any(w is not None and bool((w == 1).any()) for w in scales)

    @property
    def unguided_now(self) -> bool:
        """Whether the next call of a run with the callback is unguided."""
        scales = self._schedule.program.guidance
        running = self._run is not None and not self._run.done
        at = self.step_index if running else self._begin_index or 0
        return self._armed and scales is not None and bool(scales[at or 0] == 1)

    def guided(self, call: int) -> None:
        """Told by the callback: call `call` of this run has the schedule's guidance scale."""
        self._armed, self._guided = True, call

    @property
    def guidance_scales(self) -> list[float]:
        """The scale of every call of the run now; empty where the file sets none."""
        run = self._run
        program = self._schedule.program if run is None else run.program
        return [] if program.guidance is None else program.guidance.tolist()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps at the level of the STATE of the calls told `timesteps`.

        A number that no call is told is taken as a training label.
        """
        self._require_fit()
        levels = [self._level(t) for t in torch.as_tensor(timesteps).reshape(-1)]
        alpha, sigma = (torch.stack(column) for column in zip(*levels, strict=True))
        x = original_samples
        return bcast(alpha, x) * x + bcast(sigma, x) * noise.to(x)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise` as flow pipelines call it.

        Args:
            sample: clean latents, shape (B, *shape).
            timestep: shape (), (1,) or (B,).
            noise: unit noise, the shape of `sample`.
        """
        if noise is None:
            raise ScheduleError("scale_noise needs the noise to scale: pass noise")
        return self.add_noise(sample, noise, timestep)

    def _level(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        call = self._call_of(timestep)
        if call is not None:
            return self._alpha[call], self._sigma[call]
        return self._network.level(float(timestep))


def _betas(
    schedule: Replayed, trained: Sequence[float] | None
) -> tuple[Tensor | None, Tensor | None]:
    """(betas, alphas_cumprod), float32, as pipelines read them; None of continuous schedules."""
    if trained is not None:
        betas = torch.tensor([float(b) for b in trained], dtype=torch.float32)
        return betas, torch.cumprod(1 - betas, dim=0)
    if not isinstance(schedule.noise, VPDiscrete):
        return None, None
    products = torch.exp(2 * schedule.noise.table)
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    return (1 - products / before).float(), products.float()
