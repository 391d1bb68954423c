"""Cascade polynomial regression fitted end to end: coefficients by the error of the samples.

Schedules refined setting by setting are not smooth in NFE and guidance: many different schedules
are nearly equally good, and each setting ends at one of them. So the polynomials of
`predictors.cpr` are fitted to the samples themselves, over all settings c = (NFE, guidance) at
once, by Levenberg-Marquardt on

    L(theta) = sum_c log E_c(v_c),    v_c = neutral + M_c theta    (the decisions of setting c)

with E_c the mean squared distance to the teacher's end points. In each round every setting runs
its schedule and one with each decision moved by a little; the Gram matrix of their residuals gives

    slope_c = J_c' r_c / E_c,   H_c = J_c' J_c / E_c       (J_c by forward differences)

and theta moves by -(sum M_c' H_c M_c + damping)^-1 sum M_c' slope_c. Settings never talk to one
another but through these sums, so each is a task of its own, and the model needs no gradients.

Leaving a group of settings out takes one such step without their sums from the optimum; the error
at the settings left out, over the error with them, says what a prediction between the settings
costs, in the unit that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.predictors.cpr import CPR, Regression, assemble, design, first_step, neutral_value
from fewstep.samplers import run
from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.search.strategies.levenberg import Quadratic, damped_step, levenberg
from fewstep.space import Program
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError, StudyError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.schedule import OdeSchedule

Array = NDArray[np.float64]
DECISIONS = ("gap", "query", "start", "land", "compensation", "guidance")
_DIFFERENCE = 2e-3  # far above float32 rounding of the samples, far below where decisions bend


@dataclass(frozen=True, order=True)
class Setting:
    """One (NFE, guidance scale)."""

    nfe: int
    guidance: float


@dataclass(frozen=True)
class Request:
    """Schedules of one setting, constant image and run-time options, and the noise to run on."""

    setting: Setting
    schedules: tuple[OdeSchedule, ...]
    held: bool = False


Look = Callable[[Sequence[Request]], list[Array]]
"""For every request the Gram matrix <r_a, r_b> / count of its residuals; NaN where one failed."""


@dataclass(frozen=True)
class Joint:
    """What a joint fit gave.

    Args:
        model: the regression.
        before: held-out error by setting at the start.
        after: held-out error by setting of the model.
        left_out: held-out error by setting when its NFE ("nfe") or its guidance ("guidance") is
            left out of the fit, over `after`; settings at the edge of the box are extrapolated.
        rounds: rounds taken.
    """

    model: CPR
    before: Mapping[Setting, float]
    after: Mapping[Setting, float]
    left_out: Mapping[str, Mapping[Setting, float]] = field(default_factory=dict)
    rounds: int = 0


def gram(
    program: Program,
    denoiser: Denoiser,
    x_T: Tensor,
    target: Tensor,
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    m: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    images: int = 256,
) -> Array:
    """Gram matrix of the residuals of M stacked programs, per element, (M, M).

    Args:
        program: the programs.
        denoiser: the model.
        x_T: start states, (B, *shape).
        target: the teacher's end points.
        cond: conditioning tensors with leading axis B.
        guidance: guidance scale where the programs set none.
        m: their constant image, if they have one.
        options: their run-time options.
        images: in one network call, about.
    """
    count = len(program.r)
    total = np.zeros((count, count))
    size = max(8, images // count)
    for at in range(0, len(x_T), size):
        part = slice(at, at + size)
        some = None if cond is None else {name: v[part] for name, v in cond.items()}
        with torch.no_grad():
            x = run(
                program,
                denoiser,
                x_T[part],
                cond=some,
                guidance=guidance,
                m=m,
                options=dict(options or {}),
                check=False,
                share=True,
            )
        residual = (x - target[part].to(x)).double().flatten(1).cpu().numpy()
        total += residual @ residual.T
    return total / target.numel()


class Family:
    """The schedules of one template whose decisions are polynomials of the setting.

    Args:
        noise: the noise schedule.
        template: named solver, "solver/grid" as in `space.baselines`.
        settings: the settings to fit.
        names: decisions that are open, out of `DECISIONS`.
        degrees: largest degrees in x, guidance and NFE; lowered where there are fewer settings.
        order: points a compensation uses besides the newest.
    """

    def __init__(
        self,
        noise: NoiseSchedule,
        template: str,
        settings: Sequence[Setting],
        names: Sequence[str],
        *,
        degrees: tuple[int, int, int] = (4, 2, 2),
        order: int = 2,
    ) -> None:
        for name in names:
            if name not in DECISIONS:
                raise StudyError(f"CPR: {name!r} is not one of {', '.join(DECISIONS)}")
        self.settings = sorted(settings)
        most = max((s.nfe for s in settings), default=0)
        self.names = tuple(name for name in names if first_step(name, order) < most)
        if not self.names:
            raise StudyError("CPR: no settings, or no decisions, to fit")
        self.template, self.noise, self.order = template, noise, order
        nfes = sorted({s.nfe for s in settings})
        scales = sorted({s.guidance for s in settings})
        self.box = (nfes[0], nfes[-1]), (scales[0], scales[-1])
        self.degrees = (degrees[0], min(degrees[1], len(scales) - 1),
                        min(degrees[2], len(nfes) - 1))  # fmt: skip
        self.bases = {n: baseline(template, noise, n) for n in nfes}
        self._whiten = {name: self._whitening(name) for name in self.names}
        self.matrices = {s: self._matrix(s) for s in self.settings}
        self.size = sum(w.shape[1] for w in self._whiten.values())

    def free(self, nfe: int) -> list[tuple[str, int]]:
        """(decision, step) pairs that may differ from neutral."""
        return [(name, i) for name in self.names for i in range(first_step(name, self.order), nfe)]

    def _rows(self, name: str, s: Setting) -> Array:
        steps = np.arange(first_step(name, self.order), s.nfe) + 1
        return design(steps / s.nfe, s.guidance, s.nfe, self.box, self.degrees)

    def _whitening(self, name: str) -> Array:
        """theta -> coefficients, such that unit theta moves the decisions by one in rms."""
        rows = np.concatenate([self._rows(name, s) for s in self.settings])
        _, values, right = np.linalg.svd(rows, full_matrices=False)
        keep = values > 1e-6 * values.max()
        made: Array = right[keep].T / values[keep] * math.sqrt(len(rows))
        return made

    def _matrix(self, s: Setting) -> Array:
        parts = [self._rows(name, s) @ self._whiten[name] for name in self.names]
        out = np.zeros((sum(len(p) for p in parts), sum(p.shape[1] for p in parts)))
        r = c = 0
        for p in parts:
            out[r : r + len(p), c : c + p.shape[1]] = p
            r, c = r + len(p), c + p.shape[1]
        return out

    def schedule(self, s: Setting, theta: Array, moved: Array | None = None) -> OdeSchedule:
        """The schedule of a setting; `moved` is added to its free decisions."""
        flat = self.matrices[s] @ theta
        if moved is not None:
            flat = flat + moved
        values = {name: [neutral_value(name)] * s.nfe for name in self.names}
        for (name, i), v in zip(self.free(s.nfe), flat.tolist(), strict=True):
            values[name][i] += v
        return assemble(self.bases[s.nfe], values, s.guidance, self.order)

    def model(self, theta: Array) -> CPR:
        """The regression; predictions are clipped to the range seen at the fitted settings."""
        found, at = {}, 0
        for name in self.names:
            w = self._whiten[name]
            c = w @ theta[at : at + w.shape[1]]
            at += w.shape[1]
            neutral = neutral_value(name)
            spread = neutral + np.concatenate([self._rows(name, s) @ c for s in self.settings])
            found[name] = Regression(
                c.reshape([d + 1 for d in self.degrees]),
                neutral,
                first_step(name, self.order),
                float(spread.min()),
                float(spread.max()),
            )
        return CPR(self.noise, self.template, *self.box, found, self.order)

    def theta(self, model: CPR) -> Array:
        """The parameters nearest to another regression of this family at the fitted settings."""
        parts = []
        for name in self.names:
            rows = np.concatenate([self._rows(name, s) for s in self.settings])
            wanted = [
                (model.values(s.nfe, s.guidance).get(name) or [neutral_value(name)] * s.nfe)[
                    first_step(name, self.order) :
                ]
                for s in self.settings
            ]
            y = np.concatenate(wanted) - neutral_value(name)
            parts.append(np.linalg.lstsq(rows @ self._whiten[name], y, rcond=None)[0])
        found: Array = np.concatenate(parts)
        return found


def fit_joint(
    family: Family,
    look: Look,
    *,
    start: CPR | None = None,
    rounds: int = 6,
    decay: float = 1e-4,
    on_round: Callable[[int, float], None] | None = None,
) -> Joint:
    """Fit a family to the samples of all its settings.

    Args:
        family: what to fit.
        look: runs schedules (see `Look`), on noise to fit and on held-out noise.
        start: a regression to start from; None is the template itself.
        rounds: most rounds.
        decay: pull towards the template, relative to the mean curvature.
        on_round: called after each round with its number and the mean log held-out error.

    Raises:
        StudyError: the template cannot be scored at some setting.
    """
    theta = np.zeros(family.size) if start is None else family.theta(start)
    before = _errors(family, look, [theta], held=True)[:, 0]
    if not np.isfinite(before).all():
        bad = family.settings[int(np.argmin(np.isfinite(before)))]
        raise StudyError(
            f"CPR: {family.template} cannot be scored at NFE {bad.nfe}, guidance "
            f"{bad.guidance:g}: name another cpr.template"
        )
    best, best_errors, taken = theta, before, 0

    def linearise(at: Tensor) -> Quadratic:
        return _total(_linearise(family, look, at.numpy()).values())

    def losses(thetas: Sequence[Tensor]) -> list[float]:
        return _geometric(_errors(family, look, [t.numpy() for t in thetas]))

    def check(turn: int, at: Tensor) -> bool:
        nonlocal best, best_errors, taken
        taken = turn
        errors = _errors(family, look, [at.numpy()], held=True)[:, 0]
        if on_round is not None:
            on_round(turn, float(np.log(errors).mean()))
        if np.log(errors).mean() < np.log(best_errors).mean():
            best, best_errors = at.numpy(), errors
        return False

    levenberg(
        torch.from_numpy(theta),
        linearise,
        losses,
        rounds=rounds,
        pull=decay,
        damping=1e-3,
        on_round=check,
    )
    by = dict(zip(family.settings, best_errors.tolist(), strict=True))
    return Joint(
        family.model(best),
        dict(zip(family.settings, before.tolist(), strict=True)),
        by,
        _left_out(family, look, best, by, decay),
        taken,
    )


@dataclass(frozen=True)
class _Sums:
    """log E, slope and curvature of one setting in theta."""

    log_error: float
    slope: Array
    normal: Array


def _linearise(family: Family, look: Look, theta: Array) -> dict[Setting, _Sums]:
    requests = []
    for s in family.settings:
        moves = [None, *(_DIFFERENCE * np.eye(len(family.free(s.nfe))))]
        requests.append(Request(s, tuple(family.schedule(s, theta, m) for m in moves)))
    found = {}
    for request, gram in zip(requests, look(requests), strict=True):
        M, error = family.matrices[request.setting], float(gram[0, 0])
        cross = (gram[1:, 0] - gram[0, 0]) / _DIFFERENCE
        square = (gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]) / _DIFFERENCE**2
        dead = ~np.isfinite(np.diagonal(square))  # a decision that breaks the schedule stays put
        cross[dead], square[dead], square[:, dead] = 0.0, 0.0, 0.0
        found[request.setting] = _Sums(
            math.log(max(error, 1e-300)), M.T @ cross / error, M.T @ square @ M / error
        )
    return found


def _total(sums: Iterable[_Sums]) -> Quadratic:
    """The settings together: their mean log error, written as a geometric mean."""
    listed = list(sums)
    normal = torch.from_numpy(np.sum([s.normal for s in listed], axis=0))
    slope = torch.from_numpy(np.sum([s.slope for s in listed], axis=0))
    return Quadratic(normal, slope, float(np.exp(np.mean([s.log_error for s in listed]))))


def _geometric(errors: Array) -> list[float]:
    """Geometric mean over settings (rows) at every theta (columns); inf where one fails."""
    with np.errstate(over="ignore"):
        found: list[float] = np.exp(np.log(errors).mean(0)).tolist()
    return found


def _errors(family: Family, look: Look, thetas: Sequence[Array], held: bool = False) -> Array:
    """Error of every setting (rows) at every theta (columns); inf where a schedule fails."""
    out = np.full((len(family.settings), len(thetas)), np.inf)
    requests, places = [], []
    for k, s in enumerate(family.settings):
        made, at = [], []
        for j, theta in enumerate(thetas):
            try:
                schedule = family.schedule(s, theta)
                _ = schedule.program
            except FewstepError:
                continue
            made.append(schedule)
            at.append(j)
        if made:
            requests.append(Request(s, tuple(made), held))
            places.append((k, at))
    for (k, at), gram in zip(places, look(requests), strict=True):
        values = np.diagonal(gram)
        out[k, at] = np.where(np.isfinite(values), values, np.inf)
    return out


def _left_out(
    family: Family, look: Look, theta: Array, after: Mapping[Setting, float], decay: float
) -> dict[str, dict[Setting, float]]:
    """Errors of settings without which one more step was taken, over their errors with them."""
    found: dict[str, dict[Setting, float]] = {}
    sums = _linearise(family, look, theta)
    for axis in ("nfe", "guidance"):
        groups = sorted({getattr(s, axis) for s in family.settings})
        if len(groups) < 2:
            continue
        thetas, at = [], torch.from_numpy(theta)
        for value in groups:
            kept = _total(x for s, x in sums.items() if getattr(s, axis) != value)
            thetas.append((at + damped_step(kept, 1e-3, at, decay)).numpy())
        errors = _errors(family, look, thetas, held=True)
        found[axis] = {
            s: float(errors[k, groups.index(getattr(s, axis))] / after[s])
            for k, s in enumerate(family.settings)
        }
    return found
