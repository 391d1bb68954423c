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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fewstep.samplers import Problem
from fewstep.samplers.problems import model_key
from fewstep.samplers.sample_noise import DISTANCE, PERTURBED
from fewstep.search.config import StudyConfig
from fewstep.search.pool import Pool, gathered
from fewstep.search.work import Block
from fewstep.space.baselines import baseline
from fewstep.space.errors import ModelError
from fewstep.space.files import write_whole
from fewstep.space.schedule import OdeSchedule


class Teacher:
    """Computes a study's references in a pool, and caches them in a folder.

    `advance` is called with network evaluations as they are done, cached ones included.
    """

    def __init__(
        self,
        problem: Problem,
        config: StudyConfig,
        pool: Pool,
        cache: Path,
        advance: Callable[[int], None] = lambda evaluations: None,
    ) -> None:
        self.problem, self.pool, self.cache, self.advance = problem, pool, cache, advance
        self.table, self.seed = config.teacher, config.search.seed
        self.block = config.search.block[1]
        self._model = model_key(problem)
        self._known: dict[str, Tensor] = {}

    def reference(self, stream: str, samples: int) -> Tensor:
        """The end points of samples 0..samples-1 of a stream; only what is new is computed.

        Raises:
            ModelError: the model returns a wrong shape or something not finite.
        """
        known = self._known.get(stream)
        have = 0 if known is None else len(known)
        if have < samples:
            more = self._endpoints(self.table.nfe, stream, have, samples)
            known = self._known[stream] = more if known is None else torch.cat([known, more])
        assert known is not None
        return known[:samples]

    def gain(self, stream: str, samples: int) -> np.ndarray:
        """How strongly the end points answer to the start noise, squared, (N, 1), float64.

        The mean over two perturbed runs of |x(z + d u) - x(z)|^2 / |d u|^2, u unit noise: an
        error e of a sample is what a change of its start noise by e / gain makes.
        """
        here, calls = self.reference(stream, samples), self.table.nfe
        moved = [
            self._endpoints(calls, f"{stream}{PERTURBED}{k}", 0, samples) - here for k in (1, 2)
        ]
        square = sum(m.to(torch.float64).square().flatten(1).mean(1) for m in moved)
        found: np.ndarray = (torch.as_tensor(square) / (2 * DISTANCE**2)).numpy()[:, None]
        return found

    def self_error(self, stream: str, reference: Tensor) -> float | None:
        """Mean square to the teacher of twice the calls, first `check` samples; None if 0."""
        count = min(self.table.check, len(reference))
        if count == 0:
            return None
        twice = self._endpoints(2 * self.table.nfe, stream, 0, count)
        return float((reference[:count] - twice).to(torch.float64).square().mean())

    def _endpoints(self, calls: int, stream: str, first: int, stop: int) -> Tensor:
        """End points of samples first..stop-1, from the cache if it holds them."""
        schedule = baseline(self.table.solver, self.problem.denoiser.noise, calls)
        path = self.cache / f"{self._key(schedule, stream, (first, stop))}.safetensors"
        found = _read(path, (stop - first, *self.problem.shape))
        if found is not None:
            self.advance(len(found) * schedule.nfe)
            return found
        more: dict[str, Any] = {"want": "samples", "strict": True}
        blocks = Block.cover([schedule], stream, range(first, stop), self.block, **more)
        made = torch.from_numpy(gathered(self.pool, blocks, self.advance))
        if not bool(torch.isfinite(made).all()):
            raise ModelError(
                f"the teacher's end points of {self.problem.fingerprint or 'the model'} are not "
                "finite: check its output kind"
            )
        write_whole(path, save({"endpoints": made.contiguous()}))
        return made

    def _key(self, schedule: OdeSchedule, stream: str, span: tuple[int, int]) -> str:
        what = [self._model, schedule.digest, list(self.problem.shape)]
        parts = [*what, self.seed, stream, list(span), self.block]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        found = load_file(path)["endpoints"]
    except (SafetensorError, KeyError, OSError):
        return None  # torn or foreign: computed again and replaced
    return found if tuple(found.shape) == shape else None
