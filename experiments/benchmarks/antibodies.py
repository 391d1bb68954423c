"""Infilling the loops of antibodies with AntiBERTy in few calls: counts, orders and bounds.

Heavy chains are drawn from IgLM; 32 residues of the three loops are masked (10 of H1, 10 of H2,
the first 12 of H3, found by the cysteines and the tryptophan before them), the framework is given.
Every sampler gets the same sequences and the same uniforms and draws at temperature 1. Judges:

    recovery    share of masked residues that come out as they were
    judge       IgLM's nats per residue of the whole chain; that of the original is printed too
    own         AntiBERTy's nats per loop residue with a random half of the loops visible
    entropy     of the residues drawn, over all sequences and positions, nats (a sampler that is
                sure of everything scores well elsewhere and low here)
    calls       mean network calls of a sequence

The entropy bound and KLASS take a random number of calls: `rules` sets them to means of 4, 8 and
16 on sequences that `run` does not use, and so does the search, whose files are "found".

    python -m fewstep.experiments.benchmarks.antibodies curve curve.json
    python -m fewstep.experiments.benchmarks.antibodies rules rules.json
    fewstep search experiments/studies/antibodies.toml --set model.curve=curve.json --out FOLDER
    python -m fewstep.experiments.benchmarks.antibodies run curve.json rules.json scores.jsonl \
        --found FOLDER/schedules
    python -m fewstep.experiments.benchmarks.antibodies table scores.jsonl

`run` appends to its file, eight sequences after the other, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from fewstep.experiments.benchmarks.calibration import RULES, calibrated
from fewstep.experiments.benchmarks.metrics_antibodies import (
    IgLM,
    draw_sequences,
    load_judge,
    surprise,
)
from fewstep.experiments.models import antibodies
from fewstep.samplers import MaskedProblem, sample_masked
from fewstep.samplers.categorical import uniforms
from fewstep.samplers.curve import cross_entropy_curve, load_curve, save_curve
from fewstep.samplers.masked import MaskedProgress
from fewstep.space import load_schedule
from fewstep.space.counts import best_counts, counts_by_name
from fewstep.space.errors import FewstepError
from fewstep.space.masked import MaskedSchedule

FREE, LENGTH, BLOCK = 32, 142, 8
DP = "dynamic programming"
_POINTS = (0, 1, 2, 4, 8, 12, 16, 24, 31)


def loops(sequence: str) -> list[int] | None:
    """Indices of the 32 residues to mask, or None where the landmarks are not found."""
    first = sequence.find("C", 8, 30)
    tryptophan = sequence.find("W", first + 10, first + 18)
    last = sequence.find("C", 80, 104)
    if min(first, tryptophan, last) < 0 or last + 15 > len(sequence):
        return None
    h1, h2, h3 = first + 4, tryptophan + 14, last + 3
    return [*range(h1, h1 + 10), *range(h2, h2 + 10), *range(h3, h3 + 12)]


def tasks(judge: IgLM, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Complete chains `(n, 142)` drawn from IgLM, and which of their residues are masked."""
    chosen: list[tuple[str, list[int]]] = []
    while len(chosen) < count:
        for sequence in draw_sequences(judge, 2 * BLOCK, seed=seed, batch=2 * BLOCK):
            where = loops(sequence)
            if where is not None:
                chosen.append((sequence, where))
        seed += 1
    chosen = chosen[:count]
    tokens = antibodies.encode([s for s, _ in chosen], LENGTH)
    free = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (_, where) in zip(free, chosen, strict=True):
        row[[i + 1 for i in where]] = True
    return tokens, free


def rivals(calls: int, curve: tuple[float, ...]) -> dict[str, MaskedSchedule]:
    """The samplers of fixed counts compared at a number of calls."""
    even = counts_by_name("uniform", FREE, calls)
    make = MaskedSchedule.from_counts
    return {
        "uniform": make(even),
        "cosine": make(counts_by_name("cosine", FREE, calls)),
        DP: make(best_counts(curve, calls)[-1]),
        "confidence": make(even, positions="confidence"),
    }


