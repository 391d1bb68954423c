"""The search at one NFE: generations proposed, scored, told in the order proposed.

Generation 0 is the named solvers and the warm start. Generation g is proposed from the results of
generations up to g - lag, with random numbers of f(seed, nfe, g); the log holds what was proposed,
so a resumed search proposes nothing twice and the trial table grows identically.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.search.config import StudyConfig
from fewstep.search.racing import Race
from fewstep.search.record import Record, packed_image, unpacked_image
from fewstep.search.scoring import Batch, Scorer
from fewstep.search.strategies import Evaluated, Proposal, Strategy
from fewstep.search.study import TrialTable
from fewstep.search.work import Result
from fewstep.space.errors import StudyError
from fewstep.space.files import load_schedule

REFINED = 1_000_000
"""The number of the generation that holds refined schedules; none follows it."""

SEARCH = "search"
"""The stream of noise that candidates are scored on."""


@dataclass(frozen=True)
class Progress:
    """What a rung tells after each generation.

    Args:
        trials: candidates told.
        best: the best so far.
        named: the best named solver.
        curve: (trial, best score until then).
        numbers: of the generation: means of the numbers in its proposals' notes, and where
            candidates race, the share of network evaluations that stopping them saved.
    """

    trials: int
    best: Evaluated | None
    named: Evaluated | None
    curve: Sequence[tuple[int, float]]
    numbers: Mapping[str, float]


@dataclass
class _Generation:
    number: int
    proposals: list[Proposal]
    batch: Batch
    fresh: dict[str, Any] = field(default_factory=dict)


class Rung:
    """One NFE of a search.

    Args:
        nfe: network calls.
        config: the study.
        named: the named solvers, by name.
        strategy: proposes generations from 1 on; None stops after the named solvers.
        scorer: evaluates.
        record: the log.
        table: the Optuna trials.
        earlier: results of other NFEs that the strategy may learn from.
        clock: seconds since the search began.
        limit: candidates that the budget pays for; None for a budget in seconds.
        deadline: clock at which to stop proposing, for a budget in seconds.
        told: called after each generation.
        warm: candidates that join the named solvers in generation 0, after them.
    """

    def __init__(
        self,
        nfe: int,
        config: StudyConfig,
        named: Mapping[str, Any],
        strategy: Strategy | None,
        *,
        scorer: Scorer,
        record: Record,
        table: TrialTable,
        earlier: Sequence[Evaluated],
        clock: Callable[[], float],
        limit: int | None,
        deadline: float | None,
        told: Callable[[Progress], None],
        warm: Sequence[Proposal] = (),
    ) -> None:
        self.nfe, self._config, self._named, self._strategy = nfe, config, named, strategy
        self._scorer, self._record, self._table = scorer, record, table
        self._earlier, self._warm = list(earlier), list(warm)
        self._clock, self._deadline, self._told = clock, deadline, told
        self._limit = limit
        self._proposed = self._named_count = 0
        self._calls = config.calls_of(nfe)
        self._race = Race(scorer, SEARCH, config.search.levels, scorer.statistic)
        self._results: dict[str, Result] = {}
        self._seen: set[str] = set()
        self.known: list[Evaluated] = []
        self.costs: list[int] = []

    def run(self) -> list[Evaluated]:
        """Run to the end of the budget; every trial in the order told."""
        waiting: deque[_Generation] = deque()
        number = 0
        while True:
            due = max(number - self._config.search.lag, 0)  # the named solvers are always known
            while number > 0 and waiting and waiting[0].number <= due:
                self._tell(waiting.popleft())
            proposals = self._proposals(number)
            if not proposals:
                break
            waiting.append(self._start(number, proposals))
            number += 1
        while waiting:
            self._tell(waiting.popleft())
        if not any(e.status == "ok" for e in self.known):
            reason = self._results[self.known[0].schedule.digest].message
            raise StudyError(
                f"NFE {self.nfe}: none of {len(self.known)} candidates could be scored "
                f"({reason}): check the model"
            )
        return self.known

    def _proposals(self, number: int) -> list[Proposal]:
        size = self._config.search.generation
        if number == 0:
            size = self._named_count = len(self._named)
            if self._limit is not None:
                self._named_count = min(size, self._limit)
            size += len(self._warm)
        if self._limit is not None:
            size = min(size, self._limit - self._proposed)
        if size <= 0 or (number > 0 and self._strategy is None):
            return []
        logged = self._record.generations.get((self.nfe, number))
        if logged is not None:
            return [self._restore(entry) for entry in logged]
        if number > 0 and self._deadline is not None and self._clock() > self._deadline:
            return []
        if number > 0 and self._calls is not None and sum(self.costs) >= self._calls:
            return []
        if number == 0:
            named = [Proposal(schedule, name) for name, schedule in self._named.items()]
            proposals = [*named, *self._warm][:size]
        elif self._strategy is not None:
            rng = np.random.default_rng([self._config.search.seed, self.nfe, number])
            known = [*self._earlier, *self.known]
            proposals = list(self._strategy.propose(known, number, size, rng))[:size]
        else:
            proposals = []
        if proposals:
            self._record.generation(self.nfe, number, _entries(proposals), self._clock())
        return proposals

    def _restore(self, entry: Mapping[str, Any]) -> Proposal:
        schedule = load_schedule(entry["schedule"])
        if entry.get("constant") is not None:
            schedule = schedule.with_constant(unpacked_image(entry["constant"]))
        return Proposal(schedule, entry["source"], dict(entry["note"]))

    def _start(self, number: int, proposals: list[Proposal]) -> _Generation:
        fresh: dict[str, Any] = {}
        for proposal in proposals:
            digest = proposal.schedule.digest
            if digest not in self._seen:
                fresh[digest] = proposal.schedule
        self._seen |= set(fresh)
        self._proposed += len(proposals)
        return _Generation(number, proposals, self._race.start(list(fresh.values())), fresh)

    def _tell(self, generation: _Generation) -> None:
        fresh = generation.fresh
        results = self._race.finish(list(fresh.values()), generation.batch)
        self._results |= dict(zip(fresh, results, strict=True))
        paid = set(fresh)
        for proposal in generation.proposals:
            digest = proposal.schedule.digest
            result = self._results[digest]
            evaluated = Evaluated(
                proposal.schedule,
                result.score,
                result.status,
                result.samples,
                result.per_sample,
                proposal.source,
            )
            calls = result.calls if digest in paid else 0
            paid.discard(digest)
            self._table.tell(
                len(self.known),
                evaluated,
                calls=calls,
                seconds=result.seconds if calls else 0.0,
                message=result.message,
                note={"generation": generation.number, **proposal.note},
            )
            self.known.append(evaluated)
            self.costs.append(calls)
        numbers = _numbers([p.note for p in generation.proposals])
        full = self._scorer.per_sample * self.nfe * self._config.search.levels[-1] * len(results)
        if len(self._config.search.levels) > 1 and full:
            numbers["calls_saved"] = 1 - sum(r.calls for r in results) / full
        best, named = best_of(self.known), best_of(self.named_known())
        self._told(Progress(len(self.known), best, named, best_so_far(self.known), numbers))

    @property
    def refined_before(self) -> bool:
        """Whether the log of a resumed search holds refined schedules already."""
        return (self.nfe, REFINED) in self._record.generations

    def extend(self, proposals: list[Proposal]) -> list[Proposal]:
        """Score and tell refined schedules (the logged ones where there are some)."""
        logged = self._record.generations.get((self.nfe, REFINED))
        if logged is not None:
            proposals = [self._restore(entry) for entry in logged]
        elif proposals:
            self._record.generation(self.nfe, REFINED, _entries(proposals), self._clock())
        if proposals:
            self._tell(self._start(REFINED, proposals))
        return proposals

    def named_known(self) -> list[Evaluated]:
        """The named solvers told so far (generation 0; a small budget may not pay for all)."""
        return self.known[: self._named_count]


def _entries(proposals: Sequence[Proposal]) -> list[dict[str, Any]]:
    found = []
    for p in proposals:
        entry = {"schedule": p.schedule.to_dict(), "source": p.source, "note": p.note}
        constant = getattr(p.schedule, "constant", None)  # lies beside a schedule, not in it
        if constant is not None:
            entry["constant"] = packed_image(constant)
        found.append(entry)
    return found


def _numbers(notes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each number that the notes of a generation hold."""
    found: dict[str, list[float]] = {}
    for note in notes:
        for name, value in note.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def best_of(evaluated: Sequence[Evaluated]) -> Evaluated | None:
    """The lowest score, the earliest of equals; None if nothing was scored."""
    ok = [e for e in evaluated if e.status == "ok"]
    return min(ok, key=lambda e: e.score) if ok else None


def best_so_far(known: Sequence[Evaluated]) -> list[tuple[int, float]]:
    """(trial, best score until then), from the first scored trial on."""
    points: list[tuple[int, float]] = []
    best = float("inf")
    for number, evaluated in enumerate(known):
        best = min(best, evaluated.score)
        if np.isfinite(best):
            points.append((number, best))
    return points
