"""A storage that others share, on a real server that dies in the middle and comes back."""

import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path

import optuna
import pytest

from fewstep.experiments.benchmarks.killed import table
from tests.clusters import free_ports
from tests.studies import command, fewstep, trial_table, write_study

pytestmark = pytest.mark.slow

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_SETTINGS = ("-q", "--set", "budget.candidates=30")


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
    plain = fewstep("search", str(study), "--out", "plain", *_SETTINGS, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    words = ["search", str(study), "--out", "out", *_SETTINGS, "--set", f"search.storage={url}"]
    process = subprocess.Popen(command(*words), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if len(_told(url)) > 4:
            break
        time.sleep(0.2)
    die()
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


def _told(url):
    storage = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        return table(optuna.load_study(study_name="tiny-nfe03", storage=storage))
    except KeyError:
        return []  # not begun
    finally:
        storage.remove_session()
        storage.engine.dispose()
