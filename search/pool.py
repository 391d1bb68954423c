"""Where work runs: in this process, or on Ray actors that each hold the model.

`map(works)` sends all of them out at once and yields their results in the order given, so the
number of workers cannot change a result; several maps may be open at a time (`map_groups`). Short
works travel together, so that sending them costs little; workers with long ones are asked how far
they are.

The pool is elastic: a search starts when the least number of workers is there and goes on with
those that are left; in place of one that died another is asked for, which Ray places when there is
room, on machines that join later too. Work whose worker died is tried again on another one; work
that keeps killing its worker, or hangs, is divided into its parts, so that only the guilty one is
given up (`Work.failed`). An exception that work raises is raised here.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers.factory import leave_checkout
from fewstep.search.cluster import connect, differing, first_line, versions
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.work import Block, Evaluator, Work
from fewstep.space.errors import FewstepError, StudyError, one_line

_TOGETHER = 0.1  # seconds of work that are sent at once
_LOOK = 10.0  # seconds between looks at how large the cluster is, and how far long works are
_OFTEN = 0.02  # seconds between looks at what has landed while the search is busy
_FAILED_STARTS = 5  # in a row, after which the search ends
Key = TypeVar("Key")


class SerialPool:
    """Does work in this process, on one thread, when its result is asked for."""

    workers = 0

    def __init__(self, evaluator: Evaluator, display: Display | None = None) -> None:
        self._evaluator, self._display, self._begun = evaluator, display or Display(), 0
        network = getattr(self._evaluator.problem, "denoiser", None)
        if network is not None:
            network.on_asked = self._tell

    def _tell(self, images: int) -> None:
        self._display.working(_asked(self._evaluator) - self._begun)

    def share(self, stream: str, reference: Tensor) -> None:
        """Give every worker, present and future, the teacher's end points of a stream."""
        self._evaluator.share(stream, reference)

    def map(self, works: Iterable[Work]) -> Iterator[Any]:
        """Send works out at once; their results, in order, as they are asked for."""
        for work in list(works):
            self._begun = _asked(self._evaluator)
            with one_thread():
                result = work.run(self._evaluator)
            self._display.working(0)
            yield result

    def map_groups(self, groups: Mapping[Key, Iterable[Work]]) -> Iterator[tuple[Key, list[Any]]]:
        """Send all out at once; a group's results, in order, as soon as all of them are there."""
        for key, works in groups.items():
            yield key, list(self.map(works))

    def tend(self) -> None:
        """See `RayPool`; here work runs when its result is asked for."""

    def close(self) -> None:
        """Let the workers go."""


