"""Rules that end early are set to a mean number of calls."""

import pytest
import torch

from fewstep.experiments.benchmarks.calibration import (
    RULES,
    calibrated,
    entropy_bound,
    klass,
    mean_calls,
)
from fewstep.samplers.categorical import uniforms
from tests.masked_toys import blank, random_joint, table_denoiser

LENGTH = 6
DENOISER = table_denoiser((random_joint(1, LENGTH, 3) + 2e-4) / (1 + 2e-4 * 3**LENGTH))
U = uniforms(200, 2, LENGTH, generator=torch.Generator().manual_seed(0))
START = blank(200, LENGTH)


@pytest.mark.parametrize("name", RULES)
def test_calls_rise_with_strictness_from_the_fewest_to_one_a_position(name: str) -> None:
    means = [
        mean_calls(RULES[name](LENGTH, x), DENOISER, START, U)
        for x in (1e-6, 0.3, 0.6, 0.9, 1 - 1e-9)
    ]
    assert means == sorted(means)
    assert means[0] == {"entropy bound": 1, "KLASS": 3}[name]  # a window of two calls, then all
    assert means[-1] == LENGTH


@pytest.mark.parametrize(("name", "wanted"), [("entropy bound", [2, 3, 4]), ("KLASS", [4, 5])])
def test_a_bound_is_found_for_every_mean(name: str, wanted: list[int]) -> None:
    found = calibrated(RULES[name], wanted, DENOISER, START, U, within=0.05, rounds=12)
    for calls in wanted:
        schedule = found[calls]
        mean = mean_calls(schedule, DENOISER, START, U)
        assert mean == schedule.provenance["mean_calls"] == pytest.approx(calls, rel=0.05)
        other = uniforms(2000, 2, LENGTH, generator=torch.Generator().manual_seed(1))
        assert mean_calls(schedule, DENOISER, blank(2000, LENGTH), other) == pytest.approx(
            calls, rel=0.1
        )


def test_the_published_numbers_are_on_the_path_of_klass() -> None:
    call = klass(LENGTH, 0.9).calls[0]
    assert (call.min_confidence, call.kl_window) == (0.9, 2)
    assert call.max_kl == pytest.approx(0.01)
    assert entropy_bound(LENGTH, 1 / 1.1).calls[0].max_entropy == pytest.approx(0.1)
