"""The yardstick: statistics that no single sample rules, and intervals that cover."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from pydantic import TypeAdapter

from fewstep.predictors.yardstick import (
    Comparison,
    bootstrap_ratio,
    compare,
    geometric_ratio,
    level,
    ratio,
    score_interval,
    tail_index,
)
from fewstep.search.config import FinalTable
from fewstep.search.objective import EndpointMSE, Paired
from fewstep.search.scoring import Race
from fewstep.search.strategies import Evaluated
from fewstep.search.verdict import FRESH, SELECT, Judge, Row
from fewstep.search.work import Result

STATISTICS = ("geometric", "trimmed", "median", "mean")


def heavy(rng, n, tail=1.1):
    """Errors as on the digits model: lognormal, and a Pareto tail of samples in another mode."""
    body = rng.lognormal(sigma=1.0, size=n)
    return np.where(rng.random(n) < 0.01, body * rng.pareto(tail, size=n) * 100, body)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_statistic_scales_with_the_errors_and_agrees_on_equal_ones(statistic):
    errors = heavy(np.random.default_rng(0), 500)
    assert level(3 * errors, statistic) == pytest.approx(3 * level(errors, statistic))
    assert level(np.full(64, 0.25), statistic) == pytest.approx(0.25)


def test_one_sample_moves_a_mean_and_no_other_statistic():
    errors = heavy(np.random.default_rng(1), 256)
    spoilt = errors.copy()
    spoilt[7] *= 1e6
    for statistic in ("geometric", "trimmed", "median"):
        assert level(spoilt, statistic) == pytest.approx(level(errors, statistic), rel=0.05)
    assert level(spoilt, "mean") > 100 * level(errors, "mean")


def test_backward_errors_are_the_errors_over_the_gain():
    gain = np.array([1.0, 100.0])
    assert level(np.array([2.0, 200.0]), "backward", gain) == pytest.approx(2.0)


@pytest.mark.parametrize("index", [1.2, 2.5])
def test_hills_estimator_finds_the_index_of_a_pareto_tail(index):
    errors = 1 + np.random.default_rng(2).pareto(index, size=20_000)
    assert tail_index(errors) == pytest.approx(index, rel=0.2)


def test_intervals_of_the_geometric_ratio_cover_where_those_of_means_do_not():
    """200 verdicts on 1024 of 32,768 samples: the setting of the issue, with made-up errors."""
    rng = np.random.default_rng(3)
    b = heavy(rng, 32_768)
    a = 0.1 * heavy(rng, 32_768) ** 0.5 * b**0.5
    truth, mean = geometric_ratio(a, b)[0], a.mean() / b.mean()
    covered = [0, 0]
    for _ in range(200):
        at = rng.choice(len(a), 1024, replace=False)
        _, (low, high) = geometric_ratio(a[at], b[at])
        covered[0] += low <= truth <= high
        low, high = bootstrap_ratio(a[at], b[at], np.mean, resamples=100)
        covered[1] += low <= mean <= high
    assert covered[0] >= 180
    assert covered[1] < covered[0]


def test_a_mean_has_no_interval_where_its_tail_index_is_below_two():
    rng = np.random.default_rng(4)
    wild = 1 + rng.pareto(1.2, size=4096)
    tame = rng.lognormal(sigma=0.3, size=4096)
    assert compare(wild, tame).mean_interval is None
    both = compare(0.5 * tame, tame)
    assert both.tail_index > 2
    low, high = both.mean_interval
    assert low <= 0.5 * (1 + 1e-12)
    assert high >= 0.5 * (1 - 1e-12)


def test_a_comparison_reads_back_from_its_json_form():
    rng = np.random.default_rng(5)
    found = compare(heavy(rng, 300), heavy(rng, 300))
    again = TypeAdapter(Comparison).validate_python(json.loads(json.dumps(found.to_dict())))
    assert again == found
    same = compare(np.zeros(30), np.zeros(30))
    assert same.geometric == 1.0
    assert json.dumps(same.to_dict(), allow_nan=False)


def test_scores_that_are_not_positive_have_no_ratio():
    assert ratio(1.0, 0.0) is None
    assert ratio(-1.0, 2.0) is None
    assert ratio(1.0, 2.0) == 0.5
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(50, 1)), rng.normal(size=(50, 1))
    assert score_interval(a, b, lambda m, at: float(m[at].mean()), resamples=100) is None


def test_clearly_worse_is_said_by_mean_or_quantile_and_never_by_one_sample():
    rng = np.random.default_rng(7)
    b = heavy(rng, 1024)[:, None]
    paired = Paired(EndpointMSE(), resamples=300, seed=0)
    assert paired.clearly_worse(0.5 * b, b) == ""
    spoilt = 0.5 * b
    spoilt[3] *= 1e6
    assert paired.clearly_worse(spoilt, b) == ""
    tail = np.where(b > np.quantile(b, 0.85), 20 * b, 0.1 * b)
    assert "clearly worse" in paired.clearly_worse(tail, b)


@dataclass(frozen=True)
class Named:
    """A schedule that is its name."""

    digest: str


class Scores:
    """A scorer of made-up errors: one row for each schedule and stream."""

    def __init__(self, rows: dict[str, dict[str, np.ndarray]]) -> None:
        self.rows, self.asked = rows, []

    def submit(self, schedules, stream, samples, *, measures=False, before=None):
        self.asked.append((stream, samples))
        out = []
        for s in schedules:
            errors = self.rows[stream][s.digest][:samples]
            score = EndpointMSE().score(errors[:, None], errors[:, None])
            out.append(Result(score, "ok", "", errors, errors[:, None], samples=samples))
        return lambda: out


def judged(rows, *, samples=512, most=None, named=2):
    """The verdict on candidates a, b (named) and found ones, each scored by its search errors."""
    scorer = Scores(rows)
    known = [
        Evaluated(Named(name), level(errors, "geometric"), "ok", source=name)
        for name, errors in rows["search"].items()
    ]
    judge = Judge(
        scorer,
        EndpointMSE(),
        FinalTable(samples=samples, most=most, resamples=200),
        lambda stream, n: np.zeros((n, 1)),
        0,
    )
    verdict = judge.verdict(5, known, named)
    return verdict, scorer


def made(factors: dict[str, float], n=8192, seed=0, spread=0.5):
    """Errors on the three streams: a difficulty of the sample times a factor of the schedule."""
    rng = np.random.default_rng(seed)
    streams = {}
    for stream in ("search", SELECT, FRESH):
        difficulty = heavy(rng, n)
        streams[stream] = {
            name: f * difficulty * rng.lognormal(sigma=spread, size=n)
            for name, f in factors.items()
        }
    return streams


FACTORS = {"named1": 1.0, "named2": 1.3, "found1": 0.12, "found2": 0.1, "found3": 0.3}


def test_a_verdict_finds_the_ratio_and_reads_back():
    verdict, _ = judged(made(FACTORS))
    row = verdict.row
    assert (row.source, row.best_named, row.use) == ("found2", "named1", "found")
    assert row.interval[0] < 0.1 < row.interval[1]
    assert row.ratio == pytest.approx(row.found_score / row.best_named_score)
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    assert verdict.kept.digest == "found2"


def test_fresh_samples_double_until_the_interval_is_within_ten_percent():
    verdict, scorer = judged(made(FACTORS, spread=2.0), samples=128, most=8192)
    sizes = [n for stream, n in scorer.asked if stream == FRESH]
    assert sizes == [128 * 2**k for k in range(len(sizes))]
    assert len(sizes) > 2
    low, high = verdict.row.interval
    assert math.log(high / low) <= 2 * math.log(1.1)
    assert verdict.row.samples == sizes[-1]
    capped, _ = judged(made(FACTORS, spread=2.0), samples=128, most=256)
    assert capped.row.samples == 256


@pytest.mark.parametrize("stream", ["search", SELECT, FRESH])
@pytest.mark.parametrize("spoilt", list(FACTORS))
def test_one_corrupted_sample_changes_no_decision_of_choice_and_verdict(stream, spoilt):
    rows = made(FACTORS)
    clean, _ = judged(rows)
    rows[stream][spoilt][11] *= 1e6
    dirty, _ = judged(rows)
    decisions = ("source", "best_named", "use", "note", "samples")
    assert [getattr(dirty.row, k) for k in decisions] == [getattr(clean.row, k) for k in decisions]


@pytest.mark.parametrize("spoilt", range(5))
def test_one_corrupted_sample_changes_no_decision_of_a_race(spoilt):
    rng = np.random.default_rng(8)
    factors = np.array([1.0, 1.6, 2.2, 4.0, 10.0])
    rows = factors[:, None] * heavy(rng, 256) * rng.lognormal(sigma=0.3, size=(5, 256))

    class Racing(Scores):
        def submit(self, schedules, stream, samples, *, before=None, needed=None):
            picked = [self.rows[i][:samples] for i in schedules]
            return lambda: [
                Result(level(e, "geometric"), "ok", "", e, e[:, None], samples=samples)
                for e in picked
            ]

    def stopped(table):
        race = Race(Racing(table), "search", (32, 64, 256), "geometric")
        return [r.samples for r in race.finish(range(5), race.start(range(5)))]

    clean = stopped(rows)
    assert len(set(clean)) > 1
    rows[spoilt, 5] *= 1e6
    assert stopped(rows) == clean


def test_a_finalist_that_loses_clearly_on_a_guard_is_not_taken_and_it_is_said():
    rows = made(FACTORS)
    for stream in rows:
        errors = rows[stream]["found2"]
        rows[stream]["found2"] = np.where(
            errors > np.quantile(errors, 0.85), 300 * errors, 0.5 * errors
        )
    verdict, _ = judged(rows)
    assert verdict.row.source == "found1"
    assert "found2 was not taken" in verdict.row.note
    assert "clearly worse" in verdict.row.note


def test_where_nothing_is_gained_the_row_names_the_solver_to_use():
    verdict, _ = judged(made({"named1": 1.0, "named2": 1.3, "found1": 1.02}), most=512)
    assert verdict.row.use == "named1"
    assert verdict.row.best_named == "named1"
