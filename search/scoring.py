"""Lists of schedules to results, through a pool and the log: nothing runs twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fewstep.search.evaluate import Result, TaskResult, assemble
from fewstep.search.family import AnyChunk, Family
from fewstep.search.objective import Array, Objective
from fewstep.search.pool import Pool
from fewstep.search.record import Record


@dataclass
class _Piece:
    chunk: AnyChunk
    digests: tuple[str, ...]
    stream: str
    samples: int
    expected: int
    measures: bool
    before: tuple[Result, ...] | None = None
    parts: dict[int, TaskResult] = field(default_factory=dict)
    results: list[Result] | None = None


@dataclass
class Batch:
    """Schedules under evaluation, in the order given."""

    size: int
    pieces: list[_Piece]

    @property
    def done(self) -> bool:
        """Whether every result is there."""
        return all(piece.results is not None for piece in self.pieces)


class Scorer:
    """Cuts schedules into blocks, runs them, and keeps their results.

    Args:
        pool: where blocks run.
        objective: turns measures into scores.
        family: cuts schedules into chunks.
        record: the log.
        references: measures of the teacher's end points by stream.
        block: (candidates, samples) of a block.
        clock: seconds since the search began.
        advance: told the network evaluations done, those found in the log included.
    """

    def __init__(
        self,
        pool: Pool,
        objective: Objective,
        family: Family,
        record: Record,
        references: Mapping[str, Array],
        *,
        block: tuple[int, int],
        clock: Callable[[], float],
        advance: Callable[[int], None],
    ) -> None:
        self._pool, self._objective, self._family, self._record = pool, objective, family, record
        self._references, self._block = references, block
        self._clock, self._advance = clock, advance
        self._open: dict[int, tuple[_Piece, int]] = {}
        self.spent = 0

    def submit(
        self,
        schedules: Sequence[Any],
        stream: str,
        samples: int,
        *,
        measures: bool = False,
        before: Sequence[Result] | None = None,
    ) -> Batch:
        """Start evaluating schedules of any NFE on samples 0..samples-1 of a stream.

        Args:
            schedules: distinct schedules.
            stream: which noise.
            samples: how many samples.
            measures: results must carry their measures (only then is an objective without
                per-sample scores run again).
            before: results of these schedules on fewer samples of the stream, all the same number,
                to go on from; the objective must have per-sample scores.
        """
        batch = Batch(len(schedules), [])
        first = before[0].samples if before else 0
        for chunk in self._family.chunks(schedules, self._block[0]):
            digests = tuple(schedules[i].digest for i in chunk.members)
            keys = [(stream, samples, digest) for digest in digests]
            known = [self._record.results.get(key) for key in keys]
            usable = [
                r is not None and not (measures and r.status == "ok" and r.measures is None)
                for r in known
            ]
            tasks = list(chunk.tasks(stream, samples, self._block[1], first=first))
            piece = _Piece(chunk, digests, stream, samples, len(tasks), measures)
            if before is not None:
                piece.before = tuple(before[i] for i in chunk.members)
            batch.pieces.append(piece)
            if all(usable):
                self._take(piece, [r for r in known if r is not None])
                self._advance(len(digests) * (samples - first) * self._cost(chunk))
                continue
            for position, task in enumerate(tasks):
                self._open[self._pool.submit(task)] = (piece, position)
        return batch

    def wait(self, batch: Batch) -> list[Result]:
        """A batch's results in the order of its schedules; blocks of other batches are kept."""
        while not batch.done:
            ticket, part = self._pool.collect()
            piece, position = self._open.pop(ticket)
            piece.parts[position] = part
            fresh = piece.samples - (piece.before[0].samples if piece.before else 0)
            per_task = fresh / piece.expected
            self._advance(round(len(piece.digests) * per_task * self._cost(piece.chunk)))
            if len(piece.parts) == piece.expected:
                self._finish(piece)
        results: dict[int, Result] = {}
        for piece in batch.pieces:
            assert piece.results is not None
            results |= dict(zip(piece.chunk.members, piece.results, strict=True))
        return [results[i] for i in range(batch.size)]

    @property
    def per_sample(self) -> int:
        """Network evaluations of one sample and one call."""
        return self._family.per_sample

    def _cost(self, chunk: AnyChunk) -> int:
        return chunk.nfe * self.per_sample

    def _finish(self, piece: _Piece) -> None:
        parts = [piece.parts[k] for k in sorted(piece.parts)]
        reference = self._references[piece.stream]
        results = assemble(parts, self._objective, reference, piece.before)
        if not (piece.measures or self._objective.per_sample):  # features are large
            results = [replace(r, measures=None) for r in results]
        self._take(piece, results)
        self._record.block(piece.stream, piece.samples, piece.digests, results, self._clock())
        piece.parts.clear()

    def _take(self, piece: _Piece, results: list[Result]) -> None:
        piece.results = results
        self.spent += sum(r.calls for r in results) - sum(r.calls for r in piece.before or ())
