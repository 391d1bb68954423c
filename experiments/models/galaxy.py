"""A pretrained score network of galaxies, read out of a wheel of which nothing is imported.

The network is `eqx_hsc_ScoreNet32` of galaxygrad 0.1.9 (arXiv 2401.07313): net(x, t) ~
grad log p_t(x) for 1x32x32 images of deblended galaxies of the HSC survey, in flux units
log(1 + flux)/0.1, so that samples lie within about [-0.2, 6.8]. It is unconditional. Its process
is variance preserving with beta(t) = 1 and t in (0, 10]:

    x_t = alpha x0 + sigma eps,   alpha = e^{-t/2},   sigma = sqrt(1 - e^{-t})
    probability-flow ODE          dx/dt = -(x + score)/2

here VPLinear(beta_min=1, beta_max=1, t_start=10, t_end=1e-3), output "score" (eps = -sigma score).

The package states no licence: its wheel is fetched where it is used, and the weights are neither
copied into this repository nor converted into another file. They are a chain of .npy records in
a member of the zip, read with `allow_pickle=False`.

    python -m fewstep.experiments.models.galaxy fetch [--optional]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models import assets
from fewstep.samplers import Problem, fingerprint, from_model
from fewstep.space import FewstepError, ModelError
from fewstep.space.noise import VPLinear

__all__ = ["NOISE", "ScoreNet32", "load_network", "problem"]

NOISE = VPLinear(beta_min=1.0, beta_max=1.0, t_start=10.0, t_end=1e-3)

_MEMBER = "galaxygrad/eqx_hsc_ScoreNet32.eqx"
_MEMBER_SHA256 = "cb926562fcdfcbd33952fea8b2394074e75cb652fb7824c4c809a5f89a0a6532"
_BLOCKS = 4
_T_MAX = 10.0


class _Mlp(nn.Module):
    """Linear 64 -> 512, ReLU, linear 512 -> 64, along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Linear(64, 512)
        self.fall = nn.Linear(512, 64)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.fall(functional.relu(self.rise(y)))
        return out


class _Mixer(nn.Module):
    """One mixer block on (B, c, p): an MLP along patches p, then one along channels c."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = _Mlp()
        self.hidden = _Mlp()
        self.norm1 = nn.LayerNorm((64, 64))  # over (c, p)
        self.norm2 = nn.LayerNorm((64, 64))  # over (p, c)

    def forward(self, y: Tensor) -> Tensor:
        y = y + self.patch(self.norm1(y))
        z = y.transpose(1, 2)
        out: Tensor = z + self.hidden(self.norm2(z))
        return out.transpose(1, 2)


class ScoreNet32(nn.Module):
    """The MLP-mixer score network, 605,761 parameters, float32.

    Channels and patches both number 64, so a swapped axis passes every check of shapes; the
    acceptance test compares sampling errors with numbers on record.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 64, 4, stride=4)
        self.blocks = nn.ModuleList(_Mixer() for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm((64, 64))
        self.conv_out = nn.ConvTranspose2d(64, 1, 4, stride=4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at time t.

        Args:
            x: noisy images with shape (B, 1, 32, 32).
            t: model times with shape (B,), in (0, 10].

        Returns:
            grad log p_t(x) with shape (B, 1, 32, 32).
        """
        level = (t / _T_MAX).to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)
        y = self.conv_in(torch.cat([x, level], dim=1))
        y = y.flatten(2)
        for block in self.blocks:
            y = block(y)
        out: Tensor = self.conv_out(self.norm(y).unflatten(2, (8, 8)))
        return out


def load_network(path: str | Path | None = None) -> ScoreNet32:
    """The network with its published weights, in evaluation mode, its parameters frozen.

    Args:
        path: the wheel of galaxygrad 0.1.9; by default the one in the folder of assets.

    Raises:
        ModelError: the wheel is absent or is another file; one line that names the remedy.
    """
    try:
        data = _member(assets.require("galaxygrad") if path is None else Path(path))
    except assets.AssetError as error:
        raise ModelError(f"the galaxy model needs a wheel that is not here: {error}") from None
    net = ScoreNet32()
    net.load_state_dict(_state(data))
    return net.eval().requires_grad_(False)


def _member(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as wheel:
            data = wheel.read(_MEMBER)
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: python -m fewstep.experiments.models.galaxy fetch"
        ) from None
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is not the wheel of galaxygrad 0.1.9: {error}") from None
    if hashlib.sha256(data).hexdigest() != _MEMBER_SHA256:
        raise ModelError(f"{path}: {_MEMBER} is not the pinned file: fetch galaxygrad 0.1.9 anew")
    return data


def _records(data: bytes) -> Iterator[NDArray[np.floating]]:
    """The arrays of a chain of .npy records."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield np.load(stream, allow_pickle=False)


def _state(data: bytes) -> dict[str, Tensor]:
    """The state of `ScoreNet32` from the file's records, in the file's order."""
    records = list(_records(data))
    if len(records) != 7 + 12 * _BLOCKS or float(records[-1]) != _T_MAX:
        raise ModelError(f"{_MEMBER} holds {len(records)} records, not the 55 expected")
    arrays = iter(records)

    def take() -> Tensor:
        return torch.from_numpy(np.array(next(arrays), dtype=np.float32))

    state = {"conv_in.weight": take(), "conv_in.bias": take().flatten()}
    # stored (out, in, kh, kw) for a convolution of the dilated input: torch wants
    # (in, out, kh, kw) with both spatial axes reversed
    state["conv_out.weight"] = take().transpose(0, 1).flip(2, 3).contiguous()
    state["conv_out.bias"] = take().flatten()
    names = [
        f"{mlp}.{layer}.{kind}"
        for mlp in ("patch", "hidden")
        for layer in ("rise", "fall")
        for kind in ("weight", "bias")
    ]
    names += [f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
    for block in range(_BLOCKS):
        state.update({f"blocks.{block}.{name}": take() for name in names})
    state["norm.weight"], state["norm.bias"] = take(), take()
    return state


def _picture(x: Tensor) -> Tensor:
    """Images (B, 1, 32, 32) in flux units -> (B, 32, 32) in 0..1."""
    return (x[:, 0] / 4.0).clamp(0.0, 1.0)


def problem(*, path: str | Path | None = None, device: str | None = None) -> Problem:
    """The study factory: unconditional; about 2 ms per image and call on one CPU thread.

    Args:
        path: the wheel; by default the one `fetch` left.
        device: where the network runs; None is where the state is.

    Raises:
        ModelError: as `load_network`.
    """
    net = load_network(path)
    if device is not None:
        net.to(device)
    return Problem(
        denoiser=from_model(net, NOISE, "score", dtype=torch.float32, device=device),
        shape=(1, 32, 32),
        fingerprint=fingerprint(net, "galaxy"),
        picture=_picture,
    )


def main(arguments: list[str] | None = None) -> int:
    """Fetch the wheel and check it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.experiments.models.galaxy")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download the wheel into the folder of assets")
    fetch.add_argument(
        "--optional", action="store_true", help="a failed download is a warning, not an error"
    )
    optional = bool(parser.parse_args(arguments).optional)
    try:
        load_network(assets.fetch("galaxygrad"))
    except (assets.AssetError, FewstepError, OSError) as error:
        word = "warning: the galaxy model is left out" if optional else "error"
        print(f"{word}: {error}", file=sys.stderr)
        return 0 if optional else 1
    print(f"galaxygrad 0.1.9 is in {assets.assets_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
