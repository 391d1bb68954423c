"""Where blocks run: in this process, or on Ray actors that each hold the model.

Tasks go to whichever worker is idle; results carry their ticket, and the driver puts them back in
order, so the number of workers cannot change a result. A worker that dies is replaced and its
block tried again elsewhere; a block that keeps killing workers, or hangs, is cut into single
candidates so that only the guilty one is given up, as a status.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.search.evaluate import Evaluator, EvaluatorSpec, TaskResult
from fewstep.search.problem import leave_checkout
from fewstep.space.errors import FewstepError, StudyError


class Work(Protocol):
    """What a pool runs: a block of candidates, or one schedule to refine."""

    @property
    def strict(self) -> bool:
        """A failure stops the search."""
        ...

    @property
    def candidates(self) -> int:
        """Candidates in it."""
        ...

    @property
    def start(self) -> int:
        """First sample."""
        ...

    @property
    def stop(self) -> int:
        """One past the last sample."""
        ...

    def only(self, index: int) -> Work:
        """The part of one candidate."""
        ...

    def execute(self, evaluator: Evaluator) -> TaskResult:
        """Do it."""
        ...


class Pool(Protocol):
    """Takes tasks and gives results back in any order, under the ticket that `submit` returned."""

    workers: int

    def share(self, stream: str, reference: Tensor) -> None:
        """Give every worker, present and future, the teacher's end points of a stream."""
        ...

    def submit(self, task: Work) -> int:
        """Queue a task; returns its ticket."""
        ...

    def collect(self) -> tuple[int, TaskResult]:
        """Wait for the next finished task."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class SerialPool:
    """Runs tasks in this process, one thread, in the order submitted."""

    workers = 0

    def __init__(self, spec: EvaluatorSpec, evaluator: Evaluator | None = None) -> None:
        self._evaluator = evaluator or Evaluator.from_spec(spec)
        self._queue: deque[tuple[int, Work]] = deque()
        self._tickets = 0

    def share(self, stream: str, reference: Tensor) -> None:
        """See `Pool`."""
        self._evaluator.share(stream, reference)

    def submit(self, task: Work) -> int:
        """See `Pool`."""
        self._tickets += 1
        self._queue.append((self._tickets, task))
        return self._tickets

    def collect(self) -> tuple[int, TaskResult]:
        """See `Pool`."""
        ticket, task = self._queue.popleft()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return ticket, task.execute(self._evaluator)
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        """See `Pool`."""
        self._queue.clear()


class Worker:
    """The body of an actor: an evaluator, one thread, the driver's shared tensors."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        leave_checkout()
        self._evaluator: Evaluator | None = None

    def setup(self, spec: EvaluatorSpec) -> int:
        """Load the model; returns the process id."""
        self._evaluator = Evaluator.from_spec(spec)
        return os.getpid()

    def share(self, stream: str, reference: np.ndarray) -> None:
        """Keep the teacher's end points of a stream."""
        self._ready().share(stream, torch.from_numpy(np.array(reference)))

    def run(self, task: Work) -> TaskResult:
        """Run a block."""
        return task.execute(self._ready())

    def _ready(self) -> Evaluator:
        if self._evaluator is None:
            raise StudyError("a worker was used before its model was loaded")
        return self._evaluator


@dataclass
class _Job:
    ticket: int
    task: Work
    attempts: int = 0
    parent: _Split | None = None
    position: int = 0


@dataclass
class _Split:
    """A block cut into single candidates, waiting for all of them."""

    ticket: int
    results: dict[int, TaskResult] = field(default_factory=dict)

    def merged(self) -> TaskResult:
        parts = [self.results[m] for m in sorted(self.results)]
        shape = next((p.values.shape for p in parts if p.status[0] == "ok"), parts[0].values.shape)
        values = [p.values if p.values.shape == shape else np.full(shape, np.nan) for p in parts]
        return TaskResult(
            np.concatenate(values),
            tuple(p.status[0] for p in parts),
            tuple(p.message[0] for p in parts),
            sum(p.evaluations for p in parts),
            sum(p.seconds for p in parts),
        )


