"""MLflow: one parent run per search, one child run per NFE, written from one background thread.

Nothing is sent anywhere but to the tracking URI. Reports wait in order where the server does not
answer, which is said at once and tried again; what still waits when a search ends is kept in
OUT/mlflow.jsonl, and `fewstep report OUT --log` sends it. A search never waits for its server. A
resumed search finds its runs by their tag and continues them. The module is the only one that
imports MLflow, and only when tracking is on.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fewstep.search.cluster import in_job, versions
from fewstep.search.config import StudyConfig
from fewstep.space.errors import StudyError, one_line
from fewstep.space.files import write_text

DEFAULT_URI = "sqlite:///runs/mlflow.db"
SPOOL = "mlflow.jsonl"
_PROBE, _AGAIN = 3.0, 15.0  # seconds: for an answer, and between tries
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "true",
}
Report = list[Any]
"""What is reported, as JSON: its kind, then its facts."""


class Tracker:
    """Where a search reports, of a number of calls or (None) of the whole; this one, nowhere."""

    runs: Mapping[str, str] = {}
    """Run ids, as far as they are known: {"parent": id, "5": id, ...}."""

    def curve(self, nfe: int, metric: str, points: Sequence[tuple[int, float]]) -> None:
        """Add (trial, value) points of a metric; points already there are skipped."""
        self.send(["curve", _key(nfe), metric, _now(), [list(point) for point in points]])

    def numbers(self, nfe: int | None, values: Mapping[str, float]) -> None:
        """Final numbers."""
        self.send(["numbers", _key(nfe), _now(), {k: float(v) for k, v in values.items()}])

    def tag(self, nfe: int | None, **tags: str) -> None:
        """Words to find a run by."""
        self.send(["tags", _key(nfe), tags])

    def file(self, nfe: int | None, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact."""
        self.send(["file", _key(nfe), str(path.resolve()), folder])

    def close(self, status: str) -> None:
        """End the runs: FINISHED, FAILED or KILLED."""

    def send(self, report: Report) -> None:
        """Report something, in its JSON form."""


def _key(nfe: int | None) -> str:
    return "parent" if nfe is None else str(nfe)


def _now() -> int:
    return int(time.time() * 1000)


