"""The quality predictor ranks schedules it has not seen, saves without pickle, and trains fast."""

import time
from functools import lru_cache

import numpy as np
import pytest
import torch

from fewstep.predictors.gaussian import GaussianProcess
from fewstep.predictors.quality import QualityPredictor, kendall_tau, targets
from fewstep.predictors.sequence import Rows, SequenceRanker
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import FewstepError
from fewstep.space.noise import VPLinear
from fewstep.space.tokens import tokens


@lru_cache
def landscape(nfe: int, count: int, seed: int = 0) -> tuple[list[torch.Tensor], list[float]]:
    """Tokens of random schedules; scores grow with their distance to a hidden one."""
    domain = OdeDomain(VPLinear(), nfe)
    rng = np.random.default_rng([seed, nfe])
    hidden = tokens(domain.sample(np.random.default_rng(99)))[0]
    x = [tokens(domain.sample(rng))[0] for _ in range(count)]
    return x, [float(torch.exp(0.3 * (t - hidden).norm())) for t in x]


@pytest.mark.parametrize("kind", ["gaussian", "sequence", "auto"])
def test_unseen_schedules_are_ranked_better_than_chance(kind):
    x, scores = landscape(5, 160)
    predictor = QualityPredictor(kind).fit(x[:100], scores[:100], 5)
    mean, std = predictor.predict(torch.stack(x[100:]))
    tau = kendall_tau(torch.from_numpy(mean), torch.tensor(scores[100:]))
    assert tau > 0.4
    assert (std > 0).all()
    assert predictor.tau[predictor.chosen] == max(predictor.tau.values())
    assert abs(predictor.tau[predictor.chosen] - tau) < 0.3  # cross-validation tells the truth


def test_one_sequence_model_serves_several_nfe_and_gains_from_them():
    few, few_scores = landscape(5, 80)
    more, more_scores = landscape(6, 100)
    predictor = QualityPredictor("sequence").fit(few[:30] + more, few_scores[:30] + more_scores, 5)
    mean, _ = predictor.predict(torch.stack(few[30:]))
    assert kendall_tau(torch.from_numpy(mean), torch.tensor(few_scores[30:])) > 0.25


@pytest.mark.parametrize("kind", ["gaussian", "sequence"])
def test_a_saved_predictor_predicts_the_same_bits(kind, tmp_path):
    x, scores = landscape(4, 40)
    predictor = QualityPredictor(kind).fit(x, scores, 4)
    predictor.save(tmp_path / "quality")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = QualityPredictor.load(tmp_path / "quality")
    for a, b in zip(predictor.predict(torch.stack(x)), again.predict(torch.stack(x)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_uncertainty_is_widened_by_how_far_off_the_newest_results_were(tmp_path):
    x, scores = landscape(4, 60)
    surprising = scores[:50] + [60.0 * s for s in scores[50:]]
    plain = QualityPredictor("gaussian").fit(x, surprising, 4)
    expected = QualityPredictor("gaussian").fit(x, scores, 4, newest=10)
    widened = QualityPredictor("gaussian").fit(x, surprising, 4, newest=10)
    assert plain.widened == 1
    assert 1 <= expected.widened < 2 < widened.widened
    at = torch.stack(x[:5])
    (mean, std), (same, wider) = plain.predict(at), widened.predict(at)
    np.testing.assert_array_equal(same, mean)
    np.testing.assert_allclose(wider, widened.widened * std)
    np.testing.assert_allclose(widened.posterior(at)[1].diagonal(), widened.predict(at)[1] ** 2)
    widened.save(tmp_path / "quality")
    assert QualityPredictor.load(tmp_path / "quality").widened == widened.widened


def test_fitting_is_a_function_of_data_and_seed():
    x, scores = landscape(4, 40)
    a, b = (QualityPredictor("auto", seed=3).fit(x, scores, 4) for _ in range(2))
    np.testing.assert_array_equal(a.predict(torch.stack(x))[0], b.predict(torch.stack(x))[0])
    assert a.tau == b.tau


@pytest.mark.slow
def test_five_hundred_rows_are_learned_in_a_few_seconds():
    x, scores = landscape(5, 500)
    rows, y = Rows.of(x), targets(torch.tensor(scores))
    begun = time.process_time()
    SequenceRanker().fit(rows, y, torch.arange(500) % 5, 0)
    assert time.process_time() - begun < 2 * 3.0  # CPU seconds of two cores


def test_too_little_or_foreign_data_is_refused(tmp_path):
    x, scores = landscape(4, 5)
    with pytest.raises(FewstepError, match="5 results at NFE 4 are too few"):
        QualityPredictor().fit(x, scores, 4)
    with pytest.raises(FewstepError, match="no quality predictor"):
        QualityPredictor.load(tmp_path / "absent")
    with pytest.raises(FewstepError, match="unknown"):
        QualityPredictor("oracle")


def test_the_process_interpolates_and_its_uncertainty_grows_away_from_data():
    x = torch.linspace(-2, 2, 15, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x[:, 0])
    process = GaussianProcess().fit(x, y)
    mean, std = process.predict(x)
    assert float((mean - y).abs().max()) < 0.05
    _, far = process.predict(torch.tensor([[6.0]], dtype=torch.float64))
    assert float(far) > 3 * float(std.max())


def test_a_rows_left_out_prediction_is_that_of_a_process_without_its_fold():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = x[:, 0] - x[:, 1] ** 2
    process = GaussianProcess().fit(x, y)
    folds = torch.arange(20) % 4
    keep = folds != 2
    part = GaussianProcess()
    part.restore(
        process.state() | {"x": process.state()["x"][keep], "y": process.state()["y"][keep]}
    )
    expected = part.predict(x[~keep])[0]
    torch.testing.assert_close(process.left_out(folds)[~keep], expected)


def test_kendall_tau_is_that_of_the_definition():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert kendall_tau(a, a) == 1.0
    assert kendall_tau(a, -a) == -1.0
    assert kendall_tau(a, torch.zeros(4)) == 0.0
    assert kendall_tau(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(2 / 3)


def test_targets_keep_the_order_and_compress_the_bad_end():
    scores = torch.tensor([0.1, 0.2, 0.4, 0.8, 100.0])
    y = targets(scores)
    assert bool((y.diff() > 0).all())
    assert float(y[-1] - y[-2]) < 0.5 * float(torch.log(scores[-1] / scores[-2]))
