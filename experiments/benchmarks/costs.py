"""What to spend where: guidance patterns at equal cost, stages of calls side by side, their time.

    python -P -m fewstep.experiments.benchmarks.costs patterns --guidance 3 --cost 6 8
    python -P -m fewstep.experiments.benchmarks.costs stages --model digits --depth 4 5
    python -P -m fewstep.experiments.benchmarks.costs times

`patterns` fits every plan of a cost (or those named with --plans) and sets them against the best
named solver guided throughout, and guided in an interval. `stages` fits a program of `depth` calls
from the best named solver, gives each call company and fits again. Errors are squared distances to
the teacher's samples on fresh noise; ratios are to the best named solver at the first number of
calls, and the interval is that of the geometric mean. `times` prints the wall time of a stage of
two calls over that of one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from fewstep.experiments.models import digits, galaxy
from fewstep.samplers import Problem, sample, start
from fewstep.samplers.ode import start_scale
from fewstep.search.problem import conditions, noise_of
from fewstep.search.stages.plans import kept_sorts, rivals
from fewstep.search.stages.refine import Startable, refine
from fewstep.search.strategies.gauss_newton import Batch
from fewstep.search.tables import RefineTable
from fewstep.search.yardstick import geometric_ratio
from fewstep.space import ProgramSchedule
from fewstep.space.baselines import baseline, named
from fewstep.space.costs import pattern
from fewstep.space.growing import widened
from fewstep.space.plans import Plan, PlanDomain


class Bench:
    """A problem with its teacher's samples on training, held-out, choosing and fresh noise."""

    def __init__(self, problem: Problem, arguments: argparse.Namespace) -> None:
        self.problem, self.noise = problem, problem.denoiser.noise
        self.teacher = baseline("dpmpp3m/logsnr", self.noise, arguments.teacher)
        self.scale, self.seed = start_scale(self.teacher), arguments.seed
        sizes = {"train": arguments.train, "held": arguments.held, "choose": 128}
        self.batches = {name: self._batch(name, n) for name, n in sizes.items()}
        mean = self.batches["train"].target.mean(0)
        self.batches = {k: replace(b, constant=mean) for k, b in self.batches.items()}
        self.fresh = self._batch("fresh", arguments.fresh)
        self.table = RefineTable(
            samples=arguments.train, held=arguments.held, rounds=arguments.rounds, batch=128
        )

    def _batch(self, stream: str, count: int) -> Batch:
        z = noise_of(self.seed, stream, range(count), self.problem.shape)
        cond = conditions(self.problem, range(count)) or {}
        more = {"cond": cond, "guidance": self.problem.guidance}
        x = start(self.teacher, z)
        target = sample(self.teacher, self.problem.denoiser, x, **more)  # type: ignore[arg-type]
        return Batch(x, target, cond, self.problem.guidance)

    def errors(self, schedule: Startable, batch: Batch) -> torch.Tensor:
        """The error of each sample."""
        image, found = schedule.constant, []
        for part in replace(batch, constant=image, piece=256).pieces():
            r = part.residuals([schedule.program], self.problem.denoiser)[0]
            found.append(r.double().square().mean(-1))
        return torch.cat(found)

    def fit(self, schedule: Startable) -> Startable:
        """The schedule with its numbers fitted; sorts and stages stay."""
        train, held = self.batches["train"], self.batches["held"]
        table = kept_sorts(self.table)
        return refine([schedule], self.problem.denoiser, train, held, table).schedule

    def best(self, many: dict[str, Startable]) -> tuple[str, Startable]:
        """The schedule of least geometric mean error on noise of its own."""
        choose = self.batches["choose"]
        return min(many.items(), key=lambda kv: float(self.errors(kv[1], choose).log().mean()))


def told(name: str, errors: torch.Tensor, reference: torch.Tensor | None = None) -> None:
    """Print a line of statistics, and of ratios where there is a reference."""
    line = f"{name:28s} mean {errors.mean():.5f} median {errors.median():.5f} "
    line += f"q90 {errors.quantile(0.9):.5f}"
    if reference is not None:
        share, (low, high) = geometric_ratio(errors.numpy(), reference.numpy())
        line += f" | geometric {share:.4f} ({low:.4f}-{high:.4f})"
        line += f" mean {errors.mean() / reference.mean():.4f}"
        line += f" q90 {errors.quantile(0.9) / reference.quantile(0.9):.4f}"
    print(line, flush=True)


