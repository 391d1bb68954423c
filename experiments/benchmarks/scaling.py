"""How a search scales: on the cores of this machine, on many actors, over many candidates.

    OMP_NUM_THREADS=1 python -P -m fewstep.experiments.benchmarks.scaling WHAT

Each is a whole search with its Optuna journal and MLflow in SQLite, timed from the first candidate
told after the first quarter, in which new processes warm up, to the last (starting workers and
the verdict are left out, too). WHAT is one of

    cores      the same search of a network that computes, on 1 and on 2 workers
    actors     synthetic evaluators that only wait, on fractional actors: results a second, and the
               share of the actors' time in which they had nothing to do
    costless   candidates of a network that costs nothing, in this process and on 2 workers
    memory     the driver's memory after 20,000 candidates

Beside each rate stands the processor time of the driver per candidate, which bears a busy machine.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.experiments.benchmarks.driver import Gaussian
from fewstep.samplers import Problem
from fewstep.search import run, rung
from fewstep.search.config import study_from_dict
from fewstep.space.noise import VPLinear


class Working(Gaussian):
    """A Gaussian's denoiser that computes, or waits, for a while at each call."""

    def __init__(self, wait: float, compute: int) -> None:
        super().__init__(VPLinear())
        self.wait, self.matrix = wait, torch.ones(compute, compute)

    def __call__(self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None) -> Tensor:
        """See `Gaussian`."""
        if self.wait:
            time.sleep(self.wait)
        if len(self.matrix):
            (self.matrix @ self.matrix).sum()
        return super().__call__(x, t, cond=cond, guidance=guidance)


def problem(wait: float = 0.0, compute: int = 0) -> Problem:
    """The study's factory."""
    return Problem(Working(wait, compute), (2,), fingerprint="gaussian")


class Clock:
    """When candidates are told, the driver's processor time then, what their evaluation took."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.spent: list[float] = []
        self.busy: list[float] = []
        self._tell = rung.Rung._keep

    def __enter__(self) -> Clock:
        clock, tell = self, self._tell

        def keep(self: Any, generation: Any, proposal: Any, result: Any) -> Any:
            clock.times.append(time.perf_counter())
            clock.spent.append(time.process_time())
            clock.busy.append(result.seconds)
            return tell(self, generation, proposal, result)

        rung.Rung._keep = keep  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        rung.Rung._keep = self._tell  # type: ignore[method-assign]


def measure(candidates: int, *, workers: int, nfe: int = 5, **more: Any) -> dict[str, float]:
    """One search: candidates a second, and the share of the workers' time spent on them."""
    search = {"nfe": [nfe], "strategy": "random", "samples": 16, "block": [8, 16], "lag": 3}
    search |= {"generation": 64, "workers": workers, **more.pop("search", {})}
    with tempfile.TemporaryDirectory() as folder:
        study = {
            "model": {"factory": "fewstep.experiments.benchmarks.scaling:problem", **more},
            "budget": {"candidates": candidates},
            "search": search,
            "teacher": {"nfe": 8, "check": 0},
            "final": {"samples": 16, "most": 16, "top": 1, "pictures": 2, "resamples": 100},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
        with Clock() as clock:
            run.search(study_from_dict(study), Path(folder) / "out")
    many = len(clock.times)
    late = many // 4
    seconds = clock.times[-1] - clock.times[late]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "rate": (many - 1 - late) / seconds,
        "driver ms": 1e3 * (clock.spent[-1] - clock.spent[late]) / (many - 1 - late),
        "busy": sum(clock.busy[late + 1 :]) / seconds / max(workers, 1),
        "seconds": seconds,
        "peak GiB": peak,
    }


def main() -> None:
    """Print one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cores", "actors", "costless", "memory"])
    parser.add_argument("--actors", type=int, default=50)
    parser.add_argument("--candidates", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "cores":
        many = options.candidates or 400
        rates = [measure(many, workers=n, compute=1500)["rate"] for n in (1, 2)]
        print(
            f"1 worker {rates[0]:.1f}/s, 2 workers {rates[1]:.1f}/s: {rates[1] / rates[0]:.2f} x"
        )
    elif options.what == "actors":
        each = {"cpus": 0.01, "block": [1, 16], "generation": 4 * options.actors}
        for wait, many in ((1.0, 8), (0.005, 60)):
            found = measure(
                options.candidates or many * options.actors,
                workers=options.actors,
                search=each,
                wait=wait / 5,
            )
            print(
                f"{options.actors} actors x {wait:g} s: {found['rate']:.0f} results/s, "
                f"idle {100 * (1 - found['busy']):.0f} %"
            )
    elif options.what == "costless":
        many = options.candidates or 1500
        for n in (0, 2):
            found = measure(many, workers=n)
            print(f"workers = {n}: {found['rate']:.0f}/s, driver {found['driver ms']:.2f} ms each")
    else:
        found = measure(options.candidates or 20_000, workers=0)
        print(f"{found['peak GiB']:.2f} GiB at most, {found['rate']:.0f} candidates/s")


if __name__ == "__main__":
    main()
