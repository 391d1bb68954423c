"""Racing: candidates start on few samples, and the losers of a paired test go no further.

A generation is scored on the first n_1 samples, then on n_2 > n_1, ... up to all. Before each
growth a candidate is compared with the leader, the lowest score over the same samples among the
generation and the best schedule known: it is stopped if its score is higher and the one-sided
Wilcoxon signed-rank test on the paired differences (of log errors, where the study compares
geometric means) finds it worse at level `LEVEL` (the rule of Optuna's WilcoxonPruner). All
candidates share the noise, so the pairs differ by the schedule only. Ranks and the trimmed
geometric mean see to it that no single sample stops or saves a candidate.

The score of a stopped candidate is an estimate of its score over all samples: its score over what
it has seen times the leader's over all, over the leader's on the same samples (the ratio
estimator, Cochran 1977, ch. 6; the leader's errors are a control for the difficulty of those
samples). So scores of different fidelity can be compared, and none that was stopped is below its
leader's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from fewstep.search.scoring import Pending, Scorer
from fewstep.search.work import Result
from fewstep.search.yardstick import Array, Statistic, comparable, level

LEVEL = 0.1


def loses(candidate: Array, leader: Array, statistic: Statistic = "mean") -> bool:
    """Whether a candidate's errors are worse than the leader's on the same samples, both (n,)."""
    difference = comparable(candidate, statistic) - comparable(leader, statistic)
    if level(candidate, statistic) <= level(leader, statistic) or not difference.any():
        return False
    return bool(wilcoxon(difference, alternative="greater").pvalue < LEVEL)


@dataclass
class Race:
    """Scores the generations of one NFE on growing numbers of samples.

    Args:
        scorer: evaluates.
        stream: which noise.
        levels: numbers of samples, ascending; one alone is no race.
        statistic: what the study compares.
        best: the best result over all samples so far.
    """

    scorer: Scorer
    stream: str
    levels: tuple[int, ...]
    statistic: Statistic = "mean"
    best: Result | None = field(default=None, init=False)

    def start(self, schedules: Sequence[Any]) -> Pending:
        """Begin a generation of distinct schedules on the fewest samples."""
        return self.scorer.submit(schedules, self.stream, self.levels[0])

    def finish(
        self, schedules: Sequence[Any], batch: Pending, told: int | None = None
    ) -> list[Result]:
        """A generation's results, in order; `Result.samples` says how far each one came.

        All of a generation race, so that no result depends on how many the budget pays for; the
        first `told` [all] are returned, and only these can become the best known.
        """
        results = self.scorer.wait(batch)
        alive = [i for i, r in enumerate(results) if r.status == "ok"]
        known = self.best
        stopped: list[tuple[int, int | None, float]] = []
        for size in self.levels[1:]:
            leader, score, per_sample = self._leader(results, alive)
            for i in alive:
                if i != leader and loses(_scores(results[i]), per_sample, self.statistic):
                    stopped.append((i, leader, score))
            out = {i for i, _, _ in stopped}
            alive = [i for i in alive if i not in out]
            grown = self.scorer.submit(
                [schedules[i] for i in alive],
                self.stream,
                size,
                before=[results[i] for i in alive],
            )
            for i, result in zip(alive, self.scorer.wait(grown), strict=True):
                results[i] = result
            alive = [i for i in alive if results[i].status == "ok"]
        told = len(results) if told is None else told
        for i in (i for i in alive if i < told):
            if self.best is None or results[i].score < self.best.score:
                self.best = results[i]
        for i, leader, score in reversed(stopped):  # a leader came further: its score is final
            lead = known if leader is None else results[leader]
            if lead is not None and np.isfinite(lead.score) and score > 0:
                results[i] = replace(results[i], score=results[i].score / score * lead.score)
        return results[:told]

    def _leader(
        self, results: Sequence[Result], alive: Sequence[int]
    ) -> tuple[int | None, float, Array]:
        """Position (None: the best known), score and errors of the best on these samples."""
        found = [(level(_scores(results[i]), self.statistic), i) for i in alive]
        size = max((results[i].samples for i in alive), default=0)
        if self.best is not None and size:
            known = _scores(self.best)[:size]
            score = level(known, self.statistic)
            if not found or score <= min(found)[0]:
                return None, score, known
        if not found:
            return None, 0.0, np.zeros(0)
        score, leader = min(found)
        return leader, score, _scores(results[leader])


def _scores(result: Result) -> Array:
    assert result.per_sample is not None  # the study refuses other objectives
    return result.per_sample
