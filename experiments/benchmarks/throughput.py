"""Candidates per second: one by one, as one batch, as one batch with shared prefixes.

    python -m fewstep.experiments.benchmarks.throughput [--model digits galaxy] [--repeats 5]

The three ways take turns in one run and CPU time is counted, so that a busy machine disturbs all
alike; medians of the repeats and their ratios are printed, with the share of network calls that
prefixes save and the peak memory of the process. One thread.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fewstep.samplers import Problem, run, run_candidates
from fewstep.samplers.asking import prefix_groups
from fewstep.space import stack
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import FewstepError


def generation(problem: Problem, nfe: int, size: int, seed: int) -> list[Any]:
    """`size` mutations of one parent: what a strategy's generation looks like to the evaluator."""
    rng = np.random.default_rng(seed)
    domain = OdeDomain(problem.denoiser.noise, nfe)
    parent = domain.sample(rng)
    return [domain.mutate(parent, rng) for _ in range(size)]


def measure(name: str, nfe: int, size: int, samples: int, repeats: int) -> dict[str, float]:
    """Median CPU seconds of the three ways, and the share of calls saved."""
    problem: Problem = importlib.import_module(f"fewstep.experiments.models.{name}").problem()
    programs = [s.program for s in generation(problem, nfe, size, seed=0)]
    together = stack(programs)
    z = torch.randn(samples, *problem.shape, generator=torch.Generator().manual_seed(0))
    cond = None if problem.cond is None else problem.cond(torch.arange(samples))
    settings: dict[str, Any] = {"cond": cond, "guidance": problem.guidance}
    ways: dict[str, Callable[[], object]] = {
        "one by one": lambda: [run(p, problem.denoiser, z, **settings) for p in programs],
        "batched": lambda: run(together, problem.denoiser, z, **settings),
        "shared": lambda: run_candidates(programs, problem.denoiser, z, **settings),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for way, work in ways.items():
                begun = time.process_time()
                work()
                if repeat > 0:  # the first round warms up
                    seconds[way].append(time.process_time() - begun)
    asked = sum(len(set(groups)) for groups in prefix_groups(together))
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return medians | {"saved": 1 - asked / (size * nfe)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["digits", "galaxy"])
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | one by one, candidates/s | batched / one by one | shared / one by one |", end=""
    )
    print(" calls saved | peak memory |\n|---|---|---|---|---|---|")
    for name in args.model:
        try:
            found = measure(name, args.nfe, args.candidates, args.samples, args.repeats)
        except FewstepError as error:
            print(f"| {name} | left out: {error} |")
            continue
        rate = args.candidates / found["one by one"]
        batched = found["one by one"] / found["batched"]
        shared = found["one by one"] / found["shared"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row = f"| {name} | {rate:.1f} | {batched:.2f} | {shared:.2f} | {found['saved']:.0%} |"
        print(f"{row} {peak:.2f} GiB |")


if __name__ == "__main__":
    main()
