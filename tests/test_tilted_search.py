"""Searches of populations of weighted sequences, and of schedules whose calls are random."""

import importlib.util
import json

import numpy as np
import pytest

from fewstep.experiments.cli.page import Paged
from fewstep.samplers.streams import cut
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.search.verdict import Row
from fewstep.search.work import Block, Evaluator
from fewstep.space import FewstepError, load_schedule
from fewstep.space.masked import MaskedSchedule
from tests.drawn_studies import write_drawn
from tests.studies import trial_table

FEW = ("budget.candidates=24", "search.samples=8", "final.samples=16", "final.top=1")


def _search(folder, kind, *overrides):
    config = load_study(write_drawn(folder, kind), overrides)
    return run.search(config, folder / "out", display=Paged())


def _evaluator(folder, kind):
    return Evaluator.of(load_study(write_drawn(folder, kind)))


def _exact(folder):
    """Normaliser and mean worth under the target, by enumeration."""
    spec = importlib.util.spec_from_file_location("drawn", folder / "drawn_model.py")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    weights = model.joint() * model.worth().exp()
    return float(weights.sum()), float((weights * model.worth()).sum() / weights.sum())


def test_populations_of_single_tokens_have_the_moments_of_the_enumerated_target(tmp_path):
    evaluator = _evaluator(tmp_path, "tilted")
    schedule = MaskedSchedule.token_by_token(5)
    blocks = Block.cover([schedule], "x", range(600), 100)
    values = np.concatenate([block.run(evaluator).values[0] for block in blocks])
    total, mean = _exact(tmp_path)
    assert evaluator.evaluations == 600 * 16 * 5
    for found, exact in ((values[:, 2], total), (values[:, 1] * values[:, 2], total * mean)):
        assert abs(found.mean() - exact) < 4.5 * found.std() / 600**0.5  # both are unbiased


def test_populations_are_searched_like_sequences(tmp_path):
    settings = ("space.temperature=[0.5, 2.0]", "space.positions=['uniform', 'confidence']")
    outcome = _search(tmp_path, "tilted", *FEW, *settings)
    table = trial_table(outcome.out)
    assert {row[-1]["calls"] for row in table} <= {0, 8 * 3 * 16}
    (row,) = outcome.rows
    assert (row.failed, row.mean_calls) == (0, None)
    assert not any("extrapolate" in entry.name for entry in row.named)
    assert abs(row.facts["mean"][0] - _exact(tmp_path)[1]) < 0.5
    schedule = load_schedule(outcome.out / "schedules" / "nfe03.json")
    assert (schedule.kind, schedule.provenance["particles"]) == ("masked", 16)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("space.modes=['parallel', 'extrapolate']", "space.modes is an unknown key: use one of"),
        ("space.max_entropy=[0.0, 2.0]", "space.max_entropy is an unknown key"),
        ("space.positions=['drawn']", "positions 'drawn'"),
    ],
)
def test_what_cannot_be_weighed_is_refused_in_one_line(tmp_path, setting, message):
    with pytest.raises(FewstepError) as error:
        _search(tmp_path, "tilted", *FEW, setting)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_hold_the_mean_calls_where_bounds_make_them_random(tmp_path):
    bounds = ("space.max_entropy=[0.0, 6.0]", "space.ahead='stop'", "search.nfe=[4]")
    cold = ("model.score='surprise'", "space.temperature=[0.1, 1.0]")  # beats all that are named
    outcome = _search(tmp_path, "masked", *FEW, "search.strategy=random", *bounds, *cold)
    (row,) = outcome.rows
    schedule = load_schedule(outcome.out / "schedules" / "nfe04.json")
    data = json.loads((outcome.out / "results.json").read_text())["rows"][0]
    assert Row.from_dict(data) == row
    assert schedule.bounded
    assert 1 <= row.mean_calls[0] < 4
    assert row.mean_calls[1] == 4
    assert "mean calls" in (outcome.out / "report.html").read_text()
    paid = [r[-1]["calls"] for r in trial_table(outcome.out, "tiny-nfe04")]
    assert min(paid) < 8 * 4  # of eight sequences and four calls


def test_schedules_of_random_calls_are_counted_alone(tmp_path):
    problem = _evaluator(tmp_path, "masked").problem
    plain = list(problem.named(3).values())[:2]
    bounded = MaskedSchedule.from_counts([1, 2, 2], max_entropy=1.0)
    assert bounded.bounded
    assert not MaskedSchedule.from_counts([5], max_entropy=1.0).bounded
    assert cut([plain[0], bounded, plain[1], bounded], 4) == [(0, 2), (1,), (3,)]
