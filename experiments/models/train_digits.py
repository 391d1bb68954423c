"""Train the digits classifier and the digits denoiser on a CPU, and draw up their card.

    python -m fewstep.experiments.models.train_digits [classifier|denoiser|small|card ...]
        [--steps N]

Without names it does all, in about fifteen minutes on one or two threads. The denoiser
minimises the mean over the noise levels of |F - v|^2; half of a batch has t uniform on [1e-3, 1],
half lam uniform between their values, which is where few-step solvers ask. The label is dropped
with probability 0.1. The weights kept are an exponential moving average. Losses reported are
|eps_hat - eps|^2 per pixel with t uniform, on training images and on the 360 held out, with the
same noise at every report. Why 6000 steps: in a run set for 12000 the loss on the held-out images
stood still from step 6000 and had begun to rise at 8000, while the other kept falling.

The card samples 1000 digits, 100 per class, from the probability-flow ODE with 256 Heun steps on a
grid uniform in lam, and counts those the classifier reads as the class asked for. Its loop is its
own, so that it does not rest on the samplers the model will be used to compare.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models.digits import (
    CLASSIFIER,
    NOISE,
    NULL_LABEL,
    SMALL,
    WEIGHTS,
    DigitsClassifier,
    DigitsNet,
    load_classifier,
    load_network,
    small_network,
)

SEED = 0
N_TRAIN = 1437
PICTURE = Path(__file__).with_name("digits_samples.png")


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits, split by a fixed permutation.

    Returns:
        training images (1437, 1, 8, 8) in [-1, 1] and labels (1437,), then the 360 held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    train, held_out = order[:N_TRAIN], order[N_TRAIN:]
    return images[train], labels[train], images[held_out], labels[held_out]


def data_sha256() -> str:
    """Digest of the pixels and labels as bytes, in scikit-learn's order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    digest = hashlib.sha256(data.images.astype("uint8").tobytes())
    digest.update(data.target.astype("uint8").tobytes())
    return digest.hexdigest()


