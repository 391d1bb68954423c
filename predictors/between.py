"""Schedules for the guidance scales between those searched, from programs fitted at each.

A fit that starts from the program of a neighbouring scale ends near it, so that all numbers of the
two programs belong to each other: they are *aligned*. Then every number moves smoothly with the
scale, and at a scale between two it is interpolated linearly, queries in lam. Programs that were
fitted apart are equally good but not aligned, and mean nothing between.

The number of calls is not interpolated: programs of different calls have different numbers. Search
each one that is wanted. `predictors.cpr` predicts in both directions, within the family of a named
solver, as DC-Solver does (arXiv 2409.03755, section 3.3).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.predictors.cpr_family import Setting
from fewstep.predictors.yardstick import Array, level
from fewstep.space import ProgramSchedule
from fewstep.space.errors import ScheduleError, StudyError
from fewstep.space.files import load_schedule, save_schedule
from fewstep.space.unknowns import canonical, numbers, with_numbers

Sampled = Callable[[Setting, Sequence[ProgramSchedule]], tuple[Array, Array]]
"""Samples (M, B, *shape) of M schedules at a setting, and the teacher's (B, *shape)."""


def between(low: ProgramSchedule, high: ProgramSchedule, share: float) -> ProgramSchedule:
    """The program whose numbers lie between those of two aligned programs.

    Args:
        low: the result at share 0, as a sampler.
        high: the result at share 1; of as many calls, on the same noise schedule, with the same
            ends, run-time options and constant image.
        share: how far from `low` to `high`, in [0, 1].

    Raises:
        ScheduleError: they differ in what cannot be interpolated; the field is named.
    """
    for name in ("nfe", "noise", "start", "end", "options"):
        a, b = getattr(low, name), getattr(high, name)
        if a != b:
            raise ScheduleError(f"{name} is {a!r} of one program and {b!r} of the other")
    one, other = low.constant, high.constant
    if (one is None) != (other is None):
        raise ScheduleError("only one of the programs has a constant image")
    if one is not None and other is not None and not torch.equal(one, other):
        raise ScheduleError("the programs have different constant images")
    programs = [canonical(s.program) for s in (low, high)]
    if (programs[0].guidance is None) != (programs[1].guidance is None):
        raise ScheduleError("only one of the programs sets guidance scales")
    a, b = (numbers(p, low.noise) for p in programs)
    program = with_numbers(programs[0], low.noise, a + share * (b - a))
    origin = {"between": [low.digest, high.digest], "share": share}
    return low.model_copy(update={"program": program, "provenance": origin})


@dataclass
class Aligned:
    """Aligned programs by number of calls and guidance scale."""

    programs: dict[int, dict[float, ProgramSchedule]] = field(default_factory=dict)

    def add(self, guidance: float, found: Mapping[int, ProgramSchedule]) -> None:
        """Take the programs of a scale, by NFE."""
        for nfe, schedule in found.items():
            self.programs.setdefault(nfe, {})[guidance] = schedule

    def save(self, folder: Path, **origin: Any) -> None:
        """Write a schedule file of every setting, nfe05_w3.json.

        The provenance says its scale and `origin`, such as study and model.
        """
        for nfe, scales in self.programs.items():
            for scale, schedule in scales.items():
                noted = {**schedule.provenance, **origin, "guidance": scale}
                named = schedule.model_copy(update={"provenance": noted})
                save_schedule(named, folder / f"nfe{nfe:02d}_w{scale:g}.json")

    @classmethod
    def load(cls, folder: Path) -> Aligned:
        """Read the files that `save` wrote.

        Raises:
            StudyError: there are none, or one is no fitted program or names no guidance scale.
        """
        made = cls()
        for path in sorted(folder.glob("nfe*_w*.json")):
            schedule = load_schedule(path)
            scale = schedule.provenance.get("guidance")
            if not isinstance(schedule, ProgramSchedule) or not isinstance(scale, int | float):
                raise StudyError(f"{path}: not a fitted program with a guidance scale")
            made.add(float(scale), {schedule.nfe: schedule})
        if not made.programs:
            raise StudyError(f"{folder}: no programs fitted at several guidance scales are here")
        return made

    def predict(self, nfe: int, guidance: float) -> ProgramSchedule:
        """The schedule for a setting: that of its scale, or one between two scales.

        Raises:
            StudyError: nothing was fitted with so many calls, or the scale is outside.
            ScheduleError: the two programs cannot be interpolated.
        """
        if nfe not in self.programs:
            known = ", ".join(map(str, sorted(self.programs)))
            raise StudyError(
                f"NFE {nfe}: programs were fitted with {known} calls, and none lies between two "
                "numbers of calls: search this one"
            )
        scales = sorted(self.programs[nfe])
        if not scales[0] <= guidance <= scales[-1]:
            raise StudyError(
                f"guidance {guidance:g} lies outside of what was fitted at NFE {nfe}, "
                f"{scales[0]:g} to {scales[-1]:g}: search there"
            )
        return self._at(nfe, guidance, scales)

    def _at(self, nfe: int, guidance: float, scales: Sequence[float]) -> ProgramSchedule:
        """Between the two of the sorted `scales` around; at one of them its own program."""
        known, k = self.programs[nfe], bisect.bisect_left(scales, guidance)
        if scales[k] == guidance:
            return known[guidance]
        low, high = scales[k - 1], scales[k]
        return between(known[low], known[high], (guidance - low) / (high - low))

    def inner(self) -> list[Setting]:
        """The settings whose scale lies between two others."""
        listed = sorted(self.programs.items())
        return [Setting(nfe, scale) for nfe, known in listed for scale in sorted(known)[1:-1]]

    def left_out(self, sampled: Sampled) -> list[dict[str, Any]]:
        """What interpolation costs: every inner scale predicted from the two beside it.

        Returns:
            By setting the geometric mean of the samples' errors of its own program, of the one
            between its neighbours, and their ratio.
        """
        rows = []
        for s in self.inner():
            known = self.programs[s.nfe]
            made = self._at(s.nfe, s.guidance, sorted(known.keys() - {s.guidance}))
            samples, ends = sampled(s, (known[s.guidance], made))
            errors = ((samples - ends) ** 2).reshape(*samples.shape[:2], -1).mean(2)
            own, guess = (level(e, "geometric") for e in errors)
            row = {"nfe": s.nfe, "guidance": s.guidance, "own": own, "between": guess}
            rows.append(row | {"ratio": guess / own})
        return rows
