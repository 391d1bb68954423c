"""Noise schedules: t -> (alpha, sigma) of x_t = alpha x0 + sigma eps, each with its exact inverse.

`lam = log(alpha) - log(sigma)` is half the log-SNR and increases towards data; `rho = sigma/alpha
= exp(-lam)` (the `edm_sigma` of EDM). Times decrease from `t_start` (noise) to `t_end` (data)
while sampling. All functions take and return float64 tensors of any shape and are differentiable,
because a schedule's times are optimised through them. sigma may be 0 at the very end (lam = inf)
and alpha 0 at the very start of a rectified flow (lam = -inf).

References: VP linear, Song et al. 2021 (arXiv 2011.13456) eq. 32-33; VP cosine, Nichol and
Dhariwal 2021 (2102.09672) eq. 17;
EDM, Karras et al. 2022 (2206.00364) table 1; rectified flow with shift, Esser et al. 2024
(2403.03206) eq. 23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fewstep.space.betas import BETAS, log_alpha_of, named_betas
from fewstep.space.errors import ScheduleError, is_number

__all__ = [
    "EDM",
    "VE",
    "NoiseSchedule",
    "RectifiedFlow",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "finite_lam",
    "noise_from_dict",
    "noise_to_dict",
]


_FAR = 12.0


@runtime_checkable
class NoiseSchedule(Protocol):
    """What every noise schedule answers; see the module docstring for symbols and frames."""

    type: ClassVar[str]

    @property
    def t_range(self) -> tuple[float, float]:
        """(t_start, t_end): the first time and the default last time, t_start > t_end."""
        ...

    @property
    def t_data(self) -> float:
        """The time of clean data, sigma = 0; the lowest time a schedule may land on."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at time t."""
        ...

    def lam(self, t: Tensor) -> Tensor:
        """log(alpha) - log(sigma) at time t."""
        ...

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of `lam`."""
        ...

    def label(self, t: Tensor) -> Tensor:
        """The number the network is told for time t."""
        ...

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt) at time t."""
        ...

    def prior_scale(self, t: float) -> float:
        """Standard deviation of the start state x_T at time t."""
        ...


def finite_lam(noise: NoiseSchedule, t: Tensor) -> Tensor:
    """lam of times; pure noise and clean data, which are infinitely far, count as +-12."""
    return noise.lam(t).clamp(-_FAR, _FAR)


