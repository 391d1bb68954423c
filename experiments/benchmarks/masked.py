"""Masked diffusion, measured: first hitting against ancestral sampling, and the precision fault.

    python -m fewstep.experiments.benchmarks.masked time                     # the molecule model
    python -m fewstep.experiments.benchmarks.masked time --vocabulary 50257  # a stand-in network
    python -m fewstep.experiments.benchmarks.masked precision
    python -m fewstep.experiments.benchmarks.masked curve                    # the molecule model
    python -m fewstep.experiments.benchmarks.masked counts                   # of its curve

`time` runs, one after the other on the same network, batch and machine: first hitting token by
token; ancestral sampling with the network asked at every step; the same cached (asked only after
a change), each drawing tokens for all masked positions at every step as published samplers do
(V L work a step), and once with the decision "unmask?" drawn first. It prints seconds, network
calls, the ratio to first hitting and the share of the time spent outside the network.

`precision` prints what float32 Gumbels do to ancestral sampling of a Zipf law, in closed form
(`ancestral.truncated_law`): the rate of unmasking and the entropy of what is drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from fewstep.experiments.benchmarks.ancestral import Sampling, ancestral, truncated_law
from fewstep.experiments.models import molecules
from fewstep.samplers import fingerprint, from_subs, sample_masked
from fewstep.samplers.curve import cross_entropy_curve, load_curve, save_curve
from fewstep.space.counts import COUNTS, best_counts, counts_by_name, counts_cost
from fewstep.space.masked import MaskedSchedule


class CallClock:
    """A network with a stopwatch: seconds inside, and calls."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        self.net, self.seconds, self.calls = net, 0.0, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """The network's logits."""
        _wait(tokens.device)
        began = time.perf_counter()
        logits = self.net(tokens)
        _wait(tokens.device)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return logits


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(net: Callable[[Tensor], Tensor], mask: int, run: Callable[..., Tensor]) -> list[float]:
    """Seconds, network calls, share of time outside the network, of one run."""
    clock = CallClock(net)
    began = time.perf_counter()
    run(from_subs(clock, mask)).sum().item()
    seconds = time.perf_counter() - began
    return [seconds, clock.calls, 1 - clock.seconds / seconds]


def show_time(args: argparse.Namespace) -> None:
    """Print the table of seconds and ratios."""
    if args.vocabulary:
        config = molecules.NetConfig(
            vocabulary=args.vocabulary + 1,
            length=args.length,
            width=64,
            heads=2,
            depth=2,
            counted=False,
        )
        net, length = molecules.MoleculeNet(config).eval().to(args.device), args.length
    else:
        net, length = molecules.load_net(args.weights, device=args.device), molecules.LENGTH
    mask = net.config.vocabulary - 1
    start = torch.full((args.batch, length), mask, device=args.device)
    print(f"V {mask}, L {length}, batch {args.batch}, {sum(p.numel() for p in net.parameters())} "
          f"parameters, {args.device}, {torch.get_num_threads()} threads")  # fmt: skip
    exact = MaskedSchedule.token_by_token(length)
    generator = torch.Generator().manual_seed(0)
    hitting = functools.partial(sample_masked, exact, generator=generator)
    with torch.no_grad():
        net(start)
        base, calls, outside = measure(net, mask, lambda d: hitting(d, start))
        print("| sampler | steps | seconds | calls | ratio | outside the network |")
        print("|---|---|---|---|---|---|")
        print(f"| first hitting | {length} | {base:.2f} | {calls} | 1 | {outside:.0%} |")
        source = torch.Generator(args.device).manual_seed(0)
        kinds: list[tuple[str, bool, Sampling]] = [
            ("ancestral", False, "categorical"),
            ("cached", True, "categorical"),
            ("cached, decided first", True, "two_stage"),
        ]
        for name, cached, sampling in kinds[0 if args.uncached else 1 :]:
            for steps in args.steps:
                run = functools.partial(
                    ancestral, cached=cached, sampling=sampling, generator=source
                )
                one = measure(net, mask, lambda d, n=steps, run=run: run(d, start, n))
                print(f"| {name} | {steps} | {one[0]:.2f} | {one[1]} | {one[0] / base:.1f} "
                      f"| {one[2]:.0%} |", flush=True)  # fmt: skip


