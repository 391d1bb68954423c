"""Schedules replayed in diffusers pipelines of every family are what `sample` makes of them."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.space.baselines import named

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.samplers.pipelines import PipelineDenoiser
from tests.test_wild_pipelines import NO_LATENTS, close, seeded, shown
from tests.tiny_pipelines import BUILDERS, build

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in NO_LATENTS])
def test_a_schedule_replayed_in_the_pipeline_equals_sample(name):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    z = torch.randn(1, *denoiser.shape, generator=seeded(1))
    config = json.loads(pipe.scheduler.to_json_string())
    schedules = [s for n, s in named(denoiser.noise, 4).items() if not n.startswith("ddpm")]
    for schedule in (*schedules[5::12], denoiser.stock(4)):
        if schedule.program.stochastic:
            continue
        ours = sample(schedule, denoiser, start(schedule, z))
        pipe.scheduler = FewstepScheduler.from_config(config, schedule=schedule.to_dict())
        assert close(shown(pipe, name, z, call, 4), ours)
