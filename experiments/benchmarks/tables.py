"""The tables of results again, all or one: `make results`, `make results TABLE=a`.

    python -P -m fewstep.experiments.benchmarks.tables [a b ...] [--out experiments/results]

A table is a list of commands; the output of the last ones is the table. What a command has
measured it keeps in runs/results, so that a run that was stopped goes on. The page of all tables
made is OUT/tables.md, each under its commands.
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
RUNS = "runs/results"


@dataclass(frozen=True)
class ResultTable:
    """A title, what is said under it, the commands that measure, and those that print it."""

    title: str
    text: str
    measure: tuple[str, ...]
    print: tuple[str, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """All, in their order."""
        return self.measure + self.print


def _search(study: str, folder: str, *changes: str) -> str:
    words = ["fewstep search", f"{STUDIES}{study}.toml", f"--out {RUNS}/{folder}", "--resume"]
    return " ".join([*words, *(f"--set {shlex.quote(change)}" for change in changes)])


_DIGITS = _search("digits", "digits")
_QUALITY = f"{BENCH}quality run --out {RUNS}/quality"
_S3 = "search.strategy=s3"

TABLES = {
    "a": ResultTable(
        "Quality against network calls",
        "The best named solver on its best grid, the scheduler that the pipeline came with, what "
        "a search found without refinement and with it, and the reference. The galaxy schedules "
        "are those of experiments/studies.",
        (
            _DIGITS,
            _search("digits", "digits_alone", _S3, "budget={calls=1200000}"),
            _search("fashion", "fashion"),
            _search("fashion", "fashion_alone", _S3, "budget={calls=230000}"),
            f"{_QUALITY} --nfe 3 4 5 6 8 10 --model digits --found {RUNS}/digits/schedules "
            f"--alone {RUNS}/digits_alone/schedules",
            f"{_QUALITY} --nfe 5 8 10 --model galaxy --found experiments/studies/galaxy "
            "--fresh 512 --choose 32",
            f"{_QUALITY} --nfe 3 4 5 6 8 10 --model fashion --found {RUNS}/fashion/schedules "
            f"--alone {RUNS}/fashion_alone/schedules --fresh 1024 --choose 16",
        ),
        (f"{BENCH}quality table --out {RUNS}/quality",),
    ),
    "b": ResultTable(
        "Guidance 1 to 7.5",
        "Digits; each scale is fitted from the one before. The last table: what a program between "
        "two scales loses.",
        (_search("digits_guidance", "guidance"),),
        (f"{BENCH}searches table {RUNS}/guidance",),
    ),
    "c": ResultTable(
        "What each part of refinement is worth",
        "Digits at 5 calls, one seed; ratios to the best named solver.",
        (f"{BENCH}refine run --nfe 5 --seeds 1 --out {RUNS}/refine",),
        (f"{BENCH}refine report --out {RUNS}/refine",),
    ),
    "d": ResultTable(
        "Search strategies",
        "Digits: whole searches at 5 calls, network evaluations and seconds; then strategies that "
        "propose, at equal numbers of candidates, three seeds.",
        (
            f"{BENCH}searches run {STUDIES}digits.toml {RUNS}/searches",
            f"{BENCH}search run --models digits --nfe 5 8 --seeds 3 --out {RUNS}/search "
            "--strategies s3 evolution tpe cmaes random",
        ),
        (f"{BENCH}searches table {RUNS}/searches", f"{BENCH}search report --out {RUNS}/search"),
    ),
    "e": ResultTable(
        "Masked sampling",
        "The molecule model: counts by dynamic programming against named ones, by the measured "
        "cross-entropy; what skipping empty steps saves.",
        (),
        (f"{BENCH}masked counts", f"{BENCH}masked time"),
    ),
    "f": ResultTable(
        "Weighted particles",
        "Forty Gaussians in the plane, annealed to temperature 1/3.",
        (),
        (f"{BENCH}particles table",),
    ),
    "g": ResultTable(
        "Transfer",
        "The schedule of 5 calls found on digits at guidance 1, used elsewhere.",
        (_DIGITS,),
        (f"{BENCH}transfer {RUNS}/digits/schedules/nfe05.json",),
    ),
    "h": ResultTable(
        "Executor, throughput, scaling",
        "What the loop costs beside the galaxy network; candidates evaluated together; candidates "
        "of a network that costs nothing. Times are ratios within one run.",
        (),
        (
            f"{BENCH}executor",
            f"{BENCH}throughput --model digits --repeats 3",
            f"{BENCH}scaling costless",
        ),
    ),
    "i": ResultTable(
        "Peers",
        "Digits at 5 calls.",
        (
            _DIGITS,
            f"{BENCH}peers run --model digits --nfe 5 --budget 200000 --fresh 4096 "
            f"--found {RUNS}/digits/schedules --out {RUNS}/peers",
        ),
        (f"{BENCH}peers report --out {RUNS}/peers",),
    ),
}


def make(letter: str, table: ResultTable, out: Path) -> None:
    """Run a table's commands and keep what is printed by those that print it.

    Raises:
        SystemExit: a command failed; the line says which.
    """
    begun, printed = time.perf_counter(), []
    for command in table.commands:
        print(f"{letter}: {command}", file=sys.stderr, flush=True)
        words = shlex.split(command)
        if words[0] == "python":
            words[0] = sys.executable
        else:
            words[0] = str(Path(sys.executable).with_name(words[0]))
        kept = command in table.print
        done = subprocess.run(words, check=False, stdout=subprocess.PIPE if kept else None)
        if done.returncode != 0:
            sys.exit(f"table {letter}: exit code {done.returncode} from: {command}")
        if kept:
            printed.append(done.stdout.decode("utf-8").strip())
    facts = {"printed": printed, "seconds": round(time.perf_counter() - begun)}
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
            for text in facts["printed"]:
                said, bar, rows = f"\n{text}".partition("\n|")
                if said.strip():  # what is no Markdown stays as it was printed
                    parts.append(f"```text\n{said.strip()}\n```\n")
                if bar:
                    parts.append(f"|{rows}\n")
            parts.append(f"{facts['seconds']} s.\n")
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
