"""Does this schedule file fit this pipeline? One table of facts, read off both sides.

`network_facts` (`samplers.network`) says what the pipeline's network was trained as; `facts`
compares a schedule file with it, one `Fact` a line. Every adapter, `export` and `lint` use that
table: a fact fits, is converted (and said), or is refused with the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.samplers.network import OUTPUT_KINDS, NetworkFacts, network_facts
from fewstep.samplers.ode import start_scale
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import EDM, RectifiedFlow, VPDiscrete
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import OdeSchedule

__all__ = ["Fact", "NetworkFacts", "facts", "labels", "network_facts", "require_fit"]


@dataclass(frozen=True)
class Fact:
    """One line of the table: what is compared, how it came out, and why in one line."""

    name: str
    verdict: Literal["fits", "converted", "refused"]
    line: str


def facts(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> list[Fact]:
    """The whole table for a schedule file and a pipeline, one line each; nothing is raised.

    Args:
        schedule: a loaded schedule.
        network: what the pipeline is (`network_facts`).
    """
    found = [_noise_fact(schedule, network)]
    if found[0].verdict == "refused":
        return found
    found += [_output_fact(schedule, network), _label_fact(schedule, network)]
    found += [_start_fact(schedule, network), _end_fact(schedule)]
    found += [Fact("notes", "converted", note) for note in network.notes]
    if network.sigma_data is not None:
        line = f"EDM preconditioning with sigma_data {network.sigma_data:g} is applied"
        found.append(Fact("preconditioning", "fits", line))
    found += _clip_fact(schedule, network)
    if network.learned_variance:
        line = "the network's second half of channels, a variance, is not used"
        found.append(Fact("channels", "converted", line))
    guidance = schedule.program.guidance
    if guidance is not None:
        scales = ", ".join(f"{w:g}" for w in guidance.tolist())
        line = f"the file sets the guidance scale of every call ({scales}): the caller must, too"
        found.append(Fact("guidance", "converted", line))
    if schedule.program.network is not None:
        named = ", ".join(sorted({repr(name) for name in schedule.program.network if name}))
        line = f"the file asks network {named} at some calls: run it with samplers.sample"
        found.append(Fact("networks", "refused", line))
    if "time_shift" in schedule.options:
        line = "options.time_shift compiles rows as it samples: run it with samplers.sample"
        found.append(Fact("options", "refused", line))
    return found


def require_fit(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> list[Fact]:
    """The table, or a ScheduleError with the first refused line."""
    table = facts(schedule, network)
    for fact in table:
        if fact.verdict == "refused":
            raise ScheduleError(f"{fact.name}: {fact.line}")
    return table


def labels(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> Tensor:
    """What the pipeline must tell its network at each call, shape (C,), float64."""
    program = schedule.program
    if isinstance(network.noise, RectifiedFlow):
        return network.noise.label_scale * program.sigma / (program.alpha + program.sigma)
    if isinstance(network.noise, EDM):
        return network.noise.label(program.sigma / program.alpha)
    return program.label


def _noise_fact(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> Fact:
    ours, theirs = schedule.noise, network.noise
    named = f" ({network.origin})" if network.origin else ""
    if ours.type != theirs.type:
        line = (
            f"the file's is {ours.type}, the pipeline's {theirs.type}{named}: this schedule was "
            "made for another model; search one for this pipeline"
        )
        return Fact("noise schedule", "refused", line)
    if isinstance(ours, VPDiscrete) and isinstance(theirs, VPDiscrete):
        if len(ours.table) != len(theirs.table):
            far = f"{len(ours.table)} training steps against {len(theirs.table)}"
        else:
            gap = float((ours.table - theirs.table).abs().max())
            if gap <= 1e-5:
                return Fact("noise schedule", "fits", f"the same betas, {len(ours.table)} steps")
            far = f"log alpha differs by up to {gap:.2g}"
        line = (
            f"the pipeline's betas{named} are not the schedule file's ({far}): this schedule was "
            "made for another model; search one for this pipeline"
        )
        return Fact("noise schedule", "refused", line)
    if isinstance(ours, RectifiedFlow) and isinstance(theirs, RectifiedFlow):
        if ours.shift == theirs.shift:
            return Fact("noise schedule", "fits", f"a rectified flow of shift {ours.shift:g}")
        line = (
            f"the file's levels, of shift {ours.shift:g}, hold: the pipeline's shift "
            f"{theirs.shift:g} is not applied to them again"
        )
        return Fact("noise schedule", "converted", line)
    return Fact("noise schedule", "fits", ours.type)


def _output_fact(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> Fact:
    line = f"the network returns {network.prediction_type}"
    flow = isinstance(network.noise, RectifiedFlow)
    if network.output not in (("flow", "x0") if flow else ("eps", "x0", "v")):
        right = "flow_prediction" if flow else "epsilon, v_prediction or sample"
        line += f", which no network of noise schedule {network.noise.type} does: name {right}"
        return Fact("output", "refused", line)
    told = schedule.provenance.get("output")
    if told in OUTPUT_KINDS.values() and told != network.output:
        line += f", but the schedule was searched with a network that returns {told}"
        return Fact("output", "refused", f"{line}: search one for this pipeline")
    return Fact("output", "fits", line)


def _label_fact(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> Fact:
    program, now = schedule.program, labels(schedule, network)
    if bool(((program.label - now).abs() <= 1e-6 * (1 + now.abs())).all()):
        return Fact("labels", "fits", f"from {float(now[0]):g} to {float(now[-1]):g}")
    line = (
        f"the file tells {float(program.label[0]):g} to {float(program.label[-1]):g}, this "
        f"network is told {float(now[0]):g} to {float(now[-1]):g} at the same levels"
    )
    return Fact("labels", "converted", line)


def _start_fact(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> Fact:
    first = start_scale(schedule)
    if isinstance(network.noise, EDM) and first > network.noise.sigma_max * (1 + 1e-6):
        line = (
            f"the file starts at sigma {first:g}, above the pipeline's sigma_max "
            f"{network.noise.sigma_max:g}: search one for this pipeline"
        )
        return Fact("start", "refused", line)
    return Fact("start", "fits", f"from noise of standard deviation {first:g}")


def _end_fact(schedule: OdeSchedule | ProgramSchedule) -> Fact:
    last = torch.tensor(schedule.end, dtype=torch.float64)
    left = float(schedule.noise.sigma(last))
    return Fact("end", "fits", "at clean data" if left == 0 else f"at noise level {left:.3g}")


def _clip_fact(schedule: OdeSchedule | ProgramSchedule, network: NetworkFacts) -> list[Fact]:
    own = schedule.options.get("threshold")
    if own is not None and network.clip is not None and not _same_clip(own, network.clip):
        line = (
            f"the file's options.threshold {dict(own)} is not the pipeline's clipping "
            f"{dict(network.clip)}: switch one of them off"
        )
        return [Fact("clipping", "refused", line)]
    if network.clip is None:
        return [] if own is None else [Fact("clipping", "fits", "the file's own is applied")]
    line = f"the pipeline's clipping of data predictions {dict(network.clip)} is applied"
    return [Fact("clipping", "fits" if own is not None else "converted", line)]


def _same_clip(ours: Mapping[str, Any], theirs: Mapping[str, float]) -> bool:
    neutral = {"quantile": 0.995, "minimum": 1.0, "maximum": math.inf}
    return neutral | dict(ours) == neutral | dict(theirs)
