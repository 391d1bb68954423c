"""MLflow: one parent run per search, one child run per NFE.

Nothing is sent anywhere but to the tracking URI. Metrics go in batches; a resumed search continues
its runs. The module is the only one that imports MLflow, and only when tracking is on.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fewstep.space.errors import StudyError

DEFAULT_URI = "sqlite:///runs/mlflow.db"
_BATCH = 900


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends.

    Raised inside a database's transaction they leave it open, and whoever writes next, such as the
    end of the runs, finds the database locked. A second signal does not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    held: list[int] = []
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def hold(number: int, frame: FrameType | None) -> None:
        handler = handlers[signal.Signals(number)]
        if held and callable(handler):
            handler(number, frame)
        held.append(number)

    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


class Tracker(Protocol):
    """Where a search reports."""

    def open(
        self, name: str, settings: Mapping[str, Any], runs: Mapping[str, str]
    ) -> dict[str, str]:
        """Start, or continue, the runs: {"parent": id, "5": id, ...}."""
        ...

    def child(self, nfe: int) -> str:
        """The run id of an NFE, "" if nothing is tracked."""
        ...

    def curve(self, nfe: int, metric: str, points: Sequence[tuple[int, float]]) -> None:
        """Add (trial, value) points of a metric; points already there are skipped."""
        ...

    def numbers(self, nfe: int | None, values: Mapping[str, float]) -> None:
        """Final numbers of an NFE, or of the whole search."""
        ...

    def file(self, nfe: int | None, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact."""
        ...

    def close(self, status: str) -> None:
        """End the runs: FINISHED, FAILED or KILLED."""
        ...


class NoTracker:
    """Reports nowhere."""

    def open(
        self, name: str, settings: Mapping[str, Any], runs: Mapping[str, str]
    ) -> dict[str, str]:
        """See `Tracker`."""
        return {}

    def child(self, nfe: int) -> str:
        """See `Tracker`."""
        return ""

    def curve(self, nfe: int, metric: str, points: Sequence[tuple[int, float]]) -> None:
        """See `Tracker`."""

    def numbers(self, nfe: int | None, values: Mapping[str, float]) -> None:
        """See `Tracker`."""

    def file(self, nfe: int | None, path: Path, folder: str = "") -> None:
        """See `Tracker`."""

    def close(self, status: str) -> None:
        """See `Tracker`."""


class MlflowTracker:
    """Reports to MLflow; Ctrl-C and SIGTERM wait until a report is written.

    Args:
        uri: tracking URI; None is MLFLOW_TRACKING_URI, or else `DEFAULT_URI`.
        experiment: name of the experiment.
        nfes: the NFEs that get a child run.
    """

    def __init__(self, uri: str | None, experiment: str, nfes: Sequence[int]) -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        self._experiment, self._nfes = experiment, nfes
        self._runs: dict[str, str] = {}
        self._points: dict[tuple[str, str], int] = {}
        self._client: Any = None

    def open(
        self, name: str, settings: Mapping[str, Any], runs: Mapping[str, str]
    ) -> dict[str, str]:
        """See `Tracker`."""
        client = self._connect()
        known = dict(runs)
        if known:
            try:
                for run_id in known.values():
                    client.update_run(run_id, status="RUNNING")
            except Exception:
                known = {}  # another store than the search began with: new runs there
        if not known:
            known = self._start(client, name, settings)
        self._runs = known
        return known

    def _connect(self) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
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

    def child(self, nfe: int) -> str:
        """See `Tracker`."""
        return self._runs.get(str(nfe), "")

    def curve(self, nfe: int, metric: str, points: Sequence[tuple[int, float]]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        run_id = self.child(nfe)
        if not run_id:
            return
        last = self._points.get((run_id, metric))
        now = int(time.time() * 1000)
        with uninterrupted():
            if last is None:
                history = self._client.get_metric_history(run_id, metric)
                last = max((m.step for m in history), default=-1)
            fresh = [Metric(metric, value, now, step) for step, value in points if step > last]
            for start in range(0, len(fresh), _BATCH):
                self._client.log_batch(run_id, metrics=fresh[start : start + _BATCH])
        self._points[run_id, metric] = max(last, max((step for step, _ in points), default=last))

    def numbers(self, nfe: int | None, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, 0) for name, value in values.items()]
        if metrics:
            with uninterrupted():
                self._client.log_batch(self._id(nfe), metrics=metrics)

    def file(self, nfe: int | None, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        with uninterrupted():
            self._client.log_artifact(self._id(nfe), str(path), folder or None)

    def close(self, status: str) -> None:
        """See `Tracker`."""
        with uninterrupted():
            for run_id in self._runs.values():
                self._client.set_terminated(run_id, status=status)

    def _id(self, nfe: int | None) -> str:
        return self._runs["parent" if nfe is None else str(nfe)]
