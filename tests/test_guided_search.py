"""Guidance as a dimension of a search, per step as a decision, and the regression between."""

import json
import shutil

import pytest

from fewstep.predictors.cpr import CPR
from fewstep.predictors.refine import refine
from fewstep.search.stages import tasks
from fewstep.space import StudyError, load_schedule
from fewstep.space.baselines import baseline
from fewstep.space.noise import VPLinear
from tests.studies import (
    GUIDED,
    called,
    guided_search,
    predicted,
    refused,
    trial_table,
    write_study,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return guided_search(tmp_path_factory.mktemp("guided"))


def test_every_scale_has_a_search_and_every_setting_a_row_and_a_file(finished):
    settings = [(3, 1.0), (5, 1.0), (3, 3.0), (5, 3.0)]
    assert [(row.nfe, row.guidance) for row in finished.rows] == settings
    rows = json.loads((finished.out / "results.json").read_text())["rows"]
    assert [(row["nfe"], row["guidance"]) for row in rows] == settings
    for nfe, scale in settings:
        name = f"nfe{nfe:02d}_w{scale:g}.json"
        schedule = load_schedule(finished.out / "schedules" / name)
        assert schedule.nfe == nfe
        assert schedule.provenance["guidance"] == scale
        inner = load_schedule(finished.out / f"w{scale:g}" / "schedules" / name)
        assert inner.digest == schedule.digest
    names = {path.name for path in (finished.out / "schedules").iterdir()}
    assert len(names) == 4


def test_scales_are_different_problems(finished):
    """The same named solver scores differently, because the teacher's samples differ."""
    a, b = (next(r for r in finished.rows if (r.nfe, r.guidance) == (5, w)) for w in (1.0, 3.0))
    assert dict((s.name, s.score) for s in a.named) != dict((s.name, s.score) for s in b.named)


def test_the_regression_is_fitted_on_one_template_and_says_how_good_it_is(finished):
    model = CPR.load(finished.out / "cpr.json")
    assert (model.nfe, model.guidance) == ((3, 5), (1.0, 3.0))
    assert model.template == "unipc2-bh2/quadratic/low"
    origin = model.provenance
    assert origin["start"] == "the template"
    assert origin["calls"] > 0
    for row in origin["settings"]:
        assert row["fitted"] <= row["start"]
        assert row["without_its_nfe"] > 0
        assert row["without_its_guidance"] > 0
        assert row["found"] > 0
    assert origin["settings"][0]["fitted"] < origin["settings"][0]["start"]


def test_export_answers_between_the_settings_and_refuses_beyond(finished, capsys, tmp_path):
    cpr, file = finished.out / "cpr.json", tmp_path / "made.json"
    ask = ("export", "--cpr", cpr, "--out", file)
    made, _ = predicted(capsys, cpr, file, 4, 2.0)
    assert made.digest != baseline("unipc2-bh2/quadratic/low", VPLinear(), 4).digest
    assert "outside the fitted box" in refused(capsys, *ask, "--nfe", 6, "--guidance", 2)
    code, text, _ = called(capsys, *ask, "--nfe", 6, "--guidance", 2, "--outside", "neutral")
    assert code == 0
    assert "warning: NFE 6, guidance 2 lies outside" in text
    neutral = baseline("unipc2-bh2/quadratic/low", VPLinear(), 6)
    assert load_schedule(file).digest == neutral.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cpr", "CPR"), "--nfe is missing: "),
        (("--cpr", "CPR", "--nfe", 4), "--guidance is missing: "),
        (("--cpr", "CPR", "--nfe", 4, "--to", "csv"), "--cpr takes the place of FILE"),
        (("--cpr", "nowhere.json", "--nfe", 4), "no such file"),
        (("--cpr", "CPR", "--nfe", 4, "--outside", "guess"), "use refuse or neutral"),
        (("--nfe", 4), "need --cpr FILE"),
        ((), "give FILE --to FORM DIR, or --cpr FILE"),
    ],
)
def test_an_export_that_lacks_something_is_one_line(finished, capsys, arguments, message):
    given = [str(finished.out / "cpr.json") if a == "CPR" else a for a in arguments]
    assert message in refused(capsys, "export", *given)


def test_report_prints_a_table_for_each_scale_and_the_regressions(finished, capsys):
    code, text, _ = called(capsys, "report", finished.out)
    assert code == 0
    assert "guidance 1\n" in text
    assert "guidance 3\n" in text
    assert "CPR on unipc2-bh2/quadratic/low" in text


