"""The teacher: end points of many calls, from the candidates' noise, computed once.

It is an ordinary schedule (third-order multistep in the data prediction on a uniform log-SNR grid,
float64 coefficients) run by the same loop. Its own error is measured by doubling: the mean square
distance, per element, to the teacher of twice the calls on some of the samples, times 1 only (no
extrapolation): at order p the true error is about 1/(1 - 2^-p) of it. References are cached by
content: model, noise schedule, program, seed, stream and number of samples. The cache is
safetensors, written to a temporary name first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.samplers import Problem
from fewstep.search.config import TeacherTable
from fewstep.search.pool import Pool
from fewstep.search.problem import model_key
from fewstep.search.work import Block
from fewstep.space.baselines import baseline
from fewstep.space.errors import ModelError
from fewstep.space.schedule import OdeSchedule

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Reference:
    """The teacher's end points of one stream.

    Args:
        samples: shape (N, *shape), float32.
        calls: network evaluations spent now (0 if read from the cache).
    """

    samples: Tensor
    calls: int


class Teacher:
    """Computes and caches references.

    Args:
        problem: the model.
        table: the study's [teacher].
        pool: where to compute.
        cache: folder of references.
        seed: the study's seed.
        block: samples per batch.
    """

    def __init__(
        self,
        problem: Problem,
        table: TeacherTable,
        pool: Pool,
        cache: Path,
        *,
        seed: int,
        block: int,
    ) -> None:
        self.problem, self.table, self.pool, self.cache = problem, table, pool, cache
        self.seed, self.block = seed, block
        self.noise = problem.denoiser.noise
        self.schedule = self._schedule(table.nfe)
        self._model = model_key(problem)

    def _schedule(self, nfe: int) -> OdeSchedule:
        return baseline(self.table.solver, self.noise, nfe)

    def cost(self, samples: int) -> int:
        """Network evaluations of one uncached reference."""
        return samples * self.table.nfe

    def reference(self, stream: str, samples: int, advance: Advance | None = None) -> Reference:
        """The end points of samples 0..samples-1 of a stream.

        Raises:
            ModelError: the model returns a wrong shape or something not finite.
        """
        return self._endpoints(self.schedule, stream, samples, advance)

    def self_error(
        self, stream: str, reference: Tensor, advance: Advance | None = None
    ) -> float | None:
        """Mean square to the teacher of twice the calls, first `check` samples; None if 0."""
        count = min(self.table.check, len(reference))
        if count == 0:
            return None
        twice = self._endpoints(self._schedule(2 * self.table.nfe), stream, count, advance)
        return float((reference[:count] - twice.samples).to(torch.float64).square().mean())

    def _endpoints(
        self, schedule: OdeSchedule, stream: str, samples: int, advance: Advance | None
    ) -> Reference:
        path = self.cache / f"{self._key(schedule, stream, samples)}.safetensors"
        found = _read(path, (samples, *self.problem.shape))
        if found is not None:
            if advance is not None:
                advance(samples * schedule.nfe)
            return Reference(found, 0)
        values, calls = self._run(schedule, stream, samples, advance)
        _write(path, values)
        return Reference(values, calls)

    def _run(
        self, schedule: OdeSchedule, stream: str, samples: int, advance: Advance | None
    ) -> tuple[Tensor, int]:
        more: dict[str, Any] = {"want": "samples", "strict": True}
        blocks = Block.cover([schedule], stream, range(samples), self.block, **more)
        parts, calls = [], 0
        for result in self.pool.map(blocks):
            parts.append(result.values[0])
            calls += result.evaluations
            if advance is not None:
                advance(result.evaluations)
        samples_found = torch.from_numpy(np.concatenate(parts))
        if not bool(torch.isfinite(samples_found).all()):
            raise ModelError(
                f"the teacher's end points of {self.problem.fingerprint or 'the model'} are not "
                "finite: check its output kind"
            )
        return samples_found, calls

    def _key(self, schedule: OdeSchedule, stream: str, samples: int) -> str:
        parts = [
            self._model,
            schedule.digest,
            list(self.problem.shape),
            self.seed,
            stream,
            samples,
            self.block,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        found = load_file(path)["endpoints"]
    except (SafetensorError, KeyError, OSError):
        return None  # torn or foreign: computed again and replaced
    return found if tuple(found.shape) == shape else None


def _write(path: Path, values: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"endpoints": values.contiguous()}, temporary)
    temporary.replace(path)
