"""Searching by cost: the short fit by which a plan is scored.

A plan (`space.plans`) says little before its numbers are fitted: by itself it is a named solver
whose calls were given other sorts. So every plan proposed is first fitted in short, by the one
Levenberg-Marquardt fit on few samples, and the program it becomes is scored like any candidate.
The best go on to the stage that refines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.predictors.refine import Fitted
from fewstep.predictors.settings import RefineTable
from fewstep.search.config import StudyConfig
from fewstep.search.stages.tasks import RefineTask
from fewstep.search.work import Evaluator
from fewstep.space import ProgramSchedule
from fewstep.space.costs import networks_of, stages
from fewstep.space.growing import widened
from fewstep.space.plans import PlanDomain


def kept_sorts(table: RefineTable) -> RefineTable:
    """The table of a fit that keeps a plan: guidance scales move, sorts and stages stay."""
    return table.model_copy(update={"knobs": ("times", "weights", "guidance"), "stages": True})


def short(table: RefineTable) -> RefineTable:
    """The table of the short fit."""
    samples, rounds = table.short
    changes = {"samples": samples, "held": samples, "batch": samples, "rounds": rounds}
    return kept_sorts(table).model_copy(update=changes)


@dataclass(frozen=True)
class PlanFit(RefineTask):
    """The short fit of one plan.

    Args:
        narrow: of a plan with stages, the program with one call of each, fitted first; the calls
            beside join it half and half, since a call that begins at weight 0 would stay idle.
    """

    narrow: ProgramSchedule | None = None

    def run(self, evaluator: Evaluator) -> Fitted:
        """Fit on the evaluator's problem."""
        if self.narrow is None:
            return super().run(evaluator)
        first = replace(self, schedules=(self.narrow,), narrow=None).run(evaluator)
        plan = self.schedules[0].program
        assert isinstance(first.schedule, ProgramSchedule)
        wide = widened(first.schedule, [len(stage) for stage in stages(plan)])
        asked, found = plan.guidance, wide.program.guidance
        if asked is not None and found is not None:  # a guided call beside an unguided one, too
            asked = torch.where((asked != 1) & (found != 1), found, asked)
        program = replace(wide.program, guidance=asked, network=plan.network)
        wide = wide.model_copy(update={"program": program})
        done = replace(self, schedules=(wide,), narrow=None).run(evaluator)
        return replace(done, calls=first.calls + done.calls)


def plan_fit(
    config: StudyConfig, domain: PlanDomain, member: ProgramSchedule, image: Tensor | None
) -> PlanFit:
    """The short fit of a member of a plan's domain; `image` is the constant image it may use."""
    program, narrow = member.program, None
    if program.depth < program.nfe:
        heads = [stage[0] for stage in stages(program)]
        narrow = domain.narrow(len(heads))
        guidance = None if program.guidance is None else program.guidance[heads]
        names = tuple(networks_of(program)[c] for c in heads)
        single = replace(narrow.program, guidance=guidance, network=names if any(names) else None)
        narrow = narrow.model_copy(update={"program": single})
    featured = config.objective.name == "frechet"
    bare = member.model_copy(update={"provenance": {}})
    return PlanFit((bare,), short(config.refine), image, featured, narrow)
