"""Do the verdict's intervals cover? Verdicts resampled from many fresh samples, at its own size.

    python -m fewstep.experiments.benchmarks.verdict run --nfe 4 5 6 8 \
        --found runs/demo/schedules runs/demo1/schedules
    python -m fewstep.experiments.benchmarks.verdict run --model galaxy --found FOLDER --nfe 5 8 \
        --fresh 8192
    python -m fewstep.experiments.benchmarks.verdict report

`run` draws the errors of the schedules found and of the best named solver (chosen on --choose
other samples) on --fresh samples that no search has seen, and keeps them. `report` takes 200
verdicts out of them, each begun on 1024 of the samples (without replacement) and doubled as a
verdict is, and counts how often the interval of the geometric ratio holds the ratio of all
samples; beside it the percentile interval of the mean, which is withheld where the tail index is
below 2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from fewstep.experiments.benchmarks.search import Landscape, problem
from fewstep.predictors.yardstick import Array, bootstrap_ratio, compare, geometric_ratio, level
from fewstep.search.verdict import WITHIN
from fewstep.space import load_schedule
from fewstep.space.baselines import named
from fewstep.space.errors import FewstepError

FIRST = 2_000_000
"""Index of the first fresh sample: far from what searches and other benchmarks use."""

PART = 1024


def draw(a: argparse.Namespace) -> None:
    """Errors of the found schedules and of the best named solvers, a file for each NFE."""
    made, todo = problem(a.model), [n for n in a.nfe if not _path(a, n).exists()]
    if not todo:
        return
    choose, rivals = Landscape(made, a.choose, teacher_calls=a.teacher), {}
    for nfe in todo:
        solvers = named(made.denoiser.noise, nfe)
        scores = [level(e, "geometric") for e in choose.per_sample(list(solvers.values()))]
        best = list(solvers)[int(np.nanargmin(scores))]
        found = [load_schedule(folder / f"nfe{nfe:02d}.json") for folder in a.found]
        rivals[nfe] = best, [*found, solvers[best]]
    parts: dict[int, list[Array]] = {nfe: [] for nfe in todo}
    for first in range(0, a.fresh, PART):
        noise = Landscape(made, min(PART, a.fresh - first), FIRST + first, teacher_calls=a.teacher)
        for nfe, (_, schedules) in rivals.items():
            parts[nfe].append(np.concatenate([noise.per_sample([s]) for s in schedules]))
        print(f"{a.model}: {first + PART} of {a.fresh} samples", flush=True)
    for nfe, (best, _) in rivals.items():
        errors = np.ascontiguousarray(np.concatenate(parts[nfe], axis=1))  # the named solver last
        save_file({"errors": errors}, _path(a, nfe), metadata={"named": best})


def _path(a: argparse.Namespace, nfe: int) -> Path:
    folder: Path = a.out
    return folder / f"{a.model}_{nfe}.safetensors"


def one_verdict(
    a: Array, b: Array, rng: np.random.Generator, begin: int, most: int
) -> NDArray[np.int64]:
    """The samples that a verdict ends with: doubled until the interval is within 10 %."""
    order, size = rng.permutation(len(a)), begin
    while True:
        at = order[:size]
        _, (low, high) = geometric_ratio(a[at], b[at])
        if math.log(high / low) <= 2 * WITHIN or 2 * size > min(most, len(a)):
            return at
        size *= 2


def rows(path: Path, begin: int, most: int, verdicts: int) -> Iterator[str]:
    """Lines of the table, one for each schedule found."""
    with safe_open(path, framework="np") as file:
        name, (*found, b) = file.metadata()["named"], file.get_tensor("errors")
    model, nfe = path.stem.rsplit("_", 1)
    for a in found:
        yield f"| {model} | {nfe} | {name} {_row(a, b, begin, most, verdicts)}"


def _row(a: Array, b: Array, begin: int, most: int, verdicts: int) -> str:
    rng = np.random.default_rng(0)
    truth, mean = geometric_ratio(a, b)[0], a.mean() / b.mean()
    covered, by_mean, sizes = 0, 0, []
    for k in range(verdicts):
        at = one_verdict(a, b, rng, begin, most)
        sizes.append(len(at))
        _, (low, high) = geometric_ratio(a[at], b[at])
        covered += low <= truth <= high
        low, high = bootstrap_ratio(a[at], b[at], np.mean, resamples=200, seed=k)
        by_mean += low <= mean <= high
    whole = compare(a, b, resamples=100)
    return (
        f"| {len(a)} | {truth:.3f} | {whole.median:.3f} "
        f"| {whole.mean:.3f} | {whole.q90:.3f} | {whole.q99:.3f} "
        f"| {100 * whole.share_worse:.1f} % | {whole.tail_index:.2f} "
        f"| {int(np.median(sizes))} | {100 * covered / verdicts:.0f} % "
        f"| {100 * by_mean / verdicts:.0f} % |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--found", nargs="+", type=Path, help="folders of nfe05.json, ...")
    parser.add_argument("--nfe", nargs="+", type=int, default=[4, 5, 6, 8])
    parser.add_argument("--choose", type=int, default=512, help="samples named solvers compete on")
    parser.add_argument("--fresh", type=int, default=32_768)
    parser.add_argument("--teacher", type=int, default=64, help="network calls of the teacher")
    parser.add_argument("--begin", type=int, default=1024, help="samples of a verdict at first")
    parser.add_argument("--most", type=int, default=16_384, help="samples of a verdict at most")
    parser.add_argument("--verdicts", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_verdict"))
    a = parser.parse_args()
    if a.what == "run":
        if a.found is None:
            raise FewstepError("--found FOLDER: the folder of the schedules found is needed")
        torch.set_num_threads(1)
        a.out.mkdir(parents=True, exist_ok=True)
        draw(a)
    paths = sorted(a.out.glob("*.safetensors"))
    if not paths:
        raise FewstepError(f"{a.out}: no runs found; start some with `run`")
    print(
        "| model | NFE | best named | samples | geometric | median | mean | 90 %q | 99 %q | worse "
        "| tail index | verdict's samples | covered | mean's interval covers |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for path in paths:
        for row in rows(path, a.begin, a.most, a.verdicts):
            print(row, flush=True)


if __name__ == "__main__":
    main()
