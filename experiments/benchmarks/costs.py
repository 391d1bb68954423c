"""What to spend where: guidance patterns and networks at equal cost, stages of calls, their time.

    python -P -m fewstep.experiments.benchmarks.costs patterns --guidance 3 7.5 --cost 6 8
    python -P -m fewstep.experiments.benchmarks.costs strategies --guidance 3 7.5 --cost 6 8
    python -P -m fewstep.experiments.benchmarks.costs networks --cost 3 4 5
    python -P -m fewstep.experiments.benchmarks.costs stages --model digits --depth 4 5
    python -P -m fewstep.experiments.benchmarks.costs times

`patterns` sets what S3 finds at a cost against the best named solver guided throughout, the best
guided in an interval, GG..G refined, and the best plan of the whole list (costs of `--whole` and
below): every plan gets a short fit, and the best few by it a long one from there. `strategies`
replays S3, random proposals and evolution against the scores of these short fits, and counts the
plans they score until one is within 10 % of the best. `networks` does as `patterns` with the
choice between two networks. `stages` fits a program of `depth` calls from the best named solver,
gives each call company and fits again. `times` prints the processor time of a stage of two calls
over that of one.

Errors are squared distances to the teacher's samples on fresh noise. What is measured is kept in
the folder `--out`; a run that was killed goes on from there, and one that is complete only prints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.experiments.models import digits, galaxy
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.refine import Startable, refine
from fewstep.predictors.settings import RefineTable
from fewstep.predictors.yardstick import Array, geometric_ratio
from fewstep.samplers import Problem, sample, start
from fewstep.samplers.ode import start_scale
from fewstep.samplers.prices import priced
from fewstep.samplers.problems import conditions
from fewstep.samplers.sample_noise import noise_of
from fewstep.search.strategies import Evaluated, Proposer
from fewstep.space import ProgramSchedule
from fewstep.space.baselines import baseline, named
from fewstep.space.costs import Prices, pattern
from fewstep.space.growing import widened
from fewstep.space.plans import Plan, PlanDomain, rivals

Called = tuple[str, Startable]
STRATEGIES = ("s3", "random", "evolution")
FEW, CHOSEN = 32, 6  # samples on which all named solvers run, and how many go on to more


class Notebook:
    """What has been measured, by name, in a JSON file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "costs.json"
        self._all: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a name, made and written down if it is new."""
        if name not in self._all:
            self._all[name] = make()
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(self._all))
            fresh.replace(self.path)
        return self._all[name]


class Bench:
    """A problem with its teacher's samples on training, held-out, choosing and fresh noise.

    Args:
        problem: the problem.
        arguments: of the command line.
        kept: where the teacher's samples and all results are kept.
        name: of the problem among them.
    """

    def __init__(
        self, problem: Problem, arguments: argparse.Namespace, kept: Notebook, name: str
    ) -> None:
        self.problem, self.noise = problem, problem.denoiser.noise
        self.kept, self.name, self.seed = kept, name, arguments.seed
        self.teacher = baseline("dpmpp3m/logsnr", self.noise, arguments.teacher)
        self.scale = start_scale(self.teacher)
        sizes = {"train": arguments.train, "held": arguments.held, "choose": arguments.choose}
        sizes["fresh"] = arguments.fresh
        self.batches = {stream: self._batch(stream, n) for stream, n in sizes.items()}
        mean = self.batches["train"].target.mean(0)
        self.batches = {k: replace(b, constant=mean) for k, b in self.batches.items()}
        samples, rounds = arguments.long
        sized = {"samples": samples, "batch": samples, "rounds": rounds, "held": arguments.held}
        self.table = RefineTable(**sized, short=tuple(arguments.short))

    def _batch(self, stream: str, count: int) -> Batch:
        z = noise_of(self.seed, stream, range(count), self.problem.shape)
        cond = conditions(self.problem, range(count)) or {}
        more = {"cond": cond, "guidance": self.problem.guidance}
        x, path = start(self.teacher, z), self.kept.folder / f"{self.name}-{stream}-{count}.pt"
        if not path.exists():
            made = [
                sample(
                    self.teacher,
                    self.problem.denoiser,
                    x[k : k + 256],
                    cond={n: v[k : k + 256] for n, v in cond.items()},
                    guidance=self.problem.guidance,
                )
                for k in range(0, count, 256)
            ]
            torch.save(torch.cat(made), path)
        return Batch(x, torch.load(path, weights_only=True), **more)  # type: ignore[arg-type]

    def errors(
        self, schedule: Startable, stream: str = "fresh", count: int | None = None
    ) -> Array:
        """The error of each sample."""
        batch = self.batches[stream].first(count or len(self.batches[stream]))
        batch = replace(batch, constant=schedule.constant, piece=256)
        return batch.errors([schedule.program], self.problem.denoiser)[0].numpy()

    def score(self, schedule: Startable, count: int | None = None) -> float:
        """The geometric mean error on the noise to choose by."""
        return float(np.exp(np.log(self.errors(schedule, "choose", count)).mean()))

    def fit(self, schedule: Startable, table: RefineTable | None = None) -> Startable:
        """The schedule with its numbers fitted; sorts and stages stay."""
        table = table or self.table.keeping_sorts()
        train = self.batches["train"].first(table.samples)
        held = self.batches["held"].first(table.held)
        return refine([schedule], self.problem.denoiser, train, held, table).schedule

    def first_scores(self, what: str, many: Mapping[str, Startable]) -> dict[str, float]:
        """The scores of named solvers on few samples."""
        scored: dict[str, float] = self.kept.get(
            f"{self.name} {what}", lambda: {name: self.score(s, FEW) for name, s in many.items()}
        )
        return scored

    def best(self, scored: Mapping[str, float], many: Mapping[str, Startable]) -> Called:
        """The schedule of least geometric mean error on noise of its own."""
        first = sorted(scored, key=scored.__getitem__)[:CHOSEN]
        name = min(first, key=lambda name: self.score(many[name]))
        return name, many[name]

    def row(self, name: str, make: Callable[[], Called]) -> tuple[str, Array]:
        """What a row of a table is called, and its errors on fresh noise."""

        def measured() -> list[Any]:
            said, schedule = make()
            return [said, [float(f"{e:.5g}") for e in self.errors(schedule)]]

        said, errors = self.kept.get(f"{self.name} {name}", measured)
        return said, np.array(errors)


def told(name: str, errors: Array, reference: Array) -> None:
    """Print a line of statistics, and their ratios to a reference's."""
    line = f"{name:44s} mean {errors.mean():.5f} median {np.median(errors):.5f} "
    line += f"q90 {np.quantile(errors, 0.9):.5f}"
    share, (low, high) = geometric_ratio(errors, reference)
    line += f" | geometric {share:.4f} ({low:.4f}-{high:.4f})"
    line += f" mean {errors.mean() / reference.mean():.4f}"
    line += f" median {np.median(errors) / np.median(reference):.4f}"
    print(line + f" q90 {np.quantile(errors, 0.9) / np.quantile(reference, 0.9):.4f}", flush=True)


