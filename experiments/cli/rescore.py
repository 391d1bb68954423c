"""Schedules scored side by side, in this process, on the same samples: paired comparisons.

The evaluator, the noise, the conditions and the teacher are the search's own, so on the stream
"fresh" with the search's block a score is the one that its results name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.predictors.yardstick import Array, Comparison
from fewstep.samplers.streams import cut
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.objective import Objective, Paired
from fewstep.search.pool import SerialPool
from fewstep.search.scoring import assemble
from fewstep.search.teacher import Teacher
from fewstep.search.work import Block, Evaluator, Result


@dataclass(frozen=True)
class Rescored:
    """Results of several schedules on the same samples.

    Args:
        results: in the order of the schedules.
        reference: the teacher's measures.
        objective: what was measured.
        resamples: bootstrap resamples of an interval.
        seed: of the resampling.
    """

    results: list[Result]
    reference: Array
    objective: Objective
    resamples: int
    seed: int

    @property
    def _paired(self) -> Paired:
        return Paired(self.objective, resamples=self.resamples, seed=self.seed)

    def value(self, a: int) -> float:
        """The score of a schedule as it is reported; inf if it failed."""
        measures = self.results[a].measures
        return math.inf if measures is None else self._paired.value(measures, self.reference)

    def ratio(
        self, a: int, b: int
    ) -> tuple[float | None, tuple[float, float] | None, Comparison | None]:
        """Score of a over that of b with its 95% interval, paired, and every other statistic.

        inf where `a` failed.
        """
        one, other = self.results[a].measures, self.results[b].measures
        if one is None or other is None:
            return math.inf, (math.inf, math.inf), None
        share, interval = self._paired.ratio(one, other, self.reference)
        return share, interval, self._paired.compared(one, other)


def rescore(
    schedules: Sequence[Any],
    evaluator: Evaluator,
    config: StudyConfig,
    samples: int,
    cache: Path,
    *,
    stream: str,
    held: int | None = None,
    display: Display | None = None,
) -> Rescored:
    """Score schedules of any NFE and kind with a study's model and objective.

    Args:
        schedules: what to score.
        evaluator: the study's, see `load_evaluator`.
        config: the study.
        samples: how many samples.
        cache: folder of computed references.
        stream: which noise.
        held: take the first `samples` of a reference of this many, which the cache may hold; None
            is `samples`.
        display: shows network evaluations done.

    Raises:
        FewstepError: a schedule of another noise schedule, or a model that gives nothing finite.
    """
    display = display or Display()
    problem, objective, seed = evaluator.problem, evaluator.objective, config.search.seed
    members, block = config.search.block
    pool = SerialPool(evaluator)
    held = samples if held is None else max(held, samples)
    weight = problem.per_sample
    total = weight * samples * sum(s.nfe for s in schedules)
    for schedule in schedules:
        problem.check(schedule, "a schedule")
    reference = np.zeros((samples, 0))
    if problem.has_teacher:
        teacher = Teacher(evaluator.ode, config, pool, cache, display.advance)
        display.total(held * config.teacher.nfe + total)
        display.stage(f"teacher, {config.teacher.nfe} calls")
        endpoints = teacher.reference(stream, held)[:samples]
        pool.share(stream, endpoints)
        reference = np.asarray(objective.measure(endpoints[None], endpoints)[0].cpu())
    else:
        display.total(total)
    display.stage(f"{len(schedules)} schedules")
    found: dict[int, Result] = {}
    for positions in cut(schedules, members):
        group = [schedules[i] for i in positions]
        parts = []
        for part in pool.map(Block.cover(group, stream, range(samples), block)):
            parts.append(part)
            size = part.values.shape[1]
            display.advance(weight * len(group) * size * group[0].nfe)
        found |= dict(zip(positions, assemble(parts, objective, reference), strict=True))
    results = [found[i] for i in range(len(schedules))]
    return Rescored(results, reference, objective, config.final.resamples, seed)


def load_evaluator(config: StudyConfig) -> Evaluator:
    """The study's model and objective, in this process.

    Raises:
        StudyError: a model that cannot be loaded.
    """
    return Evaluator.of(config)
