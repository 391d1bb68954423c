"""Weights of one solver step on the network outputs it uses; every formula once, float64.

A step goes from level (alpha, sigma, lam) to (alpha', sigma', lam'), h = lam' - lam > 0. Three
formulations of the same ODE, each `base * x + integral of F against a measure`:

    noise     x' = alpha' ( x/alpha + int eps d(rho) ),       rho = e^-lam = sigma/alpha
    data      x' = sigma' ( x/sigma + int D d(e^lam) )
    velocity  x' = x + int v dt,                              v = alpha_dot D + sigma_dot eps

F is replaced by a polynomial through the step's points, in a basis variable phi (lam, t, rho, or
rho^p), or by the Adams weights of a uniform grid ("adams"). `first` below is the weight a constant
F gets (the DDIM coefficient): **the weights of a step always sum to it**, whatever basis and
order, and order 1 is DDIM. In the lam basis the polynomial is written as a Taylor series about the
start, because published relaxations act on its derivatives.

References: exponential integrators and psi, UniPC (arXiv 2302.04867) eq. 5-9 and DPM-Solver++
(2211.01095) appendix A; the Taylor
form with low-order derivatives and scalings, USF (2312.07243) section 3; DEIS (2204.13902) eq.
14-15; Adams weights, PNDM (2202.09778) eq. 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule

RELAXATIONS = ("none", "bh1", "bh2", "exp", "minus_exp", "linear", "half_second")
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# newest (implicit) point first, then the start point, then older ones
ADAMS_MOULTON = (
    (1.0,),
    (1 / 2, 1 / 2),
    (5 / 12, 8 / 12, -1 / 12),
    (9 / 24, 19 / 24, -5 / 24, 1 / 24),
)


@dataclass(frozen=True)
class Level:
    """A point of the noise schedule: its time, alpha, sigma and lam.

    All are float64 tensors, of shape () or, where rows are per image, (B,).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @classmethod
    def at(cls, noise: NoiseSchedule, t: Tensor) -> Level:
        """The level of `noise` at time t."""
        return cls(t, noise.alpha(t), noise.sigma(t), noise.lam(t))

    @property
    def rho(self) -> Tensor:
        """sigma / alpha."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class Rule:
    """How a step turns points into weights: fields of `StepSpec`, of predictor or corrector."""

    formulation: str = "data"
    basis: str = "lam"
    power: float | Tensor = 1.0
    relaxation: str = "none"
    coefficient: float | Tensor = 0.0
    slope_points: int | None = None


def phi(z: Tensor, n: int) -> list[Tensor]:
    """[phi_1(z), ..., phi_n(z)], phi_k(z) = int_0^1 e^{z(1-u)} u^{k-1}/(k-1)! du.

    The recursion phi_{k+1} = (phi_k - 1/k!)/z loses k digits per unit of 1/z, so |z| < 1 starts
    from the series of phi_n and runs it backwards, which is stable.
    """
    small = z.abs() < 1
    if bool(small.all()):
        return _phi_series(z, n)
    if not bool(small.any()):
        return _phi_forward(z, n)
    near = _phi_series(torch.where(small, z, 0.5 * torch.ones_like(z)), n)
    far = _phi_forward(torch.where(small, torch.ones_like(z), z), n)
    return [torch.where(small, a, b) for a, b in zip(near, far, strict=True)]


@cache
def _series_coefficients(n: int) -> Tensor:
    return torch.tensor([1.0 / math.factorial(m + n) for m in range(20)], dtype=torch.float64)


def _phi_series(z: Tensor, n: int) -> list[Tensor]:
    powers = torch.cumprod(
        torch.cat([torch.ones_like(z)[..., None], z[..., None].expand(*z.shape, 19)], dim=-1),
        dim=-1,
    )
    values = [powers @ _series_coefficients(n)]
    for k in range(n - 1, 0, -1):
        values.append(z * values[-1] + 1.0 / math.factorial(k))
    return values[::-1]


def _phi_forward(z: Tensor, n: int) -> list[Tensor]:
    values = [torch.expm1(z) / z]
    for k in range(1, n):
        values.append((values[-1] - 1.0 / math.factorial(k)) / z)
    return values


def base(formulation: str, start: Level, land: Level) -> Tensor:
    """The factor of the start state in the step."""
    if formulation == "data":
        return land.sigma / start.sigma
    if formulation == "noise":
        return land.alpha / start.alpha
    return torch.ones_like(land.alpha)


def first(formulation: str, start: Level, land: Level) -> Tensor:
    """The weight of a constant F: alpha'(1 - e^-h), -sigma'(e^h - 1), or t' - t."""
    if formulation == "velocity":
        return land.t - start.t
    if formulation == "data":
        return -land.alpha * torch.expm1(start.lam - land.lam)
    if bool(torch.isposinf(land.lam).any()):
        return land.sigma - land.alpha * start.rho
    return -land.sigma * torch.expm1(land.lam - start.lam)


