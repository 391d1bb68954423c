"""Lists of schedules to results, through a pool; on other streams than the search's, kept.

The search's own results are trials (`rung`); those that choose the schedule to keep and judge it
are kept by the scorer as they arrive, so that a resumed search scores nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fewstep.search.objective import Objective
from fewstep.search.pool import Pool
from fewstep.search.store import Store, remember, remembered
from fewstep.search.work import Block, BlockResult, Result, cut
from fewstep.search.yardstick import Array, Statistic

SEARCH = "search"
"""The stream of noise that candidates are scored on."""


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
        per_sample: network evaluations of one sample and one call.
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
        per_sample: int,
        advance: Callable[[int], None],
    ) -> None:
        self._pool, self._objective, self._store = pool, objective, store
        self._references, self._block, self._advance = references, block, advance
        self.per_sample = per_sample

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
            cost = group[0].nfe * self.per_sample * len(group)
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
