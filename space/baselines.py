"""The named solvers times the named grids, as ordinary schedules.

A named solver is a recipe for steps; a grid a recipe for times. `named(noise, nfe)` gives every
pair that exists at an NFE, keyed "solver/grid" (or "solver/grid/low" with the lower-order ending).
All grids run from the noise schedule's first time to its last.

Conventions: DPM-Solver++ 2M and 3M as in the standard release (midpoint weights, second difference
times 1); UniPC as in its
standalone code; DEIS degree d uses d + 1 points; iPNDM applies uniform-grid Adams weights on any
grid; Heun is EDM's algorithm 2 (two calls a step, one in the last, so NFE is odd); DDPM is the
ancestral step (fresh noise: compare it by distribution only). S-PNDM and F-PNDM are PNDM's bases
with their true cost, 1 and 9 calls more than steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import OdeSchedule, StepSpec

GRIDS = ("time", "quadratic", "logsnr", "edm")


def grid(
    noise: NoiseSchedule,
    n_steps: int,
    kind: str,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
) -> tuple[float, ...]:
    """N+1 decreasing times.

    Args:
        noise: the noise schedule.
        n_steps: N >= 1.
        kind: "time" uniform in t; "quadratic" uniform in sqrt(t); "logsnr" uniform in lam; "edm"
            uniform in (sigma/alpha)^(1/7).
        t_start: first time, default the noise schedule's.
        t_end: last time, default the noise schedule's.

    Raises:
        ScheduleError: an unknown grid, or a range it cannot span.
    """
    default = noise.t_range
    a, b = (default[0] if t_start is None else t_start), (default[1] if t_end is None else t_end)
    if n_steps < 1 or not a > b:
        raise ScheduleError(
            f"a grid of {n_steps} steps from {a} to {b}: N >= 1 and a first time above the last "
            "are needed"
        )
    share = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
    ends = torch.tensor([a, b], dtype=torch.float64)
    if kind == "time":
        t = _power(ends, share, 1.0)
    elif kind == "quadratic":
        t = _power(ends, share, 2.0)
    elif kind in ("logsnr", "edm"):
        lam = noise.lam(ends).clamp(
            min=-7.0
        )  # a rectified flow starts at lam = -inf; its first time stays exact below
        if bool(torch.isinf(lam).any()):
            raise ScheduleError(
                f"grid {kind} cannot end at sigma = 0: set t_end above {noise.t_data}"
            )
        inner = (
            lam[0] + share * (lam[1] - lam[0])
            if kind == "logsnr"
            else -torch.log(_power(torch.exp(-lam), share, 7.0))
        )
        t = noise.t_of_lam(inner)
    else:
        raise ScheduleError(f"grid {kind!r} is unknown: use one of {', '.join(GRIDS)}")
    times: list[float] = t.tolist()
    return (a, *times[1:-1], b)


def _power(ends: Tensor, share: Tensor, power: float) -> Tensor:
    roots = ends ** (1 / power)
    return (roots[0] + share * (roots[1] - roots[0])) ** power


def orders(n_steps: int, order: int, *, lower_final: bool) -> list[int]:
    """Orders after warm-up (p <= i + 1) and, if asked, the lower-order ending (p <= N - i)."""
    return [min(order, i + 1, n_steps - i if lower_final else order) for i in range(n_steps)]


def multistep(
    noise: NoiseSchedule,
    times: Sequence[float],
    order: int,
    *,
    lower_final: bool = False,
    spec: Callable[[int, bool], dict[str, Any]],
) -> OdeSchedule:
    """A multistep schedule: step i has its warmed-up order p and the fields spec(p, last)."""
    n = len(times) - 1
    steps = [
        StepSpec(order=p, **spec(p, i == n - 1))
        for i, p in enumerate(orders(n, order, lower_final=lower_final))
    ]
    return OdeSchedule(noise=noise, times=tuple(times), steps=tuple(steps))


def dpm(
    formulation: str, order: int, *, taylor: bool = False, true_second: bool = False
) -> Callable[[int, bool], dict[str, Any]]:
    """DPM-Solver (noise) or DPM-Solver++ (data) multistep fields.

    Midpoint weights at order 2 (exact ones with `taylor`), halved second difference at order 3
    (not with `true_second`).
    """

    def spec(p: int, last: bool) -> dict[str, Any]:
        relaxation = "none"
        if p == 2 and not taylor:
            relaxation = "bh2"
        elif p == 3 and not true_second:
            relaxation = "half_second"
        return {"formulation": formulation, "relaxation": relaxation}

    return spec


def unipc(variant: str, formulation: str = "data") -> Callable[[int, bool], dict[str, Any]]:
    """UniPC fields: B(h) acts in the order-2 predictor and the order-1 corrector only.

    No corrector in the last step.
    """

    def spec(p: int, last: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "formulation": formulation,
            "relaxation": variant if p == 2 else "none",
        }
        if not last:
            fields |= {"corrector": "reuse", "corrector_relaxation": variant if p == 1 else "none"}
        return fields

    return spec


def in_basis(basis: str) -> Callable[[int, bool], dict[str, Any]]:
    """Noise formulation in a basis: DEIS ("t", "rho", "lam" = log rho) and iPNDM ("adams")."""
    return lambda p, last: {"formulation": "noise", "basis": basis}


def s_pndm(n_steps: int) -> tuple[StepSpec, ...]:
    """S-PNDM: a pseudo-Heun start, then two-step Adams; n_steps + 1 calls, n_steps >= 2.

    References: PNDM, Liu et al. (arXiv 2202.09778), section 3.3.
    """
    _more_than(n_steps, 1)
    start = StepSpec(formulation="noise", basis="adams", corrector="reeval")
    return (start, *(StepSpec(order=2, formulation="noise", basis="adams"),) * (n_steps - 1))


def f_pndm(n_steps: int, basis: Literal["t", "label"] = "t") -> tuple[StepSpec, ...]:
    """F-PNDM: three pseudo Runge-Kutta starts, then four-step Adams; n_steps + 9 calls.

    Args:
        n_steps: steps, >= 4.
        basis: where a stage lies: "t", or "label" as the released code truncates its level.

    References: PNDM, Liu et al. (arXiv 2202.09778), section 3.3.
    """
    _more_than(n_steps, 3)
    start = StepSpec(formulation="noise", basis=basis, tableau="rk4")
    rest = StepSpec(order=4, formulation="noise", basis="adams")
    return (start,) * 3 + (rest,) * (n_steps - 3)


def _more_than(n_steps: int, starts: int) -> None:
    if n_steps <= starts:
        raise ScheduleError(f"{n_steps} steps: more than {starts} are needed, the rest are starts")


def _recipes() -> dict[str, tuple[int, Callable[[int, bool], dict[str, Any]]]]:
    table: dict[str, tuple[int, Callable[[int, bool], dict[str, Any]]]] = {
        "ddim": (1, dpm("data", 1))
    }
    table |= {f"dpmpp{p}m": (p, dpm("data", p)) for p in (2, 3)}
    table |= {f"unipc{p}-{v}": (p, unipc(v)) for p in (2, 3) for v in ("bh1", "bh2")}
    for name, basis in (("tab", "t"), ("rhoab", "rho"), ("logrho", "lam")):
        table |= {f"deis-{name}{d}": (d + 1, in_basis(basis)) for d in (1, 2, 3)}
    table |= {f"ipndm{p}": (p, in_basis("adams")) for p in (2, 3, 4)}
    return table


_MULTISTEP = _recipes()
_PNDM: dict[str, tuple[Callable[[int], tuple[StepSpec, ...]], int, int]] = {
    "s-pndm": (s_pndm, 1, 3),
    "f-pndm": (f_pndm, 9, 13),
}  # steps, extra calls, least NFE
SOLVERS = (*_MULTISTEP, "ipndm1", "heun", "s-pndm", "f-pndm", "ddpm")


def baseline(
    name: str,
    noise: NoiseSchedule,
    nfe: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
) -> OdeSchedule:
    """A named solver as a schedule.

    Args:
        name: "solver/grid" or "solver/grid/low", e.g. "dpmpp2m/logsnr"; solvers in `SOLVERS`,
            grids in `GRIDS`.
        noise: the noise schedule.
        nfe: network calls, >= 1.
        t_start: first time, default the noise schedule's.
        t_end: last time, default the noise schedule's.

    Raises:
        ScheduleError: unknown names, or a solver that does not exist at this NFE (Heun at an even
            one).
    """
    parts = name.split("/")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] != "low"):
        raise ScheduleError(
            f"baseline {name!r}: write solver/grid or solver/grid/low, e.g. dpmpp2m/logsnr"
        )
    solver, kind, low = parts[0], parts[1], len(parts) == 3
    times = grid(noise, _steps_of(solver, nfe), kind, t_start=t_start, t_end=t_end)
    schedule = on_times(solver, noise, times, low=low)
    return schedule.model_copy(update={"provenance": {"baseline": name}})


def _steps_of(solver: str, nfe: int) -> int:
    """How many steps of a named solver make `nfe` calls."""
    if nfe < 1:
        raise ScheduleError(f"nfe {nfe} must be at least 1")
    if solver == "heun" and nfe % 2 == 0:
        raise ScheduleError(
            f"heun makes an odd number of calls, not {nfe}: use {nfe - 1} or {nfe + 1}"
        )
    if solver in _PNDM and nfe < _PNDM[solver][2]:
        raise ScheduleError(f"{solver} makes at least {_PNDM[solver][2]} calls, not {nfe}")
    if solver == "heun":
        return (nfe + 1) // 2
    return nfe - _PNDM[solver][1] if solver in _PNDM else nfe


def on_times(
    solver: str, noise: NoiseSchedule, times: Sequence[float], *, low: bool = False
) -> OdeSchedule:
    """A named solver on times of one's own.

    Args:
        solver: one of `SOLVERS`; "euler" is "ddim", which it equals in every frame.
        noise: the noise schedule of the times.
        times: N+1 decreasing times, the last one where the sample lands. Onto clean data, which
            lies infinitely far in lam, the last step of a multistep solver has order 1.
        low: with the lower-order ending of multistep solvers.

    Raises:
        ScheduleError: an unknown solver, too few steps for it, or times that do not decrease.
    """
    solver = "ddim" if solver == "euler" else solver
    n = len(times) - 1
    steps: tuple[StepSpec, ...]
    if solver == "heun":
        two = StepSpec(formulation="noise", basis="rho", tableau="heun2")
        steps = (two,) * (n - 1) + (StepSpec(formulation="noise"),)
    elif solver == "ddpm":
        steps = (StepSpec(eta=1.0),) * n
    elif solver in _PNDM:
        steps = _PNDM[solver][0](n)
    elif solver in _MULTISTEP or solver == "ipndm1":
        order, spec = _MULTISTEP.get(solver) or (1, in_basis("adams"))
        ps = orders(n, order, lower_final=low)
        if ps and times[-1] <= noise.t_data and spec(1, True).get("basis", "lam") in ("lam", "t"):
            ps[-1] = 1
        steps = tuple(StepSpec(order=p, **spec(p, i == n - 1)) for i, p in enumerate(ps))
    else:
        raise ScheduleError(f"solver {solver!r} is unknown: use one of {', '.join(SOLVERS)}")
    return OdeSchedule(noise=noise, times=tuple(times), steps=steps)


def at_other_nfe(schedule: OdeSchedule | ProgramSchedule, nfe: int) -> OdeSchedule:
    """DPM-Solver++ 2M on a schedule's times, interpolated in lam to `nfe` calls.

    For a number of calls that nobody searched. The first and the last time are kept; a last step
    onto clean data stays the last step.

    Raises:
        ScheduleError: nfe below 1.
    """
    if nfe < 1:
        raise ScheduleError(f"num_inference_steps {nfe} must be at least 1")
    noise, times = schedule.noise, list(schedule.times)
    if isinstance(schedule, ProgramSchedule):
        times = [schedule.start, *times[1:], schedule.end]
    times = [t for i, t in enumerate(times) if i == 0 or t < min(times[:i])]  # Runge-Kutta stages
    data = times[-1] <= noise.t_data
    inner = times[:-1] if data and len(times) > 2 else times
    if data and len(times) <= 2:
        inner = [times[0], noise.t_range[1]]
    t = torch.tensor(inner, dtype=torch.float64)
    lam = finite_lam(noise, t)
    at = torch.linspace(0, len(t) - 1, nfe if data else nfe + 1, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(t) - 2)
    found = noise.t_of_lam(lam[low] + (at - low) * (lam[low + 1] - lam[low])).tolist()
    grid_times = [times[0], *found[1:]] if data else [times[0], *found[1:-1]]
    return multistep(noise, (*grid_times, times[-1]), 2, lower_final=True, spec=dpm("data", 2))


def named(
    noise: NoiseSchedule, nfe: int, *, t_start: float | None = None, t_end: float | None = None
) -> dict[str, OdeSchedule]:
    """Every named solver and grid that exists at this NFE; equal samplers under one name.

    DDPM is left out: it adds noise and has no endpoint to compare.
    """
    found: dict[str, OdeSchedule] = {}
    seen: set[str] = set()
    for solver in (*_MULTISTEP, "heun", *_PNDM):
        for kind in GRIDS:
            for ending in ("", "/low"):
                if solver not in _MULTISTEP and ending:
                    continue
                try:
                    schedule = baseline(
                        f"{solver}/{kind}{ending}", noise, nfe, t_start=t_start, t_end=t_end
                    )
                    digest = schedule.digest
                except ScheduleError:  # e.g. a basis that cannot start at alpha = 0
                    continue
                if digest not in seen:
                    seen.add(digest)
                    found[f"{solver}/{kind}{ending}"] = schedule
    return found
