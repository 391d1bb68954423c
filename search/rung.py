"""The search at one NFE: generations proposed, scored, told and kept in the order proposed.

Generation 0 is the named solvers and the warm start. Generation g is proposed from the results of
generations up to g - lag, with random numbers of f(seed, nfe, g). What the store holds is not
proposed again; a generation of which it holds a part is, and only what is missing is added. So a
resumed search, and one that is given more budget, ends with the trials of one that ran through.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.search.scoring import SEARCH, Race, Waiting
from fewstep.search.stages.tasks import PlanFit
from fewstep.search.store import Kept
from fewstep.search.strategies import Evaluated, Proposal, ranked
from fewstep.search.work import Result
from fewstep.space.errors import StudyError
from fewstep.space.plans import PlanDomain

if TYPE_CHECKING:
    from fewstep.search.run import Search

REFINED = 1_000_000
"""The number of the generation that holds refined schedules; no proposals follow from it."""


@dataclass
class _Generation:
    """Proposals under evaluation: those paid for, their new schedules, and those of all."""

    number: int
    paid: list[Proposal]
    size: int
    kept: list[Kept]
    fresh: dict[str, Any]
    every: list[Any]
    batch: Waiting | None


class Rung:
    """One NFE of a search.

    Args:
        run: the search.
        nfe: network calls.
        earlier: results of other NFEs that the strategy may learn from.
        limit: candidates that the budget pays for; None for a budget that shows as it goes.
        deadline: clock at which to stop proposing, for a budget in seconds.

    `known` holds every trial in the order told, `costs` what each one cost in network evaluations.
    """

    def __init__(
        self,
        run: Search,
        nfe: int,
        earlier: Sequence[Evaluated],
        limit: int | None,
        deadline: float | None,
    ) -> None:
        self.nfe, self._run, self._limit, self._deadline = nfe, run, limit, deadline
        self._search, self._solvers = run.config.search, run.solvers[nfe]
        self.name = f"{self._search.word} {nfe}"
        self._proposer = run.proposer(nfe, earlier)
        self._trials = run.store.trials(nfe, domain=run.domains[nfe])
        self._kept: dict[int, list[Kept]] = {}
        for kept in self._trials.kept():
            self._kept.setdefault(kept.generation, []).append(kept)
        self._calls = run.config.calls_of(nfe)
        statistic = run.evaluator.objective.statistic
        self._race = Race(run.scorer, SEARCH, self._search.levels, statistic)
        self._results: dict[str, Result] = {}
        self._fitted: dict[str, tuple[Any, int]] = {}
        self._seen: set[str] = set()
        self._proposed = self._named_count = 0
        self.known: list[Evaluated] = []
        self.failures: list[str] = []
        self.costs: list[int] = []

    def run(self) -> None:
        """Run to the end of the budget."""
        waiting: deque[_Generation] = deque()
        number = 0
        while True:
            due = max(number - self._search.lag, 0)  # the named solvers are always known
            while number > 0 and waiting and waiting[0].number <= due:
                self._tell(waiting.popleft())
            generation = self._next(number)
            if generation is None:
                break
            waiting.append(generation)
            number += 1
        while waiting:
            self._tell(waiting.popleft())
        if not any(e.status == "ok" for e in self.known):
            reason = self._results[self.known[0].schedule.digest].message
            raise StudyError(
                f"{self._search.word} {self.nfe}: none of {len(self.known)} candidates could be "
                f"scored ({reason}): check the model"
            )
        self._settle_stages()

    def _next(self, number: int) -> _Generation | None:
        """A generation on its way; None where the budget ends."""
        if number > 0 and self._proposer is None:
            return None
        kept = self._kept.get(number, [])
        size = self._search.generation
        if number == 0:
            warm = self._run.warm.get(self.nfe, ())
            size = kept[0].size if kept else len(self._solvers) + len(warm)
        paid = size if self._limit is None else min(size, self._limit - self._proposed)
        if paid <= 0 or (number > 0 and not kept and self._spent()):
            return None
        proposals = self._proposals(number, kept, paid)
        if number == 0:
            self._named_count = min(len(self._solvers), paid)
        return self._start(number, proposals, paid, kept)

    def _spent(self) -> bool:
        """Whether a budget that shows as the search goes is used up."""
        if self._deadline is not None and self._run.clock() > self._deadline:
            return True
        return self._calls is not None and sum(self.costs) >= self._calls

    def _proposals(self, number: int, kept: list[Kept], paid: int) -> list[Proposal]:
        """All of a generation; those that are kept as they are kept."""
        held = [Proposal(self._asked(k), k.source, dict(k.note)) for k in kept]
        if number == 0:
            if len(held) >= paid:
                return held
            named = [Proposal(schedule, name) for name, schedule in self._solvers.items()]
            return held + [*named, *self._run.warm.get(self.nfe, ())][len(held) :]
        assert self._proposer is not None
        if len(held) >= paid and not self._proposer.replays:
            return self._proposer.follow(held)
        asked = self._proposer.propose(number, self._run.pool.tend)
        same = [dataclasses.replace(h, trial=a.trial) for h, a in zip(held, asked, strict=False)]
        return same + asked[len(held) :]

    def _start(
        self, number: int, proposals: list[Proposal], paid: int, kept: list[Kept]
    ) -> _Generation:
        fresh: dict[str, Any] = {}
        needed = 0
        for k, proposal in enumerate(proposals):
            key = self._key(proposal.schedule, number)
            if key not in self._seen:
                fresh.setdefault(key, proposal.schedule)
            if k < paid:
                needed = len(fresh)
        size, proposals = len(proposals), proposals[:paid]
        self._proposed += len(proposals)
        if self._plans and 0 < number < REFINED and len(kept) < len(proposals):
            fresh = self._fit(dict(list(fresh.items())[:needed]))
        needed_only, every = dict(list(fresh.items())[:needed]), list(fresh.values())
        made = _Generation(number, proposals, size, kept, needed_only, every, None)
        if len(kept) < len(proposals):
            made.batch = self._race.start(every, needed)
        self._seen |= set(made.fresh)
        return made

    def _asked(self, kept: Kept) -> Any:
        """What was proposed where a kept schedule is what a plan became."""
        schedule, domain = kept.schedule, self._run.domains[self.nfe]
        if "plan_calls" not in kept.note:
            return schedule
        member = domain.canonical(schedule)
        key = self._key(member, kept.generation)
        self._fitted[key] = schedule, int(kept.note["plan_calls"])
        return member

    @property
    def _plans(self) -> bool:
        """Whether candidates are plans, which are fitted before they are scored."""
        return isinstance(self._run.domains[self.nfe], PlanDomain)

    def _key(self, schedule: Any, number: int) -> str:
        """What tells a candidate from others; a plan is more than the solver it begins as."""
        plan = "plan " if self._plans and 0 < number < REFINED else ""
        return f"{plan}{schedule.digest}"

    def _fit(self, fresh: dict[str, Any]) -> dict[str, Any]:
        """Plans as the programs that a short fit makes of them."""
        domain, run = self._run.domains[self.nfe], self._run
        todo = {key: s for key, s in fresh.items() if key not in self._fitted}
        works = [PlanFit.of(run.config, domain, s, run.mean) for s in todo.values()]
        for (key, member), made in zip(todo.items(), run.pool.map(works), strict=True):
            run.display.advance(made.calls)
            self._fitted[key] = (member if made.message else made.schedule), made.calls
        return {key: self._fitted[key][0] for key in fresh}

    def _scored(self, generation: _Generation) -> list[Result]:
        """The results of a generation's new schedules."""
        fresh, batch = generation.fresh, generation.batch
        if batch is None:
            kept: dict[str, Result] = {}
            for k, proposal in zip(generation.kept, generation.paid, strict=False):
                kept.setdefault(self._key(proposal.schedule, generation.number), k.result)
            results = [kept[key] for key in fresh]
            for r in results:  # the race goes on against the best of all samples
                best = self._race.best
                whole = r.status == "ok" and r.samples == self._search.samples
                if whole and (best is None or r.score < best.score):
                    self._race.best = r
            return results
        return self._race.finish(generation.every, batch, len(fresh))

    def _tell(self, generation: _Generation) -> None:
        results = self._scored(generation)
        if generation.batch is not None:
            results = [
                dataclasses.replace(r, calls=r.calls + self._fitted.get(key, (None, 0))[1])
                for key, r in zip(generation.fresh, results, strict=True)
            ]
        self._results |= dict(zip(generation.fresh, results, strict=True))
        unpaid = set(generation.fresh)
        for k, proposal in enumerate(generation.paid):
            key = self._key(proposal.schedule, generation.number)
            result = self._results[key]
            if key not in unpaid:
                result = dataclasses.replace(result, calls=0, seconds=0.0)
            unpaid.discard(key)
            if k < len(generation.kept):
                kept = generation.kept[k]
            else:
                kept = self._keep(generation, proposal, result)
                self._run.pool.tend()
            self.known.append(kept.evaluated)
            self.costs.append(kept.result.calls)
            named = generation.number == 0 and self._plans  # not fitted: no word on a plan
            if self._proposer is not None and generation.number < REFINED and not named:
                stopped = bool(kept.note.get("stopped"))
                self._proposer.tell(kept.evaluated, proposal.trial, stopped)
        if generation.number == 0 and self._plans:  # which rivals are good says which plans may be
            self._proposer = self._run.proposer(self.nfe, self.known)
        self._say(generation, results)

    def _keep(self, generation: _Generation, proposal: Proposal, result: Result) -> Kept:
        fitted = self._fitted.get(self._key(proposal.schedule, generation.number))
        schedule = fitted[0] if fitted else proposal.schedule
        note = dict(proposal.note) | ({"plan_calls": fitted[1]} if fitted else {})
        if result.status == "ok" and result.samples < self._search.samples:
            note["stopped"] = True
        expressed = proposal.trial is not None and fitted is None
        where = proposal.source, generation.number, generation.size
        kept = Kept(schedule, result, *where, note, self._run.clock(), expressed)
        self._trials.add(kept)
        return kept

    def _say(self, generation: _Generation, results: Sequence[Result]) -> None:
        numbers = _numbers([p.note for p in generation.paid])
        levels, per_sample = self._search.levels, self._run.problem.per_sample
        full = per_sample * self.nfe * levels[-1] * len(results)
        if len(levels) > 1 and full:
            numbers["calls_saved"] = 1 - sum(r.calls for r in results) / full
        self._run.on_progress(self, numbers)

    def _settle_stages(self) -> None:
        """Tell what stages have left; those of a smaller budget stay as candidates."""
        self._told = len(self.known)
        every = self._kept.get(REFINED, [])
        self._now = [k for k in every if k.note.get("after") == self._told]
        for kept in every:
            if kept in self._now and not self.refined_before:
                continue  # cut short: told again with the rest
            self.known.append(kept.evaluated)
            self.costs.append(kept.result.calls)
            digest = kept.schedule.digest
            self._results.setdefault(digest, kept.result)
            self._seen.add(digest)

    @property
    def refined_before(self) -> bool:
        """Whether the stage has been run on all these trials before."""
        return bool(self._now) and len(self._now) == self._now[0].size

    def extend(self, proposals: list[Proposal]) -> list[Proposal]:
        """Score, tell and keep refined schedules; those kept from before where there are some."""
        if self.refined_before:
            return [Proposal(k.schedule, k.source, dict(k.note)) for k in self._now]
        noted = [dataclasses.replace(p, note={**p.note, "after": self._told}) for p in proposals]
        if noted:
            self._tell(self._start(REFINED, noted, len(noted), self._now))
        return proposals

    def named_known(self) -> list[Evaluated]:
        """The named solvers told so far (generation 0; a small budget may not pay for all)."""
        return self.known[: self._named_count]


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
    return next(iter(ranked(evaluated)), None)


def best_so_far(known: Sequence[Evaluated]) -> list[tuple[int, float]]:
    """(trial, best score until then), from the first scored trial on."""
    points: list[tuple[int, float]] = []
    best = float("inf")
    for number, evaluated in enumerate(known):
        best = min(best, evaluated.score)
        if np.isfinite(best):
            points.append((number, best))
    return points
