"""A Gaussian process on flat features: the reference predictor, strong on few smooth data.

Matern-5/2 kernel with one length per feature, on standardised features and targets. Lengths, noise
and mean are fitted to the marginal likelihood with the dimension-scaled log-normal prior on
lengths, log l ~ N(sqrt 2 + log(d)/2, 3), which keeps tens of features fittable from tens of rows
(Hvarfner et al. 2024, arXiv 2402.02229, section 4). Float64 throughout.

References: Rasmussen and Williams 2006, eq. 2.25-2.26 (posterior), 5.12 (leave-one-out).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MOST_ROWS, BEST_ROWS = 300, 200  # the fit is cubic in rows: the best, and some of every quality
_JITTER = 1e-6


class GaussianProcess:
    """Exact GP regression.

    Args:
        steps: L-BFGS iterations of the likelihood fit.
        noise: variance of the noise that is expected, as a share of the targets' variance.
    """

    def __init__(self, steps: int = 20, noise: float = 1e-5) -> None:
        self.steps, self._log_noise = steps, math.log(noise)

    def fit(self, x: Tensor, y: Tensor) -> GaussianProcess:
        """Fit to features x (n, d) and targets y (n,), n >= 2; returns self."""
        self._given = x
        order = torch.argsort(y, stable=True)
        spread_out = torch.linspace(BEST_ROWS, len(y) - 1, MOST_ROWS - BEST_ROWS).round().long()
        some = torch.cat([torch.arange(BEST_ROWS), spread_out])
        keep = order if len(y) <= MOST_ROWS else order[some]
        self._best = keep.sort().values
        x, y = x[self._best].double(), y[self._best].double()
        self._mean, spread = x.mean(0), x.std(0)
        self._live = spread > 1e-9
        self._scale = torch.where(self._live, spread, torch.ones_like(spread))
        self._y_mean, self._y_scale = y.mean(), y.std().clamp(min=1e-9)
        self._x = self._features(x)
        self._y = (y - self._y_mean) / self._y_scale
        self._optimise(max(int(self._live.sum()), 1))
        self._factorise()
        return self

    def _features(self, x: Tensor) -> Tensor:
        return ((x.double() - self._mean) / self._scale)[:, self._live]

    def _optimise(self, d: int) -> None:
        centre = math.sqrt(2) + 0.5 * math.log(d)
        start = [centre] * self._x.shape[1] + [self._log_noise, 0.0, 0.0]
        theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [theta], max_iter=self.steps, history_size=8, line_search_fn="strong_wolfe"
        )
        eye = torch.eye(len(self._y), dtype=torch.float64)
        best = (math.inf, theta.detach().clone())  # a line search may end somewhere worse

        def closure() -> Tensor:
            nonlocal best
            optimiser.zero_grad()
            noise = torch.exp(theta[-3]) + _JITTER
            factor, bad = torch.linalg.cholesky_ex(
                self._kernel(self._x, self._x, theta) + noise * eye
            )
            residual = (self._y - theta[-1]).unsqueeze(-1)
            prior = ((theta[:-3] - centre) ** 2).sum() / (2 * 3.0)
            prior = prior + ((theta[-3] - self._log_noise) ** 2) / 8 + (theta[-2:] ** 2).sum() / 2
            if int(bad):
                loss = 1e6 * (1 + prior)
            else:
                fit = 0.5 * (residual * torch.cholesky_solve(residual, factor)).sum()
                loss = fit + torch.log(factor.diagonal()).sum() + prior
            loss.backward()
            if float(loss.detach()) < best[0]:
                best = (float(loss.detach()), theta.detach().clone())
            return loss

        optimiser.step(closure)
        self._theta = best[1]

    def _kernel(self, a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
        length = torch.exp(theta[:-3])
        a, b = a / length, b / length
        square = (a**2).sum(-1, keepdim=True) + (b**2).sum(-1) - 2 * a @ b.T
        r = torch.sqrt(square.clamp(min=1e-12) * 5)
        kernel: Tensor = torch.exp(theta[-2]) * (1 + r + r**2 / 3) * torch.exp(-r)
        return kernel

    def _factorise(self) -> None:
        k = self._kernel(self._x, self._x, self._theta)
        k = k + (torch.exp(self._theta[-3]) + _JITTER) * torch.eye(len(k), dtype=torch.float64)
        self._factor = torch.linalg.cholesky(k)
        self._alpha = torch.cholesky_solve((self._y - self._theta[-1]).unsqueeze(-1), self._factor)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n,) and covariance (n, n) of the latent function at features x (n, d)."""
        f = self._features(x)
        cross = self._kernel(f, self._x, self._theta)
        half = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        mean = (cross @ self._alpha).squeeze(-1) + self._theta[-1]
        cov = self._kernel(f, f, self._theta) - half.T @ half
        return mean * self._y_scale + self._y_mean, cov * self._y_scale**2

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at features x (n, d), both (n,)."""
        f = self._features(x)
        cross = self._kernel(f, self._x, self._theta)
        half = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        mean = (cross @ self._alpha).squeeze(-1) + self._theta[-1]
        variance = (torch.exp(self._theta[-2]) - (half**2).sum(0)).clamp(min=1e-12)
        return mean * self._y_scale + self._y_mean, variance.sqrt() * self._y_scale

    def left_out(self, folds: Tensor) -> Tensor:
        """Predictions of each training row from the rows of other folds, kernel as fitted.

        Args:
            folds: fold of every row given to `fit`, shape (n,).

        Returns:
            Shape (n,); rows left out of the fit are predicted from all kept ones.
        """
        k = self._kernel(self._x, self._x, self._theta)
        k = k + (torch.exp(self._theta[-3]) + _JITTER) * torch.eye(len(k), dtype=torch.float64)
        inverse = torch.linalg.inv(k)
        weighted = inverse @ (self._y - self._theta[-1])
        out = torch.empty_like(self._y)
        folds = folds[self._best]
        for fold in folds.unique():
            rows = (folds == fold).nonzero().squeeze(-1)
            block = inverse[rows][:, rows]
            out[rows] = self._y[rows] - torch.linalg.solve(block, weighted[rows])
        every, _ = self.predict(self._given)
        every[self._best] = out * self._y_scale + self._y_mean
        return every

    def state(self) -> dict[str, Tensor]:
        """What predictions depend on; empty before `fit`."""
        names = ("x", "y", "mean", "scale", "live", "y_mean", "y_scale", "theta")
        return {n: getattr(self, f"_{n}") for n in names} if hasattr(self, "_theta") else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the `state` of a fitted process."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)
        self._factorise()


def expected_improvement(gain: np.ndarray, std: np.ndarray) -> np.ndarray:
    """E max(0, gain + std * z) of a standard normal z; Jones et al. 1998, eq. 15."""
    z = torch.from_numpy(gain / std)
    density = torch.exp(-0.5 * z**2) / (2 * math.pi) ** 0.5
    found: np.ndarray = std * (z * torch.special.ndtr(z) + density).numpy()
    return found
