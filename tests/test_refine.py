"""Refinement: neutral start, real gain, an ordinary file as result, no-gradient fallback."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewstep.samplers import from_model, run, sample, start
from fewstep.samplers.denoiser import bcast
from fewstep.search.refining import best_starts
from fewstep.search.strategies import Evaluated
from fewstep.search.strategies.closed_form import fit_weights, teacher_states
from fewstep.search.strategies.gauss_newton import FreeProgram, canonical, linearise
from fewstep.search.strategies.knobs import DEFAULT, KNOBS, Knobs
from fewstep.search.strategies.refine import Batch, Settings, errors, refine, refine_best
from fewstep.space import OdeSchedule, StepSpec, StudyError, compile, load_schedule, save_schedule
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline, named
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


@pytest.mark.parametrize(
    "name", ["unipc3-bh2/edm", "ipndm3/quadratic", "deis-tab2/time", "heun/edm"]
)
def test_theta_zero_is_the_schedule_itself(name):
    s = baseline(name, VP, 5)
    knobs = Knobs(s, names=tuple(k for k in KNOBS if k != "guidance"))
    program = compile(knobs.base, knobs.values(knobs.zeros()))
    for field in ("t", "r", "e", "k", "b"):
        a, b = getattr(program, field), getattr(s.program, field)
        assert torch.allclose(a, b, rtol=0, atol=1e-12), field


def test_theta_and_the_schedule_it_writes_are_the_same_program():
    s = baseline("unipc3-bh2/edm", VP, 6)
    knobs = Knobs(s, names=tuple(k for k in KNOBS if k != "guidance"))
    theta = 0.1 * torch.randn(
        knobs.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    a, b = compile(knobs.base, knobs.values(theta)), knobs.apply(theta).program
    for field in ("t", "r", "e", "k", "b"):
        assert torch.allclose(getattr(a, field), getattr(b, field), rtol=0, atol=1e-10), field
    times = knobs.apply(theta).times
    lam = VP.lam(torch.tensor(times, dtype=torch.float64))
    assert bool((lam.diff() >= knobs.min_gap - 1e-9).all())


@pytest.mark.parametrize("family", [noises.VPLinear(), noises.EDM(), noises.RectifiedFlow()])
def test_a_moved_first_time_is_the_same_sampler_on_its_own_start(family):
    s = baseline("dpmpp2m/logsnr", family, 4, t_start=0.9 * family.t_range[0])
    knobs = Knobs(s)
    theta = 0.2 * torch.ones(knobs.size, dtype=torch.float64)
    moved = knobs.apply(theta)
    assert moved.times[0] < s.times[0]
    model = recorded_mixture(family)
    z = torch.randn(8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = run(knobs.program(theta), model, start(s, z))
    b = run(moved.program, model, start(moved, z))
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_canonical_program_is_the_same_sampler():
    program = baseline("unipc3-bh2/edm", VP, 5).program
    x = torch.randn(8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = run(program, MODEL, x), run(canonical(program), MODEL, x)
    assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("free", ["no", "yes", "image", "guidance"])
def test_the_normal_equations_hold_the_gradient_of_the_error(free):
    s = baseline("dpmpp3m/logsnr", VP, 4)
    if free == "guidance":
        s = s.model_copy(update={"steps": tuple(guided(step, 2.0) for step in s.steps)})
    model = FreeProgram(canonical(s.program), VP, free == "guidance", free == "image")
    model = Knobs(s) if free == "no" else model
    x = torch.randn(16, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = Batch(x, torch.zeros_like(x), constant=torch.ones(2, 2, 2, dtype=torch.float64))
    theta = 0.01 * torch.ones_like(model.scale())
    here = linearise(model, VP, theta, GUIDED, data, Settings())
    th = theta.clone().requires_grad_()
    errors([model.program(th)], GUIDED, data, Settings()).sum().backward()
    slope = 2 * here.chain.T @ here.slope
    assert torch.allclose(slope, th.grad, rtol=2e-2, atol=2e-3 * float(th.grad.abs().max()))


def test_of_several_starts_the_one_that_gets_furthest_is_refined_to_the_end(noise):
    train, held, _ = noise
    starts = [baseline(name, VP, 4) for name in ("ddim/time", "ipndm3/quadratic")]
    short = Settings(rounds=8)
    at, best = refine_best(starts, MODEL, train, held, short)
    assert best.before == pytest.approx(float(errors([starts[at].program], MODEL, held, short)))
    assert best.after < 0.1 * best.before
    assert best.calls > refine(starts[at : at + 1], MODEL, train, held, short)[0].calls


def test_with_a_constant_image_schedules_go_further_and_are_files_with_an_image(tmp_path):
    """Data far from 0, as images are: a start at pure noise lacks their mean."""
    model = Mixture(VP, _SHARP.weights, _SHARP.means / 2 + 2, _SHARP.variances / 4 + 0.1)
    train, held = batch(1, 128, model), batch(2, 64, model)
    start, settings = [baseline("dpmpp2m/logsnr", VP, 3)], Settings(rounds=12)
    [plain] = refine(start, model, train, held, settings)
    image = train.target.mean(0)
    with_image = [dataclasses.replace(b, constant=image) for b in (train, held)]
    [out] = refine(start, model, *with_image, settings)
    assert out.before == plain.before  # the image has no weight yet
    assert out.after < 0.5 * plain.after
    assert out.schedule.first == "mean"
    assert out.schedule.nfe == 3
    again = load_schedule(save_schedule(out.schedule, tmp_path / "refined.json"))
    assert again.digest == out.schedule.digest
    assert torch.equal(again.constant, image)
    x = sample(again, model, held.x_T)
    assert float((x - held.target).square().mean()) == pytest.approx(out.after, rel=1e-3)
    [further] = refine([again], model, *with_image, settings)
    assert further.after <= out.after


def test_where_no_schedule_reaches_what_an_image_could_do_the_fit_goes_on_without(noise):
    """Two far modes: the best start is p_0 = 1.6 times the noise, and schedules have p_0 <= 1."""
    train, held, _ = noise
    start, settings = [baseline("unipc2-bh2/quadratic", VP, 3)], Settings(rounds=12)
    [plain] = refine(start, MODEL, train, held, settings)
    image = [dataclasses.replace(b, constant=train.target.mean(0)) for b in (train, held)]
    [out] = refine(start, MODEL, *image, settings)
    assert out.after <= plain.after


def test_guidance_of_every_call_is_fitted_with_the_program(noise):
    """The teacher's scale is 1; a start at 2 finds its way back."""
    train, held, _ = noise
    start = baseline("dpmpp2m/logsnr", VP, 4)
    start = start.model_copy(update={"steps": tuple(guided(s, 2.0) for s in start.steps)})
    settings = Settings(knobs=(*DEFAULT, "guidance"), rounds=8)
    [out] = refine([start], GUIDED, train, held, settings)
    [fixed] = refine([start], GUIDED, train, held, Settings(rounds=8))
    assert out.after < 0.5 * fixed.after
    assert {s.guidance for s in fixed.schedule.steps} == {2.0}
    assert all(s.guidance != 2.0 for s in out.schedule.steps)


