"""Searches on a cluster that lacks fewstep and reaches no index, sent from somewhere else."""

import json
import os
import subprocess
import sys
import time

import pytest

from fewstep.space import load_schedule
from tests.clusters import free_ports, head
from tests.studies import STUDY, refused, trial_table, write_study

pytestmark = pytest.mark.slow

SMALL = """
[model]
pipeline = "pipe"
[budget]
candidates = 6
[search]
nfe = [3]
strategy = "random"
samples = 4
block = [2, 4]
workers = 2
[teacher]
nfe = 6
check = 0
[final]
samples = 4
most = 4
top = 1
pictures = 2
resamples = 100
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with head(tmp_path_factory.mktemp("home")) as started:
        yield started


def _fewstep(*words, cwd, env, **options):
    command = [sys.executable, "-P", "-m", "fewstep.experiments", *map(str, words)]
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run(command, cwd=cwd, env=env, check=False, **options)


def _own(env):
    """The submitting machine's environment: it has fewstep, the cluster need not."""
    return env | {k: os.environ[k] for k in ("PYTHONPATH",) if k in os.environ}


def _digest(out):
    return load_schedule(out / "schedules" / "nfe03.json").digest


def test_a_study_with_its_own_module_is_sent_and_gives_the_schedules_of_this_machine(
    tmp_path, cluster
):
    study = write_study(tmp_path / "home", STUDY.replace("enabled = false", ""))
    (tmp_path / "home" / "far.txt").write_text("1")
    out, env = tmp_path / "shared" / "out", _own(cluster.environment)
    words = ("submit", study, "--address", cluster.jobs, "--out", out)
    few = ("--set", "budget.candidates=40")
    done = _fewstep(*words, *few, "--set", "search.workers=2", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (source,) = (line for line in done.stdout.splitlines() if line.startswith("fewstep 0"))
    assert "working_dir" in source, "the job ran another fewstep than the one sent"
    assert f"results {out}, trials {out}/study.journal, MLflow sqlite:///{out.parent}" in (
        done.stdout
    )
    assert "scores may differ" not in done.stdout
    here = _fewstep("search", study, "--out", tmp_path / "here", *few, cwd=tmp_path, env=env)
    assert here.returncode == 0, here.stderr
    assert trial_table(out) == trial_table(tmp_path / "here")
    assert _digest(out) == _digest(tmp_path / "here")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("fewstep")
    runs = client.search_runs([experiment.experiment_id])
    assert [r.info.status for r in runs] == ["FINISHED", "FINISHED"]
    assert {r.data.tags["mlflow.source.type"] for r in runs} == {"JOB"}
    assert all(r.data.params["search.samples"] == "8" for r in runs)


def test_a_study_of_a_pipeline_is_sent_with_its_folder(tmp_path, cluster):
    pytest.importorskip("diffusers")
    from tests.tiny_pipelines import build

    build("ddpm")[0].save_pretrained(tmp_path / "home" / "pipe")
    study = tmp_path / "home" / "study.toml"
    study.write_text(SMALL)
    env, out = _own(cluster.environment), tmp_path / "out"
    words = ("submit", study, "--address", cluster.jobs, "--out", out)
    done = _fewstep(*words, cwd="/", env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    words = ("search", study, "--out", tmp_path / "here", "--set", "search.workers=0")
    here = _fewstep(*words, cwd=tmp_path, env=env)
    assert here.returncode == 0, here.stderr
    assert _digest(out) == _digest(tmp_path / "here")


def test_a_job_is_stopped_and_gone_on_with_by_its_studys_name(tmp_path, cluster):
    text = STUDY.replace("candidates = 104", "seconds = 600")
    study = write_study(tmp_path / "home", text)
    env, out, at = _own(cluster.environment), tmp_path / "out", ("--address", cluster.jobs)
    sent = _fewstep("submit", study, *at, "--out", out, "--no-wait", cwd=tmp_path, env=env)
    assert sent.returncode == 0, sent.stderr
    twice = _fewstep("submit", study, *at, "--out", out, "--no-wait", cwd=tmp_path, env=env)
    assert "a job of the study tiny is running" in twice.stderr
    journal, limit = out / "study.journal", time.monotonic() + 120
    while time.monotonic() < limit:
        if journal.exists() and journal.read_bytes().count(b'"generation":1') > 3:
            break
        time.sleep(0.2)
    stopped = _fewstep("submit", "tiny", *at, "--stop", cwd=tmp_path, env=env)
    assert "tiny-" in stopped.stdout, stopped.stderr
    log = _fewstep("submit", "tiny", *at, "--follow", cwd=tmp_path, env=env)
    assert "terminated; a search goes on with --resume" in log.stdout
    told = len(trial_table(out))
    more = ("--resume", "--set", f"budget.candidates={told + 5}")
    done = _fewstep("submit", "tiny", *at, *more, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(trial_table(out)) == told + 5
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["trials"] == told + 5


def test_a_search_here_on_workers_there_sends_them_what_they_need(tmp_path, cluster):
    study = write_study(tmp_path / "home")
    env = _own(cluster.environment)
    words = ("search", study, "--set", "budget.candidates=20", "--out")
    words_there = (*words, tmp_path / "there", "--address", cluster.client)
    done = _fewstep(*words_there, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    here = _fewstep(*words, tmp_path / "here", cwd=tmp_path, env=env)
    assert here.returncode == 0, here.stderr
    assert trial_table(tmp_path / "there") == trial_table(tmp_path / "here")


def test_a_head_with_a_token_lets_in_who_has_it(tmp_path):
    study, home = write_study(tmp_path / "study"), tmp_path / "home"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("5" * 64)
    few = ("--set", "budget.candidates=20", "--set", "search.workers=1")
    with head(home, RAY_AUTH_MODE="token") as made:
        env = _own(made.environment)
        del env["RAY_AUTH_MODE"]  # as most have it
        words = ("submit", study, *few, "--address", made.jobs, "--out", tmp_path / "out")
        done = _fewstep(*words, cwd=tmp_path, env=env)
        words = ("search", study, *few, "--address", made.client, "--out", tmp_path / "here")
        here = _fewstep(*words, cwd=tmp_path, env=env)
        token.unlink()
        without = _fewstep("submit", "tiny", "--address", made.jobs, "--stop", cwd="/", env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert here.returncode == 0, here.stderr
    assert trial_table(tmp_path / "out") == trial_table(tmp_path / "here")
    assert without.stderr.startswith(f"fewstep: error: --address {made.jobs}: Authentication")


def test_wrong_addresses_are_a_line_within_seconds_and_leave_nothing(tmp_path, cluster, capsys):
    study, (nobody,) = write_study(tmp_path / "home"), free_ports(1)
    wrong = {
        cluster.jobs: "is that of a dashboard, which takes jobs",
        cluster.jobs.removeprefix("http://"): "is that of a dashboard, which takes jobs",
        f"127.0.0.1:{nobody}": "no Ray cluster answers there",
        f"ray://127.0.0.1:{nobody}": "no Ray cluster answers there",
        "head": "write auto, host:port or ray://host:port",
    }
    for address, line in wrong.items():
        begun, out = time.monotonic(), tmp_path / "out"
        assert line in refused(capsys, "search", study, "--out", out, "--address", address)
        assert time.monotonic() - begun < 15
        assert not out.exists()
    words = {
        ("--address", f"http://127.0.0.1:{nobody}"): "no dashboard answers there",
        ("--address", cluster.gcs): "jobs go to the cluster's dashboard",
        ("--address", cluster.jobs): "--out is missing",
        ("--address", cluster.jobs, "--out", "runs/a"): "--out runs/a: a job's own folder",
        ("--address", cluster.jobs, "--out", "/r", "--set", "tracking.uri=sqlite:///a.db"): (
            "tracking.uri = 'sqlite:///a.db' is relative"
        ),
    }
    for options, line in words.items():
        assert line in refused(capsys, "submit", study, *options)
