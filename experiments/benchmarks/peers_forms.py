"""Programs of a few free numbers, as recent papers learn them: DyWeight's, BNS's and LD3's.

Each form gives the start values of its numbers and the program at given values, differentiable.
Written from the papers' descriptions; the states are those of this project's programs.

    Weighted        DyWeight (arXiv 2603.11607): the newest gradients with unconstrained weights,
                    and a scale on the noise level that the network is told
    NonStationary   BNS (2403.01329): every query time and every weight of a program
    Discretised     LD3 (2405.15506): the times of a given solver, and the network's times beside
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.space import OdeSchedule, Program, compile
from fewstep.space.baselines import grid
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.unknowns import canonical

_ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Adams-Bashforth weights on a uniform grid, newest first: what iPNDM uses on any grid."""


@dataclass(frozen=True)
class Group:
    """Numbers that are learned at one rate.

    Args:
        value: where they start, float64.
        rate: Adam's step size at its highest.
        after: share of the fit for which they keep their start value, 0..1.
    """

    value: Tensor
    rate: float
    after: float = 0.0


class Form(Protocol):
    """Groups of free numbers and the program they mean."""

    def groups(self) -> list[Group]:
        """The numbers at the start."""
        ...

    def program(self, values: Sequence[Tensor]) -> Program:
        """The program, differentiable in `values`, one tensor for each group."""
        ...


def from_states(noise: NoiseSchedule, t: Tensor, states: Tensor) -> Program:
    """The program with r = 0 whose state y_c is row c of `states`.

    Args:
        noise: the noise schedule.
        t: query times, shape (C,).
        states: weights of x_T, D_0, ..., D_{C-1} in y_0 .. y_C, shape (C + 1, C + 1).
    """
    calls = len(t)
    zero = torch.zeros(calls, dtype=torch.float64)
    return Program(
        t=t,
        label=noise.label(t),
        alpha=noise.alpha(t),
        sigma=noise.sigma(t),
        init=torch.stack([states[0, 0], torch.zeros((), dtype=torch.float64)]),
        r=zero,
        e=states[1:, 0],
        k=zero,
        b=states[1:, 1:],
        g=zero,
    )


@dataclass(frozen=True)
class Weighted:
    """DyWeight: weights of the newest gradients that need not sum to 1, and scaled query levels.

    With s = sigma/alpha and z = y/alpha, a step of weights w from level u, where the trajectory is
    taken to be, towards the level s of the grid is

        d_i = (z - D_i)/u,    z <- z + (s - u) sum_j w_j d_{i-j},    u <- u + (s - u) sum_j w_j

    so that weights which do not sum to 1 lengthen or shorten the step. The network is asked at
    level c_i u. The start is iPNDM on the grid.

    Args:
        noise: the noise schedule.
        calls: network calls C.
        kind: the grid of the levels, see `space.baselines.grid`.
        first_free: the first gradient is z / sqrt(1 + s^2), without a call (AFS): C + 1 steps.
        history: gradients that have a weight.
        rate: Adam's step size.
    """

    noise: NoiseSchedule
    calls: int
    kind: str
    first_free: bool = True
    history: int = 3
    rate: float = 3e-2

    @property
    def _steps(self) -> int:
        return self.calls + self.first_free

    def groups(self) -> list[Group]:
        """iPNDM's weights, shape (steps, history), newest first; scales of 1, shape (C,)."""
        weights = torch.zeros(self._steps, self.history, dtype=torch.float64)
        for i in range(self._steps):
            order = min(i + 1, self.history)
            weights[i, :order] = torch.tensor(_ADAMS[order], dtype=torch.float64)
        scales = torch.ones(self.calls, dtype=torch.float64)
        return [Group(weights, self.rate), Group(scales, self.rate)]

    def program(self, values: Sequence[Tensor]) -> Program:
        """See `Form`; levels stay within those of the noise schedule."""
        weights, scales = values
        noise = self.noise
        times = torch.tensor(grid(noise, self._steps, self.kind), dtype=torch.float64)
        levels = torch.exp(-finite_lam(noise, times))
        low, high = levels[-1], levels[0]
        basis = torch.eye(self.calls + 1, dtype=torch.float64)
        z, u = basis[0] / noise.alpha(times[0]), levels[0]
        queries: list[Tensor] = []
        states: list[Tensor] = []
        gradients: list[Tensor] = []  # newest first
        for i, s in enumerate(levels[1:]):
            if self.first_free and i == 0:
                d = z / torch.sqrt(1 + u**2)
            else:
                t = noise.t_of_lam(-torch.log((scales[len(queries)] * u).clamp(low, high)))
                queries.append(t)
                states.append(noise.alpha(t) * z)
                d = (z - basis[len(queries)]) / u
            gradients.insert(0, d)
            used = weights[i, : min(i + 1, self.history)]
            z = z + (s - u) * sum(w * g for w, g in zip(used, gradients, strict=False))
            u = (u + (s - u) * used.sum()).clamp(min=low / 2)
        states.append(noise.alpha(times[-1]) * z)
        return from_states(noise, torch.stack(queries), torch.stack(states))


