"""How far a program of so many calls goes: fits of all its numbers from many starts.

    python -m fewstep.experiments.benchmarks.starts run --nfe 4 5 6 8 --starts 20
    python -m fewstep.experiments.benchmarks.starts report

Every deterministic schedule of C calls without a constant image compiles to a program of
C (C + 5) / 2 numbers, query times and weights, so the best program bounds every schedule from
below. Start 0 is the best named solver; of the others, two in three have queries drawn
uniformly in lam and a second-order solver's weights, and one in three the best program so far with
its queries moved at random. Each is fitted by Gauss-Newton on a few samples; the best goes on with
--samples. With --mean programs also use the mean image of the samples: C + 2 numbers more. Scores
are endpoint MSE over the best named solver's on the same samples. If many starts end at one
optimum and none below it, that is where the family ends, as far as one can see.
One JSON file per model and NFE in OUT; those that are there are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.experiments.benchmarks.refine import RefineBench, batch, bench_options, write_json
from fewstep.experiments.benchmarks.search import Landscape
from fewstep.predictors.gauss_newton import Batch, Fit
from fewstep.space import OdeSchedule, Program, StepSpec
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError
from fewstep.space.noise import finite_lam
from fewstep.space.unknowns import FreeProgram, canonical

TRAIN, HELD = 10_000, 15_000
NEAR = 1.05
"""Fits within this factor of the best count as having found the same optimum."""


class Starts:
    """Programs of one NFE of one model, and what they are fitted on."""

    def __init__(self, bench: RefineBench, nfe: int) -> None:
        a, self.bench, self.nfe = bench.a, bench, nfe
        self.named = bench.named(nfe)
        self.noise = bench.noise
        self.base = baseline(self.named["name"], self.noise, nfe)
        self.train = batch(Landscape(bench.problem, a.samples, TRAIN), self.base)
        self.held = batch(Landscape(bench.problem, a.held, HELD), self.base)
        self.again = batch(bench.again, self.base)
        if a.mean:
            image = self.train.target.mean(0)
            self.train, self.held, self.again = (
                dataclasses.replace(b, constant=image) for b in (self.train, self.held, self.again)
            )

    def model(self, program: Program) -> FreeProgram:
        """All numbers of a program, free."""
        return FreeProgram(canonical(program), self.noise, constant=self.bench.a.mean)

    def error(self, program: Program, on: Batch) -> float:
        """Mean squared error of a program."""
        free = self.model(program)
        fit = Fit(free, self.bench.problem.denoiser, on)
        return fit.losses([torch.zeros(free.size).double()])[0]

    def fitted(self, free: FreeProgram, theta: Tensor, samples: int) -> tuple[float, Program, int]:
        """Held-out error, program and cost of one fit on the first `samples`."""
        denoiser, few = self.bench.problem.denoiser, self.train.first(samples)
        fit, held = (Fit(free, denoiser, b) for b in (few, self.held))
        rounds = self.bench.a.rounds
        best, error = fit.chosen(theta, rounds, lambda at: held.losses([at])[0])
        at = theta if best is None else best
        return error, free.program(at), fit.calls + held.calls

    def at(self, lam: np.ndarray) -> tuple[FreeProgram, Tensor]:
        """Second-order steps between these queries (nfe,), increasing, in lam."""
        t = self.noise.t_of_lam(torch.from_numpy(lam)).tolist()
        steps = tuple(StepSpec(order=min(i + 1, 2)) for i in range(self.nfe))
        times = (self.base.times[0], *t[1:], self.base.times[-1])
        free = self.model(OdeSchedule(noise=self.noise, times=times, steps=steps).program)
        return free, self.moved(free, lam)

    def moved(self, free: FreeProgram, lam: np.ndarray) -> Tensor:
        """theta with the queries at `lam` and the weights as they are."""
        theta = torch.zeros(free.size).double()
        theta[: self.nfe] = torch.from_numpy(lam) - finite_lam(self.noise, free.base.t)
        return theta

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Random queries, at least .2 apart; end point and pure noise are left to the others."""
        lam = np.sort(rng.uniform(-4.5, 3.5, self.nfe))
        return lam + 0.2 * np.arange(self.nfe)


def run(family: Starts, starts: int, seed: int) -> dict[str, Any]:
    """All starts at one NFE, and the best one fitted on all samples."""
    bench, rng, begun = family.bench, np.random.default_rng(seed), time.perf_counter()
    reference = family.error(family.base.program, family.held)
    best: tuple[float, Program] | None = None
    ends: list[float] = []
    calls = 0
    for index in range(starts):
        if best is None:
            free = family.model(family.base.program)
            theta = free.nearer()
        elif index % 3:
            free, theta = family.at(family.drawn(rng))
        else:
            free = family.model(best[1])
            lam = finite_lam(family.noise, free.base.t).numpy()
            theta = family.moved(free, np.sort(lam + rng.normal(0, 0.5, family.nfe)))
        error, program, spent = family.fitted(free, theta, bench.a.few)
        calls += spent
        ends.append(error / reference)
        if best is None or error < best[0]:
            best = error, program
        seconds = time.perf_counter() - begun
        print(
            f"{index + 1}/{starts}: {ends[-1]:.4f}, best {min(ends):.4f}, {seconds:.0f} s",
            flush=True,
        )
    assert best is not None
    free = family.model(best[1])
    error, program, spent = family.fitted(free, torch.zeros(free.size).double(), len(family.train))
    fresh = family.error(program, family.again)
    return {
        "model": bench.a.model,
        "nfe": family.nfe,
        "mean": bench.a.mean,
        "named": family.named,
        "ends": ends,
        "held": error / reference,
        "fresh": fresh / family.named["fresh"],
        "queries": family.noise.lam(program.t).tolist(),
        "start": program.init.tolist(),
        "calls": calls + spent,
        "samples": [bench.a.few, len(family.train)],
        "seconds": time.perf_counter() - begun,
    }


def report(folder: Path) -> str:
    """The table of the runs in a folder."""
    runs = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*_starts.json"))]
    if not runs:
        raise FewstepError(f"{folder}: no runs found; start some with `run`")
    lines = [
        "| model | NFE | mean | starts | near the best | held out | fresh | queries, lam "
        "| evaluations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        near = sum(e < NEAR * min(r["ends"]) for e in r["ends"])
        queries = ", ".join(f"{q:.2f}" for q in r["queries"])
        lines.append(
            f"| {r['model']} | {r['nfe']} | {'yes' if r['mean'] else 'no'} | {len(r['ends'])} "
            f"| {near} | {r['held']:.3f} "
            f"| {r['fresh']:.3f} | {queries} | {r['calls'] / 1e6:.1f}M |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--nfe", nargs="+", type=int, default=[4, 5, 6, 8])
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random starts")
    parser.add_argument("--few", type=int, default=192, help="samples of every fit")
    parser.add_argument("--samples", type=int, default=1024, help="samples of the last fit")
    parser.add_argument("--held", type=int, default=256, help="noise the iterate is chosen by")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--mean", action="store_true", help="use the mean image, too")
    bench_options(parser)
    a = parser.parse_args()
    if a.what == "report":
        print(report(Path(a.out)))
        return
    torch.set_num_threads(1)
    bench = RefineBench(a)
    for nfe in a.nfe:
        path = Path(a.out) / f"{a.model}_{nfe}{'_mean' if a.mean else ''}_starts.json"
        if not path.exists():
            write_json(path, run(Starts(bench, nfe), a.starts, a.seed))
    print(report(Path(a.out)))


if __name__ == "__main__":
    main()
