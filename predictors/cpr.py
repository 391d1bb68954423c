"""Cascade polynomial regression: schedules for settings nobody searched, from those searched.

Every continuous decision of step i (1..NFE) of a schedule is a smooth function of where the step
stands, of how many calls there are and of the guidance scale w. As a tensor product

    value = neutral + sum_{ijk} c_ijk T_i(u_x) T_j(u_w) T_k(u_n),       i <= 3, j, k <= 2

with Chebyshev polynomials T of x = i/NFE, w and NFE, each mapped to [-1, 1] over the fitted box.
This is DC-Solver's cascade, which is linear in its coefficients; the basis is well conditioned
where raw monomials are not. Here (`fit`) coefficients are a ridge regression towards the neutral
value, its penalty chosen by leaving out one NFE at a time; both leave-one-out errors are kept.
`predictors.cpr_joint` fits them to the samples instead, which is what a search does. Decisions:

    gap           log of the step's lam gap over the template's; gaps are rescaled to the range
    query, start, land     shifts in lam; compensation; weight0, weight1, ... ; log guidance share

Discrete choices come from a template, a named solver that exists at every NFE. Outside the box a
prediction is refused, or is the template itself with a warning: polynomials do not extrapolate.

References: DC-Solver, Zhao et al. (arXiv 2409.03755) section 3.3; the published SD-2.1
coefficients import by `published`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.polynomial import Polynomial, chebyshev
from numpy.typing import NDArray

from fewstep.space.baselines import baseline
from fewstep.space.errors import ScheduleError, StudyError
from fewstep.space.noise import NoiseSchedule, VPDiscrete, noise_from_dict, noise_to_dict
from fewstep.space.schedule import OdeSchedule

Array = NDArray[np.float64]
FORMAT, VERSION = "fewstep.cpr", 1
PENALTIES = tuple(10.0**k for k in range(-7, 2))
_GLOBALS: dict[str, Any] = {
    "first": "network",
    "compensation_variable": "t",
    "shift_keeps": "eps",
    "options": {},
}
_SHIFTS = {"query": "dt_query", "start": "dt_start", "land": "dt_land"}
_CONTINUOUS = {"compensation", "weights", "guidance", *_SHIFTS.values()}


class OutsideTrustRegion(UserWarning):
    """A prediction was asked outside the fitted box; the neutral schedule was returned."""


@dataclass(frozen=True)
class Regression:
    """One decision as a polynomial.

    Args:
        coefficients: c_ijk, shape (dx + 1, dw + 1, dn + 1).
        neutral: the value the regression shrinks to, and that of steps before `first`.
        first: first step (0-based) the decision exists at.
        low: smallest fitted value, predictions are clipped to it; -inf for none.
        high: largest fitted value.
        penalty: of the ridge.
        error_nfe: root mean square error at left-out NFEs, None if there was one only.
        error_guidance: the same at left-out guidance scales.
    """

    coefficients: Array
    neutral: float = 0.0
    first: int = 0
    low: float = -math.inf
    high: float = math.inf
    penalty: float = 0.0
    error_nfe: float | None = None
    error_guidance: float | None = None


@dataclass(frozen=True)
class CPR:
    """Fitted regressions and the box in which they may be asked.

    Args:
        noise: the noise schedule.
        template: named solver of the family, "solver/grid" as in `space.baselines`.
        nfe: (least, most) calls fitted.
        guidance: (least, most) guidance scale fitted.
        regressions: by decision (module docstring).
        compensation_order: K of the family.
        provenance: where it comes from; free JSON.
    """

    noise: NoiseSchedule
    template: str
    nfe: tuple[int, int]
    guidance: tuple[float, float]
    regressions: Mapping[str, Regression]
    compensation_order: int = 2
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def trusts(self, nfe: int, guidance: float) -> bool:
        """True inside the fitted box."""
        return (
            self.nfe[0] <= nfe <= self.nfe[1] and self.guidance[0] <= guidance <= self.guidance[1]
        )

    def values(self, nfe: int, guidance: float) -> dict[str, list[float]]:
        """Every decision at every step, neutral outside the box."""
        inside = self.trusts(nfe, guidance)
        found = {}
        for name, r in self.regressions.items():
            degrees = tuple(d - 1 for d in r.coefficients.shape)
            steps = np.arange(1, nfe + 1)
            basis = design(steps / nfe, guidance, nfe, (self.nfe, self.guidance), degrees)
            value = r.neutral + basis @ r.coefficients.ravel()
            value = np.clip(value, r.low, r.high)
            value[: r.first] = r.neutral
            found[name] = value.tolist() if inside else [r.neutral] * nfe
        return found

    def predict(
        self, nfe: int, guidance: float, *, outside: Literal["refuse", "neutral"] = "refuse"
    ) -> OdeSchedule:
        """The schedule for a setting.

        Args:
            nfe: network calls.
            guidance: guidance scale.
            outside: what to do outside the box: raise, or return the template with an
                `OutsideTrustRegion` warning.

        Raises:
            StudyError: outside the box with outside="refuse".
        """
        base = baseline(self.template, self.noise, nfe)
        note: dict[str, Any] = {"cpr": {"nfe": nfe, "guidance": guidance}}
        if not self.trusts(nfe, guidance):
            message = (
                f"NFE {nfe}, guidance {guidance:g} lies outside the fitted box (NFE "
                f"{self.nfe[0]}..{self.nfe[1]}, guidance {self.guidance[0]:g}.."
                f"{self.guidance[1]:g})"
            )
            if outside == "refuse":
                raise StudyError(f"{message}: search there, or ask for the neutral schedule")
            warnings.warn(f"{message}: the template is returned", OutsideTrustRegion, stacklevel=2)
            return base
        made = assemble(base, self.values(nfe, guidance), guidance, self.compensation_order)
        return made.model_copy(update={"provenance": base.provenance | note})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "noise": noise_to_dict(self.noise),
            "template": self.template,
            "nfe": list(self.nfe),
            "guidance": list(self.guidance),
            "compensation_order": self.compensation_order,
            "regressions": {
                name: {
                    "coefficients": r.coefficients.tolist(),
                    "neutral": r.neutral,
                    "first": r.first,
                    "range": [r.low, r.high] if math.isfinite(r.low) else None,
                    "penalty": r.penalty,
                    "leave_one_nfe_out": r.error_nfe,
                    "leave_one_guidance_out": r.error_guidance,
                }
                for name, r in self.regressions.items()
            },
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CPR:
        """Read the JSON form.

        Raises:
            StudyError: another format or version, a missing field, a number that is not finite.
        """
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise StudyError(f"not a {FORMAT} file of version {VERSION}")
        try:
            regressions = {name: _read(name, r) for name, r in data["regressions"].items()}
            return cls(
                noise_from_dict(data["noise"]),
                str(data["template"]),
                (int(data["nfe"][0]), int(data["nfe"][1])),
                (float(data["guidance"][0]), float(data["guidance"][1])),
                regressions,
                int(data["compensation_order"]),
                dict(data.get("provenance") or {}),
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"the CPR file is damaged: {error!r}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CPR:
        """Read a JSON file; see `from_dict`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise StudyError(f"{path} is not JSON: {error}") from None
        return cls.from_dict(data)


