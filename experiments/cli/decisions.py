"""Which decisions of found schedules mattered, for people: words, a table, a picture, a section.

`explain` scores (see `importance`); the rest shows. The numbers are kept as JSON beside a
search's results, so they are computed once.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.experiments.cli.importance import DECISIONS, Effect, effects, swaps
from fewstep.experiments.cli.page import number
from fewstep.experiments.cli.rescore import rescore
from fewstep.samplers.pictures import save_figure
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.verdict import FRESH
from fewstep.search.work import Evaluator
from fewstep.space.errors import StudyError
from fewstep.space.files import write_text
from fewstep.space.schedule import OdeSchedule

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {"endpoint_mse": "the error", "frechet": "the Frechet distance"}
_TOP = 4.0  # log2 of the ratio at which the colours end
_NEUTRAL = {"time": "at the middle of its neighbours", "first": "with the network asked instead"}


@dataclass(frozen=True)
class Explained:
    """What each decision of one schedule does to its score.

    Args:
        name: what to call the schedule.
        nfe: network calls.
        digest: of the schedule.
        objective: the score's name.
        samples: samples it was scored on, the first of the stream "fresh".
        score: the schedule's own.
        steps: number of steps.
        effects: of every decision that does something, the most needed first.
    """

    name: str
    nfe: int
    digest: str
    objective: str
    samples: int
    score: float
    steps: int
    effects: tuple[Effect, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; infinite ratios are written as null."""
        data = asdict(self)
        for effect in data["effects"]:
            effect["failed"] = effect["ratio"] == math.inf
            if effect["failed"]:
                effect["ratio"] = effect["interval"] = None
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Explained:
        """Read the JSON form."""
        read = []
        for row in data["effects"]:
            row = dict(row)
            if row.pop("failed"):
                row |= {"ratio": math.inf, "interval": (math.inf, math.inf)}
            elif row["interval"] is not None:
                row["interval"] = tuple(row["interval"])
            read.append(Effect(**row))
        return cls(**{**data, "effects": tuple(read)})


def explain(
    named: Sequence[tuple[str, OdeSchedule]],
    evaluator: Evaluator,
    config: StudyConfig,
    samples: int,
    cache: Path,
    *,
    held: int | None = None,
    display: Display | None = None,
) -> list[Explained]:
    """Score schedules and all their swaps on the study's fresh noise.

    Args:
        named: (name, schedule) pairs.
        evaluator: the study's model and objective.
        config: the study.
        samples: samples of each score.
        cache: folder of computed references.
        held: samples of the reference that the cache may hold, see `rescore`.
        display: shows progress.

    Raises:
        StudyError: a schedule that cannot be scored itself.
    """
    found = [swaps(schedule) for _, schedule in named]
    schedules: list[OdeSchedule] = []
    starts = []
    for (_, schedule), own in zip(named, found, strict=True):
        starts.append(len(schedules))
        schedules += [schedule, *(s.schedule for s in own if s.schedule is not None)]
    scored = rescore(
        schedules, evaluator, config, samples, cache, stream=FRESH, held=held, display=display
    )
    made = []
    for (name, schedule), own, start in zip(named, found, starts, strict=True):
        result = scored.results[start]
        if result.status != "ok":
            raise StudyError(f"{name} could not be scored: {result.status} ({result.message})")
        objective = evaluator.objective.name
        facts = (name, schedule.nfe, schedule.digest, objective, samples, scored.value(start))
        made.append(Explained(*facts, schedule.n_steps, tuple(effects(own, scored, start))))
    return made


def words(e: Explained, most: int = 3) -> list[str]:
    """A few lines that say what mattered.

    Args:
        e: the schedule's effects.
        most: needed decisions to name.
    """
    what = NAMES.get(e.objective, e.objective)
    swapped = [x for x in e.effects if x.ratio is not None]
    needed = [x for x in swapped if x.sure and x.ratio is not None and x.ratio > 1]
    harmful = [x for x in reversed(swapped) if x.sure and x.ratio is not None and x.ratio < 1]
    unsure = len(swapped) - len(needed) - len(harmful)
    lines = [f"{e.name}: {what} is {number(e.score)} on {e.samples} fresh samples"]
    for k, x in enumerate(needed[:most]):
        verb = "matters most" if k == 0 else "matters"
        lines.append(f"step {x.step}: {_said(x)} {verb}: {_without(x)} {what} is {_ratio(x)}")
    for x in harmful[:most]:
        lines.append(f"step {x.step}: {_said(x)} does harm: {_without(x)} {what} is {_ratio(x)}")
    if not swapped:
        return [*lines, "every decision is neutral, or has no neutral value"]
    counts = f"{len(needed)} helpful, {len(harmful)} harmful, {unsure} without a difference"
    return [*lines, f"of {len(swapped)} decisions: {counts} that {e.samples} samples show"]


def _said(x: Effect) -> str:
    return f"the time {x.was}" if x.decision == "time" else f"{_label(x.decision)} {x.was}"


def _label(decision: str) -> str:
    return decision if decision.startswith("dt_") else decision.replace("_", " ")


def _without(x: Effect) -> str:
    return _NEUTRAL.get(x.decision, "without it")


