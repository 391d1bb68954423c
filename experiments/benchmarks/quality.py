"""Quality against network calls: errors to the reference, and distances to real data.

    python -P -m fewstep.experiments.benchmarks.quality run --model fashion --nfe 3 4 5 6 8 10 \
        --found runs/fashion/schedules
    python -P -m fewstep.experiments.benchmarks.quality table
    python -P -m fewstep.experiments.benchmarks.quality picture --model fashion --nfe 5 \
        --found runs/fashion/schedules --picture experiments/results/fashion.png

Rows at each number of calls: the best named solver on its best grid (chosen on other noise), the
scheduler that the pipeline came with, what a search found without refinement (--alone) and with
it, and the reference of many calls. The error is the squared distance to the reference's sample
from the same noise; FD is the Frechet distance of the classifier's features, to the reference's
samples of the same noise and to real images that the model was not trained on. A row is kept as
JSON when it is measured; `run` goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from fewstep.experiments.benchmarks.search import Landscape, problem
from fewstep.experiments.models import train_digits, train_fashion
from fewstep.predictors.yardstick import frechet_distance, geometric_ratio, level
from fewstep.samplers import Problem
from fewstep.samplers.pictures import contact_sheet
from fewstep.space import OdeSchedule, ProgramSchedule, load_schedule
from fewstep.space.baselines import named
from fewstep.space.files import write_text

FIRST = 3_000_000
"""Index of the first sample: far from what searches and other benchmarks use."""


def _fashion_real() -> Tensor:
    return functional.pixel_unshuffle(train_fashion.load_data("t10k")[0], 2)


REAL: dict[str, Callable[[], Tensor]] = {
    "digits": lambda: train_digits.load_data()[2],
    "fashion": _fashion_real,
}
"""Real images by model, in the form of its samples; the galaxy network's are not at hand."""