def _read(name: str, data: Mapping[str, Any]) -> Regression:
    coefficients = np.array(data["coefficients"], dtype=np.float64)
    if coefficients.ndim != 3 or not np.isfinite(coefficients).all():
        raise StudyError(f"regressions.{name}.coefficients must be finite, with three indices")
    low, high = data["range"] or (-math.inf, math.inf)
    return Regression(
        coefficients,
        float(data["neutral"]),
        int(data["first"]),
        float(low),
        float(high),
        float(data["penalty"]),
        data["leave_one_nfe_out"],
        data["leave_one_guidance_out"],
    )


def _unit(value: Any, low: float, high: float) -> Any:
    """[low, high] -> [-1, 1]; 0 where the range is a point."""
    return (2 * value - low - high) / (high - low) if high > low else 0.0 * value


def features(x: Array, place: tuple[Any, Any], degrees: Sequence[int]) -> Array:
    """The tensor basis, shape (rows, (dx + 1)(dw + 1)(dn + 1)).

    Args:
        x: steps in [-1, 1], shape (rows,).
        place: (guidance, NFE) in [-1, 1], numbers or shape (rows,).
        degrees: (dx, dw, dn).
    """
    parts = [
        chebyshev.chebvander(np.broadcast_to(np.asarray(v, dtype=np.float64), x.shape), d)
        for v, d in zip((x, *place), degrees, strict=True)
    ]
    product = parts[0][:, :, None, None] * parts[1][:, None, :, None] * parts[2][:, None, None, :]
    return product.reshape(len(x), math.prod(d + 1 for d in degrees))  # x may be empty


def design(
    x: Array,
    guidance: Any,
    nfe: Any,
    box: tuple[tuple[int, int], tuple[float, float]],
    degrees: Sequence[int],
) -> Array:
    """`features` of steps x = i/NFE of settings within a box ((NFE), (guidance))."""
    return features(_unit(x, 0.0, 1.0), (_unit(guidance, *box[1]), _unit(nfe, *box[0])), degrees)


