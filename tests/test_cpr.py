"""Cascade polynomial regression: exactness, the published table, the trust region, the file."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from fewstep.predictors.cpr import (
    CPR,
    OutsideTrustRegion,
    assemble,
    decisions,
    features,
    fit,
    published,
)
from fewstep.space import OdeSchedule, StudyError
from fewstep.space.baselines import baseline
from fewstep.space.noise import VPDiscrete, VPLinear
from tests.oracles import REFERENCE

FOLDER = Path(os.environ.get("FEWSTEP_REFERENCE", REFERENCE))
TABLE = json.loads((FOLDER / "dc" / "cpr.json").read_text())
NOISE, TEMPLATE = VPLinear(), "unipc2-bh2/logsnr/low"


def monomial(c, nfe, guidance):
    """The published formula, term by term."""
    c = np.reshape(c, (4, 3, 3))
    C, N, found = guidance / 12, nfe / 50, []
    for step in range(1, nfe + 1):
        x = step / nfe
        found.append(
            sum(
                x**i * C ** (2 - j) * N ** (2 - k) * c[i, j, k]
                for i in range(4)
                for j in range(3)
                for k in range(3)
            )
        )
    return [1.0, 1.0, *found[2:]]


def smooth(nfe: int, guidance: float) -> OdeSchedule:
    """A schedule whose decisions are polynomials of the setting."""
    base = baseline(TEMPLATE, NOISE, nfe)
    x = np.arange(1, nfe + 1) / nfe
    values = {
        "gap": (0.3 * (x - 0.5) * guidance / 7).tolist(),
        "compensation": (1 + 0.1 * x**2 - 0.02 * guidance * x * (1 - nfe / 20)).tolist(),
        "query": (0.01 * x * (1 + guidance / 4)).tolist(),
        "land": (0.02 * x**3 - 0.001 * nfe).tolist(),
        "weight0": (0.05 * x).tolist(),
    }
    return assemble(base, values, guidance, 2)


GRID = [(n, g) for n in (5, 6, 8, 10) for g in (1.0, 3.0, 5.0, 7.5)]


def test_the_published_coefficients_reproduce_their_table():
    model = published(TABLE["coefficients"])
    for nfe, row in TABLE["predictions"].items():
        for guidance, ratios in row.items():
            found = model.values(int(nfe), float(guidance))["compensation"]
            assert found == pytest.approx(ratios, abs=1e-9)
    ratios = model.values(5, 7.5)["compensation"]
    assert [round(r, 2) for r in ratios] == [1.0, 1.0, 1.03, 0.74, 1.23]
    schedule = model.predict(8, 7.5)
    assert [s.compensation for s in schedule.steps] == model.values(8, 7.5)["compensation"]
    assert schedule.nfe == 8


def test_chebyshev_and_monomial_forms_agree_inside_the_box_and_outside_is_one():
    rng = np.random.default_rng(0)
    for _ in range(5):
        c = rng.normal(size=36)
        model = published(c)
        for nfe, guidance in ((5, 1.5), (7, 6.2), (13, 4.0), (20, 9.0)):
            expected = monomial(c, nfe, guidance)
            assert model.values(nfe, guidance)["compensation"] == pytest.approx(expected, abs=1e-9)
        for nfe, guidance in ((4, 5.0), (21, 5.0), (10, 1.4), (10, 9.1), (30, 15.0)):
            assert model.values(nfe, guidance)["compensation"] == [1.0] * nfe


def test_least_squares_recovers_random_coefficients_from_their_predictions():
    rng = np.random.default_rng(1)
    settings = [(n, g) for n in range(5, 21) for g in (1.5, 3.0, 5.0, 7.5, 9.0)]
    rows = [
        (2 * i / n - 1, (g - 5.25) / 3.75, (n - 12.5) / 7.5)
        for n, g in settings
        for i in range(1, n + 1)
    ]
    x, w, n = np.array(rows).T
    basis = features(x, (w, n), (3, 2, 2))
    assert np.linalg.cond(basis) < 100
    for _ in range(3):
        c = rng.normal(size=36)
        found = np.linalg.lstsq(basis, basis @ c, rcond=None)[0]
        assert found == pytest.approx(c, abs=1e-9)


def test_decisions_and_assemble_are_inverse():
    for nfe, guidance in GRID:
        made = smooth(nfe, guidance)
        base = baseline(TEMPLATE, NOISE, nfe)
        again = assemble(base, decisions(made, base, guidance), guidance, 2)
        assert again.times == pytest.approx(made.times, abs=1e-12)
        made.program.require_equal(again.model_copy(update={"steps": tuple(
            s.model_copy(update={"guidance": None}) for s in again.steps
        )}).program, 1e-9)  # fmt: skip


def test_the_template_itself_has_neutral_decisions_only():
    base = baseline(TEMPLATE, NOISE, 6)
    for name, each in decisions(base, base, 3.0).items():
        assert set(each) == {1.0 if name == "compensation" else 0.0}, name
    model = fit([(n, g, baseline(TEMPLATE, NOISE, n)) for n, g in GRID], TEMPLATE)
    assert not model.regressions
    assert model.predict(7, 6.0).program.digest == baseline(TEMPLATE, NOISE, 7).program.digest


def test_a_setting_nobody_searched_is_predicted_from_those_searched():
    model = fit([(n, g, smooth(n, g)) for n, g in GRID], TEMPLATE)
    for nfe, guidance in ((7, 6.0), (9, 2.0), (5, 7.5)):
        found, wanted = model.predict(nfe, guidance), smooth(nfe, guidance)
        assert found.times == pytest.approx(wanted.times, abs=2e-3)
        for a, b in zip(found.steps, wanted.steps, strict=True):
            assert a.compensation == pytest.approx(b.compensation, abs=0.01)
            assert a.dt_query == pytest.approx(b.dt_query, abs=2e-3)
            assert a.weights == pytest.approx(b.weights, abs=5e-3)
            assert a.guidance is None
        assert found.nfe == nfe
        assert found.provenance["cpr"] == {"nfe": nfe, "guidance": guidance}
    for name in ("compensation", "gap", "query"):
        errors = model.regressions[name]
        assert errors.error_nfe is not None
        assert errors.error_nfe < 0.03
        assert errors.error_guidance is not None
        assert errors.error_guidance < 0.03


def test_predictions_stay_within_the_fitted_range():
    model = fit([(n, g, smooth(n, g)) for n, g in GRID], TEMPLATE)
    seen = [s.compensation for n, g in GRID for s in smooth(n, g).steps[2:]]
    for nfe in range(5, 11):
        for guidance in (1.0, 2.2, 4.4, 7.5):
            ratios = model.values(nfe, guidance)["compensation"]
            assert ratios[:2] == [1.0, 1.0]
            assert min(seen) <= min(ratios[2:])
            assert max(ratios[2:]) <= max(seen)


@pytest.mark.parametrize(("nfe", "guidance"), [(4, 3.0), (11, 3.0), (7, 0.9), (7, 8.0)])
def test_outside_the_box_it_refuses_or_falls_back_with_a_warning(nfe, guidance):
    model = fit([(n, g, smooth(n, g)) for n, g in GRID], TEMPLATE)
    with pytest.raises(StudyError, match="outside the fitted box"):
        model.predict(nfe, guidance)
    with pytest.warns(OutsideTrustRegion, match="the template is returned"):
        neutral = model.predict(nfe, guidance, outside="neutral")
    assert neutral.program.digest == baseline(TEMPLATE, NOISE, nfe).program.digest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(7, 6.0, outside="neutral")


def test_the_file_is_json_and_predicts_the_same(tmp_path):
    model = fit([(n, g, smooth(n, g)) for n, g in GRID], TEMPLATE)
    model.save(tmp_path / "cpr.json")
    again = CPR.load(tmp_path / "cpr.json")
    assert again.to_dict() == model.to_dict()
    assert again.predict(7, 6.0).program.digest == model.predict(7, 6.0).program.digest
    text = (tmp_path / "cpr.json").read_text()
    published(TABLE["coefficients"]).save(tmp_path / "sd.json")
    assert CPR.load(tmp_path / "sd.json").trusts(12, 7.5)
    for broken, message in (
        (text.replace("fewstep.cpr", "else"), "not a fewstep.cpr file"),
        (text.replace('"template"', '"templates"'), "damaged"),
        (text[:-40], "is not JSON"),
    ):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(StudyError, match=message):
            CPR.load(tmp_path / "broken.json")


def test_one_nfe_or_one_guidance_is_enough_but_says_what_it_cannot_check():
    model = fit([(6, g, smooth(6, g)) for g in (1.0, 3.0, 5.0)], TEMPLATE)
    assert model.nfe == (6, 6)
    assert model.regressions["compensation"].error_nfe is None
    assert model.regressions["compensation"].error_guidance is not None
    assert model.predict(6, 2.0).nfe == 6
    with pytest.raises(StudyError, match="outside"):
        model.predict(7, 2.0)


def test_schedules_of_other_families_are_refused():
    with pytest.raises(StudyError, match="no schedules"):
        fit([], TEMPLATE)
    with pytest.raises(StudyError, match="step 0 has corrector 'none', the template 'reuse'"):
        fit([(5, 1.0, baseline("dpmpp2m/logsnr", NOISE, 5))], TEMPLATE)
    with pytest.raises(StudyError, match="one noise schedule"):
        fit([(5, 1.0, smooth(5, 1.0)), (6, 1.0, baseline(TEMPLATE, VPDiscrete(), 6))], TEMPLATE)
    with pytest.raises(StudyError, match="36 finite numbers"):
        published([1.0] * 35)
