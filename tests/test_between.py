"""Fitted programs at several guidance scales, and what lies between them."""

import json
import shutil

import numpy as np
import pytest
import torch

from fewstep.predictors.between import Aligned, between
from fewstep.predictors.refine import Fitted, refine
from fewstep.samplers import sample
from fewstep.search import run
from fewstep.search.display import Display
from fewstep.search.preparing import open_pool
from fewstep.search.stages import tasks
from fewstep.space import ProgramSchedule, ScheduleError, StudyError, save_schedule
from fewstep.space.baselines import baseline
from fewstep.space.noise import RectifiedFlow, VPLinear
from fewstep.space.unknowns import FreeProgram, canonical, numbers, with_numbers
from tests.studies import GUIDED, called, guided_search, predicted, refused

NOISE = VPLinear()


def _program(seed=None, nfe=3, noise=NOISE, **changes):
    """A named solver's program, every number moved a little."""
    plain = ProgramSchedule.of(baseline("ddim/time", noise, nfe))
    model = FreeProgram(canonical(plain.program), noise)
    theta = torch.zeros(model.size, dtype=torch.float64)
    if seed is not None:
        theta = (
            0.05 * torch.randn(model.size, generator=torch.Generator().manual_seed(seed)).double()
        )
    return plain.model_copy(update={"program": model.program(theta), **changes})


def _numbers(schedule):
    return numbers(canonical(schedule.program), NOISE)


def test_numbers_given_back_are_the_program():
    program = canonical(_program(1).program)
    again = with_numbers(program, NOISE, numbers(program, NOISE))
    for name in ("t", "label", "alpha", "sigma", "init", "e", "k", "b"):
        torch.testing.assert_close(
            getattr(again, name), getattr(program, name), rtol=0, atol=1e-12
        )


def test_the_ends_are_the_samplers_given_and_numbers_go_straight():
    a, b = _program(1), _program(2)

    def denoise(x, t, *, cond=None, guidance=None):
        return 0.3 * torch.tanh(x) + 0.1 * t.to(x)[:, None]

    denoise.noise = NOISE
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    for share, wanted in ((0.0, a), (1.0, b)):
        found, given = (sample(s, denoise, z) for s in (between(a, b, share), wanted))
        torch.testing.assert_close(found, given, rtol=1e-5, atol=1e-6)
    middle = _numbers(between(a, b, 0.25))
    torch.testing.assert_close(middle, 0.75 * _numbers(a) + 0.25 * _numbers(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"nfe": 4}, "nfe is 3 of one program and 4 of the other"),
        ({"noise": RectifiedFlow()}, "noise is "),
        ({"end": 0.01}, "end is "),
        ({"options": {"threshold": {"quantile": 0.995, "minimum": 1.0}}}, "options is "),
        ({"image": 1.0}, "only one of the programs has a constant image"),
    ],
)
def test_programs_that_differ_in_more_than_numbers_are_refused_by_field(other, message):
    image = other.pop("image", None)
    b = _program(2, **other)
    if image is not None:
        b = b.with_constant(torch.full((2,), image))
    with pytest.raises(ScheduleError, match=message):
        between(_program(1), b, 0.5)


def test_other_images_and_guidance_of_one_alone_are_refused():
    a, b = (_program(k).with_constant(torch.full((2,), float(k))) for k in (1, 2))
    with pytest.raises(ScheduleError, match="different constant images"):
        between(a, b, 0.5)
    guided = baseline("ddim/time", NOISE, 3)
    steps = tuple(step.model_copy(update={"guidance": 2.0}) for step in guided.steps)
    scaled = ProgramSchedule.of(guided.model_copy(update={"steps": steps}))
    with pytest.raises(ScheduleError, match="only one of the programs sets guidance"):
        between(_program(), scaled, 0.5)


def test_a_folder_answers_at_between_and_not_beyond_its_scales(tmp_path):
    at = {1.0: _program(1), 2.0: _program(2), 4.0: _program(3)}
    found = Aligned({3: dict(at)})
    found.save(tmp_path)
    again = Aligned.load(tmp_path)
    assert again.predict(3, 2.0).digest == at[2.0].digest
    assert again.predict(3, 3.0).digest == between(at[2.0], at[4.0], 0.5).digest
    with pytest.raises(StudyError, match="fitted with 3 calls"):
        again.predict(4, 2.0)
    with pytest.raises(StudyError, match=r"guidance 4.5 lies outside of .* 1 to 4"):
        again.predict(3, 4.5)
    with pytest.raises(StudyError, match="no programs fitted"):
        Aligned.load(tmp_path / "nowhere")
    save_schedule(baseline("ddim/time", NOISE, 3), tmp_path / "nfe03_w9.json")
    with pytest.raises(StudyError, match="not a fitted program with a guidance scale"):
        Aligned.load(tmp_path)