def plans(domain: PlanDomain, before: Plan = ()) -> Iterator[Plan]:
    """Every plan of a domain."""
    allowed = domain._allowed(before)
    if not allowed:
        yield before
    for call in allowed:
        yield from plans(domain, (*before, call))


def _rivals(bench: Bench, domain: PlanDomain) -> torch.Tensor:
    """The errors of the best named solver guided throughout; that of the best interval is told."""
    every = rivals(domain)
    full = {n: s for n, s in every.items() if "u" not in n.rpartition("/")[2]}
    name, whole = bench.best(full)
    reference = bench.errors(whole, bench.fresh)
    told(name, reference)
    name, part = bench.best({k: v for k, v in every.items() if k not in full})
    told(name, bench.errors(part, bench.fresh), reference)
    return reference


def patterns(arguments: argparse.Namespace) -> None:
    """Every plan of guided and unguided calls at each cost."""
    for scale in arguments.guidance:
        bench = Bench(digits.problem(scale), arguments)
        for cost in arguments.cost:
            domain = PlanDomain(bench.noise, cost, scale=scale)
            print(f"guidance {scale:g}, cost {cost}, {len(bench.fresh)} fresh samples")
            reference = _rivals(bench, domain) if arguments.rivals else None
            wanted = arguments.plans or []
            for plan in plans(domain):
                made = domain.member(plan)
                short = pattern(made.program)
                if not wanted or short in wanted:
                    told(f"fitted {short}", bench.errors(bench.fit(made), bench.fresh), reference)


def stages(arguments: argparse.Namespace) -> None:
    """Programs of `depth` stages, each of `width` calls."""
    problem = digits.problem() if arguments.model == "digits" else galaxy.problem()
    bench = Bench(problem, arguments)
    for depth in arguments.depth:
        name, best = bench.best(dict(named(bench.noise, depth)))
        reference = bench.errors(best, bench.fresh)
        print(f"{arguments.model}, {depth} stages, {len(bench.fresh)} fresh samples")
        told(name, reference)
        twice, other = bench.best(dict(named(bench.noise, 2 * depth)))
        told(f"{twice} at {2 * depth}", bench.errors(other, bench.fresh), reference)
        narrow = bench.fit(ProgramSchedule.of(best))
        for width in arguments.width:
            begun, found = time.process_time(), narrow
            if width > 1 and isinstance(narrow, ProgramSchedule):
                found = bench.fit(widened(narrow, [width] * depth))
            told(f"fitted {depth} x {width}", bench.errors(found, bench.fresh), reference)
            print(f"    {time.process_time() - begun:.0f} s of processor time")


def times(arguments: argparse.Namespace) -> None:
    """Wall time of a stage of two over that of one call, best of several."""
    problem = digits.problem()
    one = ProgramSchedule.of(baseline("ddim/quadratic", problem.denoiser.noise, 4))
    two = widened(one, [2] * 4)
    for size in (1, 16, 64):
        x = noise_of(0, "time", range(size), problem.shape)
        more = {"cond": conditions(problem, range(size)), "guidance": 1.0}
        spent: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(arguments.repeats):  # in turn: other work on the machine meets both
            for name, schedule in (("one", one), ("two", two)):
                begun = time.perf_counter()
                sample(schedule, problem.denoiser, x, **more)  # type: ignore[arg-type]
                spent[name].append(time.perf_counter() - begun)
        share = min(spent["two"]) / min(spent["one"])
        print(f"batch {size}: {share:.2f} times the time of one call")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.experiments.benchmarks.costs")
    parser.add_argument("what", choices=("patterns", "stages", "times"))
    parser.add_argument("--model", choices=("digits", "galaxy"), default="digits")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--cost", type=int, nargs="+", default=[6, 8])
    parser.add_argument("--plans", nargs="+", help="patterns to fit; none fits all")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 5])
    parser.add_argument("--width", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--teacher", type=int, default=64)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--held", type=int, default=256)
    parser.add_argument("--fresh", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    {"patterns": patterns, "stages": stages, "times": times}[arguments.what](arguments)


if __name__ == "__main__":
    main()
