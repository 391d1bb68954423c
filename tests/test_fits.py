"""One table of facts: a scheduler's configuration on one side, a schedule file on the other."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.samplers.fits import facts, labels, network_facts, require_fit
from fewstep.space import OdeSchedule, ScheduleError, StepSpec, noise
from fewstep.space.baselines import baseline
from fewstep.space.errors import ModelError
from fewstep.space.noise import noise_from_dict, noise_to_dict

diffusers = pytest.importorskip("diffusers")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLES = [
    SD,
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [1e-3 * (1 + i / 50) for i in range(100)]},
    SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


def file(made, nfe=4):
    return baseline("ddim/time", made, nfe)


@pytest.mark.parametrize("config", TABLES, ids=lambda c: next(iter(c)))
def test_the_table_of_every_kind_of_betas_is_the_schedulers_own(config):
    theirs = diffusers.DDIMScheduler(**config)
    made = network_facts(theirs.config).noise
    own = 0.5 * torch.log(theirs.alphas_cumprod.double())
    last = None if "rescale_betas_zero_snr" not in config else -1  # 0 there, 2**-24 here
    assert torch.allclose(made.table[:last], own[:last], rtol=1e-5, atol=1e-5)
    assert noise_from_dict(noise_to_dict(made)) == made
    assert require_fit(file(made), network_facts(theirs.config))[0].verdict == "fits"


def test_sigmoid_betas_and_a_shifted_table_are_the_schedulers_own():
    for theirs in (
        diffusers.DDPMScheduler(beta_schedule="sigmoid", clip_sample=False),
        diffusers.CogVideoXDDIMScheduler(),
        diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0),
    ):
        made = network_facts(theirs.config).noise
        own = 0.5 * torch.log(theirs.alphas_cumprod.double())
        assert torch.allclose(made.table, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("i", range(len(TABLES)))
@pytest.mark.parametrize("j", range(len(TABLES)))
def test_every_table_refuses_every_other_tables_file(i, j):
    ours = network_facts(diffusers.DDIMScheduler(**TABLES[i]).config).noise
    network = network_facts(diffusers.DDIMScheduler(**TABLES[j]).config)
    if i == j:
        require_fit(file(ours), network)
        return
    with pytest.raises(ScheduleError, match="made for another model"):
        require_fit(file(ours), network)


@pytest.mark.parametrize(
    "made",
    [
        noise.VPLinear(),
        noise.VPCosine(),
        noise.EDM(),
        noise.RectifiedFlow(t_end=0.0, label_scale=1000.0),
    ],
    ids=lambda n: n.type,
)
def test_a_file_of_another_family_is_refused(made):
    with pytest.raises(ScheduleError, match="noise schedule: the file's is"):
        require_fit(file(made), network_facts(diffusers.DDIMScheduler(**SD).config))


def test_a_flow_pipeline_tells_its_own_labels_at_the_files_levels():
    network = network_facts(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert (network.output, network.prediction_type) == ("flow", "flow_prediction")
    assert network.noise == noise.RectifiedFlow(shift=3.0, t_end=1e-3, label_scale=1000.0)
    for scale, shift in ((1000.0, 3.0), (1.0, 3.0), (1.0, 1.0)):
        made = noise.RectifiedFlow(shift=shift, label_scale=scale, t_end=0.0)
        schedule = OdeSchedule(noise=made, times=(1.0, 0.5, 0.0), steps=(StepSpec(),) * 2)
        table = {fact.name: fact.verdict for fact in require_fit(schedule, network)}
        assert table["labels"] == ("fits" if scale == 1000.0 else "converted")
        assert table["noise schedule"] == ("fits" if shift == 3.0 else "converted")
        told = labels(schedule, network)
        assert torch.allclose(told, 1000 * schedule.program.sigma, rtol=0, atol=1e-9)


def test_dynamic_shifting_is_the_shift_that_mu_says():
    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    assert network_facts(config, mu=0.9).noise.shift == pytest.approx(math.exp(0.9))
    unknown = network_facts(config)
    assert unknown.noise.shift == 1.0
    assert any("resolution" in note for note in unknown.notes)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    stock.set_timesteps(sigmas=[1.0, 0.5], mu=0.9)
    t = torch.tensor(0.5, dtype=torch.float64)
    ours = network_facts(config, mu=0.9).noise
    assert float(stock.sigmas[1]) == pytest.approx(float(ours.sigma(t)), rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("named", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_preconditioning_is_the_schedulers_own(named, kind):
    theirs = getattr(diffusers, named)(sigma_data=0.7, prediction_type=kind)
    theirs.set_timesteps(3)
    network = network_facts(theirs.config)
    g = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 1, 3, 3, 3, generator=g)
    sigma = theirs.sigmas[1]
    t = torch.full((1,), float(sigma), dtype=torch.float64)
    assert torch.allclose(network.network_input(x, t), theirs.precondition_inputs(x, sigma))
    assert torch.allclose(network.data(x, out, t), theirs.precondition_outputs(x, out, sigma))
    assert float(network.noise.label(t)) == pytest.approx(float(theirs.timesteps[1]), abs=1e-6)


def test_video_models_euler_with_continuous_labels_is_edm_with_unit_data():
    theirs = diffusers.EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002,
        sigma_max=700.0, use_karras_sigmas=True,
    )  # fmt: skip
    theirs.set_timesteps(4)
    network = network_facts(theirs.config)
    x, out = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    t = theirs.sigmas[:1].double()
    scaled = theirs.scale_model_input(x, theirs.timesteps[0])
    assert torch.allclose(network.network_input(x, t), scaled)
    assert float(network.noise.label(t)) == pytest.approx(float(theirs.timesteps[0]), rel=1e-6)
    own = theirs.step(out, theirs.timesteps[0], x).pred_original_sample
    assert torch.allclose(network.data(x, out, t), own)


@pytest.mark.parametrize(
    "options",
    [
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        {"thresholding": True},
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"clip_sample": False},
        {},
    ],
    ids=str,
)
def test_clipping_is_the_schedulers_own(options):
    theirs = diffusers.DDPMScheduler(**SD, **options)
    network = network_facts(theirs.config)
    x, out = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 500.0, dtype=torch.float64)
    own = theirs.step(out, 500, x, generator=torch.Generator()).pred_original_sample
    assert torch.allclose(network.data(x, out, t), own, atol=1e-5)


def test_a_file_with_other_thresholding_than_the_pipelines_is_refused():
    network = network_facts(diffusers.DDPMScheduler(**SD, clip_sample_range=0.5).config)
    schedule = file(network.noise)
    assert {f.name: f.verdict for f in facts(schedule, network)}["clipping"] == "converted"
    same = schedule.model_copy(update={"options": {"threshold": dict(network.clip)}})
    assert {f.name: f.verdict for f in facts(same, network)}["clipping"] == "fits"
    other = schedule.model_copy(update={"options": {"threshold": {"quantile": 0.9}}})
    with pytest.raises(ScheduleError, match=r"clipping: the file's options\.threshold"):
        require_fit(other, network)


def test_a_leftover_clip_of_another_class_is_ignored_as_that_class_does():
    for named in ("PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        kept = dict(getattr(diffusers, named)(**SD).config) | {"clip_sample": True}
        assert network_facts(kept).clip is None


def test_a_learned_variance_is_dropped_and_said():
    network = network_facts(
        diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type="learned_range").config
    )
    x, out = torch.randn(1, 2, 2, 2), torch.randn(1, 4, 2, 2)
    t = torch.full((1,), 500.0, dtype=torch.float64)
    assert torch.equal(network.data(x, out, t), network.data(x, out[:, :2], t))
    assert any(f.name == "channels" for f in facts(file(network.noise), network))
    plain = network_facts(diffusers.DDPMScheduler(**SD).config)
    with pytest.raises(ModelError, match="variance_type='learned_range'"):
        plain.data(x, out, t)
    with pytest.raises(ModelError, match="must return the shape of the state"):
        plain.data(x, out[:, :1], t)


def test_guidance_and_a_variance_driven_shift_are_said():
    network = network_facts(diffusers.DDIMScheduler(**SD, clip_sample=False).config)
    steps = (StepSpec(guidance=7.5), StepSpec(guidance=3.0))
    schedule = OdeSchedule(noise=network.noise, times=(999.0, 400.0, -1.0), steps=steps)
    (said,) = (f for f in facts(schedule, network) if f.name == "guidance")
    assert said.verdict == "converted"
    assert "7.5, 3" in said.line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy 2's in old schedulers
def test_a_live_configuration_and_a_saved_one_say_the_same(tmp_path):
    """A live configuration does not name its class: its keys do."""
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    seen = 0
    for name in names:
        try:
            theirs = getattr(diffusers, name)()
        except (TypeError, ImportError):  # needs arguments, or torchsde
            continue
        live = _said(dict(theirs.config))
        theirs.save_config(tmp_path)
        saved = _said(type(theirs).load_config(tmp_path))
        seen += not isinstance(saved, str)
        if name != "FlowMapEulerDiscreteScheduler":  # its keys are those of FlowMatchHeun
            assert isinstance(live, str) == isinstance(saved, str), name
        if not isinstance(live, str) and not isinstance(saved, str):
            assert live == saved
            assert live == _said({"_class_name": name}), name
    assert seen >= 24


def _said(config):
    try:
        found = network_facts(config)
    except ScheduleError as error:
        return str(error)
    return found.noise, found.output, found.clip, found.sigma_data


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "SCMScheduler", "sigma_data": 0.5}, "another kind of network"),
        ({}, "another kind of network"),
        (SD | {"beta_schedule": "cosine"}, "beta_schedule 'cosine' is unknown"),
        (SD | {"num_train_timesteps": 0}, "num_train_timesteps"),
        (SD | {"num_train_timesteps": 10.5}, "whole number"),
        (SD | {"beta_end": "big"}, "beta_end is 'big'"),
        (SD | {"prediction_type": "noise"}, "prediction_type 'noise' is unknown"),
        (SD | {"thresholding": "yes"}, "thresholding is 'yes'"),
        (SD | {"trained_betas": [0.1, 2.0]}, "trained_betas holds 2.0"),
        ({"shift": -1.0, "num_train_timesteps": 1000}, "shift is -1.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "Mochi"),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 0.001}, "first time"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_configuration_that_cannot_be_is_one_line_naming_the_key(config, words):
    with pytest.raises(ScheduleError, match=words) as caught:
        network_facts(config)
    assert "\n" not in str(caught.value)


def test_a_flow_network_may_be_told_sigma_itself():
    config = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=3.0).config
    noise = network_facts(config).noise
    assert noise.label_scale == 1.0
    assert noise.t_range[1] == 0.001
    t = torch.tensor([0.5], dtype=torch.float64)
    assert torch.allclose(noise.label(t), noise.sigma(t))
    with pytest.raises(ScheduleError, match="num_train_timesteps is 1: a whole number from 2"):
        network_facts(diffusers.DDIMScheduler(num_train_timesteps=1).config)