def test_leaving_out_compares_with_the_program_between_the_neighbours():
    at = {1.0: _program(1), 2.0: _program(2), 4.0: _program(3)}
    asked = []

    def sampled(setting, schedules):
        asked.append((setting.nfe, setting.guidance, schedules[1].digest))
        return np.array([0.1, 0.3])[:, None, None] * np.ones((2, 8, 2)), np.zeros((8, 2))

    (row,) = Aligned({3: at}).left_out(sampled)
    assert asked == [(3, 2.0, between(at[1.0], at[4.0], 1 / 3).digest)]
    assert row["ratio"] == pytest.approx(9)
    assert (row["own"], row["between"]) == pytest.approx((0.01, 0.09))


STUDY = GUIDED.replace("[1, 3]", "[1, 2, 3]").replace("nfe = [3, 5]", "nfe = [3]")
STUDY = STUDY.replace('"random"', '"random+refine"').replace("fit = true\n", "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return guided_search(tmp_path_factory.mktemp("scales"), text=STUDY)


def test_a_search_over_scales_leaves_programs_fitted_from_one_another(finished):
    names = {p.name for p in (finished.out / "cpr").glob("*.json")}
    assert names == {"nfe03_w1.json", "nfe03_w2.json", "nfe03_w3.json"}
    assert not (finished.out / "cpr.json").exists()
    (row,) = json.loads((finished.out / "results.json").read_text())["between"]
    assert (row["nfe"], row["guidance"]) == (3, 2.0)
    assert row["ratio"] == pytest.approx(row["between"] / row["own"])
    for scale, before in ((2, 1), (3, 2)):
        journal = (finished.out / f"w{scale}" / "study.journal").read_text()
        assert f"refine:w{before}" in journal


def test_export_answers_for_a_scale_between_and_says_what_is_missing(finished, capsys, tmp_path):
    folder, file = finished.out / "cpr", tmp_path / "made.json"
    ask = ("export", "--cpr", folder, "--out", file)
    made, said = predicted(capsys, folder, file, 3, 2.5)
    assert isinstance(made, ProgramSchedule)
    assert "guidance 2.5, between two fitted programs" in said
    for words, message in (
        ((), "--nfe is missing"),
        (("--nfe", 3), "--guidance is missing"),
        (("--nfe", 4, "--guidance", 2), "search this one"),
        (("--nfe", 3, "--guidance", 4), "lies outside"),
        (("--nfe", 3, "--guidance", 4, "--outside", "neutral"), "has no neutral one"),
    ):
        assert message in refused(capsys, *ask, *words)
    assert "between two guidance scales" in called(capsys, "report", finished.out)[1]


def test_scales_cut_short_end_as_if_they_had_not_been(finished, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(finished.out, out)
    shutil.rmtree(out / "w3")
    log = out / "w2" / "study.journal"
    log.write_bytes(log.read_bytes()[: int(0.97 * log.stat().st_size)])
    again = guided_search(tmp_path, text=STUDY, out="cut", resume=True)
    assert again.rows == finished.rows
    a, b = (Aligned.load(o.out / "cpr") for o in (again, finished))
    assert a.predict(3, 2.5).digest == b.predict(3, 2.5).digest


def test_a_scale_whose_fit_fails_is_said_to_be_missing(tmp_path, monkeypatch):
    said = []

    class Heard(Display):
        def note(self, text):
            said.append(text)

    def fails_from_a_scale(starts, *given, **more):
        if isinstance(starts[0], ProgramSchedule):
            return Fitted(starts[0], message="no memory")
        return refine(starts, *given, **more)

    monkeypatch.setattr(tasks, "refine", fails_from_a_scale)
    outcome = guided_search(tmp_path, "search.guidance=[1, 2]", text=STUDY, display=Heard())
    assert [p.name for p in (outcome.out / "cpr").glob("*.json")] == ["nfe03_w1.json"]
    assert "NFE 3: not fitted from w1: this scale is not in cpr/" in said


def test_two_scales_have_nothing_to_leave_out_and_open_no_pool_for_it(tmp_path, monkeypatch):
    opened = []

    def counted(*given):
        opened.append(given)
        return open_pool(*given)

    monkeypatch.setattr(run, "open_pool", counted)
    outcome = guided_search(tmp_path, "search.guidance=[1, 2]", text=STUDY)
    assert len(opened) == 2  # one for the search at each scale
    assert len(list((outcome.out / "cpr").glob("*.json"))) == 2
    assert "between" not in json.loads((outcome.out / "results.json").read_text())
