"""What diffusers' pipelines and serving plugins ask of any scheduler, held by ours.

Written from the contract's description (methods, attributes, signatures), not from its suite.
"""

from __future__ import annotations

import copy
import inspect
import json
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.space import OdeSchedule, ScheduleError, StepSpec, noise
from fewstep.space.baselines import baseline

diffusers = pytest.importorskip("diffusers")
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TABLE = noise.VPDiscrete(betas="linear", beta_start=1e-4, beta_end=0.02)
FLOW = noise.RectifiedFlow(shift=3.0, label_scale=1000.0, t_end=0.0)


def config(**changes):
    made = {"schedule": baseline("dpmpp2m/time/low", TABLE, 10).to_dict()}
    return made | {"num_train_timesteps": 1000} | LINEAR | changes


def flow(first=1.0):
    steps = (StepSpec(), StepSpec(order=2), StepSpec(order=2), StepSpec())
    return OdeSchedule(noise=FLOW, times=(first, 0.8, 0.5, 0.2, 0.0), steps=steps)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, 8, 8, generator=g)


def stepped(scheduler, n, at, sample, **extra):
    scheduler.set_timesteps(n)
    scheduler.scale_model_input(sample, scheduler.timesteps[at])
    return scheduler.step(0.1 * sample, scheduler.timesteps[at], sample, **extra)


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("at", [0, 5])
def test_a_saved_scheduler_makes_the_same_step(tmp_path, n, at):
    ours = FewstepScheduler(**config())
    ours.save_config(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    assert "_use_default_values" not in json.loads(
        (tmp_path / "scheduler_config.json").read_text()
    )
    a, b = (stepped(s, n, at, batch()).prev_sample for s in (ours, again))
    assert float((a - b).abs().sum()) < 1e-5
    assert a.shape == batch().shape


def test_a_round_trip_through_every_compatible_class_keeps_the_configuration():
    ours = FewstepScheduler(**config())
    assert all(c is not None for c in ours.compatibles)
    for other in ours.compatibles:
        there = other.from_config(ours.config)
        back = FewstepScheduler.from_config(there.config)
        same = {k: v for k, v in back.config.items() if k in ours.config}
        assert same == dict(ours.config)
        new = set(back.config) - set(ours.config)
        assert not new & set(inspect.signature(FewstepScheduler.__init__).parameters)


def test_trained_betas_are_kept_and_refused_where_the_file_is_another_models():
    ours = FewstepScheduler(**config(), trained_betas=np.array([0.1, 0.3]))
    assert torch.allclose(ours.betas, torch.tensor([0.1, 0.3]))
    with pytest.raises(ScheduleError, match="made for another model"):
        ours.set_timesteps(10)
    own = noise.VPDiscrete(betas=tuple(np.linspace(1e-3, 0.2, 100).tolist()))
    fits = FewstepScheduler(
        schedule=baseline("ddim/time", own, 3).to_dict(), trained_betas=list(own.betas)
    )
    fits.set_timesteps(3)


def test_consecutive_steps_keep_the_shape_and_a_tuple_is_the_output():
    ours = FewstepScheduler(**config())
    ours.set_timesteps(50)
    x = batch()
    for at in (5, 6):
        y = ours.step(0.1 * x, ours.timesteps[at], x).prev_sample
        assert y.shape == x.shape
    for timestep in (0, 1, ours.timesteps[3]):
        ours.set_timesteps(10)
        whole = ours.step(0.1 * x, timestep, x)
        ours.set_timesteps(10)
        plain = ours.step(0.1 * x, timestep, x, return_dict=False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], whole.prev_sample)


def test_the_input_is_scaled_before_any_timestep_is_set_and_noise_is_added_in_its_shape():
    ours = FewstepScheduler(**config())
    assert torch.equal(ours.scale_model_input(batch(), 0.0), batch())
    ours.set_timesteps(10)
    noisy = ours.add_noise(batch(), batch(1), ours.timesteps[5][None])
    assert noisy.shape == batch().shape
    assert len(ours) == ours.config.num_train_timesteps == 1000
    with pytest.warns(FutureWarning, match="prediction_type"):
        _ = ours.prediction_type


def test_steps_in_a_wrong_order_are_refused():
    ours = FewstepScheduler(**config())
    ours.set_timesteps(10)
    x = ours.step(batch(), ours.timesteps[0], batch()).prev_sample
    with pytest.raises(ScheduleError, match="call 4 but call 1 is next"):
        ours.step(x, ours.timesteps[4], x)
    with pytest.raises(ScheduleError, match="changed its shape"):
        ours.step(x[:1], ours.timesteps[1], x[:1])


# --- what serving plugins ask (schedulers by entry point) ---------------------------------------


def plugin():
    file = Path(__file__).parents[1] / "pyproject.toml"
    group = tomllib.loads(file.read_text())["project"]["entry-points"]["vllm_omni.schedulers"]
    module, _, name = group["fewstep"].partition(":")
    return getattr(import_module(module), name)


def test_the_plugin_is_made_from_a_models_folder_and_warms_up(tmp_path):
    """from_pretrained(model, subfolder="scheduler", **kwargs), then a dummy run of one step."""
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_config(tmp_path / "scheduler")
    made = plugin().from_pretrained(
        str(tmp_path), subfolder="scheduler", local_files_only=True, schedule=flow().to_dict()
    )
    for name in ("sigmas", "timesteps", "mu"):
        assert name in inspect.signature(made.set_timesteps).parameters
    made = copy.deepcopy(made)
    assert made.config.num_train_timesteps == 1000
    for sigmas in ([1.0], list(np.linspace(1, 0.25, 4)), torch.linspace(1, 0.25, 4)):
        made.set_timesteps(sigmas=sigmas, device="cpu", mu=0.7)
        made.set_begin_index(0)
        x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
        for t in made.timesteps:
            out = made.step(0.1 * x, t, x, return_dict=False, generator=None)
            assert isinstance(out, tuple)
            x = out[0]
        assert len(made.timesteps) == len(sigmas)
        assert bool(torch.isfinite(x).all())


def test_a_pipelines_own_sigmas_are_answered_once_with_what_holds(caplog):
    ours = FewstepScheduler(schedule=flow().to_dict())
    log = "fewstep.samplers.diffusers"
    logger = import_module("logging").getLogger(log)
    with caplog.at_level("WARNING", logger=log):
        logger.addHandler(caplog.handler)
        for _ in range(2):
            ours.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.0)
            ours.set_timesteps(timesteps=[900, 600, 300, 10])
            ours.set_timesteps(7)
        logger.removeHandler(caplog.handler)
    told = sorted({r.message for r in caplog.records})
    assert len(told) == 4
    for words in ("sigmas of its own", "timesteps of its own", "mu = 1", "no schedule of 7 calls"):
        assert sum(words in line for line in told) == 1
    assert torch.equal(ours.timesteps[:1], torch.tensor([1000.0]))
