"""Programs: what a schedule means to a sampler, C rows of numbers.

    y_0     = p_0 x_T + k_0 m
    D_c     = denoise(y_c, t_c)                                                  c = 0 .. C-1
    y_{c+1} = r_c y_c + e_c x_T + k_c m + sum_{j<=c} b_cj D_j (+ g_c noise)      the sample is y_C

`compile` runs the textbook loop of `space.solve` on symbolic vectors and reads row c off as
s_{c+1} - r_c s_c with r_c = sigma_{c+1}/sigma_c; it knows no method names. All numbers are float64
torch tensors on the CPU and carry gradients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from fewstep.space import costs
from fewstep.space.base import (
    FORMAT,
    TINY,
    VERSION,
    Replayable,
    read_numbers,
    require_nfe,
    require_within,
    twelve_digits,
)
from fewstep.space.errors import ScheduleError, need
from fewstep.space.noise import NoiseSchedule, noise_from_dict, noise_to_dict
from fewstep.space.schedule import OdeSchedule
from fewstep.space.solve import Call, Choices, Number, Tape, solve


@dataclass(frozen=True, eq=False)
class Program:
    """C rows; every tensor float64. M stacked programs have a leading axis of size M everywhere.

    Args:
        t: query times, shape (C,).
        label: what the network is told, shape (C,).
        alpha: alpha at the query times, shape (C,).
        sigma: sigma at the query times, shape (C,).
        init: (p_0, k_0), shape (2,).
        r: weights of the current state, shape (C,).
        e: weights of x_T, shape (C,).
        k: weights of the constant image m, shape (C,).
        b: weights of the data predictions, lower triangular, shape (C, C).
        g: weights of fresh noise, shape (C,).
        guidance: guidance scale of each call, shape (C,), or None where the caller's scale holds;
            a call at scale 1 is unguided, and asks the network once.
        network: which network each call asks, out of those that the denoiser offers by name, ""
            for its own; of stacked programs one tuple each. None is all its own.
    """

    t: Tensor
    label: Tensor
    alpha: Tensor
    sigma: Tensor
    init: Tensor
    r: Tensor
    e: Tensor
    k: Tensor
    b: Tensor
    g: Tensor
    guidance: Tensor | None = None
    network: tuple[Any, ...] | None = None

    @property
    def nfe(self) -> int:
        """Number of network calls C."""
        return self.t.shape[-1]

    @property
    def depth(self) -> int:
        """Number of stages: calls that must wait for one another (`space.costs`)."""
        return len(costs.stages(self))

    def cost(self, prices: costs.Prices, *, guided: bool = True) -> float:
        """Sum of the prices of its calls; `guided` where the program leaves the scale open."""
        return sum(costs.call_costs(self, prices, guided=guided))

    @cached_property
    def stochastic(self) -> bool:
        """True if any row adds noise."""
        return bool((self.g != 0).any())

    @property
    def uses_constant(self) -> bool:
        """True if any row, or the start, has a weight for the constant image."""
        return bool((self.k != 0).any() or (self.init[..., 1] != 0).any())

    def __eq__(self, other: object) -> bool:
        """The same numbers, bit for bit."""
        if not isinstance(other, Program):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(
            a.shape == b.shape and torch.equal(a, b)
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else a is b or (isinstance(a, tuple) and a == b)
            for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def digest(self) -> str:
        """Hash over the numbers, 12 significant digits, |x| < 1e-13 taken as 0."""
        text = json.dumps(
            {name: twelve_digits(value) for name, value in self.to_dict().items()}, sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; b as ragged rows, g only if some row adds noise."""
        data: dict[str, Any] = {
            name: getattr(self, name).tolist()
            for name in ("t", "label", "alpha", "sigma", "init", "r", "e", "k")
        }
        data["b"] = [row[: c + 1] for c, row in enumerate(self.b.tolist())]
        if self.stochastic:
            data["g"] = self.g.tolist()
        data["guidance"] = None if self.guidance is None else self.guidance.tolist()
        if self.network is not None and any(self.network):
            data["network"] = list(self.network)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Program:
        """Read the JSON form.

        Raises:
            ScheduleError: a missing field, a wrong length or a number that is not finite; the
                field is named.
        """
        if not isinstance(data, Mapping):
            raise ScheduleError(f"program is {data!r}: an object is needed")
        size = len(data["t"]) if isinstance(data.get("t"), list) else 0
        values: dict[str, Tensor] = {}
        for name in ("t", "label", "alpha", "sigma", "init", "r", "e", "k"):
            values[name] = read_numbers(
                data.get(name), f"program.{name}", 2 if name == "init" else size
            )
        rows = data.get("b")
        if not isinstance(rows, list) or len(rows) != size or size == 0:
            raise ScheduleError(
                f"program.b must hold {size} rows, and at least one: the file is damaged"
            )
        b = torch.zeros(size, size, dtype=torch.float64)
        for c, row in enumerate(rows):
            b[c, : c + 1] = read_numbers(row, f"program.b[{c}]", c + 1)
        g = (
            read_numbers(data["g"], "program.g", size)
            if data.get("g") is not None
            else torch.zeros(size, dtype=torch.float64)
        )
        guidance = data.get("guidance")
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise ScheduleError(f"program.{name} is not a field of a program: remove it")
        network = data.get("network")
        if network is not None:
            need(
                isinstance(network, list)
                and len(network) == size
                and all(isinstance(name, str) for name in network),
                f'program.network must be a list of {size} names, "" for the model\'s own',
            )
        return cls(
            **values,
            b=b,
            g=g,
            guidance=None
            if guidance is None
            else read_numbers(guidance, "program.guidance", size),
            network=tuple(network) if network is not None and any(network) else None,
        )

    def require_equal(self, other: Program, tolerance: float = 1e-9) -> None:
        """Raise a ScheduleError naming the first field that differs by > tolerance * (1 + |x|)."""
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if a is b:
                continue
            same = (
                isinstance(a, Tensor)
                and isinstance(b, Tensor)
                and a.shape == b.shape
                and bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())
            )
            if not same:
                raise ScheduleError(
                    f"program.{field.name} is not what the steps compile to: the file was edited; "
                    "remove 'program' to recompile"
                )


