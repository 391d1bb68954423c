"""Warm starts: schedule files that join a search's first generation, after the named solvers.

A schedule of any number of calls serves every NFE, a file with only a program its own. Where a
schedule is no member of the space as it stands, the members next to it join (the domain's `adopt`:
of ODE schedules steps inserted or deleted, closed decisions neutral, times inside the space's
own), and a note says why. Such a schedule is also scored as it stands, like a named solver outside
the space, one of fewer calls with calls of weight 0 added where that is possible
(`space.growing`): a refined schedule given back loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewstep.search.config import StudyConfig
from fewstep.search.family import Family
from fewstep.search.strategies import Proposal
from fewstep.space.errors import FewstepError, ScheduleError, StudyError
from fewstep.space.files import load_schedule
from fewstep.space.growing import grown
from fewstep.space.program import ProgramSchedule
from fewstep.space.protocol import Domain
from fewstep.space.schedule import OdeSchedule


def load_warm(config: StudyConfig, family: Family) -> dict[str, Any]:
    """The schedules of search.warm by name, paths relative to the study file's folder.

    Raises:
        StudyError: a file that cannot be read, is not for this model (another kind or another
            noise schedule), or can serve no NFE of the study; one line.
    """
    found: dict[str, Any] = {}
    for name in config.search.warm:
        try:
            schedule = load_schedule(Path(config.folder) / name)
            family.check(schedule, name)
        except FewstepError as error:
            raise StudyError(f"search.warm: {error}") from None
        if isinstance(schedule, ProgramSchedule) and schedule.nfe > max(config.search.nfe):
            raise StudyError(
                f"search.warm: {name} is a fitted program of {schedule.nfe} calls, to which calls "
                "can be added but not taken away, and search.nfe names fewer: leave it out"
            )
        stem = Path(name).stem
        found[name if stem in found else stem] = schedule
    return found


def warm_start(
    schedules: Mapping[str, Any], domain: Domain, taken: Iterable[Any]
) -> list[Proposal]:
    """The candidates that schedules give at one NFE, each once.

    Args:
        schedules: by name, see `load_warm`.
        domain: the space at one NFE.
        taken: schedules that are candidates already.

    Returns:
        Candidates of source "import:NAME". Where the schedule is no member, a note says why: under
        "outside" of the schedule itself, under "adopted" of members made from it.
    """
    seen = {schedule.digest for schedule in taken}
    found = []
    for name, schedule in schedules.items():
        source, reason = f"import:{name}", domain.contains(schedule)
        note = {} if reason is None else {"adopted": reason}
        made = [Proposal(member, source, note) for member in domain.adopt(schedule)]
        itself = _at(domain.nfe, schedule)
        outside = None if itself is None else domain.contains(itself)
        if outside is not None:
            made.insert(0, Proposal(itself, source, {"outside": outside}))
        for proposal in made:
            if proposal.schedule.digest not in seen:
                seen.add(proposal.schedule.digest)
                found.append(proposal)
    return found


def _at(nfe: int, schedule: Any) -> Any:
    """The same sampler with `nfe` calls, None where there is none."""
    if getattr(schedule, "first", None) == "mean" and schedule.constant is None:
        return None
    if isinstance(schedule, OdeSchedule | ProgramSchedule) and schedule.nfe < nfe:
        try:
            return grown(schedule, nfe)
        except ScheduleError:
            return None
    return schedule if schedule.nfe == nfe else None
