"""What each part of refinement is worth, and how far it goes: an ablation and the moonshot.

    python -m fewstep.experiments.benchmarks.refine run --nfe 5 --seeds 5
    python -m fewstep.experiments.benchmarks.refine run --nfe 4 6 8 10 --variants all --seeds 1
    python -m fewstep.experiments.benchmarks.refine report

Every run starts from the best named solver, or from the winner of a search of `bench_search` with
strategy s3 and the same seed (--searches), and is fitted on noise of its own seed. Scores are
geometric means of endpoint errors on one set of fresh samples, over the best named solver's. Each
run is a JSON file in OUT; runs that are there are not repeated. `report` prints medians and ranges
over seeds, and found(n) against the best named solver at 2n where `run` has met both (`--variants
named` scores named solvers only; found(n) is variant "mean" where it was run, else "all").
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

from fewstep.experiments.benchmarks.search import FRESH, Landscape, problem
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.refine import Startable, refine
from fewstep.predictors.settings import RefineTable
from fewstep.predictors.yardstick import level, q90
from fewstep.samplers import start
from fewstep.space import load_schedule
from fewstep.space.baselines import baseline, named
from fewstep.space.errors import FewstepError

TABLES: dict[str, dict[str, Any]] = {
    "times": {"knobs": ("times",)},
    "all": {},
    "least squares": {"loss": "mean"},
    "mean": {},
    "s3+refine": {},
}
LABELS = {
    "times": "times only",
    "all": "times and weights",
    "least squares": "the same by least squares",
    "mean": "+ the mean image",
    "s3": "S3 alone",
    "s3+refine": "S3 + refine",
}


def batch(landscape: Landscape, schedule: Startable) -> Batch:
    """A landscape's noise and end points, as refinement takes them."""
    made = landscape.problem
    x_T = start(schedule, landscape._z)
    return Batch(x_T, landscape.teacher, landscape._cond or {}, made.guidance)


