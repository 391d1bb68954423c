"""Which strategy finds better schedules: S3, the released USF evolution, samplers of Optuna's.

Every run has the same space, the same starting population (all named solvers on all grids), the
same samples and the same number of candidates; only the strategy and its seed differ. As in
`fewstep search`, the best 8 of a run are compared on further samples, and the winner is scored
again on fresh ones. Scores are endpoint MSE, the mean over samples and
pixels of the squared distance to a fine-grid solution from the same noise.

    python -m fewstep.experiments.benchmarks.search run --models digits --nfe 5 8 --seeds 5
    python -m fewstep.experiments.benchmarks.search rescore --models digits --fresh 4096
    python -m fewstep.experiments.benchmarks.search report

Each run is a JSON file in OUT, written when it ends; runs that are there are not repeated, so the
benchmark can be stopped and continued, or run in pieces. `rescore` scores the winners again on
another number of fresh samples: single samples that end in another mode carry much of a mean, so
the median over samples stands beside it. `report` writes curves (medians and
quartiles), a JSON summary and prints a markdown table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

from fewstep.experiments.models import mixtures
from fewstep.samplers import Problem, run_candidates, start
from fewstep.search.strategies import Evaluated, Proposer
from fewstep.space.baselines import baseline, named
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import FewstepError
from fewstep.space.files import load_schedule, write_text
from fewstep.space.noise import NoiseSchedule
from fewstep.space.program import Program, ProgramSchedule
from fewstep.space.schedule import OdeSchedule

TEACHER = "dpmpp3m/logsnr"
TEACHER_CALLS = 200
BLOCK = 2048  # samples a network call may hold
FRESH = 1_000_000  # first index of the fresh samples
SELECT = 2_000_000  # first index of those that the winner is chosen on
TOP = 8
STRATEGIES = ("s3", "evolution", "tpe", "cmaes", "random", "gp", "qmc", "nsgaii")


@dataclass
class Landscape:
    """Endpoint MSE to a fine-grid solution on shared noise.

    Args:
        problem: the model.
        samples: number of samples, indices offset .. offset + samples - 1.
        offset: first sample; fresh samples start at `FRESH`.
        seed: seed of the starting noise.
        teacher_calls: network calls of the teacher.
    """

    problem: Problem
    samples: int
    offset: int = 0
    seed: int = 0
    teacher_calls: int = TEACHER_CALLS

    def __post_init__(self) -> None:
        index = torch.arange(self.offset, self.offset + self.samples)
        self.noise: NoiseSchedule = self.problem.denoiser.noise
        self._cond = self.problem.cond(index) if self.problem.cond is not None else None
        rows = [
            np.random.default_rng([self.seed, i]).standard_normal(self.problem.shape)
            for i in index.tolist()
        ]
        self._z = torch.from_numpy(np.stack(rows)).float()
        teacher = baseline(TEACHER, self.noise, self.teacher_calls)
        (self.teacher,) = self._run([teacher.program], start(teacher, self._z))

    @torch.no_grad()
    def _run(self, programs: list[Program], x_T: Tensor, m: Tensor | None = None) -> Tensor:
        made = []
        for rows in torch.arange(len(x_T)).split(BLOCK):
            cond = None if self._cond is None else {k: v[rows] for k, v in self._cond.items()}
            more: dict[str, Any] = {"cond": cond, "guidance": self.problem.guidance, "m": m}
            made.append(run_candidates(programs, self.problem.denoiser, x_T[rows], **more))
        return torch.cat(made, dim=-len(self.problem.shape) - 1)

    def per_sample(self, schedules: Sequence[OdeSchedule | ProgramSchedule]) -> np.ndarray:
        """Scores of each schedule on each sample, shape (M, samples); inf where it diverged.

        All start from one constant image, if from any.
        """
        size = max(1, BLOCK // self.samples)
        found = []
        for at in range(0, len(schedules), size):
            y = self.drawn(schedules[at : at + size])
            found.append(((y - self.teacher) ** 2).flatten(2).mean(-1).double())
        scores: np.ndarray = torch.cat(found).nan_to_num(nan=float("inf")).numpy()
        return scores

    def drawn(self, schedules: Sequence[OdeSchedule | ProgramSchedule]) -> Tensor:
        """What schedules of one start make of the noise, shape (M, samples, *shape)."""
        programs = [s.program for s in schedules]
        return self._run(programs, start(schedules[0], self._z), schedules[0].constant)

    def score(self, schedules: Sequence[OdeSchedule]) -> np.ndarray:
        """Mean over samples, shape (M,)."""
        means: np.ndarray = self.per_sample(schedules).mean(-1)
        return means

    def summary(self, schedule: OdeSchedule) -> dict[str, float]:
        """Mean and median over samples, under the names of the runs' files."""
        (scores,) = self.per_sample([schedule])
        return {"fresh": float(scores.mean()), "fresh_median": float(np.median(scores))}


