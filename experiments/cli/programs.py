"""What a program does, call by call, in the words of solvers.

However a program's rows are written, its states are y_c = p_c x_T + k_c m + sum_j W_cj D_j. If
all outputs (and the image) were one clean image x0, y_c would be S_c x0 + N_c eps: it lies at
lam = log(S_c / N_c) of the trajectory, which need not be the level the network is told. Between
two calls

    y_{c+1} = (p_{c+1} / p_c) y_c + kappa m + sum_j beta_j D_j

is the one form in which x_T does not appear. The shares beta_j / (kappa + sum beta) say what the
step takes from each output, and are compared with those of the named multistep solvers on the same
times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fewstep.space.baselines import dpm, in_basis, multistep
from fewstep.space.costs import Prices, call_costs, networks_of, pattern, stages
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import finite_lam
from fewstep.space.program import Program, ProgramSchedule, written_out

_COUNTS = 0.005  # a share below this is not shown
_MET = 0.15  # a moment within this of a solver's counts as met
_NAMED = {
    "ddim": (1, dpm("data", 1)),
    "dpmpp2m": (2, dpm("data", 2)),
    "dpmpp3m": (3, dpm("data", 3)),
    "deis-tab1": (2, in_basis("t")),
    "deis-tab2": (3, in_basis("t")),
    "ipndm2": (2, in_basis("adams")),
    "ipndm3": (3, in_basis("adams")),
    "ipndm4": (4, in_basis("adams")),
}


@dataclass(frozen=True)
class Step:
    """What a program does from one call to the next.

    Args:
        asked: lam that the network is told.
        lies: lam at which the state asked lies.
        shares: of the outputs, newest first; they and `image` sum to 1.
        image: share of the constant image.
        order: effective order (`effective_order`).
        nearest: the named solver whose step is nearest, None where none exists on these times.
        distance: sum of absolute differences of the shares from its.
    """

    asked: float
    lies: float
    shares: tuple[float, ...]
    image: float
    order: float
    nearest: str | None
    distance: float


def described(schedule: ProgramSchedule) -> tuple[list[Step], float]:
    """The steps of a program, and the lam at which its sample lies."""
    noise, calls = schedule.noise, schedule.nfe
    asked = finite_lam(noise, schedule.program.t).tolist()
    end = float(finite_lam(noise, torch.tensor(schedule.end, dtype=torch.float64)))
    lies = _levels(schedule)
    own = shares(schedule.program)
    others = _named_shares(schedule)
    steps = []
    for c in range(calls):
        image, outputs = float(own[c, 0]), own[c, 1 : c + 2].flip(0).tolist()
        gaps = {name: float((own[c] - s[c]).abs().sum()) for name, s in others.items()}
        nearest = min(gaps, key=lambda name: gaps[name]) if gaps else None
        distance = float("nan") if nearest is None else gaps[nearest]
        land = asked[c + 1] if c + 1 < calls else end
        order = effective_order(outputs, asked[c::-1], land)
        steps.append(Step(asked[c], lies[c], tuple(outputs), image, order, nearest, distance))
    return steps, lies[-1]


def shares(program: Program) -> Tensor:
    """What each step takes of the image and of the outputs, oldest first: (C, 1 + C).

    Rows sum to 1, but to 0 where a step only corrects the state at its level.
    """
    p, rest, _ = written_out(program)
    keep = torch.where(p[:-1].abs() > 1e-12, p[1:] / p[:-1], torch.zeros_like(p[:-1]))
    taken = rest[1:] - keep[:, None] * rest[:-1]
    total, size = taken.sum(-1, keepdim=True), taken.abs().sum(-1, keepdim=True)
    return torch.where(total.abs() > 1e-9 * size, taken / total, taken)


def _levels(schedule: ProgramSchedule) -> list[float]:
    """lam at which each state, and the sample, lies."""
    p, rest, fresh = written_out(schedule.program)
    start = torch.tensor(schedule.start, dtype=torch.float64)
    signal = p * schedule.noise.alpha(start) + rest.sum(-1)
    noise = torch.hypot(p * schedule.noise.sigma(start), torch.linalg.vector_norm(fresh, dim=-1))
    found: list[float] = torch.log(signal.clamp(min=0) / noise).clamp(-12, 12).tolist()
    return found


def _named_shares(schedule: ProgramSchedule) -> dict[str, Tensor]:
    """Shares of the named solvers on a program's times; none where these do not decrease."""
    times, found = (*schedule.times, schedule.end), {}
    for name, (order, spec) in _NAMED.items():
        try:
            found[name] = shares(multistep(schedule.noise, times, order, spec=spec).program)
        except ScheduleError:
            continue
    return found


def effective_order(outputs: Sequence[float], lam: Sequence[float], land: float) -> float:
    """How high a polynomial in lam a step integrates: 1 + the moments that it meets.

    A step of order q in the data formulation has sum_j share_j (lam_j - lam_0)^d equal to the
    mean of (lam - lam_0)^d under the weight e^lam of the step, for d < q. A moment within 15 %
    counts as met; of the first that is not, the share that is reached counts.

    Args:
        outputs: shares, newest first.
        lam: where the outputs were asked, newest first.
        land: lam where the step ends.
    """
    h, order = land - lam[0], 1.0
    if h <= 0:
        return float("nan")
    x = np.linspace(0, h, 2001)
    weight = np.exp(x - h)
    for d in range(1, len(outputs)):
        have = sum(s * (at - lam[0]) ** d for s, at in zip(outputs, lam, strict=True))
        ratio = have / float((weight * x**d).sum() / weight.sum())
        if abs(ratio - 1) > _MET:
            return order + (ratio if 0 < ratio < 1 else 0.0)
        order += 1
    return order