def decisions(schedule: OdeSchedule, base: OdeSchedule, guidance: float) -> dict[str, list[float]]:
    """The continuous decisions of a schedule, relative to its template.

    Raises:
        StudyError: the schedule differs from the template in a discrete choice.
    """
    if schedule.n_steps != base.n_steps:
        raise StudyError(
            f"CPR: {schedule.n_steps} steps, the template has {base.n_steps}: fit schedules of "
            "one family"
        )
    for i, (step, plain) in enumerate(zip(schedule.steps, base.steps, strict=True)):
        for name in type(step).model_fields:
            if name not in _CONTINUOUS and getattr(step, name) != getattr(plain, name):
                raise StudyError(
                    f"CPR: step {i} has {name} {getattr(step, name)!r}, the template "
                    f"{getattr(plain, name)!r}: fit schedules of one family"
                )
    gaps, plain_gaps = _gaps(schedule), _gaps(base)
    found = {"gap": np.log(gaps / plain_gaps).tolist()}
    noise, times = schedule.noise, schedule.times
    for name, offset in _SHIFTS.items():
        at = times[1:] if name == "land" else times[:-1]
        t = torch.tensor(at, dtype=torch.float64)
        moved = t + torch.tensor([getattr(s, offset) for s in schedule.steps], dtype=torch.float64)
        change = torch.where(moved == t, torch.zeros_like(t), noise.lam(moved) - noise.lam(t))
        found[name] = change.tolist()
    found["compensation"] = [s.compensation for s in schedule.steps]
    for k in range(max(len(s.weights) for s in schedule.steps)):
        found[f"weight{k}"] = [s.weights[k] if k < len(s.weights) else 0 for s in schedule.steps]
    scales = [guidance if s.guidance is None else s.guidance for s in schedule.steps]
    found["guidance"] = [math.log(g / guidance) if g > 0 < guidance else 0.0 for g in scales]
    return found


def _gaps(schedule: OdeSchedule) -> Array:
    lam = schedule.noise.lam(torch.tensor(schedule.times, dtype=torch.float64))
    gaps: Array = lam.clamp(-7.0, 7.5).diff().clamp(min=1e-6).numpy()
    return gaps


def assemble(
    base: OdeSchedule, values: Mapping[str, list[float]], guidance: float, order: int
) -> OdeSchedule:
    """The template with these decisions; inverse of `decisions`."""
    noise, times = base.noise, torch.tensor(base.times, dtype=torch.float64)
    if "gap" in values and any(values["gap"]):
        gaps = _gaps(base) * np.exp(np.array(values["gap"]))
        share = torch.from_numpy(np.cumsum(gaps) / gaps.sum())
        ends = noise.lam(times[[0, -1]]).clamp(-7.0, 7.5)
        inner = noise.t_of_lam(ends[0] + share[:-1] * (ends[1] - ends[0]))
        times = torch.cat([times[:1], inner, times[-1:]])
    steps = []
    depth = sum(name.startswith("weight") for name in values)
    for i, step in enumerate(base.steps):
        changes: dict[str, Any] = {}
        for name, offset in _SHIFTS.items():
            shift = values[name][i] if name in values else 0.0
            t = times[i + 1] if name == "land" else times[i]
            if shift != 0.0 and bool(torch.isfinite(noise.lam(t))):
                changes[offset] = float(noise.t_of_lam(noise.lam(t) + shift) - t)
        if "compensation" in values and i >= order:
            changes["compensation"] = values["compensation"][i]
        weights = tuple(values[f"weight{k}"][i] for k in range(min(depth, i)))
        if any(weights):
            changes["weights"] = weights
        if "guidance" in values:
            changes["guidance"] = guidance * math.exp(values["guidance"][i])
        steps.append(step.model_copy(update=changes) if changes else step)
    return base.model_copy(
        update={
            "times": tuple(times.tolist()),
            "steps": tuple(steps),
            "compensation_order": order,
        }
    )


