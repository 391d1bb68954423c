"""The ComfyUI node: SAMPLER and SIGMAS of a file, used as ComfyUI uses them."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from fewstep.samplers import sample
from fewstep.samplers.comfy import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    part_of,
    sampler_function,
)
from fewstep.samplers.kdiffusion import sigmas_of
from fewstep.space import FewstepError, OdeSchedule, ScheduleError, StepSpec, save_schedule
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from tests.oracles import recorded_mixture

VE, FLOW = noises.EDM(sigma_max=14.6), noises.RectifiedFlow(shift=3.0, t_end=0.0)


class KSampler:
    """What ComfyUI documents of its SAMPLER: a k-diffusion function and its keywords."""

    def __init__(self, function, extra_options=None):
        self.function, self.extra_options = function, extra_options or {}


@pytest.fixture
def comfy(monkeypatch):
    package, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSampler
    package.samplers = samplers
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


def z(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=g)


def ve_model(x, sigma, seed=None, model_options=None, denoise_mask=None):
    return recorded_mixture(VE)(x, sigma)


def run(sampler, sigmas, x, seen=None):
    """As ComfyUI calls a SAMPLER's function."""
    extra = {"model_options": {}, "seed": 3, "denoise_mask": None}
    return sampler.function(
        ve_model, x, sigmas, extra_args=extra, callback=seen, disable=True,
        **sampler.extra_options,
    )  # fmt: skip


def test_the_node_declares_what_comfyui_reads():
    (name, node), = NODE_CLASS_MAPPINGS.items()  # fmt: skip
    assert set(NODE_DISPLAY_NAME_MAPPINGS) == {name}
    assert node.RETURN_TYPES == ("SAMPLER", "SIGMAS")
    assert callable(getattr(node(), node.FUNCTION))
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["file"][0] == "STRING"
    assert inputs["denoise"][0] == "FLOAT"


def test_both_outputs_replay_the_file(comfy, tmp_path):
    s = baseline("unipc3-bh2/edm", VE, 6)
    path = save_schedule(s, tmp_path / "nfe06.json")
    sampler, sigmas = NODE_CLASS_MAPPINGS["FewstepSchedule"]().load(str(path))
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (7,)
    x, seen = z() * 14.6, []
    out = run(sampler, sigmas, x, seen.append)
    assert torch.allclose(out, sample(s, recorded_mixture(VE), x), rtol=0, atol=1e-9)
    assert [facts["i"] for facts in seen] == list(range(6))


def test_a_share_of_the_steps_is_image_to_image(comfy, tmp_path):
    s = baseline("ddim/edm", VE, 6)
    path = save_schedule(s, tmp_path / "nfe06.json")
    sampler, sigmas = NODE_CLASS_MAPPINGS["FewstepSchedule"]().load(str(path), denoise=0.5)
    assert sigmas.shape == (4,)
    x = z() * float(sigmas[0])
    assert torch.allclose(run(sampler, sigmas, x), sample(s.tail(3), recorded_mixture(VE), x))
    with pytest.raises(ScheduleError, match="denoise 0 must lie above 0"):
        part_of(sigmas, 0.0)


def test_flow_files_hand_out_sigmas_of_zero_to_one():
    s = OdeSchedule(noise=FLOW, times=(1.0, 0.5, 0.0), steps=(StepSpec(),) * 2)
    assert sigmas_of(s).tolist() == pytest.approx([1.0, 0.75, 0.0])
    told = []

    def model(x, sigma):
        told.append(float(sigma[0]))
        return 0.5 * x

    sampler_function(s)(model, z(), sigmas_of(s))
    assert told == pytest.approx([1.0, 0.75])


def test_what_does_not_run_in_comfyui_is_one_line(tmp_path):
    node = NODE_CLASS_MAPPINGS["FewstepSchedule"]()
    path = save_schedule(baseline("ddim/edm", VE, 2), tmp_path / "a.json")
    if "comfy" not in sys.modules:
        with pytest.raises(FewstepError, match="runs inside ComfyUI"):
            node.load(str(path))
    with pytest.raises(ScheduleError, match="no such file"):
        node.load(str(tmp_path / "none.json"))
    mean = OdeSchedule(
        noise=VE, times=(14.6, 2.0, 0.5, 0.0), steps=(StepSpec(),) * 3, first="mean"
    )
    with pytest.raises(ScheduleError, match="constant image is missing"):
        node.load(str(save_schedule(mean, tmp_path / "mean.json")))
