"""Each decision set to neutral alone: what is swapped, what stays, and what the report says."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from fewstep.experiments.cli.decisions import Explained, decisions_picture, explain, words
from fewstep.experiments.cli.importance import DECISIONS, Effect, swaps
from fewstep.experiments.cli.rescore import load_evaluator, rescore
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.search.verdict import FRESH
from fewstep.search.work import Evaluator
from fewstep.space import OdeSchedule, StepSpec, load_schedule
from fewstep.space.baselines import baseline, named
from fewstep.space.domain import OdeDomain
from fewstep.space.noise import EDM, RectifiedFlow, VPLinear
from tests.studies import write_study
from tests.test_domain import EVERYTHING, NOISES

NEUTRAL = StepSpec()
FOLLOWS = {  # fields that mean nothing once a decision is neutral, and go with it
    "order": {"slope_points", "relaxation", "relaxation_coefficient", "corrector_order"},
    "basis": {"power", "slope_points", "relaxation", "relaxation_coefficient"}
    | {"corrector_relaxation", "corrector_slope_points"},
    "relaxation": {"relaxation_coefficient"},
    "corrector": {"corrector_order", "corrector_relaxation", "corrector_slope_points"},
    "time": {"dt_query", "dt_start", "dt_land"},
}


def changed(a: StepSpec, b: StepSpec) -> set[str]:
    return {n for n in StepSpec.model_fields if getattr(a, n) != getattr(b, n)}


def sampled(noise, nfe: int, count: int = 10) -> list[OdeSchedule]:
    choices = EVERYTHING if noise.type in ("vp_linear", "edm") else replace(EVERYTHING, extras=())
    domain = OdeDomain(noise, nfe, choices, first=("network", "zero"))
    rng = np.random.default_rng(nfe)
    return [domain.sample(rng) for _ in range(count)]


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: f"{n.type}-{n.t_range[1]}")
def test_a_swap_makes_as_many_calls_and_changes_its_decision_alone(noise):
    seen = set()
    for schedule in sampled(noise, 5):
        for swap in swaps(schedule):
            if swap.schedule is None:
                assert swap.note
                continue
            assert swap.schedule.nfe == swap.schedule.program.nfe == schedule.nfe
            seen.add(swap.decision)
            if swap.decision == "first" or swap.note:  # the calls move: steps come or go
                continue
            for i, (old, new) in enumerate(zip(schedule.steps, swap.schedule.steps, strict=True)):
                allowed = FOLLOWS.get(swap.decision, set())
                if swap.decision == "time":
                    assert changed(old, new) <= allowed
                elif i == swap.step:
                    assert changed(old, new) - allowed == {swap.decision}
                    assert getattr(new, swap.decision) == getattr(NEUTRAL, swap.decision)
                else:
                    assert old == new
            if swap.decision != "time":
                assert swap.schedule.times == schedule.times
    assert {"time", "order", "formulation", "basis", "corrector"} <= seen <= set(DECISIONS)


@pytest.mark.parametrize("noise", [VPLinear(), EDM()], ids=lambda n: n.type)
def test_every_decision_that_does_something_is_listed(noise):
    """Written anew, from the fields: those that act wherever they are not neutral."""
    for schedule in sampled(noise, 5, 6):
        listed = {(s.step, s.decision) for s in swaps(schedule)}
        for i, step in enumerate(schedule.steps):
            for name in ("order", "weights", "compensation", "dt_query", "dt_start", "dt_land"):
                assert ((i, name) in listed) == (getattr(step, name) != getattr(NEUTRAL, name))
            assert ((i, "corrector") in listed) == (step.corrector != "none")
            if step.formulation != "data" and step.order > 1:
                assert (i, "formulation") in listed


def test_a_swapped_time_stands_in_the_middle_of_its_neighbours_in_lam():
    noise = VPLinear()
    schedule = baseline("dpmpp2m/time", noise, 5)
    domain = OdeDomain(noise, 5)
    for swap in swaps(schedule):
        if swap.decision == "time":
            lam = domain.lam(swap.schedule.times)
            assert lam[swap.step] == pytest.approx((lam[swap.step - 1] + lam[swap.step + 1]) / 2)


def test_a_uniform_ddim_has_nothing_to_swap():
    assert swaps(baseline("ddim/logsnr", VPLinear(), 6)) == []


def test_a_freed_call_is_spent_and_a_missing_one_is_saved():
    heun = OdeDomain(EDM(), 5).canonical(baseline("heun/edm", EDM(), 5))
    (first, *_) = (s for s in swaps(heun) if s.decision == "corrector")
    assert first.schedule.n_steps == heun.n_steps + 1
    plain = baseline("dpmpp2m/time", VPLinear(), 5)
    free = plain.model_copy(update={"first": "zero"})
    (swap,) = (s for s in swaps(free) if s.decision == "first")
    assert swap.schedule.nfe == free.nfe == 4
    assert swap.schedule.first == "network"


def test_what_has_no_neutral_value_says_so():
    noise = RectifiedFlow()
    step = StepSpec(order=2, formulation="velocity", basis="t")
    schedule = OdeSchedule(noise=noise, times=(0.9, 0.4, 0.1), steps=(StepSpec(), step))
    (swap,) = (s for s in swaps(schedule) if s.decision == "basis")
    assert swap.schedule is None
    assert "velocity" in swap.note
    (heun, *_) = (s for s in swaps(baseline("heun/edm", EDM(), 5)) if s.decision == "tableau")
    assert heun.schedule is None


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importance")
    path = write_study(folder)
    run.search(load_study(path), folder / "out")
    return path


@pytest.fixture(scope="module")
def evaluator(study) -> Evaluator:
    return load_evaluator(load_study(study))


def test_scores_are_those_of_the_search(study, evaluator):
    out, config = study.parent / "out", load_study(study)
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    schedule = load_schedule(out / "schedules" / "nfe03.json")
    before = sorted((out / "teacher").iterdir())
    scored = rescore([schedule], evaluator, config, 16, out / "teacher", stream=FRESH)
    assert scored.value(0) == pytest.approx(row["found_score"], rel=1e-6)
    rescore([schedule], evaluator, config, 8, out / "teacher", stream=FRESH, held=16)
    assert sorted((out / "teacher").iterdir()) == before  # nothing computed anew


def test_effects_are_paired_ratios_of_the_swaps_scores(study, evaluator, tmp_path):
    config = load_study(study)
    schedule = baseline("dpmpp2m/quadratic", VPLinear(), 4)
    other = baseline("ipndm2/time", VPLinear(), 3)
    one, two = explain([("a", schedule), ("b", other)], evaluator, config, 16, tmp_path)
    listed = [s.schedule for s in swaps(schedule) if s.schedule is not None]
    scored = rescore([schedule, *listed], evaluator, config, 16, tmp_path, stream=FRESH)
    assert one.score == pytest.approx(scored.value(0))
    expected = sorted(scored.value(i) / scored.value(0) for i in range(1, len(listed) + 1))
    assert sorted(x.ratio for x in one.effects) == pytest.approx(expected)
    assert all(x.interval[0] <= x.ratio <= x.interval[1] for x in one.effects)
    assert [x.ratio for x in two.effects] == sorted((x.ratio for x in two.effects), reverse=True)
    assert two.nfe == 3


def test_a_decision_that_was_chosen_well_shows_as_needed(study, evaluator, tmp_path):
    """On a smooth problem DDIM with one time put in a bad place: the middle is better."""
    noise = VPLinear()
    good = baseline("dpmpp2m/logsnr", noise, 6)
    times = list(good.times)
    times[3] = times[2] - 0.02 * (times[2] - times[3])
    bad = good.model_copy(update={"times": tuple(times)})
    config = load_study(study)
    (explained,) = explain([("bad", bad)], evaluator, config, 512, tmp_path)
    by = {(x.step, x.decision): x for x in explained.effects}
    assert by[3, "time"].ratio < 1
    assert by[3, "time"].sure
    assert any("step 3: the time" in line and "does harm" in line for line in words(explained))


def example(**changes) -> Explained:
    effects = (
        Effect(2, "order", "3", ratio=float("inf"), interval=(float("inf"), float("inf"))),
        Effect(1, "order", "2", ratio=4.1, interval=(3.6, 4.7)),
        Effect(1, "dt_query", "0.01", ratio=1.01, interval=(0.9, 1.1)),
        Effect(0, "corrector", "reuse", ratio=0.5, interval=(0.4, 0.6)),
        Effect(2, "basis", "t", note="velocity has no lam"),
    )
    fields = {"name": "x", "nfe": 3, "digest": "d", "objective": "endpoint_mse", "samples": 8}
    fields |= {"score": 0.1, "steps": 3, "effects": effects}
    return Explained(**fields | changes)


def test_words_name_what_matters_what_harms_and_how_many_do_nothing():
    said = words(example())
    assert said[1] == "step 2: order 3 matters most: without it the error is not finite"
    assert said[2] == "step 1: order 2 matters: without it the error is 4.10x (3.60–4.70)"
    assert (
        said[3]
        == "step 0: corrector reuse does harm: without it the error is 0.500x (0.400–0.600)"
    )
    assert said[4].startswith("of 4 decisions: 2 helpful, 1 harmful, 1 without a difference")
    assert "neutral" in words(example(effects=()))[-1]


def test_numbers_survive_the_file_and_are_json():
    text = json.dumps(example().to_dict(), allow_nan=False)
    assert Explained.from_dict(json.loads(text)) == example()


@pytest.mark.parametrize("effects", [example().effects, (), example().effects[-1:]])
def test_a_picture_is_drawn_of_anything(tmp_path, effects):
    path = decisions_picture(tmp_path / "new" / "p.png", [example(effects=effects), example()])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_frechet_has_intervals_too(study, tmp_path):
    config = load_study(study, ["objective.name=frechet"])
    schedule = next(iter(named(VPLinear(), 3).values()))
    (explained,) = explain([("a", schedule)], load_evaluator(config), config, 16, tmp_path)
    assert explained.objective == "frechet"
    assert all(x.interval[0] <= x.interval[1] for x in explained.effects)
    assert not any(re.search("the error", line) for line in words(explained))
