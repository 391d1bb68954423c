"""Train the molecule model and write `molecules.safetensors`.

The loss is the negative ELBO of masked diffusion in its time-free form (Ou et al. 2406.03736;
Zheng et al. 2409.02908, section 3): with n ~ U{1..L} masks on uniformly chosen positions,

    loss = E_n (1/n) sum over masked l of -log mu_l(x_n),

and L times it bounds -log p(x) from above. One stratified n per sequence; Muon (Jordan et al.
2024; Liu et al. 2502.16982 for the step's size) for the matrices of the blocks and AdamW for the
rest, with a short warm-up, a constant rate and a linear decay to zero over the last `--decay`
steps; exponential average of the weights. Because the rate is constant before the decay, a run
can be stopped at any checkpoint and ended there: resumed with `--steps` = the checkpoint's step +
`--decay`, it is the same run as if that number had been asked for at once.

    python -m fewstep.experiments.models.train_molecules --compile --checkpoint run.safetensors
    python -m fewstep.experiments.models.train_molecules --show            # the shipped file's run
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from fewstep.experiments.models import molecules
from fewstep.experiments.models.molecules import LENGTH, MASK, MoleculeNet, NetConfig


def masked_loss(
    net: Callable[[Tensor], Tensor], tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean over the batch of (1/n) sum of -log mu over the n masked positions; a scalar.

    Args:
        net: tokens `(B, L)` to logits `(B, L, V)`.
        tokens: clean sequences `(B, L)`.
        generator: on the device of `tokens`.
    """
    batch, length = tokens.shape
    device = tokens.device
    u = torch.rand((), generator=generator, device=device)
    strata = (torch.arange(batch, device=device) + u) / batch
    n = 1 + (strata * length).long().clamp(max=length - 1)
    keys = torch.rand(batch, length, generator=generator, device=device)
    masked = keys.argsort(-1).argsort(-1) < n[:, None]
    logits = net(torch.where(masked, MASK, tokens)).float()
    logits = logits[..., :MASK]
    loss = functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return (torch.where(masked, loss, 0.0).sum(-1) / n).mean()


def load_tokens(split: str, csv: Path | None, workers: int) -> Tensor:
    """A split's ids, uint8 `(n, 20)`; from a `.csv.gz` if named, else from the package file."""
    smiles = molecules.parse_split(csv.read_bytes()) if csv else molecules.load_smiles(split)
    with Pool(workers) as pool:
        parts = pool.map(_encode, [smiles[i::workers] for i in range(workers)])
    return torch.from_numpy(np.concatenate(parts))


def _encode(smiles: list[str]) -> NDArray[np.uint8]:
    return molecules.encode(smiles, drop=True)


def learning_rate(step: int, steps: int, decay: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `decay` steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay)


@torch.no_grad()
def bound(net: MoleculeNet, tokens: Tensor, device: str, batch: int = 512) -> float:
    """Upper bound on the mean -log p of a molecule, nats, on the given sequences."""
    generator = torch.Generator(device).manual_seed(0)
    losses = [
        masked_loss(net, part.to(device).long(), generator).item() for part in tokens.split(batch)
    ]
    return LENGTH * sum(losses) / len(losses)


