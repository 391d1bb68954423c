"""A search on a cluster without machines, whose autoscaler makes them as a cloud's does.

    OMP_NUM_THREADS=1 python -P -m fewstep.experiments.benchmarks.autoscaler

The head has no CPUs. The search asks for one to three workers, Ray's autoscaler sees that they
wait, makes machines for them, and takes the machines back when the search has ended. The provider
is Ray's fake one: its machines are processes here, and it finds its head at port 6379, which must
be free. Printed: what the search says, and how many machines there are, with the seconds since the
head was started.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from fewstep.search import run
from fewstep.search.config import study_from_dict
from fewstep.search.display import Display

PORT, HEAD = 6379, "ray.head.default"  # which the provider takes for granted
MOST = 3
STUDY: dict[str, Any] = {
    "model": {"factory": "fewstep.experiments.benchmarks.scaling:problem", "wait": 0.02},
    "budget": {"candidates": 600},
    "search": {
        "nfe": [5], "strategy": "random", "samples": 16, "block": [1, 16], "lag": 3,
        "generation": 48, "workers": [1, MOST],
    },
    "teacher": {"nfe": 8, "check": 0},
    "final": {"samples": 16, "most": 16, "top": 1, "pictures": 2, "resamples": 100},
    "tracking": {"enabled": False},
}  # fmt: skip


class Stopwatch(Display):
    """Prints what a search says, with the time."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def stage(self, text: str) -> None:
        """See `Display`."""
        print(f"{time.perf_counter() - self._begun:4.0f} s  {text}", flush=True)

    note = stage


@contextlib.contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """The address of a head whose autoscaler makes at most three machines of one CPU."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", PORT))  # raises where another head listens
    parts = ("initialization_", "setup_", "head_setup_", "worker_setup_", "head_start_ray_",
             "worker_start_ray_")  # fmt: skip
    provider = {"type": "fake_multinode", "disable_node_updaters": True}
    provider |= {"disable_launch_config_check": True, "use_node_id_as_ip": True}
    machine = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "fake", "provider": provider, "auth": {}, "docker": {}, "file_mounts": {},
        "cluster_synced_files": [],
        "available_node_types": {HEAD: head, "machine": machine}, "head_node_type": HEAD,
        "max_workers": 2 * MOST, "idle_timeout_minutes": 0.2,
        **{f"{part}commands": list[str]() for part in parts},
    }  # fmt: skip
    file = folder / "cluster.json"
    file.write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={PORT}", "--num-cpus=0", "--disable-usage-stats"]
    started = subprocess.Popen(
        [*command, f"--autoscaling-config={file}"],
        env=os.environ | {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    host = ray.util.get_node_ip_address()
    try:
        for _ in range(60):
            with contextlib.suppress(OSError), socket.create_connection((host, PORT), 1):
                break
            time.sleep(1)
        yield f"{host}:{PORT}"
    finally:
        started.terminate()
        started.wait()


def main() -> None:
    """Run the search, and watch the machines go."""
    clock = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, autoscaling_cluster(Path(folder)) as address:
        clock.stage("the head is there, without machines")
        run.search(study_from_dict(STUDY), Path(folder) / "out", address=address, display=clock)
        ray.shutdown()
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        for _ in range(6):
            machines = sum(node["Alive"] for node in ray.nodes()) - 1
            clock.stage(f"{machines} machine{'s' * (machines != 1)}")
            time.sleep(8)
        ray.shutdown()


if __name__ == "__main__":
    main()
