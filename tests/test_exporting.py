"""Schedules in other tools' forms: exact there, or refused with the reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fewstep.experiments.cli.exporting import FORMS, export
from fewstep.experiments.cli.listing import from_list, recognised
from fewstep.samplers import sample, start
from fewstep.space import OdeSchedule, ProgramSchedule, StepSpec, noise, save_schedule
from fewstep.space.baselines import SOLVERS, baseline, on_times
from fewstep.space.errors import FewstepError, StudyError
from tests.studies import called, refused

TABLE = noise.VPDiscrete()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = noise.RectifiedFlow(shift=5.0, label_scale=1000.0, t_end=0.0)
WHOLE = (999.0, 800.0, 560.0, 300.0, 90.0, -1.0)


def z(seed=0, shape=(3, 2, 2, 2)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=g)


def mixed(made=None) -> OdeSchedule:
    steps = (
        StepSpec(),
        StepSpec(order=2, formulation="noise", dt_query=4.5),
        StepSpec(order=3, corrector="reuse", compensation=1.05),
        StepSpec(order=2, weights=(0.1, -0.2)),
        StepSpec(),
    )
    times = (999.0, 760.25, 502.5, 301.1, 99.9, 0.0)
    return OdeSchedule(noise=made or TABLE, times=times, steps=steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_named_solver_is_recognised_on_times_of_ones_own(name):
    if name in ("ipndm1", "f-pndm"):
        return  # ipndm1 is ddim; f-pndm needs more steps
    made = on_times(name, TABLE, WHOLE)
    found, again = recognised(ProgramSchedule.of(made))
    assert found in (name, f"{name}/low")
    assert again.program.digest == made.program.digest


def test_a_searched_schedule_is_no_named_solver():
    assert recognised(mixed()) is None


CASES = [
    mixed(),
    baseline("ddpm/time", TABLE, 4),
    baseline("unipc3-bh2/logsnr", noise.VPLinear(), 5),
    baseline("heun/edm", noise.EDM(), 5),
    OdeSchedule(noise=FLOW, times=(0.97, 0.5, 0.2, 0.0), steps=(StepSpec(),) * 3),
    baseline("dpmpp2m/time", TABLE, 4).model_copy(
        update={"options": {"threshold": {"quantile": 0.9, "minimum": 0.5}}}
    ),
    OdeSchedule(
        noise=TABLE, times=(999.0, 800.0, 300.0, 0.0), steps=(StepSpec(),) * 3, first="mean"
    ).with_constant(torch.linspace(-1, 1, 8).reshape(2, 2, 2)),
]

RUN = """
import sys, torch
sys.path.insert(0, ".")
import s
z = torch.load("z.pt", weights_only=True)
m = None
if len(sys.argv) > 1:
    from safetensors.torch import load_file
    m = load_file("s.safetensors")["constant"]