def compile(
    schedule: OdeSchedule, values: Mapping[str, Tensor | Sequence[Number]] | None = None
) -> Program:
    """Compile a schedule.

    Args:
        schedule: the choices.
        values: numbers to use instead of the schedule's, by field: "times" (N+1,) or any number of
            `StepSpec` with leading axis N ("compensation", "dt_query", "weights" (N, K),
            "guidance", ...). They may require gradients. Where an entry has shape (B,), the
            program is B stacked ones, one per image.

    Returns:
        The program; its tensors carry gradients where `values` do.

    Raises:
        ScheduleError: choices that have no program (an order the basis cannot integrate, older
            noise that does not cancel).
    """
    choices, calls = Choices(schedule, values or {}), schedule.nfe
    noises = any(
        isinstance(e, Tensor) or e != 0
        for e in (choices.get("eta", i) for i in range(schedule.n_steps))
    )
    tape = Tape(calls, noises=noises)
    final, arrived = solve(choices, tape)
    record = tape.calls
    if not record:
        raise ScheduleError("the schedule makes no network call: add a step")
    r, rows = _rows(record, final, arrived)
    batch = rows.shape[1:-1]
    rows = rows.movedim(0, -2)
    fresh = rows[..., 2 + calls :]
    g = fresh.diagonal(dim1=-2, dim2=-1) if noises else torch.zeros_like(rows[..., 0])
    if noises and bool((fresh - torch.diag_embed(g)).abs().max() > 1e-10):
        raise ScheduleError(
            "a step uses outputs in the noise formulation across fresh noise: use formulation "
            "data, or order 1, where eta > 0"
        )

    def numbers(values: Iterable[Tensor]) -> Tensor:
        each = _stack(values)  # (C,) or (C, B)
        return each.reshape(calls, -1).expand(calls, *batch).movedim(0, -1) if batch else each

    queries = [call.query for call in record]
    t = numbers(q.t for q in queries)
    guidance = _guidance([call.guidance for call in record])
    return Program(
        t=t,
        label=schedule.noise.label(t),
        alpha=numbers(q.alpha for q in queries),
        sigma=numbers(q.sigma for q in queries),
        init=_clean(record[0].state[..., :2]).expand(*batch, 2),
        r=numbers(r),
        e=rows[..., 0],
        k=rows[..., 1],
        b=rows[..., 2 : 2 + calls],
        g=g,
        guidance=guidance if guidance is None else numbers(guidance),
    )


