"""Lists of schedules to results, through a pool; on other streams than the search's, kept.

The search's own results are trials (`rung`); those that choose the schedule to keep and judge it
are kept by the scorer as they arrive, so that a resumed search scores nothing twice.

Racing: candidates start on few samples, and the losers of a paired test go no further.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from fewstep.search.objective import Objective
from fewstep.search.pool import Pool
from fewstep.search.store import Store, remember, remembered
from fewstep.search.work import Block, BlockResult, Result, cut
from fewstep.search.yardstick import Array, Statistic, comparable, level

SEARCH = "search"
"""The stream of noise that candidates are scored on."""

LEVEL = 0.1
"""Of the test by which candidates are stopped."""


@dataclass
class _Piece:
    """Schedules that run together: their positions, their blocks, and results once known."""

    members: tuple[int, ...]
    schedules: list[Any]
    blocks: list[Block]
    before: list[Result] | None
    cost: int
    results: list[Result] | None = None


@dataclass
class Pending:
    """Schedules under evaluation, in the order given; the first `size` are wanted."""

    size: int
    stream: str
    samples: int
    measures: bool
    pieces: list[_Piece]
    coming: Iterator[BlockResult]


class Scorer:
    """Cuts schedules into blocks, runs them, and makes results of them.

    Args:
        pool: where blocks run.
        objective: turns measures into scores.
        store: keeps results of other streams than the search's.
        references: measures of the teacher's end points by stream.
        block: (candidates, samples) of a block.
        cost_of: network evaluations of one sample of a schedule.
        advance: called with network evaluations as they are done, kept ones included.
    """

    def __init__(
        self,
        pool: Pool,
        objective: Objective,
        store: Store,
        references: Mapping[str, Array],
        *,
        block: tuple[int, int],
        cost_of: Callable[[Any], int],
        advance: Callable[[int], None],
    ) -> None:
        self._pool, self._objective, self._store = pool, objective, store
        self._references, self._block, self._advance = references, block, advance
        self._cost_of = cost_of

    def submit(
        self,
        schedules: Sequence[Any],
        stream: str,
        samples: int,
        *,
        measures: bool = False,
        before: Sequence[Result] | None = None,
        needed: int | None = None,
    ) -> Pending:
        """Start evaluating schedules of any NFE on samples 0..samples-1 of a stream.

        Args:
            schedules: distinct schedules.
            stream: which noise.
            samples: how many samples.
            measures: results must carry their measures (only then is an objective without
                per-sample scores run again).
            before: results of these schedules on fewer samples of the stream, all the same number,
                to go on from; the objective must have per-sample scores.
            needed: only the first so many are wanted. All are cut into blocks, so that a score
                does not depend on how many are wanted, and blocks without one of these are left.
        """
        first = before[0].samples if before else 0
        pieces = []
        for members in cut(schedules, self._block[0]):
            if needed is not None and min(members) >= needed:
                continue
            group = [schedules[i] for i in members]
            blocks = Block.cover(group, stream, range(first, samples), self._block[1])
            earlier = None if before is None else [before[i] for i in members]
            cost = sum(map(self._cost_of, group))
            piece = _Piece(members, group, blocks, earlier, cost)
            pieces.append(piece)
            if stream == SEARCH:
                continue
            known = remembered(self._store, stream, samples, group)
            if all(r is not None and not _lacks(r, measures) for r in known):
                piece.results = [r for r in known if r is not None]
                self._advance((samples - first) * cost)
        coming = self._pool.map(b for p in pieces if p.results is None for b in p.blocks)
        size = len(schedules) if needed is None else needed
        return Pending(size, stream, samples, measures, pieces, coming)

    def wait(self, batch: Pending) -> list[Result]:
        """A batch's results in the order of its schedules."""
        found: dict[int, Result] = {}
        for piece in batch.pieces:
            if piece.results is None:
                piece.results = self._finish(batch, piece)
            found |= dict(zip(piece.members, piece.results, strict=True))
        return [found[i] for i in range(batch.size)]

    @property
    def statistic(self) -> Statistic:
        """Of the errors of a schedule's samples, its score."""
        return self._objective.statistic

    def _finish(self, batch: Pending, piece: _Piece) -> list[Result]:
        parts = []
        for block in piece.blocks:
            parts.append(next(batch.coming))
            self._advance((block.stop - block.start) * piece.cost)
        reference = self._references[batch.stream]
        results = assemble(parts, self._objective, reference, piece.before)
        if not (batch.measures or self._objective.per_sample):  # features are large
            results = [replace(r, measures=None) for r in results]
        if batch.stream != SEARCH:
            for schedule, result in zip(piece.schedules, results, strict=True):
                kept = replace(result, samples=batch.samples)
                remember(self._store, batch.stream, schedule, kept)
        return results


def _lacks(result: Result, measures: bool) -> bool:
    return measures and result.status == "ok" and result.measures is None


def assemble(
    parts: Sequence[BlockResult],
    objective: Objective,
    reference: Array,
    before: Sequence[Result] | None = None,
) -> list[Result]:
    """The results of candidates that ran together from their blocks, in sample order.

    Args:
        parts: the blocks.
        objective: turns measures into a score.
        reference: measures of the teacher's end points.
        before: results on the samples before the first block's, which these go on from.
    """
    results = []
    count = len(parts[0].status)
    for m in range(count):
        status = next((p.status[m] for p in parts if p.status[m] != "ok"), "ok")
        message = next((p.message[m] for p in parts if p.status[m] != "ok"), "")
        cost: dict[str, Any] = {
            "calls": sum(p.evaluations for p in parts) // count,
            "seconds": sum(p.seconds for p in parts) / count,
        }
        earlier: Array | None = None
        if before is not None:
            earlier = before[m].measures
            cost["calls"] += before[m].calls
            cost["seconds"] += before[m].seconds
        if status != "ok":
            results.append(Result(float("inf"), status, message, **cost))
            continue
        measures = np.concatenate([p.values[m] for p in parts])
        if earlier is not None:
            measures = np.concatenate([earlier, measures])
        score = objective.score(measures, reference)
        if not np.isfinite(score):
            results.append(Result(float("inf"), "diverged", "the score is not finite", **cost))
            continue
        per_sample = measures[:, 0] if objective.per_sample else None
        results.append(
            Result(score, "ok", "", per_sample, measures, samples=len(measures), **cost)
        )
    return results


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
