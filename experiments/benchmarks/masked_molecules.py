"""Molecules in 4, 8 and 16 calls: fixed counts, rules that end early, and the schedules found.

Every sampler draws the same number of strings from the same uniforms, with the network shipped and
at temperature 1 unless it says otherwise. The error is the excess of the Frechet ChemNet distance
(`metrics_molecules`). Fixed counts are those of `space.counts`, among them "dp", dynamic
programming on the measured curve; "found" are the files in `experiments/studies`, and at 4 calls,
where nothing was searched for, the schedule found at 8 carried over (`MaskedDomain.adopt`). The
entropy bound and KLASS take a random number of calls; `rules` sets them to the same mean.

    python -m fewstep.experiments.benchmarks.masked_molecules rules rules.json
    python -m fewstep.experiments.benchmarks.masked_molecules run rules.json FOLDER --strings 1000
    python -m fewstep.experiments.benchmarks.masked_molecules table FOLDER

`run` keeps what it has measured in FOLDER and goes on where it was stopped. Needs rdkit
(`fewstep[molecules]`) and the wheel of fcd_torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from fewstep.experiments.benchmarks.calibration import RULES, calibrated
from fewstep.experiments.benchmarks.metrics_molecules import MoleculeScore
from fewstep.experiments.models import molecules
from fewstep.samplers import from_subs, sample_masked
from fewstep.samplers.categorical import uniforms
from fewstep.samplers.curve import load_curve
from fewstep.samplers.masked import MaskedProgress
from fewstep.samplers.token_denoiser import SubsDenoiser
from fewstep.space import load_schedule
from fewstep.space.counts import COUNTS, best_counts, counts_by_name
from fewstep.space.errors import FewstepError
from fewstep.space.masked import MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain

CALLS, BLOCK, GROUPS, T_9, FEWEST = (4, 8, 16), 250, 10, 2.262, 40
STUDIES = Path(molecules.__file__).parents[1] / "studies"
FIXED = (*COUNTS, "dp")
Array = NDArray[np.float64]


def found(calls: int) -> MaskedSchedule:
    """The schedule in `experiments/studies`, at 4 calls that of 8 carried over."""
    path = STUDIES / f"molecules_nfe{max(calls, 8):02d}.json"
    schedule = load_schedule(path)
    assert isinstance(schedule, MaskedSchedule)
    if schedule.nfe == calls:
        return schedule
    domain = MaskedDomain(
        molecules.LENGTH, calls, positions=("uniform", "confidence"), temperature=(0.5, 1.3)
    )
    return domain.adopt(schedule)[0]


def samplers(calls: int) -> dict[str, MaskedSchedule]:
    """The samplers of fixed counts at a number of calls, and the schedule found."""
    curve, length = load_curve(molecules.CURVE).falling, molecules.LENGTH
    counts = {name: counts_by_name(name, length, calls) for name in COUNTS}
    counts["dp"] = best_counts(curve, calls)[-1]
    make = MaskedSchedule.from_counts
    made = {name: make(counts[name]) for name in FIXED}
    for name in ("uniform", "reverse_cosine"):
        made[f"{name}, confidence"] = make(counts[name], positions="confidence")
    made["linear, extrapolate"] = make(counts["linear"], mode="extrapolate")
    made["found" if calls > 4 else "found at 8, carried over"] = found(calls)
    return made


def model() -> SubsDenoiser:
    """The network shipped; equal sequences of a batch are asked once."""
    net = molecules.load_net()

    def distinct(tokens: Tensor) -> Tensor:
        rows, index = tokens.unique(dim=0, return_inverse=True)
        logits: Tensor = net(rows)[index]
        return logits

    return from_subs(distinct, molecules.MASK, length=molecules.LENGTH)


def blank(count: int) -> Tensor:
    """Sequences of masks."""
    return torch.full((count, molecules.LENGTH), molecules.MASK)


def measure_rules(path: Path, strings: int) -> None:
    """Set the rules that end early to mean calls, and write their schedules."""
    generator, kept = torch.Generator().manual_seed(20_000), {}
    u = uniforms(strings, 2, molecules.LENGTH, generator=generator)
    for name, rule in RULES.items():
        made = calibrated(rule, CALLS, model(), blank(strings), u)
        kept[name] = {n: schedule.to_dict() for n, schedule in made.items()}
        for n, schedule in made.items():
            chosen = schedule.calls[0].model_dump(exclude_defaults=True)
            print(name, n, chosen, schedule.provenance, flush=True)
    path.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def draw(schedule: MaskedSchedule, denoiser: SubsDenoiser, start: int) -> tuple[Tensor, Tensor]:
    """A block of sequences, and the calls that each took."""
    u = uniforms(BLOCK, 2, molecules.LENGTH, generator=torch.Generator().manual_seed(start))
    calls = torch.zeros(BLOCK)

    def count(progress: MaskedProgress) -> None:
        calls.add_(progress.valid.any(-1))

    return sample_masked(schedule, denoiser, blank(BLOCK), u=u, callback=count), calls


def run(rules: Path, folder: Path, strings: int) -> None:
    """Draw and measure block after block of strings with every sampler."""
    bounds, score, denoiser = json.loads(rules.read_text("utf-8")), MoleculeScore(), model()
    exact = MaskedSchedule.token_by_token(molecules.LENGTH)
    every = {("one token a call", exact.nfe): exact}
    for n in CALLS:
        every |= {(name, n): made for name, made in samplers(n).items()}
        every |= {(k, n): MaskedSchedule.from_dict(made[str(n)]) for k, made in bounds.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with Progress() as bar:
        starts = range(0, strings, BLOCK)
        task = bar.add_task("samplers", total=len(starts) * len(every))
        for start in starts:
            for (name, n), schedule in every.items():
                path = folder / f"{name}.{n}.{start}.npz"
                if not path.exists():
                    drawn, calls = draw(schedule, denoiser, start)
                    measures = score.measure(drawn).float().numpy()
                    np.savez(path, measures=measures, calls=calls.numpy())
                bar.advance(task)


def read(folder: Path) -> dict[tuple[str, int], tuple[Array, Array]]:
    """Measures and calls of the strings that every sampler has drawn."""
    parts: dict[tuple[str, int], dict[int, tuple[Array, Array]]] = {}
    for path in folder.glob("*.npz"):
        name, n, start = path.stem.rsplit(".", 2)
        with np.load(path) as file:
            both = file["measures"].astype(float), file["calls"].astype(float)
        parts.setdefault((name, int(n)), {})[int(start)] = both
    shared = sorted(set.intersection(*(set(p) for p in parts.values())))
    return {
        key: tuple(np.concatenate([blocks[i][j] for i in shared]) for j in (0, 1))  # type: ignore[misc]
        for key, blocks in sorted(parts.items(), key=lambda kv: (kv[0][1], kv[0][0]))
    }


def errors(measures: Array, score: MoleculeScore) -> Array:
    """The excess distance of all strings, and of all but each tenth: (1 + GROUPS,).

    NaN where fewer than `FEWEST` of them are molecules, which have no covariance to speak of.
    """
    group = np.arange(len(measures)) % GROUPS
    there = ~np.isnan(measures[:, 0])
    if there.sum() < FEWEST:
        return np.full(1 + GROUPS, np.nan)
    return np.array([score.distance(measures[there & (group != g)]) for g in range(-1, GROUPS)])


def interval(values: Array) -> str:
    """A number with the 95 % interval of its delete-a-group jackknife."""
    whole, *rest = values
    if np.isnan(whole):
        return "–"
    spread = ((GROUPS - 1) * np.var(rest)) ** 0.5
    return f"{whole:.3f} ± {T_9 * spread:.3f}"


def show(folder: Path) -> None:
    """Print the table, and how dp and found compare with the best of the others."""
    score, data = MoleculeScore(), read(folder)
    known = {key: errors(measures, score) for key, (measures, _) in data.items()}
    print(f"{len(next(iter(data.values()))[1])} strings\n")
    print("| sampler | mean calls | excess FCD | less dp's | valid | distinct |")
    print("|---|---|---|---|---|---|")
    for (name, n), (measures, calls) in data.items():
        there = ~np.isnan(measures[:, 0])
        valid = float(there.mean())
        half = 1.96 * (valid * (1 - valid) / len(there)) ** 0.5
        distinct = len(np.unique(measures[there, 512:], axis=0)) / there.sum()
        dp = known.get(("dp", n))
        less = "–" if dp is None or name == "dp" else interval(known[name, n] - dp)
        print(
            f"| {name} | {calls.mean():.2f} | {interval(known[name, n])} | {less} | "
            f"{valid:.3f} ± {half:.3f} | {distinct:.4f} |"
        )
    print("\n| calls | sampler | against the best of | which is | ratio of errors |")
    print("|---|---|---|---|---|")
    for n in CALLS:
        mine = next(name for name, m in data if m == n and name.startswith("found"))
        others = {"fixed counts": FIXED, "rivals": [k for k, m in data if m == n and k != mine]}
        for name, kind in (("dp", "fixed counts"), (mine, "rivals")):
            scored = [k for k in others[kind] if k != name and not np.isnan(known[k, n][0])]
            best = min(scored, key=lambda k: known[k, n][0])
            ratio = interval(known[name, n] / known[best, n])
            print(f"| {n} | {name} | {kind} | {best} | {ratio} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="molecules in few calls")
    commands = parser.add_subparsers(dest="what", required=True)
    rules = commands.add_parser("rules", help="set the bounds to mean calls")
    rules.add_argument("out", type=Path)
    rules.add_argument("--strings", type=int, default=200)
    scores = commands.add_parser("run", help="draw and measure with every sampler")
    scores.add_argument("rules", type=Path)
    scores.add_argument("folder", type=Path)
    scores.add_argument("--strings", type=int, default=1000)
    table = commands.add_parser("table", help="print the tables")
    table.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "rules":
        measure_rules(args.out, args.strings)
    elif args.what == "run":
        run(args.rules, args.folder, args.strings)
    else:
        show(args.folder)


if __name__ == "__main__":
    try:
        main()
    except FewstepError as error:
        sys.exit(f"error: {error}")
