"""What the network is asked, batch by batch: which candidates, when, with what guidance.

A batch is one call of a program, or the calls of a stage (`space.costs`), of one or of many
stacked candidates. Its images are asked in parts that are alike in what they cost: unguided ones
apart from guided ones, and each network apart from the others. Where all are alike, as in every
schedule that sets no sorts, there is one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.space.costs import stages
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.program import Program

PIECE = 2**15
"""Numbers of the states that one network call of stacked candidates holds at most, on a CPU,
where the denoiser names no `piece` (images)."""


def prefix_groups(program: Program) -> list[list[int]]:
    """For every call of M stacked programs, the first candidate with the same rows until then.

    Candidates of one group are in the same state and ask the network the same question, bit for
    bit, because the rows that led there are.
    """
    count, calls = program.r.shape
    guidance = program.r.new_zeros(count, calls) if program.guidance is None else program.guidance
    columns = [program.t, program.r, program.e, program.k, program.g, guidance, _named(program)]
    table = torch.cat([torch.stack(columns, dim=-1), program.b], dim=-1).numpy()
    start = program.init.numpy()
    found: list[list[int]] = []
    keys = [start[i].tobytes() for i in range(count)]
    for c in range(calls):
        asked = [k + table[i, c, [0, 5, 6]].tobytes() for i, k in enumerate(keys)]
        first: dict[bytes, int] = {}
        found.append([first.setdefault(key, i) for i, key in enumerate(asked)])
        keys = [k + table[i, c].tobytes() for i, k in enumerate(keys)]
    return found


def _named(program: Program) -> Tensor:
    """The network of each call as a number, shape of `program.r`."""
    if program.network is None:
        return torch.zeros_like(program.r)
    every = sorted({name for names in program.network for name in names})
    return torch.tensor(
        [[every.index(name) for name in names] for names in program.network], dtype=torch.float64
    )


@dataclass(frozen=True)
class Part:
    """Images of a batch, of the asked states `start` to `stop`, that are asked alike.

    `guidance` is None where the caller's scale holds, and `network` is "" for the model's own.
    """

    start: int
    stop: int
    guidance: float | Tensor | None
    network: str


@dataclass(frozen=True)
class Question:
    """One batch.

    Args:
        calls: the calls it answers.
        asked: how many states of a candidate at a call it asks.
        t: query times, one per image.
        parts: what is asked alike.
        rows: which states, of all candidates at the first call, then at the next, are asked; None
            is all in this order.
        back: where in what was asked the output of each state is; None is in place.
    """

    calls: range
    asked: int
    t: Tensor
    parts: tuple[Part, ...]
    rows: Tensor | None
    back: Tensor | None


def questions(
    program: Program, groups: list[list[int]] | None, batch: int, x: Tensor, *, alone: bool
) -> list[Question]:
    """The batches of a program, on x's device before the loop begins: three copies in all.

    Args:
        program: one program, or M stacked ones.
        groups: see `prefix_groups`; None asks for every candidate.
        batch: images of a candidate.
        x: a tensor of the state's device.
        alone: one call a batch, also in a stage.
    """
    alone = alone or program.b.requires_grad
    runs = [range(c, c + 1) for c in range(program.nfe)] if alone else stages(program)
    sorts, orders, index = _sorts(program), list[list[int]](), list[int]()
    for run in runs:
        leaders = [
            k * len(sorts) + leader
            for k, c in enumerate(run)
            for leader in (groups[c] if groups else range(len(sorts)))
        ]
        distinct = sorted(set(leaders))
        order = [state for _, state in sorted((_of(s, run, sorts), s) for s in distinct)]
        orders.append(order)
        if order != list(range(len(leaders))):
            place = {state: k for k, state in enumerate(order)}
            index += order + [place[leader] for leader in leaders]
    flat = torch.tensor(index).to(x.device) if index else None
    times = _moved(program.t, runs, orders, batch, x)
    scales = None
    if program.guidance is not None:
        scales = _moved(program.guidance, runs, orders, batch, x)
    made, at = list[Question](), 0
    for turn, (run, order) in enumerate(zip(runs, orders, strict=True)):
        rows = back = None
        size = len(run) * len(sorts)
        if flat is not None and order != list(range(size)):
            rows, back = flat[at:].split([len(order), size, len(flat) - at - len(order) - size])[
                :2
            ]
            at += len(order) + size
        parts = _parts(run, order, sorts)
        if scales is not None:
            parts = [_scaled(part, program, run, order, scales[turn]) for part in parts]
        made.append(Question(run, len(order), times[turn], tuple(parts), rows, back))
    return made


_Sort = tuple[str, bool]


def _sorts(program: Program) -> list[list[_Sort]]:
    """Of each candidate and call the network, and whether it is guided for all we know."""
    calls, scales = program.nfe, program.guidance
    count = program.r.shape[0] if program.r.ndim == 2 else 1
    guided = [[True] * calls] * count
    if scales is not None and not scales.requires_grad:
        guided = (scales.reshape(-1, calls) != 1).tolist()
    names = [("",) * calls] * count
    if program.network is not None:
        names = list(program.network) if program.r.ndim == 2 else [program.network]
    return [list(zip(n, g, strict=True)) for n, g in zip(names, guided, strict=True)]


def _of(state: int, run: range, sorts: list[list[_Sort]]) -> _Sort:
    """The sort of a state of a batch: of all candidates at its first call, then at the next."""
    return sorts[state % len(sorts)][run[state // len(sorts)]]


def _moved(
    values: Tensor, runs: Sequence[range], orders: list[list[int]], batch: int, x: Tensor
) -> list[Tensor]:
    """A number of every state asked -> one of every image, on x's device, in one copy."""
    picked = [_picked(values, run, order) for run, order in zip(runs, orders, strict=True)]
    moved = torch.cat(picked).to(x.device).split([len(p) for p in picked])
    return [v[:, None].expand(len(v), batch).reshape(-1) for v in moved]


