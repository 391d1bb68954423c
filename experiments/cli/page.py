"""What a search leaves for people: pictures, and a page that holds them and the table of rows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers import Problem
from fewstep.samplers.pictures import contact_sheet, save_figure
from fewstep.search.display import Display
from fewstep.search.rung import best_so_far
from fewstep.search.verdict import FRESH, Row, Verdict, pareto
from fewstep.search.work import Block
from fewstep.space.files import write_text

if TYPE_CHECKING:
    from fewstep.search.run import Search

Points = Sequence[tuple[int, float]]
_PAGE = Path(__file__).with_name("page.html")


def number(value: float | None) -> str:
    """A score in four digits."""
    return "–" if value is None else f"{value:.4g}"


def share(value: float | None) -> str:
    """A ratio in three digits."""
    return "–" if value is None else f"{value:.3f}"


def span(interval: tuple[float, float] | None) -> str:
    """An interval of ratios."""
    return "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"


def _compared(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if row.comparison is None:
            return "–"
        value = getattr(row.comparison, name)
        if name in ("share_worse", "worst_share"):
            return f"{100 * value:.1f} %"
        return f"{value:.2f}" if name == "tail_index" else share(value)

    return cell


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cost", lambda row: "–" if row.cost is None else str(row.cost)),
    ("NFE", lambda row: str(row.nfe)),
    ("depth", lambda row: "–" if row.depth in (None, row.nfe) else str(row.depth)),
    ("calls", lambda row: row.calls or "–"),
    ("best named", lambda row: row.best_named),
    ("its score", lambda row: number(row.best_named_score)),
    ("found", lambda row: number(row.found_score)),
    ("ratio", lambda row: share(row.ratio)),
    ("95 %", lambda row: span(row.interval)),
    ("median", _compared("median")),
    ("mean", _compared("mean")),
    ("90 %q", _compared("q90")),
    ("99 %q", _compared("q99")),
    ("Frechet", lambda row: _frechet(row)),
    ("over stock", lambda row: share(row.stock.get("ratio")) if row.stock else "–"),
    ("worse", _compared("share_worse")),
    ("worst's share", _compared("worst_share")),
    ("tail index", _compared("tail_index")),
    ("samples", lambda row: str(row.samples)),
    ("mean calls", lambda row: " | ".join(map(number, row.mean_calls or ())) or "–"),
    ("teacher", lambda row: number(row.teacher_self_error)),
)
"""Heads and cells of a row, for the closing table and the page; unknown ones are left out."""


def _frechet(row: Row) -> str:
    """The paired Frechet distance to the teacher, found over best named."""
    return share(row.frechet["found"] / row.frechet["named"]) if row.frechet else "–"


def fact_cells(row: Row) -> list[str]:
    """The facts of a row, found | best named."""
    return [f"{number(a)} | {number(b)}" for a, b in row.facts.values()]


def _panels(count: int, height: float) -> tuple[Any, Any]:
    """A figure, and its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.2 * count, 5.2 if count == 1 else 0), height))
    figure.set_layout_engine("constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def curves(
    path: Path, series: Mapping[int, Points], named: Mapping[int, float], objective: str
) -> Path:
    """Best score so far over candidates (search noise), a panel per NFE, best named as a line."""
    figure, axes = _panels(len(series), 2.9)
    for axis, (nfe, points) in zip(axes, series.items(), strict=True):
        trials, best = [k + 1 for k, _ in points], [v for _, v in points]
        axis.step(trials, best, where="post", color="C0", label="best so far")
        if nfe in named:
            axis.axhline(named[nfe], color="0.5", linestyle="--", linewidth=1, label="best named")
        axis.set(yscale="log", title=f"NFE {nfe}", xlabel="candidates")
        axis.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel(f"{objective} (search noise)")
    axes[0].legend(fontsize=8, frameon=False)
    return save_figure(figure, path, dpi=110)


def errors_picture(path: Path, errors: Mapping[int, tuple[Any, Any]]) -> Path:
    """Error of every fresh sample, found against best named, logarithmic; a panel per NFE.

    Below the diagonal the found schedule is better. `errors` holds (found, named) by NFE.
    """
    figure, axes = _panels(len(errors), 3.2)
    for axis, (nfe, (found, named)) in zip(axes, errors.items(), strict=True):
        low = max(min(found.min(), named.min()), 1e-20)
        high = max(found.max(), named.max(), low * 10)
        axis.plot([low, high], [low, high], color="0.6", linewidth=1)
        axis.scatter(named, found, s=4, alpha=0.25, color="C0", linewidths=0)
        axis.set(xscale="log", yscale="log", xlabel="error, best named")
        worse = 100 * float((found > named).mean())
        axis.set_title(f"NFE {nfe}: {worse:.1f} % of samples worse", fontsize=9)
        axis.grid(True, alpha=0.2)
    axes[0].set_ylabel("error, found")
    return save_figure(figure, path, dpi=110)


