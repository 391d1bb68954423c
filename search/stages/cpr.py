"""The last stage of a search over several settings: schedules for those between.

After compensation, and where the study asks for it: a regression in OUT/cpr.json. The template's
continuous decisions are fitted end to end over all settings together (`predictors.cpr_joint`), on
noise of its own: the template is the one the study names, or the base it compensates, or the named
solver that is best over all settings.

After refinement at several guidance scales: fitted programs in OUT/cpr, between which scales are
interpolated (`predictors.between`); here is measured what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.predictors.cpr import CPR
from fewstep.predictors.cpr_family import Setting
from fewstep.predictors.cpr_joint import Request, gram, regression, regression_cost
from fewstep.predictors.yardstick import Array
from fewstep.samplers import Problem
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.pool import Pool
from fewstep.search.results import schedule_path
from fewstep.search.verdict import Row
from fewstep.search.work import Block
from fewstep.space import OdeSchedule, ProgramSchedule
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError
from fewstep.space.files import load_schedule

TRAIN, HELD = "cpr", "cpr-held"


def wanted(config: StudyConfig) -> bool:
    """Whether a study ends in a regression."""
    settings = len(config.search.nfe) * len(config.search.guidance or (1,))
    plain = config.finish == "compensation" and config.objective.name in (None, "endpoint_mse")
    wished = config.cpr.fit is None and plain and settings > 1
    return not config.search.cost and (config.cpr.fit or wished)


def cpr_cost(config: StudyConfig, scales: int) -> int:
    """Network evaluations of the stage, at most."""
    table = config.cpr
    noise = (table.samples + table.held) * config.teacher.nfe
    return scales * (regression_cost(table, config.search.nfe) + noise)


class Stage:
    """Fits a study's regression, and looks at programs between scales."""

    def __init__(
        self, config: StudyConfig, problem: Problem, pool: Pool, display: Display
    ) -> None:
        self.config, self.problem, self.pool, self.display = config, problem, pool, display
        self.calls, self._known = 0, dict[tuple[float, bool], Array]()

    def run(self, found: Mapping[Setting, OdeSchedule]) -> CPR:
        """Fit to the settings of the schedules found.

        Raises:
            StudyError: no template for these settings.
        """
        settings, table = sorted(found), self.config.cpr
        base = self.config.compensation.base  # its schedules are a family already
        one = self.config.finish == "compensation" and len(base) == 1
        model = regression(
            found,
            self.look,
            table,
            noise=self.problem.denoiser.noise,
            template=table.template or (base[0] if one else None),
            order=self.config.compensation.order,
            say=lambda text: self.display.stage(f"CPR: {text}"),
        )
        origin: dict[str, Any] = {"study": self.config.name, "model": self.problem.fingerprint}
        origin |= {"calls": self.calls, "schedules": [found[s].digest for s in settings]}
        return replace(model, provenance={**origin, **model.provenance})

    def look(self, requests: Sequence[Request]) -> list[Array]:
        """See `predictors.cpr_joint.Look`."""
        asked = [(r.setting.guidance, r.held, r.schedules) for r in requests]
        ends = [self._ends(guidance, held) for guidance, held, _ in asked]
        found = zip(self._samples(asked), ends, strict=True)
        return [gram(samples - end) for samples, end in found]

    def sampled(
        self, setting: Setting, schedules: Sequence[ProgramSchedule]
    ) -> tuple[Array, Array]:
        """See `predictors.between.Sampled`."""
        self.display.stage(f"NFE {setting.nfe}, guidance {setting.guidance:g}: left out")
        ends = self._ends(setting.guidance, True)
        return np.concatenate(
            self._samples([(setting.guidance, True, [s]) for s in schedules])
        ), ends

    def _ends(self, guidance: float, held: bool) -> Array:
        """The teacher's end points at a scale."""
        if (guidance, held) not in self._known:
            table = self.config.teacher
            teacher = baseline(table.solver, self.problem.denoiser.noise, table.nfe)
            (found,) = self._samples([(guidance, held, [teacher])], strict=True)
            self._known[guidance, held] = found[0]
        return self._known[guidance, held]

    def _samples(
        self, asked: Sequence[tuple[float, bool, Sequence[Any]]], strict: bool = False
    ) -> list[Array]:
        """Samples (M, B, *shape) of M schedules each, at a scale; NaN where one failed."""
        table, many = self.config.cpr, self.config.search.block[1]
        more: dict[str, Any] = {"want": "samples", "strict": strict}
        groups, found = dict[int, list[Block]](), dict[int, Array]()
        for k, (guidance, held, schedules) in enumerate(asked):
            stream, size = (HELD, table.held) if held else (TRAIN, table.samples)
            scale = guidance if self.config.search.guidance is not None else None
            groups[k] = Block.cover(schedules, stream, range(size), many, guidance=scale, **more)
        for k, results in self.pool.map_groups(groups):
            self.calls += (evaluations := sum(r.evaluations for r in results))
            self.display.advance(evaluations)
            found[k] = np.concatenate([r.values for r in results], axis=1)
        return [found[k] for k in groups]


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
