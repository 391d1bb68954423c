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

The schedules that a search finds differ from setting to setting in their discrete choices, and
polynomials need one family. So `regression` takes a template, by default the named solver with the
lowest mean log error over all settings, and opens its continuous decisions. Where all schedules
found belong to the template's family, their ridge regression is the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.predictors.cpr import CPR, fit
from fewstep.predictors.cpr_family import PolynomialFamily, Setting
from fewstep.predictors.levenberg import Quadratic, damped_step, levenberg
from fewstep.predictors.settings import CprTable
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError, ScheduleError, StudyError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.schedule import OdeSchedule
from fewstep.space.unknowns import DIFFERENCE

Array = NDArray[np.float64]


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


def fit_joint(
    family: PolynomialFamily,
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
    fit = _JointFit(family, look)
    theta = np.zeros(family.size) if start is None else family.theta(start)
    before = fit.errors([theta], held=True)[:, 0]
    if not np.isfinite(before).all():
        bad = family.settings[int(np.argmin(np.isfinite(before)))]
        raise StudyError(
            f"CPR: {family.template} cannot be scored at NFE {bad.nfe}, guidance "
            f"{bad.guidance:g}: name another cpr.template"
        )
    best, best_errors, taken = theta, before, 0

    def check(turn: int, at: Tensor) -> bool:
        nonlocal best, best_errors, taken
        taken = turn
        errors = fit.errors([at.numpy()], held=True)[:, 0]
        if on_round is not None:
            on_round(turn, float(np.log(errors).mean()))
        if np.log(errors).mean() < np.log(best_errors).mean():
            best, best_errors = at.numpy(), errors
        return False

    more: dict[str, Any] = {"rounds": rounds, "pull": decay, "damping": 1e-3, "on_round": check}
    levenberg(torch.from_numpy(theta), fit.linearise, fit.losses, **more)
    after, start_errors = (
        dict(zip(family.settings, e.tolist(), strict=True)) for e in (best_errors, before)
    )
    left_out = fit.left_out(best, after, decay)
    return Joint(family.model(best), start_errors, after, left_out, taken)


class _JointFit:
    """The settings of a family together: what `levenberg` asks for."""

    def __init__(self, family: PolynomialFamily, look: Look) -> None:
        self.family, self.look = family, look

    def linearise(self, theta: Tensor) -> Quadratic:
        """All settings; the value is the geometric mean of their errors."""
        return _total(self.each(theta.numpy()).values())

    def losses(self, thetas: Sequence[Tensor]) -> list[float]:
        """Geometric mean over the settings at every theta; inf where one fails."""
        errors = self.errors([t.numpy() for t in thetas])
        with np.errstate(over="ignore"):
            found: list[float] = np.exp(np.log(errors).mean(0)).tolist()
        return found

    def each(self, theta: Array) -> dict[Setting, Quadratic]:
        """Error of every setting, slope and curvature of its logarithm."""
        family, requests = self.family, []
        for s in family.settings:
            moves = [None, *(DIFFERENCE * np.eye(len(family.free(s.nfe))))]
            requests.append(Request(s, tuple(family.schedule(s, theta, m) for m in moves)))
        found = {}
        for request, gram in zip(requests, self.look(requests), strict=True):
            M, error = family.matrices[request.setting], float(gram[0, 0])
            cross = (gram[1:, 0] - gram[0, 0]) / DIFFERENCE
            square = (gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]) / DIFFERENCE**2
            dead = ~np.isfinite(np.diagonal(square))  # what breaks the schedule stays put
            cross[dead], square[dead], square[:, dead] = 0.0, 0.0, 0.0
            normal = torch.from_numpy(M.T @ square @ M / error)
            slope = torch.from_numpy(M.T @ cross / error)
            found[request.setting] = Quadratic(normal, slope, max(error, 1e-300))
        return found

    def errors(self, thetas: Sequence[Array], held: bool = False) -> Array:
        """Error of every setting (rows) at every theta (columns); inf where a schedule fails."""
        family = self.family
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
        for (k, at), gram in zip(places, self.look(requests), strict=True):
            values = np.diagonal(gram)
            out[k, at] = np.where(np.isfinite(values), values, np.inf)
        return out

    def left_out(
        self, theta: Array, after: Mapping[Setting, float], decay: float
    ) -> dict[str, dict[Setting, float]]:
        """Errors of settings without which one more step was taken, over their errors with."""
        settings, found = self.family.settings, dict[str, dict[Setting, float]]()
        each, at = self.each(theta), torch.from_numpy(theta)
        for axis in ("nfe", "guidance"):
            groups = sorted({getattr(s, axis) for s in settings})
            if len(groups) < 2:
                continue
            thetas = []
            for value in groups:
                kept = _total(x for s, x in each.items() if getattr(s, axis) != value)
                thetas.append((at + damped_step(kept, 1e-3, at, decay)).numpy())
            errors = self.errors(thetas, held=True)
            found[axis] = {
                s: float(errors[k, groups.index(getattr(s, axis))] / after[s])
                for k, s in enumerate(settings)
            }
        return found


