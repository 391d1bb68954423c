"""The search over count schedules: what is scored, what is kept, what it finds."""

import json

import numpy as np
import pytest

from fewstep.experiments.search_masked import search
from fewstep.search.strategies import Evaluated, make
from fewstep.search.strategies.common import members
from fewstep.space.masked import MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain

TARGET = np.array([1, 1, 2, 3, 3, 4, 3, 3])


class Score:
    """Distance of the counts to a target no named schedule has."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, schedule: MaskedSchedule) -> float:
        self.calls += 1
        return float(np.abs(np.array(schedule.counts) - TARGET).sum())


def run(tmp_path, name: str, candidates: int, strategy: str = "random", seed: int = 0):
    domain, score = MaskedDomain(20, 8), Score()
    known = search(
        domain,
        make(strategy, domain),
        score,
        tmp_path / name,
        candidates=candidates,
        generation=8,
        seed=seed,
    )
    return known, score


def test_named_schedules_come_first_and_nothing_is_scored_twice(tmp_path) -> None:
    known, score = run(tmp_path, "a", 40)
    assert [r.source for r in known[:4]] == ["uniform", "linear", "cosine", "reverse_cosine"]
    assert len(known) == score.calls == 40
    assert len({r.schedule.digest for r in known}) == 40


def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    whole, _ = run(tmp_path, "whole", 60)
    run(tmp_path, "cut", 25)
    resumed, score = run(tmp_path, "cut", 60)
    assert score.calls == 35
    assert [r.schedule.digest for r in resumed] == [r.schedule.digest for r in whole]
    assert [r.score for r in resumed] == [r.score for r in whole]
    rows = [json.loads(line) for line in (tmp_path / "cut").read_text().splitlines()]
    assert [row["score"] for row in rows] == [r.score for r in whole]


def test_a_small_space_ends_the_search(tmp_path) -> None:
    domain = MaskedDomain(4, 3)
    known = search(
        domain,
        make("random", domain),
        lambda s: float(s.counts[0]),
        tmp_path / "small",
        candidates=50,
        generation=4,
        seed=0,
    )
    assert {r.schedule.counts for r in known} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


def test_evolution_beats_random_and_every_named_schedule(tmp_path) -> None:
    domain = MaskedDomain(20, 8)
    if not members(domain, [Evaluated(domain.from_params({}), 1.0)]):
        pytest.skip("search.strategies.common.members reads ODE schedules only")
    best = {}
    for strategy in ("random", "evolution"):
        scores = []
        for seed in range(3):
            known, _ = run(tmp_path, f"{strategy}{seed}", 120, strategy, seed)
            scores.append(min(r.score for r in known))
            named = min(r.score for r in known[:4])
        best[strategy] = float(np.mean(scores))
    assert best["evolution"] < named
    assert best["evolution"] == pytest.approx(min(best.values()))
    assert best["evolution"] < best["random"]
