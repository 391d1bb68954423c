"""Dynamic compensation, its original recipe, refinement and CPR on the digits model.

    python -m fewstep.experiments.benchmarks.compensation compensated
    python -m fewstep.experiments.benchmarks.compensation refined
    python -m fewstep.experiments.benchmarks.compensation refined --nfe 7 --guidance 3 6 7.5
    python -m fewstep.experiments.benchmarks.compensation refined --nfe 5 8 --guidance 6
    python -m fewstep.experiments.benchmarks.compensation joint  # polynomials fitted end to end
    python -m fewstep.experiments.benchmarks.compensation table

A cell is one (NFE, guidance): choose the best named solvers on TUNE noise, search on SEARCH noise
(half of it held out), report the mean squared error of the end point, per element, on fresh TEST
noise against a teacher of TEACHER calls. Cells are kept as JSON and computed once. Intervals are
paired bootstraps of ratios (`search.objective`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.experiments.benchmarks.published_dc import as_published, published_targets
from fewstep.experiments.models.digits import problem
from fewstep.predictors.compensate import compensate
from fewstep.predictors.cpr_family import PolynomialFamily, Setting
from fewstep.predictors.cpr_joint import Joint, Request, fit_joint, gram
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.refine import Startable, refine
from fewstep.predictors.settings import CompensationTable, RefineTable
from fewstep.predictors.yardstick import bootstrap_ratio
from fewstep.samplers import Problem, sample
from fewstep.space import OdeSchedule
from fewstep.space.baselines import baseline

TUNE, SEARCH, ORIGINAL, REFINE, TEST = 1000, 2000, 3000, 4000, 9000  # seeds of the noise
TEACHER = "dpmpp3m/logsnr/low"
TEACHER_CALLS = 150
TEMPLATE = "unipc2-bh2/quadratic/low"  # one family for all cells, so that CPR can read it
LEFT_NFE, LEFT_GUIDANCE = 7, 6.0  # kept out of CPR
GRIDS = ("time", "quadratic", "logsnr", "edm")
UNIPC = [f"unipc{p}-bh2/{g}/low" for p in (2, 3) for g in GRIDS]
NAMED = [
    f"{solver}/{g}"
    for solver in ("ddim", "dpmpp2m", "dpmpp3m", "deis-tab2", "deis-rhoab2", "ipndm3", "ipndm4")
    for g in GRIDS
]


@dataclass(frozen=True)
class Noise:
    """Start states, conditions and the teacher's end points of one stream at one guidance."""

    x_T: Tensor
    cond: dict[str, Tensor]
    target: Tensor
    guidance: float


@cache
def stream(seed: int, n: int, guidance: float) -> Noise:
    """n samples of a stream, and the teacher's end points."""
    p = problem(guidance)
    x_T = torch.randn(n, *p.shape, generator=torch.Generator().manual_seed(seed))
    cond = p.cond(torch.arange(n)) if p.cond else {}
    teacher = baseline(TEACHER, p.denoiser.noise, TEACHER_CALLS)
    target = sample(teacher, p.denoiser, x_T, cond=cond, guidance=guidance)
    return Noise(x_T, cond, target, guidance)


def errors(p: Problem, schedule: Startable, noise: Noise) -> np.ndarray:
    """End point error of every sample, (n,)."""
    x = sample(schedule, p.denoiser, noise.x_T, cond=noise.cond, guidance=noise.guidance)
    return (x - noise.target).double().square().flatten(1).mean(1).numpy()


def best(p: Problem, names: Sequence[str], nfe: int, noise: Noise) -> str:
    """The named solver with the lowest error."""
    found = {n: float(errors(p, baseline(n, p.denoiser.noise, nfe), noise).mean()) for n in names}
    return min(found, key=lambda n: found[n])


def compensated(nfe: int, guidance: float, a: argparse.Namespace) -> dict[str, Any]:
    """UniPC at its best grid and order, our ratios, the original recipe's."""
    p = problem(guidance)
    name = best(p, UNIPC, nfe, stream(TUNE, a.tune, guidance))
    base = baseline(name, p.denoiser.noise, nfe)
    shared: dict[str, Any] = {"guidance": guidance}
    clock = time.perf_counter()
    on = stream(SEARCH, a.search, guidance)
    batch = Batch(on.x_T, on.target, on.cond, guidance)
    ours = compensate(base, p.denoiser, batch, CompensationTable(samples=a.search))
    seconds = [time.perf_counter() - clock]
    assert isinstance(ours.schedule, OdeSchedule)
    found_ratios = [step.compensation for step in ours.schedule.steps]
    x_T, cond = stream_only(p, ORIGINAL, 10)
    clock = time.perf_counter()
    targets = published_targets(base, p.denoiser, x_T, cond=cond, **shared)
    original = as_published(base, p.denoiser, x_T, targets, cond=cond, **shared)
    seconds.append(time.perf_counter() - clock)
    found: dict[str, Startable] = {
        "unipc": base,
        "ours": ours.schedule,
        "original": original.schedule,
    }
    return record(p, nfe, guidance, found, a) | {
        "names": {"unipc": name},
        "calls": {"ours": ours.calls, "original": original.calls},
        "seconds": dict(zip(("ours", "original"), seconds, strict=True)),
        "ratios": {"ours": found_ratios, "original": list(original.ratios)},
    }