def _asked(evaluator: Evaluator) -> int:
    """Images that the model was asked for until now; 0 of particles."""
    return int(getattr(getattr(evaluator.problem, "denoiser", None), "asked", 0))


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

    def __init__(self, config: StudyConfig) -> None:
        torch.set_num_threads(1)
        leave_checkout()
        self._config, self._begun = config, 0
        self._evaluator: Evaluator | None = None
        self._shared: dict[str, Any] = {}

    def ready(self) -> dict[str, str]:
        """Load the model; the versions here."""
        self._loaded()
        return versions()

    def run(
        self, works: Sequence[Work], shared: dict[str, Any], piece: int | None
    ) -> tuple[list[Any], float]:
        """Do works, and the seconds they took; `shared` names end points in the object store."""
        torch.set_num_threads(1)  # of this thread, which Ray chose
        evaluator, begun = self._loaded(), time.perf_counter()
        evaluator.set_piece(piece)
        self._begun = _asked(evaluator)
        for stream, reference in shared.items():
            if self._shared.get(stream) != reference:  # new, or of more samples than before
                evaluator.share(stream, _fetcher(reference))
        self._shared = dict(shared)
        return [work.run(evaluator) for work in works], time.perf_counter() - begun

    def asked(self) -> int:
        """Images that the model was asked for by the works being done now."""
        return 0 if self._evaluator is None else _asked(self._evaluator) - self._begun

    def _loaded(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = Evaluator.of(self._config)
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
    alone: bool = False
    deaths: int = 0

    def settle(self) -> bool:
        """Whether the result is there, joined from those of the parts if need be."""
        if not self.done and self.parts and all(part.settle() for part in self.parts):
            self.result, self.done = self.work.join([part.result for part in self.parts]), True
        return self.done


class RayPool:
    """Evaluator actors on a Ray cluster, or on one started here for this run.

    Args:
        config: the study that workers evaluate; how many and how large they are.
        address: cluster to join ("auto", "host:port", "ray://..."); None starts one on loopback.
        folder: what the cluster's machines get as their working directory.
        display: told how many workers are there, as they come and go.
        piece: images of one network call that suit the workers' processor, where it was found;
            may be set anew.
    """

    def __init__(
        self,
        config: StudyConfig,
        address: str | None = None,
        folder: Path | None = None,
        display: Display | None = None,
        piece: int | None = None,
    ) -> None:
        self._config, self._settings, self.piece = config, config.search, piece
        self._display, settings = display or Display(), config.search
        self._least, self._most = settings.bounds
        self._shared: dict[str, Any] = {}
        self._queue: deque[_Job] = deque()
        self._flying: dict[Any, tuple[list[_Job], Any, float]] = {}
        self._coming: dict[Any, Any] = {}
        self._asking: dict[Any, Any] = {}  # how far are they? the work of each
        self._asked: dict[Any, int] = {}  # images of works on their way, as last heard
        self._idle: list[Any] = []
        self._each = _TOGETHER  # seconds of one work, as measured
        self._failed, self._stillborn, self._lost = 0, "", 0
        self._versions = versions()
        self._looked, self._tended, self._differ = -math.inf, -math.inf, set[str]()
        self._ray, self._owned = connect(address, self._most or 0, folder)
        self._actor = self._ray.remote(
            num_cpus=settings.cpus, num_gpus=settings.gpus, concurrency_groups={"look": 1}
        )(Worker)
        try:
            self._start()
            begun, said = time.monotonic(), False
            while self._there < min(self._least, self._most or self._least):
                self._step()
                if not said and time.monotonic() - begun > 30:
                    said = True
                    self._display.note(self._room())
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """Workers there and asked for."""
        return self._there + len(self._coming)

    @property
    def _there(self) -> int:
        return len(self._idle) + len(self._flying)

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
            job.result = None

    def map_groups(self, groups: Mapping[Key, Iterable[Work]]) -> Iterator[tuple[Key, list[Any]]]:
        """See `SerialPool`."""
        jobs = {key: [_Job(work) for work in works] for key, works in groups.items()}
        self._queue.extend(job for group in jobs.values() for job in group)
        while jobs:
            for key, group in jobs.items():
                if all(job.settle() for job in group):
                    yield key, [job.result for job in jobs.pop(key)]
                    break
            else:
                self._step()

    def close(self) -> None:
        """See `SerialPool`."""
        if self._owned:
            self._ray.shutdown()
            return
        flying = [actor for _, actor, _ in self._flying.values()]
        for actor in [*self._idle, *flying, *self._coming.values()]:
            self._kill(actor)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor)

    def _start(self) -> None:
        """Ask for the workers that are missing; Ray places them when there is room."""
        self._looked = time.monotonic()
        wanted = self._most
        if wanted is None:
            whole, settings = self._ray.cluster_resources(), self._settings
            wanted = int(whole.get("CPU", 1) / (settings.cpus or 1))
            if settings.gpus:
                wanted = min(wanted, int(whole.get("GPU", 0) / settings.gpus))
        for _ in range(max(wanted, 1) - self.workers):
            self._await(self._actor.remote(self._config))

    def _await(self, actor: Any) -> None:
        self._coming[actor.ready.remote()] = actor

    def tend(self) -> None:
        """See to what has happened while the search was busy elsewhere: workers want work."""
        if self._each < _OFTEN or not (self._flying or self._coming):
            return  # short works travel together: looking costs more than it gains
        if time.monotonic() - self._tended > _OFTEN:
            self._step(0.0)

    def _step(self, patience: float = 1.0) -> None:
        """Wait for something to happen, so many seconds at most, and see to it."""
        self._feed()
        waiting = [*self._flying, *self._coming]
        patience = min(patience, _LOOK, self._settings.timeout or _LOOK)
        ready, rest = self._ray.wait(waiting, num_returns=1, timeout=patience)
        if rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for ref in ready:
            if ref in self._coming:
                self._welcome(ref)
            elif ref in self._flying:
                self._land(ref)
        self._expire()
        if self._lost:
            self._replace()
        elif time.monotonic() - self._looked > _LOOK:
            self._start()
            self._ask()
        self._hear()
        self._feed()
        self._tended = time.monotonic()

    def _ask(self) -> None:
        """Ask workers with long works how far they are."""
        now = time.monotonic()
        for ref, (_, actor, begun) in self._flying.items():
            if now - begun > _LOOK and ref not in self._asking.values():
                asked = actor.asked.options(concurrency_group="look").remote()
                self._asking[asked] = ref

    def _hear(self) -> None:
        """Show what those who were asked say; one that is gone is found by its work."""
        if not self._asking:
            return
        said, _ = self._ray.wait(list(self._asking), num_returns=len(self._asking), timeout=0)
        for answer in said:
            ref = self._asking.pop(answer)
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._asked[ref] = self._ray.get(answer)
        self._asked = {ref: n for ref, n in self._asked.items() if ref in self._flying}
        self._display.working(sum(self._asked.values()))

    def _feed(self) -> None:
        """Send the next works to idle workers, short ones together."""
        while self._queue and self._idle:
            share = math.ceil(len(self._queue) / (2 * max(self._there, 1)))
            size = max(1, min(share, int(_TOGETHER / max(self._each, 1e-6))))
            jobs = [self._queue.popleft()]
            while len(jobs) < size and not jobs[0].alone and self._queue:
                if self._queue[0].alone or self._limit(self._queue[0]) != self._limit(jobs[0]):
                    break
                jobs.append(self._queue.popleft())
            actor = self._idle.pop()
            ref = actor.run.remote([job.work for job in jobs], self._shared, self.piece)
            self._flying[ref] = (jobs, actor, time.monotonic())

    def _limit(self, job: _Job) -> float | None:
        return job.work.limit(self._settings.timeout)

    def _welcome(self, ref: Any) -> None:
        """An actor has loaded its model."""
        actor = self._coming.pop(ref)
        try:
            there = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise StudyError(f"a worker could not load the model: {one_line(cause)}") from error
        except self._ray.exceptions.RayError as error:
            self._stillborn, self._lost = first_line(error), self._lost + 1
            return
        self._failed = 0
        self._idle.append(actor)
        line = differing(self._versions, there)
        if line and line not in self._differ:
            self._differ.add(line)
            self._display.note(f"a worker has {line}: scores may differ in their last digits")
        if self._coming:
            self._display.stage(f"{self._there} of {self.workers} workers are there")

    def _land(self, ref: Any) -> None:
        jobs, actor, _ = self._flying.pop(ref)
        if self._asked.pop(ref, None) is not None:
            self._display.working(sum(self._asked.values()))
        try:
            results, seconds = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FewstepError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            self._lost += 1
            memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            memory = memory or "low on memory" in str(error)
            self._again(jobs, "oom" if memory else "error", "its worker died")
            return
        self._idle.append(actor)
        self._each += 0.3 * (seconds / len(jobs) - self._each)
        for job, result in zip(jobs, results, strict=True):
            job.result, job.done = result, True

    def _again(self, jobs: list[_Job], status: str, message: str) -> None:
        """Works whose worker died: each alone, and a worker's third victim is divided."""
        for job in reversed(jobs):
            job.deaths += len(jobs) == 1
            job.alone = True
            if job.deaths > self._settings.retries:
                self._give_up(job, status, message)
            else:
                self._queue.appendleft(job)

    def _replace(self) -> None:
        """After deaths: look whether the idle ones live, and ask for as many as are missing.

        Raises:
            StudyError: workers die as they start, again and again.
        """
        self._failed += bool(self._stillborn)
        if self._failed >= _FAILED_STARTS:
            raise StudyError(f"workers do not start: {self._stillborn}")
        cause, self._stillborn = self._stillborn and f" (at its start: {self._stillborn})", ""
        for actor in self._idle:  # others of a machine that is gone would be found one by one
            self._await(actor)
        lost, self._idle, self._lost = self._lost, [], 0
        self._start()
        self._display.note(
            f"{lost} worker{'s' * (lost > 1)} died: the search goes on with those left, "
            f"replacements are on their way{cause}"
        )

    def _expire(self) -> None:
        now = time.monotonic()
        for ref, (jobs, actor, begun) in list(self._flying.items()):
            limit = self._limit(jobs[0])
            if limit is None or now - begun <= limit * len(jobs):
                continue
            del self._flying[ref]
            self._kill(actor)
            self._start()
            if len(jobs) > 1:
                self._again(jobs, "", "")
            else:
                self._give_up(jobs[0], "timeout", f"took longer than {limit:g} s")

    def _give_up(self, job: _Job, status: str, message: str) -> None:
        job.parts = [_Job(part, alone=True) for part in job.work.parts()]
        self._queue.extendleft(reversed(job.parts))
        if not job.parts:
            job.result, job.done = job.work.failed(status, message), True

    def _room(self) -> str:
        """Why workers are not there, as far as it can be seen."""
        whole, free = self._ray.cluster_resources(), self._ray.available_resources()
        kinds = [f"{free.get(k, 0):g} of {whole.get(k, 0):g} {k}s free" for k in ("CPU", "GPU")]
        asked = f"{self._settings.cpus:g} CPUs and {self._settings.gpus:g} GPUs"
        return (
            f"waiting for {self._least} worker{'s' * (self._least > 1)} of {asked} each; the "
            f"cluster has {', '.join(kinds)}"
        )


Pool = SerialPool | RayPool


def gathered(
    pool: Pool, blocks: Iterable[Block], advance: Callable[[int], None] = lambda evaluations: None
) -> np.ndarray:
    """What blocks of one schedule give, in sample order; `advance` gets the evaluations done."""
    parts = []
    for result in pool.map(blocks):
        parts.append(result.values[0])
        advance(result.evaluations)
    return np.concatenate(parts)
