"""The quality predictor: how good a schedule will be, learned from those already scored.

Two models stand side by side. The sequence ranker (`predictors.sequence`) learns from the results
at every number of calls; the Gaussian process (`predictors.gaussian`) reads the flattened tokens
of one number of calls. Both are cross-validated on the same folds, and the one with the higher
Kendall tau at the NFE in question predicts. Both read programs, not names (`space.tokens`).

A process is too sure of itself where a search leads it: between few data, along directions that no
result has yet varied. So the newest results are predicted from the others first, and uncertainties
are widened by how far off that was.

Targets are log scores (scores span decades, and ratios are what matters), with what is worse than
`CUT` of the rows compressed: how bad a bad schedule is must not cost accuracy among good ones.
Predictions are in those units, lower is better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.gaussian import GaussianProcess
from fewstep.predictors.sequence import Rows, SequenceRanker
from fewstep.space.errors import FewstepError
from fewstep.space.tokens import OWN

CUT, COMPRESSION = 0.6, 0.3
FOLDS = 5
LEAST_ROWS = 8  # fewer results at an NFE predict nothing
_WIDEST = 6.0


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two vectors; 0 where one is constant."""
    i, j = torch.triu_indices(len(a), len(a), 1)
    p, q = torch.sign(a[i] - a[j]), torch.sign(b[i] - b[j])
    norm = math.sqrt(float((p != 0).sum()) * float((q != 0).sum()))
    return float((p * q).sum()) / norm if norm else 0.0


def targets(scores: Tensor) -> Tensor:
    """Log scores (as they are if any is not positive), compressed above the `CUT` quantile."""
    y = scores.double()
    y = torch.log(y) if bool((y > 0).all()) else (y - y.mean()) / y.std().clamp(min=1e-12)
    cut = torch.quantile(y, CUT)
    return torch.where(y > cut, cut + COMPRESSION * (y - cut), y)


def flatten(tokens: Tensor) -> Tensor:
    """Tokens (n, calls, F) as the process's features (n, calls * 11 + 1), none twice."""
    return torch.cat([tokens[..., OWN].flatten(1), tokens[:, -1, 1:2]], dim=1)