def test_run_time_options_are_fitted_with_and_stay(noise):
    train, held, _ = noise
    options = {"threshold": {"quantile": 0.0, "minimum": 0.9}}
    start = baseline("dpmpp2m/logsnr", VP, 4).model_copy(update={"options": options})
    [out] = refine([start], MODEL, train, held, Settings(rounds=3))
    assert out.schedule.options == options
    x = sample(out.schedule, MODEL, held.x_T)
    assert float((x - held.target).square().mean()) == pytest.approx(out.after, rel=1e-3)
    with pytest.raises(StudyError, match="run-time options"):
        refine([start, baseline("dpmpp2m/logsnr", VP, 4)], MODEL, train, held)


@pytest.mark.parametrize("method", ["adam", "gauss-newton"])
def test_refinement_halves_the_error_of_the_best_named_solver_on_fresh_noise(
    method, noise, tmp_path
):
    train, held, fresh = noise
    start = baseline("unipc2-bh2/quadratic", VP, 5)
    [out] = refine([start], MODEL, train, held, Settings(method=method, steps=60, rounds=4))
    everything = [s.program for s in named(VP, 5).values()][::6]
    best = float(errors(everything, MODEL, fresh, Settings()).min())
    after = float(errors([out.schedule.program], MODEL, fresh, Settings()))
    assert out.method == method
    assert out.after < out.before
    assert after < 0.5 * best
    again = load_schedule(save_schedule(out.schedule, tmp_path / "refined.json"))
    assert again.digest == out.schedule.digest


