"""A problem's schedules run on samples of a stream of noise, as searches score and draw them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Denoiser
from fewstep.samplers.ode import on_unit_noise, run, run_candidates, sample, start
from fewstep.samplers.particles import Particles, sample_particles, start_particles
from fewstep.samplers.problems import (
    MaskedProblem,
    ParticleProblem,
    Problem,
    conditions,
    device_of,
)
from fewstep.samplers.sample_noise import noise_of, sample_seed, uniforms_of
from fewstep.samplers.token_denoiser import CountedSequences
from fewstep.space import stack
from fewstep.space.masked import MaskedSchedule
from fewstep.space.particles import ParticleSchedule


@dataclass(frozen=True)
class Span:
    """Samples `indices` of a stream of noise, which all schedules share."""

    seed: int
    stream: str
    indices: range

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Source of what is drawn during the calls, by the samples together."""
        seed = sample_seed(self.seed, f"{self.stream}/steps", self.indices.start)
        return torch.Generator(device).manual_seed(seed)


def cut(schedules: Sequence[Any], size: int) -> list[tuple[int, ...]]:
    """Positions of schedules that run as one batch, at most `size` together, in the order given.

    ODE schedules are stacked: equal calls and options, no constant image. Others run one after the
    other in a block and need equal calls only; one whose calls are random is alone, and counted.
    """
    groups: dict[str, list[int]] = {}
    for i, schedule in enumerate(schedules):
        shared: list[Any] = [schedule.nfe, i if getattr(schedule, "bounded", False) else -1]
        if schedule.kind == "ode":
            program, options = schedule.program, schedule.options
            alone = schedule.constant is not None or "time_shift" in options
            shared += [program.guidance is not None, program.stochastic, options]
            shared.append(i if alone else -1)
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(i)
    return [
        tuple(members[k : k + size])
        for members in groups.values()
        for k in range(0, len(members), size)
    ]


def begun(problem: Problem, span: Span) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Unit noise and conditions of samples, on the model's device."""
    device, cond = device_of(problem), conditions(problem, span.indices)
    z = noise_of(span.seed, span.stream, span.indices, problem.shape).to(device)
    return z, None if cond is None else {name: v.to(device) for name, v in cond.items()}


def ode_samples(
    problem: Problem,
    schedules: Sequence[Any],
    span: Span,
    *,
    denoiser: Denoiser,
    guidance: float | None,
    strict: bool,
) -> Tensor:
    """Samples of M stacked ODE schedules, (M, B, *shape), on the model's device.

    Args:
        problem: brings noise and conditions.
        schedules: see `cut`.
        span: which samples.
        denoiser: the problem's, or one that counts.
        guidance: scale where a schedule sets none.
        strict: raise where a state is not finite; candidates of `run_candidates` go on.
    """
    z, cond = begun(problem, span)
    shared: dict[str, Any] = {"cond": cond, "guidance": guidance}
    shared["generator"], first = span.generator(z.device), schedules[0]
    if "time_shift" in first.options:  # compiles its rows as it runs, always alone
        return sample(first, denoiser, start(first, z), **shared)[None]
    programs = [on_unit_noise(schedule) for schedule in schedules]
    shared |= {"m": first.constant, "options": dict(first.options)}
    if strict:
        return run(stack(programs), denoiser, z, **shared)
    return run_candidates(programs, denoiser, z, **shared)


def masked_samples(
    problem: MaskedProblem,
    schedule: MaskedSchedule,
    span: Span,
    tokens: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor | Particles, int]:
    """What a masked schedule makes of sequences, and how many the network was asked for.

    A sequence has uniforms of its own, a population those of the `generator`.
    """
    counted, shape = CountedSequences(problem.denoiser), (schedule.uniforms, problem.length)
    u = uniforms_of(span.seed, span.stream, span.indices, shape).to(tokens.device)
    done = problem.sample(schedule, counted, tokens, u=u, generator=generator)
    return done, counted.sequences


def particle_samples(
    problem: ParticleProblem, schedule: ParticleSchedule, span: Span, generator: torch.Generator
) -> tuple[Particles, int]:
    """Populations of a particle schedule, and particles sent through the network."""
    z = noise_of(span.seed, span.stream, span.indices, (problem.particles, *problem.shape))
    found = sample_particles(
        schedule,
        problem.target,
        start_particles(schedule, problem.target, z),
        generator=generator,
        exact_start=problem.exact_start,
        warn_ess=0.0,
    )
    return found, found.calls * problem.particles * len(span.indices)
