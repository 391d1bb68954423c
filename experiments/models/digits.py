"""Class-conditional digits: a small denoiser of scikit-learn's digits, and a classifier as judge.

Images are x0 = pixel/8 - 1 in [-1, 1], shape (1, 8, 8); labels are 0..9, and 10 is the null label
of classifier-free guidance. The noise schedule is variance preserving with linear beta,

    x_t = alpha x0 + sigma eps,    log alpha(t) = -(20 - 0.1) t^2/4 - 0.1 t/2,    t in [1e-3, 1]

with lam = log(alpha) - log(sigma), half the log-SNR. The network returns eps, formed from a
convolutional core F that predicts v = alpha eps - sigma x0,

    eps = sigma x + alpha F(x, lam, label)

so that neither end of the time range asks the core for a small difference of large numbers. All
of it is smooth in x and t (SiLU, low Fourier frequencies of lam), which high-order solvers need.

Both networks were trained by `train_digits.py` on 1437 of the 1797 images; the other 360 are held
out. The weights beside this file are float32 safetensors with the run that made them as metadata.

References: v prediction, Salimans and Ho 2022 (arXiv 2202.00512); classifier-free guidance, Ho and
Salimans 2022 (2207.12598); the data, Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI repository, CC BY 4.0, as packaged by scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from fewstep.samplers import Denoiser, Problem, fingerprint, from_model
from fewstep.samplers.denoiser import Networks
from fewstep.space import ModelError
from fewstep.space.noise import VPLinear

__all__ = [
    "CLASSIFIER",
    "NOISE",
    "NULL_LABEL",
    "SMALL",
    "WEIGHTS",
    "DigitsClassifier",
    "DigitsNet",
    "load_classifier",
    "load_network",
    "load_small",
    "problem",
    "small_network",
]

NOISE = VPLinear(beta_min=0.1, beta_max=20.0, t_start=1.0, t_end=1e-3)
NULL_LABEL = 10
WEIGHTS = Path(__file__).with_name("digits.safetensors")
SMALL = Path(__file__).with_name("digits_small.safetensors")
"""A second denoiser of the same data, at about a quarter of the cost (`Networks`)."""
_SMALL = ((8, 32), 32, 1)  # a quarter of the time of the other
CLASSIFIER = Path(__file__).with_name("digits_classifier.safetensors")

_Module = TypeVar("_Module", bound=nn.Module)


class _Embedding(nn.Module):
    """(lam, label) -> (B, width): sines and cosines of lam, plus a learned vector per label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0]) * (math.pi / 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.label = nn.Embedding(NULL_LABEL + 1, width)
        self.time = nn.Linear(1 + 2 * len(frequencies), width)
        self.out = nn.Linear(width, width)

    def forward(self, lam: Tensor, label: Tensor) -> Tensor:
        u = lam[:, None] / 5.0  # within [-1, 1] on the time range: the shortest period is 5 in lam
        angles = u * self.get_buffer("frequencies")
        h = self.time(torch.cat([u, torch.sin(angles), torch.cos(angles)], dim=1))
        out: Tensor = functional.silu(self.out(functional.silu(h + self.label(label))))
        return out


class _ResidualBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the embedding scales and shifts between them."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(4, channels, affine=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(functional.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        out: Tensor = x + self.conv2(functional.silu(h))
        return out


class DigitsNet(nn.Module):
    """The denoiser: a two-level U-Net with one block at 8x8 on each side and two at 4x4.

    Args:
        widths: channels at 8x8 and at 4x4, multiples of 4.
        embedding: width of the embedding of time and label.
        blocks: at 4x4; with one alone there is none at 8x8.
    """

    def __init__(
        self, widths: tuple[int, int] = (16, 48), embedding: int = 64, blocks: int = 2
    ) -> None:
        super().__init__()
        fine, coarse = widths
        self.light = blocks == 1
        self.embed = _Embedding(embedding)
        self.conv_in = nn.Conv2d(1, fine, 3, padding=1)
        if not self.light:
            self.rise = _ResidualBlock(fine, embedding)
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.middle = nn.ModuleList(_ResidualBlock(coarse, embedding) for _ in range(blocks))
        self.up = nn.ConvTranspose2d(coarse, fine, 2, stride=2)
        if not self.light:
            self.fall = _ResidualBlock(fine, embedding)
        self.conv_out = nn.Conv2d(fine, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The noise prediction at time t.

        Args:
            x: noisy images with shape (B, 1, 8, 8).
            t: model times with shape (B,), in (0, 1]; trained on [1e-3, 1].
            label: classes with shape (B,), int64: 0..9, or 10 for none.

        Returns:
            eps with shape (B, 1, 8, 8).
        """
        t = t.to(x.dtype)
        log_alpha = NOISE.log_alpha(t)
        alpha = torch.exp(log_alpha)[:, None, None, None]
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))[:, None, None, None]
        return torch.addcmul(sigma * x, alpha, self.velocity(x, NOISE.lam(t), label))

    def velocity(self, x: Tensor, lam: Tensor, label: Tensor) -> Tensor:
        """The core: v = alpha eps - sigma x0 at half log-SNR `lam` with shape (B,)."""
        embedding = self.embed(lam, label)
        h = self.conv_in(x) if self.light else self.rise(self.conv_in(x), embedding)
        low = self.down(h)
        for block in self.middle:
            low = block(low, embedding)
        h = h + self.up(low)
        h = h if self.light else self.fall(h, embedding)
        out: Tensor = self.conv_out(functional.silu(h))
        return out.contiguous()


def small_network() -> DigitsNet:
    """A lighter denoiser, without weights."""
    return DigitsNet(*_SMALL)


class DigitsClassifier(nn.Module):
    """A small convolutional classifier; its 64 penultimate features serve a Frechet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(48, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 16, 64)
        self.out = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) in about [-1, 1] -> features (B, 64)."""
        h = functional.silu(self.conv1(x))
        h = functional.silu(self.conv2(h))
        h = functional.silu(self.conv3(h))
        out: Tensor = functional.silu(self.hidden(h.flatten(1)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) -> logits (B, 10)."""
        out: Tensor = self.out(self.features(x))
        return out


def load_network(path: str | Path | None = None) -> DigitsNet:
    """The denoiser with trained weights, in evaluation mode, without gradients of its parameters.

    Args:
        path: a safetensors file written by `train_digits.py`; by default the one shipped.

    Raises:
        ModelError: the file is absent, is not safetensors, or holds another network.
    """
    return _load(DigitsNet(), WEIGHTS if path is None else Path(path))


def load_small() -> DigitsNet:
    """The lighter denoiser with trained weights; see `load_network`."""
    return _load(small_network(), SMALL)


def load_classifier(path: str | Path | None = None) -> DigitsClassifier:
    """The classifier with trained weights, in evaluation mode; see `load_network`."""
    return _load(DigitsClassifier(), CLASSIFIER if path is None else Path(path))


def _load(module: _Module, path: Path) -> _Module:
    kind = type(module).__name__
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist: python -m fewstep.experiments.models.train_digits makes it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("network")
            if found != kind:
                raise ModelError(f"{path} holds {found or 'an unnamed network'}, not {kind}")
            module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from None
    except RuntimeError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} does not fit {kind}: {' '.join(str(error).split())}") from None
    return module.eval().requires_grad_(False)


