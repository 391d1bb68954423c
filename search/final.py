"""The verdict: what a search found against every named solver, on noise it has not seen.

Three streams of noise keep three questions apart. "search" ranks candidates. "select" picks the
one to keep among the best few, so that luck on the search's samples is not kept. "fresh" scores
that one and the named solvers; only these numbers are reported as results. The difference between
the search's score and the fresh one is the winner's curse, and is reported too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fewstep.search.config import FinalTable
from fewstep.search.objective import Array, Objective, ratio_interval
from fewstep.search.scoring import Scorer
from fewstep.search.strategies import Evaluated
from fewstep.search.work import Result
from fewstep.space.errors import StudyError

SELECT, FRESH = "select", "fresh"


@dataclass(frozen=True)
class Scored:
    """A schedule's name and its score on fresh samples."""

    name: str
    score: float
    median: float | None


@dataclass(frozen=True)
class Row:
    """One line of results.json.

    Args:
        nfe: network calls.
        best_named: the best named solver on fresh samples.
        best_named_score: its score.
        found_score: score of the schedule found.
        ratio: found_score / best_named_score.
        interval: 95% paired bootstrap interval of the ratio.
        teacher_self_error: the teacher against one of twice its calls.
        calls_spent: network evaluations paid for this NFE in the search.
        best_named_median: median over samples, beside the mean; None for an objective without
            per-sample scores.
        found_median: median over samples.
        found_search_score: what the search thought of it.
        gap: found_score / found_search_score, the winner's curse if above 1.
        source: where the found schedule came from.
        digest: of the found schedule.
        trials: candidates told.
        failed: of them, not scored.
        samples: fresh samples.
        named: every named solver on its best grid, best first.
        facts: further numbers by name, (found, best named); empty where the objective has none.
        guidance: the scale, where the study lists scales.
    """

    nfe: int
    best_named: str
    best_named_score: float
    found_score: float
    ratio: float
    interval: tuple[float, float]
    teacher_self_error: float | None
    calls_spent: int
    best_named_median: float | None
    found_median: float | None
    found_search_score: float
    gap: float
    source: str
    digest: str
    trials: int
    failed: int
    samples: int
    named: tuple[Scored, ...] = field(default=())
    facts: dict[str, tuple[float, float]] = field(default_factory=dict)
    guidance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self) | {"interval": list(self.interval)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Read the JSON form."""
        named = tuple(Scored(**s) for s in data["named"])
        low, high = data["interval"]
        facts = {k: (a, b) for k, (a, b) in data.get("facts", {}).items()}
        return cls(**{**data, "interval": (low, high), "named": named, "facts": facts})


@dataclass(frozen=True)
class Verdict:
    """A row, and the two schedules it compares."""

    row: Row
    found: Any
    best_named: Any


def contenders(
    known: Sequence[Evaluated], named: int, table: FinalTable
) -> tuple[list[Evaluated], list[Evaluated]]:
    """(named solvers to re-score, best distinct candidates to choose from), by search score.

    Args:
        known: every trial in the order told.
        named: how many of the first are named solvers.
        table: the study's [final].
    """
    ok = [e for e in known[:named] if e.status == "ok"]
    picks: dict[str, Evaluated] = {}
    for e in sorted(ok, key=lambda e: e.score):
        solver = e.source.split("/")[0] if table.named == "best_grid" else e.source
        picks.setdefault(solver, e)
    best: dict[str, Evaluated] = {}
    for e in sorted((e for e in known if e.status == "ok"), key=lambda e: e.score):
        best.setdefault(e.schedule.digest, e)
        if len(best) == table.top:
            break
    return list(picks.values()), list(best.values())


def final_cost(nfe: int, table: FinalTable, solvers: int) -> int:
    """Network evaluations of the verdict at one NFE, at most."""
    return nfe * table.samples * (table.top + solvers + 1)


class Judge:
    """Re-scores one NFE.

    Args:
        scorer: evaluates on any stream.
        objective: the score.
        table: the study's [final].
        references: measures of the teacher's end points by stream.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        table: FinalTable,
        references: Mapping[str, Array],
        seed: int,
    ) -> None:
        self._scorer, self._objective, self._table = scorer, objective, table
        self._references, self._seed = references, seed

    def verdict(
        self,
        nfe: int,
        known: Sequence[Evaluated],
        named: int,
        *,
        teacher_self_error: float | None,
        calls_spent: int,
    ) -> Verdict:
        """Choose the schedule to keep and compare it with the named solvers.

        Raises:
            StudyError: no named solver could be scored.
        """
        solvers, best = contenders(known, named, self._table)
        if not solvers:
            raise StudyError(
                f"NFE {nfe}: no named solver could be scored: the budget must pay for at least one"
            )
        chosen = self._choose(best)
        schedules = {e.schedule.digest: e.schedule for e in [chosen, *solvers]}
        results = dict(zip(schedules, self._score(list(schedules.values()), FRESH), strict=True))
        scored = sorted(
            (
                Scored(
                    e.source, results[e.schedule.digest].score, _median(results[e.schedule.digest])
                )
                for e in solvers
            ),
            key=lambda s: s.score,
        )
        champion = next(e for e in solvers if e.source == scored[0].name)
        a, b = results[chosen.schedule.digest], results[champion.schedule.digest]
        row = Row(
            nfe=nfe,
            best_named=champion.source,
            best_named_score=b.score,
            found_score=a.score,
            ratio=a.score / b.score if b.score > 0 else 1.0,
            interval=self._interval(a, b),
            teacher_self_error=teacher_self_error,
            calls_spent=calls_spent,
            best_named_median=_median(b),
            found_median=_median(a),
            found_search_score=chosen.score,
            gap=a.score / chosen.score if chosen.score > 0 else 1.0,
            source=chosen.source,
            digest=chosen.schedule.digest,
            trials=len(known),
            failed=sum(e.status != "ok" for e in known),
            samples=self._table.samples,
            named=tuple(scored),
            facts=self._facts(a, b),
        )
        return Verdict(row, chosen.schedule, champion.schedule)

    def _choose(self, best: Sequence[Evaluated]) -> Evaluated:
        if len(best) == 1:
            return best[0]
        results = self._score([e.schedule for e in best], SELECT)
        return min(zip(best, results, strict=True), key=lambda pair: pair[1].score)[0]

    def _score(self, schedules: Sequence[Any], stream: str) -> list[Result]:
        batch = self._scorer.submit(
            schedules, stream, self._table.samples, measures=stream == FRESH
        )
        return self._scorer.wait(batch)

    def _facts(self, a: Result, b: Result) -> dict[str, tuple[float, float]]:
        if a.measures is None or b.measures is None:
            return {}
        found, other = (
            self._objective.facts(r.measures) for r in (a, b) if r.measures is not None
        )
        return {name: (value, other[name]) for name, value in found.items()}

    def _interval(self, a: Result, b: Result) -> tuple[float, float]:
        if a.measures is None or b.measures is None:
            return float("nan"), float("nan")
        score: Callable[[Array, Any], float] | None = None
        if not self._objective.per_sample:
            reference = self._references[FRESH]

            def score(measures: Array, chosen: Any) -> float:
                return self._objective.score(measures[chosen], reference[chosen])

        return ratio_interval(
            a.measures, b.measures, resamples=self._table.resamples, seed=self._seed, score=score
        )


def _median(result: Result) -> float | None:
    return None if result.per_sample is None else float(np.median(result.per_sample))
