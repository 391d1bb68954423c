"""Levenberg-Marquardt: the one loop that all fits of schedules share.

    (N + mu diag N + nu I) step = -(slope + nu theta),      N = J^T J, slope = J^T r

A round linearises once, tries several dampings mu at once, and takes the best step if it lowers
the loss; otherwise it tries again with more damping. `pull` (nu, relative to the mean curvature)
holds theta towards 0, its start (Levenberg 1944; Marquardt 1963; Nocedal and Wright, Numerical
Optimization, section 10.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DAMPINGS = (0.1, 1.0, 10.0)
_TRIES = 4
_LEAST_GAIN = 0.003  # two rounds in a row that lower the loss by a smaller share end a fit


@dataclass(frozen=True)
class Quadratic:
    """The local model of a sum of squares: its normal matrix (P, P), slope (P,) and value."""

    normal: Tensor
    slope: Tensor
    loss: float


def levenberg(
    theta: Tensor,
    linearise: Callable[[Tensor], Quadratic],
    losses: Callable[[Sequence[Tensor]], Sequence[float]],
    *,
    rounds: int,
    pull: float = 1e-9,
    damping: float = 1e-2,
    on_round: Callable[[int, Tensor], bool] | None = None,
    inside: Callable[[Tensor], Tensor] = lambda theta: theta,
) -> Tensor:
    """Minimise from `theta`.

    Args:
        theta: start, float64, shape (P,); 0 is where `pull` holds it.
        linearise: the local model at a theta.
        losses: the loss at several thetas, inf where there is none; comparable with
            `Quadratic.loss`.
        rounds: most rounds.
        pull: strength of the hold towards 0, relative to the mean curvature.
        damping: of the first round.
        on_round: called after each round with its number and theta; True ends the fit.
        inside: the nearest theta that is allowed.

    Returns:
        The theta of the last round.
    """
    tired = 0
    for turn in range(1, rounds + 1):
        here, gain = linearise(theta), 0.0
        for _ in range(_TRIES):
            steps = [damped_step(here, damping * m, theta, pull) for m in _DAMPINGS]
            options = [inside(theta + step) for step in steps]
            found = np.nan_to_num(np.asarray(losses(options), dtype=float), nan=np.inf)
            at = int(np.argmin(found))
            if found[at] < here.loss:
                gain = 1 - float(found[at]) / here.loss
                theta, damping = options[at], max(damping * _DAMPINGS[at], 1e-7)
                break
            damping *= 1e3
        if on_round is not None and on_round(turn, theta):
            break
        tired = 0 if gain >= _LEAST_GAIN else tired + 1
        if tired == 2:
            break
        if tired:
            damping = min(damping, 1e-2)
    return theta


def damped_step(here: Quadratic, damping: float, theta: Tensor, pull: float) -> Tensor:
    """The step of the module docstring, from `theta`."""
    diagonal = here.normal.diagonal()
    held = pull * diagonal.mean()
    floor = 1e-12 * diagonal.max() + 1e-30
    matrix = here.normal + torch.diag(damping * diagonal + held + floor)
    step: Tensor = -torch.linalg.solve(matrix, here.slope + held * theta)
    return step
