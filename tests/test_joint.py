"""CPR fitted end to end: its algebra, that it improves, and what it says about leaving out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.predictors.cpr import CPR
from fewstep.predictors.cpr_family import PolynomialFamily, Setting
from fewstep.predictors.cpr_joint import Request, fit_joint, gram
from fewstep.predictors.gauss_newton import Batch
from fewstep.samplers import run, sample
from fewstep.space import StudyError, stack
from fewstep.space.baselines import baseline
from fewstep.space.noise import VPLinear
from tests.oracles import recorded_mixture

VP, TEMPLATE = VPLinear(), "unipc2-bh2/quadratic/low"
SETTINGS = [Setting(n, 1.0) for n in (4, 5, 7)]


def states(batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 2, 2, generator=generator, dtype=torch.float64)


class Bench:
    """Runs requests on the recorded mixture."""

    def __init__(self) -> None:
        self.model, self.requests = recorded_mixture(VP), 0
        teacher = baseline("dpmpp3m/logsnr/low", VP, 100)
        self.noise = [states(48, 1), states(48, 2), states(48, 3)]
        self.ends = [sample(teacher, self.model, x) for x in self.noise]

    def gram(self, schedules, k: int) -> np.ndarray:
        batch = Batch(self.noise[k], self.ends[k])
        return gram(batch.residuals([s.program for s in schedules], self.model).numpy())

    def look(self, requests: list[Request]) -> list[np.ndarray]:
        self.requests += len(requests)
        return [self.gram(r.schedules, int(r.held)) for r in requests]

    def error(self, schedule) -> float:
        return float(self.gram([schedule], 2)[0, 0])


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def family():
    return PolynomialFamily(VP, TEMPLATE, SETTINGS, ("gap", "query", "compensation"))


@pytest.fixture(scope="module")
def fitted(bench, family):
    return fit_joint(family, bench.look, rounds=4)


def test_a_gram_matrix_holds_inner_products_of_residuals(bench):
    schedules = [baseline(f"{name}/logsnr", VP, 5) for name in ("ddim", "dpmpp2m", "ipndm3")]
    found = bench.gram(schedules, 0)
    x = run(stack([s.program for s in schedules]), bench.model, bench.noise[0])
    residual = (x - bench.ends[0]).flatten(1).double()
    wanted = residual @ residual.T / bench.ends[0].numel()
    assert found == pytest.approx(wanted.numpy(), rel=1e-9)


def test_zero_is_the_template_and_parameters_are_recovered_from_their_model(family):
    rng = np.random.default_rng(0)
    for s in SETTINGS:
        plain = family.schedule(s, np.zeros(family.size))
        assert plain.program.digest == baseline(TEMPLATE, VP, s.nfe).program.digest
    theta = 0.02 * rng.normal(size=family.size)
    model = family.model(theta)
    assert family.theta(model) == pytest.approx(theta, abs=1e-9)
    for s in SETTINGS:
        wanted, made = family.schedule(s, theta), model.predict(s.nfe, s.guidance)
        assert made.times == pytest.approx(wanted.times, abs=1e-12)
        for a, b in zip(made.steps, wanted.steps, strict=True):
            assert a.compensation == pytest.approx(b.compensation, abs=1e-12)
            assert a.dt_query == pytest.approx(b.dt_query, abs=1e-12)


def test_degrees_never_exceed_what_the_settings_can_tell(family):
    assert family.degrees == (4, 0, 2)
    one = PolynomialFamily(VP, TEMPLATE, [Setting(5, 2.0)], ("gap",))
    assert one.degrees == (4, 0, 0)
    assert one.size == 5


def test_it_improves_on_held_out_noise_and_on_new_noise(bench, fitted):
    for s in SETTINGS:
        assert fitted.after[s] <= 1.02 * fitted.before[s]
        fresh = fitted.model.predict(s.nfe, s.guidance), baseline(TEMPLATE, VP, s.nfe)
        made, plain = (bench.error(schedule) for schedule in fresh)
        assert made < plain
    gain = np.mean([np.log(fitted.after[s] / fitted.before[s]) for s in SETTINGS])
    assert gain < np.log(0.8)


def test_an_nfe_between_is_better_than_the_template(bench, fitted):
    made, plain = fitted.model.predict(6, 1.0), baseline(TEMPLATE, VP, 6)
    assert bench.error(made) < 0.9 * bench.error(plain)


def test_leaving_an_nfe_out_is_told_for_every_setting_and_one_guidance_is_not(fitted):
    assert set(fitted.left_out) == {"nfe"}
    assert set(fitted.left_out["nfe"]) == set(SETTINGS)
    assert all(v > 0 for v in fitted.left_out["nfe"].values())


def test_it_can_start_from_a_regression_and_never_ends_worse_on_average(bench, family, fitted):
    again = fit_joint(family, bench.look, start=fitted.model, rounds=1)
    for s in SETTINGS:
        assert again.before[s] == pytest.approx(fitted.after[s], rel=1e-3)
    assert np.mean(np.log(list(again.after.values()))) <= np.mean(
        np.log(list(again.before.values()))
    )


def test_the_model_is_an_ordinary_file(fitted, tmp_path):
    fitted.model.save(tmp_path / "cpr.json")
    again = CPR.load(tmp_path / "cpr.json")
    assert again.predict(6, 1.0).program.digest == fitted.model.predict(6, 1.0).program.digest
    with pytest.raises(StudyError, match="outside"):
        again.predict(8, 1.0)


def test_a_template_that_cannot_be_scored_is_named(bench, family):
    def broken(requests):
        found = bench.look(requests)
        return [g * np.nan if r.setting.nfe == 5 else g for r, g in zip(requests, found)]  # noqa: B905

    with pytest.raises(StudyError, match="cannot be scored at NFE 5"):
        fit_joint(family, broken)


def test_a_moved_decision_that_fails_stays_put(bench, family):
    def partly(requests):
        found = bench.look(requests)
        for g in found:
            if len(g) > 4:
                g[2, :], g[:, 2] = np.nan, np.nan
        return found

    made = fit_joint(family, partly, rounds=1)
    assert all(np.isfinite(v) for v in made.after.values())
    assert any(made.after[s] < made.before[s] for s in SETTINGS)


def test_decisions_that_exist_at_no_setting_are_left_out():
    tiny = PolynomialFamily(
        VP, TEMPLATE, [Setting(1, 1.0), Setting(2, 1.0)], ("gap", "compensation")
    )
    assert tiny.names == ("gap",)
    with pytest.raises(StudyError, match="no settings, or no decisions"):
        PolynomialFamily(VP, TEMPLATE, [Setting(2, 1.0)], ("compensation",))


def test_a_setting_too_short_for_a_decision_leaves_it_to_the_others():
    short, longer = Setting(2, 1.0), Setting(4, 1.0)
    family = PolynomialFamily(VP, TEMPLATE, [short, longer], ("gap", "compensation"))
    assert [i for name, i in family.free(4) if name == "compensation"] == [2, 3]
    assert all(name == "gap" for name, _ in family.free(2))
    theta = np.random.default_rng(0).normal(0, 0.1, family.size)
    assert family.schedule(short, theta).nfe == 2
    assert any(step.compensation != 1 for step in family.schedule(longer, theta).steps)


def test_unknown_decisions_are_refused():
    with pytest.raises(StudyError, match="'colour' is not one of gap"):
        PolynomialFamily(VP, TEMPLATE, SETTINGS, ("colour",))
    with pytest.raises(StudyError, match="no settings"):
        PolynomialFamily(VP, TEMPLATE, [], ("gap",))
