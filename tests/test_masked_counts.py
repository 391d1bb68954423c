"""Counts by dynamic programming: the least expected divergence, and the curve they come from."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from fewstep.samplers import MaskedProblem, from_subs
from fewstep.samplers.curve import Curve, cross_entropy_curve, load_curve, save_curve
from fewstep.space import ScheduleError
from fewstep.space.counts import COUNTS, best_counts, counts_by_name, counts_cost
from fewstep.space.masked_domain import MaskedDomain
from tests.masked_toys import random_joint, table_denoiser


def marginal(joint: Tensor, kept: tuple[int, ...]) -> Tensor:
    gone = [i for i in range(joint.ndim) if i not in kept]
    return joint.sum(gone, keepdim=True) if gone else joint


def divergence(joint: Tensor, counts: tuple[int, ...]) -> float:
    """KL(model's law, sampler's law) in expectation over all orders, by enumeration.

    Along an order a call draws its positions independently given those visible before it.
    """
    cuts = list(itertools.pairwise(itertools.accumulate(counts, initial=0)))
    orders = itertools.permutations(range(joint.ndim))
    ways = Counter(tuple(frozenset(order[a:b]) for a, b in cuts) for order in orders)
    total = 0.0
    for blocks, number in ways.items():  # the order within a call does not matter
        law, seen = torch.ones_like(joint), frozenset[int]()
        for block in blocks:
            given = marginal(joint, tuple(seen))
            for i in block:
                law = law * marginal(joint, (*seen, i)) / given
            seen |= block
        total += number * float((joint * (joint / law).log()).sum())
    return total / ways.total()


def compositions(length: int, calls: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, length), calls - 1)
    return [tuple(np.diff([0, *c, length]).tolist()) for c in cuts]


def exact_curve(joint: Tensor) -> list[float]:
    """h(m) by enumeration of every set of m visible positions."""
    length, curve = joint.ndim, []
    for m in range(length):
        values = []
        for seen in itertools.combinations(range(length), m):
            for i in set(range(length)) - set(seen):
                p = marginal(joint, (*seen, i)) / marginal(joint, seen)
                values.append(float(-(joint * p.log()).sum()))
        curve.append(float(np.mean(values)))
    return curve


@pytest.mark.parametrize(("length", "tokens"), [(4, 3), (5, 2), (6, 2)])
def test_counts_by_dynamic_programming_minimise_the_exact_divergence(length, tokens) -> None:
    joint = random_joint(length, length, tokens) + 1e-3
    joint = joint / joint.sum()
    curve = exact_curve(joint)
    assert all(a >= b for a, b in itertools.pairwise(curve))
    for calls, best in enumerate(best_counts(curve), start=1):
        every = {c: divergence(joint, c) for c in compositions(length, calls)}
        for counts, value in every.items():  # the sum over calls is the divergence
            assert counts_cost(curve, counts) - sum(curve) == pytest.approx(value, abs=1e-9)
        assert every[best] == pytest.approx(min(every.values()), abs=1e-12)
    assert best_counts(curve)[-1] == (1,) * length
    assert divergence(joint, (1,) * length) == pytest.approx(0, abs=1e-12)


def test_no_composition_is_cheaper_on_any_curve() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        curve = rng.random(9).tolist()  # need not fall
        for calls, best in enumerate(best_counts(curve), start=1):
            least = min(counts_cost(curve, c) for c in compositions(9, calls))
            assert len(best) == calls
            assert sum(best) == 9
            assert counts_cost(curve, best) == pytest.approx(least, abs=1e-12)
    steep = [math.exp(-m) for m in range(40)]
    assert best_counts(steep, 4)[3][0] < best_counts(steep, 4)[3][-1]
    assert len(best_counts([1.0 / (m + 1) for m in range(1000)], 32)) == 32


def test_the_sweep_measures_the_curve_of_the_model() -> None:
    joint = random_joint(2) + 1e-3
    joint = joint / joint.sum()
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(joint.flatten(), 20_000, replacement=True, generator=generator)
    tokens = torch.stack([draws // 3**k % 3 for k in (3, 2, 1, 0)], -1)
    seen: list[tuple[int, int]] = []
    found = cross_entropy_curve(
        table_denoiser(joint), tokens, batch=4000, generator=generator,
        on_progress=lambda i, n: seen.append((i, n)),
    )  # fmt: skip
    gap = np.abs(np.array(found.values) - exact_curve(joint))
    assert (gap < 4 * np.array(found.errors)).all()
    assert seen[-1] == (20, 20)
    given = torch.tensor([False, True, False, True])
    two = cross_entropy_curve(table_denoiser(joint), tokens, given, generator=generator)
    chances = [marginal(joint, (0, 2, i)) / marginal(joint, (0, 2)) for i in (1, 3)]
    expected = sum(float(-(joint * p.log()).sum()) for p in chances) / 2
    assert two.values[0] == pytest.approx(expected, abs=0.02)
    few = cross_entropy_curve(table_denoiser(joint), tokens, points=[0], generator=generator)
    assert few.values[1] == pytest.approx((2 * few.values[0] + few.values[3]) / 3)
    with pytest.raises(ScheduleError, match=r"points must lie in 0\.\.3"):
        cross_entropy_curve(table_denoiser(joint), tokens, points=[4])


def test_a_rise_of_the_curve_is_noise_and_no_counts_are_fitted_to_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, errors = rng.normal(size=9) - np.arange(9) / 4, rng.uniform(0.1, 2, size=9)
        found = Curve(tuple(values), tuple(errors), 7).falling
        best = isotonic_regression(values, weights=errors**-2, increasing=False)
        assert found == pytest.approx(best.x.tolist())
        assert all(a >= b for a, b in itertools.pairwise(found))
    assert Curve((3.0, 1.0, 2.0), (math.nan,) * 3, 1).falling == (3.0, 1.5, 1.5)
    steady = Curve((3.0, 2.0, 1.0), (0.1,) * 3, 5)
    assert steady.falling == steady.values


def test_a_curve_survives_its_file_and_others_are_refused(tmp_path) -> None:
    curve = Curve((2.0, 1.0 / 3), (0.1, 0.2), 7, "model")
    path = save_curve(curve, tmp_path / "curve.json")
    assert load_curve(path) == curve
    good = json.loads(path.read_text())
    for change in ({"format": "x"}, {"values": []}, {"values": ["a", 1]}, {"more": 1}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ScheduleError, match="is no cross-entropy curve"):
            load_curve(path)
    with pytest.raises(ScheduleError, match="is no cross-entropy curve"):
        load_curve(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match="finite numbers"):
        best_counts([1.0, math.nan])
    with pytest.raises(ScheduleError, match="3 calls for 2 positions"):
        best_counts([2.0, 1.0], 3)


def test_where_a_curve_is_known_its_counts_are_among_the_named() -> None:
    curve = tuple(math.exp(-m / 3) for m in range(12))
    bare = MaskedDomain(12, 4)
    domain = MaskedDomain(12, 4, curve=curve)
    named = domain.baselines()
    assert set(named) == {*bare.baselines(), "dp"}
    assert named["dp"].counts == best_counts(curve, 4)[-1]
    for name in COUNTS:
        counts = counts_by_name(name, 12, 4)
        assert counts_cost(curve, named["dp"].counts) <= counts_cost(curve, counts)
    assert domain.contains(named["dp"]) is None
    problem = MaskedProblem(
        denoiser=from_subs(lambda x: x, 3), length=12, objective="x", measure=lambda t: t,
        curve=curve,
    )  # fmt: skip
    assert problem.named(4)["dp"].digest == named["dp"].digest
    with pytest.raises(ScheduleError, match="the curve has 12 values for 11 positions"):
        MaskedDomain(11, 4, curve=curve)
