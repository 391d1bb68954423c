"""The main job as a submitted job: a head on loopback, the wheel by py_modules, another folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.space import load_schedule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "search.nfe=[4]",
    "search.workers=2",
    "budget.candidates=40",
    "search.samples=16",
    "search.race=[]",
    "final.samples=16",
    "final.resamples=200",
    "teacher.nfe=16",
    "refine.rounds=2",
    "refine.samples=16",
    "refine.held=16",
)


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy of the tree, so that no build folder is left in it."""
    base = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "assets", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, base / "source", ignore=ignore)
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run(
        [*command, "--outdir", str(base), str(base / "source")], check=True, capture_output=True
    )
    (built,) = base.glob("fewstep-*.whl")
    return built


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray head on loopback with a job server; (environment, job address)."""
    home = tmp_path_factory.mktemp("home")
    port, dashboard, client, agent = _free_ports(4)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment = kept | {
        "HOME": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    environment.pop("PYTHONPATH", None)
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}"]
    start += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=3"]
    start += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    start += ["--object-store-memory=200000000", f"--temp-dir=/tmp/r{port}", "--block"]
    head = subprocess.Popen(
        start,
        env=environment,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for_jobs(address, ray, environment, home, head)
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, address, ray
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait(30)
        head.stdout.close()
        shutil.rmtree(f"/tmp/r{port}", ignore_errors=True)


def _wait_for_jobs(address, ray, environment, home, head):
    import time

    for _ in range(60):
        assert head.poll() is None, head.stdout.read()
        asked = [ray, "job", "list", "--address", address]
        if subprocess.run(asked, env=environment, cwd=home, capture_output=True).returncode == 0:
            return
        time.sleep(1)
    raise AssertionError("the job server did not answer")


def test_the_digits_study_runs_as_a_submitted_job(tmp_path, wheel, cluster):
    environment, address, ray = cluster
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(ROOT / "experiments" / "studies" / "digits.toml", folder)
    out, database = tmp_path / "out", tmp_path / "ml" / "mlflow.db"
    settings = [*SETTINGS, f"tracking.uri=sqlite:///{database}"]
    runtime = {"working_dir": str(folder), "py_modules": [str(wheel)]}
    submit = [
        ray,
        "job",
        "submit",
        "--address",
        address,
        "--runtime-env-json",
        json.dumps(runtime),
    ]
    code = "python -P -m fewstep.experiments.search_job".split()
    entry = [sys.executable, *code[1:], "digits.toml", "--out", str(out)]
    for setting in settings:
        entry += ["--set", setting]
    done = subprocess.run(
        [*submit, "--", *entry],
        cwd=tmp_path,
        env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (source,) = (line for line in done.stdout.splitlines() if line.startswith("fewstep 0"))
    assert str(ROOT) not in source, "the job ran the checkout, not the wheel it was sent"
    assert load_schedule(out / "schedules" / "nfe04.json").nfe == 4
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["trials"] == 40 + 1  # and the refined one

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("fewstep")
    runs = client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert len(runs) == 2
