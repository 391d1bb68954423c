"""Does a schedule found for one setting serve another? Other classes, guidance, network, copies.

    python -P -m fewstep.experiments.benchmarks.transfer runs/demo/schedules/nfe05.json

A schedule found on the digits model at guidance 1 is scored where it was not found: on one class
alone, at other guidance scales, on the lighter network trained on the same data, and on a copy of
the network fine-tuned for --steps on the digits 5 to 9 only. Ratios of geometric mean errors, with
95 % intervals, to the best named solver of that place (chosen there on 128 other samples), on
--fresh samples; below 1 the schedule is still the better one to take.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.experiments.benchmarks.search import Landscape
from fewstep.experiments.models import digits
from fewstep.experiments.models.train_digits import load_data, velocity_error
from fewstep.predictors.yardstick import geometric_ratio, level
from fewstep.samplers import Problem, from_model
from fewstep.space import load_schedule
from fewstep.space.baselines import named

FIRST = 4_000_000
"""Index of the first sample: far from what searches and other benchmarks use."""


def fine_tuned(steps: int, batch: int = 128, rate: float = 3e-4) -> digits.DigitsNet:
    """A copy of the shipped network after `steps` more steps on the digits 5 to 9."""
    net = copy.deepcopy(digits.load_network()).train().requires_grad_(True)
    images, labels, _, _ = load_data()
    images, labels = images[labels >= 5], labels[labels >= 5]
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate)
    first, last = digits.NOISE.t_range
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        t = last + (first - last) * torch.rand(batch, generator=generator)
        eps = torch.randn((batch, 1, 8, 8), generator=generator)
        loss = velocity_error(net, images[index], labels[index], t, eps).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def _other(net: digits.DigitsNet, **more: object) -> Problem:
    made = digits.problem()
    denoiser = from_model(net, digits.NOISE, "eps", dtype=torch.float32)
    return replace(made, denoiser=denoiser, **more)  # type: ignore[arg-type]


def _upper(index: Tensor) -> dict[str, Tensor]:
    return {"label": 5 + index % 5}


def places(steps: int) -> Iterator[tuple[str, Problem]]:
    """The settings, the one it was found at first."""
    yield "all classes, guidance 1 (where it was found)", digits.problem()
    for label in (0, 3, 8):
        yield f"the digit {label} alone", digits.problem(label=label)
    for scale in (1.5, 2.0, 3.0, 5.0, 7.5):
        yield f"guidance {scale:g}", digits.problem(scale)
    yield "the lighter network", _other(digits.load_small())
    yield f"fine-tuned on 5 to 9, {steps} steps", _other(fine_tuned(steps), cond=_upper)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("schedule", type=Path)
    parser.add_argument("--fresh", type=int, default=1024)
    parser.add_argument("--choose", type=int, default=128)
    parser.add_argument("--teacher", type=int, default=64, help="its network calls")
    parser.add_argument("--steps", type=int, default=400, help="of fine-tuning")
    a = parser.parse_args()
    found = load_schedule(a.schedule)
    print("| used on | best named there | its error | error | ratio (95 %) | 90 % q |")
    print("|---|---|---|---|---|---|")
    for place, problem in places(a.steps):
        teacher = {"teacher_calls": a.teacher}
        choose = Landscape(problem, a.choose, FIRST - a.choose, **teacher)
        solvers = named(problem.denoiser.noise, found.nfe)
        scores = [level(e, "geometric") for e in choose.per_sample(list(solvers.values()))]
        best = list(solvers)[int(np.nanargmin(scores))]
        fresh = Landscape(problem, a.fresh, FIRST, **teacher)
        (there,), (here,) = fresh.per_sample([solvers[best]]), fresh.per_sample([found])
        ratio, (low, high) = geometric_ratio(here, there)
        tail = float(np.quantile(here, 0.9) / np.quantile(there, 0.9))
        errors = [f"{level(e, 'geometric'):.3g}" for e in (there, here)]
        print(f"| {place} | {best} | {errors[0]} | {errors[1]} | ", end="")
        print(f"{ratio:.3f} ({low:.3f}–{high:.3f}) | {tail:.3f} |", flush=True)


if __name__ == "__main__":
    main()
