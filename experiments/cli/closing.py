"""The tables that a search ends with, as commands print them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from fewstep.experiments.cli.page import COLUMNS, fact_cells, fact_names, number
from fewstep.predictors.cpr import CPR
from fewstep.search.verdict import Row, pareto

_LEFT = ("without_its_nfe", "without_its_guidance")
TERMINAL = 16
"""So many columns fit a terminal; the page shows all."""


def closing(
    rows: Sequence[Row], objective: str, out: Path, *, named: bool = True
) -> list[RenderableType]:
    """The closing tables of a search: a pair for each guidance scale, and its regression's.

    Args:
        rows: of results.json.
        objective: its name.
        out: the search's folder.
        named: with the table of every named solver.
    """
    found: list[RenderableType] = []
    for scale in dict.fromkeys(row.guidance for row in rows):
        part = [row for row in rows if row.guidance == scale]
        if scale is not None:
            found.append(f"[bold]guidance {scale:g}[/bold]")
        if named:
            found.append(named_table(part))
        found.append(results_table(part, objective))
    results = out / "results.json"
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    if kept.get("between"):
        found.append(between_table(kept["between"]))
    if (out / "cpr.json").exists():
        found.append(cpr_table(CPR.load(out / "cpr.json")))
    return found


def results_table(rows: Sequence[Row], objective: str) -> Table:
    """The closing table: best named, found, and their ratios in several statistics.

    Also the Frechet distances where the problem has features, the facts of an objective (found |
    best named), and the teacher's own error.
    """
    most = max((row.samples for row in rows), default=0)
    table = Table(title=f"{objective} on up to {most} fresh samples")
    columns = [c for c in COLUMNS[:TERMINAL] if any(c[1](row) != "–" for row in rows)]
    for head in [*(name for name, _ in columns), *fact_names(rows)]:
        table.add_column(head, justify="left" if head == "best named" else "right", no_wrap=True)
    front = pareto(rows)
    notes = []
    if any(row.comparison is not None for row in rows):
        notes.append(
            "ratio: found over best named, geometric means of the samples' errors, with its 95 % "
            "interval;\nthen ratios of other statistics, and the share of samples that got worse"
        )
    if len(front) < len(rows):
        notes.append("* fewer calls do as well: not on the Pareto front of calls and score")
    notes += [f"{row.title}: nothing gained, use {row.use}" for row in rows if row.use != "found"]
    notes += [f"{row.title}: {row.failed_stage}" for row in rows if row.failed_stage]
    table.caption = "\n".join(notes) or None
    for row in rows:
        cells = [cell(row) for _, cell in columns]
        cells[0] += "" if row in front else "*"
        table.add_row(*cells, *fact_cells(row))
    return table


def named_table(rows: Sequence[Row]) -> Table:
    """Every named solver on its best grid, at every NFE."""
    table = Table(title="every named schedule in its best variant, noise of the search")
    table.add_column("name", no_wrap=True)
    for row in rows:
        table.add_column(row.title, justify="right", no_wrap=True)
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        for scored in row.named:
            solver, _, kind = scored.name.partition("/")
            cells.setdefault(solver, {}).setdefault(row.setting, f"{number(scored.score)} {kind}")
    for solver in sorted(cells):
        table.add_row(solver, *(cells[solver].get(row.setting, "–") for row in rows))
    return table


def between_table(between: Sequence[Mapping[str, Any]]) -> Table:
    """What a fitted program between two guidance scales loses (`Aligned.left_out`)."""
    table = Table(title="programs between two guidance scales: fewstep export --cpr OUT/cpr")
    table.caption = (
        "geometric mean of the errors at a scale w of its own program, and of the one between "
        "its neighbours, as if w had not been searched"
    )
    for head in ("NFE", "w", "its own", "between", "between / own"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in between:
        errors = (f"{row['own']:.4g}", f"{row['between']:.4g}", f"{row['ratio']:.2f}")
        table.add_row(str(row["nfe"]), f"{row['guidance']:g}", *errors)
    return table


def cpr_table(model: CPR) -> Table:
    """How good a regression is: held-out errors at the settings it was fitted to."""
    name = model.template
    table = Table(
        title=f"CPR on {name}, NFE {model.nfe[0]} to {model.nfe[1]}, guidance "
        f"{model.guidance[0]:g} to {model.guidance[1]:g}: held-out error"
    )
    table.caption = (
        "w is guidance; last columns: error when the setting's NFE (w) is left out of the fit, "
        "over the error with it; at the edges that is extrapolation"
    )
    heads = ("NFE", "w", "start", "found", "CPR", "CPR / found", "without NFE", "without w")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in model.provenance.get("settings", []):
        found, fitted = row["found"], row["fitted"]
        table.add_row(
            str(row["nfe"]),
            f"{row['guidance']:g}",
            f"{row['start']:.4g}",
            "–" if found is None else f"{found:.4g}",
            f"{fitted:.4g}",
            "–" if not found else f"{fitted / found:.2f}",
            *("–" if row[k] is None else f"{row[k]:.2f}" for k in _LEFT),
        )
    return table
