"""Dynamic compensation (DC-Solver): one ratio per step, fitted to the teacher's end points.

    step i >= K:  D_i <- its Lagrange interpolation at rho_i t_i + (1 - rho_i) t_{i-1}, for good

All ratios are fitted together by Gauss-Newton on the end point (`predictors.gauss_newton`), on
noise whose last part chooses the iterate. The original chooses one
ratio after the other by the state it lands on (`experiments/benchmarks/published_dc.py`); their
effects on the end point are coupled, and matching the teacher step by step does not bring it
closest.

References: DC-Solver, Zhao et al. (arXiv 2409.03755) section 3.
"""

from __future__ import annotations

import torch

from fewstep.predictors.gauss_newton import Batch, Fit
from fewstep.predictors.refine import Fitted
from fewstep.predictors.settings import CompensationTable
from fewstep.samplers import Denoiser
from fewstep.space import OdeSchedule
from fewstep.space.errors import StudyError
from fewstep.space.unknowns import Ratios


def compensate(
    base: OdeSchedule, denoiser: Denoiser, batch: Batch, table: CompensationTable
) -> Fitted:
    """Fit the ratios of a schedule without fresh noise; ratios it has are the start.

    The last `table.held` share of the batch only chooses the iterate.

    Raises:
        StudyError: fresh noise, or the time shift as an option: no program to fit.
    """
    if base.program.stochastic or "time_shift" in base.options:
        raise StudyError(
            "compensation: a schedule that adds fresh noise (eta > 0) or has options.time_shift "
            "has no program to fit: leave it out"
        )
    split = len(batch) - int(table.held * len(batch))
    train = batch.first(split)
    held = batch.take(slice(split, None)) if split < len(batch) else train
    model = Ratios(base, table.low, table.high)
    fit, check = (Fit(model, denoiser, part) for part in (train, held))
    theta = torch.zeros(model.size, dtype=torch.float64)
    before = after = check.losses([theta])[0]
    best: torch.Tensor | None = None
    if model.size:
        best, after = fit.chosen(theta, table.polish, lambda at: check.losses([at])[0], before)
    made = base if best is None else model.at(best)
    return Fitted(made, 0, before, after, len(train), fit.calls + check.calls)


def compensation_cost(table: CompensationTable, nfe: int, bases: int) -> int:
    """Network evaluations of compensating at one NFE, as fits usually go."""
    columns, tried = nfe * (nfe + 1) // 2, 4 * nfe
    return bases * table.samples * (table.polish * (columns + tried) + nfe)
