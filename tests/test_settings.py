"""Settings of one network as calls of their own sort, and caches, which are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.samplers import from_model, sample, start
from fewstep.samplers.pipelines import PipelineDenoiser
from fewstep.samplers.replay import Replay
from fewstep.space import ModelError, ProgramSchedule
from fewstep.space.baselines import baseline
from fewstep.space.noise import RectifiedFlow

diffusers = pytest.importorskip("diffusers")

from tests.tiny_pipelines import build  # noqa: E402

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "costs.md").read_text(encoding="utf-8")


@pytest.fixture
def shown():
    """What the Python of the page leaves."""
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "costs.md", "exec"), names)
    return names


def test_a_setting_that_skips_blocks_is_a_network_by_name(shown):
    transformer, flow, settings = shown["transformer"], shown["flow"], shown["settings"]
    assert settings.networks == {"light": 0.5}
    made = ProgramSchedule.of(baseline("dpmpp2m/logsnr", flow, 3))
    program = replace(made.program, network=("light", "", "light"))
    schedule = made.model_copy(update={"program": program})
    g = torch.Generator().manual_seed(0)
    x = start(schedule, torch.randn(4, 4, 8, 8, generator=g))
    cond = {"text": torch.randn(4, 5, 16, generator=g), "pooled": torch.randn(4, 16, generator=g)}
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
        for k, block in enumerate(transformer.transformer_blocks)
    ]
    with torch.no_grad():
        found = sample(schedule, settings, x, cond=cond)
        for hook in hooks:
            hook.remove()
        assert ran == [0, 3, 0, 1, 2, 3, 0, 3]
        replay = Replay(schedule, x)
        for name, t in zip(program.network, program.t, strict=True):
            replay.advance(settings(replay.state, t.expand(4), cond=cond, network=name))
        assert torch.allclose(found, replay.state, atol=1e-5)
        whole = sample(made, settings, x, cond=cond)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_a_cache_is_refused_because_its_answers_know_earlier_calls():
    net = build("flux")[0].transformer
    g = torch.Generator().manual_seed(1)
    asked = {"encoder_hidden_states": torch.randn(1, 5, 32, generator=g)}
    asked["pooled_projections"] = torch.randn(1, 32, generator=g)
    asked |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    asked["guidance"] = torch.tensor([3.0])
    first, second = torch.randn(2, 1, 16, net.config.in_channels, generator=g)

    def answer(x):
        return net(x, timestep=torch.tensor([0.5]), **asked, return_dict=False)[0]

    with torch.no_grad():
        alone = answer(second)
        net.enable_cache(diffusers.FirstBlockCacheConfig(threshold=100.0))  # reuses what it has
        with net.cache_context("one"):
            answer(first)
            assert not torch.allclose(answer(second), alone, atol=1e-4)
    line = r"the model reuses activations between steps .* call disable_cache\(\)"
    with pytest.raises(ModelError, match=line):
        from_model(net, RectifiedFlow(), "flow")
    net.disable_cache()
    from_model(net, RectifiedFlow(), "flow")


def test_a_pipeline_is_refused_where_hooks_were_applied_by_hand():
    pipe, call = build("flux")
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    diffusers.hooks.apply_first_block_cache(pipe.transformer, config)
    with pytest.raises(ModelError, match="FluxPipeline reuses activations"):
        PipelineDenoiser(pipe, call=call)
