"""The noise of every sample: a function of seed, stream and index alone.

No batch size and no worker can change a sample, and schedules are compared on the same noise.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.categorical import uniforms

PERTURBED, DISTANCE = "~", 0.01
"""The stream "search~1" holds the noise of "search" moved by `DISTANCE` times other unit noise."""


def sample_seed(seed: int, stream: str, index: int) -> int:
    """The seed of one sample's noise: no batch size and no worker can change it."""
    digest = hashlib.sha256(f"fewstep/{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise_of(seed: int, stream: str, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Unit noise of the samples `indices` of a stream, shape (B, *shape), float32.

    Args:
        seed: the study's seed.
        stream: "search", "select" or "fresh": streams share no noise.
        indices: sample indices.
        shape: shape of one sample.
    """
    whole, moved, _ = stream.partition(PERTURBED)
    if moved:
        other = noise_of(seed, stream.replace(PERTURBED, "/moved"), indices, shape)
        return noise_of(seed, whole, indices, shape) + DISTANCE * other
    return _drawn(seed, stream, tuple(indices), tuple(shape)).clone()


@functools.lru_cache(maxsize=8)
def _drawn(seed: int, stream: str, indices: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The blocks of a stream come again with every group of candidates."""
    draws = []
    for index in indices:
        generator = torch.Generator().manual_seed(sample_seed(seed, stream, index))
        draws.append(torch.randn(shape, generator=generator))
    return torch.stack(draws)


def uniforms_of(seed: int, stream: str, indices: range, shape: tuple[int, int]) -> Tensor:
    """The uniforms of the samples `indices` of a stream, float64 `(B, *shape)`.

    The rows that schedules have in common are the same.
    """
    draws = []
    for index in indices:
        generator = torch.Generator().manual_seed(sample_seed(seed, stream, index))
        draws.append(uniforms(*shape, generator=generator))
    return torch.stack(draws)
