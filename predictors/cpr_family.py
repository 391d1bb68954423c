"""The family of schedules in which a cascade polynomial regression is fitted to samples.

A template's continuous decisions at every setting are linear in one vector theta, v = neutral + M
theta, with M the polynomials of `predictors.cpr` at the setting, whitened: unit theta moves the
decisions by one in rms. theta = 0 is the template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fewstep.predictors.cpr import CPR, Regression, assemble, design, first_step, neutral_value
from fewstep.space.baselines import baseline
from fewstep.space.errors import StudyError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.schedule import OdeSchedule

__all__ = ["Decision", "PolynomialFamily", "Setting"]

Array = NDArray[np.float64]
Decision = Literal["gap", "query", "start", "land", "compensation", "guidance"]
DECISIONS = get_args(Decision)
MOVED: tuple[Decision, ...] = ("gap", "query", "compensation")
"""Those that a study opens by default."""


@dataclass(frozen=True, order=True)
class Setting:
    """One (NFE, guidance scale)."""

    nfe: int
    guidance: float


class PolynomialFamily:
    """The schedules of one template whose decisions are polynomials of the setting.

    Args:
        noise: the noise schedule.
        template: named solver, "solver/grid" as in `space.baselines`.
        settings: the settings to fit.
        names: decisions that are open, out of `DECISIONS`.
        degrees: largest degrees in x, guidance and NFE; lowered where there are fewer settings.
        order: points a compensation uses besides the newest.
    """

    def __init__(
        self,
        noise: NoiseSchedule,
        template: str,
        settings: Sequence[Setting],
        names: Sequence[str],
        *,
        degrees: tuple[int, int, int] = (4, 2, 2),
        order: int = 2,
    ) -> None:
        for name in names:
            if name not in DECISIONS:
                raise StudyError(f"CPR: {name!r} is not one of {', '.join(DECISIONS)}")
        self.settings = sorted(settings)
        most = max((s.nfe for s in settings), default=0)
        self.names = tuple(name for name in names if first_step(name, order) < most)
        if not self.names:
            raise StudyError("CPR: no settings, or no decisions, to fit")
        self.template, self.noise, self.order = template, noise, order
        nfes = sorted({s.nfe for s in settings})
        scales = sorted({s.guidance for s in settings})
        self.box = (nfes[0], nfes[-1]), (scales[0], scales[-1])
        self.degrees = (degrees[0], min(degrees[1], len(scales) - 1),
                        min(degrees[2], len(nfes) - 1))  # fmt: skip
        self.bases = {n: baseline(template, noise, n) for n in nfes}
        self._whiten = {name: self._whitening(name) for name in self.names}
        self.matrices = {s: self._matrix(s) for s in self.settings}
        self.size = sum(w.shape[1] for w in self._whiten.values())

    def free(self, nfe: int) -> list[tuple[str, int]]:
        """(decision, step) pairs that may differ from neutral."""
        return [(name, i) for name in self.names for i in range(first_step(name, self.order), nfe)]

    def _rows(self, name: str, s: Setting) -> Array:
        steps = np.arange(first_step(name, self.order), s.nfe) + 1
        return design(steps / s.nfe, s.guidance, s.nfe, self.box, self.degrees)

    def _whitening(self, name: str) -> Array:
        """theta -> coefficients, such that unit theta moves the decisions by one in rms."""
        rows = np.concatenate([self._rows(name, s) for s in self.settings])
        _, values, right = np.linalg.svd(rows, full_matrices=False)
        keep = values > 1e-6 * values.max()
        made: Array = right[keep].T / values[keep] * math.sqrt(len(rows))
        return made

    def _matrix(self, s: Setting) -> Array:
        parts = [self._rows(name, s) @ self._whiten[name] for name in self.names]
        out = np.zeros((sum(len(p) for p in parts), sum(p.shape[1] for p in parts)))
        r = c = 0
        for p in parts:
            out[r : r + len(p), c : c + p.shape[1]] = p
            r, c = r + len(p), c + p.shape[1]
        return out

    def schedule(self, s: Setting, theta: Array, moved: Array | None = None) -> OdeSchedule:
        """The schedule of a setting; `moved` is added to its free decisions."""
        flat = self.matrices[s] @ theta
        if moved is not None:
            flat = flat + moved
        values = {name: [neutral_value(name)] * s.nfe for name in self.names}
        for (name, i), v in zip(self.free(s.nfe), flat.tolist(), strict=True):
            values[name][i] += v
        return assemble(self.bases[s.nfe], values, s.guidance, self.order)

    def model(self, theta: Array) -> CPR:
        """The regression; predictions are clipped to the range seen at the fitted settings."""
        found, at = {}, 0
        for name in self.names:
            w = self._whiten[name]
            c = w @ theta[at : at + w.shape[1]]
            at += w.shape[1]
            neutral = neutral_value(name)
            spread = neutral + np.concatenate([self._rows(name, s) @ c for s in self.settings])
            found[name] = Regression(
                c.reshape([d + 1 for d in self.degrees]),
                neutral,
                first_step(name, self.order),
                float(spread.min()),
                float(spread.max()),
            )
        return CPR(self.noise, self.template, *self.box, found, self.order)

    def theta(self, model: CPR) -> Array:
        """The parameters nearest to another regression of this family at the fitted settings."""
        parts = []
        for name in self.names:
            rows = np.concatenate([self._rows(name, s) for s in self.settings])
            wanted = [
                (model.values(s.nfe, s.guidance).get(name) or [neutral_value(name)] * s.nfe)[
                    first_step(name, self.order) :
                ]
                for s in self.settings
            ]
            y = np.concatenate(wanted) - neutral_value(name)
            parts.append(np.linalg.lstsq(rows @ self._whiten[name], y, rcond=None)[0])
        found: Array = np.concatenate(parts)
        return found
