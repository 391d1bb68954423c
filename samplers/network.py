"""What a diffusers pipeline's network was trained as, read off its scheduler's configuration.

`network_facts` turns the configuration's plain values into a noise schedule, an output kind, time
labels, preconditioning and clipping: all that a Denoiser needs. diffusers itself is not needed.

References: EDM preconditioning, Karras et al. 2022 (arXiv 2206.00364) table 1; zero terminal SNR,
Lin et al. 2023 (2305.08891); dynamic thresholding, Saharia et al. 2022 (2205.11487).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.denoiser import bcast, data_prediction
from fewstep.samplers.ode import threshold
from fewstep.space.betas import BETAS
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.noise import EDM, NoiseSchedule, RectifiedFlow, VPDiscrete

OUTPUT_KINDS = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
"""diffusers' prediction_type -> ours (`samplers.denoiser.OUTPUTS`)."""

NETWORKS = ("unet", "transformer", "transformer_2", "prior", "decoder", "dit")
"""Names under which pipelines keep the networks that the sampling loop asks."""

_FLOW = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    *("FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"),
)
_EDM = {
    "EDMEulerScheduler": "log",
    "EDMDPMSolverMultistepScheduler": "log",
    "CosineDPMSolverMultistepScheduler": "atan",
}
_OTHERS = (
    *("AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler"),
    *("ConsistencyDecoderScheduler", "DDPMWuerstchenScheduler", "DiscreteDDIMScheduler"),
    *("EntropyBoundScheduler", "FlowMapEulerDiscreteScheduler", "HeliosScheduler"),
    *("HeliosDMDScheduler", "IPNDMScheduler", "KarrasVeScheduler", "MiniMaxH3Scheduler"),
    *("PiflowScheduler", "RFD4ProteinaScheduler", "SCMScheduler", "ScoreSdeVeScheduler"),
    *("ScoreSdeVpScheduler", "VQDiffusionScheduler"),
)  # networks that are told or return something else
_CLIPS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "DDPMScheduler"),
    *("DDPMParallelScheduler", "UnCLIPScheduler", "RePaintScheduler"),
)  # where clip_sample is true by default; elsewhere it is honoured if given
_NEVER_CLIPS = ("solver_order", "interpolation_type", "skip_prk_steps", "snr_shift_scale")
"""Keys of classes that ignore a clip_sample left over from another class."""
_SIGNS = (
    ("CMStochasticIterativeScheduler", ("clip_denoised",)),
    ("SCMScheduler", ("sigma_data", "prediction_type"), ("sigma_max",)),
    ("HeliosScheduler", ("stages",)),
    ("PiflowScheduler", ("n_grid",)),
    ("LTXEulerAncestralRFScheduler", ("eta", "s_noise")),
    ("EDMDPMSolverMultistepScheduler", ("sigma_data", "sigma_max", "algorithm_type")),
    ("CosineDPMSolverMultistepScheduler", ("sigma_data", "sigma_max", "solver_order")),
    ("EDMEulerScheduler", ("sigma_data", "sigma_max")),
    ("CogVideoXDDIMScheduler", ("snr_shift_scale",)),
    ("MiniMaxH3Scheduler", ("shift",), ("num_train_timesteps", "prediction_type")),
)
"""Of a live scheduler's configuration, which does not say its class: (class, keys it has, keys it
has not); the first that fits."""
FACT_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "snr_shift_scale", "prediction_type", "variance_type"),
    *("shift", "flow_shift", "use_dynamic_shifting", "time_shift_type", "base_shift"),
    *("max_shift", "base_image_seq_len", "max_image_seq_len", "invert_sigmas"),
    *("sigma_min", "sigma_max", "sigma_data", "timestep_type", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample", "clip_sample_range"),
    *("solver_order", "interpolation_type", "skip_prk_steps", "algorithm_type", "eta", "s_noise"),
)
"""What `network_facts` reads; a configuration that keeps these says the same of its network."""

_BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
_OF_TABLES = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "DDPMScheduler"),
    *("DDPMParallelScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("DPMSolverMultistepInverseScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "RePaintScheduler"),
    *("CogVideoXDPMScheduler", "LCMScheduler", "TCDScheduler", "UnCLIPScheduler"),
)  # CogVideoXDDIMScheduler ends like DDIMScheduler
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CogVideoXDDIMScheduler": _LATENT | {"snr_shift_scale": 3.0},
    "CogVideoXDPMScheduler": _LATENT | {"snr_shift_scale": 3.0},
    "LCMScheduler": _LATENT,
    "TCDScheduler": _LATENT,
    "HeunDiscreteScheduler": _LATENT | {"beta_schedule": "linear"},
    "DPMSolverSDEScheduler": _LATENT | {"beta_schedule": "linear"},
    "KDPM2DiscreteScheduler": _LATENT | {"beta_schedule": "linear"},
    "KDPM2AncestralDiscreteScheduler": _LATENT | {"beta_schedule": "linear"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "CosineDPMSolverMultistepScheduler": {
        **{"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0},
        "prediction_type": "v_prediction",
    },
}
"""What a scheduler class takes where its configuration says nothing, if not the common value."""


@dataclass(frozen=True)
class NetworkFacts:
    """What a pipeline's network was trained as.

    Args:
        noise: its noise schedule, in the frame of the pipeline's latents; `noise.label(t)` is what
            the network is told.
        output: what it returns, one of `samplers.denoiser.OUTPUTS`.
        origin: class of the scheduler it came with, "" where unknown.
        sigma_data: standard deviation of the data of EDM's preconditioning; None without.
        clip: arguments of `samplers.ode.threshold` that the pipeline applies to every data
            prediction; None without.
        learned_variance: the network returns as many channels again, for a variance that
            deterministic samplers do not use.
        notes: what was settled while reading, a line each.
    """

    noise: NoiseSchedule
    output: str
    origin: str = ""
    sigma_data: float | None = None
    clip: Mapping[str, float] | None = None
    learned_variance: bool = False
    notes: tuple[str, ...] = ()

    @property
    def prediction_type(self) -> str:
        """The output kind in diffusers' words."""
        return next(name for name, kind in OUTPUT_KINDS.items() if kind == self.output)

    def level(self, label: float) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of what the network is told as `label`, float64.

        Raises:
            ScheduleError: a label that this network is never told.
        """
        told, noise = torch.tensor(label, dtype=torch.float64), self.noise
        low, high = sorted(float(noise.label(torch.tensor(t).double())) for t in noise.t_range)
        if not min(low, 0.0) - 1 <= label <= high * (1 + 1e-6):
            raise ScheduleError(
                f"timestep {label:g} is none that the network is told: use one of the scheduler's "
                f"timesteps, or {low:g} to {high:g}"
            )
        if isinstance(noise, RectifiedFlow):
            sigma = told / noise.label_scale
            return 1 - sigma, sigma
        if isinstance(noise, EDM):
            sigma = torch.exp(4 * told) if noise.labels == "log" else told
            sigma = torch.tan(told * math.pi / 2) if noise.labels == "atan" else sigma
            return torch.ones_like(sigma), sigma
        t = told / getattr(noise, "label_scale", 1.0)
        return noise.alpha(t), noise.sigma(t)

    def network_input(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is given for states x (B, *shape) at times t (B,) of `noise`.

        x itself, or with preconditioning c_in x, c_in = (sigma^2 + sigma_data^2)^(-1/2).
        """
        if self.sigma_data is None:
            return x
        sigma = self.noise.sigma(t.to(torch.float64))
        return x * bcast((sigma**2 + self.sigma_data**2) ** -0.5, x)

    def data(self, x: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The data prediction from the network's output at states x and times t (B,) of `noise`.

        Includes preconditioning and the pipeline's own clipping.

        Raises:
            ModelError: an output that is not of the state's shape.
        """
        t = t.to(torch.float64)
        return self.data_at(x, out, self.noise.alpha(t), self.noise.sigma(t))

    def data_at(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """As `data`, at levels alpha and sigma, each of shape (B,) or ()."""
        out = self._without_variance(x, out).to(x.dtype)
        a, s = bcast(alpha.reshape(-1), x), bcast(sigma.reshape(-1), x)
        if self.sigma_data is None or self.output == "x0":
            D = data_prediction(self.output, x, out, a, s)
        else:
            total = s**2 + self.sigma_data**2
            c_out = s * self.sigma_data * total**-0.5
            sign = -1 if self.output == "v" else 1
            D = self.sigma_data**2 / total * x + sign * c_out * out
        return D if self.clip is None else threshold(D, **self.clip)

    def _without_variance(self, x: Tensor, out: Tensor) -> Tensor:
        if out.shape == x.shape:
            return out
        doubled = out.ndim == x.ndim > 1 and out.shape[1] == 2 * x.shape[1]
        if doubled and self.learned_variance:
            return out[:, : x.shape[1]]
        hint = ": if the second half is a variance, set variance_type='learned_range'"
        raise ModelError(
            f"the network returned {tuple(out.shape)} for a state of shape {tuple(x.shape)}"
            f"{hint if doubled else ': it must return the shape of the state'}"
        )


def network_facts(config: Mapping[str, Any], *, mu: float | None = None) -> NetworkFacts:
    """What a pipeline's network was trained as, from its scheduler's configuration.

    Args:
        config: the configuration, such as `pipe.scheduler.config` or the parsed
            scheduler_config.json.
        mu: the shift a pipeline with dynamic shifting passes for its resolution; None where it is
            not known, which leaves the noise schedule unshifted (levels and labels are the same).

    Raises:
        ScheduleError: a scheduler whose network no ODE schedule runs on, or a value that cannot
            be; the key is named.
    """
    read = _Reader(config)
    origin = read.origin
    if origin in _OTHERS or not read.known:
        raise ScheduleError(
            f"{origin or 'this configuration'} belongs to another kind of network: schedules run "
            "on those of DDIM, DPM-Solver, UniPC, Euler, FlowMatch and EDM schedulers"
        )
    if origin in _FLOW or read.flag("use_flow_sigmas") or _is_flow(read):
        noise, notes = _flow_noise(read, mu)
        output = "flow" if origin in _FLOW else _output(read, "flow_prediction")
        return NetworkFacts(noise, output, origin, clip=_clip(read), notes=notes)
    continuous = read.get("timestep_type") == "continuous"
    if origin in _EDM or (continuous and read.get("prediction_type") == "v_prediction"):
        return _edm(read)
    learned = read.get("variance_type") in ("learned", "learned_range")
    output = _output(read, "epsilon")
    return NetworkFacts(_table(read), output, origin, clip=_clip(read), learned_variance=learned)


class _Reader:
    """A configuration with its class's defaults; every value is checked as it is read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not isinstance(config, Mapping):
            raise ScheduleError(f"scheduler configuration {config!r}: an object is needed")
        self.origin = _origin(config)
        given = {key: value for key, value in config.items() if value is not None}
        if config.get("_class_name") == "FewstepScheduler":
            given.pop("use_flow_sigmas", None)  # said of the scheduler, not of the network
        self._values = _DEFAULTS.get(self.origin, {}) | given

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ScheduleError(f"scheduler configuration: {key} is {value!r}: use true or false")
        return value

    def number(self, key: str, default: float, *, low: float = 0.0) -> float:
        """A finite number above `low`."""
        value = self.get(key, default)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not math.isfinite(value) or value <= low:
            raise ScheduleError(
                f"scheduler configuration: {key} is {value!r}: a number above {low:g} is needed"
            )
        return float(value)

    @property
    def names_betas(self) -> bool:
        return any(key in self._values for key in _BETA_KEYS)

    @property
    def known(self) -> bool:
        """Whether the class is one of diffusers' or some key says what the network is."""
        keys = ("prediction_type", "shift", "base_shift", "sigma_data", "use_flow_sigmas")
        named = self.origin in (*_FLOW, *_EDM) or self.origin.endswith(_OF_TABLES)
        return named or self.names_betas or any(key in self._values for key in keys)


def _origin(config: Mapping[str, Any]) -> str:
    """The scheduler's class: as the configuration names it, else by its keys, else ""."""
    named = config.get("origin") or config.get("_class_name")
    if isinstance(named, str) and named not in ("", "unknown", "FewstepScheduler"):
        return named
    for name, has, *not_has in _SIGNS:
        lacks = not_has[0] if not_has else ()
        if all(key in config for key in has) and not any(key in config for key in lacks):
            return name
    return ""


def _is_flow(read: _Reader) -> bool:
    """Whether an unknown class's configuration is a flow's: by its output, or its shift alone."""
    if read.get("prediction_type") == "flow_prediction":
        return True
    shifted = any(read.get(key) is not None for key in ("shift", "base_shift", "max_shift"))
    return not read.origin and shifted and not read.names_betas


def _output(read: _Reader, default: str) -> str:
    name = read.get("prediction_type", default)
    if not isinstance(name, str) or name not in OUTPUT_KINDS:
        raise ScheduleError(
            f"scheduler configuration: prediction_type {name!r} is unknown: use one of "
            f"{', '.join(OUTPUT_KINDS)}"
        )
    return OUTPUT_KINDS[name]


def _training_steps(read: _Reader, least: int = 2) -> int:
    n = read.number("num_train_timesteps", 1000)
    if n != int(n) or not least <= n <= 10**6:
        raise ScheduleError(
            f"scheduler configuration: num_train_timesteps is {n:g}: a whole number from {least} "
            "to 1,000,000 is needed"
        )
    return int(n)


def _flow_noise(read: _Reader, mu: float | None) -> tuple[RectifiedFlow, tuple[str, ...]]:
    """x = (1 - sigma) x0 + sigma eps, told num_train_timesteps * sigma."""
    if read.flag("invert_sigmas"):
        raise ScheduleError(
            "scheduler configuration: invert_sigmas is true (Mochi): its network is told "
            "1 - sigma and returns the flow reversed, which no schedule says"
        )
    n = _training_steps(read, 1)  # 1: the network is told sigma itself
    notes: tuple[str, ...] = ()
    if read.flag("use_dynamic_shifting"):
        kind = read.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ScheduleError(
                f"scheduler configuration: time_shift_type {kind!r}: use exponential or linear"
            )
        shift = 1.0
        if mu is None:
            notes = ("dynamic shifting: levels depend on the resolution; they are the schedule's",)
        else:
            shift = math.exp(mu) if kind == "exponential" else float(mu)
    else:
        shift = read.number("shift" if read.get("shift") is not None else "flow_shift", 1.0)
    end = 1 / n if n > 1 else 0.001
    return RectifiedFlow(shift=shift, t_end=end, label_scale=float(n)), notes


def _edm(read: _Reader) -> NetworkFacts:
    """c_skip x + c_out F(c_in x, c_noise): Karras et al., table 1."""
    continuous = read.origin not in _EDM  # EulerDiscrete of video models: sigma_data = 1
    high = read.number("sigma_max", 700.0 if continuous else 80.0)
    low = read.number("sigma_min", 0.002)
    output = _output(read, "epsilon")
    if output == "flow":
        raise ScheduleError(
            "scheduler configuration: prediction_type flow_prediction has no EDM preconditioning: "
            "use epsilon, v_prediction or sample"
        )
    return NetworkFacts(
        EDM(sigma_max=high, sigma_min=low, labels=_EDM.get(read.origin, "log")),
        output,
        read.origin,
        sigma_data=1.0 if continuous else read.number("sigma_data", 0.5),
        clip=_clip(read),
    )


def _table(read: _Reader) -> VPDiscrete:
    """The table of betas, of every kind that diffusers names."""
    zero_snr = read.flag("rescale_betas_zero_snr")
    shift = read.number("snr_shift_scale", 1.0)
    trained = _trained(read.get("trained_betas"))
    named: dict[str, Any] = {"betas": trained}
    if not trained:
        name = read.get("beta_schedule", "linear")
        if name not in BETAS:
            raise ScheduleError(
                f"scheduler configuration: beta_schedule {name!r} is unknown: use one of "
                f"{', '.join(BETAS)}"
            )
        named = {"betas": name, "n": _training_steps(read)}
        named |= {"beta_start": read.number("beta_start", 0.0001)}
        named |= {"beta_end": read.number("beta_end", 0.02)}
    try:
        if shift == 1.0:
            return VPDiscrete(**named, zero_snr=zero_snr)
        products = torch.exp(2 * VPDiscrete(**named).table)  # CogVideoX
        products = products / (shift + (1 - shift) * products)
        shifted = VPDiscrete(alphas_cumprod=tuple(products.tolist()))
        return VPDiscrete(_betas_of(shifted), zero_snr=True) if zero_snr else shifted
    except ScheduleError as error:
        raise ScheduleError(f"scheduler configuration: {error}") from None


def _betas_of(noise: VPDiscrete) -> tuple[float, ...]:
    products = torch.exp(2 * noise.table)
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    return tuple((1 - products / before).tolist())


def _trained(value: object) -> tuple[float, ...]:
    values = value.tolist() if hasattr(value, "tolist") else value
    if values is None:
        return ()
    if not isinstance(values, list | tuple) or not values:
        raise ScheduleError("scheduler configuration: trained_betas must be a list of numbers")
    for number in values:
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not plain or not 0 < number < 1:
            raise ScheduleError(
                f"scheduler configuration: trained_betas holds {number!r}: numbers between 0 and "
                "1 are needed"
            )
    return tuple(float(number) for number in values)


def _clip(read: _Reader) -> dict[str, float] | None:
    """The clipping of data predictions that the pipeline's own scheduler does."""
    if read.flag("thresholding"):
        ratio = read.number("dynamic_thresholding_ratio", 0.995)
        if ratio > 1:
            raise ScheduleError(
                f"scheduler configuration: dynamic_thresholding_ratio is {ratio:g}: use 0 to 1"
            )
        most = max(1.0, read.number("sample_max_value", 1.0))
        return {"quantile": ratio, "minimum": 1.0, "maximum": most}
    clips = read.flag("clip_sample", read.origin in _CLIPS)
    if not clips or any(read.get(key) is not None for key in _NEVER_CLIPS):
        return None
    return {"quantile": 0.0, "minimum": read.number("clip_sample_range", 1.0)}
