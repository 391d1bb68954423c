"""The verdict: what a search found against the best named solver, on noise it has not seen.

Three streams of noise keep three questions apart. "search" ranks candidates. "select" picks the
one to keep among the best few, and the named solver to compare it with, so that luck on the
search's samples is not kept. "fresh" scores these two; only its numbers are reported as results.
The difference between the search's score and the fresh one is the winner's curse, and is reported.

The choice goes by the study's statistic, the geometric mean of per-sample errors by default, and
is guarded by the mean and the 90 % quantile: a finalist that is clearly worse than the best named
solver by either (the 95 % bootstrap interval of the ratio lies above 1) is not taken. Fresh
samples double until the interval of the geometric ratio is within 10 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fewstep.predictors.yardstick import Array, Comparison, geometric_ratio, ratio
from fewstep.search.config import FinalTable
from fewstep.search.objective import Objective, Paired
from fewstep.search.scoring import Scorer
from fewstep.search.strategies import Evaluated, ranked
from fewstep.search.work import Result
from fewstep.space.errors import StudyError

SELECT, FRESH = "select", "fresh"
STOCK = "stock:"
"""Prefix of the scheduler that a pipeline came with: always compared."""

RIVALS = 6  # named solvers compared on the "select" noise, the best of the search
WITHIN = math.log(1.1)
"""Half the width, in logs, that the interval of a geometric ratio is brought to."""


@dataclass(frozen=True)
class Scored:
    """A named solver's name and its score, on the "select" noise or else the search's."""

    name: str
    score: float
    median: float | None
    stream: str = "search"


@dataclass(frozen=True)
class Row:
    """One line of results.json.

    Args:
        nfe: network calls.
        best_named: the best named solver, chosen on the "select" noise.
        best_named_score: its score on fresh samples: the study's statistic of their errors.
        found_score: score of the schedule found.
        ratio: found_score / best_named_score; None where scores are not positive.
        interval: 95% interval of the ratio, paired; None without one (a mean of heavy-tailed
            errors has none).
        teacher_self_error: the teacher against one of twice its calls.
        calls_spent: network evaluations paid for this NFE in the search.
        best_named_median, found_median: over samples; None without per-sample errors.
        found_search_score: what the search thought of it.
        gap: found_score / found_search_score, the winner's curse if above 1.
        source, digest: where the found schedule came from, and its digest.
        trials, failed: candidates told, and how many of them could not be scored.
        samples: fresh samples.
        use: what to sample with: "found", or the named solver where nothing was gained.
        note: what stood against a finalist that was not taken; "" if nothing.
        comparison: found over best named in every statistic; None without per-sample errors.
        frechet: Frechet distances of features to the teacher's, {"found": , "named": }, where the
            problem has features.
        stock: ratio and interval of found over the scheduler that the pipeline came with.
        named: every named solver on its best grid, best first.
        facts: further numbers by name, (found, best named); empty where the objective has none.
        guidance: the scale, where the study lists scales.
        cost: what the calls may cost, where the study lists costs; `nfe` is then the found calls.
        depth: stages of the found schedule (`space.costs`); None for other kinds than ODE.
        calls: its calls in short, where the study lists costs.
        mean_calls: network calls of a sample (found, best named) where bounds make them random.
        failed_stage: why the last stage did not do all it should; "" if it did.
    """

    nfe: int
    best_named: str
    best_named_score: float
    found_score: float
    ratio: float | None
    interval: tuple[float, float] | None
    teacher_self_error: float | None
    calls_spent: int
    best_named_median: float | None
    found_median: float | None
    found_search_score: float
    gap: float | None
    source: str
    digest: str
    trials: int
    failed: int
    samples: int
    use: str = "found"
    note: str = ""
    comparison: Comparison | None = None
    frechet: dict[str, float] = field(default_factory=dict)
    stock: dict[str, Any] = field(default_factory=dict)
    named: tuple[Scored, ...] = field(default=())
    facts: dict[str, tuple[float, float]] = field(default_factory=dict)
    guidance: float | None = None
    failed_stage: str = ""
    cost: int | None = None
    depth: int | None = None
    calls: str = ""
    mean_calls: tuple[float, float] | None = None

    @property
    def setting(self) -> int:
        """The number of calls, or the cost, that the study asked for."""
        return self.nfe if self.cost is None else self.cost

    @property
    def title(self) -> str:
        """This number with what it is."""
        return f"NFE {self.nfe}" if self.cost is None else f"cost {self.cost}"

    @property
    def file(self) -> str:
        """The same for the names of files: "nfe05", "cost08"."""
        return f"nfe{self.nfe:02d}" if self.cost is None else f"cost{self.cost:02d}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        compared = None if self.comparison is None else self.comparison.to_dict()
        return asdict(self) | {"comparison": compared}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Read the JSON form."""
        return TypeAdapter(cls).validate_python(data)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows worth their calls, or cost: no row of as little has as low a score."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.setting, r.found_score)):
        if not front or row.found_score < front[-1].found_score:
            front.append(row)
    return front