def _labels(index: Tensor, *, label: int | None) -> dict[str, Tensor]:
    """Sample i shows `label`, or the digit i mod 10."""
    return {"label": index % NULL_LABEL if label is None else torch.full_like(index, label)}


def _null(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"label": torch.full_like(cond["label"], NULL_LABEL)}


def _picture(x: Tensor) -> Tensor:
    """Images (B, 1, 8, 8) in [-1, 1] -> (B, 8, 8) in 0..1."""
    return ((x[:, 0] + 1) / 2).clamp(0.0, 1.0)


def problem(
    guidance: float = 1.0,
    *,
    label: int | None = None,
    path: str | Path | None = None,
    device: str | None = None,
    small: float | None = None,
) -> Problem:
    """The study factory: find schedules for the digits model.

    Args:
        guidance: classifier-free guidance scale; 1 is the conditional model, at half the cost.
        label: the digit every sample shows, 0..9; None: sample i shows i mod 10.
        path: weights of the denoiser; by default those shipped.
        device: where the network runs; None is where the state is.
        small: price of the lighter network, which calls may then ask by the name "small"; about a
            quarter of the time. None leaves it out.

    Raises:
        ModelError: as `load_network`, or a label outside 0..9.
    """
    if label is not None and label not in range(NULL_LABEL):
        raise ModelError(f"label {label!r} is not a digit: use 0 to 9, or leave it out for all")
    net, classifier = load_network(path), load_classifier()
    if device is not None:
        net.to(device)
    form: dict[str, Any] = {"null_cond": _null, "dtype": torch.float32, "device": device}
    denoiser: Denoiser = from_model(net, NOISE, "eps", **form)
    if small is not None:
        light = load_small() if device is None else load_small().to(device)
        denoiser = Networks(denoiser, {"small": (from_model(light, NOISE, "eps", **form), small)})
    return Problem(
        denoiser=denoiser,
        shape=(1, 8, 8),
        cond=partial(_labels, label=label),
        guidance=float(guidance),
        fingerprint=fingerprint(net, "digits"),
        features=classifier.features,
        picture=_picture,
    )
