"""Whole searches side by side: what each found, for how many network evaluations and seconds.

    python -P -m fewstep.experiments.benchmarks.searches run STUDY.toml FOLDER --nfe 5 \
        --evaluations 300000 --seeds 0
    python -P -m fewstep.experiments.benchmarks.searches table FOLDER ...

`run` is `fewstep search` of one study with each strategy. Refinement begins from the study's own
budget and ends when it no longer gains; a strategy without refinement gets `--evaluations`, about
what the dearest of the others spent. A search that was stopped goes on, one that has ended is left
alone. `table` prints a row per search in the folders; ratios are to the best named solver on
fresh samples, seconds until the last trial was told (the verdict is left out).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from fewstep.search import run as driver
from fewstep.search.config import load_study
from fewstep.space.errors import FewstepError, StudyError

STRATEGIES = ("s3+refine", "refine", "s3", "evolution", "tpe", "cmaes")


def run(a: argparse.Namespace) -> None:
    """Search with each strategy and seed."""
    for seed in a.seeds:
        for strategy in a.strategies:
            out = a.folder / f"{strategy}-seed{seed}"
            if _results(out).is_file():
                continue
            changes = [f"search.nfe={a.nfe}", f"search.strategy={strategy}", f"search.seed={seed}"]
            changes += [f"search.workers={a.workers}", "tracking.enabled=false", "cpr.fit=false"]
            if "refine" not in strategy:
                changes.append(f"budget={{calls={a.evaluations}}}")
            print(f"{out}: searching", flush=True)
            driver.search(load_study(a.study, changes), out, resume=out.exists())


def seconds(out: Path) -> str:
    """When the last trial was told, after the beginning; "–" if the storage is elsewhere."""
    journal = out / "study.journal"
    if not journal.is_file():
        return "–"
    storage = JournalStorage(JournalFileBackend(str(journal)))
    studies = [study._study_id for study in storage.get_all_studies()]
    trials = [trial for study in studies for trial in storage.get_all_trials(study)]
    return f"{max(float(t.user_attrs.get('elapsed', 0.0)) for t in trials):.0f}"


def table(folders: list[Path]) -> str:
    """A row per search and number of calls, by guidance scale, the best first.

    Of a search over several guidance scales: a row per scale, and what is lost by the programs
    between two of them.

    Raises:
        StudyError: no folder holds a search.
    """
    rows, between = [], []
    for folder in folders:
        within = [p for p in sorted(folder.glob("*")) if _results(p).is_file()]
        for place in within or [folder]:
            if not _results(place).is_file():
                raise StudyError(f"{folder}: no results.json here or one folder below")
            for row in json.loads(_results(place).read_text(encoding="utf-8"))["rows"]:
                order = row["nfe"], row["guidance"] or 0.0, row["comparison"]["geometric"]
                rows.append((order, _cells(place, row)))
        if within and _results(folder).is_file():
            lost = json.loads(_results(folder).read_text(encoding="utf-8")).get("between", [])
            between += [[f"{r['nfe']}", f"{r['guidance']:g}", f"{r['ratio']:.2f}"] for r in lost]
    head = "calls|search|best named|its error|evaluations|seconds|geometric (95 %)|median|mean"
    parts = [_markdown(f"{head}|90 % q|paired FD", [cells for _, cells in sorted(rows)])]
    if between:
        parts.append(_markdown("calls|guidance left out|error over its own program's", between))
    return "\n\n".join(parts)


def _cells(place: Path, row: dict[str, Any]) -> list[str]:
    c, fd = row["comparison"], row["frechet"]
    low, high = c["interval"]
    cells = [str(row["nfe"]), place.name, row["best_named"], f"{row['best_named_score']:.3g}"]
    cells += [f"{row['calls_spent'] / 1e3:.0f} k", seconds(place)]
    cells.append(f"{c['geometric']:.3f} ({low:.3f}–{high:.3f})")
    cells += [f"{c[name]:.3f}" for name in ("median", "mean", "q90")]
    return [*cells, f"{fd['found'] / fd['named']:.3f}" if fd else "–"]


def _markdown(head: str, rows: list[list[str]]) -> str:
    lines = ["| " + head.replace("|", " | ") + " |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _results(place: Path) -> Path:
    return place / "results.json"


def main() -> None:
    """Do what is named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    searching = commands.add_parser("run", help="search with each strategy and seed")
    searching.add_argument("study", type=Path)
    searching.add_argument("folder", type=Path)
    searching.add_argument("--nfe", type=int, nargs="+", default=[5])
    searching.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    searching.add_argument("--evaluations", type=int, default=300_000, help="without refinement")
    searching.add_argument("--seeds", type=int, nargs="+", default=[0])
    searching.add_argument("--workers", type=int, default=0, help="0: in this process")
    printing = commands.add_parser("table", help="print what was found")
    printing.add_argument("folders", type=Path, nargs="+")
    a = parser.parse_args()
    try:
        print(table(a.folders)) if a.what == "table" else run(a)
    except FewstepError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