def step_weights(
    rule: Rule,
    noise: NoiseSchedule,
    start: Level,
    points: Sequence[Level],
    land: Level,
    *,
    implicit: bool,
) -> list[Tensor]:
    """Weights of the outputs at [start, *points] in one step from `start` to `land`.

    Args:
        rule: formulation, basis and scalings.
        noise: needed where the basis is t.
        start: level of the state the step starts from; its output is the first weight.
        points: levels of the other outputs used, newest first; the order of the step is 1 +
            len(points).
        land: level the step lands on.
        implicit: points[0] is the output at the landing time (a corrector step).

    Returns:
        1 + len(points) tensors; they sum to `first(...)`.

    Raises:
        ScheduleError: more points than the basis can use (Adams beyond 4, order > 1 landing on
            sigma = 0 with the lam basis).
    """
    total = first(rule.formulation, start, land)
    if not points:
        return [total]
    if rule.basis == "adams":
        table = ADAMS_MOULTON if implicit else ADAMS_BASHFORTH
        if len(points) >= len(table):
            raise ScheduleError(
                f"the adams basis has weights for orders 1 to {len(table)}, not "
                f"{1 + len(points)}: lower the order"
            )
        row: tuple[float, ...] = table[len(points)]
        if implicit:
            row = (row[1], row[0], *row[2:])
        return [total * w for w in row]
    if rule.basis == "lam":
        if rule.formulation == "velocity":
            raise ScheduleError(
                "formulation velocity is integrated in model time: use basis t or adams"
            )
        return _taylor_weights(rule, start, points, land, total)
    older = _lagrange_integrals(rule, noise, start, points, land)
    return [total - sum(older[1:], older[0]), *older]


def _taylor_weights(
    rule: Rule, start: Level, points: Sequence[Level], land: Level, total: Tensor
) -> list[Tensor]:
    """The weights of sum_k A_k F^(k), with the derivatives F^(k) from differences to the start.

    A_k = +-(alpha'|sigma') h^{k+1} phi_{k+1}(-+h).
    """
    live = [
        p for p in points if not bool(torch.isinf(p.lam).any())
    ]  # a point at lam = -inf has weight 0 in the limit
    m = len(live)
    if m == 0 or bool(torch.isinf(start.lam).any()):
        return [total, *(torch.zeros_like(total) for _ in points)]
    if bool(torch.isinf(land.lam).any()):
        raise ScheduleError(
            "a step that lands on sigma = 0 must have order 1 in the lam basis: set order 1 for "
            "the last step"
        )
    h = land.lam - start.lam
    z, scale = (-h, land.alpha) if rule.formulation == "data" else (h, -land.sigma)
    phis = phi(z, m + 1)
    ratio = torch.stack(torch.broadcast_tensors(*((p.lam - start.lam) / h for p in live)), dim=-1)
    slopes = _derivative_rows(ratio, m)  # slopes[k-1][j]: weight of F_j - F_start in h^k F^(k)
    if rule.slope_points is not None and rule.slope_points < m:
        near = _derivative_rows(ratio[..., : rule.slope_points], rule.slope_points)[0]
        slopes[0] = [*near, *(torch.zeros_like(h) for _ in range(m - rule.slope_points))]
    weights = [torch.zeros_like(h) for _ in live]
    for k in range(1, m + 1):
        factor = scale * h * phis[k] * _relaxation(rule, k, h, z)
        weights = [w + factor * slope for w, slope in zip(weights, slopes[k - 1], strict=True)]
    filled = iter(weights)
    older = [
        torch.zeros_like(h) if bool(torch.isinf(p.lam).any()) else next(filled) for p in points
    ]
    return [total - sum(older[1:], older[0]), *older]