def _total(each: Iterable[Quadratic]) -> Quadratic:
    """The settings together."""
    listed = list(each)
    normal = torch.stack([q.normal for q in listed]).sum(0)
    slope = torch.stack([q.slope for q in listed]).sum(0)
    return Quadratic(normal, slope, float(np.exp(np.mean([math.log(q.loss) for q in listed]))))


def gram(residuals: Array) -> Array:
    """Gram matrix of the residuals (M, B, *shape) of M schedules, per element, (M, M)."""
    flat = residuals.astype(np.float64).reshape(len(residuals), -1)
    found: Array = flat @ flat.T / flat.shape[1]
    return found


def regression(
    found: Mapping[Setting, OdeSchedule],
    look: Look,
    table: CprTable,
    *,
    noise: NoiseSchedule,
    template: str | None,
    order: int,
    say: Callable[[str], None] = lambda text: None,
) -> CPR:
    """The regression over the settings of schedules found.

    Its provenance says, for every setting, the held-out error of the start, of the regression and
    of the schedule found there, and what the regression loses when the setting is left out.

    Args:
        found: a schedule of every setting.
        look: runs schedules.
        table: the study's [cpr].
        noise: the noise schedule.
        template: the solver whose decisions become polynomials; None is the best of all settings.
        order: older points that compensation interpolates with.
        say: called with what is being done.

    Raises:
        StudyError: no template for these settings.
    """
    template = template or _best_template(found, look, noise)
    family = PolynomialFamily(noise, template, sorted(found), table.decisions, order=order)
    start = _of_one_family(found, template)
    say(f"fitting {template}")

    def said(turn: int, error: float) -> None:
        say(f"round {turn}, mean log error {error:.3f}")

    made = fit_joint(family, look, start=start, rounds=table.rounds, on_round=said)
    rows = _rows(made, found, look)
    begun = "the template" if start is None else "ridge regression of the schedules found"
    return replace(made.model, provenance={"start": begun, "settings": rows})


def regression_cost(table: CprTable, nfes: Sequence[int]) -> int:
    """Network evaluations of a regression at one guidance scale, at most."""
    decisions = len(table.decisions)
    return sum(
        n * (table.rounds * (n * decisions + 4) * table.samples + 8 * table.held) for n in nfes
    )


def _best_template(found: Mapping[Setting, OdeSchedule], look: Look, noise: NoiseSchedule) -> str:
    """The named solver with the lowest mean log error, out of the best few of any setting."""
    nfes = [s.nfe for s in found]
    names: list[str] = []
    for schedule in found.values():
        scores = schedule.provenance.get("baselines") or {}
        usable = [n for n in sorted(scores, key=scores.__getitem__) if _exists(n, noise, nfes)]
        names += [n for n in usable[:2] if n not in names]
    if not names:
        raise StudyError(
            "cpr: none of the best named solvers exists at every NFE: name a cpr.template"
        )
    requests = [Request(s, tuple(baseline(n, noise, s.nfe) for n in names)) for s in sorted(found)]
    errors = np.array([np.diagonal(g) for g in look(requests)])
    mean = np.log(np.where(errors > 0, errors, np.inf)).mean(0)
    return names[int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))]


def _exists(name: str, noise: NoiseSchedule, nfes: Sequence[int]) -> bool:
    """Whether a named solver has as many steps as calls, at every NFE between."""
    try:
        made = [baseline(name, noise, n) for n in range(min(nfes), max(nfes) + 1)]
        return all(s.n_steps == s.nfe and not s.program.stochastic for s in made)
    except ScheduleError:
        return False


def _of_one_family(found: Mapping[Setting, OdeSchedule], template: str) -> CPR | None:
    """The regression of the schedules found, if they are all of the template's family."""
    if not all(isinstance(schedule, OdeSchedule) for schedule in found.values()):
        return None
    try:
        return fit([(s.nfe, s.guidance, schedule) for s, schedule in found.items()], template)
    except StudyError:
        return None


def _rows(made: Joint, found: Mapping[Setting, OdeSchedule], look: Look) -> list[dict[str, Any]]:
    """What the regression says of every setting."""
    plain = [
        Request(s, (schedule,), held=True)
        for s, schedule in sorted(found.items())
        if "time_shift" not in schedule.options and not schedule.program.stochastic
    ]
    errors = {r.setting: float(g[0, 0]) for r, g in zip(plain, look(plain), strict=True)}
    left = made.left_out
    return [
        {
            "nfe": s.nfe,
            "guidance": s.guidance,
            "start": made.before[s],
            "found": errors.get(s),
            "fitted": made.after[s],
            "without_its_nfe": left.get("nfe", {}).get(s),
            "without_its_guidance": left.get("guidance", {}).get(s),
        }
        for s in sorted(found)
    ]
