"""How well the quality predictor ranks candidates it has not seen.

    OMP_NUM_THREADS=1 python -P -m fewstep.experiments.benchmarks.predictor --seeds 3

Per seed, 300 candidates of the released evolution and 300 of S3, the same space and samples. A
predictor is trained on the first 150 and asked for the order of the next 150: Kendall's tau with
their scores. What S3 chose itself spans a narrower range, so its tau is lower by construction.
Writes OUT/predictor.png (predicted against scored) and prints a table; tau of 1 is the right order
throughout, 0 no better than chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fewstep.experiments.benchmarks.search import SearchBench
from fewstep.predictors.quality import QualityPredictor, kendall_tau
from fewstep.search.strategies import Evaluated
from fewstep.space.tokens import tokens

KINDS = ("gaussian", "sequence")


@dataclass(frozen=True)
class Case:
    """One run's second half: log scores, and what each model predicted from the first half."""

    strategy: str
    seed: int
    scores: np.ndarray
    predicted: dict[str, np.ndarray]
    chosen: str

    def tau(self, kind: str) -> float:
        """Kendall's tau of one model."""
        a, b = torch.from_numpy(self.predicted[kind]), torch.from_numpy(self.scores)
        return kendall_tau(a, b)


def case(strategy: str, seed: int, told: Sequence[Evaluated], nfe: int, half: int) -> Case:
    """Train on the first `half` finite results, predict the rest."""
    ok = [k for k in told if k.status == "ok"]
    x, y = [tokens(k.schedule)[0] for k in ok], [k.score for k in ok]
    predicted = {}
    for kind in KINDS:
        model = QualityPredictor(kind, seed).fit(x[:half], y[:half], nfe)
        predicted[kind] = model.predict(torch.stack(x[half:]))[0]
    chosen = QualityPredictor("auto", seed).fit(x[:half], y[:half], nfe).chosen
    return Case(strategy, seed, np.log(y[half:]), predicted, chosen)


def draw(cases: Sequence[Case], path: Path) -> None:
    """Predicted against scored, a panel per strategy and model, colours are seeds."""
    from matplotlib.figure import Figure

    strategies = list(dict.fromkeys(c.strategy for c in cases))
    size = (3.4 * len(KINDS), 3.1 * len(strategies))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(strategies), len(KINDS), squeeze=False)
    for row, strategy in zip(axes, strategies, strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            for c in cases:
                if c.strategy == strategy:
                    label = f"seed {c.seed}: {c.tau(kind):.2f}"
                    axis.scatter(c.predicted[kind], c.scores, s=6, alpha=0.6, label=label)
            axis.set_title(f"{strategy}, {kind}", fontsize=9)
            axis.set_xlabel("predicted (log score, compressed)", fontsize=8)
            axis.set_ylabel("log score", fontsize=8)
            axis.legend(fontsize=7, title="Kendall tau", title_fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_predictor"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    print("| NFE | strategy | seed | tau gaussian | tau sequence | chosen by cross-validation |")
    print("|" + " --- |" * 6)
    for nfe in args.nfe:
        bench, cases = SearchBench(args.model, nfe, args.samples, 16), []
        for strategy in ("evolution", "s3"):
            for seed in range(args.seeds):
                told = bench.search_from_seeds(strategy, seed, args.candidates, 20)
                found = case(strategy, seed, told, nfe, args.candidates // 2)
                cases.append(found)
                taus = " | ".join(f"{found.tau(kind):.2f}" for kind in KINDS)
                print(f"| {nfe} | {strategy} | {seed} | {taus} | {found.chosen} |", flush=True)
        draw(cases, args.out / f"predictor_{args.model}_{nfe}.png")


if __name__ == "__main__":
    main()
