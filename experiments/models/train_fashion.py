"""Train the Fashion-MNIST classifier and flow on a CPU, and draw up their card.

    python -m fewstep.experiments.models.train_fashion [classifier|flow|card ...] [--steps N]

The data come from the Debian package dataset-fashion-mnist, fetched into the assets folder when
absent. The flow minimises |F - (eps - x0)|^2; half of a batch has t uniform on [0, 1], half the
logistic of a standard normal variable (Esser et al. 2024). The label is dropped with probability
0.1. The weights kept are an exponential moving average.

The card draws --samples images at guidance 1, 2 and 4 by Heun's method, in a loop of its own, and
prints how many the classifier reads as the class asked for, and the Frechet distance of its
features to as many test images; beside it that of as many training images, the floor at this n.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import math
import time

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models.assets import fetch, read_member
from fewstep.experiments.models.fashion import (
    CLASSIFIER,
    FOLDER,
    NULL_LABEL,
    FashionClassifier,
    FashionPipeline,
    features,
    load_classifier,
    new_unet,
)
from fewstep.predictors.yardstick import frechet_distance

SEED = 0
_MEMBERS = "usr/share/datasets/fashion-mnist/{}-{}-idx{}-ubyte.gz"


def load_data(part: str = "train") -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [-1, 1] and labels (n,) of the part "train" or "t10k"."""

    def read(what: str, dimensions: int, header: int) -> Tensor:
        member = _MEMBERS.format(part, what, dimensions)
        raw = gzip.decompress(read_member("fashion", member))[header:]
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    images = read("images", 3, 16).reshape(-1, 1, 28, 28).float() / 127.5 - 1
    return images, read("labels", 1, 8).long()


def train_flow(steps: int, batch: int = 128, rate: float = 2e-3) -> None:
    """Train and write the pipeline's folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    images, labels = load_data()
    images = functional.pixel_unshuffle(images, 2)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = new_unet()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    started, mean_loss = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100)
            group["lr"] *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
        index = torch.randint(len(images), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        label = torch.where(dropped, NULL_LABEL, labels[index])
        t = torch.rand(batch, generator=generator)
        half = batch // 2
        t[:half] = torch.randn(half, generator=generator).sigmoid()
        x0, eps = images[index], torch.randn((batch, 4, 14, 14), generator=generator)
        at = t[:, None, None, None]
        v = net((1 - at) * x0 + at * eps, 1000 * t, class_labels=label).sample
        loss = (v - (eps - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, value in zip(ema.parameters(), net.parameters(), strict=True):
                kept.lerp_(value, 1 - decay)
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 200)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            spent = time.perf_counter() - started
            print(f"step {step + 1}: {spent:.0f} s, loss {mean_loss:.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
            FashionPipeline(unet=ema, scheduler=scheduler).save_pretrained(FOLDER)


def train_classifier(steps: int = 1500, batch: int = 128, rate: float = 2e-3) -> None:
    """Train and write the classifier, on images shifted by up to two pixels, with noise."""
    images, labels = load_data()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = FashionClassifier()
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        dx, dy = (int(torch.randint(-2, 3, (), generator=generator)) for _ in range(2))
        x = functional.pad(images[index], (2, 2, 2, 2), value=-1.0)
        x = x[:, :, 2 + dy : 30 + dy, 2 + dx : 30 + dx]
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        loss = functional.cross_entropy(net(x), labels[index], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    images, labels = load_data("t10k")
    with torch.inference_mode():
        right = float((net(images).argmax(1) == labels).float().mean())
    print(f"classifier: {right:.4f} of the 10,000 test images right")
    FOLDER.mkdir(exist_ok=True)
    metadata = {"network": type(net).__name__, "accuracy_test": repr(right), "seed": str(SEED)}
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, CLASSIFIER, metadata)


@torch.inference_mode()
def heun(pipe: FashionPipeline, label: Tensor, guidance: float, steps: int) -> Tensor:
    """Packed samples (B, 4, 14, 14) of the labels, by Heun's method on times uniform in t."""
    null = torch.full_like(label, NULL_LABEL)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((len(label), 4, 14, 14), generator=generator)

    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.full((len(x),), 1000 * t)
        v: Tensor = pipe.unet(x, at, class_labels=label).sample
        if guidance == 1:
            return v
        away: Tensor = pipe.unet(x, at, class_labels=null).sample
        return away + guidance * (v - away)

    times = torch.linspace(1, 0, steps + 1).tolist()
    for t, then in itertools.pairwise(times):
        v = velocity(x, t)
        end = x + (then - t) * v
        x = x + (then - t) / 2 * (v + velocity(end, then))
    return x


def card(samples: int, steps: int = 16) -> None:
    """Print how good the samples are."""
    pipe = FashionPipeline.from_pretrained(str(FOLDER), local_files_only=True)
    classifier = load_classifier()
    real, train = (
        features(functional.pixel_unshuffle(load_data(part)[0][:samples], 2))
        for part in ("t10k", "train")
    )
    floor = frechet_distance(train.double().numpy(), real.double().numpy())
    print(f"{samples} training images: Frechet distance {floor:.2f} to as many test images")
    label = torch.arange(samples) % NULL_LABEL
    for guidance in (1.0, 2.0, 4.0):
        x = torch.cat([heun(pipe, part, guidance, steps) for part in label.split(250)])
        read = classifier(functional.pixel_shuffle(x, 2)).argmax(1)
        distance = frechet_distance(features(x).double().numpy(), real.double().numpy())
        right = float((read == label).float().mean())
        print(f"guidance {guidance:g}: {right:.3f} read as their class, distance {distance:.2f}")


def main() -> None:
    """Do what is named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.experiments.models.train_fashion")
    parser.add_argument("what", nargs="*", help="classifier, flow, card; nothing means all")
    parser.add_argument("--steps", type=int, default=5000, help="training steps of the flow")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1000, help="images of the card")
    arguments = parser.parse_args()
    unknown = set(arguments.what) - {"classifier", "flow", "card"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; use classifier, flow, card")
    torch.set_num_threads(arguments.threads)
    what = arguments.what or ["classifier", "flow", "card"]
    fetch("fashion")
    if "classifier" in what:
        train_classifier()
    if "flow" in what:
        train_flow(arguments.steps)
    if "card" in what:
        card(arguments.samples)


if __name__ == "__main__":
    main()