class _VP:
    """What follows from log alpha alone when alpha^2 + sigma^2 = 1."""

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def dlog_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def t_data(self) -> float:
        return 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def lam(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    @staticmethod
    def _log_alpha_of_lam(lam: Tensor) -> Tensor:
        # alpha^2 = 1/(1 + e^{-2 lam}); softplus keeps both tails exact
        return -0.5 * torch.nn.functional.softplus(-2 * lam, threshold=40.0)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope, alpha = self.dlog_alpha(t), self.alpha(t)
        return alpha * slope, -(alpha**2) * slope / self.sigma(t)

    def prior_scale(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class VPLinear(_VP):
    """beta(t) = beta_min + (beta_max - beta_min) t, variance preserving.

    log alpha = -(beta_max - beta_min) t^2/4 - beta_min t/2.

    Args:
        beta_min: beta at t = 0, > 0. beta_min = beta_max gives the constant-rate schedule alpha =
            exp(-beta t/2).
        beta_max: slope parameter, >= beta_min.
        t_start: first time, > t_end.
        t_end: last time of the named grids, > 0.
        label_scale: the network is told label_scale * t (999 for ScoreSDE checkpoints).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 1e-3
    label_scale: float = 1.0
    type: ClassVar[str] = "vp_linear"

    def __post_init__(self) -> None:
        _check(self, self.t_start, self.t_end, positive=("beta_min", "beta_max", "label_scale"))
        if self.beta_max < self.beta_min:
            raise ScheduleError(
                f"noise.beta_max {self.beta_max} is below beta_min {self.beta_min}: swap them"
            )

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_start, self.t_end

    def log_alpha(self, t: Tensor) -> Tensor:
        return -(self.beta_max - self.beta_min) / 4 * t**2 - self.beta_min / 2 * t

    def dlog_alpha(self, t: Tensor) -> Tensor:
        return -(self.beta_max - self.beta_min) / 2 * t - self.beta_min / 2

    def t_of_lam(self, lam: Tensor) -> Tensor:
        c = -self._log_alpha_of_lam(lam)
        b = self.beta_min / 2
        return 2 * c / (b + torch.sqrt(b**2 + (self.beta_max - self.beta_min) * c))

    def label(self, t: Tensor) -> Tensor:
        return self.label_scale * t


@dataclass(frozen=True)
class VPCosine(_VP):
    """alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s)).

    Args:
        s: offset, > 0.
        t_start: first time; below 1, because alpha(1) = 0.
        t_end: last time of the named grids, > 0.
        label_scale: the network is told label_scale * t.
    """

    s: float = 0.008
    t_start: float = 0.9946
    t_end: float = 1e-3
    label_scale: float = 1.0
    type: ClassVar[str] = "vp_cosine"

    def __post_init__(self) -> None:
        _check(self, self.t_start, self.t_end, positive=("s", "label_scale"))
        if self.t_start >= 1:
            raise ScheduleError(
                f"noise.t_start {self.t_start} must be below 1, where alpha is 0: use 0.9946"
            )

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_start, self.t_end

    @property
    def _angle_0(self) -> float:
        return self._rate * self.s

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.s)

    def log_alpha(self, t: Tensor) -> Tensor:
        # cos(a + d)/cos(a) = cos d - tan(a) sin d: exactly 1 at t = 0 with any cosine's rounding
        d = self._rate * t
        fall = 2 * torch.sin(d / 2) ** 2 + math.tan(self._angle_0) * torch.sin(d)
        return torch.log1p(-fall)

    def dlog_alpha(self, t: Tensor) -> Tensor:
        return -torch.tan(self._rate * t + self._angle_0) * self._rate

    def t_of_lam(self, lam: Tensor) -> Tensor:
        # log cos(a) by the sine, as cos(a) near 1 has lost half the digits of its distance to 1
        log_cosine = self._log_alpha_of_lam(lam) + math.log1p(-(math.sin(self._angle_0) ** 2)) / 2
        # acos loses half the digits near the data end, where the cosine is close to 1
        sine = torch.sqrt(-torch.expm1(2 * log_cosine))
        angle = torch.atan2(sine, torch.exp(log_cosine))
        return (angle - self._angle_0) / self._rate

    def label(self, t: Tensor) -> Tensor:
        return self.label_scale * t


@dataclass(frozen=True)
class VPDiscrete(_VP):
    """A table of N training steps; t is the label 0..N-1, log alpha is linear between labels.

    t = -1 is clean data (sigma = 0). Between labels -1/2 and 0 the first segment is extended, as
    published schedules end there.

    Args:
        betas: a name of `space.betas.BETAS`, or the N betas themselves.
        beta_start: first beta of a named schedule.
        beta_end: last beta of a named schedule.
        n: number of training steps of a named schedule.
        alphas_cumprod: the N products of (1 - beta), given instead of betas; strictly decreasing,
            within (0, 1).
        zero_snr: the betas are rescaled to leave no signal at the last training step.
    """

    betas: str | tuple[float, ...] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    n: int = 1000
    alphas_cumprod: tuple[float, ...] | None = None
    zero_snr: bool = False
    type: ClassVar[str] = "vp_discrete"

    def __post_init__(self) -> None:
        named = self.alphas_cumprod is None and isinstance(self.betas, str)
        if named and self.betas not in BETAS:
            raise ScheduleError(
                f"noise.betas {self.betas!r}: give one of {', '.join(BETAS)}, or the list of betas"
            )
        if named and not (isinstance(self.n, int) and 2 <= self.n <= 10**6):
            raise ScheduleError(f"noise.n {self.n!r}: a whole number of training steps from 2 up")
        table = self.table
        if len(table) < 2:
            raise ScheduleError("noise.n: a discrete schedule needs at least 2 training steps")
        finite = bool(torch.isfinite(table).all())
        if not finite or bool((table.diff() >= 0).any()) or float(table[0]) >= 0:
            raise ScheduleError(
                "noise.alphas_cumprod must decrease strictly and lie within (0, 1): check betas"
            )

    @cached_property
    def table(self) -> Tensor:
        """log alpha at the labels 0..N-1, float64."""
        if self.alphas_cumprod is not None:
            return 0.5 * torch.log(torch.tensor(self.alphas_cumprod, dtype=torch.float64))
        if isinstance(self.betas, str):
            betas = named_betas(self.betas, self.beta_start, self.beta_end, self.n)
        else:
            betas = torch.tensor(self.betas, dtype=torch.float64)
        return log_alpha_of(betas, zero_snr=self.zero_snr)

    @property
    def t_range(self) -> tuple[float, float]:
        return float(len(self.table) - 1), 0.0

    @property
    def t_data(self) -> float:
        return -1.0

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.clamp(torch.floor(t.detach()), 0, len(self.table) - 2).long()
        return low, self.table[low + 1] - self.table[low]

    def log_alpha(self, t: Tensor) -> Tensor:
        low, slope = self._segment(t)
        value = self.table[low] + (t - low) * slope
        return torch.where(t <= -1, torch.zeros_like(value), value)

    def dlog_alpha(self, t: Tensor) -> Tensor:
        return self._segment(t)[1]

    def t_of_lam(self, lam: Tensor) -> Tensor:
        log_alpha = self._log_alpha_of_lam(lam)
        at = torch.searchsorted(-self.table, -log_alpha.detach().contiguous())
        low = torch.clamp(at - 1, 0, len(self.table) - 2)
        t = low + (log_alpha - self.table[low]) / (self.table[low + 1] - self.table[low])
        return torch.where(torch.isposinf(lam), -torch.ones_like(t), t)

    def label(self, t: Tensor) -> Tensor:
        return torch.clamp(t, min=0.0)


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = t: variance exploding in EDM's parametrisation.

    Args:
        sigma_max: first time, > sigma_min.
        sigma_min: last time of the named grids before an optional 0, > 0.
        labels: what the network is told: "sigma"; "log", log(sigma)/4 as EDM's own networks are;
            "atan", 2 atan(sigma)/pi.
    """

    sigma_max: float = 80.0
    sigma_min: float = 0.002
    labels: str = "sigma"
    type: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        _check(self, self.sigma_max, self.sigma_min, positive=("sigma_min", "sigma_max"))
        if self.labels not in ("sigma", "log", "atan"):
            raise ScheduleError(f"noise.labels {self.labels!r}: use sigma, log or atan")

    @property
    def t_range(self) -> tuple[float, float]:
        return self.sigma_max, self.sigma_min

    @property
    def t_data(self) -> float:
        return 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def lam(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)

    def label(self, t: Tensor) -> Tensor:
        if self.labels == "log":
            return torch.log(t) / 4
        return 2 * torch.atan(t) / math.pi if self.labels == "atan" else t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def prior_scale(self, t: float) -> float:
        return t


