"""What a search leaves behind: schedule files, results.json and the MLflow record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.samplers import AnyProblem, Problem
from fewstep.search.config import StudyConfig
from fewstep.search.verdict import Row, Verdict, pareto
from fewstep.space.files import save_schedule, write_text

if TYPE_CHECKING:
    from fewstep.search.run import Search


def write_results(run: Search, verdicts: Sequence[Verdict]) -> tuple[Row, ...]:
    """Write everything a search ends with; the rows of results.json, one per verdict."""
    config, out, tracker = run.config, run.out, run.tracker
    rows = tuple(v.row for v in verdicts)
    for verdict in verdicts:
        _save_schedule(run, verdict)
    results: dict[str, Any] = {
        "study": config.name,
        "objective": config.objective.name or "",
        "statistic": config.objective.statistic or "mean",
        "rows": [row.to_dict() for row in rows],
        "pareto": [row.setting for row in pareto(rows)],
    }
    if run.evaluator.prices is not None:
        results["prices"] = asdict(run.evaluator.prices)
    written = write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    for path in (written, out / "study.json", *run.display.ends(run, verdicts)):
        tracker.file(None, path)
    for row in rows:
        tracker.numbers(row.setting, metrics(row))
        if row.ratio is not None:
            tracker.numbers(None, {f"ratio_{row.file}": row.ratio})
    return rows


def _save_schedule(run: Search, verdict: Verdict) -> None:
    """The file of the schedule to keep, its image beside it; both tracked."""
    row, tracker = verdict.row, run.tracker
    provenance = _provenance(run.config, row, run.problem, tracker.runs)
    schedule = verdict.kept.model_copy(update={"provenance": provenance})
    path = save_schedule(schedule, schedule_path(run.out, row))
    image = path.with_suffix(".safetensors")
    for file in (path, image) if image.exists() else (path,):
        tracker.file(row.setting, file, "schedules")
        tracker.file(None, file, "schedules")
    tracker.tag(row.setting, **{"fewstep.digest": schedule.digest, "fewstep.source": row.source})


def metrics(row: Row) -> dict[str, float]:
    """The numbers of a row, flat, as MLflow takes them; those that are not known left out."""
    low, high = row.interval or (None, None)
    values: dict[str, Any] = {
        "found_score": row.found_score,
        "best_named_score": row.best_named_score,
        "ratio": row.ratio,
        "ratio_low": low,
        "ratio_high": high,
        "gap": row.gap,
        "trials": row.trials,
        "failed": row.failed,
        "calls_spent": row.calls_spent,
        "calls": row.nfe,
        "depth": row.depth,
        "cost": row.cost,
        "fresh_samples": row.samples,
        **{name: found for name, (found, _) in row.facts.items()},
        **{f"frechet_{name}": value for name, value in row.frechet.items()},
    }
    if row.comparison is not None:
        listed = row.comparison.to_dict()
        values |= {f"ratio_{name}": listed[name] for name in ("median", "mean", "q90", "q99")}
        values |= {name: listed[name] for name in ("share_worse", "worst_share", "tail_index")}
    return {name: float(value) for name, value in values.items() if value is not None}


def schedule_path(out: Path, row: Row) -> Path:
    """Where the schedule of a row lies: schedules/nfe05.json, cost08.json, or nfe05_w7.5.json."""
    scale = "" if row.guidance is None else f"_w{row.guidance:g}"
    return out / "schedules" / f"{row.file}{scale}.json"


def _provenance(
    config: StudyConfig, row: Row, problem: AnyProblem, runs: Mapping[str, str]
) -> dict[str, Any]:
    search = config.search
    found: dict[str, Any] = {
        "model": problem.fingerprint,
        "objective": config.objective.name,
        "score": row.found_score,
        "median": row.found_median,
        "statistic": config.objective.statistic,
        "ratio": row.ratio,
        "interval": None if row.interval is None else list(row.interval),
        "use": row.use,
        "best_named": row.best_named,
        "baselines": {s.name: s.score for s in row.named},
        "seeds": {"seed": search.seed, "search": search.samples, "fresh": row.samples},
        "study": config.name,
        "strategy": search.strategy,
        "source": row.source,
        "mlflow_run": runs.get(str(row.nfe), ""),
        "fewstep": version("fewstep"),
    }
    if row.comparison is not None:
        found["comparison"] = row.comparison.to_dict()
    if row.facts:
        found["facts"] = {name: value for name, (value, _) in row.facts.items()}
    if (particles := getattr(problem, "particles", 1)) > 1:
        found["particles"] = particles
    if isinstance(problem, Problem):
        found["guidance"] = problem.guidance
        teacher = {"solver": config.teacher.solver, "nfe": config.teacher.nfe}
        found["teacher"] = teacher | {"self_error": row.teacher_self_error}
    return found
