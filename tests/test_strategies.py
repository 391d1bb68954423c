"""Strategies are functions of what is known, and the guided ones beat chance."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from fewstep.samplers import run
from fewstep.search.strategies import STRATEGIES, Evaluated, make
from fewstep.search.strategies.s3 import S3, expected_improvement
from fewstep.space import StudyError, stack
from fewstep.space.baselines import baseline
from fewstep.space.domain import OdeDomain
from fewstep.space.noise import VPLinear
from tests.oracles import two_modes

NOISE = VPLinear(t_start=0.6, t_end=0.05)
FAST = {"s3": {"predictor": "gaussian"}}
SEEDS = ("ddim", "dpmpp2m", "unipc2-bh2", "ipndm3", "deis-tab2")


@lru_cache
def teacher() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, run(baseline("dpmpp3m/logsnr", NOISE, 300).program, two_modes(NOISE), x)


def score(schedules) -> list[float]:
    """Endpoint MSE on the exact two-mode mixture."""
    x, end = teacher()
    y = run(stack([s.program for s in schedules]), two_modes(NOISE), x, check=False)
    return [float(v) for v in ((y - end) ** 2).mean((1, 2)).nan_to_num(nan=float("inf"))]


def evaluated(schedules, source="") -> list[Evaluated]:
    return [
        Evaluated(s, v, "ok" if np.isfinite(v) else "diverged", source=source)
        for s, v in zip(schedules, score(schedules), strict=True)
    ]


def seeds(nfe: int = 5) -> list[Evaluated]:
    grids = ("time", "quadratic", "logsnr", "edm")
    return evaluated([baseline(f"{s}/{g}", NOISE, nfe) for s in SEEDS for g in grids], "named")


@lru_cache
def search(name: str, seed: int, generations: int = 6, size: int = 10) -> list[float]:
    """Scores of the candidates a strategy proposes, in order."""
    strategy = make(name, OdeDomain(NOISE, 5), **FAST.get(name, {}))
    known = seeds()
    start = len(known)
    for g in range(generations):
        proposals = strategy.propose(known, g, size, np.random.default_rng([seed, g]))
        assert len(proposals) == size
        for p, v in zip(proposals, score([p.schedule for p in proposals]), strict=True):
            known.append(
                Evaluated(p.schedule, v, "ok" if np.isfinite(v) else "diverged", source=p.source)
            )
    return [k.score for k in known[start:]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_a_function_of_known_generation_and_seed(name):
    domain = OdeDomain(NOISE, 5)
    known = seeds()
    first, second = (
        make(name, domain, **FAST.get(name, {})).propose(
            known, 3, 6, np.random.default_rng([7, 3])
        )
        for _ in range(2)
    )
    assert first == second
    other = make(name, domain, **FAST.get(name, {})).propose(
        known, 3, 6, np.random.default_rng([8, 3])
    )
    assert [p.schedule for p in other] != [p.schedule for p in first]


@pytest.mark.parametrize("name", STRATEGIES)
def test_proposals_are_members_even_when_little_is_known_or_all_has_failed(name):
    domain = OdeDomain(NOISE, 4)
    strategy = make(name, domain, **FAST.get(name, {}))
    failed = [Evaluated(baseline("ddim/edm", NOISE, 4), float("inf"), "diverged")]
    elsewhere = seeds(5)[:3]
    for known in ([], failed, elsewhere):
        proposals = strategy.propose(known, 0, 5, np.random.default_rng(0))
        assert len(proposals) == 5
        assert all(domain.contains(p.schedule) is None for p in proposals)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s3", "evolution", "tpe", "cmaes"])
def test_guided_strategies_propose_better_candidates_than_random_search(name):
    guided, random = (np.median([search(n, s)[-20:] for s in range(2)]) for n in (name, "random"))
    assert guided < 0.75 * random


@pytest.mark.slow
def test_s3_beats_the_evolution_and_the_named_solvers():
    named = min(k.score for k in seeds())
    s3, evolution = (
        np.median([min(search(n, seed)) for seed in range(2)]) for n in ("s3", "evolution")
    )
    assert s3 < 0.8 * named
    assert s3 < 0.8 * evolution


def test_s3_starts_from_the_neighbouring_nfe():
    domain = OdeDomain(NOISE, 6)
    proposals = S3(domain).propose(seeds(5), 0, 10, np.random.default_rng(0))
    assert {p.source for p in proposals} == {"adopted"}


def test_s3_learns_from_every_nfe_and_leaves_out_what_is_no_member():
    domain = OdeDomain(NOISE, 5)
    noisy = [Evaluated(baseline("ddpm/edm", NOISE, n), 1.0) for n in (5, 6)]
    strategy = S3(domain, predictor="sequence", rounds=1, patterns=3, moves=8)
    proposals = strategy.propose(seeds(5) + noisy + seeds(6), 0, 4, np.random.default_rng(0))
    assert {p.note["predictor"] for p in proposals} == {"sequence"}
    assert all(domain.contains(p.schedule) is None for p in proposals)


def test_s3_proposes_nothing_twice_and_says_what_it_expects():
    domain = OdeDomain(NOISE, 5)
    proposals = S3(domain, **FAST["s3"]).propose(seeds(), 0, 12, np.random.default_rng(0))
    assert len({p.schedule.digest for p in proposals}) == 12
    assert all({"predicted", "std", "predictor", "tau_gaussian"} <= set(p.note) for p in proposals)


def test_cmaes_moves_numbers_only():
    domain = OdeDomain(NOISE, 5)
    known = seeds()
    best = domain.canonical(min(known, key=lambda k: k.score).schedule)
    for p in make("cmaes", domain).propose(known, 0, 6, np.random.default_rng(0)):
        assert [s.order for s in p.schedule.steps] == [s.order for s in best.steps]
        assert p.schedule.times != best.times


def test_expected_improvement_is_the_mean_of_the_gain():
    z = np.random.default_rng(0).standard_normal(200_000)
    expected = np.maximum(0.3 + 0.7 * z, 0).mean()
    got = expected_improvement(np.array([0.3]), np.array([0.7]))
    assert got[0] == pytest.approx(expected, rel=0.02)


def test_unknown_strategies_and_options_are_refused():
    domain = OdeDomain(NOISE, 5)
    with pytest.raises(StudyError, match="unknown: use one of random"):
        make("annealing", domain)
    with pytest.raises(StudyError, match="no option 'temperature'"):
        make("evolution", domain, temperature=1.0)