def show_precision(args: argparse.Namespace) -> None:
    """Print unmasking rate and entropy of a Zipf law under float32 Gumbels, first step."""
    zipf = 1 / torch.arange(1, args.vocabulary + 1, dtype=torch.float64)
    zipf /= zipf.sum()
    true = float(torch.special.entr(zipf).sum())
    print(f"V {args.vocabulary}, true entropy {true:.2f} nats (two-stage and float64: this)")
    print("| steps | p* | unmask rate / nominal | entropy |\n|---|---|---|---|")
    for steps in args.steps:
        joint = torch.cat([zipf / steps, zipf.new_tensor([1 - 1 / steps])])
        law = truncated_law(joint, 24 * math.log(2))[:-1]
        rate = float(law.sum())
        entropy = float(torch.special.entr(law / rate).sum())
        print(f"| {steps} | {steps / 2**24:.1e} | {rate * steps:.2f} | {entropy:.2f} |")


def measure_curve(args: argparse.Namespace) -> None:
    """Measure the molecule model's cross-entropy curve on MOSES test molecules, and write it."""
    net = molecules.load_net(args.weights, device=args.device)
    chosen = molecules.load_smiles("test")[: args.samples]
    tokens = torch.from_numpy(molecules.encode(chosen, drop=True)).long().to(args.device)
    with Progress() as bar:
        task = bar.add_task("cross-entropy curve", total=None)
        curve = cross_entropy_curve(
            from_subs(net, molecules.MASK), tokens, batch=256,
            generator=torch.Generator().manual_seed(0),
            on_progress=lambda i, n: bar.update(task, completed=i, total=n),
        )  # fmt: skip
    curve = dataclasses.replace(curve, model=fingerprint(net, "molecules"))
    save_curve(curve, molecules.CURVE)
    show_counts()


def show_counts() -> None:
    """Print the expected divergence (nats a molecule) of the counts by dynamic programming.

    And by how much the named counts exceed it, with a 95 % interval that takes the points of the
    curve for independent. They share their molecules, so the interval is too wide if anything.
    """
    curve, length = load_curve(molecules.CURVE), molecules.LENGTH
    print(" ".join(f"{v:.3f}" for v in curve.values), f"nats, {curve.samples} molecules")
    print(f"| calls | dp | its counts | {' | '.join(COUNTS)} |\n|{'---|' * (len(COUNTS) + 3)}")
    every = best_counts(curve.falling)
    for calls in (2, 4, 8, 12, 16):
        dp = every[calls - 1]
        cells = [f"{counts_cost(curve.values, dp) - sum(curve.values):.3f}"]
        cells.append(" ".join(map(str, dp)))
        for name in COUNTS:
            gap = _weights(counts_by_name(name, length, calls)) - _weights(dp)
            half = 1.96 * float(np.linalg.norm(gap * curve.errors))
            cells.append(f"{gap @ curve.values:.3f} ± {half:.3f}")
        print(f"| {calls} | {' | '.join(cells)} |")


def _weights(counts: tuple[int, ...]) -> np.ndarray:
    """How often h(m) counts in the sum that `counts_cost` takes."""
    weights = np.zeros(sum(counts))
    weights[np.cumsum([0, *counts[:-1]])] = counts
    return weights


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="measure masked samplers")
    parser.add_argument("what", choices=["time", "precision", "curve", "counts"])
    parser.add_argument("--samples", type=int, default=4000, help="molecules for the curve")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=0, help="stand-in network of so many")
    parser.add_argument("--length", type=int, default=32, help="of the stand-in's sequences")
    parser.add_argument("--weights", default=molecules.WEIGHTS, help="of the molecule model")
    parser.add_argument(
        "--uncached", action=argparse.BooleanOptionalAction, default=True, help="the first of them"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.what == "curve":
        measure_curve(args)
    elif args.what == "counts":
        show_counts()
    elif args.what == "time":
        args.steps = args.steps or [256, 1024, 2048, 10_000]
        show_time(args)
    else:
        args.steps = args.steps or [128, 1024, 2048, 10_000, 50_000]
        args.vocabulary = args.vocabulary or 50_257
        show_precision(args)


if __name__ == "__main__":
    main()