def _derivative_rows(ratio: Tensor, m: int) -> list[list[Tensor]]:
    """Rows a_k of T a_k = e_k, T_ij = ratio_j^i / i!: h^k F^(k) from m differences."""
    if m == 1:
        return [[1 / ratio[..., 0]]]
    if m == 2:
        r0, r1 = ratio[..., 0], ratio[..., 1]
        gap = r1 - r0
        return [[r1 / (r0 * gap), -r0 / (r1 * gap)], [-2 / (r0 * gap), 2 / (r1 * gap)]]
    powers = torch.cumprod(ratio[..., None, :].expand(*ratio.shape[:-1], m, m), dim=-2)
    factorials = torch.tensor([math.factorial(i + 1) for i in range(m)], dtype=torch.float64)
    inverse = torch.linalg.inv(powers / factorials[:, None])  # column k solves for e_k
    return [[inverse[..., j, k] for j in range(m)] for k in range(m)]


def _relaxation(rule: Rule, k: int, h: Tensor, z: Tensor) -> Tensor | float:
    """The factor 1 + R(h) of USF's derivative scalings.

    It acts on F'; "half_second" (DPM-Solver++ 3M) halves F'' instead.
    """
    name = rule.relaxation
    if name == "half_second":
        return 0.5 if k == 2 else 1.0
    if k != 1 or name == "none":
        return 1.0
    if name == "linear":
        return 1.0 + rule.coefficient * h
    if name == "exp":
        return 1 + 0.5 * torch.expm1(z)
    if name == "minus_exp":
        return 1 - 0.5 * torch.expm1(z)
    phi_1, phi_2 = phi(z, 2)  # e^z - 1 - z = z^2 phi_2, e^z - 1 = z phi_1
    if name == "bh2":
        return 0.5 * phi_1 / phi_2
    if name == "bh1":
        return 0.5 / phi_2
    raise ScheduleError(f"relaxation {name!r} is unknown: use one of {', '.join(RELAXATIONS)}")


