"""Where work runs: in this process, or on Ray actors that each hold the model.

`map(works)` sends all of them out at once and yields their results in the order given, so the
number of workers cannot change a result; several maps may be open at a time. Ray restarts an actor
that dies and tries its work again; work that keeps killing its worker, or hangs, is divided into
its parts, so that only the guilty one is given up (`Work.failed`). An exception that work raises
is raised here. Actors need not fit on the cluster at once: they wait to be placed, as an
autoscaling cluster grows, and work goes to those that are there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.search.problem import leave_checkout
from fewstep.search.work import Evaluator, EvaluatorSpec, Work
from fewstep.space.errors import FewstepError, StudyError


class SerialPool:
    """Does work in this process, on one thread, when its result is asked for."""

    workers = 0

    def __init__(self, spec: EvaluatorSpec, evaluator: Evaluator | None = None) -> None:
        self._evaluator = evaluator or Evaluator.from_spec(spec)

    def share(self, stream: str, reference: Tensor) -> None:
        """Give every worker, present and future, the teacher's end points of a stream."""
        self._evaluator.share(stream, reference)

    def map(self, works: Iterable[Work]) -> Iterator[Any]:
        """Send works out at once; their results, in order, as they are asked for."""
        for work in list(works):
            with one_thread():
                result = work.run(self._evaluator)
            yield result

    def close(self) -> None:
        """Let the workers go."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: scores do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Worker:
    """The body of an actor: an evaluator, loaded when first needed, on one thread."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        torch.set_num_threads(1)
        leave_checkout()
        self._spec = spec
        self._evaluator: Evaluator | None = None
        self._shared: dict[str, Any] = {}

    def ready(self) -> None:
        """Load the model."""
        self._loaded()

    def run(self, work: Work, shared: dict[str, Any]) -> Any:
        """Do work; `shared` names the teacher's end points in the object store by stream."""
        evaluator = self._loaded()
        for stream, reference in shared.items():
            if self._shared.get(stream) != reference:  # new, or of more samples than before
                evaluator.share(stream, _fetcher(reference))
        self._shared = dict(shared)
        return work.run(evaluator)

    def _loaded(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = Evaluator.from_spec(self._spec)
        return self._evaluator


def _fetcher(reference: Any) -> Callable[[], Tensor]:
    def fetch() -> Tensor:
        import ray

        return torch.from_numpy(np.array(ray.get(reference)))

    return fetch


@dataclass(eq=False)
class _Job:
    """Work on its way, and its parts where it was divided."""

    work: Work
    parts: list[_Job] = field(default_factory=list)
    result: Any = None
    done: bool = False

    def settle(self) -> bool:
        """Whether the result is there, joined from those of the parts if need be."""
        if not self.done and self.parts and all(part.settle() for part in self.parts):
            self.result, self.done = self.work.join([part.result for part in self.parts]), True
        return self.done


class RayPool:
    """Evaluator actors on a Ray cluster, or on one started here for this run.

    Args:
        spec: what each worker evaluates.
        workers: number of actors; None is one per CPU of the cluster now.
        address: cluster to join ("auto", "host:port", "ray://..."); None joins RAY_ADDRESS or
            starts one on loopback.
        timeout: seconds after which work counts as hung; None never.
        retries: attempts after the first for work whose worker died.
        gpus: GPUs per worker.
        on_progress: called with how many workers are there, as they come.
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
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self._spec, self._timeout = spec, timeout
        self._on_progress = on_progress or (lambda text: None)
        self._staged: str | None = None
        self._shared: dict[str, Any] = {}
        self._queue: deque[_Job] = deque()
        self._flying: dict[Any, tuple[_Job, Any, float]] = {}
        self._coming: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._ray, self._owned = _connect(spec, workers, address, self)
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._actor = self._ray.remote(
            max_restarts=-1, max_task_retries=retries, num_cpus=1, num_gpus=gpus
        )(Worker)
        try:
            for _ in range(self.workers):
                self._start()
            while not self._idle:
                self._step()
        except BaseException:
            self.close()
            raise

    def share(self, stream: str, reference: Tensor) -> None:
        """See `SerialPool`."""
        self._shared[stream] = self._ray.put(reference.cpu().numpy())

    def map(self, works: Iterable[Work]) -> Iterator[Any]:
        """See `SerialPool`."""
        jobs = [_Job(work) for work in works]
        self._queue.extend(jobs)
        self._feed()
        return self._results(jobs)

    def _results(self, jobs: list[_Job]) -> Iterator[Any]:
        for job in jobs:
            while not job.settle():
                self._step()
            yield job.result

    def close(self) -> None:
        """See `SerialPool`."""
        if self._owned:
            self._ray.shutdown()
        else:
            flying = [actor for _, actor, _ in self._flying.values()]
            for actor in [*self._idle, *flying, *self._coming.values()]:
                with contextlib.suppress(Exception):
                    self._ray.kill(actor)
        if self._staged:
            shutil.rmtree(self._staged, ignore_errors=True)

    def _start(self) -> None:
        actor = self._actor.remote(self._spec)
        self._coming[actor.ready.remote()] = actor

    def _step(self) -> None:
        """Wait for something to happen, a second at most, and see to it."""
        self._feed()
        waiting = [*self._flying, *self._coming]
        patience = 1.0 if self._timeout is None else min(1.0, self._timeout)
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=patience)
        for ref in ready:
            if ref in self._coming:
                self._welcome(ref)
            else:
                self._land(ref)
        self._expire()
        self._feed()

    def _feed(self) -> None:
        while self._queue and self._idle:
            job, actor = self._queue.popleft(), self._idle.pop()
            ref = actor.run.remote(job.work, self._shared)
            self._flying[ref] = (job, actor, time.monotonic())

    def _welcome(self, ref: Any) -> None:
        """An actor has loaded its model."""
        actor = self._coming.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            line = " ".join(str(cause).split())
            raise StudyError(f"a worker could not load the model: {line}") from error
        except self._ray.exceptions.RayError as error:
            raise StudyError(f"a worker could not start: {str(error).splitlines()[0]}") from error
        self._idle.append(actor)
        if self._coming:
            there = self.workers - len(self._coming)
            self._on_progress(f"{there} of {self.workers} workers are there")

    def _land(self, ref: Any) -> None:
        job, actor, _ = self._flying.pop(ref)
        self._idle.append(actor)  # Ray restarts it where it died
        try:
            job.result, job.done = self._ray.get(ref), True
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FewstepError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            memory = memory or "memory" in str(error).lower()
            self._give_up(job, "oom" if memory else "error", "its worker died")

    def _expire(self) -> None:
        if self._timeout is None:
            return
        now = time.monotonic()
        for ref, (job, actor, begun) in list(self._flying.items()):
            if now - begun > self._timeout:
                del self._flying[ref]
                with contextlib.suppress(Exception):
                    self._ray.kill(actor)  # for good: a restarted one would try again
                self._start()
                self._give_up(job, "timeout", f"took longer than {self._timeout:g} s")

    def _give_up(self, job: _Job, status: str, message: str) -> None:
        job.parts = [_Job(part) for part in job.work.parts()]
        self._queue.extendleft(reversed(job.parts))
        if not job.parts:
            job.result, job.done = job.work.failed(status, message), True


Pool = SerialPool | RayPool


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
    on_progress: Callable[[str], None] | None = None,
) -> Pool:
    """The pool a study asks for: `workers = 0` runs here; anything else on Ray."""
    if workers == 0 and address is None:
        return SerialPool(spec, evaluator)
    return RayPool(
        spec,
        workers=workers or None,
        address=address,
        timeout=timeout,
        retries=retries,
        gpus=gpus,
        on_progress=on_progress,
    )