def refined(nfe: int, guidance: float, a: argparse.Namespace) -> dict[str, Any]:
    """The template refined as a program, and the best named solver."""
    p = problem(guidance)
    noise = p.denoiser.noise
    name = best(p, [*NAMED, *UNIPC], nfe, stream(TUNE, a.tune, guidance))
    batches: list[Batch] = []
    for seed, n in ((REFINE, a.train), (REFINE + 1, a.held)):
        s = stream(seed, n, guidance)
        batches.append(Batch(s.x_T, s.target, s.cond, guidance))
    base = baseline(TEMPLATE, noise, nfe)
    clock = time.perf_counter()
    settings = RefineTable(samples=a.train, batch=a.batch)
    made = refine([base], p.denoiser, batches[0], batches[1], settings)
    seconds = time.perf_counter() - clock
    found = {"named": baseline(name, noise, nfe), "template": base, "refined": made.schedule}
    return record(p, nfe, guidance, found, a) | {
        "names": {"named": name},
        "calls": {"refined": made.calls},
        "seconds": {"refined": seconds},
    }


def record(
    p: Problem, nfe: int, guidance: float, found: dict[str, Startable], a: argparse.Namespace
) -> dict[str, Any]:
    """Errors of every sample on fresh noise, and the schedules."""
    test = stream(TEST, a.test, guidance)
    return {
        "nfe": nfe,
        "guidance": guidance,
        "errors": {k: errors(p, s, test).tolist() for k, s in found.items()},
        "schedules": {k: s.to_dict() for k, s in found.items()},
        "sizes": {k: getattr(a, k) for k in ("tune", "search", "train", "held", "test", "rounds")},
    }


