"""Weighted particles on the digits model: products of two classes, and guided classes.

    python -m fewstep.experiments.benchmarks.particles_digits --picture digits_particles.png

A product q_i q_j asks for images that both class models find likely; guidance w for what
classifier-free guidance aims at, q^{1-w} q_class^w. Each is drawn without weights (drift only) and
with, one sample from each of P independent populations of K particles, and judged by the
classifier shipped with the model, which took no part in drawing. Diversity is the root mean
square distance per pixel between samples of the same pair or class. Cost per sample: K x calls x
2 models.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from fewstep.experiments.models.digits import NOISE, NULL_LABEL, load_classifier, problem
from fewstep.samplers.particles import Particles, sample_particles, start_particles
from fewstep.samplers.targets import Factor, Target, guidance, product
from fewstep.space.baselines import grid
from fewstep.space.particles import ParticleSchedule

PAIRS = ((3, 8), (4, 9), (1, 7))
METHODS = ("drift only", "every step", "ESS < .5", "ESS < .5, t .1 to .9")


def schedule(method: str, steps: int, zeta: float) -> ParticleSchedule:
    """The four policies compared; all with the exponential integrator."""
    rule = {"drift only": "never", "every step": "always"}.get(method, "ess")
    weight = "none" if method == "drift only" else "trapezoid"
    times = grid(NOISE, steps, "logsnr")
    s = ParticleSchedule.uniform(NOISE, times, zeta=zeta, resample=rule, weight=weight)
    return s.window(0.9, 0.1) if method.endswith(".9") else s


def draw(
    s: ParticleSchedule, target: Target, P: int, K: int, seed: int
) -> tuple[Tensor, Particles]:
    """One sample of each population, shape (P, 1, 8, 8), and the populations."""
    generator = torch.Generator().manual_seed(seed)
    x_T = start_particles(s, target, torch.randn(P, K, 1, 8, 8, generator=generator))
    found = sample_particles(s, target, x_T, generator=generator)
    return found.draw(1, generator)[:, 0], found


def spread(x: Tensor) -> float:
    """Root mean square distance per pixel between different samples (n, 1, 8, 8)."""
    flat = x.flatten(1)
    square = torch.cdist(flat, flat).square().sum() / (len(x) * (len(x) - 1))
    return math.sqrt(float(square) / flat.shape[1])


def mean_interval(values: Tensor) -> str:
    """Mean and 95 % interval."""
    values = values.double()
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    return f"{float(values.mean()):.3f} ± {half:.3f}"


def products(a: argparse.Namespace) -> list[Tensor]:
    """Products of two classes; one row of pictures per method."""
    denoiser, judge = problem().denoiser, load_classifier()
    print("| product | zeta | top two are the pair | min(p_i, p_j) | log p_i p_j | diversity "
          "| ESS | ancestors |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    rows = []
    for zeta in a.zeta:
        for method in METHODS:
            s, samples, found = schedule(method, a.steps, zeta), [], []
            for i, j in PAIRS:
                pair = [Factor(denoiser, cond={"label": torch.tensor([k])}) for k in (i, j)]
                x, r = draw(s, product(*pair), a.populations, a.particles, a.seed + 10 * i + j)
                samples.append(x)
                found.append(r)
            logits = [torch.log_softmax(judge(x), 1) for x in samples]
            both = torch.cat([q[:, list(p)] for q, p in zip(logits, PAIRS, strict=True)])
            top = torch.cat([
                (q.topk(2, dim=1).indices.sort(1).values == torch.tensor(p)).all(1)
                for q, p in zip(logits, PAIRS, strict=True)
            ])  # fmt: skip
            away = sum(spread(x) for x in samples) / len(samples)
            ess = sum(float(r.ess.amin(0).mean()) for r in found) / len(found)
            alive = sum(float(r.unique_ancestors.double().mean()) for r in found) / len(found)
            print(f"| {method} | {zeta:g} | {mean_interval(top)} "
                  f"| {mean_interval(both.amin(1).exp())} | {mean_interval(both.sum(1))} "
                  f"| {away:.3f} | {ess:.2f} | {alive:.1f} |", flush=True)  # fmt: skip
            if zeta == a.zeta[0]:
                rows.append(torch.cat([x[: 24 // len(PAIRS)] for x in samples]))
    return rows


def guided(a: argparse.Namespace) -> list[Tensor]:
    """Guided classes; one row of pictures per method."""
    denoiser, judge = problem().denoiser, load_classifier()
    print(f"\n| guidance {a.guidance:g} | zeta | read as the class | log p of the class "
          "| diversity | ESS | ancestors |\n|---|---|---|---|---|---|---|")  # fmt: skip
    rows = []
    labels = torch.arange(a.populations) % 10
    null = Factor(denoiser, cond={"label": torch.tensor([NULL_LABEL])})
    target = guidance(null, Factor(denoiser, cond={"label": labels}), a.guidance)
    for zeta in a.zeta:
        for method in METHODS:
            x, r = draw(schedule(method, a.steps, zeta), target, len(labels), a.particles, a.seed)
            log_p = torch.log_softmax(judge(x), 1)
            right, own = log_p.argmax(1) == labels, log_p[torch.arange(len(x)), labels]
            away = sum(spread(x[labels == k]) for k in range(10)) / 10
            alive = float(r.unique_ancestors.double().mean())
            print(f"| {method} | {zeta:g} | {mean_interval(right)} | {mean_interval(own)} "
                  f"| {away:.3f} | {float(r.ess.amin(0).mean()):.2f} "
                  f"| {alive:.1f} |", flush=True)  # fmt: skip
            if zeta == a.zeta[0]:
                rows.append(x[:24])
    return rows


def picture(path: Path, sheets: dict[str, list[Tensor]]) -> None:
    """Two contact sheets, one row per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(sheets), 1, figsize=(12, 2.6 * len(sheets)))
    for axis, (title, rows) in zip(axes, sheets.items(), strict=True):
        lines = [torch.nn.functional.pad(r[:, 0], (1, 0, 1, 0), value=-1) for r in rows]
        image = torch.cat([torch.cat(list(line), dim=1) for line in lines], dim=0)
        axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_yticks([4 + 9 * i for i in range(len(rows))], METHODS, fontsize=7)
        axis.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--populations", type=int, default=40)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--zeta", type=float, nargs="+", default=[1.0])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    print(f"K {a.particles}, {a.populations} populations, {a.steps} calls, seed {a.seed}\n")
    with torch.no_grad():
        one, two = products(a), guided(a)
    if a.picture is not None:
        pairs = ", ".join(f"{i}x{j}" for i, j in PAIRS)
        labels = f"guidance {a.guidance:g}, classes 0 1 2 ... 9 0 1 ..."
        picture(a.picture, {f"products {pairs}; eight samples each": one, labels: two})


if __name__ == "__main__":
    main()