VE = EDM


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t); t = 1 is noise, t = 0 data.

    Args:
        shift: > 0; 3 for SD3, 1 for none.
        t_start: first time, at most 1.
        t_end: last time of the named grids; 0 lands on clean data.
        label_scale: the network is told label_scale * sigma (1000 for diffusers' flow models).
    """

    shift: float = 1.0
    t_start: float = 1.0
    t_end: float = 1e-3
    label_scale: float = 1.0
    type: ClassVar[str] = "rectified_flow"

    def __post_init__(self) -> None:
        _check(self, self.t_start, self.t_end, positive=("shift", "label_scale"))
        if self.t_start > 1:
            raise ScheduleError(
                f"noise.t_start {self.t_start} is above 1, which is pure noise: use 1"
            )

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_start, self.t_end

    @property
    def t_data(self) -> float:
        return 0.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(self.shift * t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam - math.log(self.shift))

    def label(self, t: Tensor) -> Tensor:
        return self.label_scale * self.sigma(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.shift / (1 + (self.shift - 1) * t) ** 2
        return -rate, rate

    def prior_scale(self, t: float) -> float:
        return self.shift * t / (1 + (self.shift - 1) * t)


_TYPES: dict[str, type] = {c.type: c for c in (VPLinear, VPCosine, VPDiscrete, EDM, RectifiedFlow)}


def noise_from_dict(data: dict[str, Any]) -> NoiseSchedule:
    """Build a noise schedule from its JSON form.

    Raises:
        ScheduleError: unknown type, unknown key or a value out of range; the field is named.
    """
    kind = data.get("type") if isinstance(data, dict) else data
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ScheduleError(f"noise.type {kind!r} is unknown: use one of {', '.join(_TYPES)}")
    cls = _TYPES[data["type"]]
    known = {f.name for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "type"}
    for key, value in values.items():
        if key not in known:
            raise ScheduleError(
                f"noise.{key} is not a field of {data['type']}: its fields are "
                f"{', '.join(sorted(known))}"
            )
        for number in value if isinstance(value, tuple) else (value,):
            good = is_number(number) or (isinstance(number, str) and key in ("betas", "labels"))
            if not (isinstance(number, bool) if key == "zero_snr" else good):
                what = "true or false is" if key == "zero_snr" else "numbers are"
                raise ScheduleError(f"noise.{key} holds {str(number)[:60]!r}: {what} needed")
    try:
        return cast(NoiseSchedule, cls(**values))
    except TypeError as error:
        raise ScheduleError(f"noise: {str(error).splitlines()[0]}") from None


def noise_to_dict(noise: NoiseSchedule) -> dict[str, Any]:
    """The JSON form of a noise schedule; `noise_from_dict` inverts it exactly."""
    data: dict[str, Any] = {"type": noise.type}
    for field in fields(cast(Any, noise)):
        value = getattr(noise, field.name)
        data[field.name] = list(value) if isinstance(value, tuple) else value
    if isinstance(noise, VPDiscrete):  # keep only what the table depends on
        if noise.alphas_cumprod is not None:
            return {"type": noise.type, "alphas_cumprod": data["alphas_cumprod"]}
        del data["alphas_cumprod"]
        if not isinstance(noise.betas, str):
            data = {k: data[k] for k in ("type", "betas", "zero_snr")}
        if not noise.zero_snr:
            del data["zero_snr"]
    if isinstance(noise, EDM) and noise.labels == "sigma":
        del data["labels"]
    return data


def _check(noise: object, first: float, last: float, positive: tuple[str, ...]) -> None:
    for name in positive:
        value = getattr(noise, name)
        if not (is_number(value) and value > 0):
            raise ScheduleError(f"noise.{name} = {value!r} must be a positive number")
    if not (is_number(first) and is_number(last) and first > last >= 0):
        raise ScheduleError(f"noise: the first time {first} must lie above the last {last} >= 0")