def _ratio(x: Effect) -> str:
    if x.ratio is None:
        return f"not swapped: {x.note}"
    if x.interval is None or math.isinf(x.ratio):
        return "not finite"
    low, high = x.interval
    return f"{_short(x.ratio)}x ({_short(low)}–{_short(high)})"


def _short(v: float) -> str:
    return (
        f"{v:.3f}" if v < 1.05 else f"{v:.2f}" if v < 10 else f"{v:.1f}" if v < 100 else f"{v:.0f}"
    )


def decisions_table(e: Explained) -> Table:
    """Every decision, its value, and the ratio of the scores without and with it."""
    from rich.table import Table

    table = Table(title=f"{e.name}: {e.objective} without a decision / with it (95%)")
    for head, side in (("step", "right"), ("decision", "left"), ("value", "left")):
        table.add_column(head, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("without / with", justify="right", no_wrap=True)
    noted = any(x.note for x in e.effects)
    if noted:
        table.add_column("note")
    for x in e.effects:
        ratio = "–" if x.ratio is None else _ratio(x)
        plain = x.sure or x.ratio is None
        cells = (str(x.step), _label(x.decision), x.was, ratio, *([x.note] if noted else []))
        table.add_row(*cells, style="" if plain else "dim")
    return table


def decisions_picture(path: Path, explained: Sequence[Explained]) -> Path:
    """A heat map per schedule: steps down, decisions across, log2 of the ratio as colour.

    Red: the score rises without the decision; blue: it falls. A neutral decision's cell is empty,
    one that was not swapped holds a dash; a ratio whose interval holds 1 is written in grey.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = [d for d in DECISIONS if any(x.decision == d for e in explained for x in e.effects)]
    columns = columns or ["time"]
    rows = sum(e.steps for e in explained)
    width, height = 2.2 + 0.82 * len(columns), 1.0 + 0.34 * rows + 0.75 * len(explained)
    figure = Figure(figsize=(max(width, 5.0), height), layout="constrained")
    ratios = {"height_ratios": [e.steps for e in explained]}
    axes = figure.subplots(len(explained), 1, squeeze=False, gridspec_kw=ratios)[:, 0]
    finite = [abs(v) for e in explained for x in e.effects if (v := _log2(x)) is not None]
    top = min(max(1.0, *finite, 0.0), _TOP)
    colours = colormaps["RdBu_r"]
    image: Any = None
    for axis, e in zip(axes, explained, strict=True):
        grid = np.full((e.steps, len(columns)), np.nan)
        for x in e.effects:
            row, column, value = x.step, columns.index(x.decision), _log2(x)
            text, ink = "–", "0.5"
            if value is not None and x.ratio is not None:
                grid[row, column] = value
                dark = sum(colours(0.5 + 0.5 * value / top)[:3]) < 1.5
                ink = "white" if dark else "black" if x.sure else "0.45"
                text = "inf" if math.isinf(x.ratio) else _short(x.ratio)
            axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)
        image = axis.imshow(grid, cmap=colours, vmin=-top, vmax=top, aspect="auto")
        axis.set_xticks(range(len(columns)), [_label(c).replace(" ", "\n") for c in columns])
        axis.set_yticks(range(e.steps))
        axis.set_xticks(np.arange(-0.5, len(columns)), minor=True)
        axis.set_yticks(np.arange(-0.5, e.steps), minor=True)
        axis.grid(which="minor", color="0.85", linewidth=0.6)
        axis.tick_params(which="both", length=0, labelsize=8)
        axis.set_ylabel("step", fontsize=8)
        axis.set_title(f"{e.name}: {e.objective} {number(e.score)}", fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=list(axes), shrink=min(1.0, 2.5 / height), extend="both")
    ticks = range(-int(top), int(top) + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**v:g}x" for v in ticks])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("score without the decision / with it", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path, dpi=130)


def _log2(x: Effect) -> float | None:
    if x.ratio is None:
        return None
    return 99.0 if math.isinf(x.ratio) else math.log2(max(x.ratio, 1e-6))


def save_explained(path: Path, explained: Sequence[Explained]) -> Path:
    """Write the numbers."""
    return write_text(path, json.dumps([e.to_dict() for e in explained], indent=1) + "\n")


def kept_explained(path: Path, digests: Sequence[str], samples: int) -> list[Explained] | None:
    """The numbers on file, if they are those of these schedules on as many samples."""
    try:
        held = [Explained.from_dict(d) for d in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: computed again and replaced
    same = [e.digest for e in held] == list(digests) and all(e.samples == samples for e in held)
    return held if same else None


def add_section(page: Path, explained: Sequence[Explained], picture: Path) -> None:
    """Put words and picture into a search's page, in place of an earlier section; if it exists."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError:
        return
    said = "".join(
        "<p>" + "<br>".join(html.escape(line) for line in words(e)) + "</p>" for e in explained
    )
    data = base64.b64encode(picture.read_bytes()).decode()
    section = (
        f'<section id="decisions"><h2>Which decisions mattered</h2>{said}<p><img '
        f'alt="decisions" src="data:image/png;base64,{data}"></section>'
    )
    text = re.sub(r'<section id="decisions">.*?</section>', "", text, flags=re.DOTALL)
    before, mark, after = text.partition("<h2>Study</h2>")
    write_text(page, before + section + mark + after)