def stream_only(p: Problem, seed: int, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Start states and conditions without a teacher."""
    x_T = torch.randn(n, *p.shape, generator=torch.Generator().manual_seed(seed))
    return x_T, p.cond(torch.arange(n)) if p.cond else {}


def run_cells(kind: str, a: argparse.Namespace) -> None:
    """Compute the cells that are not there yet."""
    a.out.mkdir(parents=True, exist_ok=True)
    for guidance in a.guidance:
        for nfe in a.nfe:
            path = a.out / f"{kind}_nfe{nfe:02d}_g{guidance:g}.json"
            if path.exists():
                continue
            found = (compensated if kind == "compensated" else refined)(nfe, guidance, a)
            path.write_text(json.dumps(found))
            means = {k: f"{np.mean(v):.3g}" for k, v in found["errors"].items()}
            print(path.stem, means, {k: round(v) for k, v in found["seconds"].items()}, flush=True)


def load_cells(kind: str, out: Path) -> dict[tuple[int, float], dict[str, Any]]:
    """All cells of a kind on disk."""
    found = (json.loads(path.read_text()) for path in sorted(out.glob(f"{kind}_nfe*.json")))
    return {(c["nfe"], c["guidance"]): c for c in found}


def run_cpr(a: argparse.Namespace) -> None:
    """Fit without NFE 7 and guidance 6; predict those cells, on TEST noise."""
    cells = load_cells("refined", a.out)
    kept = {k: c for k, c in cells.items() if k[0] != LEFT_NFE and k[1] != LEFT_GUIDANCE}
    begun, spent = time.perf_counter(), 0
    made, spent = fit_cells(list(kept), a)
    model = made.model
    errors_left = {
        axis: {f"{s.nfe}@{s.guidance:g}": v for s, v in each.items()}
        for axis, each in made.left_out.items()
    }
    model.save(a.out / "joint.json")
    found = []
    for (n, g), c in cells.items():
        if (n, g) not in kept and model.trusts(n, g):
            each = errors(problem(g), model.predict(n, g), stream(TEST, a.test, g))
            ends = {k: np.array(c["errors"][k][: a.test]) for k in ("named", "refined")}
            found.append(
                {
                    "nfe": n,
                    "guidance": g,
                    "name": c["names"]["named"],
                    "named": float(ends["named"].mean()),
                    "refined": float(ends["refined"].mean()),
                    "predicted": float(each.mean()),
                    "medians": float(np.median(each) / np.median(ends["refined"])),
                    "to_refined": bootstrap_ratio(each, ends["refined"], np.mean),
                    "to_named": bootstrap_ratio(each, ends["named"], np.mean),
                }
            )
    result = {
        "rows": found,
        "left_out": errors_left,
        "train": [f"{n}@{g:g}" for n, g in kept],
        "calls": spent,
        "seconds": time.perf_counter() - begun,
    }
    (a.out / "joint_result.json").write_text(json.dumps(result))


def fit_cells(cells: Sequence[tuple[int, float]], a: argparse.Namespace) -> tuple[Joint, int]:
    """The template fitted to cells end to end, and the sample-calls spent."""
    p, spent = problem(1.0), 0

    def look(requests: Sequence[Request]) -> list[np.ndarray]:
        nonlocal spent
        found = []
        for r in requests:
            n = a.held if r.held else a.train
            s = stream(REFINE + r.held, n, r.setting.guidance)
            piece = max(8, 256 // len(r.schedules))  # 256 images in one network call, about
            batch = Batch(s.x_T, s.target, s.cond, s.guidance, piece=piece)
            programs = [schedule.program for schedule in r.schedules]
            parts = [part.residuals(programs, p.denoiser) for part in batch.pieces()]
            found.append(gram(torch.cat(parts, dim=1).numpy()))
            spent += len(r.schedules) * n * r.setting.nfe
        return found

    settings = [Setting(*cell) for cell in cells]
    family = PolynomialFamily(
        p.denoiser.noise, TEMPLATE, settings, ("gap", "query", "compensation")
    )
    told = lambda k, e: print(f"round {k}: mean log error {e:.4f}, {spent} calls", flush=True)  # noqa: E731
    return fit_joint(family, look, rounds=a.rounds, on_round=told), spent


def ratio(x: Sequence[float], y: Sequence[float]) -> str:
    """Ratio of means with its interval, as text."""
    low, high = bootstrap_ratio(np.array(x), np.array(y), np.mean)
    return f"{np.mean(x) / np.mean(y):.2f} [{low:.2f}, {high:.2f}]"


def table(a: argparse.Namespace) -> str:
    """Everything on disk as markdown."""
    done, better = load_cells("compensated", a.out), load_cells("refined", a.out)
    lines = [
        "# Compensation and CPR on the digits model",
        "",
        "`python -m fewstep.experiments.benchmarks.compensation",
        "compensated | refined | joint | table`",
        f"(seeds: tune {TUNE}, search {SEARCH}, original {ORIGINAL}, refine {REFINE},",
        f"test {TEST}).",
        "Mean squared error of the end point per element on fresh noise; ratios with 95 % paired",
        "bootstrap intervals. UniPC is the best of its orders 2, 3 and four grids at the cell,",
        "with the lower-order ending; the refined schedule starts from one template in all cells",
        f"(`{TEMPLATE}`). Sample-calls without the teacher's: ours /",
        "original (most of them also backward) / refined (backward counted as two).",
        "",
        "| w | NFE | UniPC | name | ours / UniPC | original / UniPC | ours / original "
        "| refined / UniPC | calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (n, g), c in sorted(done.items(), key=lambda item: item[0][::-1]):
        e, b = c["errors"], better.get((n, g))
        last, spent = "-", [str(v) for v in c["calls"].values()]
        if b is not None:
            last = ratio(b["errors"]["refined"], e["unipc"])
            spent.append(str(b["calls"]["refined"]))
        lines.append(
            f"| {g:g} | {n} | {np.mean(e['unipc']):.3g} | {c['names']['unipc']} "
            f"| {ratio(e['ours'], e['unipc'])} | {ratio(e['original'], e['unipc'])} "
            f"| {ratio(e['ours'], e['original'])} | {last} | {' / '.join(spent)} |"
        )
    result = a.out / "joint_result.json"
    if result.exists():
        lines += cpr_table(json.loads(result.read_text()))
    return "\n".join(lines) + "\n"


def cpr_table(found: dict[str, Any]) -> list[str]:
    """Predictions where nothing was fitted, and what leaving out costs."""
    lines = [
        "",
        f"CPR, fitted end to end to {', '.join(found['train'])} (NFE@w), asked where NFE is "
        f"{LEFT_NFE} or w is {LEFT_GUIDANCE:g}; {found['calls']} sample-calls.",
        "",
        "| w | NFE | best named | refined there | predicted | predicted / refined | medians "
        "| predicted / named |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(found["rows"], key=lambda r: (r["guidance"], r["nfe"])):
        there, named = r["to_refined"], r["to_named"]
        lines.append(
            f"| {r['guidance']:g} | {r['nfe']} | {r['named']:.3g} ({r['name']}) "
            f"| {r['refined']:.3g} | {r['predicted']:.3g} "
            f"| {r['predicted'] / r['refined']:.2f} [{there[0]:.2f}, {there[1]:.2f}] "
            f"| {r['medians']:.2f} "
            f"| {r['predicted'] / r['named']:.2f} [{named[0]:.2f}, {named[1]:.2f}] |"
        )
    for axis, each in found["left_out"].items():
        text = ", ".join(f"{k} {v:.2f}" for k, v in each.items())
        lines += ["", f"Error with a cell's {axis} left out / with it (held-out noise): {text}."]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("compensated", "refined", "joint", "table"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_compensation"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 6, 8, 10])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0, 7.5])
    for name, size in (("tune", 32), ("search", 160), ("train", 128), ("held", 32), ("test", 256)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--batch", type=int, default=24, help="of refinement")
    parser.add_argument("--rounds", type=int, default=6, help="of the joint fit")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    if a.what in ("compensated", "refined"):
        run_cells(a.what, a)
    elif a.what == "joint":
        run_cpr(a)
    else:
        print(table(a))


if __name__ == "__main__":
    main()