def tracking_uri(config: StudyConfig) -> str:
    """Where a study's runs are recorded."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


class MlflowTracker(Tracker):
    """Reports to MLflow.

    Args:
        uri: tracking URI.
        begin: what the runs are: see `beginning`.
        out: the search's folder, where reports are kept that could not be sent.
        say: called with a line where something is not as it should be.
    """

    def __init__(
        self,
        uri: str,
        begin: Mapping[str, Any],
        out: Path,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.uri, self._begin, self._out, self._say = uri, dict(begin), out, say
        self.runs = {}
        self._points: dict[tuple[str, str], int] = {}
        self._client: Any = None
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Report] = deque()
        self._aside: list[Report] = []
        self._away = 0.0
        self._monitor: Any = None

    def open(self) -> None:
        """Start, or continue, the runs; a server that is away is said, and they start later.

        Raises:
            StudyError: MLflow is not installed, or the URI is none that it can use.
        """
        self._client = client_of(self.uri)
        if not self._answers():
            self._go_away("nobody answers")
            return
        try:
            self._start()
        except Exception as error:
            status = getattr(error, "get_http_status_code", lambda: 0)()
            if self.uri.startswith("http") and status >= 500:
                self._go_away(one_line(error, 200))
                return
            raise StudyError(f"tracking.uri {self.uri}: {one_line(error, 200)}") from None

    def _start(self) -> None:
        """Find the runs of this search by their tag, or make them."""
        from mlflow.entities import Param

        begin, client = self._begin, self._client
        experiment = self._find_experiment()
        mine = f"tags.`fewstep.search` = '{begin['search']}'"
        for run in client.search_runs([experiment], mine, max_results=1000):
            key = run.data.tags.get("fewstep.nfe", "parent")
            self.runs = {**self.runs, key: str(run.info.run_id)}
            client.update_run(run.info.run_id, status="RUNNING")
        for key in ("parent", *map(str, begin["nfes"])):
            if key in self.runs:
                continue
            tags = {**begin["tags"], "fewstep.search": begin["search"], "fewstep.kind": "search"}
            name, params = begin["name"], dict(begin["params"])
            if key != "parent":
                tags |= {"fewstep.kind": "nfe", "fewstep.nfe": key}
                tags["mlflow.parentRunId"] = self.runs["parent"]
                name, params["nfe"] = f"{name} NFE {key}", key
            made = client.create_run(experiment, begin["time"], tags=tags, run_name=name)
            self._log(made.info.run_id, "params", [Param(*item) for item in params.items()], 90)
            self.runs = {**self.runs, key: str(made.info.run_id)}
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() == "true":
            with contextlib.suppress(Exception):
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                self._monitor = SystemMetricsMonitor(self.runs["parent"], tracking_uri=self.uri)
                self._monitor.start()

    def _find_experiment(self) -> str:
        name = self._begin["experiment"]
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        folder = re.sub(r"\W+", "-", name, flags=re.ASCII)  # relative: see `_keep`
        location = f"mlflow-artifacts:/{folder}" if self.uri.startswith("sqlite:///") else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # its page under training
        return str(self._client.create_experiment(name, artifact_location=location, tags=kind))

    def close(self, status: str) -> None:
        """See `Tracker`; what is not written by then is kept in the search's folder."""
        if self._monitor is not None:
            self._monitor.finish()
        self.send(["end", status, _now()])
        self._thread.submit(self._drain, last=True)
        self._thread.shutdown(wait=True)
        left = [*self._aside, *self._waiting]
        spool = self._out / SPOOL
        if not left:
            spool.unlink(missing_ok=True)
            return
        lines = [{"uri": self.uri, "begin": self._begin}, *left]
        write_text(spool, "".join(json.dumps(line) + "\n" for line in lines))
        self._say(
            f"MLflow at {self.uri} does not have everything: {len(left)} reports are kept; send "
            f"them with: fewstep report {self._out} --log"
        )

    def send(self, report: Report) -> None:
        """See `Tracker`: written from the background, after those that wait."""
        self._waiting.append(report)
        self._thread.submit(self._drain)

    def _drain(self, last: bool = False) -> None:
        """Write what waits, in order; stop where the server is away."""
        if last:
            self._waiting.extendleft(reversed(self._aside))
            self._aside = []
        if self._away:
            if not last and time.monotonic() < self._away + _AGAIN:
                return
            if not self._answers():
                self._away = time.monotonic()
                return
        while True:
            try:
                if not self._complete:
                    self._start()
                if self._away:
                    self._say(f"MLflow at {self.uri} answers again")
                    self._away = 0.0
                while self._waiting:
                    self._write(self._waiting[0])
                    self._waiting.popleft()
                return
            except Exception as error:  # whatever a client of a service may raise
                why = one_line(error, 200)
                if not (self._complete and self._answers()):
                    self._go_away(why)
                    return
                if not (self._aside or last):
                    self._say(f"MLflow at {self.uri}: {why}; tried again at the end")
                self._aside.append(self._waiting.popleft())  # the rest can be written

    @property
    def _complete(self) -> bool:
        """Whether every run is there."""
        return len(self.runs) > len(self._begin["nfes"])

    def _go_away(self, why: str) -> None:
        if not self._away:
            self._say(
                f"MLflow at {self.uri} does not answer ({why}): the search goes on, reports wait"
            )
        self._away = time.monotonic()

    def _answers(self) -> bool:
        """Whether the server is there, found out in seconds; a database is opened at once."""
        if not self.uri.startswith(("http://", "https://")):
            return True
        try:
            urllib.request.urlopen(f"{self.uri.rstrip('/')}/health", timeout=_PROBE).close()
        except (OSError, ValueError) as error:
            return isinstance(error, urllib.error.HTTPError)  # it answers
        return True

    def _write(self, report: Report) -> None:
        kind, *facts = report
        if kind == "end":
            for run_id in self.runs.values():
                self._client.set_terminated(run_id, status=facts[0], end_time=facts[1])
            return
        run_id = self.runs[facts[0]]
        if kind == "curve":
            self._write_curve(run_id, *facts[1:])
        elif kind == "numbers":
            self._metrics(run_id, [(name, value, facts[1], 0) for name, value in facts[2].items()])
        elif kind == "tags":
            for name, value in facts[1].items():
                self._client.set_tag(run_id, name, value)
        else:
            self._keep(run_id, facts[1], facts[2])

    def _keep(self, run_id: str, file: str, folder: str) -> None:
        """Keep a file; with a database, beside it, where `mlflow ui` looks and moves with it."""
        scheme, _, place = self._client.get_run(run_id).info.artifact_uri.partition(":/")
        if scheme != "mlflow-artifacts" or not self.uri.startswith("sqlite:///"):
            self._client.log_artifact(run_id, file, folder or None)
            return
        beside = Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
        target = beside / place.lstrip("/") / folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)

    def _write_curve(
        self, run_id: str, metric: str, now: int, points: Sequence[tuple[int, float]]
    ) -> None:
        """The points that are not there yet."""
        last = self._points.get((run_id, metric))
        if last is None:
            history = self._client.get_metric_history(run_id, metric)
            last = max((m.step for m in history), default=-1)
        self._metrics(run_id, [(metric, v, now, step) for step, v in points if step > last])
        self._points[run_id, metric] = max([last, *(step for step, _ in points)])

    def _metrics(self, run_id: str, values: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        self._log(run_id, "metrics", [Metric(*value) for value in values], 900)

    def _log(self, run_id: str, what: str, listed: Sequence[Any], most: int) -> None:
        """Send what one request may hold at a time."""
        for start in range(0, len(listed), most):
            self._client.log_batch(run_id, **{what: listed[start : start + most]})


def client_of(uri: str) -> Any:
    """A client of MLflow, quiet and quick to give up.

    Raises:
        StudyError: MLflow is not installed, or the URI is none that it can use.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    _hush()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow.tracking import MlflowClient
    except ImportError:
        raise StudyError(
            "tracking needs MLflow: pip install 'fewstep[search]', or set tracking.enabled = false"
        ) from None
    _hush()  # the import has set levels of its own
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri)
    except Exception as error:
        raise StudyError(f"tracking.uri {uri}: {one_line(error, 200)}") from None


def _hush() -> None:
    for logger in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def beginning(config: StudyConfig, search: str, out: Path) -> dict[str, Any]:
    """What the runs of a search are, as JSON; by its id `search` they are found."""
    model = config.model.factory or str(config.model.pipeline)
    told = config.description or f"fewstep: schedules for {model}, {config.search.strategy}"
    tags = {
        "fewstep.study": config.name,
        "fewstep.model": model,
        "fewstep.strategy": config.search.strategy,
        "fewstep.objective": config.objective.name or "",
        "fewstep.out": str(out.resolve()),
        "mlflow.source.name": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
        "mlflow.source.type": "JOB" if in_job() else "LOCAL",
        "mlflow.note.content": told,
        **{f"version.{name}": number for name, number in versions().items()},
        **config.tracking.tags,
    }
    with contextlib.suppress(Exception):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return {
        "search": search,
        "name": config.name,
        "experiment": config.tracking.experiment,
        "nfes": list(config.search.settings),
        "params": {key: str(value)[:500] for key, value in config.identity().items()},
        "tags": tags,
        "time": _now(),
    }
