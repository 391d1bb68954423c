"""What calls of each sort cost by the clock, on this machine at one batch size.

The unit is an unguided call of the model's own network. Network evaluations are another measure
(a guided call asks for two): by the clock a batch twice as large can cost next to nothing where
the processor idles, and a smaller network less or more than its share of the parameters.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from fewstep.samplers.problems import AnyProblem, Problem
from fewstep.space.costs import Prices

__all__ = ["measured_prices", "priced", "prices_in_words"]

TURNS = 9
"""Times that each sort is asked, in turn, so that other work on the machine meets all of them."""
LEAST = 0.05  # of a price: whatever a clock says, a call costs something


@torch.no_grad()
def measured_prices(problem: Problem, batch: int) -> Prices:
    """Prices by the least wall time of several, to two digits.

    Args:
        problem: its denoiser's networks are asked by name; without guidance no call is guided, and
            the price of a guided one stays 2.
        batch: samples of a call; a call beside another makes it twice as many.
    """
    networks = getattr(problem.denoiser, "networks", {})
    guided = problem.guidance not in (None, 1)
    asked: dict[str, tuple[int, float | None, str]] = {
        "unguided": (batch, None if problem.guidance is None else 1.0, "")
    }
    if guided:
        asked["guided"] = (batch, problem.guidance, "")
    asked["two"] = (2 * batch, asked["unguided"][1], "")
    asked |= {f"[{name}]": (batch, asked["unguided"][1], name) for name in networks}
    least = dict.fromkeys(asked, math.inf)
    for turn in range(TURNS + 1):
        for sort, question in asked.items():
            seconds = _seconds(problem, *question)
            if turn > 0:  # the first is a warm-up
                least[sort] = min(least[sort], seconds)

    def price(seconds: float) -> float:
        return max(LEAST, float(f"{seconds / least['unguided']:.2g}"))

    return Prices(
        guided=price(least["guided"]) if guided else 2.0,
        beside=price(least["two"] - least["unguided"]),
        networks={name: price(least[f"[{name}]"]) for name in networks},
    )


def _seconds(problem: Problem, batch: int, guidance: float | None, network: str) -> float:
    """Wall time of one call in the middle of the times."""
    denoiser = problem.denoiser
    device = torch.device(getattr(denoiser, "device", None) or "cpu")
    x = torch.randn(batch, *problem.shape, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.full((batch,), sum(denoiser.noise.t_range) / 2, dtype=torch.float64, device=device)
    cond = None
    if problem.cond is not None:
        cond = {k: v.to(device) for k, v in problem.cond(torch.arange(batch)).items()}
    named = {"network": network} if network else {}
    begun = time.perf_counter()
    out = denoiser(x, t, cond=cond, guidance=guidance, **named)
    float(out.flatten()[0])  # waits for the device
    return time.perf_counter() - begun


def priced(prices: Prices, problem: AnyProblem) -> Prices:
    """The prices, with those of the networks that the problem's denoiser offers."""
    offered = getattr(getattr(problem, "denoiser", None), "networks", {})
    return replace(prices, networks={**offered, **prices.networks})


def prices_in_words(prices: Prices, batch: int) -> str:
    """One line, e.g. "prices measured at batch 16: guided 1.9, unguided 1, beside 0.4 of it"."""
    told = [f"guided {prices.guided:g}", f"unguided {prices.unguided:g}"]
    told.append(f"{prices.beside:g} of it beside another")
    told += [f"network {name} {price:g} times" for name, price in prices.networks.items() if name]
    return f"prices measured at batch {batch}: {', '.join(told)}"