def scored(
    schedule: MaskedSchedule, tokens: Tensor, free: Tensor, judge: IgLM, start: int
) -> Iterator[dict[str, object]]:
    """One row for each sequence."""
    width = int((tokens != antibodies.PAD).sum(-1).max())  # the network is not asked for padding
    u = torch.stack([
        uniforms(schedule.uniforms, LENGTH, generator=torch.Generator().manual_seed(start + i))
        for i in range(len(tokens))
    ])[..., :width]  # fmt: skip
    tokens, free = tokens[:, :width], free[:, :width]
    model, calls = antibodies.denoiser(_network()), torch.zeros(len(tokens))

    def count(progress: MaskedProgress) -> None:
        calls.add_(progress.valid.any(-1))

    start_tokens = tokens.masked_fill(free, antibodies.MASK)
    done = sample_masked(schedule, model, start_tokens, u=u, callback=count)
    nats = surprise(judge, antibodies.decode(done))
    keys = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(start))
    half = free & (keys.masked_fill(~free, math.inf).argsort(-1).argsort(-1) < FREE // 2)
    logits = model(done.masked_fill(half, antibodies.MASK), torch.ones(len(done)))
    log_p = logits.double().log_softmax(-1).gather(2, done[..., None])[..., 0]
    for b in range(len(tokens)):
        yield {
            "sequence": start + b,
            "recovery": float((done[b] == tokens[b])[free[b]].double().mean()),
            "judge": float(nats[b]),
            "own": float(-log_p[b][half[b]].mean()),
            "calls": float(calls[b]),
            "drawn": antibodies.decode(done[b][free[b]][None])[0],
        }


def problem(*, curve: str | None = None, chains: int = 64) -> MaskedProblem:
    """The study factory: schedules that infill loops, scored by IgLM's nats per residue.

    Args:
        curve: what `curve` measured, for the counts "dp" among the named ones.
        chains: how many chains there are to infill; samples go round them.

    Raises:
        AssetError: a pinned wheel is absent; the message says how to get it.
    """
    judge = load_judge()
    tokens, free = tasks(judge, chains, seed=30_000)
    start = tokens.masked_fill(free, antibodies.MASK)
    return MaskedProblem(
        denoiser=antibodies.denoiser(_network()),
        length=LENGTH,
        objective="nats_per_residue",
        measure=lambda done: surprise(judge, antibodies.decode(done))[:, None],
        prompt=lambda indices: start[indices % chains],
        curve=None if curve is None else load_curve(curve).falling,
        fingerprint="antiberty-0.1.3",
    )


_KEPT: dict[str, antibodies.AntiBerty] = {}


def _network() -> antibodies.AntiBerty:
    """The network, loaded once."""
    if "net" not in _KEPT:
        _KEPT["net"] = antibodies.load_network()
    return _KEPT["net"]


def measure_curve(path: Path, sequences: int) -> None:
    """Measure h on sequences that `run` does not use, and write it."""
    tokens, free = tasks(load_judge("IgLM"), sequences, seed=10_000)
    with Progress() as bar:
        task = bar.add_task("cross-entropy curve", total=None)
        curve = cross_entropy_curve(
            antibodies.denoiser(_network()), tokens, free, points=_POINTS, batch=BLOCK,
            generator=torch.Generator().manual_seed(0),
            on_progress=lambda i, n: bar.update(task, completed=i, total=n),
        )  # fmt: skip
    save_curve(curve, path)
    print(" ".join(f"{curve.values[m]:.3f}" for m in _POINTS), f"at {_POINTS} visible")


def measure_rules(path: Path, sequences: int, calls: list[int]) -> None:
    """Set the rules that end early to mean calls, and write their schedules."""
    tokens, free = tasks(load_judge("IgLM"), sequences, seed=20_000)
    start = tokens.masked_fill(free, antibodies.MASK)
    u = uniforms(sequences, 2, LENGTH, generator=torch.Generator().manual_seed(1))
    model, found = antibodies.denoiser(_network()), dict[str, dict[int, object]]()
    for name, rule in RULES.items():
        made = calibrated(rule, calls, model, start, u)
        found[name] = {n: schedule.to_dict() for n, schedule in made.items()}
        for n, schedule in made.items():
            print(name, n, schedule.calls[0].model_dump(exclude_defaults=True),
                  schedule.provenance, flush=True)  # fmt: skip
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


def run(
    curve: Path, rules: Path, out: Path, sequences: int, calls: list[int], found: Path | None
) -> None:
    """Score every sampler on block after block of sequences; `found` has files nfe08.json ..."""
    values, judge = load_curve(curve).falling, load_judge("IgLM")
    bounds = json.loads(rules.read_text(encoding="utf-8"))
    old = [] if not out.exists() else [json.loads(line) for line in out.open()]
    known = {(r["name"], r["of"], r["sequence"]) for r in old}
    tokens, free = tasks(judge, sequences, seed=0)
    samplers = {("one token a call", FREE): MaskedSchedule.token_by_token(FREE)}
    for n in calls:
        samplers |= {(name, n): made for name, made in rivals(n, values).items()}
        for name, made in bounds.items():
            samplers[name, n] = MaskedSchedule.from_dict(made[str(n)])
        if found is not None and (path := found / f"nfe{n:02d}.json").is_file():
            schedule = load_schedule(path)
            assert isinstance(schedule, MaskedSchedule)
            samplers["found", n] = schedule
    with out.open("a", encoding="utf-8") as file, Progress() as bar:
        blocks = range(0, sequences, BLOCK)
        task = bar.add_task("samplers", total=len(blocks) * len(samplers))
        for start in blocks:
            part = slice(start, start + BLOCK)
            if ("original", 0, start) not in known:
                for i, nats in enumerate(
                    surprise(judge, antibodies.decode(tokens[part])).tolist()
                ):
                    row = {"name": "original", "of": 0, "sequence": start + i, "judge": nats,
                           "recovery": 1.0, "own": math.nan, "calls": 0.0}  # fmt: skip
                    row["drawn"] = antibodies.decode(tokens[start + i][free[start + i]][None])[0]
                    file.write(json.dumps(row) + "\n")
            for (name, n), schedule in samplers.items():
                if (name, n, start) not in known:
                    for row in scored(schedule, tokens[part], free[part], judge, start):
                        file.write(json.dumps({"name": name, "of": n} | row) + "\n")
                file.flush()
                bar.advance(task)


def show(path: Path) -> None:
    """Print means with 95 % intervals over the sequences that every sampler has done.

    "Less" is the judge's nats less those of dynamic programming, paired by sequence.
    """
    rows = [json.loads(line) for line in path.open()]
    groups: dict[tuple[str, int], dict[int, dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["of"]), {})[row["sequence"]] = row
    shared = sorted(set.intersection(*(set(group) for group in groups.values())))
    print(f"{len(shared)} sequences\n")
    print("| sampler | mean calls | recovery | judge, nats | less | own, nats | entropy |")
    print("|---|---|---|---|---|---|---|")
    for (name, n), group in sorted(groups.items(), key=lambda kv: (kv[0][1], kv[0][0])):
        values = {
            key: np.array([float(str(group[i][key])) for i in shared])
            for key in ("calls", "recovery", "judge", "own")
        }
        if (DP, n) in groups and name != DP:
            dp = groups[DP, n]
            values["less"] = values["judge"] - [float(str(dp[i]["judge"])) for i in shared]
        letters = "".join(str(group[i]["drawn"]) for i in shared)
        share = np.array([letters.count(x) for x in antibodies.RESIDUES]) / len(letters)
        entropy = float(-(share[share > 0] * np.log(share[share > 0])).sum())
        keys = ("recovery", "judge", "less", "own")
        cells = [_interval(values[key]) if key in values else "–" for key in keys]
        made = _interval(values["calls"], 1)
        print(f"| {name} | {made} | {' | '.join(cells)} | {entropy:.2f} |")


def _interval(values: np.ndarray, digits: int = 3) -> str:
    mean = float(np.mean(values))
    if math.isnan(mean):
        return "–"
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if half else f"{mean:.{digits}f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="infill antibody loops in few calls")
    commands = parser.add_subparsers(dest="what", required=True)
    curve = commands.add_parser("curve", help="measure the cross-entropy curve")
    curve.add_argument("out", type=Path)
    curve.add_argument("--sequences", type=int, default=64)
    rules = commands.add_parser("rules", help="set the bounds to mean calls")
    rules.add_argument("out", type=Path)
    rules.add_argument("--sequences", type=int, default=16)
    rules.add_argument("--calls", type=int, nargs="+", default=[4, 8, 16])
    scores = commands.add_parser("run", help="score every sampler")
    scores.add_argument("curve", type=Path)
    scores.add_argument("rules", type=Path)
    scores.add_argument("out", type=Path)
    scores.add_argument("--sequences", type=int, default=200)
    scores.add_argument("--calls", type=int, nargs="+", default=[4, 8, 16])
    scores.add_argument("--found", type=Path, help="folder of schedules found")
    table = commands.add_parser("table", help="print the table")
    table.add_argument("scores", type=Path)
    args = parser.parse_args()
    if args.what == "curve":
        measure_curve(args.out, args.sequences)
    elif args.what == "rules":
        measure_rules(args.out, args.sequences, args.calls)
    elif args.what == "run":
        run(args.curve, args.rules, args.out, args.sequences, args.calls, args.found)
    else:
        show(args.scores)


if __name__ == "__main__":
    try:
        main()
    except FewstepError as error:
        sys.exit(f"error: {error}")
