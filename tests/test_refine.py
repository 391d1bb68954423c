"""Refinement: neutral start, real gain on fresh noise, fitted programs as files."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewstep.predictors.gauss_newton import Batch, Fit
from fewstep.predictors.levenberg import Quadratic, levenberg
from fewstep.predictors.refine import refine
from fewstep.predictors.settings import RefineTable
from fewstep.samplers import run, sample, start
from fewstep.samplers.denoiser import bcast
from fewstep.search.stages.tasks import best_starts
from fewstep.search.strategies import Evaluated
from fewstep.space import (
    OdeSchedule,
    ProgramSchedule,
    StepSpec,
    StudyError,
    load_schedule,
    save_schedule,
)
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline, named
from fewstep.space.unknowns import FreeProgram, Retimed, canonical
from tests.oracles import Mixture, recorded_mixture

VP = noises.VPLinear()
_SHARP = recorded_mixture(VP)
# wider modes: few samples start near a watershed, so that errors have no heavy tail
MODEL = Mixture(VP, _SHARP.weights, _SHARP.means, _SHARP.variances + 0.3)


class Guided:
    """A guided denoiser: the scale pulls the data prediction away from 0."""

    noise = VP

    def __call__(self, x, t, *, cond=None, guidance=None):
        D = MODEL(x, t)
        return D if guidance is None else D * bcast(torch.as_tensor(guidance), x) ** 0.25


GUIDED = Guided()


def guided(step: StepSpec, scale: float) -> StepSpec:
    return step.model_copy(update={"guidance": scale})


def batch(seed: int, n: int = 64, model: Mixture = MODEL) -> Batch:
    x = torch.randn(n, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Batch(x, sample(baseline("dpmpp3m/logsnr", VP, 120), model, x))


@pytest.fixture(scope="module")
def noise():
    return batch(1, 128), batch(2), batch(3, 256)


def errors(schedule, model, data: Batch) -> torch.Tensor:
    """Per-sample errors by the executor that users run."""
    x = sample(schedule, model, data.x_T)
    return (x - data.target).double().square().flatten(1).mean(1)


def table(**settings) -> RefineTable:
    return RefineTable(**{"samples": 128, "loss": "mean", **settings})


@pytest.mark.parametrize(
    "name", ["unipc3-bh2/edm", "ipndm3/quadratic", "deis-tab2/time", "heun/edm"]
)
@pytest.mark.parametrize(
    "family", [noises.VPLinear(), noises.EDM(), noises.RectifiedFlow(t_start=0.999)]
)
def test_theta_zero_is_the_schedule_itself(name, family):
    s = baseline(name, family, 5)
    model, image = recorded_mixture(family), torch.ones(2, 2, 2, dtype=torch.float64)
    z = torch.randn(8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = sample(s, model, start(s, z))
    free = FreeProgram(canonical(s.program), family, constant=True)
    for model_of in (free, Retimed(s)):
        program = model_of.program(torch.zeros(model_of.size).double())
        got = run(program, model, start(s, z), m=image)
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_retimed_numbers_are_the_inner_times_of_the_schedule_it_writes():
    s = baseline("unipc3-bh2/edm", VP, 6)
    model = Retimed(s)
    theta = 0.05 * torch.randn(model.size, generator=torch.Generator().manual_seed(0)).double()
    moved = model.at(theta)
    assert moved.steps == s.steps
    assert (moved.times[0], moved.times[-1]) == (s.times[0], s.times[-1])
    model.program(theta).require_equal(moved.program)


def test_the_canonical_program_is_the_same_sampler():
    program = baseline("unipc3-bh2/edm", VP, 5).program
    x = torch.randn(8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = run(program, MODEL, x), run(canonical(program), MODEL, x)
    assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("free", ["times", "all", "image", "guidance"])
@pytest.mark.parametrize("delta", [float("inf"), 0.3])
def test_the_normal_equations_hold_the_gradient_of_the_loss(free, delta):
    s = baseline("dpmpp3m/logsnr", VP, 4)
    if free == "guidance":
        s = s.model_copy(update={"steps": tuple(guided(step, 2.0) for step in s.steps)})
    model = FreeProgram(canonical(s.program), VP, free == "guidance", free == "image")
    model = Retimed(s) if free == "times" else model
    x = torch.randn(16, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = Batch(x, torch.zeros_like(x), constant=torch.ones(2, 2, 2, dtype=torch.float64))
    fit = Fit(model, GUIDED, data, delta)
    theta = 0.01 * torch.ones(model.size, dtype=torch.float64)
    here = fit.linearise(theta)
    assert here.loss == pytest.approx(fit.losses([theta])[0], rel=1e-7)
    step = 1e-5 * torch.eye(model.size, dtype=torch.float64)
    up, down = (fit.losses([theta + sign * d for d in step]) for sign in (1, -1))
    slope = (torch.tensor(up) - torch.tensor(down)).double() / 2e-5
    assert torch.allclose(2 * here.slope, slope, rtol=2e-2, atol=3e-3 * float(slope.abs().max()))


def test_one_sample_in_another_mode_rules_least_squares_and_not_hubers_loss(noise):
    """A target moved far away pulls the plain fit off; Huber's goes on as without it."""
    train, held, fresh = noise
    spoilt = train.target.clone()
    spoilt[0] += 30.0
    bad, begin = dataclasses.replace(train, target=spoilt), baseline("dpmpp2m/logsnr", VP, 4)
    found = {}
    for loss in ("mean", "huber"):
        out = refine([begin], MODEL, bad, held, table(loss=loss, rounds=6, batch=128))
        found[loss] = float(errors(out.schedule, MODEL, fresh).median())
    clean = refine([begin], MODEL, train, held, table(loss="huber", rounds=6, batch=128))
    assert found["huber"] < 1.3 * float(errors(clean.schedule, MODEL, fresh).median())
    assert found["huber"] < 0.5 * found["mean"]