class RayPool:
    """Evaluator actors on a Ray cluster, or on one started here for this run.

    Args:
        spec: what each worker evaluates.
        workers: number of actors; None is one per CPU.
        address: cluster to join ("auto", "host:port", "ray://..."); None joins RAY_ADDRESS or
            starts one on loopback.
        timeout: seconds after which a block counts as hung; None never.
        retries: attempts after the first for a block whose worker died.
        gpus: GPUs per worker.
    """

    def __init__(
        self,
        spec: EvaluatorSpec,
        *,
        workers: int | None = None,
        address: str | None = None,
        timeout: float | None = None,
        retries: int = 2,
        gpus: float = 0,
    ) -> None:
        self._spec, self._timeout, self._retries = spec, timeout, retries
        self._staged: str | None = None
        self._ray, self._owned = _connect(spec, workers, address, self)
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        self.workers = workers or max(1, cpus)
        if self.workers > cpus:
            self.close()
            raise StudyError(
                f"search.workers = {self.workers} but the cluster has {cpus} CPUs: ask for at "
                f"most {cpus}"
            )
        self._shared: dict[str, Any] = {}
        self._queue: deque[_Job] = deque()
        self._flying: dict[Any, tuple[_Job, Any, float]] = {}
        self._done: deque[tuple[int, TaskResult]] = deque()
        self._tickets = 0
        self._actor = self._ray.remote(max_restarts=0, num_cpus=1, num_gpus=gpus)(Worker)
        try:
            self._idle = self._start(self.workers)
        except BaseException:
            self.close()
            raise

    def share(self, stream: str, reference: Tensor) -> None:
        """See `Pool`."""
        self._shared[stream] = self._ray.put(reference.cpu().numpy())
        actors = [*self._idle, *(actor for _, actor, _ in self._flying.values())]
        for actor in actors:  # an actor runs its calls in order, so a task sent later finds it
            actor.share.remote(stream, self._shared[stream])

    def submit(self, task: Work) -> int:
        """See `Pool`."""
        self._tickets += 1
        self._queue.append(_Job(self._tickets, task))
        self._feed()
        return self._tickets

    def collect(self) -> tuple[int, TaskResult]:
        """See `Pool`."""
        while not self._done:
            self._feed()
            patience = 1.0 if self._timeout is None else min(1.0, self._timeout)
            ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=patience)
            for ref in ready:
                self._land(ref)
            self._expire()
        self._feed()
        return self._done.popleft()

    def close(self) -> None:
        """See `Pool`."""
        if self._owned:
            self._ray.shutdown()
        else:
            actors = [
                *getattr(self, "_idle", []),
                *(a for _, a, _ in getattr(self, "_flying", {}).values()),
            ]
            for actor in actors:
                with contextlib.suppress(Exception):
                    self._ray.kill(actor)
        if self._staged:
            shutil.rmtree(self._staged, ignore_errors=True)

    def _start(self, count: int) -> list[Any]:
        actors = [self._actor.remote() for _ in range(count)]
        try:
            self._ray.get([actor.setup.remote(self._spec) for actor in actors])
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise StudyError(
                f"a worker could not load the model: {' '.join(str(cause).split())}"
            ) from error
        except self._ray.exceptions.RayError as error:
            raise StudyError(f"a worker could not start: {str(error).splitlines()[0]}") from error
        for actor in actors:
            for stream, ref in self._shared.items():
                actor.share.remote(stream, ref)
        return actors

    def _feed(self) -> None:
        while self._queue and self._idle:
            job, actor = self._queue.popleft(), self._idle.pop()
            self._flying[actor.run.remote(job.task)] = (job, actor, time.monotonic())

    def _land(self, ref: Any) -> None:
        job, actor, _ = self._flying.pop(ref)
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            if job.task.strict:
                cause = (
                    error.cause
                    if isinstance(error.cause, FewstepError)
                    else StudyError(str(error))
                )
                raise cause from None
            self._give_up(job, "error", " ".join(str(error.cause or error).split())[:300])
        except self._ray.exceptions.RayError as error:
            memory = (
                isinstance(error, self._ray.exceptions.OutOfMemoryError)
                or "memory" in str(error).lower()
            )
            self._replace(actor)
            job.attempts += 1
            if job.attempts <= self._retries:
                self._queue.appendleft(job)
            else:
                self._give_up(job, "oom" if memory else "error", "its worker died")
        else:
            self._idle.append(actor)
            self._finish(job, result)

    def _expire(self) -> None:
        if self._timeout is None:
            return
        now = time.monotonic()
        for ref, (job, actor, begun) in list(self._flying.items()):
            if now - begun > self._timeout:
                del self._flying[ref]
                self._replace(actor)
                self._give_up(job, "timeout", f"took longer than {self._timeout:g} s")

    def _replace(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor)
        self._idle.extend(self._start(1))

    def _give_up(self, job: _Job, status: str, message: str) -> None:
        if job.task.strict:
            raise StudyError(f"the teacher could not be computed: {message}")
        if job.task.candidates > 1:
            split = _Split(job.ticket)
            for m in reversed(range(job.task.candidates)):
                self._queue.appendleft(
                    _Job(job.ticket, job.task.only(m), parent=split, position=m)
                )
            return
        nothing = np.full((1, job.task.stop - job.task.start, 1), np.nan)
        self._finish(job, TaskResult(nothing, (status,), (message,), 0, 0.0))

    def _finish(self, job: _Job, result: TaskResult) -> None:
        if job.parent is None:
            self._done.append((job.ticket, result))
            return
        job.parent.results[job.position] = result
        waiting = any(j.parent is job.parent for j in self._queue)
        waiting = waiting or any(j.parent is job.parent for j, _, _ in self._flying.values())
        if not waiting:
            self._done.append((job.ticket, job.parent.merged()))


