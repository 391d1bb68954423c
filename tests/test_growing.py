"""Calls added with weight 0: the samples stay, and what cannot grow says so."""

import pytest
import torch

from fewstep.samplers import run, start
from fewstep.space import OdeSchedule, ScheduleError, StepSpec, load_schedule, save_schedule
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from fewstep.space.growing import grown
from tests.oracles import recorded_mixture

VP = noises.VPLinear()


def samples(schedule, **more):
    model = recorded_mixture(schedule.noise)
    z = torch.randn(8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return run(schedule.program, model, start(schedule, z), **more)


def require_same_samples(longer, schedule, **more):
    a, b = samples(longer, **more), samples(schedule, **more)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "family", [VP, noises.EDM(), noises.RectifiedFlow(t_start=0.98), noises.VPCosine()]
)
@pytest.mark.parametrize("name", ["ddim/logsnr", "dpmpp3m/edm", "ipndm4/logsnr", "deis-tab3/time"])
@pytest.mark.parametrize("more", [1, 3])
def test_the_samples_stay(name, family, more):
    s = baseline(name, family, 5)
    longer = grown(s, 5 + more)
    assert longer.nfe == longer.program.nfe == 5 + more
    require_same_samples(longer, s)


@pytest.mark.parametrize(
    ("name", "nfe"), [("unipc2-bh2/logsnr", 6), ("heun/edm", 5), ("f-pndm/time", 13)]
)
def test_correctors_and_tableaus_grow_like_any_program(name, nfe):
    s = baseline(name, VP, nfe)
    require_same_samples(grown(s, nfe + 1), s)


@pytest.mark.parametrize("first", ["network", "zero", "mean"])
@pytest.mark.parametrize("keeps", ["x0", "eps"])
def test_shifts_and_extra_weights_stay_too(first, keeps):
    s = baseline("dpmpp2m/logsnr", VP, 6 if first == "network" else 5)
    steps = [
        step.model_copy(
            update={
                "weights": (0.4, -0.2, 0.1)[:i],
                "dt_query": -0.02 * (0 < i < 4),
                "dt_start": 0.01 * (0 < i < 4),
                "dt_land": 0.015 * (i < 3),
                "formulation": ("data", "noise")[i % 2],
                "guidance": 1.0 + i,
            }
        )
        for i, step in enumerate(s.steps)
    ]
    s = s.model_copy(update={"steps": tuple(steps), "first": first, "shift_keeps": keeps})
    mean = {"m": torch.full((2, 2, 2), 0.3, dtype=torch.float64)} if first == "mean" else {}
    longer = grown(s, s.nfe + 2)
    assert longer.nfe == s.nfe + 2
    require_same_samples(longer, s, **mean)


def test_a_velocity_step_grows_as_well():
    steps = [StepSpec(order=1 + (i > 0), formulation="velocity", basis="t") for i in range(3)]
    times = (0.98, 0.7, 0.3, 0.0)
    s = OdeSchedule(noise=noises.RectifiedFlow(t_start=0.98), times=times, steps=tuple(steps))
    require_same_samples(grown(s, 5), s)


def test_one_call_at_pure_noise_grows():
    s = OdeSchedule(noise=noises.RectifiedFlow(), times=(1.0, 0.0), steps=(StepSpec(),))
    longer = grown(s, 3).program
    assert bool((longer.t.diff() < 0).all())
    assert bool((longer.b[:, 1:] == 0).all())


def test_the_new_call_stands_between_the_middle_queries_and_has_no_weight():
    s = baseline("ddim/logsnr", VP, 4)
    steps = list(s.steps)
    lam = VP.lam(torch.tensor(s.times, dtype=torch.float64))
    late = float(VP.t_of_lam(lam[2] + 0.5)) - s.times[2]
    steps[2] = steps[2].model_copy(update={"dt_query": late})
    s = s.model_copy(update={"steps": tuple(steps)})
    program, longer = s.program, grown(s, 5).program
    asked = VP.lam(longer.t)
    assert torch.allclose(asked[[0, 1, 3, 4]], VP.lam(program.t), atol=1e-9)
    assert float(asked[2]) == pytest.approx(float(asked[1] + asked[3]) / 2)
    assert bool((longer.b[:, 2].abs() < 1e-12).all())
    assert bool((longer.b[3, [0, 1, 3]] != 0).any())


@pytest.mark.parametrize(("more", "where"), [(1, [3]), (2, [2, 5]), (4, [1, 3, 5, 7])])
def test_several_new_calls_are_spread_among_the_old(more, where):
    s = baseline("ddim/logsnr", VP, 5)
    longer = grown(s, 5 + more)
    new = [i for i, t in enumerate(longer.times) if t not in s.times]
    assert new == where


def test_a_grown_schedule_is_a_file_like_any_other_and_nothing_to_add_changes_nothing(tmp_path):
    s = baseline("dpmpp2m/logsnr", VP, 4)
    assert grown(s, 4) is s
    longer = grown(s, 6)
    again = load_schedule(save_schedule(longer, tmp_path / "longer.json"))
    assert again.digest == longer.digest
    again.program.require_equal(longer.program)


def test_fresh_noise_is_refused():
    with pytest.raises(ScheduleError, match="adds fresh noise"):
        grown(baseline("ddpm/time", VP, 4), 5)


def test_levels_chosen_while_sampling_are_refused():
    option = {"time_shift": {"rule": "variance", "window": 5, "cutoff": 0.2}}
    s = baseline("ddim/time", VP, 5).model_copy(update={"options": option})
    with pytest.raises(ScheduleError, match="time_shift"):
        grown(s, 6)


def test_calls_are_not_taken_away():
    with pytest.raises(ScheduleError, match="makes 5 calls, more than 4"):
        grown(baseline("ddim/time", VP, 5), 4)
