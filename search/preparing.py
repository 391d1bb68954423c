"""What a study asks for, as objects: what workers need, strategies, first trials, the pool.

Warm starts: schedule files that join a search's first generation, after the named solvers.

A schedule of any number of calls serves every NFE, a file with only a program its own. Where a
schedule is no member of the space as it stands, the members next to it join (the domain's `adopt`:
of ODE schedules steps inserted or deleted, closed decisions neutral, times inside the space's
own), and a note says why. Such a schedule is also scored as it stands, like a named solver outside
the space, one of fewer calls with calls of weight 0 added where that is possible
(`space.growing`): a refined schedule given back loses nothing.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers import AnyProblem, Problem
from fewstep.samplers.streams import cut
from fewstep.search.cluster import pack, sent_already
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.pool import Pool, RayPool, SerialPool, one_thread
from fewstep.search.stages.improve import named_bases
from fewstep.search.strategies import Proposal
from fewstep.search.work import Block, Evaluator, Want, Work
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError, StudyError, blamed
from fewstep.space.files import load_schedule
from fewstep.space.growing import with_calls
from fewstep.space.plans import PlanDomain, rivals
from fewstep.space.program import ProgramSchedule
from fewstep.space.protocol import Domain
from fewstep.space.schedule import OdeSchedule


def open_pool(
    config: StudyConfig, evaluator: Evaluator, address: str | None, display: Display
) -> Pool:
    """The pool a study asks for: `workers = 0` runs here, anything else on Ray.

    Workers of another machine get the study's files, and find them in the folder they start in.
    """
    piece, search = evaluator.piece, config.search
    if address is None and search.workers == 0:
        return SerialPool(evaluator, display)
    if search.workers == 0:  # as many as the cluster has room for
        search = search.model_copy(update={"workers": None})
    if search.workers is None and not search.gpus and evaluator.device.type == "cuda":
        search = search.model_copy(update={"gpus": 1.0})  # a copy of the model per GPU, not core
    config = config.model_copy(update={"search": search})
    if address is not None and sent_already():
        config = config.model_copy(update={"folder": os.path.relpath(config.folder or ".")})
    if address is None or sent_already():
        return RayPool(config, address, display=display, piece=piece)
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
        packed = pack(config, Path(folder), display.note)
        return RayPool(packed, address, Path(folder), display, piece)


def starters(config: StudyConfig, problem: AnyProblem, domain: Domain) -> dict[str, Any]:
    """The named schedules, told first; where guidance per step is open, with the problem's.

    Raises:
        StudyError: guidance is open for a problem without it, or in bounds that leave its out.
    """
    if isinstance(domain, PlanDomain):
        return rivals(domain)
    found = problem.named(domain.nfe)
    if not isinstance(problem, Problem):
        return found
    for name, low, high in config.space.get("extras", ()):
        if name != "guidance":
            continue
        scale = problem.guidance
        if scale is None:
            raise StudyError("space.extras opens guidance, but the problem has none to start from")
        if not low <= scale <= high:
            raise StudyError(
                f"space.extras: guidance {low:g} to {high:g} leaves out {scale:g}, the problem's"
            )
        for key, schedule in found.items():
            if not isinstance(schedule, OdeSchedule):
                continue  # a program keeps the caller's scale
            steps = tuple(s.model_copy(update={"guidance": scale}) for s in schedule.steps)
            found[key] = schedule.model_copy(update={"steps": steps})
    return found


def check_names(config: StudyConfig, problem: AnyProblem) -> None:
    """Refuse, before anything runs, named solvers of the last stages that do not exist.

    Raises:
        StudyError: the setting is named.
    """
    if not isinstance(problem, Problem):
        return
    nfes, noise = config.search.nfe, problem.denoiser.noise
    if config.finish == "compensation":
        for nfe in nfes:
            named_bases(config, noise, nfe)
    if config.cpr.template is not None and nfes:
        with blamed("cpr.template"):
            for nfe in range(min(nfes), max(nfes) + 1):
                baseline(config.cpr.template, noise, nfe)


def load_warm(config: StudyConfig, problem: AnyProblem) -> dict[str, Any]:
    """The schedules of search.warm by name, paths relative to the study file's folder.

    Raises:
        StudyError: a file that cannot be read, is not for this model (another kind or another
            noise schedule), or can serve no NFE of the study; one line.
    """
    found: dict[str, Any] = {}
    for name in config.search.warm:
        with blamed("search.warm", FewstepError):
            schedule = load_schedule(Path(config.folder) / name)
            problem.check(schedule, name)
        if isinstance(schedule, ProgramSchedule) and schedule.nfe > max(config.search.nfe):
            raise StudyError(
                f"search.warm: {name} is a fitted program of {schedule.nfe} calls, to which calls "
                "can be added but not taken away, and search.nfe names fewer: leave it out"
            )
        stem = Path(name).stem
        found[name if stem in found else stem] = schedule
    return found


def warm_start(
    schedules: Mapping[str, Any], domain: Domain, taken: Iterable[Any]
) -> list[Proposal]:
    """The candidates that schedules (see `load_warm`) give at one NFE, each once.

    Those that are `taken` are candidates already. Their source is "import:NAME". Where the
    schedule is no member, a note says why: under "outside" of the schedule itself, under "adopted"
    of members made from it.
    """
    seen = {schedule.digest for schedule in taken}
    found = []
    for name, schedule in schedules.items():
        source, reason = f"import:{name}", domain.contains(schedule)
        note = {} if reason is None else {"adopted": reason}
        made = [Proposal(member, source, note) for member in domain.adopt(schedule)]
        itself = with_calls(schedule, domain.nfe)
        outside = None if itself is None else domain.contains(itself)
        if outside is not None:
            made.insert(0, Proposal(itself, source, {"outside": outside}))
        for proposal in made:
            if proposal.schedule.digest not in seen:
                seen.add(proposal.schedule.digest)
                found.append(proposal)
    return found


def speed(evaluator: Evaluator, config: StudyConfig) -> tuple[float, int | None]:
    """Seconds of one network evaluation in a block, one thread, and the piece that fits.

    On a CPU the loop's own rule sizes pieces (`samplers.asking.PIECE`). Elsewhere a piece is a
    whole block, halved until it fits in memory: nothing is timed, so that a search run again is
    the same to the last bit. A problem's own measure is part of the time.

    Raises:
        ModelError: whatever the model raises; nothing has been searched yet.
    """
    size, samples = config.search.block[0], min(config.search.block[1], config.search.samples)
    problem = evaluator.problem
    schedules = list(problem.named(min(2, *config.search.settings)).values())[:size]
    want: Want = "samples" if problem.has_teacher else "measures"
    group = tuple(schedules[i] for i in cut(schedules, size)[0])
    on_cpu = evaluator.device.type == "cpu"
    piece = None if on_cpu or not problem.has_teacher else size * samples
    with one_thread():  # warm-up, and the first look at the model
        Block(group[:1], "timing", 0, samples, want, strict=True).run(evaluator)
        while True:
            evaluator.set_piece(piece)
            begun = time.process_time()
            try:
                done = Block(group, "timing", 0, samples, want, strict=True).run(evaluator)
                break
            except (MemoryError, torch.OutOfMemoryError):
                if piece is None or piece <= samples:
                    raise
                piece = max(samples, piece // 2)
    # on a CPU the processor's time: other work on the machine does not count
    seconds = time.process_time() - begun if on_cpu else done.seconds
    return seconds / max(done.evaluations, 1), piece


@dataclass(frozen=True)
class Speed(Work):
    """`speed` where the workers are: another machine's processor is not the driver's."""

    config: StudyConfig

    def run(self, evaluator: Evaluator) -> tuple[float, int | None]:
        """See `speed`."""
        return speed(evaluator, self.config)