def pareto_picture(path: Path, rows: Sequence[Row], objective: str) -> Path:
    """Score against calls on fresh samples: found, with its Pareto front, and best named."""
    from matplotlib.ticker import MaxNLocator

    ordered, front = sorted(rows, key=lambda r: r.setting), pareto(rows)
    figure, (axis,) = _panels(1, 3.6)
    calls = [r.setting for r in ordered]
    axis.plot(calls, [r.best_named_score for r in ordered], "s--", color="0.5", label="best named")
    axis.plot(calls, [r.found_score for r in ordered], "o", color="C0", label="found")
    best = [r.found_score for r in front]
    axis.plot([r.setting for r in front], best, color="C0", label="Pareto front")
    teacher = ordered[-1].teacher_self_error
    lowest = min(r.found_score for r in ordered)
    if teacher is not None and teacher > 0.03 * lowest:  # far below, it would flatten the picture
        axis.axhline(teacher, color="C1", linestyle=":", label="teacher against itself")
    said = f"{objective}, {ordered[0].samples} fresh samples"
    axis.set(
        yscale="log", xlabel="network calls" if ordered[0].cost is None else "cost", ylabel=said
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=8, frameon=False)
    return save_figure(figure, path, dpi=110)


def page(
    path: Path, title: str, rows: Sequence[Row], pictures: Sequence[Path], facts: Mapping[str, str]
) -> Path:
    """A page with the tables and the pictures inside it; it needs no other file."""
    from jinja2 import Template

    more = (
        ("search score", lambda row: number(row.found_search_score)),
        ("trials", lambda row: f"{row.trials} ({row.failed} failed)"),
        ("use", lambda row: row.use),
    )
    columns = [*(c for c in COLUMNS if any(c[1](row) != "–" for row in rows)), *more]
    heads = [*(name for name, _ in columns), *(f"{n}: found, named" for n in fact_names(rows))]
    template = Template(_PAGE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
    text = template.render(
        title=title,
        heads=heads,
        lines=[(*(cell(row) for _, cell in columns), *fact_cells(row)) for row in rows],
        rows=rows,
        pictures=[(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in pictures],
        facts=facts,
        number=number,
    )
    return write_text(path, text + "\n")


def fact_names(rows: Sequence[Row]) -> list[str]:
    """Names of the facts that an objective has."""
    return list(rows[0].facts) if rows else []


class Paged(Display):
    """Shows nothing while a search runs, and at its end writes its pictures and its page."""

    def ends(self, run: Search, verdicts: Sequence[Verdict]) -> Sequence[Path]:
        """See `Display`."""
        config, rows = run.config, [v.row for v in verdicts]
        drawn = pictures(run, verdicts)
        unused: tuple[str, ...] = ()
        if not run.problem.has_teacher:
            unused = ("teacher.", "refine.", "compensation.", "cpr.")
            unused += ("search.guidance", "objective.features")
        facts = {k: str(v) for k, v in config.identity().items() if not k.startswith(unused)}
        facts["model fingerprint"] = run.problem.fingerprint
        facts["fewstep"] = version("fewstep")
        title = f"fewstep: {config.name}"
        return [page(run.out / "report.html", title, rows, drawn, facts), *drawn]


def pictures(run: Search, verdicts: Sequence[Verdict]) -> list[Path]:
    """What can be drawn of a search: samples, the Pareto front, errors, curves."""
    out, problem, objective = run.out, run.problem, run.config.objective.name or ""
    made: list[Path | None] = []
    if problem.has_teacher or problem.picture is not None:
        drawn, apart = _sheet(run, verdicts), problem.has_teacher
        file = out / "samples.png"
        made.append(contact_sheet(file, drawn, problem.picture, differences=apart))
    if len(verdicts) > 1:
        rows = [v.row for v in verdicts]
        made.append(pareto_picture(out / "pareto.png", rows, objective))
    errors = {v.row.setting: v.errors for v in verdicts if v.errors is not None}
    if errors:
        made.append(errors_picture(out / "errors.png", errors))
    series = {nfe: best_so_far(rung.known) for nfe, rung in run.rungs.items()}
    levels = {nfe: best_so_far(rung.named_known())[-1][1] for nfe, rung in run.rungs.items()}
    made.append(curves(out / "curves.png", series, levels, objective))
    return [path for path in made if path is not None]


def _sheet(run: Search, verdicts: Sequence[Verdict]) -> list[tuple[str, Tensor]]:
    """Samples on the same fresh noise.

    Per NFE the problem's own baselines, best named and found; then the teacher if any.
    """
    config, problem, endpoints = run.config, run.problem, run.endpoints.get(FRESH)
    size = min(config.final.pictures, config.final.samples)
    own = problem.baselines if isinstance(problem, Problem) else None
    labels: list[str] = []
    schedules: list[Any] = []
    for v in verdicts:
        shown: dict[str, Any] = dict(own(v.row.nfe)) if own and v.row.cost is None else {}
        shown |= {v.row.best_named: v.best_named, "found": v.found}
        for name, schedule in shown.items():
            labels.append(f"{name}, {schedule.nfe} calls")
            schedules.append(schedule)
    blocks = [Block((schedule,), FRESH, 0, size, "samples") for schedule in schedules]
    samples = [torch.from_numpy(np.array(r.values[0])) for r in run.pool.map(blocks)]
    rows = list(zip(labels, samples, strict=True))
    if endpoints is not None:
        rows.append((f"teacher, {config.teacher.nfe} calls", endpoints[:size]))
    return rows
