"""Features of a schedule, one token per network call, read off its program.

A program is all a sampler sees of a schedule, so two schedules with nearly equal programs are
nearly the same sampler, whatever their names. A predictor that reads rows instead of names learns
one smooth function for every order, basis, formulation, corrector and relaxation. Token of call c,
with lam_c the level it is asked at:

    lam_c, lam_{c+1}, lam_{c+1} - lam_c, log(sigma_c / sigma of the query), B_{c,c}, ...,
    B_{c,c-4}, sum of older B, e_c, k_c, share of calls done, calls left / 10, guidance / 10

B_cj = b_cj / alpha_{c+1} are the weights of the data predictions, newest first, in units of the
data's scale at landing: all of order one. Float64; lam is clipped to [-8, 8], where a level may be
infinite, and weights to [-10, 10].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.space.schedule import OdeSchedule
from fewstep.space.solve import Choices, Tape, solve

HISTORY = 5
FEATURES = 4 + HISTORY + 1 + 2 + 3
OWN = (0, *range(3, 7 + HISTORY), FEATURES - 1)
"""Columns that are no functions of the others: level, shift, weights, e, k, guidance."""
_LAM, _WEIGHT = 8.0, 10.0


def tokens(schedule: OdeSchedule, times: Tensor | None = None) -> Tensor:
    """Tokens of one choice of steps at many choices of times.

    Args:
        schedule: gives the noise schedule, the steps and the first step.
        times: model times to use instead of the schedule's, shape (B, N+1); default (1, N+1), the
            schedule's.

    Returns:
        Shape (B, nfe, FEATURES), float64.
    """
    if times is None:
        times = torch.tensor([schedule.times], dtype=torch.float64)
    count, n = len(times), schedule.nfe
    choices = Choices(schedule, {"times": times.T})
    tape = Tape(n, noises=False)
    final, _ = solve(choices, tape)
    end = choices.level(schedule.n_steps)
    states = torch.stack(
        [s.expand(count, 2 + n) for s in (*(c.state for c in tape.calls), final)]
    )  # (n+1, B, 2+n)
    levels = [call.query for call in tape.calls] + [end]
    lam = torch.stack([level.lam.expand(count) for level in levels]).clamp(-_LAM, _LAM)
    alpha = torch.stack([level.alpha.expand(count) for level in levels])
    sigma = torch.stack([s.expand(count) for s in (*(c.sigma for c in tape.calls), end.sigma)])
    asked = torch.stack([level.sigma.expand(count) for level in levels])
    rows = (states[1:] - (sigma[1:] / sigma[:-1]).unsqueeze(-1) * states[:-1]) / alpha[
        1:
    ].unsqueeze(-1)
    rows = rows.nan_to_num(nan=_WEIGHT, posinf=_WEIGHT, neginf=-_WEIGHT).clamp(-_WEIGHT, _WEIGHT)
    out = torch.zeros(n, count, FEATURES, dtype=torch.float64)
    out[..., 0], out[..., 1] = lam[:-1], lam[1:]
    out[..., 2] = lam[1:] - lam[:-1]
    out[..., 3] = torch.log(sigma[:-1]) - torch.log(asked[:-1])
    for c, call in enumerate(tape.calls):
        newest_first = rows[c, :, 2 : 3 + c].flip(-1)
        out[c, :, 4 : 4 + min(HISTORY, c + 1)] = newest_first[:, :HISTORY]
        out[c, :, 4 + HISTORY] = newest_first[:, HISTORY:].sum(-1)
        out[c, :, 7 + HISTORY] = (c + 1) / n
        out[c, :, 8 + HISTORY] = (n - c) / 10
        out[c, :, 9 + HISTORY] = 0.0 if call.guidance is None else float(call.guidance) / 10
    out[..., 5 + HISTORY], out[..., 6 + HISTORY] = rows[..., 0], rows[..., 1]
    return out.transpose(0, 1)
