"""Mutated scheduler configurations and schedule files: loaded and equal, or one line."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch

from fewstep.samplers.fits import facts, network_facts, require_fit
from fewstep.samplers.replay import Replay, state_levels
from fewstep.space import OdeSchedule, ProgramSchedule, load_schedule, noise
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = [
    {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, **BETAS, "clip_sample": False},
    {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "thresholding": True,
     "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5, "variance_type": "learned"},
    {"_class_name": "DDIMScheduler", **BETAS, "rescale_betas_zero_snr": True,
     "prediction_type": "v_prediction"},
    {"_class_name": "CogVideoXDDIMScheduler", **BETAS, "snr_shift_scale": 3.0},
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "base_shift": 0.5,
     "max_shift": 1.15, "use_dynamic_shifting": False, "num_train_timesteps": 1000},
    {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
     "use_flow_sigmas": True, "flow_shift": 5.0},
    {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    {"_class_name": "EulerDiscreteScheduler", **BETAS, "trained_betas": [0.01, 0.02, 0.03]},
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 3.7, 1e-12, 1e12, 1e400, -1e400, float("nan"), 10**30, "",
    "linear", "flow_prediction", "epsilon", "learned_range", "x" * 50, [], [0.1, 0.2], [1e-3] * 9,
    [0.5, "a"], [[1.0]], {}, {"a": [1]}, "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler",
]  # fmt: skip


def mutated(config, rng):
    made = copy.deepcopy(config)
    keys = [*made, "prediction_type", "trained_betas", "clip_sample", "num_train_timesteps"]
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(keys)
        if rng.random() < 0.2:
            made.pop(key, None)
        else:
            made[key] = rng.choice(VALUES)
    return made


def one_line(error):
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 600


def test_mutated_configurations_are_read_or_refused_in_one_line():
    rng, read = random.Random(0), 0
    for i in range(2400):
        config = mutated(CONFIGS[i % len(CONFIGS)], rng)
        try:
            network = network_facts(config, mu=rng.choice([None, 0.5, 1.2]))
        except FewstepError as error:
            one_line(error)
            continue
        read += 1
        t = torch.tensor([network.noise.t_range[0]], dtype=torch.float64)
        x = torch.zeros(1, 2, 2)
        assert network.data(x, x, t).shape == x.shape
        assert bool(torch.isfinite(network.noise.label(t)).all())
    assert read > 600


def own(network, nfe=3):
    return baseline("ddim/time", network.noise, nfe)


def run(schedule, network, seed):
    """Replayed call by call, as a pipeline does."""
    g = torch.Generator().manual_seed(seed)
    replay = Replay(schedule, torch.randn(1, 2, 3, generator=g, dtype=torch.float64))
    while not replay.done:
        c, y, p = replay.call, replay.state, replay.program
        D = network.data_at(y, torch.tanh(y) + 0.1 * c, p.alpha[c], p.sigma[c])
        replay.advance(D, torch.zeros_like(y) if replay.noisy() else None)
    return replay.state


def test_a_file_that_fits_a_mutated_configuration_gives_the_same_samples():
    rng, same, refused = random.Random(1), 0, 0
    for i in range(400):
        config = CONFIGS[i % len(CONFIGS)]
        plain = network_facts(config)
        schedule = own(plain)
        try:
            network = network_facts(mutated(config, rng))
            require_fit(schedule, network)
        except FewstepError as error:
            one_line(error)
            refused += 1
            continue
        said = {f.name for f in facts(schedule, network) if f.verdict == "converted"}
        if (network.output, network.sigma_data, network.clip) == (
            plain.output, plain.sigma_data, plain.clip
        ):  # fmt: skip
            assert torch.equal(run(schedule, network, i), run(schedule, plain, i))
            same += 1
        elif network.clip != plain.clip and network.clip is not None:
            assert "clipping" in said
    assert same > 30
    assert refused > 30


def files():
    table, flow = noise.VPDiscrete(), noise.RectifiedFlow(shift=3.0, label_scale=1000.0)
    made = [
        baseline("unipc3-bh2/time", table, 4),
        baseline("heun/edm", noise.EDM(), 5),
        baseline("dpmpp2m/time", flow, 3),
        baseline("ddpm/time", noise.VPLinear(), 3),
    ]
    return [s.to_dict() for s in (*made, *(ProgramSchedule.of(s) for s in made))]


def spots(data, path=()):
    """Every place of a JSON value."""
    found = [path]
    children = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in children:
        if isinstance(value, dict | list):
            found += spots(value, (*path, key))
        else:
            found.append((*path, key))
    return found


def edited(data, rng, places):
    made = json.loads(json.dumps(data))
    for _ in range(rng.randint(1, 2)):
        *way, last = rng.choice(places)
        at = made
        try:
            for key in way:
                at = at[key]
            old = at[last]
            if rng.random() < 0.15:
                del at[last]
            elif isinstance(old, float) and rng.random() < 0.5:
                at[last] = old * rng.choice([1 + 1e-12, 0.9, -1, 1e30])
            else:
                at[last] = copy.deepcopy(rng.choice(VALUES))
        except (KeyError, IndexError, TypeError):  # gone by the first edit
            continue
    return made


@pytest.mark.parametrize("i", range(8))
def test_mutated_files_load_and_replay_or_are_refused_in_one_line(i):
    rng = random.Random(100 + i)
    data = files()[i]
    places = [p for p in spots(data) if p]
    network = {
        "vp_discrete": network_facts(CONFIGS[0]),
        "edm": network_facts(CONFIGS[6]),
        "rectified_flow": network_facts(CONFIGS[4]),
    }.get(data["noise"]["type"])
    loaded = 0
    for _ in range(100):
        try:
            schedule = load_schedule(edited(data, rng, places))
        except FewstepError as error:
            one_line(error)
            continue
        if not isinstance(schedule, OdeSchedule | ProgramSchedule):
            continue
        loaded += 1
        again = load_schedule(json.loads(json.dumps(schedule.to_dict())))
        assert again.digest == schedule.digest
        alpha, sigma = state_levels(schedule)
        assert len(alpha) == len(sigma) == schedule.nfe + 1
        if network is not None:
            for fact in facts(schedule, network):
                one_line(fact.line)
    assert loaded > 2