def test_several_starts_are_refined_in_one_batch_and_none_gets_worse(noise):
    train, held, _ = noise
    starts = [baseline(n, VP, 4) for n in ("ddim/time", "dpmpp2m/logsnr", "ipndm3/edm")]
    found = refine(starts, MODEL, train, held, Settings(steps=40))
    assert len(found) == 3
    for s, one in zip(starts, found, strict=True):
        direct = float(errors([s.program], MODEL, held, Settings()))
        assert one.before == pytest.approx(direct, rel=1e-4)
        assert one.after <= one.before
        assert one.schedule.nfe == 4


def test_a_model_without_gradients_is_refined_by_finite_differences(noise):
    train, held, _ = noise

    class Remote:
        noise = VP

        @torch.no_grad()
        def __call__(self, x, t, *, cond=None, guidance=None):
            return MODEL(x, t)

    [out] = refine([baseline("ddim/edm", VP, 4)], Remote(), train, held, Settings(rounds=3))
    assert out.method == "gauss-newton"
    assert out.after < 0.5 * out.before


def test_checkpointing_changes_nothing_but_memory(noise):
    train, held, _ = noise
    start = [baseline("dpmpp2m/logsnr", VP, 4)]
    plain = refine(start, MODEL, train, held, Settings(steps=5, every=5))
    saved = refine(start, MODEL, train, held, Settings(steps=5, every=5, checkpointed=True))
    assert saved[0].after == pytest.approx(plain[0].after, rel=1e-4)


def test_a_feature_distance_is_minimised_in_feature_space(noise):
    train, held, _ = noise
    features = lambda x: x.flatten(1)[:, :2]  # noqa: E731
    settings, start = Settings(rounds=6, features=features), [baseline("dpmpp2m/logsnr", VP, 4)]
    [out] = refine(start, MODEL, train, held, settings)
    [plain] = refine(start, MODEL, train, held, Settings(rounds=6))
    assert out.after < 0.2 * out.before
    assert out.after < float(errors([plain.schedule.program], MODEL, held, settings))


def test_closed_form_weights_reduce_every_kept_steps_held_out_error(noise):
    train, _, fresh = noise
    start = baseline("ddim/logsnr", VP, 5)
    targets = teacher_states(MODEL, VP, start.times, train)
    assert float((targets[-1] - train.target).square().mean().sqrt()) < 1e-3
    better, fits = fit_weights(start, MODEL, train, targets)
    assert [f.step for f in fits] == [1, 2, 3, 4]
    assert all(f.after <= f.before for f in fits)
    before, after = errors([start.program, better.program], MODEL, fresh, Settings()).tolist()
    assert after < 0.3 * before


def test_the_closed_form_finds_the_exact_weights_of_a_known_solver(noise):
    """Targets made by a second-order step are met exactly by DDIM plus one extra weight."""
    train, _, _ = noise
    times = (1.0, 0.6, 0.3)
    first = OdeSchedule(noise=VP, times=times, steps=(StepSpec(), StepSpec()))
    second = OdeSchedule(noise=VP, times=times, steps=(StepSpec(), StepSpec(order=2)))
    targets = [train.x_T, train.x_T, run(second.program, MODEL, train.x_T)]
    found, fits = fit_weights(first, MODEL, train, targets, ridge=1e-12)
    assert fits[0].after < 1e-10
    assert torch.allclose(found.program.b, second.program.b, atol=1e-4)


def test_bad_settings_are_one_clear_line(noise):
    train, held, _ = noise
    with pytest.raises(StudyError, match="'time' is not one of"):
        Knobs(baseline("ddim/time", VP, 3), names=("time",))
    mixed = [baseline("ddim/time", VP, 3), baseline("ddim/time", VP, 4)]
    with pytest.raises(StudyError, match="different NFE"):
        refine(mixed, MODEL, train, held)
    with pytest.raises(StudyError, match="method 'sgd'"):
        refine(mixed[:1], MODEL, train, held, Settings(method="sgd"))
    model = from_model(lambda x, t: x, VP, "x0")
    [same] = refine([baseline("ddim/time", VP, 2)], model, train, held, Settings(steps=1, every=1))
    assert same.after <= same.before


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
