"""MLflow: one parent run per search, one child run per NFE, written from one background thread.

Nothing is sent anywhere but to the tracking URI. A server that does not answer is said at once and
tried again with the next report; it never stops a search. Metrics go in batches; a resumed search
continues its runs. The module is the only one that imports MLflow, and only when tracking is on.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.space.errors import StudyError

DEFAULT_URI = "sqlite:///runs/mlflow.db"
_BATCH = 900
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Tracker:
    """Where a search reports; this one, nowhere."""

    def open(
        self, name: str, settings: Mapping[str, Any], runs: Mapping[str, str]
    ) -> dict[str, str]:
        """Start, or continue, the runs: {"parent": id, "5": id, ...}."""
        return {}

    def curve(self, nfe: int, metric: str, points: Sequence[tuple[int, float]]) -> None:
        """Add (trial, value) points of a metric; points already there are skipped."""

    def numbers(self, nfe: int | None, values: Mapping[str, float]) -> None:
        """Final numbers of an NFE, or of the whole search."""

    def file(self, nfe: int | None, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact."""

    def close(self, status: str) -> None:
        """End the runs: FINISHED, FAILED or KILLED."""


class MlflowTracker(Tracker):
    """Reports to MLflow.

    Args:
        uri: tracking URI; None is MLFLOW_TRACKING_URI, or else `DEFAULT_URI`.
        experiment: name of the experiment.
        nfes: the NFEs that get a child run.
        say: called with a line where something is not as it should be.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        nfes: Sequence[int],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        self._experiment, self._nfes, self._say = experiment, nfes, say
        self._runs: dict[str, str] = {}
        self._points: dict[tuple[str, str], int] = {}
        self._client: Any = None
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Callable[[], None]] = deque()
        self._away = False

    def open(
        self, name: str, settings: Mapping[str, Any], runs: Mapping[str, str]
    ) -> dict[str, str]:
        """See `Tracker`.

        Raises:
            StudyError: the URI cannot be used, or does not answer for the runs of a resumed
                search.
        """
        client, known = self._connect(), dict(runs)
        if known and not self._holds(client, known):
            self._say(f"MLflow at {self.uri} does not hold the runs this search began: new ones")
            known = {}
        if not known:
            known = self._start(client, name, settings)
        self._runs = known
        return known

    def _holds(self, client: Any, runs: Mapping[str, str]) -> bool:
        """Whether the runs are there; they go on."""
        from mlflow.exceptions import MlflowException

        try:
            for run_id in runs.values():
                client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise StudyError(
                f"tracking.uri {self.uri}: {' '.join(str(error).split())[:200]}"
            ) from None
        return True

    def _connect(self) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        for logger in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from mlflow.tracking import MlflowClient
        except ImportError:
            raise StudyError(
                "tracking needs MLflow: pip install 'fewstep[search]', or set tracking.enabled = "
                "false"
            ) from None
        for logger in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._client = MlflowClient(tracking_uri=self.uri)
            self._experiment_id = self._find_experiment()
        except Exception as error:
            raise StudyError(
                f"tracking.uri {self.uri}: {' '.join(str(error).split())[:200]}"
            ) from None
        return self._client

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self.uri.startswith(
            "sqlite:///"
        ):  # beside the database, not in whatever folder one stands
            database = Path(self.uri.removeprefix("sqlite:///")).resolve()
            location = (database.parent / "mlartifacts" / self._experiment).as_uri()
        return str(self._client.create_experiment(self._experiment, artifact_location=location))

    def _start(self, client: Any, name: str, settings: Mapping[str, Any]) -> dict[str, str]:
        parent = client.create_run(
            self._experiment_id, run_name=name, tags={"fewstep.kind": "search"}
        )
        runs = {"parent": str(parent.info.run_id)}
        for nfe in self._nfes:
            tags = {
                "mlflow.parentRunId": runs["parent"],
                "fewstep.kind": "nfe",
                "fewstep.nfe": str(nfe),
            }
            child = client.create_run(self._experiment_id, run_name=f"{name} NFE {nfe}", tags=tags)
            runs[str(nfe)] = str(child.info.run_id)
        from mlflow.entities import Param

        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), 90):
            client.log_batch(runs["parent"], params=params[start : start + 90])
        return runs

    def curve(self, nfe: int, metric: str, points: Sequence[tuple[int, float]]) -> None:
        """See `Tracker`."""
        run_id = self._runs.get(str(nfe), "")
        if not run_id:
            return

        def write() -> None:
            from mlflow.entities import Metric

            last = self._points.get((run_id, metric))
            now = int(time.time() * 1000)
            if last is None:
                history = self._client.get_metric_history(run_id, metric)
                last = max((m.step for m in history), default=-1)
            fresh = [Metric(metric, value, now, step) for step, value in points if step > last]
            for start in range(0, len(fresh), _BATCH):
                self._client.log_batch(run_id, metrics=fresh[start : start + _BATCH])
            self._points[run_id, metric] = max([last, *(step for step, _ in points)])

        self._send(write)

    def numbers(self, nfe: int | None, values: Mapping[str, float]) -> None:
        """See `Tracker`."""

        def write() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [Metric(name, float(value), now, 0) for name, value in values.items()]
            if metrics:
                self._client.log_batch(self._id(nfe), metrics=metrics)

        self._send(write)

    def file(self, nfe: int | None, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        self._send(lambda: self._client.log_artifact(self._id(nfe), str(path), folder or None))

    def close(self, status: str) -> None:
        """See `Tracker`; waits until everything is written, or the server does not answer."""
        for run_id in self._runs.values():
            self._send(partial(self._client.set_terminated, run_id, status=status))
        self._thread.shutdown(wait=True)
        if self._waiting:
            self._say(
                f"MLflow at {self.uri}: {len(self._waiting)} reports are not written: --resume "
                "the search to write them"
            )

    def _send(self, report: Callable[[], None]) -> None:
        """Write a report from the background, after those that wait."""
        self._thread.submit(self._write, report)

    def _write(self, report: Callable[[], None]) -> None:
        self._waiting.append(report)
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
            self._away = False
        except Exception as error:  # whatever a client of a service may raise
            if not self._away:
                line = " ".join(str(error).split())[:200]
                self._say(f"MLflow at {self.uri} does not answer ({line}): tried again later")
            self._away = True

    def _id(self, nfe: int | None) -> str:
        return self._runs["parent" if nfe is None else str(nfe)]