def fit(
    schedules: Sequence[tuple[int, float, OdeSchedule]],
    template: str,
    *,
    degrees: tuple[int, int, int] = (3, 2, 2),
    penalties: Sequence[float] = PENALTIES,
) -> CPR:
    """Fit the decisions of searched or refined schedules.

    Args:
        schedules: (NFE, guidance, schedule), all of the template's family.
        template: the family's named solver, "solver/grid".
        degrees: largest degrees in x, guidance and NFE; lowered where there are fewer settings.
        penalties: ridge penalties to choose from.

    Raises:
        StudyError: no schedules, or schedules of different families.
    """
    if not schedules:
        raise StudyError("CPR: no schedules to fit")
    nfes, scales = sorted({n for n, _, _ in schedules}), sorted({g for _, g, _ in schedules})
    noise, order = schedules[0][2].noise, schedules[0][2].compensation_order
    box = (nfes[0], nfes[-1]), (scales[0], scales[-1])
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for nfe, guidance, schedule in schedules:
        if schedule.noise != noise or schedule.compensation_order != order:
            raise StudyError("CPR: schedules of one noise schedule and compensation order only")
        for name, plain in _GLOBALS.items():
            if getattr(schedule, name) != plain:
                raise StudyError(f"CPR: {name} {getattr(schedule, name)!r} is not the template's")
        try:
            base = baseline(template, noise, nfe)
        except ScheduleError as error:
            raise StudyError(f"CPR: the template does not exist at NFE {nfe}: {error}") from None
        for name, each in decisions(schedule, base, guidance).items():
            for i in range(first_step(name, order), nfe):
                rows.setdefault(name, []).append(((i + 1) / nfe, guidance, nfe, each[i]))
    limited = (degrees[0], min(degrees[1], len(scales) - 1), min(degrees[2], len(nfes) - 1))
    found = {}
    for name, listed in rows.items():
        neutral, first = neutral_value(name), first_step(name, order)
        table = np.array(listed)
        if np.abs(table[:, 3] - neutral).max() > 1e-9:
            found[name] = _regress(table, neutral, first, box, limited, penalties)
    return CPR(noise, template, *box, found, order)


def neutral_value(name: str) -> float:
    """The value at which a decision changes nothing."""
    return 1.0 if name == "compensation" else 0.0


def first_step(name: str, order: int) -> int:
    """First step at which a decision may differ from neutral."""
    if name == "compensation":
        return order
    return int(name[6:]) + 1 if name.startswith("weight") else int(name in ("query", "start"))


def _regress(
    table: Array,
    neutral: float,
    first: int,
    box: tuple[tuple[int, int], tuple[float, float]],
    degrees: tuple[int, int, int],
    penalties: Sequence[float],
) -> Regression:
    """Ridge in the tensor basis; the penalty by leaving out one NFE (else one guidance)."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    def basis(X: Array) -> Array:
        return design(X[:, 0], X[:, 1], X[:, 2], box, degrees)

    def model(penalty: float) -> Any:
        return make_pipeline(FunctionTransformer(basis), Ridge(penalty, fit_intercept=False))

    X, y = table[:, :3], table[:, 3] - neutral

    def left_out(penalty: float, column: int) -> float | None:
        groups = X[:, column]
        if len(set(groups)) < 2:
            return None
        guess = cross_val_predict(model(penalty), X, y, groups=groups, cv=LeaveOneGroupOut())
        return float(np.sqrt(np.mean((guess - y) ** 2)))

    column = 2 if len(set(X[:, 2])) > 1 else 1
    scored = [(left_out(p, column), p) for p in penalties]
    penalty = min((e, p) for e, p in ((e or 0.0, p) for e, p in scored))[1]
    ridge = model(penalty).fit(X, y)[-1]
    return Regression(
        ridge.coef_.reshape([d + 1 for d in degrees]),
        neutral,
        first,
        float(table[:, 3].min()),
        float(table[:, 3].max()),
        penalty,
        left_out(penalty, 2),
        left_out(penalty, 1),
    )


def published(
    coefficients: Sequence[float],
    *,
    noise: NoiseSchedule | None = None,
    template: str = "unipc2-bh2/time/low",
    nfe: tuple[int, int] = (5, 20),
    guidance: tuple[float, float] = (1.5, 9.0),
) -> CPR:
    """DC-Solver's 36 numbers (4, 3, 3) as a CPR.

    rho = sum_i x^i sum_j C^(2-j) sum_k N^(2-k) c_ijk with C = guidance/12, N = NFE/50; exactly
    this polynomial, in the Chebyshev basis of the box. Steps 1 and 2 are 1; nothing is clipped.

    Raises:
        StudyError: not 36 finite numbers.
    """
    c = np.asarray(coefficients, dtype=np.float64)
    if c.size != 36 or not np.isfinite(c).all():
        raise StudyError(f"published CPR coefficients: 36 finite numbers are needed, not {c.size}")
    c = c.reshape(4, 3, 3)[:, ::-1, ::-1]  # ascending powers throughout
    for axis, (low, high) in enumerate(
        ((0.0, 1.0), (guidance[0] / 12, guidance[1] / 12), (nfe[0] / 50, nfe[1] / 50))
    ):
        line = Polynomial([(low + high) / 2, (high - low) / 2])
        size = c.shape[axis]
        change = np.zeros((size, size))
        for power in range(size):
            image = chebyshev.poly2cheb((line**power).coef)
            change[: len(image), power] = image
        c = np.moveaxis(np.tensordot(change, c, axes=(1, axis)), 0, axis)
    c[0, 0, 0] -= 1.0  # relative to the neutral value
    regression = Regression(c, neutral=1.0, first=2)
    where = VPDiscrete() if noise is None else noise
    return CPR(where, template, nfe, guidance, {"compensation": regression})