def program_table(schedule: ProgramSchedule) -> Table:
    """One row per call: what is asked, what the step takes, and which named step it is like."""
    program, (steps, lands) = schedule.program, described(schedule)
    table = Table(box=None, pad_edge=False)
    asks = asked(program)
    heads = ["call", "t", "lam", "state at lam", "newest", "older (newest first)", "order"]
    extra = [name for name, shown in _extras(program).items() if shown]
    for head in [*heads, *extra, "nearest", "distance"]:
        table.add_column(head, justify="left" if head.startswith("older") else "right")
    for c, step in enumerate(steps):
        older = step.shares[1:]
        most = max((i + 1 for i, s in enumerate(older) if abs(s) > _COUNTS), default=0)
        off = abs(step.lies - step.asked) > _COUNTS
        values = {
            "image": f"{step.image:.3f}",
            "noise": f"{float(program.g[c]):.4g}",
            "asks": asks[c],
        }
        table.add_row(
            *(str(c), f"{float(program.t[c]):.5g}", f"{step.asked:.3f}"),
            f"{step.lies:.3f}" if off else f"[dim]{step.lies:.3f}[/dim]",
            f"{step.shares[0]:.3f}" if most else f"[dim]{step.shares[0]:.3f}[/dim]",
            " ".join(f"{s:.3f}" for s in older[:most]) or "[dim]–[/dim]",
            "–" if math.isnan(step.order) else f"{step.order:.2g}",
            *(values[name] for name in extra),
            *(("–", "–") if step.nearest is None else (step.nearest, f"{step.distance:.2g}")),
        )
    table.caption = f"the sample lies at lam {lands:.3f}; shares of a step sum to 1"
    return table


def _extras(program: Program) -> dict[str, bool]:
    """Columns that not every program has."""
    return {
        "image": program.uses_constant,
        "noise": program.stochastic,
        "asks": has_sorts(program),
    }


def has_sorts(program: Program) -> bool:
    """Whether its calls differ in sort or run side by side, or it sets their guidance."""
    return (
        program.guidance is not None or program.network is not None or program.depth < program.nfe
    )


def asked(program: Program) -> list[str]:
    """What each call asks, in words."""
    found = []
    scales = None if program.guidance is None else program.guidance.tolist()
    names = networks_of(program)
    for stage in stages(program):
        for c in stage:
            words = [] if scales is None else [f"guided {scales[c]:.4g}"]
            words = ["unguided"] if scales is not None and scales[c] == 1 else words
            words += [f"network {names[c]}"] if names[c] else []
            words += [f"beside call {stage[0]}"] if c != stage[0] else []
            found.append(", ".join(words) or "–")
    return found


def sorts_line(program: Program) -> str:
    """The calls of a program in one line: how many of each sort, and what they cost."""
    line = f"{program.nfe} calls in {program.depth} stages, {pattern(program)}"
    if program.guidance is not None:
        once = int((program.guidance == 1).sum())
        line += (
            f": {once} unguided (u) ask the network once, {program.nfe - once} guided (G) twice"
        )
    if program.network is not None:
        return f"{line}; a name in brackets is another network than the model's own"
    evaluations = call_costs(program, Prices())
    return f"{line}; {sum(evaluations):g} network evaluations with guidance"


def program_differences(a: ProgramSchedule, b: ProgramSchedule) -> list[str]:
    """What differs between two programs of one noise schedule and equal calls, a line each."""
    lines = []
    for name in ("start", "end", "options"):
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            lines.append(f"{name}: {x} and {y}")
    (first, first_ends), (second, second_ends) = described(a), described(b)
    guided = [p.program.guidance for p in (a, b)]
    for c, (x, y) in enumerate(zip(first, second, strict=True)):
        pairs = [
            ("t", float(a.program.t[c]), float(b.program.t[c])),
            ("state at lam", x.lies, y.lies),
            ("image", x.image, y.image),
            *(
                ("newest" if j == 0 else f"output {j} older", s, t)
                for j, (s, t) in enumerate(zip(x.shares, y.shares, strict=True))
            ),
        ]
        if guided[0] is not None and guided[1] is not None:
            pairs.append(("guidance", float(guided[0][c]), float(guided[1][c])))
        for name, s, t in pairs:
            if abs(s - t) > 1e-9 * (1 + abs(t)):
                lines.append(f"call {c}, {name}: {s:.5g} and {t:.5g}")
    if a.program.network != b.program.network or a.program.depth != b.program.depth:
        lines.append(f"calls: {pattern(a.program)} and {pattern(b.program)}")
    if (guided[0] is None) != (guided[1] is None):
        lines.append(f"guidance of each call: given in {'B' if guided[0] is None else 'A'} only")
    if abs(first_ends - second_ends) > 1e-9:
        lines.append(f"sample at lam: {first_ends:.5g} and {second_ends:.5g}")
    return lines
