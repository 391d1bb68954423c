"""A Ray head with a job server on loopback, as others have it: no package index, no fewstep."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Head:
    """Where a head listens, and the environment that its clients need."""

    jobs: str
    gcs: str
    client: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def plain_environment(home: Path, **extra: str) -> dict[str, str]:
    """What a shell elsewhere has: no Ray, MLflow or Python settings of the test's, no index."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTHON"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    kept |= {"HOME": str(home), "PATH": path, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    kept |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | extra


@contextlib.contextmanager
def head(home: Path, cpus: int = 3, **extra: str) -> Iterator[Head]:
    """Start a head; it is gone, with all its processes, afterwards."""
    port, dashboard, client, agent = free_ports(4)
    environment = plain_environment(home, **extra)
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    start += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={cpus}"]
    start += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    start += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    start += ["--object-store-memory=100000000", f"--temp-dir=/tmp/r{port}"]
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            start, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{dashboard}/api/jobs/", process, home / "head.log")
        yield Head(
            f"http://127.0.0.1:{dashboard}",
            f"127.0.0.1:{port}",
            f"ray://127.0.0.1:{client}",
            environment,
        )
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        shutil.rmtree(f"/tmp/r{port}", ignore_errors=True)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError as answer:  # it wants a token
            answer.close()
            return
        except OSError:
            time.sleep(0.25)
        else:
            return
    raise AssertionError("the job server did not answer")
