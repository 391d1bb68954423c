"""Time shift: none, the variance rule at its best, searched constant offsets; DEIS bases.

    python -m fewstep.experiments.benchmarks.shift shift --model digits --nfe 5 10
    python -m fewstep.experiments.benchmarks.shift deis --model digits --nfe 5 8 10
    python -m fewstep.experiments.benchmarks.shift basis --model digits --nfe 5 8 10

Mean squared error of the end point per element on fresh TEST noise, against a teacher of many
calls; the rule's window, cutoff, semantics and data variance are chosen on TUNE noise over a grid,
the constants (query = start per step, or land per step) fitted there by coordinate search, and so
is a basis per step. Ratios with 95 % paired bootstrap intervals.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.yardstick import bootstrap_ratio
from fewstep.samplers import Problem, sample
from fewstep.samplers.shift import training_step
from fewstep.space import FewstepError, OdeSchedule
from fewstep.space.baselines import GRIDS, baseline

TUNE, TEST = 6000, 9500  # seeds of the noise
TEACHER, TEACHER_CALLS = "dpmpp3m/logsnr/low", 150
BASES = ("ddim/time", "dpmpp2m/time", "s-pndm/time")
DEIS = ("tab", "rhoab", "logrho")


class ShiftBench:
    """A model, and its noise and teacher on both streams."""

    def __init__(self, model: str, tune: int, test: int, grids: Sequence[str] = GRIDS) -> None:
        self.grids = grids
        if model == "digits":
            from fewstep.experiments.models import digits as module
        else:
            from fewstep.experiments.models import galaxy as module  # type: ignore[no-redef]
        self.problem: Problem = module.problem()
        self.noise = self.problem.denoiser.noise
        self.streams = {"tune": self._stream(TUNE, tune), "test": self._stream(TEST, test)}

    def _stream(self, seed: int, n: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        x_T = torch.randn(n, *self.problem.shape, generator=torch.Generator().manual_seed(seed))
        cond = self.problem.cond(torch.arange(n)) if self.problem.cond else {}
        teacher = baseline(TEACHER, self.noise, TEACHER_CALLS)
        return x_T, cond, sample(teacher, self.problem.denoiser, x_T, cond=cond)

    def errors(self, schedule: OdeSchedule, stream: str) -> np.ndarray:
        """End point error of every sample; inf where the schedule cannot run."""
        x_T, cond, target = self.streams[stream]
        try:
            x = sample(schedule, self.problem.denoiser, x_T, cond=cond)
        except FewstepError:
            return np.full(len(x_T), np.inf)
        return (x - target).double().square().flatten(1).mean(1).numpy()

    def score(self, schedule: OdeSchedule) -> float:
        """Mean on the tuning noise."""
        return float(self.errors(schedule, "tune").mean())


def rules(base: OdeSchedule, bench: ShiftBench) -> tuple[OdeSchedule, str]:
    """The variance rule at its best window, cutoff, semantics and data variance."""
    unit = training_step(base)
    top = base.times[0]
    variance = float(bench.streams["tune"][2].flatten(1).var(1).mean())
    found = []
    for semantics, window, cutoff, v in itertools.product(
        ("paper", "pnm"), (5, 20, 60), (0.2, 0.5), (0.0, variance)
    ):
        option = {
            "rule": "variance",
            "window": window,
            "cutoff": cutoff * top,
            "semantics": semantics,
            "data_variance": v,
        }
        schedule = base.model_copy(update={"options": {"time_shift": option}})
        name = f"{semantics}, window {window}, cutoff {cutoff:g} T, v {v:.2g}"
        found.append((bench.score(schedule), name, schedule))
    _, name, schedule = min(found, key=lambda each: each[0])
    return schedule, f"{name} (1 step = {unit:g})"


def constants(base: OdeSchedule, bench: ShiftBench, passes: int = 2) -> tuple[OdeSchedule, str]:
    """The better of searched landing offsets and searched query = start offsets."""
    made = [
        (_coordinate(base, bench, fields, passes), " = ".join(fields))
        for fields in (("dt_land",), ("dt_query", "dt_start"))
    ]
    (_, schedule), name = min(made, key=lambda each: each[0][0])
    unit = training_step(base)
    offsets = [getattr(s, name.split(" = ")[0]) / unit for s in schedule.steps]
    return schedule, f"{name} {' '.join(f'{o:+.0f}' for o in offsets)} training steps"


def _coordinate(
    base: OdeSchedule, bench: ShiftBench, fields: Sequence[str], passes: int
) -> tuple[float, OdeSchedule]:
    """One step after another tries a few offsets, as shares of its own length."""
    best, lowest = base, bench.score(base)
    for k in range(passes):
        for i in range(base.n_steps):
            if fields[0] != "dt_land" and i == 0:
                continue  # x_T has the level of the first time
            if fields[0] == "dt_land" and i == base.n_steps - 1:
                continue  # the end is the end
            length = base.times[i] - base.times[i + 1]
            centre = getattr(best.steps[i], fields[0])
            for share in (-0.3, -0.15, 0.15, 0.3):
                offset = centre + share * length * 0.5**k
                steps = list(best.steps)
                steps[i] = steps[i].model_copy(update=dict.fromkeys(fields, offset))
                trial = best.model_copy(update={"steps": tuple(steps)})
                try:
                    score = bench.score(trial)
                except FewstepError:
                    continue
                if score < lowest:
                    best, lowest = trial, score
    return lowest, best


def compare(bench: ShiftBench, nfes: Sequence[int]) -> list[str]:
    """The table of the time shift."""
    lines = [
        "| NFE | base | error | rule / base | constants / base | constants / rule | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for nfe, name in itertools.product(nfes, BASES):
        base = baseline(name, bench.noise, nfe)
        rule, how = rules(base, bench)
        fixed, where = constants(base, bench)
        plain, ruled, moved = (bench.errors(s, "test") for s in (base, rule, fixed))
        lines.append(
            f"| {nfe} | {name} | {plain.mean():.3g} | {ratio(ruled, plain)} "
            f"| {ratio(moved, plain)} | {ratio(moved, ruled)} | {how}; {where} |"
        )
        print(lines[-1], flush=True)
    return lines


def deis(bench: ShiftBench, nfes: Sequence[int]) -> list[str]:
    """Basis x grid, the best degree of 1..3 chosen on TUNE noise."""
    lines = [
        "| NFE | basis | " + " | ".join(GRIDS) + " |",
        "|---|---|" + "---|" * len(GRIDS),
    ]
    for nfe, basis in itertools.product(nfes, (*DEIS, "ipndm")):
        cells = []
        for kind in GRIDS:
            names = [
                f"ipndm{d + 1}/{kind}" if basis == "ipndm" else f"deis-{basis}{d}/{kind}"
                for d in (1, 2, 3)
            ]
            made = {n: baseline(n, bench.noise, nfe) for n in names}
            best = min(names, key=lambda n, made=made: bench.score(made[n]))  # type: ignore[misc]
            error = bench.errors(made[best], "test").mean()
            cells.append(f"{error:.3g} ({best.split('/')[0][-1]})")
        lines.append(f"| {nfe} | {basis} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def basis(bench: ShiftBench, nfes: Sequence[int]) -> list[str]:
    """A basis per step, out of t, lam, adams and rho^p, beside the best one for all steps.

    Grid and degree stay those of the best single basis; two passes of coordinate search.
    """
    lines = [
        "| NFE | grid | one basis | its error | basis per step | per step / one | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for nfe, kind in itertools.product(nfes, bench.grids):
        names = [f"deis-{b}{d}/{kind}" for b in DEIS for d in (1, 2, 3)]
        names += [f"ipndm{d}/{kind}" for d in (2, 3, 4)]
        made = {n: baseline(n, bench.noise, nfe) for n in names}
        scores = {n: bench.score(schedule) for n, schedule in made.items()}
        name = min(scores, key=lambda n: scores[n])
        best, lowest = made[name], scores[name]
        for _, i in itertools.product(range(2), range(1, nfe)):
            for change in _CHOICES:
                steps = list(best.steps)
                steps[i] = steps[i].model_copy(update=change)
                trial = best.model_copy(update={"steps": tuple(steps)})
                score = bench.score(trial)
                if score < lowest:
                    best, lowest = trial, score
        one, each = bench.errors(made[name], "test"), bench.errors(best, "test")
        chosen = [f"rho^{s.power:g}" if s.basis == "power" else s.basis for s in best.steps[1:]]
        lines.append(
            f"| {nfe} | {kind} | {name.split('/')[0]} | {one.mean():.3g} | {each.mean():.3g} "
            f"| {ratio(each, one)} | {' '.join(chosen)} |"
        )
        print(lines[-1], flush=True)
    return lines


_CHOICES: list[dict[str, object]] = [
    {"basis": "t"},
    {"basis": "lam"},
    {"basis": "adams"},
    *({"basis": "power", "power": p} for p in (0.15, 0.3, 0.5, 0.75, 1.0, 1.5)),
]


def ratio(a: np.ndarray, b: np.ndarray) -> str:
    """Ratio of means with its interval, as text."""
    low, high = bootstrap_ratio(a, b, np.mean)
    return f"{a.mean() / b.mean():.2f} [{low:.2f}, {high:.2f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("shift", "deis", "basis"))
    parser.add_argument("--model", choices=("digits", "galaxy"), default="digits")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--grids", nargs="+", default=GRIDS, choices=GRIDS, help="of basis")
    parser.add_argument("--tune", type=int, default=32)
    parser.add_argument("--test", type=int, default=128)
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    bench = ShiftBench(a.model, a.tune, a.test, a.grids)
    run: Callable[[ShiftBench, Sequence[int]], list[str]]
    run = {"shift": compare, "deis": deis, "basis": basis}[a.what]
    run(bench, a.nfe)


if __name__ == "__main__":
    main()
