"""The search space of particle schedules at a fixed number of steps.

A member runs from the noise schedule's first time to its last; open are the inner times (in lam),
and per step the noise scale zeta (as its logarithm), the rule of resampling and its threshold, and
the quadrature of the weight, and where asked for the target's strength b; and of all steps the
integrator, and where asked for how a reward is weighed and the scale of its ramp. A rule of
resampling matters only where something was weighed since the last resampling (with a reward,
anywhere), a threshold only for the rule "ess": elsewhere they are neutral in a canonical member
and absent from its parameters. `from_params` is total and
inverts `params` exactly: lam are multiples of 1e-9, the other numbers of 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fewstep.space.choices import Parameter, Value
from fewstep.space.domain import LAM_CEILING, LAM_FLOOR
from fewstep.space.errors import ScheduleError
from fewstep.space.moves import fit_times
from fewstep.space.noise import NoiseSchedule
from fewstep.space.particles import ParticleSchedule, ParticleStep, ramp_share
from fewstep.space.protocol import Domain

__all__ = ["ParticleDomain"]

RATES = {
    "zeta": 0.2,
    "weight": 0.05,
    "resample": 0.1,
    "ess": 0.2,
    "b": 0.1,
    "lam": 0.5,
    "integrator": 0.05,
    "reward_weight": 0.05,
    "ramp": 0.2,
}
_LEAST_ESS = 0.05
_LAM_DIGITS, _DIGITS = 9, 6


@dataclass(frozen=True)
class ParticleDomain(Domain):
    """All schedules of `nfe` steps for a noise schedule, with the choices left open.

    Args:
        noise: the noise schedule.
        nfe: steps of every member, >= 1.
        zeta: (low, high) noise scales, 0 < low <= 1 <= high.
        resample: rules allowed, "never" first.
        weight: quadratures allowed.
        integrators: integrators allowed; "euler" goes where alpha starts at 0.
        strength: (low, high) strengths b of the target during a step, around its own; None leaves
            all steps at its own. A change of strength needs the models' densities, that of a
            reward nothing; 0 in the first steps switches it on late.
        own: the target's own strength.
        own_ramp: the scale of the target's own ramp, inf if it has none.
        ramp: (low, high) scales of a reward's ramp; None leaves it at the target's own.
        reward_weight: ways of weighing a reward that are allowed, "gradient" first where it is.
        rewarded: whether the target has a reward, so that weights change in every step.
        min_gap: least difference in lam of neighbouring times, > 0.

    Raises:
        ScheduleError: an empty space.
    """

    noise: NoiseSchedule
    nfe: int
    zeta: tuple[float, float] = (0.02, 8.0)
    resample: tuple[str, ...] = ("never", "always", "ess")
    weight: tuple[str, ...] = ("none", "left", "trapezoid")
    integrators: tuple[str, ...] = ("exponential", "euler")
    strength: tuple[float, float] | None = None
    own: float = 1.0
    own_ramp: float = math.inf
    ramp: tuple[float, float] | None = None
    reward_weight: tuple[str, ...] = ("gradient",)
    rewarded: bool = False
    min_gap: float = 0.02

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ScheduleError(f"domain: nfe {self.nfe} must be at least 1")
        for name, allowed in (
            ("resample", ("never", "always", "ess")),
            ("weight", ("none", "left", "trapezoid")),
            ("integrators", ("exponential", "euler")),
            ("reward_weight", ("gradient", "path")),
        ):
            given = getattr(self, name)
            if not given or not set(given) <= set(allowed):
                raise ScheduleError(f"domain: {name} must be out of {', '.join(allowed)}")
        if "never" not in self.resample:
            raise ScheduleError("domain: resample must hold 'never', for steps without weights")
        if not 0 < self.zeta[0] <= 1 <= self.zeta[1]:
            raise ScheduleError(f"domain: zeta {self.zeta} must be (low, high) around 1")
        if self.strength is not None and not self.strength[0] <= self.own <= self.strength[1]:
            raise ScheduleError(
                f"domain: strength {self.strength} must be (low, high) around the target's own, "
                f"{self.own:g}"
            )
        if self.ramp is not None and not 0 < self.ramp[0] < self.ramp[1] < math.inf:
            raise ScheduleError(f"domain: ramp {self.ramp} must be (low, high), 0 < low < high")
        if self.ramp is not None and self.strength is not None:
            raise ScheduleError(
                "domain: strength sets b in every step, which leaves no ramp: open one"
            )
        opens = self.ramp is not None or self.reward_weight != ("gradient",)
        if opens and not self.rewarded:
            raise ScheduleError("domain: ramp and reward_weight are for a target with a reward")
        low, high = self.lam_range
        if not self.min_gap > 0 or high - low < self.nfe * self.min_gap:
            raise ScheduleError(
                f"domain: {self.nfe} gaps of {self.min_gap} do not fit in lam {low:.3g} to "
                f"{high:.3g}: lower min_gap"
            )
        if not self._moves:
            raise ScheduleError("domain: alpha starts at 0, where euler cannot: add exponential")

    @cached_property
    def _moves(self) -> tuple[str, ...]:
        """The integrators that can start."""
        start = torch.tensor(self.noise.t_range[0], dtype=torch.float64)
        pure = float(self.noise.alpha(start)) == 0
        return tuple(m for m in self.integrators if m != "euler" or not pure)

    @property
    def _live(self) -> bool:
        """Whether weights change in every step, whatever its quadrature."""
        return self.strength is not None or self.rewarded

    @property
    def _log_ramp(self) -> tuple[float, float]:
        assert self.ramp is not None
        low, high = (round(math.log(v), _DIGITS) for v in self.ramp)
        return low, high

    def _own_b(self, times: Sequence[float]) -> list[float]:
        """The target's own strength in the steps that start at these times."""
        return [self.own * share for share in ramp_share(self.noise, times, self.own_ramp)]

    @property
    def _log_zeta(self) -> tuple[float, float]:
        low, high = (round(math.log(v), _DIGITS) for v in self.zeta)
        return low, high

    def _lam(self, times: Sequence[float]) -> list[float]:
        values: list[float] = self.noise.lam(torch.tensor(times, dtype=torch.float64)).tolist()
        return [round(min(max(v, LAM_FLOOR), LAM_CEILING), _LAM_DIGITS) for v in values]

    @cached_property
    def lam_range(self) -> tuple[float, float]:
        """lam of the first and the last time, finite."""
        low, high = self._lam(self.noise.t_range)
        return low, high

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """See `Domain`."""
        found = []
        if len(self._moves) > 1:
            choices: tuple[Value, ...] = self._moves
            found.append(Parameter("integrator", "choice", choices=choices, neutral=choices[0]))
        if len(self.reward_weight) > 1:
            ways: tuple[Value, ...] = self.reward_weight
            found.append(Parameter("reward_weight", "choice", choices=ways, neutral=ways[0]))
        if self.ramp is not None:
            found.append(Parameter("log_ramp", "float", *self._log_ramp, neutral=self._ramp({})))
        logs = self._log_zeta
        for i in range(self.nfe):
            if i > 0:
                found.append(
                    Parameter(f"lam_{i}", "float", *self.lam_range, neutral=self.lam_range[1])
                )
            found.append(Parameter(f"log_zeta_{i}", "float", *logs))
            if self.strength is not None:
                found.append(Parameter(f"b_{i}", "float", *self.strength, neutral=self.own))
            for name in ("weight", "resample"):
                choices = getattr(self, name)
                if len(choices) > 1:
                    found.append(
                        Parameter(f"{name}_{i}", "choice", choices=choices, neutral=choices[0])
                    )
            if "ess" in self.resample:
                found.append(Parameter(f"ess_{i}", "float", _LEAST_ESS, 1.0, neutral=0.5))
        return tuple(found)

    def contains(self, schedule: object) -> str | None:
        """Why a schedule is not a member, or None if it is."""
        if not isinstance(schedule, ParticleSchedule):
            return f"a {type(schedule).__name__} is no particle schedule"
        if schedule.noise != self.noise:
            return "its noise schedule is another"
        if schedule.nfe != self.nfe:
            return f"it makes {schedule.nfe} calls, not {self.nfe}"
        if schedule.solver is not None:
            return "a solver is not searched"
        if schedule.integrator not in self._moves:
            return f"integrator {schedule.integrator!r} is not open"
        if schedule.reward_weight not in self.reward_weight:
            return f"reward_weight {schedule.reward_weight!r} is not open"
        if schedule.ramp is not None and self.ramp is None:
            return "ramp is not searched"
        if self.ramp is not None and schedule.ramp is None and not self._within(self.own_ramp):
            return f"its ramp, the target's own {self.own_ramp}, is outside {self.ramp}"
        if schedule.ramp is not None and not self._within(schedule.ramp):
            return f"its ramp {schedule.ramp} is outside {self.ramp}"
        if (schedule.times[0], schedule.times[-1]) != tuple(self.noise.t_range):
            return f"its times run from {schedule.times[0]} to {schedule.times[-1]}"
        for i, (a, b) in enumerate(pairwise(self._lam(schedule.times))):
            if b - a < self.min_gap * (1 - 1e-6):
                return f"step {i} advances lam by {b - a:.4g}: the minimum gap is {self.min_gap}"
        low, high = self.zeta
        for i, step in enumerate(schedule.steps):
            if not low * (1 - 1e-6) <= step.zeta <= high * (1 + 1e-6):
                return f"step {i}: zeta {step.zeta} is outside {low} to {high}"
            if step.b is not None and self.strength is None:
                return f"step {i}: b is not searched"
            least, most = self.strength or (self.own, self.own)
            if step.b is not None and not least - 1e-6 <= step.b <= most + 1e-6:
                return f"step {i}: b {step.b} is outside {least} to {most}"
            for name in ("resample", "weight"):
                if getattr(step, name) not in getattr(self, name):
                    return f"step {i}: {name} {getattr(step, name)!r} is not open"
            if step.resample == "ess" and step.ess < _LEAST_ESS:
                return f"step {i}: ess {step.ess} is below {_LEAST_ESS}"
        return None

    def _values(self, schedule: ParticleSchedule) -> dict[str, Value]:
        """See `Domain`."""
        found: dict[str, Value] = {}
        if len(self._moves) > 1:
            found["integrator"] = schedule.integrator
        if len(self.reward_weight) > 1:
            found["reward_weight"] = schedule.reward_weight
        if self.ramp is not None:
            scale = self.own_ramp if schedule.ramp is None else schedule.ramp
            found["log_ramp"] = round(math.log(scale), _DIGITS)
        lam, live = self._lam(schedule.times), self._live
        own = self._own_b(schedule.times[:-1])
        for i, step in enumerate(schedule.steps):
            if i > 0:
                found[f"lam_{i}"] = lam[i]
            found[f"log_zeta_{i}"] = round(math.log(step.zeta), _DIGITS)
            if self.strength is not None:
                found[f"b_{i}"] = round(own[i] if step.b is None else step.b, _DIGITS)
            if len(self.weight) > 1:
                found[f"weight_{i}"] = step.weight
            live = live or step.weight != "none"
            if live and len(self.resample) > 1:
                found[f"resample_{i}"] = step.resample
                if step.resample == "ess":
                    found[f"ess_{i}"] = round(step.ess, _DIGITS)
            live = self._live or (live and step.resample != "always")
        return found

    def _within(self, scale: float) -> bool:
        assert self.ramp is not None
        return self.ramp[0] * (1 - 1e-6) <= scale <= self.ramp[1] * (1 + 1e-6)

    def _ramp(self, values: Mapping[str, Any]) -> float:
        """The logarithm of the ramp's scale, the target's own if it is missing."""
        low, high = self._log_ramp
        own = min(math.log(self.own_ramp), high)
        return round(min(max(float(values.get("log_ramp", own)), low), high), _DIGITS)

    def from_params(self, values: Mapping[str, Any]) -> ParticleSchedule:
        """The member nearest to any values: missing ones are neutral, times keep their gaps."""
        low, high = self._log_zeta
        moves = values.get("integrator", self._moves[0])
        given = [float(v) for k, v in values.items() if k.startswith("lam_")]
        inner = fit_times(given, self.nfe - 1, *self.lam_range, self.min_gap)
        lam = torch.tensor([round(v, _LAM_DIGITS) for v in inner], dtype=torch.float64)
        first, last = self.noise.t_range
        times = (first, *self.noise.t_of_lam(lam).tolist(), last)
        steps, live, own = [], self._live, self._own_b(times[:-1])
        for i in range(self.nfe):
            log_zeta = min(max(float(values.get(f"log_zeta_{i}", 0.0)), low), high)
            weight = self._choice("weight", values, i)
            live = live or weight != "none"
            rule = self._choice("resample", values, i) if live else "never"
            live = self._live or (live and rule != "always")
            chosen: dict[str, Any] = {"resample": rule, "weight": weight}
            if self.strength is not None:
                b = float(values.get(f"b_{i}", own[i]))
                b = min(max(b, self.strength[0]), self.strength[1])
                chosen["b"] = round(b, _DIGITS)
            if rule == "ess":
                share = min(max(float(values.get(f"ess_{i}", 0.5)), _LEAST_ESS), 1.0)
                chosen["ess"] = round(share, _DIGITS)
            steps.append(ParticleStep(zeta=math.exp(round(log_zeta, _DIGITS)), **chosen))
        fixed: dict[str, Any] = {"integrator": moves if moves in self._moves else self._moves[0]}
        way = values.get("reward_weight", self.reward_weight[0])
        fixed["reward_weight"] = way if way in self.reward_weight else self.reward_weight[0]
        fixed["ramp"] = None if self.ramp is None else math.exp(self._ramp(values))
        return ParticleSchedule(noise=self.noise, times=times, steps=tuple(steps), **fixed)

    def _choice(self, name: str, values: Mapping[str, Any], i: int) -> str:
        allowed: tuple[str, ...] = getattr(self, name)
        value = str(values.get(f"{name}_{i}", allowed[0]))
        return value if value in allowed else allowed[0]

    def sample(self, rng: np.random.Generator) -> ParticleSchedule:
        """A random member: gaps in lam around equal ones, zeta around 1, choices in runs."""
        gaps = np.exp(0.5 * rng.normal(size=self.nfe))
        low, high = self.lam_range
        lam = low + (high - low) * np.cumsum(gaps / gaps.sum())
        log_zeta = rng.normal(0, 0.5) + rng.normal(0, 0.3, self.nfe)
        values: dict[str, Any] = {"integrator": str(rng.choice(self._moves))}
        values |= {f"lam_{i}": float(lam[i - 1]) for i in range(1, self.nfe)}
        values |= {f"log_zeta_{i}": float(log_zeta[i]) for i in range(self.nfe)}
        for name in ("weight", "resample"):
            cut = int(rng.integers(self.nfe + 1))
            early, late = (str(rng.choice(getattr(self, name))) for _ in range(2))
            values |= {f"{name}_{i}": early if i < cut else late for i in range(self.nfe)}
        values |= {f"ess_{i}": float(rng.uniform(0.1, 0.9)) for i in range(self.nfe)}
        if self.strength is not None:  # from one strength at the start to the target's own
            path = np.linspace(rng.uniform(*self.strength), self.own, self.nfe)
            if self.rewarded and rng.random() < 0.5:  # or switched on late
                path = np.where(np.arange(self.nfe) < rng.integers(self.nfe), 0.0, self.own)
            values |= {f"b_{i}": float(path[i]) for i in range(self.nfe)}
        if len(self.reward_weight) > 1:
            values["reward_weight"] = str(rng.choice(self.reward_weight))
        if self.ramp is not None:
            values["log_ramp"] = float(rng.uniform(*self._log_ramp))
        return self.from_params(values)

    def mutate(
        self,
        schedule: ParticleSchedule,
        rng: np.random.Generator,
        *,
        rates: Mapping[str, float] | None = None,
        scale: float = 0.05,
    ) -> ParticleSchedule:
        """A changed copy, never equal to the original.

        Args:
            schedule: a member.
            rng: source of randomness.
            rates: probabilities of `RATES` to use instead; "lam", "integrator", "reward_weight"
                and "ramp" are per schedule, the others per step.
            scale: size of the moves of numbers; drawn log-uniformly from .2 to 20 times this.
        """
        chance = RATES | dict(rates or {})
        before = self.params(schedule)
        for _ in range(50):
            reach = scale * 10 ** rng.uniform(-0.7, 1.3)
            values: dict[str, Any] = dict(before)
            wave = np.zeros(self.nfe)
            if rng.random() < 0.6:  # a smooth move of all steps, or of a few
                at = (np.arange(self.nfe) + 0.5) / self.nfe
                wave = np.cos(math.pi * rng.integers(0, 5) * at + rng.uniform(0, 2 * math.pi))
            wave = reach * rng.normal() * wave
            for i in range(self.nfe):
                if rng.random() < chance["zeta"]:
                    wave[i] += reach * rng.normal()
                values[f"log_zeta_{i}"] += float(wave[i])
                for name in ("weight", "resample"):
                    if rng.random() < chance[name]:
                        values[f"{name}_{i}"] = str(rng.choice(getattr(self, name)))
                if self.strength is not None and rng.random() < chance["b"]:
                    width = self.strength[1] - self.strength[0]
                    values[f"b_{i}"] += 0.3 * min(reach, 1.0) * width * rng.normal()
                if rng.random() < chance["ess"]:
                    values[f"ess_{i}"] = values.get(f"ess_{i}", 0.5) + 0.2 * rng.normal()
            if rng.random() < chance["lam"]:
                values |= self._moved(values, reach, rng)
            if rng.random() < chance["integrator"]:
                values["integrator"] = str(rng.choice(self._moves))
            if rng.random() < chance["reward_weight"]:
                values["reward_weight"] = str(rng.choice(self.reward_weight))
            if self.ramp is not None and rng.random() < chance["ramp"]:
                values["log_ramp"] += 4 * reach * rng.normal()
            child = self.from_params(values)
            if self.params(child) != before:
                return child
        return self.sample(rng)

    def _moved(
        self, values: Mapping[str, Any], reach: float, rng: np.random.Generator
    ) -> dict[str, float]:
        """Other inner times: the gaps change, smoothly or each for itself."""
        lam = np.array(
            [self.lam_range[0], *(values[f"lam_{i}"] for i in range(1, self.nfe)),
             self.lam_range[1]]
        )  # fmt: skip
        at = (np.arange(self.nfe) + 0.5) / self.nfe
        bend = np.cos(math.pi * rng.integers(1, 5) * at + rng.uniform(0, 2 * math.pi))
        push = rng.normal() * bend if rng.random() < 0.5 else rng.normal(size=self.nfe)
        gaps = np.diff(lam) * np.exp(reach * push)
        new = lam[0] + (lam[-1] - lam[0]) * np.cumsum(gaps / gaps.sum())
        return {f"lam_{i}": float(new[i - 1]) for i in range(1, self.nfe)}

    def crossover(
        self, a: ParticleSchedule, b: ParticleSchedule, rng: np.random.Generator
    ) -> ParticleSchedule:
        """A child: times of one parent, steps from `a` before a random one, then from `b`."""
        first, second = self.params(a), self.params(b)
        times = first if rng.random() < 0.5 else second
        cut = int(rng.integers(self.nfe + 1))
        values: dict[str, Any] = {k: v for k, v in times.items() if k.startswith("lam_")}
        for parent, mine in ((first, range(cut)), (second, range(cut, self.nfe))):
            for k, v in parent.items():
                stem, _, index = k.rpartition("_")
                if stem != "lam" and index.isdigit() and int(index) in mine:
                    values[k] = v
        values["integrator"] = (a if rng.random() < 0.5 else b).integrator
        whole = first if rng.random() < 0.5 else second
        values |= {k: whole[k] for k in ("reward_weight", "log_ramp") if k in whole}
        return self.from_params(values)

    def adopt(self, schedule: object) -> list[ParticleSchedule]:
        """The member that follows a schedule of any number of steps.

        After a share of the steps it is at the same lam, and a step has the choices of the one in
        its place; choices that are not open are neutral. None from a schedule of another noise
        schedule or with a solver.
        """
        if not isinstance(schedule, ParticleSchedule) or schedule.solver is not None:
            return []
        if schedule.noise != self.noise:
            return []
        lam = self._lam(schedule.times)
        ends = np.linspace(0, schedule.nfe, self.nfe + 1)
        moved = np.interp(ends, np.arange(len(lam)), lam)
        values: dict[str, Any] = {"integrator": schedule.integrator}
        values["reward_weight"] = schedule.reward_weight
        scale = self.own_ramp if schedule.ramp is None else schedule.ramp
        values["log_ramp"] = math.log(scale)
        own = [self.own * share for share in ramp_share(self.noise, schedule.times[:-1], scale)]
        for i in range(self.nfe):
            k = int((ends[i] + ends[i + 1]) / 2)
            step = schedule.steps[k]
            if i > 0:
                values[f"lam_{i}"] = float(moved[i])
            values[f"log_zeta_{i}"] = math.log(max(step.zeta, self.zeta[0]))
            values |= {f"weight_{i}": step.weight, f"resample_{i}": step.resample}
            values |= {f"ess_{i}": step.ess, f"b_{i}": own[k] if step.b is None else step.b}
        return [self.from_params(values)]