def _picked(values: Tensor, run: range, order: Sequence[int]) -> Tensor:
    """The number of each state, of numbers by candidate and call."""
    by = values.reshape(-1, values.shape[-1])
    return by[[state % len(by) for state in order], [run[state // len(by)] for state in order]]


def _parts(run: range, order: list[int], sorts: list[list[_Sort]]) -> list[Part]:
    """The parts of a batch whose states are in order."""
    found = [_of(state, run, sorts) for state in order]
    edges = [k for k in range(len(found)) if k == 0 or found[k] != found[k - 1]]
    return [Part(a, b, None, found[a][0]) for a, b in pairwise([*edges, len(found)])]


def _scaled(part: Part, program: Program, run: range, order: list[int], moved: Tensor) -> Part:
    """A part with its guidance: a number where its states share one, else one of every image."""
    assert program.guidance is not None
    given = _picked(program.guidance, run, order[part.start : part.stop])
    if not given.requires_grad and bool((given == given[0]).all()):
        return replace(part, guidance=float(given[0]))
    batch = len(moved) // len(order)
    return replace(part, guidance=moved[part.start * batch : part.stop * batch])


def require_networks(program: Program, denoiser: Denoiser) -> None:
    """Refuse a program that asks a network which the denoiser does not offer."""
    if program.network is None:
        return
    offered = getattr(denoiser, "networks", {})
    every = program.network if program.r.ndim == 2 else (program.network,)
    for name in sorted({name for names in every for name in names if name}):
        if name not in offered:
            raise ScheduleError(
                f"the schedule asks network {name!r} at some calls, and the model offers "
                f"{', '.join(map(repr, offered)) or 'none by name'}: give the Denoiser that "
                "network (samplers.denoiser.Networks)"
            )


def ask(
    denoiser: Denoiser,
    x: Tensor,
    question: Question,
    cond: Cond | None,
    guidance: float | None,
    *,
    whole: bool = False,
) -> Tensor:
    """The data predictions of the states of a batch.

    Args:
        denoiser: the model.
        x: the states asked, (asked * B, *shape).
        question: the batch.
        cond: conditions of B samples; with `whole` of all states.
        guidance: the scale where the program sets none.
        whole: every state is one sample of a single candidate: nothing is cut or repeated.
    """
    made, batch = list[Tensor](), len(x) // question.asked
    for part in question.parts:
        rows = slice(part.start * batch, part.stop * batch)
        scale = guidance if part.guidance is None else part.guidance
        count = 1 if whole else part.stop - part.start
        made += _pieces(denoiser, x[rows], question.t[rows], cond, scale, count, part.network)
    return made[0] if len(made) == 1 else torch.cat(made)


def _pieces(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    cond: Cond | None,
    guidance: float | Tensor | None,
    count: int,
    network: str,
) -> list[Tensor]:
    """The data predictions of states that are asked alike, in pieces that suit the processor.

    A piece holds as many whole candidates as fit into the denoiser's `piece` images. Where it
    names none, all run at once; on a CPU as many as fit into `PIECE` numbers, so that the
    network's activations stay in its cache.
    """
    batch, piece = len(x) // count, getattr(denoiser, "piece", None)
    where = getattr(denoiser, "device", None) or x.device
    if piece is not None:
        most = max(1, piece // batch)
    else:
        on_cpu = torch.device(where).type == "cpu"
        most = max(1, PIECE * count // max(1, x.numel())) if on_cpu else count
    named: dict[str, Any] = {"network": network} if network else {}
    made = []
    for at in range(0, count, most):
        rows = slice(at * batch, (at + most) * batch)
        part, times = x[rows], min(most, count - at)
        scale = guidance[rows] if isinstance(guidance, Tensor) else guidance
        D = denoiser(part, t[rows], cond=_tiled(cond, times), guidance=scale, **named)
        if D.shape != part.shape:
            raise ModelError(
                f"the denoiser returned {tuple(D.shape)} for a state of shape {tuple(part.shape)}"
            )
        made.append(D)
    return made


def _tiled(cond: Cond | None, times: int) -> Cond | None:
    """Conditions of B samples, repeated for every candidate asked."""
    if not cond or times == 1:
        return cond
    return {name: v.repeat(times, *(1,) * (v.ndim - 1)) for name, v in cond.items()}