class ImageBench:
    """A model with its reference on fresh noise, and on other noise to choose by."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.problem: Problem = problem(a.model)
        real = REAL.get(a.model.partition("@")[0])  # first: data that is missing is said at once
        self.real = None if real is None else self._features(real())
        teacher = {"teacher_calls": a.teacher}
        self.choose = Landscape(self.problem, a.choose, FIRST - a.choose, **teacher)
        self.fresh = Landscape(self.problem, a.fresh, FIRST, **teacher)
        self.reference = self._features(self.fresh.teacher)

    def _features(self, x: Tensor) -> np.ndarray:
        """Features (N, F) of samples; none (N, 0) where the model has none."""
        if self.problem.features is None:
            return np.zeros((len(x), 0))
        parts = [self.problem.features(part).double().numpy() for part in x.split(1024)]
        return np.concatenate(parts)

    def samplers(
        self, nfe: int, a: argparse.Namespace
    ) -> dict[str, tuple[str, OdeSchedule | ProgramSchedule]]:
        """Row name -> name of the sampler, and the schedule."""
        solvers: dict[str, OdeSchedule | ProgramSchedule] = dict(
            named(self.problem.denoiser.noise, nfe)
        )
        errors = self.choose.per_sample(list(solvers.values()))
        best = list(solvers)[int(np.nanargmin([level(e, "geometric") for e in errors]))]
        rows = {"best named": (best, solvers[best])}
        if self.problem.baselines is not None:
            for name, schedule in self.problem.baselines(nfe).items():
                rows["stock"] = (name.removeprefix("stock:"), schedule)
        for row, where in (("search alone", a.alone), ("found", a.found)):
            if where is None:
                continue
            name = f"nfe{nfe:02d}.json"
            path = where / name if where.is_dir() else where.with_name(f"{where.name}_{name}")
            if path.is_file():
                rows[row] = (path.name, load_schedule(path))
        return rows

    def row(self, x: Tensor) -> dict[str, Any]:
        """Errors and distances of samples (B, *shape) of the fresh noise."""
        errors = ((x - self.fresh.teacher) ** 2).flatten(1).mean(-1).double().numpy()
        features = self._features(x)
        row: dict[str, Any] = {"errors": errors}
        if features.shape[1]:
            row["fd_reference"] = frechet_distance(features, self.reference)
            if self.real is not None:
                row["fd_real"] = frechet_distance(features, self.real)
        return row


def run(a: argparse.Namespace) -> None:
    """Measure the numbers of calls that have no file yet."""
    todo = [nfe for nfe in a.nfe if not _path(a, nfe).is_file()]
    bench = ImageBench(a) if todo else None
    for nfe in todo:
        assert bench is not None
        rows, base = [], None
        for row, (name, schedule) in bench.samplers(nfe, a).items():
            made = bench.row(bench.fresh.drawn([schedule])[0])
            errors = made.pop("errors")
            base = errors if base is None else base
            ratio, interval = geometric_ratio(errors, base) if errors is not base else (1.0, None)
            of = {s: level(errors, s) / level(base, s) for s in ("median", "mean")}
            q90 = float(np.quantile(errors, 0.9) / np.quantile(base, 0.9))
            score = {"error": level(errors, "geometric"), "geometric": ratio, "interval": interval}
            rows.append({"row": row, "name": name, **score, **of, "q90": q90, **made})
        made = bench.row(bench.fresh.teacher)
        made.pop("errors")
        rows.append({"row": "reference", "name": f"{a.teacher} calls", "error": 0.0, **made})
        facts = {"model": a.model, "nfe": nfe, "samples": a.fresh, "rows": rows}
        write_text(_path(a, nfe), json.dumps(facts, indent=1) + "\n")
        print(f"{a.model}, {nfe} calls: measured", flush=True)


def _path(a: argparse.Namespace, nfe: int) -> Path:
    folder: Path = a.out
    return folder / f"quality_{a.model}_{nfe:02d}.json"


def table(a: argparse.Namespace) -> None:
    """Print everything measured, as Markdown."""
    print(
        "| model | calls | | sampler | error | geometric (95 %) | median | mean | 90 % q |", end=""
    )
    print(" FD to reference | FD to real |")
    print("|---" * 11 + "|")
    for path in sorted(a.out.glob("quality_*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        for r in facts["rows"]:
            low, high = r.get("interval") or (None, None)
            span = f" ({low:.3f}–{high:.3f})" if low is not None else ""
            cells = [facts["model"], str(facts["nfe"]), r["row"], r["name"], f"{r['error']:.3g}"]
            cells.append(f"{r['geometric']:.3f}{span}" if "geometric" in r else "–")
            cells += [f"{r[k]:.3f}" if k in r else "–" for k in ("median", "mean", "q90")]
            cells += [f"{r[k]:.3g}" if k in r else "–" for k in ("fd_reference", "fd_real")]
            print("| " + " | ".join(cells) + " |")


def picture(a: argparse.Namespace) -> None:
    """One row of images per sampler, the same noise in each column."""
    a.fresh, (nfe, *_) = a.columns, a.nfe
    bench = ImageBench(a)
    rows = []
    for row, (name, schedule) in bench.samplers(nfe, a).items():
        rows.append((f"{row}: {name}\n{nfe} calls", bench.fresh.drawn([schedule])[0]))
    rows.append((f"reference, {a.teacher} calls", bench.fresh.teacher))
    print(contact_sheet(a.picture, rows, bench.problem.picture))


def main() -> None:
    """Do what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["run", "table", "picture"])
    parser.add_argument("--model", default="fashion", help="digits, digits@5, galaxy, fashion")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5])
    where = "folder of nfe05.json and so on, or NAME for NAME_nfe05.json"
    parser.add_argument("--found", type=Path, default=Path("runs/fashion/schedules"), help=where)
    alone = "the same, of a search without refinement"
    parser.add_argument("--alone", type=Path, help=alone)
    parser.add_argument("--fresh", type=int, default=2048)
    parser.add_argument("--choose", type=int, default=128)
    parser.add_argument("--teacher", type=int, default=64)
    parser.add_argument("--columns", type=int, default=20, help="images in the picture")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--picture", type=Path, default=Path("experiments/results/fashion.png"))
    arguments = parser.parse_args()
    {"run": run, "table": table, "picture": picture}[arguments.what](arguments)


if __name__ == "__main__":
    main()