def test_a_search_cut_anywhere_goes_on_to_the_same_end(finished, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(finished.out, out)
    shutil.rmtree(out / "w3")
    (out / "cpr.json").unlink()
    log = out / "w1" / "study.journal"
    log.write_bytes(log.read_bytes()[: int(0.6 * log.stat().st_size)])
    again = guided_search(tmp_path, out="cut", resume=True)
    assert again.rows == finished.rows
    made, wanted = (CPR.load(f.out / "cpr.json") for f in (again, finished))
    assert made.regressions.keys() == wanted.regressions.keys()
    assert made.predict(4, 2.0).times == pytest.approx(wanted.predict(4, 2.0).times, abs=1e-9)
    with pytest.raises(StudyError, match=r"search\.guidance is"):
        guided_search(tmp_path, "search.guidance=[1, 2]", out="cut", resume=True)
    with pytest.raises(StudyError, match="--overwrite"):
        guided_search(tmp_path, out="cut")


def test_one_scale_keeps_one_folder_and_one_setting_fits_nothing(tmp_path):
    plain = GUIDED.replace("fit = true\n", "")
    outcome = guided_search(tmp_path, "search.guidance=[2]", "search.nfe=[3]", text=plain)
    assert [row.guidance for row in outcome.rows] == [2.0]
    assert load_schedule(outcome.out / "schedules" / "nfe03_w2.json").provenance["guidance"] == 2
    assert not (outcome.out / "cpr.json").exists()


def test_without_scales_files_keep_their_names_and_one_family_starts_the_fit(tmp_path):
    text = GUIDED.replace("guidance = [1, 3]\n", "").replace('"random"', '"compensation"')
    text = text.replace("fit = true\n", "")  # after compensation that is so by itself
    text = text.replace("\ntemplate = ", "\n# ")
    text += '\n[compensation]\nbase = "unipc2-bh2/quadratic/low"\nsamples = 16\n'
    settings = ("search.nfe=[4, 5]", "budget.candidates=1")  # DDIM is all there is to beat
    outcome = guided_search(tmp_path, *settings, text=text)
    names = {path.name for path in (outcome.out / "schedules").iterdir()}
    assert names == {"nfe04.json", "nfe05.json"}
    assert {row.source for row in outcome.rows} == {"compensation:unipc2-bh2/quadratic/low"}
    assert {row.guidance for row in outcome.rows} == {None}
    model = CPR.load(outcome.out / "cpr.json")
    assert model.template == "unipc2-bh2/quadratic/low"
    assert model.provenance["start"].startswith("ridge")
    assert model.guidance == (1.0, 1.0)


def test_guidance_per_step_is_a_decision_that_starts_from_the_problems_scale(tmp_path):
    text = GUIDED.replace("guidance = [1, 3]\n", "").replace('"random"', '"evolution"')
    settings = ("search.nfe=[3]", "model.guidance=2.0", "budget.candidates=127")
    extras = "space.extras=[['guidance', 1.0, 4.0]]"
    plain = guided_search(tmp_path, *settings, text=text, out="plain")
    opened = guided_search(tmp_path, *settings, extras, text=text, out="opened")
    a, b = (trial_table(o.out) for o in (plain, opened))
    count = next(i for i, row in enumerate(b) if row[-1]["generation"] > 0)
    assert count > 20
    for x, y in zip(a[:count], b[:count], strict=True):
        assert x[2] == pytest.approx(y[2])  # the same samplers, told their scale
    scales = {v for row in b[count:] for k, v in row[3].items() if k.startswith("guidance_")}
    assert scales - {2.0}
    assert all(1.0 <= v <= 4.0 for v in scales)
    schedule = load_schedule(opened.out / "schedules" / "nfe03.json")
    assert schedule.program.guidance is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("search.guidance=[]",), "is empty or names a scale twice"),
        (("search.guidance=[2, 2]",), "names a scale twice"),
        (("search.guidance=[0]",), r"search\.guidance\.0 = 0"),
        (("search.guidance=[2]", "space.extras=[['guidance', 3.0, 4.0]]"), "leaves out 2"),
        (("cpr.template='unipc9/time'",), r"cpr\.template: solver 'unipc9' is unknown"),
        (
            ("cpr.template='heun/time'",),
            r"cpr\.template: heun makes an odd number of calls, not 4",
        ),
        (("cpr.decisions=['gap', 'colour']",), r"cpr\.decisions\.1 = 'colour'"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, overrides, message):
    with pytest.raises(StudyError, match=message) as error:
        guided_search(tmp_path, *overrides)
    assert "\n" not in str(error.value)


def test_guidance_cannot_be_opened_without_a_scale_to_start_from(tmp_path):
    text = GUIDED.replace("guidance = [1, 3]\n", "")
    with pytest.raises(StudyError, match="has none to start from"):
        guided_search(tmp_path, "space.extras=[['guidance', 1.0, 4.0]]", text=text)


def test_a_command_with_a_study_of_several_scales_asks_for_one(finished, capsys, tmp_path):
    study = write_study(tmp_path, GUIDED)
    file = finished.out / "schedules" / "nfe03_w3.json"
    error = refused(capsys, "compare", file, file, "--study", study)
    assert "search.guidance lists 2 scales: choose one" in error
    ask = ("compare", file, file, "--study", study, "-n", 8)
    code, _, _ = called(capsys, *ask, "--set", "search.guidance=[3]")
    assert code == 0


@pytest.mark.parametrize(
    ("settings", "halved"),
    [
        (("search.guidance=[3]",), [1.5]),
        (("search.guidance=[1.5]",), []),
        (("model.guidance=3",), [1.5]),
        (("model.guidance=3", "refine.knobs=['times']"), []),
    ],
)
def test_under_strong_guidance_a_fit_also_starts_at_half_of_it(
    tmp_path, monkeypatch, settings, halved
):
    seen = []

    def recorded(starts, denoiser, train, held, table, **more):
        seen.append((train.guidance, len(starts), len(train)))
        return refine(starts, denoiser, train, held, table, **more)

    monkeypatch.setattr(tasks, "refine", recorded)
    text = GUIDED.replace("guidance = [1, 3]\n", "").replace("fit = true\n", "")
    text = text.replace('"random"', '"random+refine"')
    more = ("search.nfe=[3]", "refine.samples=16", "refine.batch=8")
    outcome = guided_search(tmp_path, *settings, *more, text=text)
    assert [g for g, _, _ in seen[:-1]] == halved
    assert seen[-1][0] in (3, 1.5)
    assert [samples for _, _, samples in seen] == [8] * len(halved) + [16]
    few = 1 + len(halved)  # the best candidate and the best named solver may be one
    assert few <= seen[-1][1] <= few + 2
    assert outcome.rows[0].ratio < 1
