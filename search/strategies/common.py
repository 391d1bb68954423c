"""What strategies share: reading `known` as members of the space, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from fewstep.search.strategies import Evaluated
from fewstep.space.domain import OdeDomain
from fewstep.space.schedule import OdeSchedule
from fewstep.space.step_choices import Value


@dataclass(frozen=True)
class Member:
    """A scored member of the space in canonical form, with its parameters."""

    schedule: OdeSchedule
    params: dict[str, Value]
    score: float
    told: int


def members(
    domain: OdeDomain, known: Sequence[Evaluated], limit: int | None = None
) -> list[Member]:
    """The finite results that lie in the space, best first, ties in told order.

    Args:
        domain: the space; results of another NFE are not members.
        known: results in told order.
        limit: stop after the best this many.
    """
    usable = [(r.score, i) for i, r in enumerate(known) if r.status == "ok" and isfinite(r.score)]
    found: list[Member] = []
    for score, told in sorted(usable):
        schedule = known[told].schedule
        if domain.contains(schedule) is None:
            params = domain.params(schedule)
            found.append(Member(domain.from_params(params), params, float(score), told))
            if len(found) == limit:
                break
    return found
