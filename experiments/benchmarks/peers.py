"""Fewstep against DyWeight's, BNS's, LD3's and GITS's recipes: same models, same verdict.

    python -m fewstep.experiments.benchmarks.peers run --model digits --nfe 4 5 8 \
        --found runs/demo/schedules
    python -m fewstep.experiments.benchmarks.peers report

The recipes are written anew from the papers, for the error that all are judged by (the papers that
train on features of an Inception network or on LPIPS have no such loss here):

    gits      grids by dynamic programming, iPNDM or DDIM on them (`peers_gits`)
    ld3       times and the network's times of a given solver, by Adam (`peers_forms.Discretised`)
    dyweight  weights of three gradients and query levels, by Adam (`peers_forms.Weighted`)
    bns       all numbers of a program, by Adam from the best named solver
              (`peers_forms.NonStationary`)

A recipe has variants. Each is fitted with a sixth of --budget evaluations (a backward pass counts
as two), the best of them then with all; what has the least geometric mean error on samples that
serve this only is taken, as is the best of the named solvers, which all ratios refer to. The files
of --found, nfeNN.json, are scored beside them. Each cell is a JSON file in OUT with the schedule,
its errors on the fresh samples beside it; a cell that is there is not run again. Evaluations are
those of fits and of choosing variants; the teacher's end points and the race of the named solvers
serve all alike and are not in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from fewstep.experiments.benchmarks import peers_gits
from fewstep.experiments.benchmarks.peers_adam import Plan, fit
from fewstep.experiments.benchmarks.peers_forms import (
    Discretised,
    Form,
    NonStationary,
    Weighted,
)
from fewstep.experiments.benchmarks.peers_verdict import (
    Schedule,
    Streams,
    errors,
    geometric,
    ratios,
    write_tensor,
)
from fewstep.experiments.benchmarks.refine import write_json
from fewstep.experiments.benchmarks.search import problem
from fewstep.experiments.cli.terminal import Terminal
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.yardstick import geometric_ratio
from fewstep.search.display import Display
from fewstep.space import ProgramSchedule, load_schedule
from fewstep.space.baselines import baseline, named
from fewstep.space.errors import FewstepError

METHODS = ("named", "gits", "ld3", "dyweight", "bns")
LABELS = {
    "named": "best named solver",
    "gits": "GITS",
    "ld3": "LD3",
    "dyweight": "DyWeight",
    "bns": "BNS",
    "found": "fewstep",
}
LD3_SOLVERS = ("unipc3-bh1", "ipndm3")
DYWEIGHT_GRIDS = ("edm", "quadratic")
BNS_RATES = (1e-2, 3e-2)
SHORT = 6
"""Every variant is first fitted with the budget over this."""
HEAT, TOP = 64, 8
"""Many schedules race on so many samples, and the best of them on all."""


@dataclass(frozen=True)
class Variant:
    """One way to fit a form; see `peers_adam.Plan`."""

    form: Form
    loss: str = "mean"
    soft: bool = False


class PeersBench:
    """One model: its noise, and what has been found."""

    def __init__(self, a: argparse.Namespace, display: Display) -> None:
        self.a, self.display, self.out = a, display, Path(a.out)
        self.problem = problem(a.model)
        self.noise = self.problem.denoiser.noise
        streams = Streams(self.problem, a.model, a.teacher, a.seed, self.out / "teacher", display)
        self.train, self.held, self.select, self.fresh = (
            streams.batch(name, count)
            for name, count in (
                ("fit", a.samples),
                ("held", a.held),
                ("select", a.select),
                ("fresh", a.fresh),
            )
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What a cell is made with."""
        names = ("budget", "samples", "held", "select", "teacher", "seed", "batch")
        return {name: getattr(self.a, name) for name in names}

    def path(self, nfe: int, method: str) -> Path:
        """The file of a cell."""
        return self.out / f"{self.a.model}_{nfe}_{method}.json"

    def score(self, schedule: Schedule, on: Batch) -> float:
        """The error by which variants are chosen."""
        return geometric(errors(schedule, self.problem, on, self.display))

    def race(self, schedules: Mapping[str, Schedule], nfe: int) -> tuple[str, int]:
        """The best of many, and the evaluations spent."""
        few = self.select.take(slice(0, HEAT))
        self.display.total(len(schedules) * len(few) * nfe)
        heat = {name: self.score(schedule, few) for name, schedule in schedules.items()}
        first = sorted(heat, key=lambda name: heat[name])[:TOP]
        final = {name: self.score(schedules[name], self.select) for name in first}
        spent = (len(schedules) * len(few) + len(first) * len(self.select)) * nfe
        return min(final, key=lambda name: final[name]), spent

    def fitted(self, name: str, variant: Variant, budget: int) -> tuple[ProgramSchedule, int]:
        """One fit by Adam."""
        self.display.stage(f"{self.a.model}: {name}")
        self.display.total(budget)
        plan = Plan(budget, self.a.batch, loss=variant.loss, soft=variant.soft, seed=self.a.seed)
        model = self.problem.denoiser
        found = fit(variant.form, model, self.train, self.held, plan, self.display)
        self.display.note(f"  {name}: held out {found.before:.4g} -> {found.after:.4g}")
        provenance = {"peer": name, "before": found.before, "after": found.after}
        first, last = self.noise.t_range
        schedule = ProgramSchedule(
            noise=self.noise, program=found.program, start=first, end=last, provenance=provenance
        )
        return schedule, found.evaluations

    def best_fit(self, method: str, nfe: int) -> tuple[str, Schedule, int]:
        """Every variant in short, then the best of them with the whole budget."""
        variants, spent = LEARNED[method](self, nfe)
        tried: dict[str, tuple[float, Schedule]] = {}

        def attempt(name: str, label: str, budget: int) -> None:
            nonlocal spent
            whole = f"{method} {nfe} {label}"
            schedule, evaluations = self.fitted(whole, variants[name], budget)
            tried[label] = self.score(schedule, self.select), schedule
            spent += evaluations + len(self.select) * nfe

        for name in variants:
            attempt(name, f"{name}, short", self.a.budget // SHORT)
        first = min(variants, key=lambda name: tried[f"{name}, short"][0])
        attempt(first, first, self.a.budget)
        label = min(tried, key=lambda name: tried[name][0])
        return label, tried[label][1], spent

    def run(self, nfe: int, method: str) -> None:
        """One cell, unless it is there; its errors on the fresh samples."""
        path = self.path(nfe, method)
        if path.exists():
            cell = json.loads(path.read_text("utf-8"))
            changed = [k for k, v in self.settings.items() if cell["settings"].get(k) != v]
            if changed:
                raise FewstepError(
                    f"{path} was made with another {', '.join(changed)}: choose another --out"
                )
            self.keep(path, load_schedule(cell["schedule"]))
            return
        begun = time.perf_counter()
        schedule: Schedule
        if method in GIVEN:
            schedules, spent = GIVEN[method](self, nfe)
            self.display.stage(f"{self.a.model} {nfe}: {len(schedules)} schedules of {method}")
            variant, raced = self.race(schedules, nfe)
            schedule, spent = schedules[variant], spent + raced
        else:
            variant, schedule, spent = self.best_fit(method, nfe)
        cell = {"model": self.a.model, "nfe": nfe, "method": method, "variant": variant}
        cell |= {"evaluations": spent, "seconds": time.perf_counter() - begun}
        cell |= {"settings": self.settings, "schedule": schedule.to_dict()}
        self.keep(path, schedule)
        write_json(path, cell)
        self.display.note(f"{path.stem}: {variant}, {spent} evaluations")

    def keep(self, path: Path, schedule: Schedule) -> None:
        """The errors on the fresh samples, beside a cell; unless they are there."""
        beside = path.with_suffix(".safetensors")
        if path.exists() and beside.exists() and len(fresh_errors(beside)) == len(self.fresh):
            return
        found = errors(schedule, self.problem, self.fresh, self.display)
        write_tensor(beside, "errors", torch.from_numpy(found))

    def found(self, nfe: int, folder: Path) -> None:
        """Score fewstep's file, unless this very one has been scored."""
        file, path = folder / f"nfe{nfe:02d}.json", self.path(nfe, "found")
        schedule = load_schedule(file)
        old = json.loads(path.read_text("utf-8"))["digest"] if path.exists() else None
        if old != schedule.digest:
            path.unlink(missing_ok=True)
        self.keep(path, schedule)
        cell = {"model": self.a.model, "nfe": nfe, "method": "found", "variant": str(file)}
        write_json(path, cell | {"digest": schedule.digest, "evaluations": self.a.found_cost})


def fresh_errors(path: Path) -> NDArray[Any]:
    """The errors beside a cell."""
    found: NDArray[Any] = load_file(path)["errors"].numpy()
    return found


def _named(bench: PeersBench, nfe: int) -> tuple[Mapping[str, Schedule], int]:
    return named(bench.noise, nfe), 0


def _gits(bench: PeersBench, nfe: int) -> tuple[Mapping[str, Schedule], int]:
    return peers_gits.candidates(bench.problem.denoiser, bench.train.take(slice(0, 256)), nfe)


def _best_named(bench: PeersBench, nfe: int) -> str:
    found: str = json.loads(bench.path(nfe, "named").read_text("utf-8"))["variant"]
    return found


def _ld3(bench: PeersBench, nfe: int) -> tuple[dict[str, Variant], int]:
    solvers, spent, found = named(bench.noise, nfe), 0, {}
    for solver in dict.fromkeys((_best_named(bench, nfe).split("/")[0], *LD3_SOLVERS)):
        grids = {n: s for n, s in solvers.items() if n.split("/")[0] == solver}
        if next(iter(grids.values())).n_steps == nfe:
            name, raced = bench.race(grids, nfe)
            found[name] = Variant(Discretised(grids[name]), soft=True)
            spent += raced
    return found, spent


def _dyweight(bench: PeersBench, nfe: int) -> tuple[dict[str, Variant], int]:
    found = {}
    for kind, free in ((kind, free) for kind in DYWEIGHT_GRIDS for free in (True, False)):
        name = f"{kind}/afs" if free else kind
        found[name] = Variant(Weighted(bench.noise, nfe, kind, free))
    return found, 0


def _bns(bench: PeersBench, nfe: int) -> tuple[dict[str, Variant], int]:
    start = baseline(_best_named(bench, nfe), bench.noise, nfe).program
    return {
        f"{loss}/{rate:g}": Variant(NonStationary(bench.noise, start, rate, rate), loss)
        for loss in ("mean", "log")
        for rate in BNS_RATES
    }, 0


GIVEN: dict[str, Callable[[PeersBench, int], tuple[Mapping[str, Schedule], int]]] = {
    "named": _named,
    "gits": _gits,
}
"""Methods that give schedules to choose from, and what these cost."""

LEARNED: dict[str, Callable[[PeersBench, int], tuple[dict[str, Variant], int]]] = {
    "ld3": _ld3,
    "dyweight": _dyweight,
    "bns": _bns,
}
"""Methods that learn numbers: their variants, and what preparing them cost."""


def report(folder: Path) -> str:
    """The table of the cells in a folder."""
    cells = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    if not cells:
        raise FewstepError(f"{folder}: no cells found; make some with `run`")
    lines = [
        "| model | calls | method | variant | geometric mean (95 %) | median | mean "
        "| 90 % | worse | fewstep over it (95 %) | evaluations |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, nfe in sorted({(c["model"], c["nfe"]) for c in cells}):
        mine = {c["method"]: c for c in cells if (c["model"], c["nfe"]) == (model, nfe)}
        kept = {m: fresh_errors(folder / f"{model}_{nfe}_{m}.safetensors") for m in mine}
        if "named" not in kept:
            raise FewstepError(f"{folder}: {model} at {nfe} calls has no named solver: run it")
        for method in (m for m in LABELS if m in mine):
            lines.append(_row(mine[method], kept, method))
    return "\n".join(lines)


def _row(cell: dict[str, Any], kept: dict[str, Any], method: str) -> str:
    """One line of the table."""
    r = ratios(kept[method], kept["named"])
    _, (low, high) = geometric_ratio(kept[method], kept["named"])
    over = "–"
    if "found" in kept and method != "found":
        _, (less, more) = geometric_ratio(kept["found"], kept[method])
        over = f"{ratios(kept['found'], kept[method])['geometric']:.2f} ({less:.2f}–{more:.2f})"
    variant = "file" if method == "found" else cell["variant"]
    spent = "–" if cell["evaluations"] is None else f"{cell['evaluations'] / 1e3:.0f}k"
    return (
        f"| {cell['model']} | {cell['nfe']} | {LABELS[method]} | {variant} "
        f"| {r['geometric']:.3f} ({low:.3f}–{high:.3f}) | {r['median']:.3f} | {r['mean']:.3f} "
        f"| {r['q90']:.3f} | {r['worse']:.1%} | {over} | {spent} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--nfe", nargs="+", type=int, default=[4, 5, 8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--found", type=Path, help="folder of fewstep's files, nfeNN.json")
    parser.add_argument("--found-cost", type=int, help="what a file of --found cost")
    parser.add_argument("--budget", type=int, default=300_000, help="evaluations of one fit")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step of Adam")
    parser.add_argument("--samples", type=int, default=2048, help="noise that is fitted on")
    parser.add_argument("--held", type=int, default=256, help="noise an iterate is chosen by")
    parser.add_argument("--select", type=int, default=256, help="noise a variant is chosen by")
    parser.add_argument("--fresh", type=int, default=8192, help="noise of the verdict")
    parser.add_argument("--teacher", type=int, default=64, help="calls of the teacher")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and batches of fits")
    parser.add_argument("--out", default="runs/bench_peers")
    a = parser.parse_args()
    if a.what == "run":
        torch.set_num_threads(1)
        with Terminal() as display:
            bench = PeersBench(a, display)
            for nfe in a.nfe:
                for method in dict.fromkeys(("named", *a.methods)):
                    bench.run(nfe, method)
                if a.found is not None:
                    bench.found(nfe, a.found)
    print(report(Path(a.out)))


if __name__ == "__main__":
    main()