denoise = lambda x, label, alpha, sigma: torch.tanh(x * 0.7 + label / 900) * alpha + 0.1 * sigma
g = torch.Generator().manual_seed(5)
torch.save(s.sample(denoise, s.START_SCALE * z, m, g), "out.pt")
assert not any(name.startswith("fewstep") for name in sys.modules)
"""


class Same:
    """The network of RUN."""

    def __init__(self, made):
        self.noise = made

    def __call__(self, x, t, *, cond=None, guidance=None):
        t = t.double()
        a, s = (f(t).reshape(-1, 1, 1, 1) for f in (self.noise.alpha, self.noise.sigma))
        label = self.noise.label(t).reshape(-1, 1, 1, 1)
        return torch.tanh(x * 0.7 + label / 900) * a + 0.1 * s


@pytest.mark.parametrize("i", range(len(CASES)))
def test_the_stand_alone_file_replays_the_schedule_with_torch_alone(i, tmp_path):
    s = CASES[i]
    files = export(s, "python", tmp_path, "s")
    text = files[0].read_text()
    assert len(text.splitlines()) < 80
    torch.save(z(), tmp_path / "z.pt")
    arguments = ["m"] if s.constant is not None else []
    command = [sys.executable, "-P", "-c", RUN, *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": ""}, timeout=120)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    g = torch.Generator().manual_seed(5)
    ours = sample(s, Same(s.noise), start(s, z()), generator=g)
    assert torch.allclose(out, ours, rtol=0, atol=1e-10 * (1 + float(ours.abs().max())))


def test_timesteps_make_the_stock_solver_equal(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for solver, end in (("dpmpp2m/low", -1.0), ("dpmpp3m/low", -1.0), ("ddim", -1.0)):
        name, _, low = solver.partition("/")
        s = on_times(name, TABLE, (*WHOLE[:-1], end), low=bool(low))
        (file,) = export(s, "timesteps", tmp_path, "s")
        said = json.loads(file.read_text())
        stock = getattr(diffusers, said["scheduler"])(**BETAS, **said["options"])
        stock.set_timesteps(timesteps=said["timesteps"])
        x, net = z().float(), lambda x, t: torch.tanh(x + t / 700)
        y = x
        for t in stock.timesteps:
            y = stock.step(net(y, t), t, y).prev_sample
        ours = sample(s, _eps(net), x)
        assert float((y - ours).abs().max()) < 2e-5, solver


def _eps(net, made=TABLE):
    from fewstep.samplers import from_model

    return from_model(lambda x, t: net(x, t.reshape(-1, 1, 1, 1)), made, "eps")


def test_a_list_of_sigmas_makes_stock_euler_equal(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    s = on_times("ddim", TABLE, WHOLE)
    (file,) = export(s, "sigma_list", tmp_path, "s")
    sigmas = [float(v) for v in file.read_text().split(",")]
    stock = diffusers.EulerDiscreteScheduler(**BETAS)
    stock.set_timesteps(sigmas=sigmas)
    x, net = z().float(), lambda x, t: torch.tanh(x + t / 700)
    scale = float(TABLE.alpha(torch.tensor(999.0).double()))
    y = x / scale
    for t in stock.timesteps:
        y = stock.step(net(stock.scale_model_input(y, t), t), t, y).prev_sample
    ours = sample(s, _eps(net), x)
    assert float((y - ours).abs().max()) < 1e-4 * float(ours.abs().max())


def test_a_step_list_and_its_way_back(capsys, tmp_path):
    s = on_times("ddim", FLOW, (1.0, 0.75, 0.5, 0.25, 0.0))
    (file,) = export(s, "denoising_step_list", tmp_path, "s")
    said = json.loads(file.read_text())
    assert said["denoising_step_list"] == [1000, 750, 500, 250]
    assert (said["sample_shift"], said["infer_steps"]) == (5.0, 4)
    out = tmp_path / "back.json"
    assert called(capsys, "import", file, "--solver", "euler", "--out", out)[0] == 0
    assert json.loads(out.read_text())["times"] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_output_kind_travels_to_diffusers(capsys, tmp_path):
    pytest.importorskip("diffusers")
    from fewstep.samplers.diffusers import FewstepScheduler

    flow = on_times("ddim", FLOW, (1.0, 0.5, 0.0))
    export(flow, "diffusers", tmp_path / "flow", "s")
    kept = json.loads((tmp_path / "flow" / "scheduler_config.json").read_text())
    assert kept["prediction_type"] == "flow_prediction"
    assert FewstepScheduler.from_pretrained(tmp_path / "flow").init_noise_sigma == 1.0
    path = save_schedule(mixed(), tmp_path / "s.json")
    folder = tmp_path / "v"
    code, told, _ = called(
        capsys, "export", path, folder, "--to", "diffusers", "--prediction-type", "v_prediction"
    )
    assert code == 0
    assert FewstepScheduler.from_pretrained(folder).config.prediction_type == "v_prediction"
    told = called(capsys, "export", path, tmp_path / "e", "--to", "diffusers")[1]
    assert "note: for a network that returns epsilon" in told
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", **BETAS, "beta_end": 0.02})
    )
    line = refused(
        capsys, "export", path, tmp_path / "n", "--to", "diffusers", "--pipeline", tmp_path
    )
    assert "made for another model" in line


def test_comfy_gets_a_node_a_schedule_and_its_list(tmp_path):
    s = mixed()
    files = {file.name: file for file in export(s, "comfy", tmp_path, "nfe05")}
    assert set(files) == {"nfe05.json", "fewstep_node.py", "nfe05.sigmas.txt"}
    values: dict[str, object] = {}
    exec(files["fewstep_node.py"].read_text(), values)
    assert "FewstepSchedule" in values["NODE_CLASS_MAPPINGS"]
    listed = files["nfe05.sigmas.txt"].read_text().split(",")
    assert len(listed) == 6


GUIDED = OdeSchedule(
    noise=TABLE, times=(999.0, 500.0, -1.0), steps=(StepSpec(guidance=3.0), StepSpec(guidance=2.0))
)


@pytest.mark.parametrize(
    ("schedule", "form", "words"),
    [
        (mixed(), "timesteps", "this program is no named solver"),
        (mixed(), "sigma_list", "this program is no named solver"),
        (baseline("unipc2-bh2/time", TABLE, 4), "timesteps", "this program is unipc2-bh2"),
        (baseline("dpmpp2m/edm", TABLE, 4), "timesteps", "is no whole number"),
        (baseline("dpmpp2m/time", noise.VPLinear(), 4), "timesteps", "is vp_linear"),
        (on_times("dpmpp2m", TABLE, (999.0, 500.0, 100.0)), "timesteps", "ends at time 100"),
        (mixed(), "denoising_step_list", "of a rectified flow"),
        (on_times("dpmpp2m", FLOW, (0.9, 0.5, 0.2, 0.0)), "denoising_step_list", "is dpmpp2m"),
        (on_times("ddim", FLOW, (1.0, 0.3333, 0.0)), "denoising_step_list", "no whole number"),
        (GUIDED, "python", "guidance scale of every call"),
        (GUIDED, "comfy", "guidance scale of every call"),
        (GUIDED, "sigma_list", "guidance of every call"),
    ],
)
def test_what_a_form_cannot_say_is_refused_with_the_reason(schedule, form, words, tmp_path):
    with pytest.raises(StudyError, match=words) as caught:
        export(schedule, form, tmp_path, "s")
    assert "\n" not in str(caught.value)


def test_other_kinds_have_few_forms(tmp_path):
    from fewstep.space import MaskedSchedule

    s = MaskedSchedule.from_counts([2, 2])
    for form in FORMS:
        if form != "csv":
            with pytest.raises(StudyError, match="has no such form"):
                export(s, form, tmp_path, "s")


# --- lists in -----------------------------------------------------------------------------------

OWN = [999, 845, 730, 640, 550, 450, 340, 230, 120, 25]


def test_a_list_of_timesteps_and_a_solver_is_one_command(capsys, tmp_path):
    files = {
        "list.json": json.dumps({"timesteps": OWN}),
        "list.txt": ", ".join(map(str, OWN)),
        "bare.json": json.dumps(OWN),
    }
    for name, text in files.items():
        path, out = tmp_path / name, tmp_path / f"{name}.out.json"
        path.write_text(text)
        extra = () if name == "list.json" else ("--from", "timesteps")
        code, told, _ = called(capsys, "import", path, *extra, "--out", out)
        assert code == 0
        assert "10 network calls of dpmpp2m" in told
        assert "ending at clean data" in told
        assert json.loads(out.read_text())["times"] == [*map(float, OWN), -1.0]
    assert "say what the numbers are" in refused(
        capsys, "import", tmp_path / "list.txt", "--out", tmp_path / "x.json"
    )


@pytest.mark.parametrize(
    "made", [TABLE, noise.VPLinear(), noise.EDM(), FLOW], ids=lambda n: n.type
)
@pytest.mark.parametrize("kind", ["timesteps", "sigmas", "times"])
def test_a_list_names_the_levels_it_says(made, kind):
    t = torch.tensor(baseline("ddim/time", made, 4, t_end=0.1).times[:-1], dtype=torch.float64)
    flow = isinstance(made, noise.RectifiedFlow)
    levels = made.sigma(t) / (made.alpha(t) + made.sigma(t) if flow else made.alpha(t))
    values = {"timesteps": made.label(t), "sigmas": levels, "times": t}[kind].tolist()
    schedule, where = from_list(kind, values, "euler", made)
    ends = kind == "timesteps" or (kind == "sigmas" and flow)
    assert (where == "clean data") == ends
    assert schedule.times[: len(t)] == pytest.approx(t.tolist(), abs=1e-9)
    assert schedule.n_steps == len(t) - (not ends)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy 2's in stock schedulers
@pytest.mark.parametrize(
    ("config", "nfe", "like"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", **BETAS}, 6, "dpmpp2m"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 4, "ddim"),
        ({"_class_name": "EDMEulerScheduler"}, 4, "ddim"),
    ],
)
def test_a_diffusers_scheduler_and_a_number_of_calls_is_a_file(
    capsys, tmp_path, config, nfe, like
):
    pytest.importorskip("diffusers")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    out = tmp_path / "stock.json"
    code, told, _ = called(capsys, "import", tmp_path, "--nfe", nfe, "--out", out)
    assert code == 0
    assert f"{nfe} network calls of {config['_class_name']}" in told
    assert json.loads(out.read_text())["provenance"].get("baseline") == like
    config |= {"use_dynamic_shifting": True, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    assert "give --mu" in refused(capsys, "import", tmp_path, "--out", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sigmas", [1.5, 0.5], "euler", FLOW), "above 1, pure noise"),
        (("sigmas", [5.0, -1.0], "euler", TABLE), "below 0"),
        (("timesteps", [5.0, 10.0], "euler", TABLE), "must decrease strictly"),
        (("timesteps", [2000.0, 10.0], "euler", TABLE), "above the noise schedule's first"),
        (("timesteps", [900.0, 10.0], "magic", TABLE), "solver 'magic' is unknown"),
        (("timesteps", [900.0, 10.0], "ddim/up", TABLE), "write NAME or NAME/low"),
        (("times", [900.0], "ddim", TABLE), "one level is no step"),
        (("denoising_step_list", [900.0, 10.0], "ddim", TABLE), "a rectified flow's"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(arguments, words):
    with pytest.raises(FewstepError, match=words):
        from_list(*arguments)


def test_lint_says_fact_by_fact_whether_a_file_fits_a_pipeline(capsys, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "PNDMScheduler", **BETAS}))
    path = save_schedule(mixed(), tmp_path / "s.json")
    code, told, _ = called(capsys, "lint", path, "--pipeline", tmp_path)
    assert code == 0
    assert f"{path}: fits: noise schedule: the same betas" in told
    other = save_schedule(on_times("ddim", FLOW, (1.0, 0.5, 0.0)), tmp_path / "flow.json")
    code, told, wrong = called(capsys, "lint", path, other, "--pipeline", tmp_path)
    assert code == 2
    assert "refused: noise schedule" in wrong
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "name a diffusers pipeline's folder" in refused(
        capsys, "lint", path, "--pipeline", empty
    )