@dataclass
class QualityPredictor:
    """Schedule -> predicted target and its uncertainty.

    Args:
        kind: "auto" (the better by cross-validation), "sequence" or "gaussian".
        seed: of the folds and the ranker.
        tau: cross-validated Kendall tau of each fitted model at the NFE it was fitted for.
        chosen: the model that predicts.
        nfe: the number of calls it predicts for.
        best: target of the best row it was fitted to.
        spread: standard deviation of the targets.
        widened: what uncertainties are multiplied by, 1 to 6.
    """

    kind: str = "auto"
    seed: int = 0
    tau: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    nfe: int = 0
    best: float = math.nan
    spread: float = math.nan
    widened: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "sequence", "gaussian"):
            raise FewstepError(
                f"predictor {self.kind!r} is unknown: use auto, sequence or gaussian"
            )
        self.ranker = SequenceRanker()
        self.process = GaussianProcess()

    def fit(
        self, tokens: Sequence[Tensor], scores: Sequence[float], nfe: int, newest: int = 0
    ) -> QualityPredictor:
        """Train on everything scored.

        Args:
            tokens: per schedule (calls, F), any mix of calls.
            scores: finite scores, smaller is better.
            nfe: the number of calls predictions are wanted for.
            newest: this many results at that NFE, the last given, widen the uncertainty.

        Returns:
            self.

        Raises:
            FewstepError: fewer than `LEAST_ROWS` rows at this NFE.
        """
        self.nfe, self.tau = nfe, {}
        all_scores = torch.tensor(scores, dtype=torch.float64)
        calls = torch.tensor([len(t) for t in tokens])
        here = calls == nfe
        if int(here.sum()) < LEAST_ROWS:
            raise FewstepError(
                f"{int(here.sum())} results at NFE {nfe} are too few: {LEAST_ROWS} are needed"
            )
        y = torch.zeros_like(all_scores)
        for n in calls.unique().tolist():
            group = calls == n
            y[group] = targets(all_scores[group]) if int(group.sum()) > 1 else 0.0
        generator = torch.Generator().manual_seed(self.seed)
        folds = torch.randperm(len(y), generator=generator) % FOLDS
        if self.kind in ("auto", "gaussian"):
            x = flatten(torch.stack([t for t, use in zip(tokens, here, strict=True) if use]))
            self.process.fit(x, y[here])
            self.tau["gaussian"] = kendall_tau(self.process.left_out(folds[here]), y[here])
            self.widened = _off(x, y[here], newest)
        if self.kind in ("auto", "sequence"):
            rows = Rows.of(list(tokens))
            self.ranker.fit(rows, y, folds, self.seed)
            self.tau["sequence"] = kendall_tau(self.ranker.left_out(rows, folds)[here], y[here])
        self.chosen = max(self.tau, key=lambda name: self.tau[name])
        self.best, self.spread = float(y[here].min()), float(y[here].std())
        return self

    def predict(self, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, both (n,), for tokens (n, nfe, F)."""
        with torch.no_grad():
            if self.chosen == "gaussian":
                mean, std = self.process.predict(flatten(tokens))
            else:
                each = self.ranker.each(_rows(tokens))
                mean, std = each.mean(0), each.std(0)
        return mean.double().numpy(), self.widened * std.double().numpy()

    def posterior(self, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean (n,) and joint covariance (n, n) for tokens (n, nfe, F)."""
        with torch.no_grad():
            if self.chosen == "gaussian":
                mean, cov = self.process.posterior(flatten(tokens))
            else:
                each = self.ranker.each(_rows(tokens)).double()
                mean, centred = each.mean(0), each - each.mean(0)
                cov = centred.T @ centred / (len(each) - 1)
                near = (
                    torch.cdist(flatten(tokens), flatten(tokens)) / 0.1
                )  # members agree along a line: part by distance too
                cov = cov * torch.exp(-(near**2))
        return mean.numpy(), self.widened**2 * cov.numpy()

    def save(self, path: str | Path) -> Path:
        """Write PATH.safetensors (numbers) and PATH.json (the rest); no pickle."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {f"sequence.{k}": v.contiguous() for k, v in self.ranker.state.items()}
        tensors |= {f"gaussian.{k}": v.contiguous() for k, v in self.process.state().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".safetensors"))
        about = {"format": "fewstep.quality", "version": 2, "kind": self.kind, "seed": self.seed}
        about |= {"tau": self.tau, "chosen": self.chosen, "nfe": self.nfe, "best": self.best}
        about |= {"spread": self.spread, "widened": self.widened}
        path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> QualityPredictor:
        """Read what `save` wrote.

        Raises:
            FewstepError: the files are absent or of another format.
        """
        from safetensors.torch import load_file

        path = Path(path)
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            tensors = load_file(path.with_suffix(".safetensors"))
        except (OSError, ValueError) as error:
            raise FewstepError(f"{path}: no quality predictor can be read ({error})") from None
        if about.get("format") != "fewstep.quality" or about.get("version") != 2:
            raise FewstepError(f"{path}: this is not a quality predictor of version 2")
        made = cls(about["kind"], about["seed"], about["tau"], about["chosen"], about["nfe"])
        made.best, made.spread, made.widened = (about[k] for k in ("best", "spread", "widened"))
        parts: dict[str, dict[str, Tensor]] = {"sequence": {}, "gaussian": {}}
        for name, value in tensors.items():
            model, _, key = name.partition(".")
            parts[model][key] = value
        made.ranker.state = parts["sequence"]
        if parts["gaussian"]:
            made.process.restore(parts["gaussian"])
        return made


class ScoreProcess:
    """A Gaussian process that predicts scores, transformed so that ratios count."""

    chosen = "gaussian"

    def __init__(self, x: Tensor, scores: Sequence[float], noise: float, steps: int) -> None:
        y = targets(torch.tensor(scores, dtype=torch.float64))
        self._process = GaussianProcess(steps=steps, noise=noise).fit(x, y)
        self.best, self.spread = float(y.min()), float(y.std())

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at features (n, d)."""
        mean, std = self._process.predict(x)
        return mean.numpy(), std.numpy()

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and joint covariance."""
        mean, cov = self._process.posterior(x)
        return mean.numpy(), cov.numpy()


def _off(x: Tensor, y: Tensor, newest: int) -> float:
    """Root mean square of the last rows' distance from what the others predict, in its std."""
    if newest < 1 or len(y) - newest < LEAST_ROWS:
        return 1.0
    process = GaussianProcess().fit(x[:-newest], y[:-newest])
    with torch.no_grad():
        mean, std = process.predict(x[-newest:])
    return float(((y[-newest:] - mean) / std).square().mean().sqrt().clamp(1.0, _WIDEST))


def _rows(tokens: Tensor) -> Rows:
    return Rows(tokens.float(), torch.full((len(tokens),), tokens.shape[1]))
