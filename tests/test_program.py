"""Schedules compile to programs: identities between methods, neutral values, files, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.space import (
    OdeSchedule,
    ProgramSchedule,
    ScheduleError,
    StepSpec,
    compile,
    load_schedule,
    save_schedule,
    stack,
)
from fewstep.space import noise as noises
from fewstep.space.baselines import GRIDS, SOLVERS, baseline, dpm, grid, in_basis, multistep, named
from fewstep.space.noise import noise_from_dict, noise_to_dict
from tests.oracles import gaussian, recorded_mixture

VP = noises.VPLinear()
TIMES = (1.0, 0.78, 0.55, 0.3, 0.12, 0.001)


def schedule(*steps: StepSpec, times=TIMES, noise=VP, **fields) -> OdeSchedule:
    return OdeSchedule(noise=noise, times=times[: len(steps)] + times[-1:], steps=steps, **fields)


def rich() -> OdeSchedule:
    return schedule(
        StepSpec(corrector="reuse", corrector_relaxation="bh2"),
        StepSpec(order=2, formulation="noise", relaxation="linear", relaxation_coefficient=0.1),
        StepSpec(order=3, slope_points=1, corrector="reuse", compensation=1.1),
        StepSpec(order=2, basis="t", formulation="noise", dt_query=0.01, weights=(0.05, -0.02)),
        StepSpec(order=4, dt_start=0.004),
    )


def close(a, b, tolerance=1e-12) -> bool:
    return all(
        torch.allclose(getattr(a, f), getattr(b, f), rtol=0, atol=tolerance)
        for f in ("t", "r", "e", "k", "b", "g")
    )


# ---- identities between methods -------------------------------------------------------------


def test_order_1_is_ddim_in_every_formulation_and_basis():
    ddim = schedule(*[StepSpec()] * 5).program
    for fields in (
        {"formulation": "noise"},
        {"formulation": "noise", "basis": "t"},
        {"formulation": "noise", "basis": "rho"},
        {"formulation": "noise", "basis": "adams"},
        {"basis": "t"},
        {"formulation": "noise", "basis": "rho", "tableau": "euler1"},
    ):
        assert close(schedule(*[StepSpec(**fields)] * 5).program, ddim), fields


def test_ddim_rows_are_the_plain_formula():
    p = schedule(*[StepSpec()] * 5).program
    t = torch.tensor(TIMES, dtype=torch.float64)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    for i in range(5):
        assert float(p.r[i]) == pytest.approx(float(sigma[i + 1] / sigma[i]), rel=1e-13)
        expected = float(alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i])
        assert float(p.b[i, i]) == pytest.approx(expected, rel=1e-11)
        assert float(p.b[i, :i].abs().sum()) == 0.0


def test_dpm_solver_pp_2m_rows_are_the_plain_rewrite():
    times = grid(VP, 6, "logsnr")
    p = multistep(VP, times, 2, spec=dpm("data", 2)).program
    t = torch.tensor(times, dtype=torch.float64)
    alpha, lam = VP.alpha(t), VP.lam(t)
    for i in range(1, 6):
        h, h_last = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
        c = -alpha[i + 1] * torch.expm1(-h)
        w = 0.5 * h / h_last
        assert float(p.b[i, i]) == pytest.approx(float(c * (1 + w)), rel=1e-12)
        assert float(p.b[i, i - 1]) == pytest.approx(float(-c * w), rel=1e-12)


def test_heun_is_a_predictor_with_a_re_evaluated_trapezoid_corrector():
    """Heun written as a tableau and as order 1 + reeval corrector in rho: one program."""
    rk = StepSpec(formulation="noise", basis="rho", tableau="heun2")
    pece = StepSpec(formulation="noise", basis="rho", corrector="reeval", corrector_order=2)
    a, b = schedule(rk, rk, rk), schedule(pece, pece, pece)
    assert a.nfe == b.nfe == 6
    assert close(a.program, b.program, 1e-11)


def test_unipc_3_without_corrector_is_the_exact_3m():
    uni = baseline("unipc3-bh2/logsnr", VP, 6)
    none = {"corrector": "none", "corrector_relaxation": "none"}
    bare = [s.model_copy(update=none) for s in uni.steps]
    dpm3 = multistep(VP, uni.times, 3, spec=dpm("data", 3, true_second=True))
    assert OdeSchedule(noise=VP, times=uni.times, steps=tuple(bare)).digest == dpm3.digest


def test_ipndm_equals_rho_ab_on_a_rho_uniform_grid_and_only_there():
    edm = noises.EDM(sigma_max=10.0, sigma_min=0.1)
    uniform = tuple(torch.linspace(10.0, 0.1, 8, dtype=torch.float64).tolist())
    full = [multistep(edm, uniform, 3, spec=in_basis(b)) for b in ("adams", "rho")]
    assert close(full[0].program, full[1].program, 1e-11)
    rho7 = grid(edm, 7, "edm")
    other = [multistep(edm, rho7, 3, spec=in_basis(b)) for b in ("adams", "rho")]
    assert not close(other[0].program, other[1].program, 1e-3)


def test_power_basis_runs_from_rho_to_log_rho():
    def steps(**f):
        return [StepSpec(order=min(3, i + 1), formulation="noise", **f) for i in range(5)]

    rho, log_rho = schedule(*steps(basis="rho")), schedule(*steps(basis="lam"))
    assert close(schedule(*steps(basis="power", power=1.0)).program, rho.program, 1e-9)
    gap = [
        float((schedule(*steps(basis="power", power=p)).program.b - log_rho.program.b).abs().max())
        for p in (0.1, 0.01)
    ]
    assert gap[1] < 0.2 * gap[0]


@pytest.mark.parametrize("name", ["unipc3-bh1/edm", "deis-rhoab2/logsnr", "ipndm4/edm"])
def test_vp_and_ve_frames_of_the_same_problem_agree(name):
    """x_ve = x_vp / alpha_vp at equal lam: the same ODE, the same samples."""
    ve = noises.EDM(sigma_max=152.0, sigma_min=0.02)
    times_ve = grid(ve, 6, "edm")
    lam = ve.lam(torch.tensor(times_ve, dtype=torch.float64))
    times_vp = tuple(VP.t_of_lam(lam).tolist())
    steps = baseline(name, ve, 6).steps
    a = OdeSchedule(noise=ve, times=times_ve, steps=steps)
    b = OdeSchedule(noise=VP, times=times_vp, steps=steps)
    z = torch.randn(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = VP.alpha(torch.tensor([times_vp[0], times_vp[-1]], dtype=torch.float64))
    x_ve = sample(a, recorded_mixture(ve), 152.0 * z)
    x_vp = sample(b, recorded_mixture(VP), 152.0 * float(alpha[0]) * z)
    assert torch.allclose(x_ve, x_vp / alpha[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddpm"])
def test_constant_denoisers_are_integrated_exactly(solver):
    """D = c for every call: the sample is (sigma_N/sigma_0) (x_T - alpha_0 c) + alpha_N c."""
    s = baseline(f"{solver}/edm", VP, 13)
    c = torch.tensor([[0.3, -1.2]], dtype=torch.float64)

    class Constant:
        noise = VP

        def __call__(self, x, t, *, cond=None, guidance=None):
            return c.expand_as(x)

    x = torch.tensor([[1.5, 0.2]], dtype=torch.float64)
    t = torch.tensor([s.times[0], s.times[-1]], dtype=torch.float64)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    exact = sigma[1] / sigma[0] * (x - alpha[0] * c) + alpha[1] * c
    assert torch.allclose(sample(s, Constant(), x), exact, rtol=0, atol=1e-10)


def test_a_gaussian_is_carried_to_a_gaussian_by_every_named_solver():
    """Affine invariance: the sample is affine in x_T, and 24 calls come close to the exact map."""
    model = gaussian(VP)
    t = torch.tensor(VP.t_range, dtype=torch.float64)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    spread = torch.sqrt(alpha**2 * 0.25 + sigma**2)
    x = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    exact = alpha[1] * 0.7 + spread[1] / spread[0] * (x - alpha[0] * 0.7)
    for name, s in named(VP, 24).items():
        if name.endswith("/logsnr"):
            y = sample(s, model, x)
            assert float((y[1] - (2 * y[0] + y[2]) / 3).abs()) < 1e-9, name
            if name != "ddim/logsnr":
                assert float((y - exact).abs().max()) < 0.04, name


# ---- neutral values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "neutral",
    [
        {"compensation": 1.0},
        {"dt_query": 0.0, "dt_start": 0.0, "dt_land": 0.0},
        {"relaxation": "linear", "relaxation_coefficient": 0.0},
        {"weights": (0.0,)},
        {"eta": 0.0},
    ],
)
def test_a_neutral_value_is_the_base_solver_bit_for_bit(neutral):
    base = baseline("unipc3-bh2/edm", VP, 6)
    steps = list(base.steps)
    steps[2] = steps[2].model_copy(update=neutral)
    changed = OdeSchedule(noise=VP, times=base.times, steps=tuple(steps))
    for field in ("t", "r", "e", "k", "b", "g", "init"):
        assert torch.equal(getattr(changed.program, field), getattr(base.program, field)), field
    assert changed.digest == base.digest


def test_every_decision_changes_the_program_when_it_is_not_neutral():
    base = baseline("unipc2-bh2/edm", VP, 6)
    for fields in (
        {"compensation": 1.1}, {"dt_query": 0.01}, {"dt_start": 0.01}, {"dt_land": 0.01},
        {"relaxation": "bh1"}, {"weights": (0.1,)}, {"formulation": "noise"}, {"basis": "t"},
        {"corrector": "none"}, {"order": 3}, {"corrector_order": 2}, {"guidance": 2.0},
    ):  # fmt: skip
        steps = list(base.steps)
        every = [s.model_copy(update=fields) for s in steps] if "guidance" in fields else steps
        every[2] = steps[2].model_copy(update=fields)
        changed = OdeSchedule(noise=VP, times=base.times, steps=tuple(every))
        assert changed.digest != base.digest, fields


def test_equal_schedules_have_equal_programs_and_digests():
    a, b = rich(), rich()
    assert a == b
    assert torch.equal(a.program.b, b.program.b)
    assert a.digest == b.digest
    assert a == b  # also once both have been compiled
    assert a != a.model_copy(update={"first": "zero"})


def test_options_and_noise_schedule_are_part_of_the_digest():
    a = rich()
    assert a.digest != a.model_copy(update={"options": {"threshold": {}}}).digest
    other = OdeSchedule(noise=noises.VPLinear(label_scale=999.0), times=a.times, steps=a.steps)
    assert a.digest != other.digest


# ---- noise rows and the first step ----------------------------------------------------------


def test_ddpm_rows_are_the_posterior_mean_and_standard_deviation():
    s = baseline("ddpm/time", VP, 4)
    t = torch.tensor(s.times, dtype=torch.float64)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    for i in range(4):
        ratio = alpha[i] / alpha[i + 1]
        step_var = sigma[i] ** 2 - ratio**2 * sigma[i + 1] ** 2
        mean_x = ratio * sigma[i + 1] ** 2 / sigma[i] ** 2
        mean_d = alpha[i + 1] * step_var / sigma[i] ** 2
        var = sigma[i + 1] ** 2 / sigma[i] ** 2 * step_var
        assert float(s.program.r[i]) == pytest.approx(float(mean_x), rel=1e-9)
        assert float(s.program.b[i, i]) == pytest.approx(float(mean_d), rel=1e-9)
        assert float(s.program.g[i]) == pytest.approx(float(var.sqrt()), rel=1e-9)


def test_older_noise_must_cancel():
    good = schedule(StepSpec(eta=0.5), StepSpec(order=2, eta=0.5), StepSpec(order=2))
    assert good.program.stochastic
    bad = schedule(StepSpec(eta=0.5), StepSpec(order=2, formulation="noise"), StepSpec())
    with pytest.raises(ScheduleError, match="fresh noise"):
        _ = bad.program


def test_a_zero_first_step_equals_starting_lower():
    """Zero-image AFS saves a call and equals a start at the next level scaled by the sigmas."""
    afs = schedule(*[StepSpec()] * 5, first="zero")
    low = OdeSchedule(noise=VP, times=TIMES[1:], steps=(StepSpec(),) * 4)
    assert afs.nfe == low.nfe == 4
    sigma = VP.sigma(torch.tensor(TIMES, dtype=torch.float64))
    assert float(afs.program.init[0]) == pytest.approx(float(sigma[1] / sigma[0]))
    assert torch.allclose(afs.program.b, low.program.b, atol=1e-14)


# ---- files ----------------------------------------------------------------------------------


def test_a_schedule_file_is_inverted_exactly(tmp_path):
    path = save_schedule(rich(), tmp_path / "a" / "nfe05.json")
    again = load_schedule(path)
    assert again == rich()
    assert again.digest == rich().digest
    assert json.loads(path.read_text())["version"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["nfe05.json"]


def test_a_constant_image_travels_beside_the_file(tmp_path):
    m = torch.full((2, 2), 0.25, dtype=torch.float64)
    s = schedule(*[StepSpec()] * 5, first="mean").with_constant(m)
    loaded = load_schedule(save_schedule(s, tmp_path / "m.json"))
    assert torch.equal(loaded.constant, m)
    assert float(loaded.program.k[0]) == 0.0
    assert float(loaded.program.init[1]) != 0.0


def test_a_file_with_only_a_program_runs_and_says_so(tmp_path):
    data = rich().to_dict()
    for field in ("times", "steps"):
        del data[field]
    bare = load_schedule(data)
    assert isinstance(bare, ProgramSchedule)
    z = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = recorded_mixture(VP)
    assert torch.equal(
        sample(bare, model, start(bare, z)), sample(rich(), model, start(rich(), z))
    )
    assert load_schedule(save_schedule(bare, tmp_path / "p.json")).digest == bare.digest


def _edited(change) -> dict:
    data = copy.deepcopy(rich().to_dict())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=7), "version 7 is unknown"),
        (lambda d: d.update(format="x"), "not a schedule file"),
        (lambda d: d.update(kind="sde"), "kind 'sde' is unknown"),
        (lambda d: d["times"].__setitem__(2, 0.9), "times[2] = 0.9 is not below times[1]"),
        (lambda d: d["steps"][0].update(order=3), "step 0 asks for order 3 but has 1 point"),
        (lambda d: d["steps"][1].update(ordre=2), "step 1: ordre is not a field of StepSpec"),
        (lambda d: d["steps"][1].update(relaxation="bh3"), "step 1: relaxation 'bh3'"),
        (lambda d: d["steps"][0].update(compensation=1.2), "step 0: compensation 1.2 needs 2"),
        (lambda d: d["steps"][4].update(corrector="reuse"), "step 4 is the last"),
        (lambda d: d["steps"][1].update(eta=2.0), "step 1: eta 2.0 is outside 0..1"),
        (lambda d: d["steps"].pop(), "6 times for 4 steps"),
        (lambda d: d.update(nfe=9), "nfe is 9 in the file but its steps make 5 calls"),
        (lambda d: d["program"]["b"][1].__setitem__(0, 0.5), "program.b is not what the steps"),
        (lambda d: d["program"]["r"].pop(), "program.r must be a list of 5 numbers"),
        (lambda d: d["program"]["t"].__setitem__(0, float("nan")), "program.t[0] is nan"),
        (lambda d: d["times"].__setitem__(0, float("nan")), "times"),
        (lambda d: d["noise"].update(type="vq"), "noise.type 'vq' is unknown"),
        (lambda d: d.pop("noise"), "noise is missing"),
        (lambda d: d["times"].__setitem__(0, 1.5), "above the noise schedule's first time"),
    ],
)
def test_a_bad_file_is_one_clear_line_naming_field_and_step(change, words):
    with pytest.raises(ScheduleError) as caught:
        load_schedule(_edited(change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_json_nan_and_a_missing_file_are_named(tmp_path):
    text = json.dumps(rich().to_dict())
    for name, content, words in (
        ("cut.json", text[: len(text) // 2], "truncated"),
        ("nan.json", text.replace("0.55", "NaN", 1), "NaN"),
        ("empty.json", "", "not valid JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ScheduleError, match=words) as caught:
            load_schedule(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ScheduleError, match="no such file"):
        load_schedule(tmp_path / "none.json")


def test_baselines_refuse_what_does_not_exist():
    with pytest.raises(ScheduleError, match="odd number of calls"):
        baseline("heun/edm", VP, 4)
    with pytest.raises(ScheduleError, match="solver 'eulers' is unknown"):
        baseline("eulers/edm", VP, 4)
    with pytest.raises(ScheduleError, match="grid 'karras' is unknown"):
        baseline("ddim/karras", VP, 4)
    with pytest.raises(ScheduleError, match="nfe 0"):
        baseline("ddim/edm", VP, 0)
    assert set(GRIDS) == {n.split("/")[1] for n in named(VP, 5)}
    assert not any(n.startswith("heun") for n in named(VP, 6))
    assert any(n.startswith("heun") for n in named(VP, 5))
    for name, s in named(VP, 5).items():
        assert s.nfe == s.program.nfe == 5, name


def test_a_changed_copy_is_validated_and_computed_anew():
    base = rich()
    before = base.digest
    assert base.model_copy(update={"times": (1.0, 0.8, 0.55, 0.3, 0.12, 0.001)}).digest != before
    with pytest.raises(ScheduleError, match=r"outside 1\.\.4"):
        base.steps[0].model_copy(update={"order": 9})
    with pytest.raises(ScheduleError, match="below times"):
        base.model_copy(update={"times": (1.0, 0.8, 0.9, 0.3, 0.12, 0.001)})


def test_stacking_needs_equal_numbers_of_calls():
    with pytest.raises(ScheduleError, match="cannot run as one batch"):
        stack([rich().program, schedule(StepSpec()).program])


def test_values_that_are_not_numbers_of_a_step_are_refused():
    with pytest.raises(ScheduleError, match=r"values\['tims'\]"):
        compile(rich(), {"tims": torch.zeros(6)})
    assert noise_from_dict(noise_to_dict(VP)) == VP
