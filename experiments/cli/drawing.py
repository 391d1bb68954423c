"""Samples from a schedule, and schedules compared on the same noise, with the model of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.experiments.cli.explain import Loaded
from fewstep.experiments.cli.rescore import load_evaluator, rescore
from fewstep.predictors.yardstick import Comparison
from fewstep.samplers import AnyProblem, Problem
from fewstep.samplers.pictures import contact_sheet
from fewstep.search.config import StudyConfig
from fewstep.search.work import Block, Evaluator
from fewstep.space.errors import StudyError

COLUMNS = 8


def draw(schedule: Any, evaluator: Evaluator, count: int, name: str) -> Tensor:
    """Samples 0..count-1 of the evaluator's seed, one network batch.

    Raises:
        FewstepError: the schedule, called `name`, is not for this problem.
    """
    evaluator.problem.check(schedule, name)
    block = Block((schedule,), "sample", 0, count, "samples", strict=True)
    return torch.from_numpy(block.run(evaluator).values[0])


def sheet(path: Path, x: Tensor, problem: AnyProblem, label: str) -> Path:
    """A PNG of samples in rows of eight.

    Raises:
        StudyError: the samples are no images.
    """
    full = -(-len(x) // COLUMNS) * COLUMNS
    padded = torch.cat([x, x.min().expand(full - len(x), *x.shape[1:])]) if full > len(x) else x
    rows = [(label if k == 0 else "", padded[k : k + COLUMNS]) for k in range(0, full, COLUMNS)]
    plain = problem.picture is None and not isinstance(problem, Problem)
    if plain or contact_sheet(path, rows, problem.picture) is None:
        raise StudyError(
            f"samples of shape {tuple(x.shape[1:])} are no images: give "
            f"{type(problem).__name__} a picture"
        )
    return path


@dataclass(frozen=True)
class Compared:
    """A schedule's score and what it is compared with the first: ratios of every statistic."""

    objective: str
    name: str
    nfe: int
    score: float
    ratio: float | None
    interval: tuple[float, float] | None
    comparison: Comparison | None


def compare_scores(
    schedules: Sequence[tuple[str, Loaded]], config: StudyConfig, samples: int, cache: Path
) -> list[Compared]:
    """Score schedules with a study's model and objective on the same noise.

    Args:
        schedules: (name, schedule) pairs; the first is what the others are compared with.
        config: the study.
        samples: how many samples.
        cache: folder of computed references.
    """
    evaluator = load_evaluator(config)
    listed = [schedule for _, schedule in schedules]
    for name, schedule in schedules:
        evaluator.problem.check(schedule, name)
    scored = rescore(listed, evaluator, config, samples, cache, stream="compare")
    objective, rows = evaluator.objective.name, []
    for i, ((name, schedule), result) in enumerate(zip(schedules, scored.results, strict=True)):
        if result.measures is None:
            raise StudyError(f"{name} could not be scored: {result.status} ({result.message})")
        ratio, interval, compared = scored.ratio(i, 0)
        score = scored.value(i)
        rows.append(Compared(objective, name, schedule.nfe, score, ratio, interval, compared))
    return rows
