"""How good generated molecules are: validity, uniqueness, novelty, Frechet ChemNet Distance.

    validity    share of strings that rdkit reads as a molecule
    uniqueness  share of distinct molecules (canonical SMILES) among the valid ones
    novelty     share of those that are not in the MOSES training set
    FCD         |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2}), of ChemNet's 512 features of
                the valid molecules against the MOSES test set
    excess FCD  FCD less that of as many draws of the test set's Gaussian

FCD depends on the number of valid molecules: 2000 training molecules score 0.62 for being so few,
350 score 4.0. Compare it at equal numbers only. Schedules differ in how many strings are valid, so
a search compares the excess, which is the same for 350 as for 3000 molecules within 0.2 (training
molecules: 0.2 and 0.03; the floor itself varies by 0.02; cf. Chong and Forsyth 1911.07023).

ChemNet is read from the pinned `fcd_torch` wheel, the reference statistics ship beside the model
as plain arrays (`--reference` makes them again from the pinned `molsets` wheel). Needs the extra
`fewstep[molecules]` (rdkit).

    python -m fewstep.experiments.benchmarks.metrics_molecules molecules.smi
    python -m fewstep.experiments.benchmarks.metrics_molecules --draw 2000     # the shipped model
    python -m fewstep.experiments.benchmarks.metrics_molecules --train 2000  # the floor at 2000
    python -m fewstep.experiments.benchmarks.metrics_molecules --reference

References:
    Polykovskiy et al. 1811.12823 (MOSES); Preuer et al. 1803.09518 (FCD).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models import molecules
from fewstep.experiments.models.assets import AssetError, read_member
from fewstep.samplers import from_subs, sample_masked, start_masked
from fewstep.space.masked import MaskedSchedule

__all__ = [
    "MoleculeScore",
    "Scores",
    "canonical",
    "chemnet_features",
    "fcd",
    "fcd_floor",
    "frechet",
    "reference",
    "score",
]

REFERENCE = Path(molecules.__file__).with_name("moses_test_fcd.safetensors")
_SYMBOLS = (
    "C", "N", "O", "H", "F", "Cl", "P", "B", "Br", "S", "I", "Si", "#", "(", ")", "+", "-",
    "1", "2", "3", "4", "5", "6", "7", "8", "=", "[", "]", "@", "c", "n", "o", "s", "X", ".",
)  # fmt: skip
_INDEX = {symbol: i for i, symbol in enumerate(_SYMBOLS)}
_PADDED = 350


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of `n` generated strings; shares in 0..1, `fcd` >= 0 (lower is better)."""

    n: int
    validity: float
    uniqueness: float
    novelty: float
    fcd: float

    def __str__(self) -> str:
        shares = f"valid {self.validity:.4f} unique {self.uniqueness:.4f} new {self.novelty:.4f}"
        return f"n {self.n} {shares} FCD {self.fcd:.3f}"


