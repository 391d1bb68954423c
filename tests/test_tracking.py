"""MLflow: what it is told, and that a server that goes away costs nothing but its reports."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fewstep.experiments.cli.page import Paged
from fewstep.experiments.cli.reporting import send_kept
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.search.tracking import MlflowTracker
from fewstep.space import StudyError, load_schedule
from tests.clusters import free_ports
from tests.studies import STUDY, command, environment, write_study


def _search(folder, out, *overrides, **options):
    config = load_study(write_study(folder), overrides)
    return run.search(config, out, **({"display": Paged()} | options))


def test_mlflow_holds_the_runs_and_a_resumed_search_continues_them(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/ml/mlflow.db"
    settings = ("tracking.enabled=true", f"tracking.uri={uri}")
    out = tmp_path / "out"
    _search(tmp_path, out, *settings)
    _search(tmp_path, out, *settings, resume=True)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fewstep")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    (child,) = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert all(r.info.status == "FINISHED" for r in runs)
    assert child.data.tags["fewstep.nfe"] == "3"
    curve = client.get_metric_history(child.info.run_id, "best_endpoint_mse")
    assert [m.step for m in curve] == sorted({m.step for m in curve})
    assert parents[0].info.artifact_uri.startswith("mlflow-artifacts:/fewstep/")
    schedule = load_schedule(out / "schedules" / "nfe03.json")
    assert schedule.provenance["mlflow_run"] == child.info.run_id
    (port,), moved = free_ports(1), tmp_path / "elsewhere"
    (tmp_path / "ml").rename(moved)
    with _server(moved, port, "ui"):  # MLflow's defaults, in the folder
        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        names = {f.path for f in client.list_artifacts(parents[0].info.run_id)}
        page = f"http://127.0.0.1:{port}/get-artifact?path=results.json&run_uuid="
        kept = urllib.request.urlopen(page + parents[0].info.run_id, timeout=20).read()
    assert names >= {"results.json", "curves.png", "report.html", "schedules"}
    assert kept == (out / "results.json").read_bytes()


def test_a_terminated_search_ends_its_mlflow_runs(tmp_path):
    """`ray job stop` and cluster managers send SIGTERM."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    text = STUDY.replace("candidates = 104", "seconds = 600")
    study = write_study(tmp_path, text.replace("enabled = false", f'uri = "{uri}"'))
    process = subprocess.Popen(
        command("search", str(study), "--out", "out", "-q"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log, limit = tmp_path / "out" / "study.journal", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and b'"generation":1' in log.read_bytes():
            break
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "terminated; a search goes on with --resume" in err
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fewstep")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}


def _tracker(folder, database="mlflow.db", say=lambda line: None, uri=None):
    begin = {"search": "s1", "name": "study", "experiment": "fewstep", "nfes": [5]}
    begin |= {"params": {"search.samples": "8"}, "tags": {}, "time": 0}
    return MlflowTracker(uri or f"sqlite:///{folder}/{database}", begin, folder, say)


def test_an_interrupted_search_writes_what_it_has_reported(tmp_path):
    """Reports are written by one thread, which no signal interrupts inside a transaction."""
    tracker = _tracker(tmp_path)
    tracker.open()
    client = tracker._client
    write = client.log_batch

    def slow(run_id, **values):
        time.sleep(0.3)
        write(run_id, **values)

    client.log_batch = slow
    tracker.curve(5, "best", [(0, 1.0)])
    tracker.close("KILLED")  # as the search does when a signal has ended it
    assert [m.value for m in client.get_metric_history(tracker.runs["5"], "best")] == [1.0]
    assert {client.get_run(run).info.status for run in tracker.runs.values()} == {"KILLED"}


def test_a_report_that_cannot_be_written_is_said_once_and_tried_again(tmp_path):
    said = []
    tracker = _tracker(tmp_path, say=said.append)
    tracker.open()
    client = tracker._client
    write, away = client.log_batch, [True, True]

    def sometimes(run_id, **values):
        if away and away.pop():
            raise ConnectionError("not now")
        write(run_id, **values)

    client.log_batch = sometimes
    for step in range(3):
        tracker.curve(5, "best", [(k, 1.0 / (k + 1)) for k in range(step + 1)])
    tracker.close("FINISHED")
    assert [m.step for m in client.get_metric_history(tracker.runs["5"], "best")] == [0, 1, 2]
    assert len(said) == 1
    assert "not now" in said[0]
    assert not (tmp_path / "mlflow.jsonl").exists()


def test_a_resumed_search_finds_its_runs_and_starts_new_ones_only_where_they_are_not(tmp_path):
    first = _tracker(tmp_path)
    first.open()
    first.close("KILLED")
    other, again = _tracker(tmp_path, "b.db"), _tracker(tmp_path)
    other.open()
    again.open()
    assert other.runs != first.runs
    assert again.runs == first.runs
    for tracker in (other, again):
        tracker.close("FINISHED")
    found = again._client.search_runs([again._find_experiment()])
    assert {run.info.status for run in found} == {"FINISHED"}
    assert [run.data.params["search.samples"] for run in found] == ["8", "8"]


class _Mute(BaseHTTPRequestHandler):
    """A server that takes what it is sent and never answers."""

    def do_GET(self):
        time.sleep(20)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("kind", ["absent", "mute"])
def test_a_server_that_does_not_answer_costs_seconds_and_its_reports_are_sent_later(
    tmp_path, kind
):
    (port,) = free_ports(1)
    server = ThreadingHTTPServer(("127.0.0.1", port), _Mute) if kind == "mute" else None
    if server is not None:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    said, begun = [], time.monotonic()
    tracker = _tracker(tmp_path, uri=f"http://127.0.0.1:{port}", say=said.append)
    tracker.open()
    for step in range(20):
        tracker.curve(5, "best", [(k, 1.0) for k in range(step + 1)])
    tracker.numbers(None, {"ratio": 0.5})
    tracker.close("FINISHED")
    assert time.monotonic() - begun < 20
    if server is not None:
        server.shutdown()
        server.server_close()
    assert len(said) == 2
    assert "does not answer" in said[0]
    assert f"fewstep report {tmp_path} --log" in said[1]
    with pytest.raises(StudyError, match="try again later"):
        send_kept(tmp_path, said.append)
    spool = tmp_path / "mlflow.jsonl"
    there = spool.read_text().replace(
        f"http://127.0.0.1:{port}", f"sqlite:///{tmp_path}/mlflow.db"
    )
    spool.write_text(there)  # as if the server were back
    assert send_kept(tmp_path, said.append) == 22
    assert not spool.exists()
    assert send_kept(tmp_path, said.append) == 0
    again = _tracker(tmp_path)
    again.open()
    history = again._client.get_metric_history(again.runs["5"], "best")
    assert [m.step for m in history] == list(range(20))
    parent = again._client.get_run(again.runs["parent"])
    again.close("FINISHED")
    assert parent.data.metrics == {"ratio": 0.5}
    assert json.loads(json.dumps(parent.data.params)) == {"search.samples": "8"}


@pytest.mark.parametrize("uri", ["ftp://nowhere", "sqlite:////proc/no/such.db"])
def test_a_uri_that_cannot_be_used_is_refused_before_anything_runs(tmp_path, uri):
    with pytest.raises(StudyError, match=r"tracking\.uri"):
        _search(tmp_path, tmp_path / "out", "tracking.enabled=true", f"tracking.uri={uri}")
    assert not list((tmp_path / "out").glob("study.*"))
    assert _search(tmp_path, tmp_path / "out").rows  # the corrected command


@contextlib.contextmanager
def _server(folder, port, command="server"):
    words = [sys.executable, "-m", "mlflow", command, "--workers", "1", "--port", str(port)]
    if command == "server":
        words += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
        words += ["--artifacts-destination", str(folder / "kept")]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, process_group=0)
    try:
        limit = time.monotonic() + 120
        while time.monotonic() < limit and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield lambda number: os.killpg(process.pid, number)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.mark.slow
def test_a_server_that_stands_still_and_comes_back_has_every_report(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.search.tracking._AGAIN", 0.5)
    (port,), said = free_ports(1), []
    tracker = _tracker(tmp_path, uri=f"http://127.0.0.1:{port}", say=said.append)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    with _server(tmp_path, port) as send:
        tracker.open()
        tracker.curve(5, "best", [(0, 3.0)])
        tracker.file(None, picture)
        tracker._thread.submit(int).result()  # all of it is written
        send(signal.SIGSTOP)
        begun = time.monotonic()
        tracker.curve(5, "best", [(0, 3.0), (1, 2.0)])
        tracker.tag(5, **{"fewstep.digest": "abc"})
        assert time.monotonic() - begun < 1
        tracker._thread.submit(int).result()
        (line,) = said
        assert line.startswith(f"MLflow at {tracker.uri} does not answer (")
        send(signal.SIGCONT)
        time.sleep(0.5)
        tracker.curve(5, "best", [(0, 3.0), (1, 2.0), (2, 1.0)])
        tracker.close("FINISHED")
        client = tracker._client
        history = client.get_metric_history(tracker.runs["5"], "best")
        child, parent = (client.get_run(tracker.runs[key]) for key in ("5", "parent"))
        files = [f.path for f in client.list_artifacts(tracker.runs["parent"])]
        experiment = client.get_experiment_by_name("fewstep")
    assert [(m.step, m.value) for m in history] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert child.data.tags["fewstep.digest"] == "abc"
    assert {child.info.status, parent.info.status} == {"FINISHED"}
    assert files == ["picture.png"]
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert said[1:] == [f"MLflow at {tracker.uri} answers again"]
