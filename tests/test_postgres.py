"""A storage that others share, on a real server that dies in the middle and comes back."""

import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path

import optuna
import pytest
import torch

from fewstep.experiments.benchmarks.killed import table
from fewstep.space.noise import VPLinear
from tests.clusters import free_ports
from tests.studies import MODEL, command, fewstep, trial_table, write_study

pytestmark = pytest.mark.slow

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_SETTINGS = ("-q", "--set", "budget.candidates=120", "--set", "search.strategy=random")
_GATE = """

_plain = Mixture.__call__


def _call(self, x, t, *, cond=None, guidance=None):
    \"\"\"Wait at the time that the file `gate` names until the file is gone.\"\"\"
    while os.path.exists("gate") and abs(float(t[0]) - float(open("gate").read())) < 1e-9:
        open("here", "w").close()
        time.sleep(0.05)
    return _plain(self, x, t, cond=cond, guidance=guidance)


Mixture.__call__ = _call
"""


@pytest.fixture
def server(tmp_path):
    """(what starts it, what kills it, its URL)."""
    pytest.importorskip("psycopg", reason="needs fewstep[postgres]")
    found = shutil.which("initdb") or (_BINARIES and str(_BINARIES[-1] / "initdb"))
    if not found:
        pytest.skip("no PostgreSQL server is installed")
    base = Path(found).parent
    user: list[str] = []
    home = Path(f"/tmp/pg{os.getpid()}")
    home.mkdir()
    if os.geteuid() == 0:  # a server does not run as root
        try:
            shutil.chown(home, "postgres")
            user = ["runuser", "-u", pwd.getpwnam("postgres").pw_name, "--"]
        except (KeyError, LookupError):
            home.rmdir()
            pytest.skip("root, and no user postgres")
    (port,) = free_ports(1)

    def run(program, *words):
        told = [*user, str(base / program), *words]
        done = subprocess.run(told, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr

    def start():
        run("pg_ctl", "-D", "data", "-o", f"-p {port} -k {home}", "-l", "log", "-w", "start")

    def die():
        run("pg_ctl", "-D", "data", "-m", "immediate", "stop")

    run("initdb", "-D", "data", "-A", "trust", "-U", "fewstep")
    start()
    try:
        yield start, die, f"postgresql://fewstep@127.0.0.1:{port}/postgres"
    finally:
        die()
        shutil.rmtree(home)


def test_a_search_stops_when_its_database_dies_and_goes_on_when_it_is_back(tmp_path, server):
    start, die, url = server
    study = write_study(tmp_path)
    (tmp_path / "tiny_model.py").write_text(MODEL + _GATE)
    plain = fewstep("search", str(study), "--out", "plain", *_SETTINGS, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    gate, here = tmp_path / "gate", tmp_path / "here"
    gate.write_text(repr(_second_time(trial_table(tmp_path / "plain")[-1])))
    words = ["search", str(study), "--out", "out", *_SETTINGS, "--set", f"search.storage={url}"]
    process = subprocess.Popen(command(*words), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit and not here.exists():
        time.sleep(0.05)
    assert 100 < len(_told(url)) < 120
    die()
    gate.unlink()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the storage of tiny-nfe03 cannot be written" in said
    assert said.count("\n") == 1
    away = fewstep(*words, "--resume", cwd=tmp_path)
    assert away.returncode == 2
    assert "Connection refused" in away.stderr
    start()
    done = fewstep(*words, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _told(url) == trial_table(tmp_path / "plain")


def _second_time(row):
    """When a trial asks its network for the second time."""
    return float(VPLinear().t_of_lam(torch.tensor(row[3]["lam_1"], dtype=torch.float64)))


def _told(url):
    storage = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        return table(optuna.load_study(study_name="tiny-nfe03", storage=storage))
    except KeyError:
        return []  # not begun
    finally:
        storage.remove_session()
        storage.engine.dispose()
