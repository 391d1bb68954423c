"""The search space of plans: what is spent where, at a fixed cost.

A plan says of every call its sort: guided or not, of which network, and whether it runs beside the
call before it (a stage, `space.costs`). Members are programs; two of one plan are one member, as
the numbers are fitted, not searched. `program` starts such a fit: a named solver with a step for
each stage, its calls given their company (`space.growing.widened`) and their sorts.

Calls are chosen one after the other while the cheapest sort still fits into the cost, so that any
values mean a member, and a dear call takes the place of two cheap ones. ONE table names the
decisions of a call; parameters, membership and moves read it.

Rivals are the named solvers that cost as much: fully guided, guided in an interval of noise levels
only (Kynkaanniemi et al. 2024, arXiv 2404.07724), or on one of the model's other networks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from fewstep.space.baselines import baseline, named
from fewstep.space.choices import Parameter, Value
from fewstep.space.costs import Prices, call_sorts, networks_of, pattern, stages
from fewstep.space.errors import ScheduleError
from fewstep.space.growing import widened
from fewstep.space.noise import NoiseSchedule
from fewstep.space.program import Program, ProgramSchedule
from fewstep.space.protocol import Domain

__all__ = ["DECISIONS", "Plan", "PlanDomain", "PlannedCall", "plan_of", "rivals", "widened_to"]

_EPS = 1e-9
_BINS = 6  # of a plan's course, for its features
SHIFTS = (0.0, 0.5, 1.0)
"""Where a guidance interval begins, as a share of the calls that it leaves unguided."""


@dataclass(frozen=True)
class PlannedCall:
    """One call of a plan; the neutral values are those of every named solver."""

    guided: bool = True
    network: str = ""
    beside: bool = False


Plan = tuple[PlannedCall, ...]


@dataclass(frozen=True)
class PlanDecision:
    """A decision of a call.

    Args:
        name: field of `PlannedCall`.
        options: the values a domain allows, the neutral one first; it is open with two or more.
    """

    name: str
    options: Callable[[PlanDomain], tuple[Value, ...]]


DECISIONS = (
    PlanDecision("guided", lambda d: d.guided if d.scale is not None else (False,)),
    PlanDecision("network", lambda d: d.networks),
    PlanDecision("beside", lambda d: (False, True) if d.width > 1 else (False,)),
)


@dataclass(frozen=True)
class PlanDomain(Domain):
    """All plans of a cost.

    Args:
        noise: the noise schedule.
        cost: what the calls of a member cost together, at most; less than the cheapest is left.
        prices: of the sorts.
        scale: guidance scale of guided calls, where a fit begins; None for a model without.
        guided: whether calls may be guided, the preferred first.
        networks: names of networks that calls may ask, the preferred first; "" is the model's own.
        width: most calls of a stage.
        start: named solver that fits begin from.

    Raises:
        ScheduleError: a space without members, or a solver that is none.
    """

    noise: NoiseSchedule
    cost: float
    prices: Prices = field(default_factory=Prices)
    scale: float | None = None
    guided: tuple[bool, ...] = (True, False)
    networks: tuple[str, ...] = ("",)
    width: int = 1
    start: str = "unipc2-bh2/quadratic/low"
    _members: dict[Plan, ProgramSchedule] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        for decision in DECISIONS:
            options = decision.options(self)
            if not options or len(set(options)) < len(options):
                raise ScheduleError(f"space.{decision.name} {list(options)}: name each value once")
        if not isinstance(self.width, int) or self.width < 1:
            raise ScheduleError(f"space.width {self.width!r}: a stage has one call or more")
        if self.nfe < 1:
            raise ScheduleError(
                f"cost {self.cost:g} does not pay for one call of {self._cheapest:g}: raise it"
            )
        self.from_params({})

    @cached_property
    def _sorts(self) -> tuple[tuple[PlannedCall, float], ...]:
        """Every sort of call and its price, the neutral one first."""
        options = [decision.options(self) for decision in DECISIONS]
        made = [PlannedCall(*values) for values in product(*options)]  # type: ignore[arg-type]
        return tuple((call, self.price(call)) for call in made)

    def price(self, call: PlannedCall) -> float:
        """What a call costs."""
        return self.prices.of(guided=call.guided, network=call.network, beside=call.beside)

    @property
    def _cheapest(self) -> float:
        return min(price for call, price in self._sorts if not call.beside)

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Most calls that a member can have."""
        most = 1 + max(0.0, self.cost - self._cheapest) / min(price for _, price in self._sorts)
        return int(most + _EPS) if self.cost + _EPS >= self._cheapest else 0

    def with_nfe(self, nfe: int) -> PlanDomain:
        """The same decisions; plans are compared at equal cost, whatever their calls."""
        return self

    def _allowed(self, plan: Sequence[PlannedCall]) -> list[PlannedCall]:
        """The sorts that the next call may have, the neutral one first."""
        left = self.cost - sum(map(self.price, plan)) + _EPS
        run = 0
        for call in reversed(plan):
            run += 1
            if not call.beside:
                break
        joins = 0 < run < self.width
        return [c for c, price in self._sorts if price <= left and (joins or not c.beside)]

    def settled(self, wanted: Callable[[int], Mapping[str, Any]]) -> Plan:
        """The plan nearest to the values wanted of each call, by decision; missing is neutral."""
        plan: list[PlannedCall] = []
        neutral = {d.name: d.options(self)[0] for d in DECISIONS}
        while allowed := self._allowed(plan):
            values = neutral | dict(wanted(len(plan)))
            plan.append(min(allowed, key=lambda c: sum(getattr(c, n) != v for n, v in values.items())))  # noqa: E501  # fmt: skip
        return tuple(plan)

    def _nearest(self, plan: Sequence[PlannedCall]) -> Plan:
        """The plan of this cost that is nearest to another; what it lacks is neutral."""
        return self.settled(lambda c: vars(plan[c]) if c < len(plan) else {})

    def _plan(self, schedule: ProgramSchedule) -> Plan:
        """The plan of a program; a model without guidance guides no call."""
        return plan_of(schedule, guided=self.scale is not None)

    def member(self, plan: Plan) -> ProgramSchedule:
        """The program that a plan's fit begins from.

        Raises:
            ScheduleError: the named solver does not exist at so many calls.
        """
        if plan not in self._members:
            self._members[plan] = self._made(plan)
        return self._members[plan]

    def _made(self, plan: Plan) -> ProgramSchedule:
        widths: list[int] = []
        for call in plan:
            if call.beside:
                widths[-1] += 1
            else:
                widths.append(1)
        made = widened(self.narrow(len(widths)), widths)
        guidance = None
        if self.scale is not None:
            scales = [self.scale if call.guided else 1.0 for call in plan]
            guidance = torch.tensor(scales, dtype=torch.float64)
        names = tuple(call.network for call in plan)
        program = replace(made.program, guidance=guidance, network=names if any(names) else None)
        told = {"plan": pattern(program, guided=False)}
        return made.model_copy(update={"program": program, "provenance": told})

    def narrow(self, depth: int) -> ProgramSchedule:
        """The named solver with a call for each of `depth` stages."""
        try:
            return ProgramSchedule.of(baseline(self.start, self.noise, depth))
        except ScheduleError as error:
            raise ScheduleError(f"space.start: {error}") from None

    def narrowed(self, member: ProgramSchedule) -> ProgramSchedule | None:
        """The named solver with a call for each stage of a member, of its sort.

        None where every stage has one call.
        """
        program = member.program
        if program.depth == program.nfe:
            return None
        heads = [stage[0] for stage in stages(program)]
        narrow = self.narrow(len(heads))
        guidance = None if program.guidance is None else program.guidance[heads]
        names = tuple(networks_of(program)[c] for c in heads)
        single = replace(narrow.program, guidance=guidance, network=names if any(names) else None)
        return narrow.model_copy(update={"program": single})

    def from_params(self, values: Mapping[str, Any]) -> ProgramSchedule:
        """The member nearest to any values."""
        by_call: dict[int, dict[str, Any]] = {}
        for name, value in values.items():
            stem, _, index = name.rpartition("_")
            if index.isdigit():
                by_call.setdefault(int(index), {})[stem] = value
        return self.member(self.settled(lambda c: by_call.get(c, {})))

    def contains(self, schedule: object) -> str | None:
        """Why a schedule is not a member, or None if it is."""
        if not isinstance(schedule, ProgramSchedule):
            return f"a {type(schedule).__name__} is no fitted program"
        if schedule.noise != self.noise:
            return "its noise schedule is another"
        plan = self._plan(schedule)
        if self._nearest(plan) != plan:
            told = pattern(schedule.program, guided=self.scale is not None)
            return f"its calls {told} are no plan of cost {self.cost:g}"
        return None

    def _values(self, schedule: ProgramSchedule) -> dict[str, Value]:
        """The open decisions of every call that has a choice."""
        plan = self._plan(schedule)
        found: dict[str, Value] = {}
        for c, call in enumerate(plan):
            allowed = self._allowed(plan[:c])
            for decision in DECISIONS:
                if len({getattr(other, decision.name) for other in allowed}) > 1:
                    found[f"{decision.name}_{c}"] = getattr(call, decision.name)
        return found

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter a member may have, call by call."""
        return tuple(
            Parameter(f"{d.name}_{c}", "choice", choices=options, neutral=options[0])
            for c in range(self.nfe)
            for d in DECISIONS
            if len(options := d.options(self)) > 1 and (c > 0 or d.name != "beside")
        )

    def encode(self, schedule: ProgramSchedule) -> np.ndarray:
        """Calls and stages, and what is spent of each kind along the way, in `_BINS` parts.

        Plans of different lengths are alike where they spend alike at the same share of stages.
        """
        plan = self._plan(schedule)
        depth = sum(not call.beside for call in plan)
        bins = np.zeros((_BINS, 3))
        weight, at = np.zeros(_BINS), -1
        for call in plan:
            at += not call.beside
            low, high = at / depth * _BINS, (at + 1) / depth * _BINS
            share = np.clip(np.minimum(high, np.arange(1, _BINS + 1))
                            - np.maximum(low, np.arange(_BINS)), 0, None)  # fmt: skip
            cheap = self.prices.of(guided=False, network=call.network)
            bins += share[:, None] * np.array([call.guided, cheap, call.beside], dtype=float)
            weight += share
        first, last = plan[0], plan[-1]
        ends = [first.guided, last.guided, len(first.network) > 0, len(last.network) > 0]
        parts = [[len(plan) / self.nfe, depth / self.nfe], ends, (bins / weight[:, None]).ravel()]
        return np.concatenate([np.asarray(p, dtype=np.float64) for p in parts])

    def sample(self, rng: np.random.Generator) -> ProgramSchedule:
        """A random member: every sort that a call may have is as likely."""
        plan: list[PlannedCall] = []
        while allowed := self._allowed(plan):
            plan.append(allowed[int(rng.integers(len(allowed)))])
        return self.member(tuple(plan))

    def mutate(
        self,
        schedule: ProgramSchedule,
        rng: np.random.Generator,
        *,
        rates: Mapping[str, float] | None = None,
        scale: float = 0.1,
    ) -> ProgramSchedule:
        """A changed copy, never of the same plan where the space has another.

        A call changes its sort, trades places with the next, goes, or is made twice; the end of
        the plan then makes up for the cost.
        """
        before = self._plan(schedule)
        for _ in range(50):
            plan = list(before)
            for _ in range(1 + int(rng.random() < 0.3)):
                c = int(rng.integers(len(plan)))
                move = int(rng.integers(4))
                if move == 0:
                    plan[c] = self._sorts[int(rng.integers(len(self._sorts)))][0]
                elif move == 1 and c + 1 < len(plan):
                    plan[c], plan[c + 1] = plan[c + 1], plan[c]
                elif move == 2 and len(plan) > 1:
                    del plan[c]
                else:
                    plan.insert(c, plan[c])
            made = self._nearest(plan)
            if made != before:
                return self.member(made)
        return self.member(before)

    def crossover(
        self, a: ProgramSchedule, b: ProgramSchedule, rng: np.random.Generator
    ) -> ProgramSchedule:
        """A child that has the first calls of one member, and the last ones of another."""
        first, second = self._plan(a), self._plan(b)
        cut = int(rng.integers(len(first) + 1))
        joined = [*first[:cut], *second[round(cut / len(first) * len(second)) :]]
        return self.member(self._nearest(joined))

    def adopt(self, schedule: object) -> list[ProgramSchedule]:
        """The member that has the calls of a program, as far as the cost goes; none of others."""
        if not isinstance(schedule, ProgramSchedule) or schedule.noise != self.noise:
            return []
        return [self.member(self._nearest(self._plan(schedule)))]


def widened_to(plan: Program, narrow: ProgramSchedule, width: int) -> ProgramSchedule:
    """A schedule with the first `width` - 1 calls of each stage of a plan, given the next one."""
    widths, calls = list[int](), list[int]()
    for stage in stages(plan):
        kept = min(len(stage), width - 1)
        widths += [*[1] * (kept - 1), 1 + (len(stage) > kept)]
        calls += stage[:width]
    wide = widened(narrow, widths)
    asked, found = plan.guidance, wide.program.guidance
    if asked is not None:
        asked = asked[calls]
        if found is not None:  # a guided call beside an unguided one, too
            asked = torch.where((asked != 1) & (found != 1), found, asked)
    network = plan.network and tuple(plan.network[c] for c in calls)
    program = replace(wide.program, guidance=asked, network=network)
    return wide.model_copy(update={"program": program})


def plan_of(schedule: ProgramSchedule, *, guided: bool = True) -> Plan:
    """The plan of a program; `guided` where it leaves the scale open."""
    return tuple(PlannedCall(*sort) for sort in call_sorts(schedule.program, guided=guided))


def rivals(domain: PlanDomain) -> dict[str, Any]:
    """Every named solver at the domain's cost, by its name and its calls."""
    found: dict[str, Any] = {}
    solvers: dict[int, dict[str, Any]] = {}
    for network in domain.networks:
        for scales in _intervals(domain.cost, domain.prices, domain.scale, network):
            calls = len(scales)
            if calls not in solvers:
                solvers[calls] = named(domain.noise, calls)
            for name, schedule in solvers[calls].items():
                made = ProgramSchedule.of(schedule)
                guidance = None if domain.scale is None else torch.tensor(scales).double()
                names = (network,) * calls if network else None
                program = replace(made.program, guidance=guidance, network=names)
                short_name = pattern(program, guided=False)
                found[f"{name}/{short_name}"] = made.model_copy(update={"program": program})
    return found


def _intervals(
    cost: float, prices: Prices, scale: float | None, network: str
) -> Iterator[list[float]]:
    """The scales of every call, for each number of guided calls and places of the interval."""
    dear, cheap = (prices.of(guided=g, network=network) for g in (True, False))
    most = int(cost / dear + 1e-9) if scale is not None else 0
    for guided in range(most, 0 if scale is not None else -1, -1):
        single = int((cost - guided * dear) / cheap + 1e-9)
        for before in sorted({round(shift * single) for shift in SHIFTS}):
            if guided + single:
                after = single - before
                yield [1.0] * before + [scale or 1.0] * guided + [1.0] * after