def test_levenberg_finds_the_minimum_of_a_quadratic_and_stops():
    normal = torch.diag(torch.tensor([1.0, 100.0, 1e4])).double()
    aim = torch.tensor([1.0, -2.0, 3.0]).double()

    def loss(theta):
        return float((theta - aim) @ normal @ (theta - aim)) + 1.0

    rounds = []
    theta = levenberg(
        torch.zeros(3).double(),
        lambda th: Quadratic(normal, normal @ (th - aim), loss(th)),
        lambda thetas: [loss(th) for th in thetas],
        rounds=50,
        on_round=lambda turn, th: bool(rounds.append(turn)),
    )
    assert torch.allclose(theta, aim, atol=1e-3)
    assert len(rounds) < 20


def test_a_fit_goes_on_with_more_noise_until_training_and_held_out_error_agree(noise):
    train, held, _ = noise
    begin = [baseline("dpmpp2m/logsnr", VP, 4)]
    few = refine(begin, MODEL, train.first(8), held, table(batch=8, rounds=6))
    more = refine(begin, MODEL, train, held, table(batch=8, rounds=6))
    assert few.samples == 8
    assert more.samples > 8
    assert more.after <= few.after
    assert {size for size, _ in more.curve} > {8}


def test_of_several_starts_the_one_that_gets_furthest_is_refined_to_the_end(noise):
    train, held, _ = noise
    starts = [baseline(name, VP, 4) for name in ("ddim/time", "ipndm3/quadratic")]
    out = refine(starts, MODEL, train, held, table(rounds=8))
    direct = float(errors(starts[out.start], MODEL, held).mean())
    assert out.before == pytest.approx(direct, rel=1e-4)
    assert out.after < 0.1 * out.before
    alone = refine(starts[out.start : out.start + 1], MODEL, train, held, table(rounds=8))
    assert out.calls > alone.calls


def test_without_an_image_a_fit_starts_at_the_noise_itself(noise):
    """p_0 stays 1, so that the file runs in pipelines that do not scale their input."""
    train, held, _ = noise
    table = RefineTable(samples=32, held=32, rounds=4, batch=32)
    made = refine([baseline("unipc2-bh2/logsnr", VP, 4)], MODEL, train, held, table)
    assert made.after < 0.8 * made.before
    assert made.schedule.program.init.tolist() == [1.0, 0.0]