@cache
def _gauss(n: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def _lagrange_integrals(
    rule: Rule, noise: NoiseSchedule, start: Level, points: Sequence[Level], land: Level
) -> list[Tensor]:
    """Integrals of the Lagrange polynomials of `points`, by Gauss-Legendre.

    The start's follows from the sum.
    In rho with the noise formulation and in t with velocity the integrand is a polynomial and few
    nodes are exact; otherwise it is smooth in lam (on a table it has kinks at the labels, where
    panels are cut).
    """
    exact = (rule.formulation, rule.basis) in (("noise", "rho"), ("velocity", "t"))
    if exact:
        x, w = _gauss(4)
        a, b = (start.rho, land.rho) if rule.basis == "rho" else (start.t, land.t)
        nodes = a[..., None] + (b - a)[..., None] * x
        measure = (
            (b - a)[..., None]
            * w
            * (land.alpha if rule.basis == "rho" else torch.ones_like(land.alpha))[..., None]
        )
        at = nodes
    else:
        if rule.formulation == "velocity":
            raise ScheduleError(
                "formulation velocity is integrated in model time: use basis t or adams"
            )
        if bool(torch.isinf(land.lam).any()) or bool(torch.isinf(start.lam).any()):
            raise ScheduleError(
                f"basis {rule.basis} needs finite lam at both ends for order > 1: set order 1 or "
                "end above sigma = 0"
            )
        lam, w = _panels(noise, start, land)
        at = (
            noise.t_of_lam(lam)
            if rule.basis == "t"
            else torch.exp(-rule.power * lam)
            if rule.basis == "power"
            else torch.exp(-lam)
        )
        if rule.formulation == "noise":
            measure = -land.alpha[..., None] * torch.exp(-lam) * w
        else:
            measure = land.sigma[..., None] * torch.exp(lam) * w
    here = [_basis_value(rule, p)[..., None] for p in (start, *points)]
    weights = []
    for j in range(1, len(here)):
        poly = torch.ones_like(at)
        for k in range(len(here)):
            if k != j:
                poly = poly * (at - here[k]) / (here[j] - here[k])
        weights.append((poly * measure).sum(-1))
    return weights


def _basis_value(rule: Rule, point: Level) -> Tensor:
    if rule.basis == "t":
        return point.t
    if rule.basis == "rho":
        return point.rho
    return torch.exp(-rule.power * point.lam)


def _panels(noise: NoiseSchedule, start: Level, land: Level) -> tuple[Tensor, Tensor]:
    """Quadrature nodes and weights in lam from start to land.

    Panels end at the kinks of a tabulated noise schedule.
    """
    table = getattr(noise, "table", None)
    if table is None:
        cuts = torch.linspace(0, 1, 5, dtype=torch.float64)
    else:
        low, high = float(land.t.detach().min()), float(start.t.detach().max())
        labels = torch.arange(math.ceil(max(low, 0)), math.floor(high) + 1, dtype=torch.float64)
        span = (land.lam - start.lam).detach()
        inner = (noise.lam(labels).flip(0) - start.lam.detach()[..., None]) / span[..., None]
        ends = torch.zeros_like(span)[..., None], torch.ones_like(span)[..., None]
        cuts = torch.cat([ends[0], inner.clamp(0, 1), ends[1]], dim=-1)
    x, w = _gauss(16 if table is None else 6)
    width = cuts.diff(dim=-1)
    unit = (cuts[..., :-1, None] + width[..., None] * x).flatten(-2)
    h = (land.lam - start.lam)[..., None]
    return start.lam[..., None] + h * unit, h * (width[..., None] * w).flatten(-2)


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i at c_i uses rows[i], the result uses `result`.

    Row sums equal c, `result` sums to 1.
    """

    c: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]

    def __post_init__(self) -> None:
        for c, row in zip(self.c, self.rows, strict=True):
            if abs(sum(row) - c) > 1e-12:
                raise ScheduleError(f"tableau row {row} does not sum to its node {c}")
        if abs(sum(self.result) - 1) > 1e-12 or len(self.result) != len(self.c):
            raise ScheduleError("tableau result weights must sum to 1, one for each stage")


# Names and members as in DEIS's rhoRK family; sources: Butcher, Numerical Methods for ODEs,
# sections 23 and 32.
TABLEAUS: dict[str, Tableau] = {
    "euler1": Tableau((0.0,), ((),), (1.0,)),
    "heun2": Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "midpoint2": Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "kutta3": Tableau((0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    "ral3": Tableau((0.0, 1 / 2, 3 / 4), ((), (1 / 2,), (0.0, 3 / 4)), (2 / 9, 3 / 9, 4 / 9)),
    "heun3": Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "vdh3": Tableau((0.0, 8 / 15, 2 / 3), ((), (8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "ssprk3": Tableau((0.0, 1.0, 1 / 2), ((), (1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "rk4": Tableau(
        (0.0, 1 / 2, 1 / 2, 1.0),
        ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 2 / 6, 2 / 6, 1 / 6),
    ),
}


def lagrange_at(nodes: Sequence[Tensor], at: Tensor) -> list[Tensor]:
    """Values at `at` of the Lagrange polynomials of `nodes`; they sum to 1."""
    values = []
    for j, node in enumerate(nodes):
        value = torch.ones_like(at)
        for k, other in enumerate(nodes):
            if k != j:
                value = value * (at - other) / (node - other)
        values.append(value)
    return values
