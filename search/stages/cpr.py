"""The last stage of a search over several settings: schedules for those between, in OUT/cpr.json.

The schedules found differ from setting to setting in their discrete choices, and polynomials need
one family. So the stage takes a template (the one the study names, or the base it compensates, or
the named solver with the lowest mean log error over all settings), opens its continuous decisions
and fits them end to end over all settings together (`predictors.cpr_joint`), on noise of its own.
Where all schedules found belong to the template's family, their ridge regression is the start. The
file says, for every setting, the held-out error of the start, of the regression and of the
schedule found there, and what the regression loses when the setting is left out of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.predictors.cpr import CPR, fit
from fewstep.predictors.cpr_family import PolynomialFamily, Setting
from fewstep.predictors.cpr_joint import Joint, Request, fit_joint
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.yardstick import Array
from fewstep.samplers import Denoiser, Problem
from fewstep.samplers.denoiser import Counted
from fewstep.samplers.ode import on_unit_noise
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.pool import Pool, gathered
from fewstep.search.results import schedule_path
from fewstep.search.stages.refine import batch_of
from fewstep.search.verdict import Row
from fewstep.search.work import Block, Evaluator, Work
from fewstep.space import OdeSchedule, Program
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError, ScheduleError, StudyError
from fewstep.space.files import load_schedule
from fewstep.space.noise import NoiseSchedule

TRAIN, HELD = "cpr", "cpr-held"
_IMAGES = 256  # in one network call, about
_RIDGE = "ridge regression of the schedules found"


def gram(batch: Batch, programs: Sequence[Program], denoiser: Denoiser) -> Array:
    """Gram matrix of the residuals of M programs, per element, (M, M)."""
    count = len(programs)
    total = np.zeros((count, count))
    for part in replace(batch, piece=max(8, _IMAGES // count)).pieces():
        residual = part.residuals(programs, denoiser).double().flatten(1).cpu().numpy()
        total += residual @ residual.T
    return total / batch.target.numel()


@dataclass(frozen=True)
class GramTask(Work):
    """Schedules of one setting, constant image and run-time options on the noise of a stream.

    The stream and the guidance scale (None: the problem's) name the end points: `key`.
    """

    schedules: tuple[OdeSchedule, ...]
    stream: str
    samples: int
    guidance: float | None

    def failed(self, status: str, message: str) -> tuple[Array, int]:
        """See `Work`: schedules whose errors are not known."""
        count = len(self.schedules)
        return np.full((count, count), np.nan), 0

    def run(self, evaluator: Evaluator) -> tuple[Array, int]:
        """The Gram matrix of the residuals, (M, M), and network evaluations."""
        like, name = self.schedules[0], key(self.stream, self.guidance)
        given: dict[str, Any] = {"constant": like.constant, "options": like.options}
        if self.guidance is not None:
            given["guidance"] = self.guidance
        batch = batch_of(evaluator, self.stream, self.samples, reference=name, **given)
        denoiser = Counted(evaluator.ode.denoiser)
        found = gram(batch, [on_unit_noise(s) for s in self.schedules], denoiser)
        return found, denoiser.evaluations


def key(stream: str, guidance: float | None) -> str:
    """Name under which workers hold the teacher's end points of a stream at a scale."""
    return stream if guidance is None else f"{stream}/w{guidance:g}"


def wanted(config: StudyConfig) -> bool:
    """Whether a study ends in a regression."""
    if config.search.cost:
        return False
    settings = len(config.search.nfe) * len(config.search.guidance or (1,))
    if config.cpr.fit is None:
        return settings > 1 and config.objective.name in (None, "endpoint_mse")
    return config.cpr.fit


def cpr_cost(config: StudyConfig, scales: int) -> int:
    """Network evaluations of the stage, at most."""
    table, decisions = config.cpr, len(config.cpr.decisions)
    each = sum(
        n * (table.rounds * (n * decisions + 4) * table.samples + 8 * table.held)
        for n in config.search.nfe
    )
    return scales * (each + (table.samples + table.held) * config.teacher.nfe)


class Stage:
    """Fits a study's regression."""

    def __init__(
        self, config: StudyConfig, problem: Problem, pool: Pool, display: Display
    ) -> None:
        self.config, self.problem, self.pool, self.display = config, problem, pool, display
        self.noise: NoiseSchedule = problem.denoiser.noise
        self.calls = 0

    def run(self, found: Mapping[Setting, OdeSchedule]) -> CPR:
        """Fit to the settings of the schedules found.

        Raises:
            StudyError: no template for these settings.
        """
        settings, table = sorted(found), self.config.cpr
        self.display.stage("CPR: teacher")
        for guidance in sorted({s.guidance for s in settings}):
            for stream, size in ((TRAIN, table.samples), (HELD, table.held)):
                self._refer(stream, size, guidance)
        template = table.template or self._base() or self._template(found)
        order = self.config.compensation.order
        family = PolynomialFamily(self.noise, template, settings, table.decisions, order=order)
        start = self._start(found, template)
        self.display.stage(f"CPR: fitting {template}")

        def said(turn: int, error: float) -> None:
            self.display.stage(f"CPR: round {turn}, mean log error {error:.3f}")

        made = fit_joint(family, self.look, start=start, rounds=table.rounds, on_round=said)
        return replace(made.model, provenance=self._provenance(made, found, start))

    def _scale(self, guidance: float) -> float | None:
        return guidance if self.config.search.guidance is not None else None

    def _refer(self, stream: str, size: int, guidance: float) -> None:
        """The teacher's end points of a stream at a scale, given to every worker."""
        teacher = baseline(self.config.teacher.solver, self.noise, self.config.teacher.nfe)
        scale, many = self._scale(guidance), self.config.search.block[1]
        more: dict[str, Any] = {"want": "samples", "strict": True, "guidance": scale}
        blocks = Block.cover([teacher], stream, range(size), many, **more)
        ends = torch.from_numpy(gathered(self.pool, blocks, self._count))
        self.pool.share(key(stream, scale), ends)

    def _count(self, evaluations: int) -> None:
        self.calls += evaluations
        self.display.advance(evaluations)

    def look(self, requests: Sequence[Request]) -> list[Array]:
        """See `predictors.cpr_joint.Look`."""
        table = self.config.cpr
        noise = {True: (HELD, table.held), False: (TRAIN, table.samples)}
        tasks = [
            GramTask(r.schedules, *noise[r.held], self._scale(r.setting.guidance))
            for r in requests
        ]
        found = []
        for errors, evaluations in self.pool.map(tasks):
            self._count(evaluations)
            found.append(errors)
        return found

    def _base(self) -> str | None:
        """The one base that a study compensates: its schedules are a family already."""
        base = self.config.compensation.base
        return base[0] if self.config.finish == "compensation" and len(base) == 1 else None

    def _template(self, found: Mapping[Setting, OdeSchedule]) -> str:
        """The named solver with the lowest mean log error, out of the best few of any setting."""
        nfes = [s.nfe for s in found]
        names: list[str] = []
        for schedule in found.values():
            scores = schedule.provenance.get("baselines") or {}
            usable = [n for n in sorted(scores, key=scores.__getitem__) if self._exists(n, nfes)]
            names += [n for n in usable[:2] if n not in names]
        if not names:
            raise StudyError(
                "cpr: none of the best named solvers exists at every NFE: name a cpr.template"
            )
        requests = [
            Request(s, tuple(baseline(n, self.noise, s.nfe) for n in names)) for s in sorted(found)
        ]
        errors = np.array([np.diagonal(g) for g in self.look(requests)])
        mean = np.log(np.where(errors > 0, errors, np.inf)).mean(0)
        return names[int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))]

    def _exists(self, name: str, nfes: Sequence[int]) -> bool:
        """Whether a named solver has as many steps as calls, at every NFE between."""
        try:
            made = [baseline(name, self.noise, n) for n in range(min(nfes), max(nfes) + 1)]
            return all(s.n_steps == s.nfe and not s.program.stochastic for s in made)
        except ScheduleError:
            return False

    def _start(self, found: Mapping[Setting, OdeSchedule], template: str) -> CPR | None:
        """The regression of the schedules found, if they are all of the template's family."""
        if not all(isinstance(schedule, OdeSchedule) for schedule in found.values()):
            return None
        try:
            return fit([(s.nfe, s.guidance, schedule) for s, schedule in found.items()], template)
        except StudyError:
            return None

    def _provenance(
        self, made: Joint, found: Mapping[Setting, OdeSchedule], start: CPR | None
    ) -> dict[str, Any]:
        """What the file says about itself."""
        plain = [
            Request(s, (schedule,), held=True)
            for s, schedule in sorted(found.items())
            if "time_shift" not in schedule.options and not schedule.program.stochastic
        ]
        errors = {r.setting: float(g[0, 0]) for r, g in zip(plain, self.look(plain), strict=True)}
        left = made.left_out
        rows = [
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
        return {
            "study": self.config.name,
            "model": self.problem.fingerprint,
            "start": "the template" if start is None else _RIDGE,
            "schedules": [found[s].digest for s in sorted(found)],
            "calls": self.calls,
            "settings": rows,
        }


def regress(
    config: StudyConfig,
    out: Path,
    rows: Sequence[Row],
    problem: Problem,
    pool: Pool,
    display: Display,
) -> Path | None:
    """OUT/cpr.json from the schedules in OUT; what cannot be fitted is said, and no failure."""
    found = {}
    for row in rows:
        scale = row.guidance if row.guidance is not None else problem.guidance
        schedule = load_schedule(schedule_path(out, row))
        found[Setting(row.nfe, 1.0 if scale is None else scale)] = schedule
    path = out / "cpr.json"
    try:
        kept = CPR.load(path).provenance.get("schedules") if path.exists() else None
        if kept != [found[s].digest for s in sorted(found)]:
            Stage(config, problem, pool, display).run(found).save(path)
        return path
    except FewstepError as error:
        display.note(f"no cpr.json: {error}")
        return None