def test_with_a_constant_image_schedules_go_further_and_are_files_with_an_image(tmp_path):
    """Data far from 0, as images are: a start at pure noise lacks their mean."""
    model = Mixture(VP, _SHARP.weights, _SHARP.means / 2 + 2, _SHARP.variances / 4 + 0.1)
    train, held = batch(1, 128, model), batch(2, 64, model)
    begin, settings = [baseline("dpmpp2m/logsnr", VP, 3)], table(rounds=12)
    plain = refine(begin, model, train, held, settings)
    image = train.target.mean(0)
    with_image = [dataclasses.replace(b, constant=image) for b in (train, held)]
    out = refine(begin, model, *with_image, settings)
    assert out.before == plain.before  # the image has no weight yet
    assert out.after < 0.8 * plain.after
    again = load_schedule(save_schedule(out.schedule, tmp_path / "refined.json"))
    assert again.digest == out.schedule.digest
    assert torch.equal(again.constant, image)
    assert float(errors(again, model, held).mean()) == pytest.approx(out.after, rel=1e-3)
    further = refine([again], model, *with_image, settings)
    assert further.after <= out.after


def test_guidance_of_every_call_is_fitted_with_the_program(noise):
    """The teacher's scale is 1; a start at 2 finds its way back."""
    image = noise[0].target.mean(0)
    train, held = (dataclasses.replace(b, constant=image) for b in noise[:2])
    begin = baseline("dpmpp2m/logsnr", VP, 4)
    begin = begin.model_copy(update={"steps": tuple(guided(s, 2.0) for s in begin.steps)})
    knobs = ("times", "weights", "guidance")
    out = refine([begin], GUIDED, train, held, table(knobs=knobs, rounds=8))
    fixed = refine([begin], GUIDED, train, held, table(rounds=8))
    assert out.after < 0.5 * fixed.after
    assert set(fixed.schedule.program.guidance.tolist()) == {2.0}
    assert 2.0 not in out.schedule.program.guidance.tolist()


def test_run_time_options_are_fitted_with_and_stay(noise):
    train, held, _ = noise
    options = {"threshold": {"quantile": 0.0, "minimum": 0.9}}
    begin = baseline("dpmpp2m/logsnr", VP, 4).model_copy(update={"options": options})
    clipped = [dataclasses.replace(b, options=options) for b in (train, held)]
    out = refine([begin], MODEL, *clipped, table(rounds=3))
    assert out.schedule.options == options
    assert float(errors(out.schedule, MODEL, held).mean()) == pytest.approx(out.after, rel=1e-3)
    with pytest.raises(StudyError, match="run-time options"):
        refine([begin, baseline("dpmpp2m/logsnr", VP, 4)], MODEL, train, held, table())


@pytest.mark.parametrize("loss", ["mean", "huber"])
def test_refinement_halves_the_error_of_the_best_named_solver_on_fresh_noise(
    loss, noise, tmp_path
):
    train, held, fresh = noise
    out = refine(
        [baseline("unipc2-bh2/quadratic", VP, 5)], MODEL, train, held, table(loss=loss, rounds=6)
    )
    best = min(float(errors(s, MODEL, fresh).mean()) for s in list(named(VP, 5).values())[::6])
    assert out.after < out.before
    assert isinstance(out.schedule, ProgramSchedule)
    assert (
        out.schedule.provenance["refined_from"] == baseline("unipc2-bh2/quadratic", VP, 5).digest
    )
    assert float(errors(out.schedule, MODEL, fresh).mean()) < 0.5 * best
    again = load_schedule(save_schedule(out.schedule, tmp_path / "refined.json"))
    assert again.digest == out.schedule.digest