@dataclass(frozen=True)
class NonStationary:
    """BNS: query times in order, and in every step free weights of x_T and of all gradients.

    With z = y/alpha, s = sigma/alpha at the queries and at the end, and d_j = (z_j - D_j)/s_j,

        z_{c+1} = z_c + (s_{c+1} - s_c) (a_c x_T + sum_{j<=c} w_cj d_j)

    which is every program without a constant image. In these units all weights are of order 1 and
    a wrong one harms its own step, so that Adam gets on (with the weights of a program as it
    stands it hardly does).

    Args:
        noise: the noise schedule.
        base: the program to start from, without a constant image.
        rate: Adam's step size of the weights.
        time_rate: that of the times, in lam and in the logarithm of its differences.
    """

    noise: NoiseSchedule
    base: Program
    rate: float = 1e-2
    time_rate: float = 1e-2

    @property
    def _end(self) -> Tensor:
        """The time that samples belong to."""
        return torch.tensor(self.noise.t_range[1], dtype=torch.float64)

    def groups(self) -> list[Group]:
        """First lam, logarithms of its differences, a, and the rows of w one after the other."""
        base, end = self.base, self._end
        lam = finite_lam(self.noise, base.t)
        if bool((lam.diff() <= 0).any()):
            raise ScheduleError("the start of a free program must ask in the order of its times")
        calls, weights = base.nfe, canonical(base)
        e = torch.cat([base.init[:1], weights.e])
        b = torch.cat([torch.zeros(1, calls, dtype=torch.float64), weights.b])
        alpha = torch.cat([base.alpha, self.noise.alpha(end)[None]])
        z = torch.cat([e[:, None], b], dim=1) / alpha[:, None]
        levels = torch.exp(-torch.cat([lam, self.noise.lam(end)[None]]))
        basis = torch.eye(calls + 1, dtype=torch.float64)
        d = (z[:-1] - basis[1:]) / levels[:-1, None]
        steps = z.diff(dim=0) / levels.diff()[:, None]
        found = torch.linalg.solve(torch.cat([basis[:1], d]).T, steps.T).T
        rows, columns = torch.tril_indices(calls, calls)
        return [
            Group(lam[:1], self.time_rate),
            Group(torch.log(lam.diff()), self.time_rate),
            Group(found[:, 0], self.rate),
            Group(found[:, 1:][rows, columns], self.rate),
        ]

    def program(self, values: Sequence[Tensor]) -> Program:
        """See `Form`; query times stay within those of the noise schedule."""
        first, gaps, a, flat = values
        noise, calls = self.noise, self.base.nfe
        low, high = finite_lam(noise, torch.tensor(noise.t_range, dtype=torch.float64))
        lam = torch.cat([first, first + torch.cumsum(torch.exp(gaps), 0)]).clamp(low, high)
        t = noise.t_of_lam(lam)
        alpha = torch.cat([noise.alpha(t), noise.alpha(self._end)[None]])
        levels = torch.exp(-torch.cat([lam, noise.lam(self._end)[None]]))
        rows, columns = torch.tril_indices(calls, calls)
        w = torch.zeros(calls, calls, dtype=torch.float64).index_put((rows, columns), flat)
        basis = torch.eye(calls + 1, dtype=torch.float64)
        z = self.base.init[0] * basis[0] / alpha[0]
        states, gradients = [alpha[0] * z], []
        for c in range(calls):
            gradients.append((z - basis[c + 1]) / levels[c])
            slope = a[c] * basis[0] + w[c, : c + 1] @ torch.stack(gradients)
            z = z + (levels[c + 1] - levels[c]) * slope
            states.append(alpha[c + 1] * z)
        return from_states(noise, t, torch.stack(states))


@dataclass(frozen=True)
class Discretised:
    """LD3: the inner times of a given solver; then also the times that the network is told.

    Steps in lam are shares of the whole range by a softmax; a network's time may leave its nominal
    one, in lam, by half of the least step. Its times join in the later part of the fit.

    Args:
        base: the solver on the grid to start from; its ends stay.
        rate: Adam's step size of the times.
        shift_rate: that of the network's times.
    """

    base: OdeSchedule
    rate: float = 2e-2
    shift_rate: float = 1e-2

    def groups(self) -> list[Group]:
        """Logarithms of the steps in lam, shape (N,); shifts of the inner queries, (N - 1,)."""
        lam = finite_lam(self.base.noise, torch.tensor(self.base.times, dtype=torch.float64))
        shifts = torch.zeros(self.base.n_steps - 1, dtype=torch.float64)
        return [Group(torch.log(lam.diff()), self.rate), Group(shifts, self.shift_rate, 2 / 7)]

    def program(self, values: Sequence[Tensor]) -> Program:
        """See `Form`."""
        steps, shifts = values
        noise, ends = self.base.noise, torch.tensor(self.base.times, dtype=torch.float64)[[0, -1]]
        low, high = finite_lam(noise, ends)
        share = torch.softmax(steps, 0)
        lam = low + (high - low) * torch.cumsum(share, 0)[:-1]
        most = float((high - low) * share.detach().min()) / 2
        inner = noise.t_of_lam(lam)
        asked = noise.t_of_lam(lam + shifts.clamp(-most, most))
        times = torch.cat([ends[:1], inner, ends[1:]])
        moved = torch.cat([torch.zeros(1, dtype=torch.float64), asked - inner])
        return compile(self.base, {"times": times, "dt_query": moved})
