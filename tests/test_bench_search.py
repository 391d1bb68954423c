"""The benchmark's arithmetic."""

import pytest

from fewstep.experiments.benchmarks.search import best_so_far, markdown, summarise


def result(strategy: str, seed: int, scores: list[float | None], fresh: float) -> dict:
    named = {"name": "ddim/edm", "search": 1.0, "fresh": 2.0, "fresh_median": 1.0}
    case = {"model": "toy", "nfe": 5, "samples": 8, "named": named, "seconds_proposing": 1.0}
    case |= {"fresh_samples": 16, "fresh_median": fresh / 4}
    return case | {"strategy": strategy, "seed": seed, "scores": scores, "fresh": fresh}


def test_a_curve_starts_at_the_best_named_solver_and_never_rises():
    curve = best_so_far(result("s3", 0, [1.5, None, 0.5, 0.7], 1.0))
    assert curve.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_the_table_compares_s3_with_the_best_other():
    results = [result("s3", s, [0.4, 0.3], 0.6) for s in range(3)]
    results += [result("evolution", s, [0.9, 0.4], 1.0 + s) for s in range(3)]
    results += [result("random", s, [1.0, 1.0], 4.0) for s in range(3)]
    rows = {r["strategy"]: r for r in summarise(results)}
    assert rows["s3"]["fresh_over_best_other"] == pytest.approx(0.6 / 2.0)
    assert rows["s3"]["median_over_best_other"] == pytest.approx(0.6 / 2.0)
    assert rows["s3"]["median_over_named"] == pytest.approx(0.15)
    assert rows["s3"]["candidates_to_evolutions_final"] == 1
    assert rows["evolution"]["candidates_to_evolutions_final"] == 2
    assert rows["random"]["candidates_to_evolutions_final"] is None
    assert rows["evolution"]["fresh"]["q1"] == 1.5
    assert len(markdown(list(rows.values())).splitlines()) == 5
