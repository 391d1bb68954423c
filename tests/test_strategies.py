"""Strategies are functions of what is known, and the guided ones beat chance."""

import dataclasses
from functools import lru_cache

import numpy as np
import optuna
import pytest
import torch

from fewstep.predictors.gaussian import expected_improvement
from fewstep.samplers import run, run_candidates
from fewstep.search.strategies import STRATEGIES, Evaluated, Proposer, S3Sampler, suggest
from fewstep.space import StudyError
from fewstep.space.baselines import baseline
from fewstep.space.domain import OdeDomain
from fewstep.space.noise import VPLinear
from tests.oracles import two_modes

NOISE = VPLinear(t_start=0.6, t_end=0.05)
FAST = {"s3": {"predictor": "gaussian"}}
EVERY = [pytest.param(n, marks=[pytest.mark.slow] if n == "gp" else []) for n in STRATEGIES]
SEEDS = ("ddim", "dpmpp2m", "unipc2-bh2", "ipndm3", "deis-tab2")


@lru_cache
def teacher() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, run(baseline("dpmpp3m/logsnr", NOISE, 300).program, two_modes(NOISE), x)


def score(schedules) -> list[float]:
    """Endpoint MSE on the exact two-mode mixture."""
    x, end = teacher()
    y = run_candidates([s.program for s in schedules], two_modes(NOISE), x)
    return [float(v) for v in ((y - end) ** 2).mean((1, 2)).nan_to_num(nan=float("inf"))]


def evaluated(schedules, source="") -> list[Evaluated]:
    return [
        Evaluated(s, v, "ok" if np.isfinite(v) else "diverged", source=source)
        for s, v in zip(schedules, score(schedules), strict=True)
    ]


def seeds(nfe: int = 5) -> list[Evaluated]:
    grids = ("time", "quadratic", "logsnr", "edm")
    return evaluated([baseline(f"{s}/{g}", NOISE, nfe) for s in SEEDS for g in grids], "named")


def asked(name, known, *, nfe=5, seed=7, size=6, earlier=(), generation=3, **options):
    """A proposer that was told what is known, and its next generation."""
    options = FAST.get(name, {}) | options
    domain = OdeDomain(NOISE, nfe)
    proposer = Proposer(name, domain, seed=seed, size=size, earlier=earlier, options=options)
    for e in known:
        proposer.tell(e)
    return proposer, proposer.propose(generation)


@lru_cache
def search(name: str, seed: int, generations: int = 6, size: int = 10) -> list[float]:
    """Scores of the candidates a strategy proposes, in order."""
    found: list[float] = []
    proposer, proposals = asked(name, seeds(), seed=seed, size=size, generation=0)
    for g in range(1, generations + 1):
        assert len(proposals) == size
        for p, v in zip(proposals, score([p.schedule for p in proposals]), strict=True):
            status = "ok" if np.isfinite(v) else "diverged"
            proposer.tell(Evaluated(p.schedule, v, status, source=p.source), p.trial)
            found.append(v)
        if g < generations:
            proposals = proposer.propose(g)
    return found


@pytest.mark.parametrize("name", EVERY)
def test_a_strategy_is_a_function_of_known_generation_and_seed(name):
    known = seeds()
    (_, first), (_, second) = (asked(name, known) for _ in range(2))
    assert first == second
    _, other = asked(name, known, seed=8)
    assert [p.schedule for p in other] != [p.schedule for p in first]


@pytest.mark.parametrize("name", EVERY)
def test_a_generation_taken_from_a_store_leaves_the_strategy_as_if_it_had_proposed_it(name):
    proposer, first = asked(name, seeds())
    plain = [dataclasses.replace(p, trial=None) for p in first]
    other, _ = asked(name, seeds()) if proposer.replays else (_empty(name), None)
    again = first if proposer.replays else other.follow(plain)
    for p, q, v in zip(first, again, score([p.schedule for p in first]), strict=True):
        for strategy, trial in ((proposer, p.trial), (other, q.trial)):
            strategy.tell(Evaluated(p.schedule, v, source=p.source), trial)
    assert proposer.propose(4) == other.propose(4)


def _empty(name):
    """A proposer that was told the seeds and asked for nothing."""
    made = Proposer(name, OdeDomain(NOISE, 5), seed=7, size=6, options=FAST.get(name, {}))
    for e in seeds():
        made.tell(e)
    return made


@pytest.mark.parametrize("name", EVERY)
def test_proposals_are_members_even_when_little_is_known_or_all_has_failed(name):
    domain = OdeDomain(NOISE, 4)
    failed = [Evaluated(baseline("ddim/edm", NOISE, 4), float("inf"), "diverged")]
    for known, earlier in (([], []), (failed, []), ([], seeds(5)[:3])):
        _, proposals = asked(name, known, nfe=4, size=5, earlier=earlier)
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
    _, proposals = asked("s3", [], nfe=6, size=10, earlier=seeds(5))
    assert {p.source for p in proposals} == {"adopted"}


def test_s3_learns_from_every_nfe_and_leaves_out_what_is_no_member():
    domain = OdeDomain(NOISE, 5)
    noisy = [Evaluated(baseline("ddpm/edm", NOISE, n), 1.0) for n in (5, 6)]
    options = {"predictor": "sequence", "rounds": 1, "children": 24}
    known, earlier = seeds(5) + noisy[:1], noisy[1:] + seeds(6)
    _, proposals = asked("s3", known, size=4, earlier=earlier, **options)
    assert {p.note["predictor"] for p in proposals} == {"sequence"}
    assert all(domain.contains(p.schedule) is None for p in proposals)


def test_s3_proposes_nothing_twice_and_says_what_it_expects():
    proposer, proposals = asked("s3", seeds(), size=12)
    more = proposer.propose(4)  # with the first still running
    assert len({p.schedule.digest for p in [*proposals, *more]}) == 24
    assert all({"predicted", "std", "predictor", "tau_gaussian"} <= set(p.note) for p in proposals)


def test_s3_serves_a_study_of_ones_own():
    domain = OdeDomain(NOISE, 3)
    study = optuna.create_study(sampler=S3Sampler(seed=0, domain=domain, predictor="gaussian"))
    for _ in range(12):
        trial = study.ask()
        schedule = suggest(trial, domain)
        assert domain.contains(schedule) is None
        study.tell(trial, score([schedule])[0])
    assert study.best_value < np.median([t.value for t in study.trials])


def test_cmaes_moves_numbers_only():
    domain = OdeDomain(NOISE, 5)
    known = seeds()
    members = [k for k in known if domain.contains(k.schedule) is None]
    best = domain.canonical(min(members, key=lambda k: k.score).schedule)
    _, proposals = asked("cmaes", known)
    for p in proposals:
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
        Proposer("annealing", domain, seed=0, size=4)
    with pytest.raises(StudyError, match="no option 'temperature'"):
        Proposer("evolution", domain, seed=0, size=4, options={"temperature": 1.0})
