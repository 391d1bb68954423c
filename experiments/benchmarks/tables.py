"""The tables of results again, all or one: `make results`, `make results TABLE=a`.

    python -P -m fewstep.experiments.benchmarks.tables [a b ...] [--out experiments/results]

A table is a list of commands; the output of the last is the table. What a command has measured it
keeps (in runs/results, or beside the page), so that a run that was stopped goes on. The page of
all tables made is OUT/tables.md, each under its commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fewstep.space.files import write_text

BENCH = "python -P -m fewstep.experiments.benchmarks."
STUDIES = "experiments/studies/"


@dataclass(frozen=True)
class ResultTable:
    """A title, what is said under it, and the commands; the last one prints the table."""

    title: str
    text: str
    commands: tuple[str, ...]


def _search(study: str, folder: str) -> str:
    return f"fewstep search {STUDIES}{study}.toml --out runs/results/{folder} --resume"


_QUALITY = "quality run --nfe 3 4 5 6 8 10"

TABLES = {
    "a": ResultTable(
        "Quality against network calls",
        "The best named solver on its best grid, the scheduler that the pipeline came with, the "
        "schedule found where one was searched for, and the reference.",
        (
            _search("digits", "digits"),
            _search("fashion", "fashion"),
            f"{BENCH}{_QUALITY} --model digits --found runs/results/digits/schedules",
            f"{BENCH}{_QUALITY} --model fashion --found runs/results/fashion/schedules",
            f"{BENCH}quality table",
        ),
    ),
    "b": ResultTable(
        "Guidance 1 to 7.5",
        "Digits; each scale is fitted from the one before. The last table: what a program between "
        "two scales loses.",
        (_search("digits_guidance", "guidance"), "fewstep report runs/results/guidance"),
    ),
    "c": ResultTable(
        "What each part of refinement is worth",
        "Digits at 5 calls, one seed; ratios to the best named solver.",
        (
            f"{BENCH}refine run --nfe 5 --seeds 1 --out runs/results/refine",
            f"{BENCH}refine report --out runs/results/refine",
        ),
    ),
    "d": ResultTable(
        "Search strategies at equal numbers of candidates",
        "Digits, three seeds.",
        (
            f"{BENCH}search run --models digits --nfe 5 8 --seeds 3 --out runs/results/search",
            f"{BENCH}search report --out runs/results/search",
        ),
    ),
    "e": ResultTable(
        "Masked sampling: what skipping empty steps saves",
        "The molecule model.",
        (f"{BENCH}masked time",),
    ),
    "f": ResultTable(
        "Weighted particles",
        "Forty Gaussians in the plane, annealed to temperature 1/3.",
        (f"{BENCH}particles table",),
    ),
    "g": ResultTable(
        "Transfer",
        "The schedule of 5 calls found on digits at guidance 1, used elsewhere.",
        (
            _search("digits", "digits"),
            f"{BENCH}transfer runs/results/digits/schedules/nfe05.json",
        ),
    ),
    "h": ResultTable(
        "What the loop costs beside the network",
        "The galaxy network; times are ratios within one run.",
        (f"{BENCH}executor",),
    ),
    "i": ResultTable(
        "Peers",
        "Digits at 5 calls.",
        (
            _search("digits", "digits"),
            f"{BENCH}peers run --model digits --nfe 5 --budget 200000 --fresh 4096 "
            "--found runs/results/digits/schedules --out runs/results/peers",
            f"{BENCH}peers report --out runs/results/peers",
        ),
    ),
}


def make(letter: str, table: ResultTable, out: Path) -> None:
    """Run a table's commands and keep what the last one printed.

    Raises:
        SystemExit: a command failed; the line says which.
    """
    begun, printed = time.perf_counter(), ""
    for command in table.commands:
        print(f"{letter}: {command}", file=sys.stderr, flush=True)
        words = shlex.split(command)
        if words[0] == "python":
            words[0] = sys.executable
        else:
            words[0] = str(Path(sys.executable).with_name(words[0]))
        last = command == table.commands[-1]
        done = subprocess.run(words, check=False, stdout=subprocess.PIPE if last else None)
        if done.returncode != 0:
            sys.exit(f"table {letter}: exit code {done.returncode} from: {command}")
        printed = (done.stdout or b"").decode("utf-8").strip()
    facts = {"output": printed, "seconds": round(time.perf_counter() - begun)}
    write_text(out / f"table_{letter}.json", json.dumps(facts, indent=1) + "\n")


def page(out: Path) -> str:
    """The page of all tables that were made."""
    parts = ["# Tables\n\nMade by `make results`; one of them by `make results TABLE=a`.\n"]
    for letter, table in TABLES.items():
        path = out / f"table_{letter}.json"
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            commands = "".join(f"    {command}\n" for command in table.commands)
            parts.append(f"## {letter}: {table.title}\n\n{table.text}\n\n{commands}")
            parts.append(f"{facts['output']}\n\n{facts['seconds']} s.\n")
    return "\n".join(parts)


def main() -> None:
    """Make the tables named, or all that are not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", help=f"out of {' '.join(TABLES)}; nothing means all")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    a = parser.parse_args()
    unknown = set(a.tables) - set(TABLES)
    if unknown:
        parser.error(f"no table {' '.join(sorted(unknown))}: use {' '.join(TABLES)}")
    for letter in a.tables or TABLES:
        make(letter, TABLES[letter], a.out)
    write_text(a.out / "tables.md", page(a.out))
    print(a.out / "tables.md")


if __name__ == "__main__":
    main()