class Run:
    """Everything a training run changes, and its checkpoint (safetensors: nothing is pickled)."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.step, self.seconds = args, 0, 0.0
        config = NetConfig(width=args.width, depth=args.depth, heads=args.heads)
        self.net = MoleculeNet(config).to(args.device)
        self.average = MoleculeNet(config).to(args.device)
        self.average.load_state_dict(self.net.state_dict())
        matrices = [p for p in self.net.blocks.parameters() if p.ndim == 2]
        inner = {id(p) for p in matrices}
        rest = [p for p in self.net.parameters() if id(p) not in inner]
        muon = torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [muon, adam]
        self.owners = [muon if id(p) in inner else adam for p in self.net.parameters()]
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.net) if args.compile else self.net
        )
        self.generator = torch.Generator(args.device).manual_seed(args.seed)

    def advance(self, data: Tensor) -> Tensor:
        """One optimiser step; returns the loss."""
        args = self.args
        rate = learning_rate(self.step, args.steps, args.decay, args.lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        rows = torch.randint(
            len(data), (args.batch,), generator=self.generator, device=args.device
        )
        cast = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)
        with cast:
            loss = masked_loss(self.forward, data[rows].long(), self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(args.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for old, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 1.0 - keep)
        self.step += 1
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write a checkpoint; the previous one stays until the new one is whole."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, (p, owner) in enumerate(zip(self.net.parameters(), self.owners, strict=True)):
            for key, value in owner.state.get(p, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        tensors["generator"] = self.generator.get_state()
        metadata = {"step": str(self.step), "seconds": str(self.seconds)}
        partial = path.with_suffix(".partial")
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same architecture and seed."""
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        for name, net in (("net.", self.net), ("average.", self.average)):
            part = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
            net.load_state_dict(part)
        parameters = list(self.net.parameters())
        for name in [k for k in tensors if k.startswith("optimizer.")]:
            _, i, key = name.split(".")
            p = parameters[int(i)]
            self.owners[int(i)].state[p][key] = tensors[name].to(p.device)
        self.generator.set_state(tensors["generator"])


def train(args: argparse.Namespace) -> None:
    """Run the training that `args` describes and write the file."""
    run = Run(args)
    if args.checkpoint and args.checkpoint.exists():
        run.load(args.checkpoint)
    data = load_tokens("train", args.csv, args.workers)
    held, data = data[: args.held], data[args.held :].to(args.device)
    print(f"data {tuple(data.shape)}, from step {run.step}", flush=True)
    earlier, began = run.seconds, time.monotonic()
    total, count = 0.0, 0
    while run.step < args.steps:
        total, count = total + run.advance(data).item(), count + 1
        run.seconds = earlier + time.monotonic() - began
        if run.step % 250 == 0 or run.step == args.steps:
            print(f"step {run.step} loss {total / count:.4f} {run.seconds:.0f} s", flush=True)
            total, count = 0.0, 0
            if args.checkpoint:
                run.save(args.checkpoint)
    run.average.eval()
    training: dict[str, object] = {
        "script": "experiments/models/train_molecules.py", "data": "molsets==0.3.1 train",
        "seed": args.seed, "steps": args.steps, "decay": args.decay, "batch": args.batch,
        "optimizer": "muon", "lr": args.lr, "ema": args.ema, "held_out": args.held,
        "seconds": round(run.seconds),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__, "bound_nats": bound(run.average, held, args.device),
    }  # fmt: skip
    molecules.save_net(run.average, args.out, training)
    print(json.dumps(training), f"\n{args.out}: {args.out.stat().st_size} bytes")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="train the molecule model")
    parser.add_argument("--steps", type=int, default=10000, help="optimiser steps in all")
    parser.add_argument("--decay", type=int, default=3000, help="last steps, decaying to zero")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--width", type=int, default=NetConfig().width)
    parser.add_argument("--depth", type=int, default=NetConfig().depth)
    parser.add_argument("--heads", type=int, default=NetConfig().heads)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held", type=int, default=16384, help="molecules held out of training")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize")
    parser.add_argument("--threads", type=int, default=0, help="of the network; 0: all")
    parser.add_argument("--csv", type=Path, help="train.csv.gz, if not in the package file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a compiler")
    parser.add_argument("--checkpoint", type=Path, help="written every 250 steps, resumed from")
    parser.add_argument("--out", type=Path, default=molecules.WEIGHTS)
    parser.add_argument("--show", action="store_true", help="print the metadata of --out")
    args = parser.parse_args()
    if args.show:
        with safe_open(args.out, framework="pt") as file:
            print(json.dumps(json.loads(file.metadata()["training"]), indent=1))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
