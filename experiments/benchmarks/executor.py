"""What the loop costs beside the network: total time over time inside the network, in one run.

    python -m fewstep.experiments.benchmarks.executor [--model galaxy] [--batch 64] [--nfe 8]

Each repetition samples once with our loop and once with each of diffusers' UniPC and DPM-Solver++
schedulers, one thread, the same network and batch. The network's own time is taken around each
bare call inside the same run, so that a busy machine disturbs both alike; medians are printed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers import Problem, from_model, sample, start
from fewstep.samplers.denoiser import ModelDenoiser
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError, ModelError


class Timing:
    """A network that adds up the time spent in it."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        self.net, self.seconds = net, 0.0

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """Call the network."""
        begun = time.perf_counter()
        out = self.net(x, t, **cond)
        self.seconds += time.perf_counter() - begun
        return out


def ours(problem: Problem, net: Timing, batch: int, nfe: int) -> Callable[[], Tensor]:
    """Our loop with the densest named program: every row uses three outputs."""
    inner = problem.denoiser
    if not isinstance(inner, ModelDenoiser):
        raise ModelError("the benchmark times a network behind from_model")
    denoiser = from_model(net, inner.noise, inner.output)
    schedule = baseline("dpmpp3m/logsnr", inner.noise, nfe)
    x = start(schedule, torch.randn(batch, *problem.shape))
    cond = None if problem.cond is None else problem.cond(torch.arange(batch))
    assert schedule.program.nfe == nfe  # compiled once, as for every batch after the first
    return lambda: sample(schedule, denoiser, x, cond=cond)


def theirs(name: str, problem: Problem, net: Timing, batch: int, nfe: int) -> Callable[[], Tensor]:
    """A diffusers scheduler around the same network."""
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=1000)
    z = torch.randn(batch, *problem.shape)
    cond = {} if problem.cond is None else problem.cond(torch.arange(batch))

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(nfe)
        x: Tensor = z * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            eps = net(scheduler.scale_model_input(x, t), (t / 1000).expand(batch), **cond)
            x = scheduler.step(eps, t, x).prev_sample
        return x

    return run


def measure(run: Callable[[], Tensor], net: Timing) -> tuple[float, float]:
    """(seconds in all, seconds in the network) of one run."""
    net.seconds = 0.0
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun, net.seconds


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the table; returns the median ratio by name."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.experiments.benchmarks.executor")
    parser.add_argument("--model", choices=("galaxy", "digits"), default="galaxy")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--nfe", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problem: Problem = importlib.import_module(
        f"fewstep.experiments.models.{given.model}"
    ).problem()
    inner: Any = problem.denoiser
    net = Timing(inner.model)
    size = (problem, net, given.batch, given.nfe)
    runs = {"fewstep": ours(*size)}
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        runs[f"diffusers {name}"] = theirs(name, *size)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    extra: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(given.repeats + 1):
        for name, run in runs.items():
            total, inside = measure(run, net)
            if k > 0:  # the first is warm-up
                ratios[name].append(total / inside)
                extra[name].append((total - inside) / given.nfe * 1e3)
    setting = f"{given.model}, batch {given.batch}, NFE {given.nfe}, one thread"
    print(f"{setting}, medians of {given.repeats}")
    print(f"{'':40} total/network   ms beside the network, a call")
    for name in runs:
        ratio, beside = statistics.median(ratios[name]), statistics.median(extra[name])
        print(f"{name:40} {ratio:13.4f} {beside:12.3f}")
    return {name: statistics.median(values) for name, values in ratios.items()}


if __name__ == "__main__":
    try:
        main()
    except FewstepError as error:
        raise SystemExit(f"error: {error}") from None
