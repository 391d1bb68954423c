"""A study of several guidance scales: one search for each, in a folder of its own.

    OUT/w7.5/...                       all that the search at scale 7.5 leaves
    OUT/schedules/nfe05_w7.5.json      every schedule found
    OUT/results.json                   all rows, each with its guidance
    OUT/cpr.json                       schedules for the settings between (`stages.cpr`)

A scale changes what the teacher samples, so searches at different scales share nothing but the
study; each resumes by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.preparing import evaluator_spec, open_pool
from fewstep.search.record import open_storage, write_text
from fewstep.search.results import schedule_path
from fewstep.search.stages.cpr import cpr_cost, regress
from fewstep.search.store import Store
from fewstep.search.verdict import Row
from fewstep.search.work import Evaluator
from fewstep.space.files import load_schedule, save_schedule

if TYPE_CHECKING:
    from fewstep.search.run import Outcome


def folder_of(out: Path, scale: float) -> Path:
    """The folder of one scale."""
    return out / f"w{scale:g}"


def search_each(
    config: StudyConfig,
    out: Path,
    one: Callable[[StudyConfig, Path, bool], Outcome],
    resume: bool,
    display: Display,
) -> tuple[str, tuple[Row, ...]]:
    """Search every scale and gather what was found: the objective, and all rows.

    Args:
        config: the study.
        out: its folder.
        one: runs the study of one scale in a folder; whether it goes on with what is there.
        resume: whether to go on with the search in `out`.
        display: where progress is shown.
    """
    storage = open_storage(config.search.storage, out)
    store = Store(storage, config.name, out, config.identity(budget=False), resume)
    write_text(out / "study.json", json.dumps(config.resolved(), indent=1) + "\n")
    rows, objective = list[Row](), ""
    off = config.cpr.model_copy(update={"fit": False})
    try:
        for scale in config.search.guidance or ():
            folder = folder_of(out, scale)
            display.note(f"guidance {scale:g}")
            part = config.at_guidance(scale).model_copy(update={"cpr": off})
            found = one(part, folder, store.resumed)
            for row in found.rows:
                schedule = load_schedule(schedule_path(folder, row))
                save_schedule(schedule, schedule_path(out, row))
            rows, objective = [*rows, *found.rows], found.objective
    finally:
        store.close(keep=any(out.glob("w*/study.json")))
    listed = [row.to_dict() for row in rows]
    results = {"study": config.name, "objective": objective, "rows": listed}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    return objective, tuple(rows)


def regress_all(
    config: StudyConfig, out: Path, rows: Sequence[Row], address: str | None, display: Display
) -> None:
    """The regression over all scales, on workers of its own."""
    scales = config.search.guidance or ()
    spec = evaluator_spec(config.at_guidance(scales[0]))
    evaluator = Evaluator.from_spec(spec)
    pool = open_pool(config, spec, evaluator, address, display)
    try:
        with display:
            display.total(cpr_cost(config, len(scales)))
            regress(config, out, rows, evaluator.ode, pool, display)
    finally:
        pool.close()
