"""What strategies share: reading `known` as members of the space, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fewstep.search.strategies import Evaluated
from fewstep.space.protocol import Domain
from fewstep.space.step_choices import Value


@dataclass(frozen=True)
class Member:
    """A scored member of the space in canonical form, with its parameters."""

    schedule: Any
    params: dict[str, Value]
    score: float
    told: int


def members(domain: Domain, known: Sequence[Evaluated], limit: int | None = None) -> list[Member]:
    """The finite results that lie in the space, best first, ties in told order.

    Args:
        domain: the space; results of another NFE are not members.
        known: results in told order.
        limit: stop after the best this many.
    """
    usable = [(r.score, i) for i, r in enumerate(known) if r.status == "ok" and isfinite(r.score)]
    found: list[Member] = []
    for score, told in sorted(usable):
        member = _as_member(domain, known[told].schedule)
        if member is not None:
            found.append(Member(*member, float(score), told))
            if len(found) == limit:
                break
    return found


_MEMO: dict[int, tuple[Domain, object, tuple[Any, dict[str, Value]] | None]] = {}
_MEMO_SIZE = 8192


def _as_member(domain: Domain, schedule: Any) -> tuple[Any, dict[str, Value]] | None:
    """Canonical form and parameters, or None outside the space; remembered per object."""
    held = _MEMO.get(id(schedule))
    if held is not None and held[1] is schedule and held[0] == domain:
        return held[2]
    made = None
    if domain.contains(schedule) is None:  # any kind of schedule: the domain decides
        params = domain.params(schedule)
        made = (domain.from_params(params), params)
    if len(_MEMO) >= _MEMO_SIZE:
        _MEMO.clear()
    _MEMO[id(schedule)] = (domain, schedule, made)
    return made