def problem(model: str) -> Problem:
    """A model by name: a shipped one, "digits@5" at guidance 5, or "forty" (mixtures)."""
    if model == "forty":
        return Problem(mixtures.forty(), (2,), fingerprint="forty")
    name, _, scale = model.partition("@")
    module = importlib.import_module(f"fewstep.experiments.models.{name}")
    made: Problem = module.problem(float(scale)) if scale else module.problem()
    return made


@dataclass
class SearchBench:
    """One model at one NFE: landscapes and the starting population, shared by all runs."""

    model: str
    nfe: int
    samples: int
    fresh: int

    def __post_init__(self) -> None:
        self.search = Landscape(problem(self.model), self.samples)
        self.again = Landscape(problem(self.model), self.fresh, FRESH)
        self.select = Landscape(problem(self.model), self.fresh, SELECT)
        self.domain = OdeDomain(self.search.noise, self.nfe)
        found = named(self.search.noise, self.nfe)
        scores = self.search.score(list(found.values()))
        self.seeds = [
            _evaluated(s, v, name) for (name, s), v in zip(found.items(), scores, strict=True)
        ]
        self.proposing = 0.0  # seconds spent in strategies
        best = min(self.seeds, key=lambda k: k.score)
        named_best = {"name": best.source, "search": best.score}
        self.named = named_best | self.again.summary(best.schedule)

    def run(self, strategy: str, seed: int, candidates: int, generation: int) -> dict[str, Any]:
        """One search; returns everything the report needs."""
        begun, self.proposing = time.perf_counter(), 0.0
        told = self.search_from_seeds(strategy, seed, candidates, generation)
        known = {k.schedule.digest: k for k in [*self.seeds, *told] if k.status == "ok"}
        top = sorted(known.values(), key=lambda k: k.score)[:TOP]
        best = top[int(np.argmin(self.select.score([k.schedule for k in top])))]
        own = [k.score if np.isfinite(k.score) else None for k in told]
        return {
            "model": self.model,
            "nfe": self.nfe,
            "strategy": strategy,
            "seed": seed,
            "samples": self.samples,
            "fresh_samples": self.fresh,
            "generation": generation,
            "named": self.named,
            "scores": own,
            "search": top[0].score,
            **self.again.summary(best.schedule),
            "schedule": best.schedule.to_dict(),
            "seconds": time.perf_counter() - begun,
            "seconds_proposing": self.proposing,
        }

    def search_from_seeds(
        self, strategy: str, seed: int, candidates: int, generation: int
    ) -> list[Evaluated]:
        """The candidates a strategy proposed after the named solvers, in the order told."""
        proposer = Proposer(strategy, self.domain, seed=seed, size=generation)
        for known in self.seeds:
            proposer.tell(known)
        told: list[Evaluated] = []
        for g in range(candidates // generation):
            asked = time.perf_counter()
            proposals = proposer.propose(g)
            self.proposing += time.perf_counter() - asked
            scores = self.search.score([p.schedule for p in proposals])
            for p, v in zip(proposals, scores, strict=True):
                told.append(_evaluated(p.schedule, v, p.source))
                proposer.tell(told[-1], p.trial)
        return told


def _evaluated(schedule: OdeSchedule, score: float, source: str) -> Evaluated:
    ok = bool(np.isfinite(score))
    return Evaluated(schedule, float(score), "ok" if ok else "diverged", source=source)


def _run_all(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for nfe in args.nfe:
            tasks = [(s, seed) for seed in range(args.seeds) for s in args.strategies]
            todo = [(s, k, out / f"{model}_{nfe}_{args.samples}_{s}_{k}.json") for s, k in tasks]
            todo = [task for task in todo if not task[2].exists()]
            if not todo:
                continue
            bench = SearchBench(model, nfe, args.samples, args.fresh)
            for strategy, seed, path in todo:
                result = bench.run(strategy, seed, args.candidates, args.generation)
                write_text(path, json.dumps(result))
                ratio = result["fresh"] / result["named"]["fresh"]
                print(
                    f"{path.stem}: fresh {result['fresh']:.6f}, {ratio:.3f} of {result['named']}"
                    f" in {result['seconds']:.0f} s ({result['seconds_proposing']:.0f} s of it)",
                    flush=True,
                )


def _rescore(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for model in args.models:
        again, named = Landscape(problem(model), args.fresh, FRESH), {}
        for path in sorted(Path(args.out).glob(f"{model}_*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            key = (result["nfe"], result["named"]["name"])
            if key not in named:
                named[key] = again.summary(baseline(key[1], again.noise, key[0]))
            found = again.summary(load_schedule(result["schedule"]))
            result |= found | {"named": result["named"] | named[key], "fresh_samples": args.fresh}
            write_text(path, json.dumps(result))


def best_so_far(result: dict[str, Any]) -> np.ndarray:
    """Best score after each candidate over the best named solver's, shape (candidates + 1,)."""
    scores = [np.inf if s is None else s for s in result["scores"]]
    start_score = result["named"]["search"]
    curve: np.ndarray = np.minimum.accumulate([start_score, *scores]) / start_score
    return curve


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: per model, NFE and strategy, medians and quartiles over seeds."""
    rows = []
    cases = sorted({(r["model"], r["nfe"], r["samples"]) for r in results})
    for model, nfe, samples in cases:
        case = [
            r for r in results if (r["model"], r["nfe"], r["samples"]) == (model, nfe, samples)
        ]
        by = {s: [r for r in case if r["strategy"] == s] for s in STRATEGIES}
        final = {
            s: float(np.median([best_so_far(r)[-1] for r in runs]))
            for s, runs in by.items()
            if runs
        }
        median = {s: float(np.median([r["fresh_median"] for r in by[s]])) for s in final}
        others = [np.median([r["fresh"] for r in by[s]]) for s in final if s != "s3"]
        for s in final:
            fresh = np.array([r["fresh"] for r in by[s]])
            goal = final.get("evolution", 0.0)
            curve = np.median([best_so_far(r) for r in by[s]], axis=0)
            reached = np.flatnonzero(curve <= goal)
            row = {
                "model": model,
                "nfe": nfe,
                "samples": samples,
                "strategy": s,
                "seeds": len(fresh),
                "candidates": len(curve) - 1,
                "named": case[0]["named"],
                "search_over_named": final[s],
                "fresh": dict(
                    zip(
                        ("q1", "median", "q3"),
                        np.quantile(fresh, [0.25, 0.5, 0.75]).tolist(),
                        strict=True,
                    )
                ),
                "fresh_over_named": float(np.median(fresh)) / case[0]["named"]["fresh"],
                "fresh_samples": sorted({r["fresh_samples"] for r in by[s]}),
                "median_over_named": median[s] / case[0]["named"]["fresh_median"],
                "candidates_to_evolutions_final": int(reached[0]) if len(reached) else None,
                "seconds_proposing": float(np.median([r["seconds_proposing"] for r in by[s]])),
            }
            if s == "s3" and others:
                row["fresh_over_best_other"] = float(np.median(fresh) / min(others))
                least = min(v for name, v in median.items() if name != "s3")
                row["median_over_best_other"] = median["s3"] / least
            rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    head = (
        "model",
        "NFE",
        "samples",
        "strategy",
        "seeds",
        "fresh MSE, median (quartiles)",
        "over best named",
        "median sample, over best named",
        "candidates to evolution's final",
        "S3 over best other (median sample)",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        q = r["fresh"]
        reach = r["candidates_to_evolutions_final"]
        other = r.get("fresh_over_best_other")
        cells = [str(r[k]) for k in ("model", "nfe", "samples", "strategy", "seeds")]
        cells.append(f"{q['median']:.3g} ({q['q1']:.3g} to {q['q3']:.3g})")
        cells.append(f"{r['fresh_over_named']:.3f}")
        cells.append(f"{r['median_over_named']:.3f}")
        cells.append("–" if reach is None else str(reach))
        cells.append("" if other is None else f"{other:.3f} ({r['median_over_best_other']:.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Best-so-far curves: medians, with quartiles shaded, one panel per model and NFE."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = sorted({(r["model"], r["nfe"], r["samples"]) for r in results})
    figure, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 4), squeeze=False)
    for axis, (model, nfe, samples) in zip(axes[0], cases, strict=True):
        for s in STRATEGIES:
            runs = [
                r
                for r in results
                if (r["model"], r["nfe"], r["samples"], r["strategy"]) == (model, nfe, samples, s)
            ]
            if not runs:
                continue
            low, middle, high = np.quantile(
                [best_so_far(r) for r in runs], [0.25, 0.5, 0.75], axis=0
            )
            (line,) = axis.plot(middle, label=f"{s} ({len(runs)})")
            axis.fill_between(range(len(middle)), low, high, alpha=0.2, color=line.get_color())
        axis.set(title=f"{model}, NFE {nfe}, {samples} samples", xlabel="candidates", yscale="log")
        axis.set_ylabel("best endpoint MSE / best named solver's")
        axis.grid(alpha=0.3, which="both")
        axis.legend(title="strategy (seeds)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _report(args: argparse.Namespace) -> None:
    out = Path(args.out)
    results = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted(out.glob("*_*_*_*_*.json"))
    ]
    if not results:
        raise FewstepError(f"{out}: no runs found; start some with `run`")
    rows = summarise(results)
    draw(results, out / "curves.png")
    (out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    (out / "summary.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["run", "rescore", "report"])
    parser.add_argument("--models", nargs="+", default=["digits", "galaxy"])
    parser.add_argument("--nfe", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=5, help="search seeds 0 .. SEEDS-1")
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--samples", type=int, default=256, help="samples a candidate")
    parser.add_argument(
        "--fresh", type=int, default=1024, help="samples to choose on, and fresh ones to score on"
    )
    parser.add_argument("--generation", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/bench_search")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    {"run": _run_all, "rescore": _rescore, "report": _report}[args.what](args)


if __name__ == "__main__":
    main()
