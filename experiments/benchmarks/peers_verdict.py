"""One verdict for every peer: errors on the same fresh samples, ratios and their interval.

The error of a sample is its mean squared distance to the end point of a teacher of many calls from
the same noise. Ratios are over the best named solver on the same samples: geometric mean (with a
95 % interval), median, mean, 90 % quantile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.yardstick import compare
from fewstep.samplers import Problem, sample
from fewstep.search.display import Display
from fewstep.space import OdeSchedule, ProgramSchedule
from fewstep.space.baselines import baseline

BLOCK = 512
"""Samples of a network call."""

TEACHER = "dpmpp3m/logsnr"
STREAMS = {"fit": 1, "held": 2, "select": 3, "fresh": 4}
"""Noise that no two purposes share; fresh noise does not depend on the seed of the fits."""

Schedule = OdeSchedule | ProgramSchedule


@dataclass(frozen=True)
class Streams:
    """Noise and the teacher's end points, computed once and kept as files.

    Args:
        problem: the model.
        name: of the model, as in the files' names.
        teacher: calls of the teacher.
        seed: of the noise of all streams but the fresh one.
        folder: where the files are.
        display: told of the evaluations.
    """

    problem: Problem
    name: str
    teacher: int
    seed: int
    folder: Path
    display: Display

    def batch(self, stream: str, count: int) -> Batch:
        """The first `count` samples of a stream."""
        seed = 0 if stream == "fresh" else self.seed
        shape, noise = self.problem.shape, self.problem.denoiser.noise
        rows = [
            np.random.default_rng([20_171, STREAMS[stream], seed, i]).standard_normal(shape)
            for i in range(count)
        ]
        x_T = torch.from_numpy(np.stack(rows)).float() * noise.prior_scale(noise.t_range[0])
        cond = {} if self.problem.cond is None else self.problem.cond(torch.arange(count))
        whole = Batch(x_T, x_T, cond, self.problem.guidance)
        path = self.folder / f"{self.name}_{stream}_{seed}_{count}_{self.teacher}.safetensors"
        if not path.exists():
            self.display.stage(f"{self.name}: teacher of {count} {stream} samples")
            self.display.total(count * self.teacher)
            schedule = baseline(TEACHER, noise, self.teacher)
            write_tensor(path, "target", samples(schedule, self.problem, whole, self.display))
        return Batch(x_T, load_file(path)["target"], cond, self.problem.guidance)


def samples(schedule: Schedule, problem: Problem, batch: Batch, display: Display) -> Tensor:
    """What a schedule makes of a batch's noise, in blocks."""
    made = []
    for at in range(0, len(batch), BLOCK):
        part = batch.take(slice(at, at + BLOCK))
        cond, guidance = dict(part.cond) or None, part.guidance
        made.append(sample(schedule, problem.denoiser, part.x_T, cond=cond, guidance=guidance))
        display.advance(len(part) * schedule.nfe)
    return torch.cat(made)


def errors(schedule: Schedule, problem: Problem, batch: Batch, display: Display) -> NDArray[Any]:
    """Mean squared error of every sample, shape (n,), float64."""
    y = samples(schedule, problem, batch, display)
    found: NDArray[Any] = (y - batch.target.to(y)).double().square().flatten(1).mean(1).numpy()
    return found


def write_tensor(path: Path, name: str, value: Tensor) -> None:
    """One tensor as a safetensors file; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: value.contiguous()}, temporary)
    temporary.replace(path)


def geometric(found: NDArray[Any]) -> float:
    """Geometric mean of errors, by which variants are chosen; inf where a sample diverged."""
    return float(np.exp(np.log(np.maximum(found, 1e-30)).mean()))


def ratios(found: NDArray[Any], other: NDArray[Any]) -> dict[str, float]:
    """How the errors of one schedule compare with another's on the same samples."""
    c = compare(found, other)
    pairs = {"geometric": c.geometric, "median": c.median, "mean": c.mean, "q90": c.q90}
    return pairs | {"worse": c.share_worse}
