"""Racing: who is stopped, what a stopped candidate's score is, and that nothing else changes."""

import base64

import numpy as np
import pytest

from fewstep.predictors.yardstick import LEVEL, loses
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.search.scoring import Race
from fewstep.search.work import Result
from fewstep.space import StudyError
from tests.studies import trial_table, write_study

RACE = ("search.samples=64", "search.race=[8, 24]", "search.block=[4, 8]")


class Table:
    """A scorer of made-up per-sample scores; a schedule is a row's number."""

    def __init__(self, rows):
        self.rows, self.asked = np.asarray(rows, dtype=float), []

    def submit(self, schedules, stream, samples, before=None, needed=None):
        self.asked.append((samples, list(schedules)))
        first = before[0].samples if before else 0
        assert all(r.samples == first for r in before or ())
        return lambda: [
            Result(row[:samples].mean(), per_sample=row[:samples], samples=samples)
            for row in self.rows[list(schedules)]
        ]


def _search(folder, out, *overrides, **options):
    return run.search(load_study(write_study(folder), overrides), out, **options)


def test_an_equal_or_better_candidate_never_loses():
    rng = np.random.default_rng(0)
    leader = rng.lognormal(size=64)
    assert not loses(leader, leader)
    assert not loses(0.99 * leader, leader)
    assert loses(1.5 * leader, leader)


def test_candidates_of_the_same_law_are_stopped_no_more_often_than_the_level_says():
    rng = np.random.default_rng(1)
    pairs = rng.lognormal(size=(2000, 2, 40))
    share = np.mean([loses(a, b) for a, b in pairs])
    assert share < LEVEL + 3 * np.sqrt(LEVEL / 2000)


def test_the_best_reaches_all_samples_and_the_worst_only_the_first():
    rng = np.random.default_rng(2)
    difficulty = rng.lognormal(size=256)
    factor = np.array([1.0, 1.02, 1.3, 3.0, 10.0])
    rows = factor[:, None] * difficulty * rng.lognormal(sigma=0.05, size=(5, 256))
    race = Race(Table(rows), "search", (16, 64, 256))
    results = race.finish(range(5), race.start(range(5)))
    assert results[0].samples == 256
    assert results[4].samples == 16
    assert race.best is results[0]
    scores = [r.score for r in results]
    assert scores == sorted(scores)


def test_the_score_of_a_stopped_candidate_is_a_better_estimate_than_its_mean():
    """Samples differ in difficulty; the leader's own errors tell how hard the first ones were."""
    rng = np.random.default_rng(3)
    gain = []
    for _ in range(100):
        difficulty = rng.lognormal(sigma=1.5, size=256)
        rows = np.array([[1.0], [2.0]]) * difficulty * rng.lognormal(sigma=0.1, size=(2, 256))
        race = Race(Table(rows), "search", (16, 256))
        stopped = race.finish(range(2), race.start(range(2)))[1]
        assert stopped.samples == 16
        truth = rows[1].mean()
        gain.append(
            abs(np.log(stopped.score / truth)) - abs(np.log(stopped.per_sample.mean() / truth))
        )
    assert np.median(gain) < -0.05


def test_no_stopped_score_is_below_the_best():
    rng = np.random.default_rng(4)
    for _ in range(50):
        race = Race(Table(rng.lognormal(sigma=2.0, size=(30, 64))), "search", (8, 16, 64))
        for part in (range(10), range(10, 20), range(20, 30)):
            for result in race.finish(part, race.start(part)):
                assert result.samples == 64 or result.score >= race.best.score


def test_a_later_generation_races_against_the_best_known():
    rows = np.outer([1.0, 5.0, 6.0], np.ones(64)) + 0.01 * np.arange(64)
    race = Race(Table(rows), "search", (8, 64))
    race.finish([0], race.start([0]))
    late = race.finish([1, 2], race.start([1, 2]))
    assert [r.samples for r in late] == [8, 8]
    assert race.best.score == pytest.approx(rows[0].mean())


def _scores(out):
    """The scores of samples of every trial, by digest."""
    found = {row[-1]["digest"]: row[-1].get("scores", "") for row in trial_table(out)}
    return {k: np.frombuffer(base64.b64decode(v), "<f4") for k, v in found.items()}


def test_candidates_that_reach_all_samples_score_as_without_a_race(tmp_path):
    settings = ("budget.candidates=150", "search.strategy=random", *RACE)
    raced = _search(tmp_path, tmp_path / "raced", *settings)
    plain = _search(tmp_path, tmp_path / "plain", *settings, "search.race=[]")
    a, b = (_scores(o.out) for o in (raced, plain))
    far = {k: r for k, r in a.items() if len(r) == 64}
    assert 3 <= len(far) < 100
    for digest, scores in far.items():
        np.testing.assert_allclose(scores, b[digest], rtol=1e-4, atol=1e-10)
    best = min((row[2][0], row[-1]["digest"]) for row in trial_table(plain.out) if row[2])
    assert best[1] in far
    states = {row[-1]["samples"]: row[1] for row in trial_table(raced.out) if row[2]}
    assert states == {8: "PRUNED", 24: "PRUNED", 64: "COMPLETE"}
    assert raced.rows[0].calls_spent < 0.6 * plain.rows[0].calls_spent
    assert raced.rows[0].digest == plain.rows[0].digest


def test_a_raced_search_cut_anywhere_resumes_to_the_same_end(tmp_path):
    settings = ("budget.candidates=127", "search.strategy=evolution", *RACE)
    whole = _search(tmp_path, tmp_path / "whole", *settings)
    log = (whole.out / "study.journal").read_bytes()
    for share in (0.45, 0.9):
        out = tmp_path / f"cut{share}"
        out.mkdir()
        (out / "study.journal").write_bytes(log[: int(share * len(log))])
        assert _search(tmp_path, out, *settings, resume=True).rows == whole.rows
        assert trial_table(out) == trial_table(whole.out)


def test_more_budget_within_a_generation_ends_as_if_it_had_been_there(tmp_path):
    settings = ("search.strategy=evolution", *RACE)
    whole = _search(tmp_path, tmp_path / "whole", *settings, "budget.candidates=120")
    out = tmp_path / "parts"
    for candidates in (107, 120):  # three of the eight of a generation, then the rest
        parts = _search(tmp_path, out, *settings, f"budget.candidates={candidates}", resume=True)
        assert len(trial_table(out)) == candidates
    assert trial_table(out) == trial_table(whole.out)
    assert parts.rows == whole.rows
    assert any(row[1] == "PRUNED" for row in trial_table(out)[104:])


def test_a_budget_in_calls_ends_a_race_when_it_is_spent(tmp_path):
    found = _search(tmp_path, tmp_path / "out", "budget.calls=12000", *RACE)
    spent, last = found.rows[0].calls_spent, 8 * 64 * 3
    assert 12000 <= spent < 12000 + last
    assert found.rows[0].trials > 12000 / (64 * 3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (("search.race=[24, 8]",), "must ascend"),
        (("search.race=[64]", "search.samples=64"), "stay below samples"),
        (("search.race=[8]", "search.samples=64", "objective.name=frechet"), "remove race"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(tmp_path, override, says):
    with pytest.raises(StudyError, match=says):
        load_study(write_study(tmp_path), override)