def _rows(record: Sequence[Call], final: Tensor, arrived: Tensor) -> tuple[Tensor, Tensor]:
    """r, and every state less r times the one before it, from the calls and the final state."""
    states = [call.state for call in record] + [final]
    arrivals = [call.arrived for call in record[1:]] + [arrived]
    r = _stack([after / call.sigma for after, call in zip(arrivals, record, strict=True)])
    pairs = zip(r, pairwise(states), strict=True)
    rows = _stack([after - rc.unsqueeze(-1) * before for rc, (before, after) in pairs])
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(-1).nonzero()[0, 0])
        raise ScheduleError(
            f"the row of network call {bad} is not finite: two of its points coincide or a step "
            "lands on sigma = 0 with too high an order"
        )
    return r, _clean(rows)


def _stack(values: Iterable[Tensor]) -> Tensor:
    """Stacked along a new first axis, entries with and without a batch axis broadcast."""
    return torch.stack(torch.broadcast_tensors(*values))


def _clean(x: Tensor) -> Tensor:
    """Zero what is only rounding, keeping the gradient."""
    return torch.where(x.abs() < TINY, x - x.detach(), x)


def _guidance(scales: Sequence[float | Tensor | None]) -> Tensor | None:
    if all(s is None for s in scales):
        return None
    if any(s is None for s in scales):
        raise ScheduleError("guidance is given for some steps only: give it for all, or for none")
    return _stack(torch.as_tensor(s, dtype=torch.float64) for s in scales)


def stack(programs: Sequence[Program]) -> Program:
    """M programs with equal C as one, with a leading candidate axis.

    Raises:
        ScheduleError: different numbers of calls, or guidance in some only.
    """
    sizes = {p.nfe for p in programs}
    if len(sizes) != 1:
        raise ScheduleError(
            f"programs of {sorted(sizes)} calls cannot run as one batch: group them by NFE"
        )
    guided = [p.guidance is not None for p in programs]
    if any(guided) and not all(guided):
        raise ScheduleError("some programs set guidance and some do not: group them")
    parts: dict[str, Any] = {}
    for field in fields(Program):
        values = [getattr(p, field.name) for p in programs]
        parts[field.name] = torch.stack(values) if isinstance(values[0], Tensor) else None
    if any(p.network is not None for p in programs):
        parts["network"] = tuple(costs.networks_of(p) for p in programs)
    return Program(**parts)


