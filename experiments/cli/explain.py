"""What a schedule says, for people: its steps in a table, its differences from another.

A neutral value, at which the program equals the plain solver's, is greyed; a column that is
neutral in every step is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from fewstep.experiments.cli.programs import (
    has_sorts,
    program_differences,
    program_table,
    sorts_line,
)
from fewstep.space.base import Replayable
from fewstep.space.masked import CallSpec, MaskedSchedule
from fewstep.space.particles import ParticleSchedule, ParticleStep
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import Frozen, OdeSchedule, StepSpec

Explained = OdeSchedule | MaskedSchedule | ParticleSchedule
Loaded = Explained | ProgramSchedule
_ALWAYS = (
    *("order", "formulation", "basis", "corrector"),
    *("count", "mode", "positions"),
    *("zeta", "resample", "weight"),
)
_WHOLE = {  # choices of a whole schedule
    "ode": ("first", "compensation_order", "compensation_variable", "shift_keeps", "options"),
    "masked": ("length", "variable", "ahead"),
    "particles": ("integrator", "solver", "reward_weight", "ramp"),
}
_NAMES = {
    "relaxation_coefficient": "c",
    "corrector_relaxation": "corr. relaxation",
    "corrector_order": "corr. order",
    "slope_points": "slope pts",
}


def headline(schedule: Loaded) -> list[str]:
    """A few lines: what it is, for which noise schedule, where it comes from."""
    lines = [
        f"{schedule.nfe} network calls, noise schedule {schedule.noise.type}, "
        f"digest {schedule.digest}"
    ]
    if isinstance(schedule, ProgramSchedule):
        lines += _program_lines(schedule)
    elif isinstance(schedule, MaskedSchedule):
        lines.append(
            f"{schedule.length} positions; extrapolation is linear in {schedule.variable}"
        )
    elif isinstance(schedule, ParticleSchedule):
        moved = "a solver" if schedule.solver is not None else schedule.integrator
        lines.append(f"weighted particles, moved by {moved}; calls are per particle and model")
        if schedule.reward_weight != "gradient" or schedule.ramp is not None:
            rise = "" if schedule.ramp is None else f", and rises with scale {schedule.ramp:g}"
            lines.append(f"a reward is weighed by its {schedule.reward_weight}{rise}")
    else:
        lines += _globals(schedule)
    if isinstance(schedule, OdeSchedule | ProgramSchedule) and has_sorts(schedule.program):
        lines.append(sorts_line(schedule.program))
    origin = schedule.provenance
    if "baseline" in origin:
        lines.append(f"named solver {origin['baseline']}")
    if "cpr" in origin:
        asked = origin["cpr"]
        where = f"NFE {asked['nfe']}, guidance {asked['guidance']:g}"
        how = "between two fitted programs" if "between" in origin else "by a CPR"
        lines.append(f"its numbers predicted for {where}, {how}")
    if "policy" in origin:
        lines.append(f"policy {origin['policy']}")
    if "score" in origin:
        low, high = origin.get("interval", (float("nan"), float("nan")))
        best = min(origin.get("baselines", {"?": float("nan")}).items(), key=lambda kv: kv[1])
        lines.append(
            f"{origin.get('objective', 'score')} {origin['score']:.4g} on fresh samples of "
            f"{origin.get('model') or 'its model'}; best named {best[0]} {best[1]:.4g}, "
            f"ratio {origin.get('ratio', float('nan')):.3f} ({low:.3f} to {high:.3f})"
        )
    for key in ("study", "strategy", "source", "mlflow_run", "fewstep"):
        if origin.get(key):
            lines.append(f"{key}: {origin[key]}")
    return lines


def _globals(schedule: OdeSchedule) -> list[str]:
    """What holds for the schedule as a whole."""
    lines = []
    if schedule.first != "network":
        what = {
            "mean": "the network's first answer is taken to be the constant image beside the file",
            "zero": "the network's first answer is taken to be 0",
            "usf_zero": "eps = x, as USF released it",
        }[schedule.first]
        p, k = schedule.program.init.tolist()
        start = f"{p:.4g} x_T" + (f" + {k:.4g} m" if k else "")
        lines.append(f"analytical first step, no call: {what}; sampling starts at {start}")
        lines += missing(schedule)
    if any(step.compensation != 1 for step in schedule.steps):
        lines.append(
            "compensation: a step's newest output is replaced for good by its interpolation "
            f"through {schedule.compensation_order + 1} points in "
            f"{schedule.compensation_variable}, at ratio x this time + (1 - ratio) x the one "
            "before; 1 is off"
        )
    return lines


def _program_lines(schedule: ProgramSchedule) -> list[str]:
    """What holds for a program as a whole."""
    p, k = schedule.program.init.tolist()
    start = f"{p:.4g} x_T" + (f" + {k:.4g} m" if k else "")
    lines = [
        "a program without steps: x_T belongs to time "
        f"{schedule.start:.5g}, sampling starts at {start}, the sample belongs to time "
        f"{schedule.end:.5g}",
        *(f"run-time option {name}: {value}" for name, value in schedule.options.items()),
    ]
    return lines + missing(schedule)


def missing(schedule: Loaded) -> list[str]:
    """What a schedule lacks before it can be sampled, a line each."""
    if not isinstance(schedule, OdeSchedule | ProgramSchedule):
        return []
    if not schedule.uses_constant or schedule.constant is not None:
        return []
    return [
        "its constant image, the data mean, is missing: put it beside the file, under the same "
        "name with .safetensors, or call with_constant(m)"
    ]


def steps_table(schedule: Loaded) -> Table:
    """One row per step; of masked schedules and programs, one per network call."""
    if isinstance(schedule, ProgramSchedule):
        return program_table(schedule)
    word, parts = _parts(schedule)
    defaults = type(parts[0])()
    shown = [
        name
        for name in type(defaults).model_fields
        if name in _ALWAYS or any(getattr(s, name) != getattr(defaults, name) for s in parts)
    ]
    heads, rows = [word], [[str(i)] for i in range(len(parts))]
    if isinstance(schedule, MaskedSchedule):
        heads.append("still masked")
        left = schedule.length
        for row, call in zip(rows, schedule.calls, strict=True):
            row.append(str(left))
            left -= call.count
    else:
        heads += ["t", "to", "lam", "h"]
        lam = schedule.noise.lam(torch.tensor(schedule.times, dtype=torch.float64)).tolist()
        for i, row in enumerate(rows):
            row += [f"{schedule.times[i]:.5g}", f"{schedule.times[i + 1]:.5g}"]
            row += [f"{lam[i]:.3f}", f"{lam[i + 1] - lam[i]:.3f}"]
    if isinstance(schedule, OdeSchedule):
        heads.append("calls")
        for row, count in zip(rows, _calls(schedule), strict=True):
            row.append(str(count))
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name in shown:
        table.add_column(_NAMES.get(name, name.replace("_", " ")), no_wrap=True)
    for row, part in zip(rows, parts, strict=True):
        table.add_row(*row, *(_cell(part, name, defaults) for name in shown))
    return table


def _calls(schedule: OdeSchedule) -> list[int]:
    """Network calls of each step, from the schedules of its first steps."""
    counts = []
    for i, step in enumerate(schedule.steps):
        alone = 0 if i == 0 and schedule.first != "network" else 1
        stages = 0 if step.tableau is None else _stages(step.tableau) - 1
        counts.append(alone + stages + (step.corrector == "reeval"))
    return counts


def _stages(tableau: str) -> int:
    from fewstep.space.coefficients import TABLEAUS

    return len(TABLEAUS[tableau].c)


def _cell(part: Frozen, name: str, defaults: Frozen) -> str:
    value, neutral = getattr(part, name), getattr(defaults, name)
    text = _text(value)
    return f"[dim]{text}[/dim]" if value == neutral else text


def _text(value: Any) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, tuple):
        return " ".join(f"{v:.4g}" for v in value)
    return str(value)


def differences(a: Loaded, b: Loaded) -> list[str]:
    """What differs between two schedules, a line each; empty if they are the same sampler."""
    if a.digest == b.digest:
        return []
    if a.kind != b.kind:
        return [f"kind: {a.kind} and {b.kind}"]
    lines = []
    if a.noise != b.noise:
        lines.append("noise schedule: another")
    if a.nfe != b.nfe:
        lines.append(f"network calls: {a.nfe} and {b.nfe}")
    if isinstance(a, OdeSchedule | ProgramSchedule) and isinstance(
        b, OdeSchedule | ProgramSchedule
    ):
        lines += _images(a, b)
        if isinstance(a, ProgramSchedule) or isinstance(b, ProgramSchedule):
            if lines and (a.noise != b.noise or a.nfe != b.nfe):
                return lines
            lines += program_differences(ProgramSchedule.of(a), ProgramSchedule.of(b))
            return lines or ["the programs differ in rounding"]
    for name in _WHOLE[a.kind]:
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            lines.append(f"{name}: {x} and {y}")
    times = [getattr(s, "times", ()) for s in (a, b)]
    if times[0] != times[1]:
        pair = [" ".join(f"{t:.4g}" for t in each) for each in times]
        lines.append(f"times: {pair[0]}  and  {pair[1]}")
    assert not isinstance(a, ProgramSchedule)
    assert not isinstance(b, ProgramSchedule)
    (word, first), (_, second) = _parts(a), _parts(b)
    if len(first) != len(second):
        return [*lines, f"{word}s: {len(first)} and {len(second)}"]
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        for name in type(x).model_fields:
            if getattr(x, name) != getattr(y, name):
                lines.append(
                    f"{word} {i}, {name}: {_text(getattr(x, name))} and {_text(getattr(y, name))}"
                )
    return lines


def _images(a: Replayable, b: Replayable) -> list[str]:
    """How the constant images of two schedules differ, if both use one."""
    if not (a.uses_constant or b.uses_constant):
        return []
    if a.constant is None or b.constant is None:
        one = "both" if a.constant is b.constant else "A" if a.constant is None else "B"
        return [] if one == "both" else [f"constant image: none in {one}"]
    if a.constant.shape != b.constant.shape:
        return [f"constant image: {tuple(a.constant.shape)} and {tuple(b.constant.shape)}"]
    off = float((a.constant.double() - b.constant.double()).square().mean().sqrt())
    return [f"constant image: another, RMS difference {off:.4g}"] if off else []


def _parts(schedule: Explained) -> tuple[str, Sequence[StepSpec | CallSpec | ParticleStep]]:
    """What a schedule consists of, and the word for it."""
    if isinstance(schedule, MaskedSchedule):
        return "call", schedule.calls
    return "step", schedule.steps
