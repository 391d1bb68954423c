"""What the driver costs per candidate beside the network: compile, store, propose.

    OMP_NUM_THREADS=1 python -P -m fewstep.experiments.benchmarks.driver

A search in this process on a model that costs next to nothing (the exact denoiser of one Gaussian
in two dimensions), with everything a real one has: the Optuna journal, MLflow in SQLite.
Printed per candidate, the named solvers included, in processor time of the driver's thread:
`evaluate` is the time of loop and network, `propose` the strategy's without the training of its
predictor, which is printed apart, and `driver` the rest. What the thread that writes to MLflow
spends, and waiting for a disk, is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fewstep.predictors.quality import QualityPredictor
from fewstep.samplers import Problem
from fewstep.search import run, rung, strategies, work
from fewstep.search.config import study_from_dict
from fewstep.space.noise import NoiseSchedule, VPLinear


class Gaussian:
    """The exact denoiser of x0 ~ N(0, v I)."""

    def __init__(self, noise: NoiseSchedule, v: float = 0.25) -> None:
        self.noise, self.v = noise, v

    def __call__(self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None) -> Tensor:
        """The posterior mean."""
        alpha, sigma = (f(t).to(x)[:, None] for f in (self.noise.alpha, self.noise.sigma))
        return self.v * alpha / (alpha**2 * self.v + sigma**2) * x


def problem() -> Problem:
    """The study's factory."""
    return Problem(Gaussian(VPLinear()), (2,), fingerprint="gaussian")


class DriverClock:
    """Adds up the processor time that a thread spends in a function, while the search runs."""

    def __init__(self, search: DriverClock | None = None) -> None:
        self.seconds, self.running, self._search = 0.0, False, search

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun, self.running = time.thread_time(), True
            result = function(*args, **kwargs)
            self.running = False
            if self._search is None or self._search.running:
                self.seconds += time.thread_time() - begun
            return result

        return timed


def measure(strategy: str, nfe: int, candidates: int, samples: int, out: Path) -> dict[str, float]:
    """Milliseconds per candidate of one search."""
    study = {
        "model": {"factory": "fewstep.experiments.benchmarks.driver:problem"},
        "budget": {"candidates": candidates},
        "search": {
            "nfe": [nfe], "strategy": strategy, "samples": samples, "workers": 0,
            "block": [8, 64],
        },
        "tracking": {"uri": f"sqlite:///{out}/mlflow.db"},
        "final": {"samples": 64, "resamples": 100},
    }  # fmt: skip
    clocks = {"whole": DriverClock()}
    clocks |= {name: DriverClock(clocks["whole"]) for name in ("evaluate", "propose", "train")}
    timed = (
        (work.Block, "run", "evaluate"),
        (strategies.Proposer, "propose", "propose"),
        (QualityPredictor, "fit", "train"),
        (rung.Rung, "run", "whole"),
    )
    with ExitStack() as stack:
        for owner, name, clock in timed:
            wrapped = clocks[clock].wrap(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        run.search(study_from_dict({"name": f"driver-{strategy}", **study}), out)
    per = {name: 1000 * clock.seconds / candidates for name, clock in clocks.items()}
    per["driver"] = per["whole"] - per["evaluate"] - per["propose"]
    per["propose"] -= per["train"]
    return per


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--strategies", nargs="+", default=["random", "evolution", "s3"])
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=450, help="named solvers included")
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"milliseconds per candidate, NFE {args.nfe}, {args.samples} samples")
    print("| strategy | evaluate | driver | propose | train predictor |\n|" + " --- |" * 5)
    for strategy in args.strategies:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(strategy, args.nfe, args.candidates, args.samples, Path(folder))
        names = ("evaluate", "driver", "propose", "train")
        print(f"| {strategy} | " + " | ".join(f"{found[n]:.1f}" for n in names) + " |", flush=True)


if __name__ == "__main__":
    main()
