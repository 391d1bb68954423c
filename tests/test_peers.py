"""The peers' recipes: each starts as its solver and learns; GITS's path is the cheapest one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fewstep.experiments.benchmarks import peers_gits
from fewstep.experiments.benchmarks.peers import report
from fewstep.experiments.benchmarks.peers_adam import Plan, fit, sample_errors
from fewstep.experiments.benchmarks.peers_forms import Discretised, NonStationary, Weighted
from fewstep.experiments.benchmarks.peers_verdict import ratios, write_tensor
from fewstep.experiments.benchmarks.refine import write_json
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.yardstick import geometric_ratio
from fewstep.samplers import sample
from fewstep.search.display import Display
from fewstep.space import ScheduleError
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from fewstep.space.unknowns import canonical
from tests.oracles import Mixture, recorded_mixture

VP = noises.VPLinear()
_SHARP = recorded_mixture(VP)
MODEL = Mixture(VP, _SHARP.weights, _SHARP.means, _SHARP.variances + 0.3)
IPNDM = baseline("ipndm3/quadratic", VP, 5)
FORMS = {
    "dyweight": (Weighted(VP, 5, "quadratic", first_free=False), IPNDM),
    "bns": (NonStationary(VP, IPNDM.program), IPNDM),
    "ld3": (Discretised(baseline("unipc3-bh1/edm", VP, 5)), baseline("unipc3-bh1/edm", VP, 5)),
}


def batch(seed: int, n: int = 64) -> Batch:
    x = torch.randn(n, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Batch(x, sample(baseline("dpmpp3m/logsnr", VP, 100), MODEL, x))


@pytest.mark.parametrize("name", FORMS)
def test_at_its_start_values_a_form_is_its_solver(name):
    form, solver = FORMS[name]
    program = form.program([group.value for group in form.groups()])
    here = canonical(program)
    here.require_equal(canonical(solver.program), 1e-8)


def test_a_free_first_gradient_costs_no_call():
    form = Weighted(VP, 4, "edm", first_free=True)
    assert form.program([group.value for group in form.groups()]).nfe == 4


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("dyweight", Plan(40_000)),
        ("bns", Plan(40_000)),
        ("bns", Plan(40_000, loss="log")),
        ("ld3", Plan(40_000)),
        ("ld3", Plan(40_000, soft=True)),
    ],
)
def test_adam_lowers_the_error_on_fresh_noise(name, plan):
    form, solver = FORMS[name]
    fresh = batch(3, 256)
    found = fit(form, MODEL, batch(1, 256), batch(2), plan, Display())
    before = sample_errors(solver.program, MODEL, fresh, fresh.x_T)
    after = sample_errors(found.program, MODEL, fresh, fresh.x_T)
    if plan.loss == "log":
        assert after.log().mean() < before.log().mean() - 0.1
    else:
        assert after.mean() < 0.9 * before.mean()
    assert found.after < found.before
    assert found.evaluations <= plan.budget


def test_a_fit_counts_every_image_and_a_backward_pass_as_two():
    form, _ = FORMS["dyweight"]
    asked = 0

    class Counting:
        noise = VP

        def __call__(self, x, t, *, cond=None, guidance=None):
            nonlocal asked
            asked += len(x) * (3 if torch.is_grad_enabled() else 1)
            return MODEL(x, t)

    plan = Plan(20_000, batch=16, soft=True)
    found = fit(form, Counting(), batch(1), batch(2, 32), plan, Display())
    assert found.evaluations == asked


def test_a_budget_below_one_step_says_so():
    form, _ = FORMS["dyweight"]
    with pytest.raises(ScheduleError, match="raise it"):
        fit(form, MODEL, batch(1), batch(2), Plan(1000), Display())


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
@pytest.mark.parametrize("factor", [0.9, 1.15])
def test_the_path_of_gits_is_the_cheapest_of_all(steps, factor):
    rng = np.random.default_rng(steps)
    table = torch.from_numpy(rng.normal(0.5, 1.0, (7, 7)))
    table[torch.tril_indices(7, 7).unbind()] = torch.inf

    def cost(path: tuple[int, ...]) -> float:
        return sum(
            factor**k * float(table[i, j]) for k, (i, j) in enumerate(itertools.pairwise(path))
        )

    paths = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), steps - 1)]
    assert tuple(peers_gits.cheapest(table, steps, factor)) == min(paths, key=cost)


def test_an_euler_step_costs_what_it_misses():
    few = batch(1, 8)
    times, z, D = peers_gits.trajectory(MODEL, few, "edm", steps=12)
    t = torch.tensor(times, dtype=torch.float64)
    levels = VP.sigma(t) / VP.alpha(t)
    miss = peers_gits.costs(levels, z, D, "distance")
    one = baseline("ddim/edm", VP, 12)  # DDIM is Euler in sigma/alpha
    y = one.program.r[3] * VP.alpha(t[3]) * z[3] + one.program.b[3, 3] * D[3]
    wanted = (y / VP.alpha(t[4]) - z[4]).norm(dim=-1).mean()
    assert miss[3, 4] == pytest.approx(float(wanted), rel=1e-9)
    off = peers_gits.costs(levels, z, D, "deviation")
    assert bool((off <= miss + 1e-12).all())  # no farther from the line than the miss itself
    assert bool(torch.isinf(off[torch.tril_indices(13, 13).unbind()]).all())


def test_the_table_compares_everything_with_the_best_named_solver_on_the_same_samples(tmp_path):
    rng = np.random.default_rng(1)
    other = np.exp(rng.normal(0, 1, 500))
    factors = {"named": 1.0, "bns": 0.5, "found": 0.25}
    for method, factor in factors.items():
        cell = {"model": "toy", "nfe": 5, "method": method, "variant": "v", "evaluations": 2000}
        write_json(tmp_path / f"toy_5_{method}.json", cell)
        errors = torch.from_numpy(factor * other)
        write_tensor(tmp_path / f"toy_5_{method}.safetensors", "errors", errors)
    rows = report(tmp_path).splitlines()[2:]
    assert [row.split(" | ")[2] for row in rows] == ["best named solver", "BNS", "fewstep"]
    assert (
        "| 0.500 (0.500–0.500) | 0.500 | 0.500 | 0.500 | 0.0% | 0.50 (0.50–0.50) | 2k |" in rows[1]
    )
    assert "| 0.250 (0.250–0.250) |" in rows[2]


def test_the_verdict_is_paired_and_one_bad_sample_hardly_moves_it():
    rng = np.random.default_rng(0)
    other = np.exp(rng.normal(0, 2, 2000))
    found = 0.25 * other * np.exp(rng.normal(0, 0.1, 2000))
    _, (low, high) = geometric_ratio(found, other)
    assert low < 0.25 < high < 1.02 * low
    found[0] *= 1e6
    assert ratios(found, other)["geometric"] == pytest.approx(0.25, rel=0.02)
    assert ratios(found, other)["mean"] > 10