def velocity_error(net: DigitsNet, x0: Tensor, label: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """|F - v|^2 per pixel, shape (B,); times alpha^2 it is the squared error of eps."""
    alpha, sigma = (f(t)[:, None, None, None] for f in (NOISE.alpha, NOISE.sigma))
    v = net.velocity(alpha * x0 + sigma * eps, NOISE.lam(t), label)
    return (v - (alpha * eps - sigma * x0)).square().mean((1, 2, 3))


@torch.inference_mode()
def eps_loss(net: DigitsNet, images: Tensor, labels: Tensor, repeats: int = 16) -> float:
    """Squared error of eps per pixel, t stratified over [1e-3, 1], with fixed noise."""
    generator = torch.Generator().manual_seed(SEED + 1)
    x0, label = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    first, last = NOISE.t_range
    u = (torch.randperm(len(x0), generator=generator) + 0.5) / len(x0)
    t = last + (first - last) * u
    eps = torch.randn(x0.shape, generator=generator)
    error = velocity_error(net, x0, label, t, eps) * NOISE.alpha(t).square()
    return float(error.mean())


def train_denoiser(
    steps: int, batch: int = 128, rate: float = 2e-3, *, small: bool = False
) -> None:
    """Train and write `digits.safetensors`, or `digits_small.safetensors`."""
    images, labels, held_images, held_labels = load_data()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = small_network() if small else DigitsNet()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    first, last = NOISE.t_range
    lam_first, lam_last = (float(NOISE.lam(torch.tensor(t))) for t in (first, last))
    started = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        index = torch.randint(len(images), (batch,), generator=generator)
        label = labels[index]
        dropped = torch.rand(batch, generator=generator) < 0.1
        label = torch.where(dropped, NULL_LABEL, label)
        u = torch.rand(batch, generator=generator)
        by_lam = NOISE.t_of_lam(lam_first + (lam_last - lam_first) * u)
        by_time = last + (first - last) * u
        t = torch.where(torch.rand(batch, generator=generator) < 0.5, by_time, by_lam)
        eps = torch.randn((batch, 1, 8, 8), generator=generator)
        loss = velocity_error(net, images[index], label, t, eps).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(ema.parameters(), net.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            spent = time.perf_counter() - started
            seen, held = eps_loss(ema, images, labels, 4), eps_loss(ema, held_images, held_labels)
            print(
                f"step {step + 1}: {spent:.0f} s, loss {seen:.5f}, held out {held:.5f}", flush=True
            )
    _save(
        ema,
        SMALL if small else WEIGHTS,
        steps=steps,
        batch=batch,
        learning_rate=rate,
        ema=0.999,
        label_dropout=0.1,
        eps_loss_train=eps_loss(ema, images, labels),
        eps_loss_held_out=eps_loss(ema, held_images, held_labels),
        seconds=round(time.perf_counter() - started),
    )


def train_classifier(steps: int = 2000, batch: int = 128, rate: float = 2e-3) -> None:
    """Train and write `digits_classifier.safetensors`.

    Noise and shifts by up to one pixel are added to the images, so that the features do not
    hang on single pixels.
    """
    images, labels, held_images, held_labels = load_data()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = DigitsClassifier()
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    started = time.perf_counter()
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        dx, dy = (int(torch.randint(-1, 2, (), generator=generator)) for _ in range(2))
        x = functional.pad(images[index], (1, 1, 1, 1), value=-1.0)
        x = x[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        loss = functional.cross_entropy(net(x), labels[index], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.inference_mode():
        wrong = int((net(held_images).argmax(1) != held_labels).sum())
    accuracy = 1 - wrong / len(held_labels)
    print(f"classifier: {wrong} of {len(held_labels)} held out wrong, accuracy {accuracy:.4f}")
    _save(
        net,
        CLASSIFIER,
        steps=steps,
        batch=batch,
        learning_rate=rate,
        accuracy_held_out=accuracy,
        seconds=round(time.perf_counter() - started),
    )


def _save(net: nn.Module, path: Path, **run: float) -> None:
    """Write weights with the run that made them as metadata."""
    metadata = {
        "network": type(net).__name__,
        "parameters": str(sum(p.numel() for p in net.parameters())),
        "script": "experiments/models/train_digits.py",
        "data": f"scikit-learn load_digits, {N_TRAIN} of 1797 images, x/8 - 1",
        "data_sha256": data_sha256(),
        "seed": str(SEED),
        "torch": torch.__version__,
        **{key: repr(value) for key, value in run.items()},
    }
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path, metadata)
    print(f"{path.name}: {path.stat().st_size} bytes\n{json.dumps(metadata, indent=1)}")


@torch.inference_mode()
def heun(
    eps_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, t_end: float = 1e-3
) -> Tensor:
    """The probability-flow ODE from t = 1, in y = x/alpha and rho = sigma/alpha: dy/drho = eps.

    Args:
        eps_of: (x, t (B,)) -> eps.
        x: start with shape (B, 1, 8, 8), float64 for a reference.
        steps: Heun steps, uniform in lam; 2 evaluations each.
        t_end: where to stop.

    Returns:
        x at `t_end`, the last evaluation's data prediction not applied.
    """
    ends = NOISE.lam(torch.tensor([1.0, t_end], dtype=torch.float64))
    lam = torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)
    t, rho = NOISE.t_of_lam(lam), torch.exp(-lam)
    alpha = NOISE.alpha(t)
    y = x / alpha[0]

    def slope(y: Tensor, i: int) -> Tensor:
        at = t[i].expand(len(y)).float()
        return eps_of((alpha[i] * y).float(), at).to(y.dtype)

    for i in range(steps):
        d = slope(y, i)
        step = rho[i + 1] - rho[i]
        y = y + step / 2 * (d + slope(y + step * d, i + 1))
    return alpha[-1] * y


def guided(net: DigitsNet, label: Tensor, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t) -> eps with classifier-free guidance."""

    def eps_of(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t, label)
        if guidance == 1:
            return out
        null: Tensor = net(x, t, torch.full_like(label, NULL_LABEL))
        return null + guidance * (out - null)

    return eps_of


def card(steps: int = 256) -> None:
    """Print accuracies, solver errors and timings, and write the picture."""
    net, classifier = load_network(), load_classifier()
    images, labels, _, _ = load_data()
    label = torch.arange(1000) % NULL_LABEL
    noise = torch.randn(
        (1000, 1, 8, 8), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64
    )
    rows: list[tuple[str, Tensor]] = []
    for guidance in (1.0, 3.0):
        eps_of = guided(net, label, guidance)
        samples = heun(eps_of, noise, steps)
        x = samples.float()
        with torch.inference_mode():
            right = float((classifier(x).argmax(1) == label).float().mean())
        half = (heun(eps_of, noise, steps // 2) - samples).square().mean((1, 2, 3))
        nearest = torch.cdist(x.flatten(1), images.flatten(1)).min(dim=1).values
        print(
            f"guidance {guidance}: {right:.3f} of 1000 samples read as their class; "
            f"{steps // 2} against {steps} steps: RMSE {float(half.mean().sqrt()):.2e}, "
            f"median {float(half.median().sqrt()):.2e}; pixels {float(x.min()):.2f}.."
            f"{float(x.max()):.2f}; distance to the nearest training image: median "
            f"{float(nearest.median()):.2f}, smallest {float(nearest.min()):.2f}"
        )
        rows.append((f"samples, guidance {guidance:g}", x))
    apart = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(math.inf)
    nearest = apart.min(dim=1).values
    print(f"a training image to its nearest other: median {float(nearest.median()):.2f}")
    shown = [torch.stack([images[labels == digit][i] for digit in range(10)]) for i in range(4)]
    rows.insert(0, ("data", torch.cat(shown)))
    _draw(rows)
    _time(net)


def _draw(rows: list[tuple[str, Tensor]]) -> None:
    """Panels of 4 rows by 10 classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 7.6), layout="constrained")
    for axes, (title, x) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        tiles = functional.pad(x[:40, 0].clamp(-1, 1), (1, 1, 1, 1), value=1.0)
        sheet = tiles.reshape(4, 10, 10, 10).permute(0, 2, 1, 3).reshape(40, 100)
        axes.imshow(sheet, cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(5, 100, 10), [str(digit) for digit in range(10)], fontsize=8)
        axes.set_yticks([])
    figure.savefig(PICTURE, dpi=100)
    print(f"{PICTURE.name}: {PICTURE.stat().st_size} bytes")