def plans(domain: PlanDomain, before: Plan = ()) -> Iterator[Plan]:
    """Every plan of a domain."""
    allowed = domain._allowed(before)
    if not allowed:
        yield before
    for call in allowed:
        yield from plans(domain, (*before, call))


class _Long:
    """A member of a plan's domain, fitted in short and then long when it is asked for."""

    def __init__(self, bench: Bench, member: ProgramSchedule) -> None:
        self._bench, self._member = bench, member

    @cached_property
    def fitted(self) -> Startable:
        """The fitted program."""
        return self._bench.fit(self._bench.fit(self._member, self._bench.table.shortened()))

    def named(self, name: str) -> Called:
        """With a name."""
        return name, self.fitted

    def score(self) -> float:
        """Its score."""
        return self._bench.score(self.fitted)


class Plans:
    """The plans of a cost: their scores after a short fit, and what searches make of them."""

    def __init__(self, bench: Bench, domain: PlanDomain) -> None:
        self.bench, self.domain = bench, domain
        self.name, self.scores = f"cost {domain.cost:g}", dict[str, float]()
        self.rivals = rivals(domain)
        self.first = bench.first_scores(f"{self.name} rivals", self.rivals)

    def calls(self, schedule: ProgramSchedule) -> str:
        """The plan of a member, in short."""
        return pattern(schedule.program, guided=self.domain.scale is not None)

    def score(self, member: ProgramSchedule) -> float:
        """The score of a plan after its short fit."""
        calls = self.calls(member)

        def fitted() -> float:
            return self.bench.score(self.bench.fit(member, self.bench.table.shortened()))

        key = f"{self.bench.name} {self.name} short {calls}"
        self.scores[calls] = self.bench.kept.get(key, fitted)
        return self.scores[calls]

    def whole(self) -> list[str]:
        """All plans, the best by their short fits first."""
        found = {self.calls(m := self.domain.member(p)): self.score(m) for p in plans(self.domain)}
        return sorted(found, key=found.__getitem__)

    def search(
        self, strategy: str, seed: int, size: int, budget: int, until: Collection[str] = ()
    ) -> list[str]:
        """The distinct plans a strategy scores: `budget` of them, or until one of some."""
        seen: dict[str, float] = {}
        earlier = [Evaluated(s, self.first[name]) for name, s in self.rivals.items()]
        proposer = Proposer(strategy, self.domain, seed=seed, size=size, earlier=earlier)
        for generation in range(1, 1000):
            for proposal in proposer.propose(generation):
                score = self.score(proposal.schedule)
                seen.setdefault(self.calls(proposal.schedule), score)
                said = Evaluated(proposal.schedule, score, source=proposal.source)
                proposer.tell(said, proposal.trial)
            if len(seen) >= budget or not seen.keys().isdisjoint(until):
                break
        return list(seen)[:budget]

    def fitted(self, calls: Sequence[str], what: str) -> tuple[str, Array]:
        """The best of some plans after a long fit of each; the row of a table."""
        members = {self.calls(m := self.domain.member(p)): m for p in plans(self.domain)}
        bench, rows = self.bench, dict[str, tuple[float, Array]]()
        for name in calls:
            long = _Long(bench, members[name])
            _, errors = bench.row(f"{self.name} long {name}", partial(long.named, name))
            chosen = f"{bench.name} {self.name} chosen by {name}"
            rows[name] = bench.kept.get(chosen, long.score), errors
        best = min(rows, key=lambda n: rows[n][0])
        return f"{what}: {best}", rows[best][1]