@dataclass(frozen=True)
class Verdict:
    """A row, the two schedules it compares, and their fresh errors per sample if there are any."""

    row: Row
    found: Any
    best_named: Any
    errors: tuple[Array, Array] | None = None

    @property
    def kept(self) -> Any:
        """The schedule to keep: the one found, unless it is no better than the named solver."""
        return self.found if self.row.ratio is None or self.row.ratio < 1 else self.best_named


def contenders(
    known: Sequence[Evaluated], named: int, table: FinalTable
) -> tuple[list[Evaluated], list[Evaluated]]:
    """(named solvers, best first; best distinct candidates to choose from), by search score.

    The first `named` of all trials, in the order told, are the named solvers.
    """
    picks: dict[str, Evaluated] = {}
    for e in ranked(known[:named]):
        solver = e.source.split("/")[0] if table.named == "best_grid" else e.source
        picks.setdefault(solver, e)
    best: dict[str, Evaluated] = {}
    for e in ranked(known):
        best.setdefault(e.schedule.digest, e)
    return list(picks.values()), list(best.values())[: table.top]


class Judge:
    """Re-scores one NFE as the study's [final] says; the bootstrap has seed `seed`.

    `refer` maps (stream, samples) to the teacher's measures of these samples, computed where they
    are not known yet, and every worker's from then on.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        table: FinalTable,
        refer: Callable[[str, int], Array],
        seed: int,
    ) -> None:
        self._scorer, self._objective, self._table, self._refer = scorer, objective, table, refer
        self._paired = Paired(objective, resamples=table.resamples, seed=seed)

    def verdict(self, nfe: int, known: Sequence[Evaluated], named: int) -> Verdict:
        """Choose the schedule to keep and compare it with the best named solver.

        What the search cost and the teacher's own error are the caller's to fill in.

        Raises:
            StudyError: no named solver could be scored.
        """
        solvers, best = contenders(known, named, self._table)
        if not solvers:
            raise StudyError(
                f"NFE {nfe}: no named solver could be scored: the budget must pay for at least one"
            )
        chosen, rivals, selected, note = self._choose(best, solvers)
        champion = rivals[0]
        stock = next((e for e in rivals if e.source.startswith(STOCK)), None)
        pair = {e.schedule.digest: e for e in (chosen, champion, *([stock] if stock else []))}
        by = dict(zip(pair, self._fresh([e.schedule for e in pair.values()]), strict=True))
        a, b = by[chosen.schedule.digest], by[champion.schedule.digest]
        compared = self._paired.compared(a.measures, b.measures)
        found_score, named_score = self._value(a), self._value(b)
        share, interval = self._ratio(a, b)
        vary = any(getattr(e.schedule, "bounded", False) for e in (chosen, champion))
        gained = interval[1] < 1 if interval is not None else (share or 0.0) < 1
        row = Row(
            nfe=nfe,
            best_named=champion.source,
            best_named_score=named_score,
            found_score=found_score,
            ratio=share,
            interval=interval,
            teacher_self_error=None,
            calls_spent=0,
            best_named_median=_median(b),
            found_median=_median(a),
            found_search_score=chosen.score,
            gap=ratio(found_score, chosen.score),
            source=chosen.source,
            digest=chosen.schedule.digest,
            trials=len(known),
            failed=sum(e.status not in ("ok", "pruned") for e in known),
            samples=a.samples or self._table.samples,
            use="found" if gained else champion.source,
            note=note,
            comparison=compared,
            stock=self._stock(stock, a, by),
            named=_listed(solvers, selected),
            facts=self._facts(a, b),
            mean_calls=(a.calls / (a.samples or 1), b.calls / (b.samples or 1)) if vary else None,
        )
        both = None
        if compared is not None and a.per_sample is not None and b.per_sample is not None:
            both = (a.per_sample, b.per_sample)
        return Verdict(row, chosen.schedule, champion.schedule, both)

    def _choose(
        self, best: Sequence[Evaluated], solvers: Sequence[Evaluated]
    ) -> tuple[Evaluated, list[Evaluated], dict[str, Result], str]:
        """(the candidate to keep, the rivals best first, their results, what stood against)."""
        rivals = list(solvers[:RIVALS])
        rivals += [e for e in solvers[RIVALS:] if e.source.startswith(STOCK)]
        every = {e.schedule.digest: e for e in (*best, *rivals)}
        self._refer(SELECT, self._table.samples)
        schedules = [e.schedule for e in every.values()]
        results = self._scorer.submit(schedules, SELECT, self._table.samples)()
        by = dict(zip(every, results, strict=True))
        selected = {e.source: by[e.schedule.digest] for e in rivals}
        rivals.sort(key=lambda e: selected[e.source].score)
        notes: list[str] = []
        for e in sorted(best, key=lambda e: by[e.schedule.digest].score):
            result, rival = by[e.schedule.digest], selected[rivals[0].source]
            against = self._paired.clearly_worse(result.measures, rival.measures)
            if not against:
                return e, rivals, selected, "; ".join(notes)
            notes.append(f"{e.source} was not taken: {against} than {rivals[0].source}")
        return rivals[0], rivals, selected, "; ".join(notes)

    def _fresh(self, schedules: Sequence[Any]) -> list[Result]:
        """Results on fresh samples, doubled until the geometric ratio is known to 10 %."""
        size, before = self._table.samples, None
        while True:
            self._refer(FRESH, size)
            wait = self._scorer.submit(schedules, FRESH, size, measures=True, before=before)
            results = wait()
            a, b = results[0], results[min(1, len(results) - 1)]
            one, other = (self._paired.errors(r.measures) for r in (a, b))
            if 2 * size > self._table.limit or one is None or other is None:
                return results
            _, (low, high) = geometric_ratio(one, other)
            if math.log(high / low) <= 2 * WITHIN:
                return results
            size, before = 2 * size, results

    def _stock(
        self, stock: Evaluated | None, a: Result, by: Mapping[str, Result]
    ) -> dict[str, Any]:
        if stock is None:
            return {}
        theirs = by[stock.schedule.digest]
        share, interval = self._ratio(a, theirs)
        score = self._value(theirs)
        return {"name": stock.source, "score": score, "ratio": share, "interval": interval}

    def _value(self, result: Result) -> float:
        if result.measures is None:
            return result.score
        reference = self._refer(FRESH, len(result.measures))
        return self._paired.value(result.measures, reference)

    def _ratio(self, a: Result, b: Result) -> tuple[float | None, tuple[float, float] | None]:
        if a.measures is None or b.measures is None:
            return ratio(a.score, b.score), None
        return self._paired.ratio(a.measures, b.measures, self._refer(FRESH, len(a.measures)))

    def _facts(self, a: Result, b: Result) -> dict[str, tuple[float, float]]:
        if a.measures is None or b.measures is None:
            return {}
        found, other = self._objective.facts(a.measures), self._objective.facts(b.measures)
        return {name: (value, other[name]) for name, value in found.items()}


def _listed(solvers: Sequence[Evaluated], selected: Mapping[str, Result]) -> tuple[Scored, ...]:
    listed = []
    for e in solvers:
        best, stream = selected.get(e.source, e), SELECT if e.source in selected else "search"
        listed.append(Scored(e.source, best.score, _median(best), stream))
    return tuple(sorted(listed, key=lambda s: s.score))


def _median(result: Result | Evaluated) -> float | None:
    return None if result.per_sample is None else float(np.median(result.per_sample))
