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
    """A row per search and number of calls, the best first.

    Raises:
        StudyError: no folder holds a search.
    """
    places = [p for f in folders for p in (f, *sorted(f.glob("*"))) if _results(p).is_file()]
    if not places:
        raise StudyError(f"{folders[0]}: no results.json here or one folder below")
    rows = []
    for place in places:
        for row in json.loads(_results(place).read_text(encoding="utf-8"))["rows"]:
            c, fd, spent = row["comparison"], row["frechet"], row["calls_spent"]
            low, high = c["interval"]
            cells = [str(row["nfe"]), place.name, f"{spent / 1e3:.0f} k", seconds(place)]
            cells.append(f"{c['geometric']:.3f} ({low:.3f}–{high:.3f})")
            cells += [f"{c[name]:.3f}" for name in ("median", "mean", "q90")]
            cells.append(f"{fd['found'] / fd['named']:.3f}" if fd else "–")
            rows.append((row["nfe"], c["geometric"], "| " + " | ".join(cells) + " |"))
    head = "calls|search|evaluations|seconds|geometric (95 %)|median|mean|90 % q|paired FD"
    lines = ["| " + head.replace("|", " | ") + " |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *(line for _, _, line in sorted(rows))])


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