class ProgramSchedule(Replayable):
    """A fitted program: a schedule that is its numbers, without steps.

    Args:
        noise: the noise schedule of the program's times (a `NoiseSchedule` or its JSON form).
        program: the numbers; its alpha, sigma and label are the noise schedule's at its times.
        start: the time x_T belongs to [the first query's]; x_T = prior_scale(start) * unit noise.
        end: the time the sample belongs to [clean data].
        options: run-time options; the time shift needs steps.
        provenance: where it comes from, such as the schedule a fit started from; free JSON.
    """

    kind: Literal["ode"] = "ode"
    program: Program
    start: float
    end: float

    @model_validator(mode="before")
    @classmethod
    def _ends(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The neutral values of `start` and `end`, which follow from the other fields."""
        noise, program = data.get("noise"), data.get("program")
        noise = noise_from_dict(noise) if isinstance(noise, dict) else noise
        if isinstance(noise, NoiseSchedule) and isinstance(program, Program):
            ends = {"start": float(program.t[..., 0].max()), "end": noise.t_data}
            data = ends | {k: v for k, v in data.items() if k not in ends or v is not None}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        program, t = self.program, self.program.t
        need(t.ndim == 1, "program: one program is needed, not several stacked ones")
        require_within(self.noise, {"start": self.start, "end": self.end})
        need(self.end < self.start, f"end {self.end} is not below start {self.start}")
        need(bool((program.sigma > 0).all()), "program.sigma must be positive at every call")
        told = at_times(program, self.noise, t)
        for name in ("alpha", "sigma", "label"):
            a, b = getattr(program, name), getattr(told, name)
            need(
                bool(((a - b).abs() <= 1e-9 * (1 + b.abs())).all()),
                f"program.{name} is not the noise schedule's at program.t",
            )
        need(
            "time_shift" not in self.options,
            "options.time_shift moves the levels of steps: a program without steps has none",
        )
        return self

    @classmethod
    def of(cls, schedule: Replayable) -> ProgramSchedule:
        """The same sampler without its steps; a program schedule is itself."""
        if isinstance(schedule, ProgramSchedule):
            return schedule
        if not isinstance(schedule, OdeSchedule):
            raise ScheduleError(f"{type(schedule).__name__} has no program")
        made = cls(
            noise=schedule.noise,
            program=schedule.program,
            start=schedule.start,
            end=schedule.end,
            options=schedule.options,
            provenance=schedule.provenance,
        )
        return made if schedule.constant is None else made.with_constant(schedule.constant)

    @property
    def nfe(self) -> int:
        """Network calls."""
        return self.program.nfe

    @property
    def times(self) -> tuple[float, ...]:
        """The query times."""
        return tuple(self.program.t.tolist())

    def tail(self, k: int) -> ProgramSchedule:
        """The program from call k on, for a start in the middle (image to image).

        Its x_T is a state y at the time of call k. What was known before is folded into the rows:
        older outputs D_j (j < k) and the constant image are taken to be D_k, and the old x_T and
        the state that the rows before lead to have the noise that D_k implies,

            eps = (y - alpha_k D_k) / sigma_k
            x_T = alpha_start D_k + sigma_start eps
            y_k = (p_k alpha_start + k_k + sum_j W_kj) D_k + q_k eps

        where y_k = p_k x_T + k_k m + sum_j W_kj D_j is that state written out and q_k its noise,
        sigma_start p_k, or with fresh noise the root of the sum of squares. y_k is y itself where
        the state lies at the level of the query, as that of a named solver does. Where all
        outputs (and the image) are one constant, the samples are those of the whole program.

        Args:
            k: a call, 0..nfe - 1; 0 is the schedule itself.

        Raises:
            ScheduleError: k is no call.
        """
        program = self.program
        need(0 <= k < self.nfe, f"call {k} is not one of {self.nfe}")
        if k == 0:
            return self
        start = torch.tensor(self.start, dtype=torch.float64)
        alpha_start, sigma_start = self.noise.alpha(start), self.noise.sigma(start)
        alpha, sigma = program.alpha[k], program.sigma[k]
        p, rest, fresh = written_out(program)
        noise = torch.hypot(sigma_start * p[k], torch.linalg.vector_norm(fresh[k]))
        noise = torch.copysign(noise, p[k])
        here = p[k] * alpha_start + rest[k].sum()
        r, b = program.r[k:].clone(), program.b[k:, k:].clone()
        b[:, 0] += program.e[k:] * (alpha_start - alpha * sigma_start / sigma)
        b[:, 0] += program.k[k:] + program.b[k:, :k].sum(-1)
        b[0, 0] += r[0] * (here - alpha * noise / sigma)
        r[0] = r[0] * noise / sigma
        cut = {name: getattr(program, name)[k:] for name in ("t", "label", "alpha", "sigma", "g")}
        folded = Program(
            **cut,
            init=torch.tensor([1.0, 0.0], dtype=torch.float64),
            r=r,
            e=program.e[k:] * sigma_start / sigma,
            k=torch.zeros_like(program.k[k:]),
            b=b,
            guidance=None if program.guidance is None else program.guidance[k:],
            network=None if program.network is None else program.network[k:],
        )
        return self.model_copy(update={"program": folded, "start": float(program.t[k])})

    def to_dict(self) -> dict[str, Any]:
        """The file form."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "nfe": self.nfe,
            "noise": noise_to_dict(self.noise),
            "start": self.start,
            "end": self.end,
            "options": self.options,
            "program": self.program.to_dict(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProgramSchedule:
        """Read the file form."""
        need("noise" in data, "noise is missing from the schedule file")
        body = {k: v for k, v in data.items() if k not in ("format", "version", "nfe")}
        made = cls(**body | {"program": Program.from_dict(data["program"])})
        if "nfe" in data:
            require_nfe(data["nfe"], made.nfe, "program")
        return made


def written_out(program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """Every state without the states before it: y_c = p_c x_T + (k_c, W_c) (m, D) + G_c noise.

    Returns:
        p (C+1,), the weights of x_T; (C+1, 1 + C), those of the image and the outputs; and
        (C+1, C), those of the fresh noise; the last row is the sample.
    """
    unit = torch.eye(program.nfe, dtype=torch.float64)
    p, fresh = [program.init[0]], [torch.zeros_like(program.b[0])]
    rest = [torch.cat([program.init[1:], torch.zeros_like(program.b[0])])]
    for c, r in enumerate(program.r):
        p.append(r * p[-1] + program.e[c])
        rest.append(r * rest[-1] + torch.cat([program.k[c : c + 1], program.b[c]]))
        fresh.append(r * fresh[-1] + program.g[c] * unit[c])
    return torch.stack(p), torch.stack(rest), torch.stack(fresh)


def at_times(program: Program, noise: NoiseSchedule, t: Tensor) -> Program:
    """A program that asks the network at other times: t, and label, alpha and sigma with it."""
    return replace(program, t=t, label=noise.label(t), alpha=noise.alpha(t), sigma=noise.sigma(t))
