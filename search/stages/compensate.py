"""Dynamic compensation inside a search: ratios for the best bases of every NFE, on the workers.

One task compensates one base on noise of its own ("compensate"), with the teacher's states at
exactly the base's times. What becomes of it: `stages.improve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.samplers.ode import start_scale
from fewstep.search.problem import conditions, noise_of
from fewstep.search.stages.refine import Improved
from fewstep.search.strategies.compensation import Compensated, Settings, compensate
from fewstep.search.strategies.targets import aligned_targets
from fewstep.search.tables import CompensationTable
from fewstep.search.work import Counted, Evaluator, Work
from fewstep.space import OdeSchedule
from fewstep.space.errors import FewstepError

STREAM = "compensate"


@dataclass(frozen=True)
class CompensationTask(Work):
    """One base to compensate.

    Args:
        schedule: the base.
        table: the study's [compensation].
    """

    schedule: OdeSchedule
    table: CompensationTable

    def limit(self, block: float | None) -> float | None:
        """See `Work`."""
        return self.table.timeout

    def failed(self, status: str, message: str) -> Improved:
        """See `Work`: a base that fails is said and left out."""
        return Improved(message=f"{message} ({status})")

    def run(self, evaluator: Evaluator) -> Improved:
        """Compensate on the evaluator's problem; a base that cannot be is a failed result."""
        denoiser = Counted(evaluator.ode.denoiser)
        try:
            found = self._compensate(evaluator, denoiser)
        except (FewstepError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            return Improved(message=line, evaluations=denoiser.evaluations)
        spent = denoiser.evaluations
        note: dict[str, Any] = {
            "compensation_before": found.before,
            "compensation_after": found.after,
            "compensation_calls": spent,
            "ratios": list(found.ratios),
        }
        return Improved(found.schedule, note, evaluations=spent)

    def _compensate(self, evaluator: Evaluator, denoiser: Counted) -> Compensated:
        table, problem = self.table, evaluator.ode
        base = self.schedule.model_copy(
            update={"compensation_order": table.order, "compensation_variable": table.variable}
        )
        indices = range(table.samples)
        x_T = start_scale(base) * noise_of(evaluator.seed, STREAM, indices, problem.shape)
        shared: dict[str, Any] = {"cond": conditions(problem, indices)}
        shared["guidance"] = problem.guidance
        targets = aligned_targets(base, denoiser, x_T, calls=table.teacher, **shared)
        settings = Settings(table.low, table.high, held=table.held, polish=table.polish)
        return compensate(base, denoiser, x_T, targets, settings=settings, **shared)


def compensation_cost(table: CompensationTable, nfe: int, bases: int) -> int:
    """Network evaluations of compensating at one NFE, at most."""
    s = Settings(polish=table.polish)
    greedy = nfe * (s.coarse + s.fine + 3)
    together = s.polish * nfe * (nfe / 2 + 6)
    return round(bases * table.samples * (table.teacher + greedy + together + 2 * nfe))