@pytest.mark.parametrize("family", [noises.EDM(), noises.RectifiedFlow(t_start=0.999)])
def test_programs_of_other_noise_schedules_are_fitted_and_start_from_their_scale(family):
    model = recorded_mixture(family)
    model = Mixture(family, model.weights, model.means, model.variances + 0.3)
    begin = baseline("dpmpp2m/edm", family, 4)
    z = torch.randn(192, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    target = sample(baseline("dpmpp3m/logsnr", family, 120), model, start(begin, z))
    data = Batch(start(begin, z), target)
    held = dataclasses.replace(data, x_T=data.x_T[128:], target=target[128:])
    out = refine([begin], model, data.first(128), held, table(rounds=8))
    assert out.after < 0.3 * out.before
    x = sample(out.schedule, model, start(out.schedule, z[128:]))
    assert float((x - held.target).square().mean()) == pytest.approx(out.after, rel=1e-3)


def test_times_alone_keep_the_steps_of_the_start(noise):
    train, held, _ = noise
    begin = baseline("ipndm3/quadratic", VP, 4)
    out = refine([begin], MODEL, train, held, table(knobs=("times",), rounds=6))
    assert isinstance(out.schedule, OdeSchedule)
    assert out.schedule.steps == begin.steps
    assert out.schedule.times != begin.times
    assert out.after < out.before
    free = refine([begin], MODEL, train, held, table(rounds=6))
    assert free.after < out.after
    with pytest.raises(StudyError, match="needs the steps"):
        refine([free.schedule], MODEL, train, held, table(knobs=("times",)))


def test_a_model_without_gradients_is_refined(noise):
    train, held, _ = noise

    class Remote:
        noise = VP

        @torch.no_grad()
        def __call__(self, x, t, *, cond=None, guidance=None):
            return MODEL(x, t)

    out = refine([baseline("ddim/edm", VP, 4)], Remote(), train, held, table(rounds=3))
    assert out.after < 0.5 * out.before


def test_a_feature_distance_is_minimised_in_feature_space(noise):
    train, held, _ = noise
    features = lambda x: x.flatten(1)[:, :2]  # noqa: E731
    begin, there = [baseline("dpmpp2m/logsnr", VP, 4)], []
    out = refine(
        begin,
        MODEL,
        *(dataclasses.replace(b, features=features) for b in (train, held)),
        table(rounds=6),
    )
    plain = refine(begin, MODEL, train, held, table(rounds=6))
    for one in (out, plain):
        x = sample(one.schedule, MODEL, held.x_T)
        there.append(float((features(x) - features(held.target)).square().mean()))
    assert out.after < 0.2 * out.before
    assert out.after == pytest.approx(there[0], rel=1e-3)
    assert there[0] < there[1]


def test_starts_that_cannot_be_fitted_together_are_one_clear_line(noise):
    train, held, _ = noise
    mixed = [baseline("ddim/time", VP, 3), baseline("ddim/time", VP, 4)]
    with pytest.raises(StudyError, match="different NFE"):
        refine(mixed, MODEL, train, held, table())
    noisy = mixed[0].model_copy(
        update={"steps": tuple(s.model_copy(update={"eta": 1.0}) for s in mixed[0].steps)}
    )
    with pytest.raises(StudyError, match="fresh noise"):
        refine([noisy], MODEL, train, held, table())


def test_starts_share_one_image_that_of_the_best_if_it_has_one():
    plain = baseline("dpmpp2m/logsnr", VP, 4)
    mine, other = torch.ones(2), torch.zeros(2)

    def starting(name, image):
        steps = baseline(name, VP, 5).model_copy(update={"first": "mean"})
        return steps.with_constant(image)

    scored = [starting("dpmpp2m/logsnr", mine), plain, starting("ddim/edm", other)]
    known = [Evaluated(s, float(i), "ok") for i, s in enumerate(scored)]
    taken = lambda known, image: [int(e.score) for e in best_starts(known, 3, (), image)]  # noqa: E731
    assert taken(known, other) == [0, 1]  # the best brings its own, the search's has no say
    assert taken(known[1:], other) == [1, 2]
    assert taken(known[1:], mine) == [1]
    assert taken(known, None) == [0]
    assert taken(known[1:], None) == [1]
