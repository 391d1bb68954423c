"""What the calls of a program cost, and which of them run side by side.

A guided call asks the network twice (classifier-free guidance, D = D_null + w (D_cond - D_null)),
one at scale 1 asks it once: it is the conditional model alone. A call may name another network, or
another setting of one, that the Denoiser offers at a price of its own.

A *stage* is a run of calls whose states do not use one another's outputs: zeros on the diagonal
of the program's b, and beside it where a stage is wider than two. A sampler may ask the calls of a
stage as one batch. A program has `nfe` calls and `depth` stages; without such zeros both are
equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fewstep.space.errors import ScheduleError

if TYPE_CHECKING:
    from fewstep.space.program import Program

__all__ = [
    "Prices",
    "call_costs",
    "call_sorts",
    "guided_calls",
    "networks_of",
    "pattern",
    "stages",
]


@dataclass(frozen=True)
class Prices:
    """What one call of each sort costs, in any unit.

    Args:
        guided: a call at a guidance scale other than 1.
        unguided: a call at scale 1.
        beside: share of its price that a call costs which runs beside the first of its stage; 1
            counts network evaluations, less counts time where the processor is not busy.
        networks: factor of each network or setting by name; the model's own, "", has 1.

    Raises:
        ScheduleError: a price that is not positive.
    """

    guided: float = 2.0
    unguided: float = 1.0
    beside: float = 1.0
    networks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {"guided": self.guided, "unguided": self.unguided, "beside": self.beside}
        for name, price in (named | dict(self.networks)).items():
            if not price > 0:
                raise ScheduleError(f"the price of {name} is {price!r}: it must be positive")

    def of(self, *, guided: bool, network: str = "", beside: bool = False) -> float:
        """The price of one call.

        Raises:
            ScheduleError: a network without a price.
        """
        factor = self.networks.get(network) if network else self.networks.get("", 1.0)
        if factor is None:
            raise ScheduleError(
                f"network {network!r} has no price: the prices know "
                f"{', '.join(map(repr, self.networks)) or 'the model alone'}"
            )
        return (self.guided if guided else self.unguided) * factor * (self.beside if beside else 1)


def stages(program: Program) -> list[range]:
    """The calls of each stage, as long as can be, in order; of stacked programs, those of all."""
    found, first = [], 0
    for c in range(1, program.nfe + 1):
        uses = c == program.nfe or bool((program.b[..., c - 1, first:c] != 0).any())
        if uses:
            found.append(range(first, c))
            first = c
    return found


def guided_calls(program: Program, *, guided: bool = True) -> list[bool]:
    """Which calls of one program are guided.

    Args:
        program: one program.
        guided: whether the caller guides those of a program that sets no scales.
    """
    if program.guidance is None:
        return [guided] * program.nfe
    return [scale != 1.0 for scale in program.guidance.tolist()]


def networks_of(program: Program) -> tuple[str, ...]:
    """The network of each call of one program; "" is the model's own."""
    return program.network or ("",) * program.nfe


def call_sorts(program: Program, *, guided: bool = True) -> list[tuple[bool, str, bool]]:
    """Of each call of one program: guided or not, its network, beside the first of its stage."""
    beside = [c != stage[0] for stage in stages(program) for c in stage]
    names = networks_of(program)
    return list(zip(guided_calls(program, guided=guided), names, beside, strict=True))


def call_costs(program: Program, prices: Prices, *, guided: bool = True) -> list[float]:
    """The price of each call of one program; see `guided_calls`."""
    sorts = call_sorts(program, guided=guided)
    return [prices.of(guided=g, network=n, beside=b) for g, n, b in sorts]


def pattern(program: Program, *, guided: bool = True) -> str:
    """The calls of a program in short, such as "uGGGu", "u(GG)G" or "u[small]GG".

    G is a guided call and u an unguided one, a stage of several calls stands in parentheses, and
    another network than the model's own in brackets behind its call.
    """
    names = [
        ("G" if g else "u") + (f"[{n}]" if n else "")
        for g, n in zip(guided_calls(program, guided=guided), networks_of(program), strict=True)
    ]
    parts = ["".join(names[c] for c in stage) for stage in stages(program)]
    return "".join(
        f"({p})" if len(s) > 1 else p for p, s in zip(parts, stages(program), strict=True)
    )
