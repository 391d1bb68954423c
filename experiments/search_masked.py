"""Search count schedules of the molecule model: calls, and what they cost in Frechet distance.

    python -m fewstep.experiments.search_masked --nfe 8 --strategy evolution --out runs/molecules

The score of a schedule is the Frechet ChemNet Distance of the valid molecules among `--samples`
strings, all schedules on the same uniforms, so candidates are compared on the same draws. The
named schedules are scored first and are the strategies' starting population. At the end the best
found and the best named one are drawn anew from fresh uniforms, `--final` molecules each, and the
ratio of their distances gets a paired bootstrap interval over molecules. A killed search goes on
where it stopped: results are appended to OUT/trials.jsonl as they come, and random numbers are a
function of the seed and the generation.

What it leaves: OUT/schedules/nfe08.json, OUT/results.json, OUT/trials.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.experiments import metrics_molecules as metrics
from fewstep.experiments.models import molecules
from fewstep.experiments.models.assets import AssetError
from fewstep.samplers.masked import TokenDenoiser, from_subs, sample_masked, uniforms
from fewstep.search.objective import Array, ratio_interval
from fewstep.search.strategies import Evaluated, Strategy, make
from fewstep.search.strategies.common import members
from fewstep.space import FewstepError, StudyError, load_schedule, save_schedule
from fewstep.space.masked import MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain

Score = Callable[[MaskedSchedule], float]


@dataclass(frozen=True)
class Drawn:
    """Molecules of one schedule: features by sample index, NaN rows where a string is invalid."""

    features: Tensor
    validity: float
    uniqueness: float

    @property
    def fcd(self) -> float:
        """Distance of the valid molecules, inf if there are fewer than two."""
        valid = self.features[~self.features[:, 0].isnan()]
        return metrics.fcd(valid) if len(valid) > 1 else float("inf")


def draw(
    schedule: MaskedSchedule, denoiser: TokenDenoiser, samples: int, seed: int, batch: int = 250
) -> Drawn:
    """Molecules 0..samples-1 of the stream `seed`; equal streams share their uniforms."""
    generator = torch.Generator().manual_seed(seed)
    strings: list[str] = []
    while len(strings) < samples:
        size = min(batch, samples - len(strings))
        u = uniforms(size, 2, molecules.LENGTH, generator=generator)
        blank = torch.full((size, molecules.LENGTH), denoiser.mask)
        strings += molecules.decode(sample_masked(schedule, denoiser, blank, u=u))
    canonical = metrics.canonical(strings)
    at = [i for i, smiles in enumerate(canonical) if smiles is not None]
    valid = [smiles for smiles in canonical if smiles is not None]
    features = torch.full((samples, 512), float("nan"), dtype=torch.float64)
    features[at] = metrics.chemnet_features(valid)
    return Drawn(features, len(valid) / samples, len(set(valid)) / max(1, len(valid)))


def search(
    domain: MaskedDomain,
    strategy: Strategy,
    score: Score,
    trials: Path,
    *,
    candidates: int,
    generation: int,
    seed: int,
) -> list[Evaluated]:
    """Score the named schedules, then generations of proposals, until `candidates` are known.

    Args:
        domain: the space.
        strategy: proposes; sees every result of the generations before.
        score: the number minimised.
        trials: JSON lines, read back on the next call; a digest is never scored twice.
        candidates: schedules to score in all, the named ones included.
        generation: proposals at a time.
        seed: of the proposals.

    Returns:
        The results in the order told.

    Raises:
        StudyError: the strategy can only read schedules of another kind.
    """
    kept: dict[str, float] = {}
    if trials.exists():
        rows = (json.loads(line) for line in trials.read_text().splitlines())
        kept = {row["digest"]: row["score"] for row in rows}
    known: list[Evaluated] = []
    seen: set[str] = set()

    def tell(schedule: MaskedSchedule, source: str) -> None:
        if schedule.digest in seen or len(known) >= candidates:
            return
        seen.add(schedule.digest)
        if schedule.digest not in kept:
            began = time.monotonic()
            kept[schedule.digest] = score(schedule)
            row = {"digest": schedule.digest, "score": kept[schedule.digest], "source": source}
            row |= {"counts": schedule.counts, "seconds": round(time.monotonic() - began, 2)}
            with trials.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        value = kept[schedule.digest]
        status = "ok" if np.isfinite(value) else "diverged"
        known.append(Evaluated(schedule, value, status, source=source))

    for name, schedule in domain.baselines().items():
        tell(schedule, name)
    if strategy.name != "random" and not members(domain, known):
        raise StudyError(f"strategy {strategy.name} reads no masked schedules: use random")
    stale = number = 0
    while len(known) < candidates and stale < 20:  # a small space may have no more members
        rng = np.random.default_rng([seed, domain.nfe, number])
        before = len(known)
        for proposal in strategy.propose(known, number, generation, rng):
            tell(proposal.schedule, proposal.source)
        number, stale = number + 1, stale + 1 if len(known) == before else 0
    return known


def _distance(features: Array, rows: NDArray[np.intp]) -> float:
    """FCD of the valid ones among the chosen molecules."""
    chosen = torch.from_numpy(features[rows])
    return metrics.fcd(chosen[~chosen[:, 0].isnan()])


def finish(
    domain: MaskedDomain,
    known: Sequence[Evaluated],
    denoiser: TokenDenoiser,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Re-score the best found and the best named schedule on fresh uniforms; write the files."""
    named = set(domain.baselines())
    best = min(known, key=lambda r: r.score)
    best_named = min((r for r in known if r.source in named), key=lambda r: r.score)
    fresh = args.seed + 1_000_003
    a, b = (draw(r.schedule, denoiser, args.final, fresh) for r in (best, best_named))
    interval = ratio_interval(
        a.features.numpy(), b.features.numpy(), resamples=200, score=_distance
    )
    row = {
        "nfe": domain.nfe, "counts": best.schedule.counts, "source": best.source,
        "found_score": a.fcd, "best_named": best_named.source, "best_named_score": b.fcd,
        "ratio": a.fcd / b.fcd, "interval": interval, "molecules": args.final,
        "validity": [a.validity, b.validity], "uniqueness": [a.uniqueness, b.uniqueness],
        "candidates": len(known), "samples": args.samples, "strategy": args.strategy,
        "seed": args.seed,
    }  # fmt: skip
    provenance = {"model": "molecules", "objective": "fcd", "score": a.fcd, **row}
    schedule = best.schedule.model_copy(update={"provenance": provenance})
    path = args.out / "schedules" / f"nfe{domain.nfe:02d}.json"
    save_schedule(schedule, path)
    load_schedule(path)
    results = args.out / "results.json"
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    rows = sorted([r for r in rows if r["nfe"] != domain.nfe] + [row], key=lambda r: r["nfe"])
    results.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return row


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="search count schedules of the molecule model")
    parser.add_argument("--nfe", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--strategy", default="evolution")
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--generation", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000, help="molecules a candidate")
    parser.add_argument("--final", type=int, default=10_000, help="molecules of the last two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extrapolate", action="store_true", help="open the extrapolation flag")
    parser.add_argument("--confidence", action="store_true", help="open the rule for positions")
    parser.add_argument("--temperature", type=float, nargs=2, help="open it between LOW and HIGH")
    parser.add_argument("--weights", default=molecules.WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("runs/molecules"))
    args = parser.parse_args()
    denoiser = from_subs(molecules.load_net(args.weights), molecules.MASK, length=molecules.LENGTH)
    args.out.mkdir(parents=True, exist_ok=True)
    for nfe in args.nfe:
        domain = MaskedDomain(
            molecules.LENGTH,
            nfe,
            modes=("parallel", "extrapolate") if args.extrapolate else ("parallel",),
            positions=("uniform", "confidence") if args.confidence else ("uniform",),
            temperature=tuple(args.temperature) if args.temperature else None,
        )
        strategy = make(args.strategy, domain)
        known = search(
            domain,
            strategy,
            lambda s: draw(s, denoiser, args.samples, args.seed).fcd,
            args.out / f"trials-nfe{nfe:02d}.jsonl",
            candidates=args.candidates,
            generation=args.generation,
            seed=args.seed,
        )
        print(json.dumps(finish(domain, known, denoiser, args)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (FewstepError, AssetError) as error:
        sys.exit(f"error: {error}")
