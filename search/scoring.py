"""Lists of schedules to results, through a pool; on other streams than the search's, kept.

The search's own results are trials (`rung`); those that choose the schedule to keep and judge it
are kept by the scorer as they arrive, so that a resumed search scores nothing twice.

Racing: candidates start on few samples, and the losers of a paired test go no further.

A generation is scored on the first n_1 samples, then on n_2 > n_1, ... up to all. Before each
growth a candidate is compared with the leader, the lowest score over the same samples among the
generation and the best schedule known: it is stopped if its score is higher and the one-sided
Wilcoxon signed-rank test on the paired differences (of log errors, where the study compares
geometric means) finds it worse (`yardstick.loses`; the rule of Optuna's WilcoxonPruner). All
candidates share the noise, so the pairs differ by the schedule only. Ranks and the trimmed
geometric mean see to it that no single sample stops or saves a candidate.

The score of a stopped candidate is an estimate of its score over all samples: its score over what
it has seen times the leader's over all, over the leader's on the same samples (the ratio
estimator, Cochran 1977, ch. 6; the leader's errors are a control for the difficulty of those
samples). So scores of different fidelity can be compared, and none that was stopped is below its
leader's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.predictors.yardstick import Array, Statistic, level, loses
from fewstep.samplers.streams import cut
from fewstep.search.objective import Objective
from fewstep.search.store import Kept
from fewstep.search.work import Block, BlockResult, Result

if TYPE_CHECKING:
    from fewstep.search.run import Search

SEARCH = "search"
"""The stream of noise that candidates are scored on."""

Waiting = Callable[[], list[Result]]
"""Schedules under evaluation: waits for their results, in the order given; to be called once."""


class Scorer:
    """Cuts a search's schedules into blocks, runs them in its pool, and makes results of them.

    Those of other streams than the search's are kept. Network evaluations are shown as they are
    done, kept ones included.
    """

    def __init__(self, run: Search) -> None:
        self._run, self._objective = run, run.evaluator.objective

    def submit(
        self,
        schedules: Sequence[Any],
        stream: str,
        samples: int,
        *,
        measures: bool = False,
        before: Sequence[Result] | None = None,
        needed: int | None = None,
    ) -> Waiting:
        """Start evaluating distinct schedules of any NFE on samples 0..samples-1 of a stream.

        With `measures` results carry them (only then is an objective without per-sample scores run
        again). `before` are results of these schedules on fewer samples of the stream, all the
        same number, to go on from; the objective must have per-sample scores. Only the first
        `needed` are wanted: all are cut into blocks, so that a score does not depend on how many
        are wanted, and blocks without one of these are left.
        """
        first = before[0].samples if before else 0
        members_at_once, samples_at_once = self._run.config.search.block
        pieces: list[tuple[tuple[int, ...], list[Block], list[Result]]] = []
        for members in cut(schedules, members_at_once):
            if needed is not None and min(members) >= needed:
                continue
            group, blocks = [schedules[i] for i in members], list[Block]()
            known = self._known(group, stream, samples, measures)
            if known:
                self._run.display.advance((samples - first) * sum(map(self._run.cost_of, group)))
            else:
                blocks = Block.cover(group, stream, range(first, samples), samples_at_once)
            pieces.append((members, blocks, known))
        coming = self._run.pool.map(block for _, blocks, _ in pieces for block in blocks)

        def wait() -> list[Result]:
            found: dict[int, Result] = {}
            for members, blocks, known in pieces:
                earlier = None if before is None else [before[i] for i in members]
                results = known or self._finish(blocks, coming, measures, earlier)
                found |= dict(zip(members, results, strict=True))
            return [found[i] for i in range(len(schedules) if needed is None else needed)]

        return wait

    def _known(
        self, group: Sequence[Any], stream: str, samples: int, measures: bool
    ) -> list[Result]:
        """What is kept of schedules on another stream than the search's; none if one is not."""
        if stream == SEARCH:
            return []
        kept = (self._run.store.trials(s.nfe, stream).result(s.digest, samples) for s in group)
        found = [
            r
            for r in kept
            if r is not None and not (measures and r.status == "ok" and r.measures is None)
        ]
        return found if len(found) == len(group) else []

    def _finish(
        self,
        blocks: Sequence[Block],
        coming: Iterator[BlockResult],
        measures: bool,
        before: Sequence[Result] | None,
    ) -> list[Result]:
        stream, samples, group = blocks[0].stream, blocks[-1].stop, blocks[0].schedules
        cost, parts = sum(map(self._run.cost_of, group)), []
        for block in blocks:
            parts.append(next(coming))
            self._run.display.advance((block.stop - block.start) * cost)
        results = assemble(parts, self._objective, self._run.references[stream], before)
        if not (measures or self._objective.per_sample):  # features are large
            results = [replace(r, measures=None) for r in results]
        if stream != SEARCH:
            for schedule, result in zip(group, results, strict=True):
                kept = replace(result, samples=samples)
                trials = self._run.store.trials(schedule.nfe, stream)
                trials.add(Kept(schedule, kept, expressed=True))
        return results


def assemble(
    parts: Sequence[BlockResult],
    objective: Objective,
    reference: Array,
    before: Sequence[Result] | None = None,
) -> list[Result]:
    """The results of candidates that ran together from their blocks, in sample order.

    `reference` holds measures of the teacher's end points; `before`, results on the samples before
    the first block's, which these go on from.
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
        cost["samples"] = len(measures)
        results.append(Result(score, "ok", "", per_sample, measures, **cost))
    return results


@dataclass
class Race:
    """Scores the generations of one NFE on growing numbers of samples.

    `levels` are these numbers, ascending; one alone is no race. `best` is the best result over all
    samples so far.
    """

    scorer: Scorer
    stream: str
    levels: tuple[int, ...]
    statistic: Statistic = "mean"
    best: Result | None = field(default=None, init=False)

    def start(self, schedules: Sequence[Any], needed: int | None = None) -> Waiting:
        """Begin a generation of distinct schedules on the fewest samples.

        All race, so that no result depends on how many the budget pays for; where there is no
        race, only the first `needed` are wanted.
        """
        needed = needed if len(self.levels) == 1 else None
        return self.scorer.submit(schedules, self.stream, self.levels[0], needed=needed)

    def finish(
        self, schedules: Sequence[Any], wait: Waiting, told: int | None = None
    ) -> list[Result]:
        """A generation's results, in order; `Result.samples` says how far each one came.

        The first `told` [all] are returned, and only these can become the best known.
        """
        results = wait()
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
            left, before = [schedules[i] for i in alive], [results[i] for i in alive]
            grown = self.scorer.submit(left, self.stream, size, before=before)
            for i, result in zip(alive, grown(), strict=True):
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