def _named(bench: Bench, some: Plans) -> list[tuple[str, Array]]:
    """The rows of the best named solvers of equal cost, one for each kind of calls."""
    kinds: dict[str, dict[str, float]] = {}
    for name, score in some.first.items():
        calls = name.rpartition("/")[2]
        part = "interval" if some.domain.scale is not None and "u" in calls else "whole"
        kinds.setdefault("small" if "[" in calls else part, {})[name] = score

    def best(kind: str) -> Callable[[], Called]:
        return lambda: bench.best(kinds[kind], some.rivals)

    return [bench.row(f"{some.name} named {k}", best(k)) for k in sorted(kinds, reverse=True)]


def patterns(a: argparse.Namespace, kept: Notebook) -> None:
    """Plans of guided and unguided calls at each cost."""
    for scale in a.guidance:
        bench = Bench(digits.problem(scale), a, kept, f"digits{scale:g}")
        for cost in a.cost:
            some = Plans(bench, PlanDomain(bench.noise, cost, scale=scale))
            print(f"guidance {scale:g}, cost {cost}, {a.fresh} fresh samples", flush=True)
            rows = [*_named(bench, some), some.fitted(["G" * (cost // 2)], "refined")]
            every = some.whole() if cost <= a.whole else []
            budget = max(a.generation, len(every) // 5) if every else a.budget
            met = some.search("s3", a.seed, a.generation, budget)
            first = sorted(met, key=some.scores.__getitem__)[: a.top]
            rows.append(some.fitted(first, f"found, {len(met)} plans"))
            if every:
                rows.append(some.fitted(every[: a.top + 1], f"best of {len(every)} plans"))
                print("by short fits: " + ", ".join(f"{c} {some.scores[c]:.5f}" for c in every))
            for name, errors in rows:
                told(name, errors, rows[2][1])


def strategies(a: argparse.Namespace, kept: Notebook) -> None:
    """Plans scored until one is within 10 % of the best, by strategy and seed."""
    for scale in a.guidance:
        bench = Bench(digits.problem(scale), a, kept, f"digits{scale:g}")
        for cost in a.cost:
            some = Plans(bench, PlanDomain(bench.noise, cost, scale=scale))
            every = some.whole()
            good = {c for c in every if some.scores[c] <= 1.1 * some.scores[every[0]]}
            good = good if a.target is None else {*every} & {*a.target}
            print(f"guidance {scale:g}, cost {cost}: {len(good)} of {len(every)} plans are good")
            for strategy in a.strategies:
                needed = []
                for seed in range(a.seeds):
                    met = some.search(strategy, seed, a.generation, len(every), good)
                    needed.append(1 + min(met.index(c) for c in good if c in met))
                print(f"  {strategy:10s} {needed} mean {np.mean(needed):.1f}", flush=True)


def networks(a: argparse.Namespace, kept: Notebook) -> None:
    """Plans of two networks, unguided, at each cost."""
    problem = digits.problem(1.0, small=a.small)
    bench = Bench(problem, a, kept, "networks")
    prices = priced(Prices(), problem)
    for cost in a.cost:
        some = Plans(bench, PlanDomain(bench.noise, cost, prices, networks=("", "small")))
        print(f"networks, cost {cost}, {a.fresh} fresh samples", flush=True)
        rows = _named(bench, some)
        rows.append(some.fitted(["u" * cost], "refined, the model's own alone"))
        rows.append(some.fitted(["u[small]" * int(cost / a.small)], "refined, small alone"))
        met = some.search("s3", a.seed, a.generation, a.budget)
        first = sorted(met, key=some.scores.__getitem__)[: a.top]
        print(", ".join(f"{c} {some.scores[c]:.5f}" for c in sorted(met, key=some.scores.get)))  # type: ignore[arg-type]
        rows.append(some.fitted(first, f"found, {len(met)} plans"))
        for name, errors in rows:
            told(name, errors, rows[2][1])


class _Widened:
    """Fitted programs of some stages, by their width."""

    def __init__(self, bench: Bench, depth: int) -> None:
        self.bench, self.depth = bench, depth
        self._fitted = dict[int, ProgramSchedule]()

    def named(self, calls: int) -> Called:
        """The best named solver at a number of calls."""
        every = dict(named(self.bench.noise, calls))
        name, best = self.bench.best(self.bench.first_scores(f"{calls} calls", every), every)
        return f"{name} at {calls}", best

    def of(self, width: int) -> Called:
        """Fitted from the best named solver; from the stages of one call less, given one more."""
        begun = time.process_time()
        if width not in self._fitted:
            if width == 1:
                wide = ProgramSchedule.of(self.named(self.depth)[1])
            else:
                before = self.of(width - 1)[1]
                assert isinstance(before, ProgramSchedule)
                wide = widened(before, [*[1] * (width - 2), 2] * self.depth)
            self._fitted[width] = ProgramSchedule.of(self.bench.fit(wide))
        name = f"fitted {self.depth} x {width}, {time.process_time() - begun:.0f} s"
        return name, self._fitted[width]


def stages(a: argparse.Namespace, kept: Notebook) -> None:
    """Programs of `depth` stages, each of `width` calls."""
    problem = digits.problem() if a.model == "digits" else galaxy.problem()
    bench = Bench(problem, a, kept, a.model)
    for depth in a.depth:
        print(f"{a.model}, {depth} stages, {a.fresh} fresh samples", flush=True)
        fits = _Widened(bench, depth)
        rows = [bench.row(f"named at {n}", partial(fits.named, n)) for n in (depth, 2 * depth)]
        rows += [bench.row(f"stages {depth} x {w}", partial(fits.of, w)) for w in a.width]
        for name, errors in rows:
            told(name, errors, rows[0][1])


def times(a: argparse.Namespace, kept: Notebook) -> None:
    """Processor time of a stage of two over that of one call: the least and the median of many."""
    problem = digits.problem()
    one = ProgramSchedule.of(baseline("ddim/quadratic", problem.denoiser.noise, 4))
    two = widened(one, [2] * 4)
    for size in (1, 16, 64):
        x = noise_of(0, "time", range(size), problem.shape)
        more = {"cond": conditions(problem, range(size)), "guidance": 1.0}
        spent: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(a.repeats):  # in turn: other work on the machine meets both
            for name, schedule in (("one", one), ("two", two)):
                begun = time.process_time()
                sample(schedule, problem.denoiser, x, **more)  # type: ignore[arg-type]
                spent[name].append(time.process_time() - begun)
        least = min(spent["two"]) / min(spent["one"])
        middle = np.median(np.array(spent["two"]) / np.array(spent["one"]))
        print(f"batch {size}: {least:.2f} by the least times, {middle:.2f} the median of pairs")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.experiments.benchmarks.costs")
    kinds = {f.__name__: f for f in (patterns, strategies, networks, stages, times)}
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--out", type=Path, default=Path("runs/costs_benchmark"))
    parser.add_argument("--model", choices=("digits", "galaxy"), default="digits")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--cost", type=int, nargs="+", default=[6, 8])
    parser.add_argument("--whole", type=int, default=8, help="costs whose plans are all fitted")
    parser.add_argument("--budget", type=int, default=8, help="plans that S3 scores beyond")
    parser.add_argument("--generation", type=int, default=4)
    parser.add_argument("--top", type=int, default=2, help="plans that get a long fit")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--target", nargs="+", help="plans to look for instead of the best")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--small", type=float, default=0.25, help="price of the small network")
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 5])
    parser.add_argument("--width", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--teacher", type=int, default=64)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--held", type=int, default=256)
    parser.add_argument("--choose", type=int, default=128)
    parser.add_argument("--fresh", type=int, default=8192)
    parser.add_argument("--long", type=int, nargs=2, default=[512, 14], help="samples, rounds")
    parser.add_argument("--short", type=int, nargs=2, default=[64, 4], help="samples, rounds")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds[arguments.what](arguments, Notebook(arguments.out))


if __name__ == "__main__":
    main()