class RefineBench:
    """One model: fresh noise, and the best named solver of each NFE."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.problem = problem(a.model)
        self.noise = self.problem.denoiser.noise
        self.again = Landscape(self.problem, a.fresh, FRESH)
        self.choose = Landscape(self.problem, a.choose)

    def named(self, nfe: int) -> dict[str, Any]:
        """The best named solver on the choosing samples, scored on the fresh ones; kept."""
        path = Path(self.a.out) / f"{self.a.model}_{nfe}_named.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        solvers = named(self.noise, nfe)
        scores = [level(e, "geometric") for e in self.choose.per_sample(list(solvers.values()))]
        name = list(solvers)[int(np.nanargmin(scores))]
        fresh = self.again.per_sample([solvers[name]])[0]
        found = {"name": name, "fresh": level(fresh, "geometric"), "mean": float(fresh.mean())}
        found["q90"] = q90(fresh)
        write_json(path, found)
        return found

    def run(self, nfe: int, variant: str, seed: int) -> dict[str, Any] | None:
        """One run; None where the search it needs is not there."""
        a, best = self.a, self.named(nfe)
        begun, spent = time.perf_counter(), 0
        schedule: Startable = baseline(best["name"], self.noise, nfe)
        if variant.startswith("s3"):
            path = Path(a.searches) / f"{a.model}_{nfe}_256_s3_{seed}.json"
            if not path.exists():
                return None
            result = json.loads(path.read_text(encoding="utf-8"))
            schedule = load_schedule(result["schedule"])
            spent = (len(result["scores"])) * result["samples"] * nfe
        if variant != "s3":
            at = 10_000 * (seed + 1)
            train = batch(Landscape(self.problem, a.samples, at), schedule)
            held = batch(Landscape(self.problem, a.held, at + 5000), schedule)
            table = RefineTable(samples=a.samples, rounds=a.rounds, **TABLES[variant])
            if variant == "mean":
                image = train.target.mean(0)
                train, held = (dataclasses.replace(b, constant=image) for b in (train, held))
            found = refine([schedule], self.problem.denoiser, train, held, table)
            schedule, spent = found.schedule, spent + found.calls
        scores = self.again.per_sample([schedule])[0]
        return {
            "model": a.model,
            "nfe": nfe,
            "variant": variant,
            "seed": seed,
            "named": best,
            "fresh": level(scores, "geometric"),
            "mean": float(scores.mean()),
            "q90": q90(scores),
            "calls": spent,
            "samples": a.samples,
            "seconds": time.perf_counter() - begun,
            "schedule": schedule.to_dict(),
        }


def bench_options(parser: argparse.ArgumentParser) -> None:
    """What a `RefineBench` reads from the command line."""
    parser.add_argument("--model", default="digits")
    parser.add_argument("--choose", type=int, default=128, help="samples named solvers compete on")
    parser.add_argument("--fresh", type=int, default=1024)
    parser.add_argument("--out", default="runs/bench_refine")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write one run's file; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(data), encoding="utf-8")
    temporary.replace(path)


def _run_all(a: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    bench = RefineBench(a)
    for nfe in a.nfe:
        best = bench.named(nfe)
        print(f"{a.model} NFE {nfe}: best named {best['name']} {best['fresh']:.3g}", flush=True)
        for seed in range(a.seeds):
            for variant in a.variants:
                path = Path(a.out) / f"{a.model}_{nfe}_{variant}_{seed}.json"
                if variant == "named" or path.exists():
                    continue
                found = bench.run(nfe, variant, seed)
                if found is None:
                    print(f"{path.stem}: no search in {a.searches}, left out", flush=True)
                    continue
                write_json(path, found)
                ratio = found["fresh"] / best["fresh"]
                print(f"{path.stem}: {ratio:.3f}, {found['calls']} calls", flush=True)


def report(folder: Path) -> str:
    """The tables of the runs in a folder."""
    runs = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    best = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*_named.json"))}
    runs = [r for r in runs if "variant" in r]
    if not runs:
        raise FewstepError(f"{folder}: no runs found; start some with `run`")
    lines = [
        "| model | NFE | what | seeds | geometric / best named: median (range) | mean | 90 %q "
        "| evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, nfe in sorted({(r["model"], r["nfe"]) for r in runs}):
        for variant, label in LABELS.items():
            mine = [
                r for r in runs if (r["model"], r["nfe"], r["variant"]) == (model, nfe, variant)
            ]
            if not mine:
                continue
            ratios = np.array([r["fresh"] / r["named"]["fresh"] for r in mine])
            middle = float(np.median(ratios))
            calls = float(np.median([r["calls"] for r in mine])) / 1e3
            mean, tail = (
                float(np.median([r[k] / r["named"][k] for r in mine])) for k in ("mean", "q90")
            )
            lines.append(
                f"| {model} | {nfe} | {label} | {len(mine)} | {middle:.3f} "
                f"({ratios.min():.3f}–{ratios.max():.3f}) | {mean:.3f} | {tail:.3f} "
                f"| {calls:.0f}k |"
            )
    lines += [
        "",
        "| model | n | found(n) | best named(2n) | found / named |",
        "|---|---|---|---|---|",
    ]
    for model, nfe in sorted({(r["model"], r["nfe"]) for r in runs}):
        twice = best.get(f"{model}_{2 * nfe}_named")
        found = [r for r in runs if (r["model"], r["nfe"]) == (model, nfe)]
        furthest = "mean" if any(r["variant"] == "mean" for r in found) else "all"
        found = [r for r in found if r["variant"] == furthest]
        if twice and found:
            value = float(np.median([r["fresh"] for r in found]))
            ratio = value / twice["fresh"]
            lines.append(
                f"| {model} | {nfe} | {value:.3g} | {twice['fresh']:.3g} ({twice['name']}) "
                f"| {ratio:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--nfe", nargs="+", type=int, default=[5])
    parser.add_argument("--variants", nargs="+", default=list(LABELS), choices=[*LABELS, "named"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256, help="noise a run is fitted on")
    parser.add_argument("--held", type=int, default=128, help="noise the iterate is chosen by")
    bench_options(parser)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--searches", default="runs/bench_search", help="runs of bench_search")
    a = parser.parse_args()
    if a.what == "run":
        _run_all(a)
    else:
        print(report(Path(a.out)))


if __name__ == "__main__":
    main()
