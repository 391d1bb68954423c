"""Samples from a schedule, and schedules compared on the same noise, with the model of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.experiments.explain import Loaded
from fewstep.samplers import AnyProblem, Problem
from fewstep.search import report
from fewstep.search.config import StudyConfig
from fewstep.search.evaluate import Evaluator
from fewstep.search.family import family_of
from fewstep.search.objective import ratio_interval
from fewstep.search.pool import SerialPool
from fewstep.search.run import evaluator_spec
from fewstep.search.teacher import Teacher
from fewstep.space.errors import StudyError

COLUMNS = 8


def draw(schedule: Any, evaluator: Evaluator, count: int, name: str) -> Tensor:
    """Samples 0..count-1 of the evaluator's seed, one network batch.

    Raises:
        FewstepError: the schedule, called `name`, is not for this problem.
    """
    family = family_of(evaluator.problem)
    family.check(schedule, name)
    (task,) = family.chunks([schedule], 1)[0].tasks("sample", count, count, "samples")
    return torch.from_numpy(evaluator.run(replace(task, strict=True)).values[0])


def sheet(path: Path, x: Tensor, problem: AnyProblem, label: str) -> Path:
    """A PNG of samples in rows of eight.

    Raises:
        StudyError: the samples are no images.
    """
    full = -(-len(x) // COLUMNS) * COLUMNS
    padded = torch.cat([x, x.min().expand(full - len(x), *x.shape[1:])]) if full > len(x) else x
    rows = [(label if k == 0 else "", padded[k : k + COLUMNS]) for k in range(0, full, COLUMNS)]
    plain = problem.picture is None and not isinstance(problem, Problem)
    if plain or report.contact_sheet(path, rows, problem.picture) is None:
        raise StudyError(
            f"samples of shape {tuple(x.shape[1:])} are no images: give "
            f"{type(problem).__name__} a picture"
        )
    return path


@dataclass(frozen=True)
class Compared:
    """A schedule's score, and its ratio to the first one's with a 95% interval."""

    objective: str
    name: str
    nfe: int
    score: float
    median: float | None
    ratio: float
    interval: tuple[float, float]


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
    from fewstep.search.evaluate import assemble

    spec = evaluator_spec(config)
    evaluator = Evaluator.from_spec(spec)
    family, objective = family_of(evaluator.problem), evaluator.objective
    for name, schedule in schedules:
        family.check(schedule, name)
    pool = SerialPool(spec, evaluator)
    block = config.search.block[1]
    seed = config.search.seed
    reference = np.zeros((samples, 0))
    if family.taught:
        teacher = Teacher(evaluator.ode, config.teacher, pool, cache, seed=seed, block=block)
        endpoints = teacher.reference("compare", samples).samples
        pool.share("compare", endpoints)
        reference = np.asarray(objective.measure(endpoints[None], endpoints)[0])
    found = []
    for name, schedule in schedules:
        (chunk,) = family.chunks([schedule], 1)
        parts = [evaluator.run(task) for task in chunk.tasks("compare", samples, block)]
        (result,) = assemble(parts, objective, reference)
        if result.measures is None:
            raise StudyError(f"{name} could not be scored: {result.status} ({result.message})")
        found.append((name, schedule.nfe, result))
    base = found[0][2]
    rows = []
    for name, nfe, result in found:
        assert result.measures is not None
        assert base.measures is not None
        score = None
        if not objective.per_sample:
            score = lambda m, p: objective.score(m[p], reference[p])  # noqa: E731
        interval = ratio_interval(
            result.measures,
            base.measures,
            resamples=config.final.resamples,
            seed=seed,
            score=score,
        )
        median = None if result.per_sample is None else float(np.median(result.per_sample))
        ratio = result.score / base.score if base.score > 0 else 1.0
        rows.append(Compared(objective.name, name, nfe, result.score, median, ratio, interval))
    return rows
