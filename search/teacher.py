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
from safetensors.torch import load_file, save
from torch import Tensor

from fewstep.samplers import Problem
from fewstep.search.config import TeacherTable
from fewstep.search.pool import Pool
from fewstep.search.problem import DISTANCE, PERTURBED, model_key
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
        self._known: dict[str, Tensor] = {}

    def _schedule(self, nfe: int) -> OdeSchedule:
        return baseline(self.table.solver, self.noise, nfe)

    def cost(self, samples: int) -> int:
        """Network evaluations of one uncached reference."""
        return samples * self.table.nfe

    def reference(self, stream: str, samples: int, advance: Advance | None = None) -> Reference:
        """The end points of samples 0..samples-1 of a stream; only what is new is computed.

        Raises:
            ModelError: the model returns a wrong shape or something not finite.
        """
        known, calls = self._known.get(stream), 0
        have = 0 if known is None else len(known)
        if have < samples:
            more = self._endpoints(self.schedule, stream, (have, samples), advance)
            calls = more.calls
            known = more.samples if known is None else torch.cat([known, more.samples])
            self._known[stream] = known
        assert known is not None
        return Reference(known[:samples], calls)

    def gain(self, stream: str, samples: int, advance: Advance | None = None) -> np.ndarray:
        """How strongly the end points answer to the start noise, squared, (N, 1), float64.

        The mean over two perturbed runs of |x(z + d u) - x(z)|^2 / |d u|^2, u unit noise: an
        error e of a sample is what a change of its start noise by e / gain makes.
        """
        here = self.reference(stream, samples, advance).samples
        moved = [
            self._endpoints(self.schedule, f"{stream}{PERTURBED}{k}", (0, samples), advance)
            for k in (1, 2)
        ]
        square = sum(
            (m.samples - here).to(torch.float64).square().flatten(1).mean(1) for m in moved
        )
        found: np.ndarray = (torch.as_tensor(square) / (2 * DISTANCE**2)).numpy()[:, None]
        return found

    def self_error(
        self, stream: str, reference: Tensor, advance: Advance | None = None
    ) -> float | None:
        """Mean square to the teacher of twice the calls, first `check` samples; None if 0."""
        count = min(self.table.check, len(reference))
        if count == 0:
            return None
        twice = self._endpoints(self._schedule(2 * self.table.nfe), stream, (0, count), advance)
        return float((reference[:count] - twice.samples).to(torch.float64).square().mean())

    def _endpoints(
        self,
        schedule: OdeSchedule,
        stream: str,
        span: tuple[int, int],
        advance: Advance | None,
    ) -> Reference:
        """End points of samples span[0]..span[1]-1, from the cache if it holds them."""
        path = self.cache / f"{self._key(schedule, stream, span)}.safetensors"
        found = _read(path, (span[1] - span[0], *self.problem.shape))
        if found is not None:
            if advance is not None:
                advance(len(found) * schedule.nfe)
            return Reference(found, 0)
        values, calls = self._run(schedule, stream, span, advance)
        _write(path, values)
        return Reference(values, calls)

    def _run(
        self,
        schedule: OdeSchedule,
        stream: str,
        span: tuple[int, int],
        advance: Advance | None,
    ) -> tuple[Tensor, int]:
        more: dict[str, Any] = {"want": "samples", "strict": True}
        blocks = Block.cover([schedule], stream, range(*span), self.block, **more)
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

    def _key(self, schedule: OdeSchedule, stream: str, span: tuple[int, int]) -> str:
        parts = [
            self._model,
            schedule.digest,
            list(self.problem.shape),
            self.seed,
            stream,
            list(span),
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
    temporary.write_bytes(save({"endpoints": values.contiguous()}))  # readable as files here are
    temporary.replace(path)
