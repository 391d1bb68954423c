"""Schedules of weighted particles: what is refused, what a file holds, the authors' policies."""

import pytest

from fewstep.space import OdeSchedule, ScheduleError, StepSpec, load_schedule, noise
from fewstep.space.baselines import baseline, grid
from fewstep.space.files import save_schedule
from fewstep.space.particle_policies import POLICIES, policy
from fewstep.space.particles import ParticleSchedule, ParticleStep

VE = noise.EDM(sigma_max=3.0, sigma_min=0.05)
VP = noise.VPLinear(t_start=0.6, t_end=0.01)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ParticleStep(zeta=-1), "zeta -1.0 is below 0"),
    (lambda: ParticleStep(ess=0), "outside"),
    (lambda: ParticleStep(weight="right"), "weight"),
    (lambda: ParticleSchedule.uniform(VE, (1.0, 1.0)), r"times\[1\] = 1.0 is not below"),
    (lambda: ParticleSchedule.uniform(VE, (4.0, 1.0)), "above the noise schedule's first time"),
    (lambda: ParticleSchedule.uniform(VE, (1.0, 0.5)).every(0), "every 0 steps"),
    (lambda: policy("best", VE, (1.0, 0.5)), "policy 'best' is unknown"),
    (lambda: ParticleSchedule(noise=VE, times=(2.0, 1.0, 0.5), steps=(
        ParticleStep(resample="clocks"), ParticleStep())), "step 1: 'clocks' keep all weights"),
    (lambda: ParticleSchedule(noise=VE, times=(2.0, 1.0), steps=(ParticleStep(zeta=1),),
        solver=OdeSchedule(noise=VE, times=(2.0, 1.0), steps=(StepSpec(),))), "zeta is unused"),
    (lambda: ParticleSchedule(noise=VE, times=(2.0, 1.0), steps=(ParticleStep(),),
        solver=baseline("heun/logsnr", VE, 3)), "solver.times"),
])  # fmt: skip
def test_a_bad_schedule_is_one_clear_line(make, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def schedules():
    times = grid(VP, 6, "logsnr")
    yield from (policy(name, VP, times, b=3.0, window=(0.5, 0.02)) for name in POLICIES)
    yield ParticleSchedule.uniform(VP, times, zeta=0.3, resample="ess", ess=0.4).every(2)
    steps = tuple(ParticleStep(weight="trapezoid", b=0.1 + i) for i in range(6))
    solver = OdeSchedule(noise=VP, times=times, steps=(StepSpec(eta=0.5),) * 6)
    yield ParticleSchedule(noise=VP, times=times, steps=steps, solver=solver)


@pytest.mark.parametrize("schedule", list(schedules()))
def test_files_read_back_as_they_were_written(schedule, tmp_path):
    path = save_schedule(schedule, tmp_path / "p.json")
    again = load_schedule(path)
    assert again.to_dict() == schedule.to_dict()
    assert again.digest == schedule.digest
    assert again.nfe == 6


def test_equal_samplers_have_equal_digests():
    times = grid(VE, 4, "logsnr")
    a = ParticleSchedule.uniform(VE, times, resample="always", ess=0.5)
    b = ParticleSchedule.uniform(VE, times, resample="always", ess=0.9)
    assert a.digest == b.digest
    assert a.digest != a.every(2).digest
    assert a.digest == a.model_copy(update={"provenance": {"seed": 1}}).digest


@pytest.mark.parametrize(("edit", "message"), [
    ({"steps": None}, "steps must be a list"),
    ({"nfe": 3}, "nfe is 3 in the file but it has 2 steps"),
    ({"version": 2}, "version 2 is unknown"),
    ({"extra": 1}, "extra is not a field of ParticleSchedule"),
    ({"steps": [{"zeta": 1}, {"zeta": -1}]}, "step 1: zeta -1.0 is below 0"),
    ({"steps": [{"zeta": 1}, 3]}, r"steps\[1\] is 3: an object is needed"),
])  # fmt: skip
def test_a_damaged_file_names_what_is_wrong(edit, message):
    data = ParticleSchedule.uniform(VE, grid(VE, 2, "logsnr"), zeta=1.0).to_dict()
    with pytest.raises(ScheduleError, match=message):
        load_schedule(data | edit)


def test_the_window_and_every_k_choose_the_steps():
    schedule = policy("target_score/systematic", VE, (3.0, 2.0, 1.5, 1.0, 0.5), window=(2.5, 0.7))
    assert [s.weight for s in schedule.steps] == ["none", "left", "left", "none"]
    assert [s.resample for s in schedule.steps] == ["never", "always", "always", "never"]
    assert [s.resample for s in schedule.every(2).steps] == ["never", "never", "always", "never"]
