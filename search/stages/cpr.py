"""The last stage of a search over several settings: schedules for those between, in OUT/cpr.json.

The template's continuous decisions are fitted end to end over all settings together
(`predictors.cpr_joint`), on noise of its own: the template is the one the study names, or the base
it compensates, or the named solver that is best over all settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.predictors.cpr import CPR
from fewstep.predictors.cpr_family import Setting
from fewstep.predictors.cpr_joint import Request, gram, regression, regression_cost
from fewstep.predictors.yardstick import Array
from fewstep.samplers import Problem
from fewstep.samplers.denoiser import Counted
from fewstep.samplers.ode import on_unit_noise
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.pool import Pool, gathered
from fewstep.search.results import schedule_path
from fewstep.search.stages.tasks import batch_of
from fewstep.search.verdict import Row
from fewstep.search.work import Block, Evaluator, Work
from fewstep.space import OdeSchedule
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError
from fewstep.space.files import load_schedule

TRAIN, HELD = "cpr", "cpr-held"


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
    table = config.cpr
    noise = (table.samples + table.held) * config.teacher.nfe
    return scales * (regression_cost(table, config.search.nfe) + noise)


class Stage:
    """Fits a study's regression."""

    def __init__(
        self, config: StudyConfig, problem: Problem, pool: Pool, display: Display
    ) -> None:
        self.config, self.problem, self.pool, self.display = config, problem, pool, display
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
        told, schedules = model.provenance, [found[s].digest for s in settings]
        return replace(
            model,
            provenance={
                "study": self.config.name,
                "model": self.problem.fingerprint,
                "start": told["start"],
                "schedules": schedules,
                "calls": self.calls,
                "settings": told["settings"],
            },
        )

    def _scale(self, guidance: float) -> float | None:
        return guidance if self.config.search.guidance is not None else None

    def _refer(self, stream: str, size: int, guidance: float) -> None:
        """The teacher's end points of a stream at a scale, given to every worker."""
        table, noise = self.config.teacher, self.problem.denoiser.noise
        teacher = baseline(table.solver, noise, table.nfe)
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