@torch.inference_mode()
def _time(net: DigitsNet) -> None:
    """CPU time of one evaluation of one image, single thread, best of 5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for batch in (64, 256, 2048):
        x, t, label = torch.randn(batch, 1, 8, 8), torch.full((batch,), 0.5), torch.arange(batch)
        best = math.inf
        for _ in range(6):
            started = time.process_time()
            for _ in range(4096 // batch):
                net(x, t, label % NULL_LABEL)
            best = min(best, (time.process_time() - started) / 4096)
        print(f"batch {batch}: {1e3 * best:.4f} ms per image and evaluation")
    torch.set_num_threads(threads)


def main() -> None:
    """Do what is named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.experiments.models.train_digits")
    parser.add_argument(
        "what", nargs="*", help="classifier, denoiser, small, card; nothing means all"
    )
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the denoiser")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    unknown = set(arguments.what) - {"classifier", "denoiser", "small", "card"}
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; use classifier, denoiser, small, card"
        )
    torch.set_num_threads(arguments.threads)
    what = arguments.what or ["classifier", "denoiser", "small", "card"]
    if "classifier" in what:
        train_classifier()
    if "denoiser" in what:
        train_denoiser(arguments.steps)
    if "small" in what:
        train_denoiser(arguments.steps, small=True)
    if "card" in what:
        card()


if __name__ == "__main__":
    main()
