"""Files of a program without steps: image, ends, starts in the middle, calls added."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.space import (
    OdeSchedule,
    ProgramSchedule,
    ScheduleError,
    StepSpec,
    load_schedule,
    save_schedule,
)
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from fewstep.space.growing import grown
from fewstep.space.program import at_times, written_out
from tests.oracles import recorded_mixture

VP = noises.VPLinear()
NOISES = [
    VP,
    noises.EDM(),
    noises.RectifiedFlow(t_start=0.98),
    noises.VPCosine(),
    noises.VPDiscrete(),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fitted(noise=VP, nfe: int = 5, *, guided: bool = False) -> ProgramSchedule:
    """A program that no steps express: every number moved, from a constant image, start apart."""
    steps = (StepSpec(guidance=2.0 if guided else None), *[StepSpec()] * nfe)
    if guided:
        steps = tuple(s.model_copy(update={"guidance": 1.0 + i}) for i, s in enumerate(steps))
    base = OdeSchedule(
        noise=noise, times=baseline("ddim/logsnr", noise, nfe + 1).times, steps=steps, first="mean"
    )
    moved = {
        name: getattr(base.program, name) * (1 + 0.1 * normal(nfe, seed=i))
        for i, name in enumerate(("r", "e", "k"))
    }
    moved["e"] = moved["e"] + 0.02 * normal(nfe, seed=5)
    moved["k"] = moved["k"] + 0.05 * normal(nfe, seed=6)
    program = replace(
        base.program, b=base.program.b + 0.05 * normal(nfe, nfe, seed=7).tril(), **moved
    )
    made = ProgramSchedule(
        noise=noise, program=program, start=base.start, end=base.end, provenance={"from": "ddim"}
    )
    return made.with_constant(0.3 * normal(2, 2, 2, seed=8))


class Constant:
    """D = c whatever it is asked."""

    def __init__(self, noise, c):
        self.noise, self.c = noise, c

    def __call__(self, x, t, *, cond=None, guidance=None):
        return self.c.expand_as(x)


# ---- the file and its image -----------------------------------------------------------------


def test_a_program_file_keeps_every_number_and_the_image_beside_it(tmp_path):
    given = fitted(guided=True)
    path = save_schedule(given, tmp_path / "a" / "nfe05.json")
    assert sorted(p.name for p in path.parent.iterdir()) == ["nfe05.json", "nfe05.safetensors"]
    again = load_schedule(path)
    assert isinstance(again, ProgramSchedule)
    assert again == given
    assert again.digest == given.digest
    assert torch.equal(again.constant, given.constant)
    assert again.provenance == {"from": "ddim"}
    model, z = recorded_mixture(VP), normal(3, 2, 2, 2)
    assert torch.equal(
        sample(again, model, start(again, z)), sample(given, model, start(given, z))
    )


def test_an_image_that_no_row_uses_is_neither_saved_nor_looked_for(tmp_path):
    plain = ProgramSchedule.of(baseline("ddim/edm", VP, 4))
    carrying = plain.with_constant(torch.ones(2, 2))
    assert carrying.digest == plain.digest
    assert carrying != plain
    save_schedule(fitted(), tmp_path / "x.json")
    save_schedule(carrying, tmp_path / "y.json")
    assert not (tmp_path / "y.safetensors").exists()
    (tmp_path / "x.safetensors").rename(tmp_path / "y.safetensors")
    assert load_schedule(tmp_path / "y.json").constant is None
    assert load_schedule(tmp_path / "x.json").constant is None


@pytest.mark.parametrize("make", [fitted, lambda: baseline("ddim/edm", VP, 4)])
def test_equality_and_digest_tell_images_apart_and_never_raise(make):
    a = make()
    if isinstance(a, OdeSchedule):
        a = a.model_copy(update={"first": "mean"})
    images = [torch.zeros(2, 2, 2), torch.full((2, 2, 2), 0.5), torch.zeros(2, 2)]
    made = [a.with_constant(m) for m in images]
    assert len({s.digest for s in made}) == 3
    assert all((x == y) == (i == j) for i, x in enumerate(made) for j, y in enumerate(made))
    assert made[0] == a.with_constant(images[0].clone())
    assert made[0] == a.with_constant(-images[0])
    assert made[0] != "a schedule"


@pytest.mark.parametrize(
    "m",
    [
        [1.0],
        torch.ones(2, dtype=torch.int64),
        torch.full((2,), float("nan")),
        None,
    ],
)
def test_only_finite_images_are_carried(m):
    with pytest.raises(ScheduleError, match="tensor of finite floating-point numbers"):
        fitted().with_constant(m)


def test_a_damaged_image_is_one_line_naming_its_file(tmp_path):
    from safetensors.torch import save_file

    path = save_schedule(fitted(), tmp_path / "x.json")
    beside = tmp_path / "x.safetensors"
    beside.write_bytes(b"\x08\x00")
    with pytest.raises(ScheduleError, match=r"x\.safetensors: the constant image cannot be read"):
        load_schedule(path)
    save_file({"mean": torch.ones(2)}, beside)
    with pytest.raises(ScheduleError, match="one tensor named 'constant'"):
        load_schedule(path)


def test_provenance_is_replaced_and_nothing_else():
    for given in (fitted(), baseline("ddim/edm", VP, 4)):
        made = given.model_copy(update={"provenance": {"score": 1.0}})
        assert made.provenance == {"score": 1.0}
        assert made != given
        assert made.digest == given.digest
        assert made.model_copy(update={"provenance": given.provenance}) == given


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(nfe=4), "nfe is 4 in the file but its program makes 5 calls"),
        (lambda d: d.update(nfe=5.5), "nfe is 5.5"),
        (lambda d: d.update(times=[1.0, 0.0]), "times is not a field of ProgramSchedule"),
        (lambda d: d.update(program=[1]), r"program is \[1\]: an object is needed"),
        (lambda d: d.update(start=2.0), "start = 2.0 is above the noise schedule's first time"),
        (lambda d: d.update(end=-0.5), "end = -0.5 is below 0.0, the time of clean data"),
        (lambda d: d.update(end=1.0), "end 1.0 is not below start 1.0"),
        (lambda d: d["program"]["alpha"].__setitem__(2, 0.5), "program.alpha is not the noise"),
        (lambda d: d["program"]["t"].__setitem__(1, 0.5), "program.alpha is not the noise"),
        (lambda d: d["program"]["label"].__setitem__(1, 500.0), "program.label is not the noise"),
        (lambda d: d["program"].update(q=[1.0]), "program.q is not a field"),
        (lambda d: d.update(options={"treshold": {}}), "options.treshold is unknown: use thr"),
        (
            lambda d: d.update(
                options={"time_shift": {"rule": "variance", "window": 3, "cutoff": 0.1}}
            ),
            "options.time_shift moves the levels of steps",
        ),
    ],
)
def test_a_bad_program_file_is_one_clear_line(change, words):
    data = json.loads(json.dumps(fitted().to_dict()))
    change(data)
    with pytest.raises(ScheduleError, match=words) as caught:
        load_schedule(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"treshold": {}}, "options.treshold is unknown: use threshold, time_shift"),
        ({"threshold": 0.9}, "options.threshold is 0.9: an object"),
        ({"threshold": {"quantil": 0.9}}, "options.threshold.quantil is unknown: use quantile"),
        ({"threshold": {"quantile": 1.5}}, "options.threshold.quantile 1.5 must be a number from"),
        ({"threshold": {"quantile": True}}, "options.threshold.quantile True"),
        ({"threshold": {"minimum": 0}}, "options.threshold.minimum 0 must be a number above 0"),
        ({"time_shift": {"rule": "variance", "window": 3}}, "options.time_shift.cutoff is miss"),
    ],
)
def test_options_are_checked_where_a_schedule_is_made(options, words):
    with pytest.raises(ScheduleError, match=words):
        baseline("ddim/edm", VP, 4).model_copy(update={"options": options})


# ---- ends -----------------------------------------------------------------------------------


def test_x_T_starts_where_the_file_says_not_where_the_first_query_is():
    noise = noises.EDM()
    base = ProgramSchedule.of(baseline("ddim/edm", noise, 4))
    t = base.program.t * torch.tensor([0.5, 1.0, 1.0, 1.0], dtype=torch.float64)
    moved = base.model_copy(update={"program": at_times(base.program, noise, t)})
    z = normal(2, 3)
    assert torch.equal(start(moved, z), 80.0 * z)
    again = load_schedule(moved.to_dict())
    assert torch.equal(start(again, z), 80.0 * z)
    without = ProgramSchedule(noise=noise, program=moved.program)
    assert (without.start, without.end) == (40.0, 0.0)
    assert torch.equal(start(without, z), 40.0 * z)
    assert without.digest != moved.digest
    flow = noises.RectifiedFlow()
    assert ProgramSchedule.of(baseline("ddim/time", flow, 3)).start == 1.0


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", ["unipc3-bh2/logsnr", "heun/edm", "dpmpp2m/time"])
def test_a_schedule_without_its_steps_is_the_same_sampler(name, noise):
    steps = baseline(name, noise, 5)
    bare = ProgramSchedule.of(steps)
    assert bare.digest == steps.digest
    assert (bare.start, bare.end, bare.nfe) == (steps.start, steps.end, 5)
    assert ProgramSchedule.of(bare) is bare
    z, model = normal(3, 2, 2, 2), recorded_mixture(noise)
    assert torch.equal(sample(bare, model, start(bare, z)), sample(steps, model, start(steps, z)))


# ---- starting in the middle -----------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_tail_is_exact_on_constant_denoisers_whatever_was_fitted(noise, k):
    """From the same eps the tail ends where the whole program does, image = the constant."""
    whole, c, eps = fitted(noise), normal(2, 2, 2, seed=3), normal(4, 2, 2, 2, seed=4)
    t = torch.tensor(whole.start, dtype=torch.float64)
    model = Constant(noise, c)
    expected = sample(whole.with_constant(c), model, noise.alpha(t) * c + noise.sigma(t) * eps)
    tail = whole.tail(k)
    assert tail.nfe == 5 - k
    assert tail.times == whole.times[k:]
    assert (tail.start, tail.end) == (whole.times[k], whole.end)
    assert not tail.uses_constant
    y = tail.program.alpha[0] * c + tail.program.sigma[0] * eps
    assert torch.allclose(sample(tail, model, y), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("guided", [False, True])
def test_the_tail_of_first_order_steps_is_the_tail_of_their_program(noise, guided):
    steps = baseline("ddim/logsnr", noise, 6)
    if guided:
        each = (s.model_copy(update={"guidance": 1.0 + i}) for i, s in enumerate(steps.steps))
        steps = steps.model_copy(update={"steps": tuple(each)})
    model, y = recorded_mixture(noise), normal(4, 2, 2, 2)
    for k in range(1, 6):
        a, b = steps.tail(k), ProgramSchedule.of(steps).tail(k)
        assert torch.allclose(sample(a, model, y), sample(b, model, y), rtol=1e-10, atol=1e-10)
        if guided:
            assert torch.equal(a.program.guidance, b.program.guidance)


def test_the_tail_does_not_depend_on_how_the_rows_are_written():
    """The same sampler with r = 0, every state from x_T, image and outputs, has the same tail."""
    s = fitted()
    p, rest, _ = written_out(s.program)
    rows = {"e": p[1:], "k": rest[1:, 0], "b": rest[1:, 1:]}
    program = replace(s.program, r=torch.zeros_like(s.program.r), **rows)
    flat, model, z = (
        s.model_copy(update={"program": program}),
        recorded_mixture(VP),
        normal(4, 2, 2, 2),
    )
    assert torch.allclose(sample(s, model, z), sample(flat, model, z), rtol=0, atol=1e-12)
    for k in (1, 3):
        a, b = s.tail(k), flat.tail(k)
        assert torch.allclose(sample(a, model, z), sample(b, model, z), rtol=0, atol=1e-12)


def test_the_tail_of_an_ancestral_solver_is_the_solver_from_there():
    s = baseline("ddpm/time", VP, 6)
    model, y = recorded_mixture(VP), normal(4, 2, 2, 2)
    for k in (1, 4):
        a, b = (
            sample(q.tail(k), model, y, generator=torch.Generator().manual_seed(0))
            for q in (s, ProgramSchedule.of(s))
        )
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_a_tail_from_the_first_call_is_the_schedule_and_there_is_none_from_the_end():
    s = fitted()
    assert s.tail(0) is s
    for k in (-1, 5):
        with pytest.raises(ScheduleError, match=f"call {k} is not one of 5"):
            s.tail(k)
    assert load_schedule(s.tail(2).to_dict()).digest == s.tail(2).digest


# ---- calls added ----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("more", [1, 2, 4])
@pytest.mark.parametrize("guided", [False, True])
def test_a_grown_program_gives_the_same_samples(noise, more, guided):
    s = fitted(noise, guided=guided)
    longer = grown(s, 5 + more)
    assert longer.nfe == 5 + more
    model, z = recorded_mixture(noise), normal(4, 2, 2, 2)
    x = sample(s, model, start(s, z))
    assert torch.allclose(sample(longer, model, start(longer, z)), x, rtol=1e-12, atol=1e-12)
    lam = noise.lam(longer.program.t)
    assert bool((lam.diff() > 0).all())
    assert load_schedule(longer.to_dict()).program == longer.program
    if guided:
        assert set(longer.program.guidance.tolist()) == set(s.program.guidance.tolist())


@pytest.mark.parametrize("name", ["unipc3-bh2/logsnr", "heun/edm", "s-pndm/time", "deis-tab3/edm"])
def test_any_deterministic_solver_grows_as_a_program(name):
    for noise in NOISES:
        s = ProgramSchedule.of(baseline(name, noise, 5))
        longer = grown(s, 8)
        model, z = recorded_mixture(noise), normal(4, 2, 2, 2)
        x = sample(s, model, start(s, z))
        y = sample(longer, model, start(longer, z))
        assert torch.allclose(y, x, rtol=1e-11, atol=1e-11 * float(s.start))


@pytest.mark.parametrize(("more", "where"), [(1, [3]), (2, [2, 5]), (4, [1, 3, 5, 7])])
def test_added_calls_stand_between_the_middle_queries_or_evenly_with_weight_0(more, where):
    s = fitted()
    longer = grown(s, 5 + more)
    new = [i for i, t in enumerate(longer.times) if t not in s.times]
    assert new == where
    assert bool((longer.program.b[:, new] == 0).all())
    lam = VP.lam(longer.program.t)
    if more == 1:
        assert float(lam[3]) == pytest.approx(float(lam[2] + lam[4]) / 2)


def test_the_added_call_is_asked_where_the_trajectory_of_first_order_steps_is():
    """A grown DDIM asks at the state that one DDIM step to the new level would reach."""
    s = ProgramSchedule.of(baseline("ddim/logsnr", VP, 4))
    longer, asked = grown(s, 5), []
    model, z = recorded_mixture(VP), normal(3, 2, 2, 2)
    sample(longer, model, z, callback=asked.append)
    t, t_new = longer.program.t[1], longer.program.t[2]
    y, D = asked[1].state, asked[1].denoised
    eps = (y - VP.alpha(t) * D) / VP.sigma(t)
    expected = VP.alpha(t_new) * D + VP.sigma(t_new) * eps
    assert torch.allclose(asked[2].state, expected, rtol=0, atol=1e-12)


def test_programs_that_add_noise_do_not_grow_and_none_shrinks():
    s = ProgramSchedule.of(baseline("ddpm/time", VP, 4))
    with pytest.raises(ScheduleError, match="adds fresh noise"):
        grown(s, 5)
    with pytest.raises(ScheduleError, match="makes 4 calls, more than 3"):
        grown(s, 3)
    assert grown(s, 4) is s


def test_an_image_may_be_read_by_whoever_may_read_its_file(tmp_path):
    schedule = fitted()
    file = save_schedule(schedule, tmp_path / "a.json")
    assert file.with_suffix(".safetensors").stat().st_mode == file.stat().st_mode
    assert load_schedule(file).constant.equal(schedule.constant)