def canonical(smiles: Sequence[str]) -> list[str | None]:
    """Canonical SMILES, None where rdkit reads no molecule (an empty string is none)."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise AssetError("rdkit is missing: pip install 'fewstep[molecules]'") from None
    logger: Any = RDLogger  # its stubs do not know the function
    logger.DisableLog("rdApp.*")
    read = (Chem.MolFromSmiles(s) if s else None for s in smiles)
    return [None if molecule is None else Chem.MolToSmiles(molecule) for molecule in read]


# kind, (weights, sizes, options), as the file lists them
_Layer = tuple[str, tuple[dict[str, Tensor], dict[str, int], dict[str, object]]]


class _ChemNet(nn.Module):
    """ChemNet without its last layer: convolutions, then LSTMs over the symbols of a SMILES."""

    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__()
        self.layers, self.options = nn.ModuleList(), []
        for kind, (state, sizes, options) in layers:
            layer = {"Conv1d": nn.Conv1d, "LSTM": nn.LSTM}[kind](**sizes)
            layer.load_state_dict(state)
            self.layers.append(layer)
            self.options.append(options)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(n, 512)` of one-hot symbols `(n, length, 35)`."""
        for layer, options in zip(self.layers, self.options, strict=True):
            if isinstance(layer, nn.Conv1d):
                size, stride = layer.kernel_size[0], layer.stride[0]
                pad = max(size - (x.shape[1] % stride or stride), 0)  # "same"
                pads = (pad // stride, pad // stride if pad % stride == 0 else pad - pad // stride)
                x = functional.pad(x.transpose(1, 2), pads)
                x = getattr(functional, str(options["activation"]))(layer(x)).transpose(1, 2)
            else:
                x = layer(x.flip(1) if options["reverse"] else x)[0]
                x = x[:, -1] if options["last"] else x
        return x


@functools.cache
def _chemnet() -> _ChemNet:
    data = read_member("fcd_torch", "fcd_torch/ChemNet_v0.13_pretrained.pt")
    return _ChemNet(torch.load(io.BytesIO(data), weights_only=True)).eval()


def _one_hot(smiles: str) -> Tensor:
    rows = torch.zeros(_PADDED, len(_SYMBOLS))
    ids, at = [], 0
    while at < len(smiles):
        size = 2 if smiles[at + 1 : at + 2] in ("r", "i", "l") else 1
        ids.append(_INDEX.get(smiles[at : at + size], _INDEX["X"]))
        at += size
    ids = [*ids[: _PADDED - 1], _INDEX["."]]
    rows[torch.arange(len(ids)), torch.tensor(ids)] = 1 / len(_SYMBOLS)
    return rows


@torch.no_grad()
def chemnet_features(smiles: Sequence[str], *, batch: int = 256, device: str = "cpu") -> Tensor:
    """ChemNet features of canonical SMILES, float64 `(n, 512)`.

    Raises:
        AssetError: the pinned `fcd_torch` wheel is absent.
    """
    net = _chemnet().to(device)
    parts = []
    for i in range(0, len(smiles), batch):
        rows = torch.stack([_one_hot(s) for s in smiles[i : i + batch]])
        parts.append(net(rows.to(device)).double().cpu())
    return torch.cat(parts) if parts else torch.empty(0, 512, dtype=torch.float64)


def frechet(mu_1: Tensor, cov_1: Tensor, mu_2: Tensor, cov_2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians; float64, covariances `(d, d)`.

    tr (C_1 C_2)^{1/2} is the sum of the roots of the eigenvalues of C_1^{1/2} C_2 C_1^{1/2}.
    """
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu_1 - mu_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return float(distance)


def fcd_floor(count: int) -> float:
    """FCD that `count` >= 2 draws of the test set's Gaussian have for being so few.

    It is nearly proportional to 1 / count: the product is interpolated between powers of 2.
    """
    low = 1 << (count.bit_length() - 1)
    share = math.log2(count / low)
    return ((1 - share) * low * _fcd_drawn(low) + share * 2 * low * _fcd_drawn(2 * low)) / count


@functools.cache
def _fcd_drawn(count: int) -> float:
    """FCD of one draw of so many."""
    mu, sigma = reference()
    values, vectors = torch.linalg.eigh(sigma)
    root = vectors * values.clamp(min=0).sqrt()
    z = torch.randn(
        count, len(mu), generator=torch.Generator().manual_seed(count), dtype=torch.float64
    )
    return fcd(mu + z @ root.T)


@functools.cache
def reference() -> tuple[Tensor, Tensor]:
    """Mean `(512,)` and covariance `(512, 512)` of ChemNet's features of the MOSES test set."""
    arrays = load_file(REFERENCE)
    return arrays["mu"], arrays["sigma"]


def fcd(features: Tensor) -> float:
    """Frechet ChemNet Distance of features `(n, 512)`, n >= 2, to the MOSES test set."""
    mu, sigma = reference()
    return frechet(features.mean(0), features.T.cov(), mu, sigma)


def score(smiles: Sequence[str], *, known: Collection[str] = (), device: str = "cpu") -> Scores:
    """All scores of generated strings.

    Args:
        smiles: at least one string.
        known: canonical SMILES of the training set; empty: novelty is 1.
        device: where ChemNet runs.

    Returns:
        Scores; FCD is inf when fewer than two strings are valid.
    """
    valid = [s for s in canonical(smiles) if s is not None]
    distinct = set(valid)
    features = chemnet_features(valid, device=device)
    return Scores(
        n=len(smiles),
        validity=len(valid) / len(smiles),
        uniqueness=len(distinct) / max(1, len(valid)),
        novelty=sum(s not in known for s in distinct) / max(1, len(distinct)),
        fcd=fcd(features) if len(valid) > 1 else float("inf"),
    )


class MoleculeScore:
    """What a search of schedules measures, and how it scores them.

    A molecule's measures are its 512 features and two numbers that tell molecules apart (24 bits
    each of a hash of its canonical SMILES, exact in float32); a string that is none has NaN.

    Args:
        device: where ChemNet runs.

    Raises:
        AssetError: rdkit or the pinned `fcd_torch` wheel is absent.
    """

    def __init__(self, device: str = "cpu") -> None:
        canonical(["C"])
        self._device = device
        _chemnet()

    def measure(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> measures (B, 514), float64."""
        smiles = canonical(molecules.decode(tokens.cpu()))
        at = [i for i, s in enumerate(smiles) if s is not None]
        valid = [s for s in smiles if s is not None]
        rows = torch.full((len(smiles), 514), float("nan"), dtype=torch.float64)
        if valid:
            features = chemnet_features(valid, device=self._device).cpu()
            names = [hashlib.sha256(s.encode()).digest() for s in valid]
            marks = [[int.from_bytes(d[:3]), int.from_bytes(d[3:6])] for d in names]
            rows[at] = torch.cat([features, torch.tensor(marks, dtype=torch.float64)], dim=1)
        return rows

    def distance(self, measures: NDArray[np.float64]) -> float:
        """Excess FCD of the molecules whose measures these are, (N, 514), N >= 2."""
        return fcd(torch.from_numpy(measures[:, :512])) - fcd_floor(len(measures))

    def facts(self, measures: NDArray[np.float64]) -> dict[str, float]:
        """FCD, validity and uniqueness of all strings' measures (N, 514)."""
        valid = measures[~np.isnan(measures[:, 0])]
        distinct = len(np.unique(valid[:, 512:], axis=0))
        return {
            "fcd": fcd(torch.from_numpy(valid[:, :512])) if len(valid) > 1 else float("inf"),
            "validity": len(valid) / len(measures),
            "uniqueness": distinct / max(1, len(valid)),
        }

    def picture(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> drawings (B, 150, 150, 3) in 0..1; blank where there is none."""
        from rdkit import Chem
        from rdkit.Chem import Draw

        to_image: Any = Draw.MolToImage  # its stubs do not type it
        drawn = []
        for smiles in canonical(molecules.decode(tokens.cpu())):
            picture = to_image(Chem.MolFromSmiles(smiles or ""), size=(150, 150))
            drawn.append(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
        return torch.from_numpy(np.stack(drawn))


def draw_molecules(
    samples: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    positions: str = "uniform",
    batch: int = 64,
) -> list[str]:
    """SMILES strings of the shipped model, drawn token by token.

    At temperature 1 and uniform positions their law is the model's exactly; below it, or where the
    model is surest first ("confidence"), they are likelier and less diverse.
    """
    denoiser = from_subs(molecules.load_net(), molecules.MASK, length=molecules.LENGTH)
    counts = [1] * molecules.LENGTH
    schedule = MaskedSchedule.from_counts(counts, temperature=temperature, positions=positions)
    generator = torch.Generator().manual_seed(seed)
    strings: list[str] = []
    while len(strings) < samples:
        size = min(batch, samples - len(strings))
        blank = start_masked(denoiser, size, molecules.LENGTH)
        strings += molecules.decode(sample_masked(schedule, denoiser, blank, generator=generator))
    return strings


def write_reference() -> None:
    """Read the statistics that MOSES ships (a pickled dict, hence the pinned file) as arrays."""
    data = read_member("molsets", "moses/dataset/data/test_stats.npz")
    with np.load(io.BytesIO(data), allow_pickle=True) as file:
        statistics = file["stats"].item()["FCD"]
    arrays = {
        k: torch.as_tensor(np.asarray(statistics[k], dtype=np.float64)) for k in ("mu", "sigma")
    }
    save_file(arrays, REFERENCE, metadata={"source": "molsets==0.3.1 test_stats.npz, FCD"})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="score generated molecules")
    parser.add_argument("file", nargs="?", type=Path, help="one SMILES a line")
    parser.add_argument("--train", type=int, help="score so many training molecules")
    parser.add_argument("--draw", type=int, help="score so many of the model, token by token")
    parser.add_argument("--seed", type=int, default=0, help="of --draw")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --draw; 1: exact")
    parser.add_argument(
        "--positions", choices=["uniform", "confidence"], default="uniform",
        help="which token --draw decides next; uniform: exact",
    )  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="write the reference again")
    args = parser.parse_args()
    if args.reference:
        write_reference()
        print(REFERENCE.name, {k: tuple(v.shape) for k, v in load_file(REFERENCE).items()})
        return
    known = molecules.load_smiles("train")
    if args.train:
        chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
        smiles = [known[i] for i in chosen[: args.train].tolist()]
    elif args.draw:
        choices = {"temperature": args.temperature, "positions": args.positions}
        smiles = draw_molecules(args.draw, seed=args.seed, **choices)
    elif args.file:
        smiles = args.file.read_text(encoding="utf-8").splitlines()
    else:
        parser.error("name a file, --draw, --train or --reference")
    print(score(smiles, known=set(known)))


if __name__ == "__main__":
    try:
        main()
    except AssetError as error:
        sys.exit(f"error: {error}")
