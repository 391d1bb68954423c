"""`fewstep report`: what a search ended with, and which decisions of its schedules mattered."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from fewstep.experiments.cli import decisions
from fewstep.experiments.cli.decisions import Explained
from fewstep.experiments.cli.rescore import load_evaluator
from fewstep.search.config import StudyConfig, load_study, study_from_dict
from fewstep.search.display import Display
from fewstep.search.results import schedule_path
from fewstep.search.tracking import SPOOL, MlflowTracker
from fewstep.search.verdict import Row
from fewstep.space import OdeSchedule, load_schedule
from fewstep.space.errors import StudyError


def rows_of(out: Path) -> tuple[list[Row], str]:
    """The rows of a finished search and the name of its objective.

    Raises:
        StudyError: no results, or damaged ones.
    """
    try:
        data = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return [Row.from_dict(row) for row in data["rows"]], str(data["objective"])
    except OSError:
        raise StudyError(f"{out} holds no results.json: finish the search with --resume") from None
    except (KeyError, TypeError, ValueError):
        raise StudyError(
            f"{out / 'results.json'} is damaged: write it anew with --resume"
        ) from None


def of_folder(
    out: Path, rows: list[Row], study: Path | None, samples: int, display: Display
) -> list[Explained]:
    """Which decisions of a search's ODE schedules mattered; kept in its decisions.json.

    Args:
        out: folder of a finished search.
        rows: its rows.
        study: the study file, to find a model's module beside it; None where it is installed.
        samples: of each score.
        display: shows progress.

    Raises:
        FewstepError: files that are damaged, or a model that cannot be loaded; one line.
    """
    kept = out / "decisions.json"
    found = decisions.kept_explained(kept, [row.digest for row in rows], samples)
    if found is not None:
        return found
    config = _study_of(out, study)
    schedules = []
    for row in rows:
        file = schedule_path(out, row)
        schedules.append((row.title, load_schedule(file)))
        if not isinstance(schedules[-1][1], OdeSchedule):
            return []
        if schedules[-1][1].digest != row.digest:
            raise StudyError(f"{file} is not the schedule of results.json: write it with --resume")
    held = config.final.samples if samples <= config.final.samples else None
    cache = Path(config.teacher.cache) if config.teacher.cache else out / "teacher"
    found = _explain(schedules, config, samples, cache, held, display)
    decisions.save_explained(kept, found)
    return found


def of_file(
    file: Path,
    study: Path | None,
    settings: Iterable[str],
    samples: int,
    display: Display,
) -> list[Explained]:
    """Which decisions of one schedule matter for the model of a study.

    Raises:
        FewstepError: a file or a study that cannot be used; one line.
    """
    schedule = load_schedule(file)
    if study is None:
        raise StudyError(f"{file} is a schedule: name the study of its model with --study")
    if not isinstance(schedule, OdeSchedule):
        raise StudyError(f"{file} has no solver's steps whose decisions could be swapped")
    config = load_study(study, settings)
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(config.teacher.cache or scratch)
        return _explain([(file.stem, schedule)], config, samples, cache, None, display)


def _explain(
    schedules: list[tuple[str, OdeSchedule]],
    config: StudyConfig,
    samples: int,
    cache: Path,
    held: int | None,
    display: Display,
) -> list[Explained]:
    with display:
        display.stage("loading the model")
        try:
            evaluator = load_evaluator(config)
        except StudyError as error:
            if config.folder:
                raise
            raise StudyError(f"{error}, or name the study file with --study") from None
        for name, schedule in schedules:
            evaluator.problem.check(schedule, name)
        return decisions.explain(
            schedules, evaluator, config, samples, cache, held=held, display=display
        )


def _study_of(out: Path, study: Path | None) -> StudyConfig:
    """The study as the search ran it; of a study file only its folder counts."""
    file = out / "study.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise StudyError(f"{file} is absent or damaged: write it anew with --resume") from None
    folder = "" if study is None else load_study(study).folder
    return study_from_dict(data, folder=folder, source=str(file))


def send_kept(out: Path, say: Callable[[str], None]) -> int:
    """Send the reports that a search kept in its folder; how many there were.

    Raises:
        StudyError: the server does not answer, or the file is damaged.
    """
    try:
        head, *reports = map(json.loads, (out / SPOOL).read_text(encoding="utf-8").splitlines())
        tracker = MlflowTracker(head["uri"], head["begin"], out, say)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{out / SPOOL} is damaged ({error}): --resume the search") from None
    tracker.open()
    for report in reports[:-1]:
        tracker.send(report)
    tracker.close(reports[-1][1])
    if (out / SPOOL).exists():
        raise StudyError(f"MLflow at {tracker.uri} did not take everything: try again later")
    return len(reports)