def cpus() -> int:
    """CPU cores this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}


def start_local(workers: int) -> None:
    """Start Ray on this machine, for this process alone and without its dashboard."""
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        _node_ip_address="127.0.0.1",
        **_QUIET,
    )


def _connect(
    spec: EvaluatorSpec, workers: int | None, address: str | None, pool: RayPool
) -> tuple[Any, bool]:
    """Ray, connected, and whether the cluster was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        import ray
    except ImportError:
        raise StudyError(
            "searching on workers needs Ray: pip install 'fewstep[search]', or set search.workers "
            "= 0"
        ) from None
    if ray.is_initialized():
        return ray, False
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        start_local(max(workers or 0, cpus()))
        return ray, True
    environment = _runtime_env(spec, pool) if address.startswith("ray://") else {}
    try:
        ray.init(address=address, runtime_env=environment or None, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StudyError(
            f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})"
        ) from None
    return ray, True


def _runtime_env(spec: EvaluatorSpec, pool: RayPool) -> dict[str, Any]:
    """What a remote cluster needs: the factory's module, nothing else of the study's folder."""
    top = spec.model.factory.split(":")[0].split(".")[0]
    folder = Path(spec.model.folder)
    module = folder / f"{top}.py"
    package = folder / top
    if not spec.model.folder or not (module.is_file() or package.is_dir()):
        return {}
    pool._staged = tempfile.mkdtemp(prefix="fewstep-")
    if module.is_file():
        shutil.copy(module, pool._staged)
    else:
        shutil.copytree(package, Path(pool._staged) / top)
    return {"working_dir": pool._staged}


def make_pool(
    spec: EvaluatorSpec,
    *,
    workers: int | None,
    address: str | None = None,
    timeout: float | None = None,
    retries: int = 2,
    gpus: float = 0,
    evaluator: Evaluator | None = None,
) -> Pool:
    """The pool a study asks for: `workers = 0` runs here; anything else on Ray."""
    if workers == 0 and address is None:
        return SerialPool(spec, evaluator)
    return RayPool(
        spec, workers=workers or None, address=address, timeout=timeout, retries=retries, gpus=gpus
    )
