r"""A small masked diffusion model of molecules: MOSES SMILES, 24 tokens, at most 54 of them.

Tokens are the matches of `\[[^\]]+\]|Br|Cl|.`; a molecule is padded to 54 with PAD, an ordinary
token of the model, and is read up to its first PAD. MASK is the last id and is never predicted.
The network is a bidirectional transformer without a time input (the optimal prediction given the
visible tokens does not depend on the time, Ou et al. 2406.03736 and Zheng et al. 2409.02908), and
returns raw logits; "SUBS" of MDLM (Sahoo et al. 2406.07524, section 3.2.3: no probability on
the mask, visible tokens carry over) is applied by `fewstep.samplers.masked.from_subs`.

The weights are trained by `train_molecules.py` and shipped beside this file, in half precision
with the architecture and the training run in the file's metadata.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models.assets import read_member

__all__ = [
    "LENGTH",
    "MASK",
    "PAD",
    "TOKENS",
    "VOCABULARY",
    "WEIGHTS",
    "MoleculeNet",
    "NetConfig",
    "decode",
    "encode",
    "load_net",
    "load_smiles",
    "save_net",
    "tokenize",
]

TOKENS: tuple[str, ...] = (
    "#", "(", ")", "-", "1", "2", "3", "4", "5", "6", "=", "Br", "C", "Cl", "F", "N", "O", "S",
    "[H]", "[nH]", "c", "n", "o", "s",
)  # fmt: skip
PAD = len(TOKENS)
MASK = PAD + 1
VOCABULARY = MASK + 1
LENGTH = 54
WEIGHTS = Path(__file__).with_name("molecules.safetensors")

_PATTERN = re.compile(r"\[[^\]]+\]|Br|Cl|.")
_IDS = {token: index for index, token in enumerate(TOKENS)}


def load_smiles(split: str) -> list[str]:
    """The SMILES of one MOSES split, in file order.

    Args:
        split: `train` (1,584,663 molecules), `test` (176,074) or `test_scaffolds` (176,225).

    Raises:
        AssetError: the pinned package file is absent; the message says how to fetch it.
    """
    return parse_split(read_member("molsets", f"moses/dataset/data/{split}.csv.gz"))


def parse_split(data: bytes) -> list[str]:
    """The first column of a gzipped CSV file, without its header line."""
    lines = gzip.decompress(data).decode("ascii").splitlines()
    return [line.split(",", 1)[0] for line in lines[1:] if line]


def tokenize(smiles: str) -> list[int]:
    """Token ids of a SMILES string.

    Raises:
        ValueError: a token the model does not know.
    """
    try:
        return [_IDS[token] for token in _PATTERN.findall(smiles)]
    except KeyError as error:
        raise ValueError(f"token {error} of {smiles!r} is not in the vocabulary") from None


def encode(molecules: Iterable[str]) -> NDArray[np.uint8]:
    """SMILES to ids, PAD-filled, with shape `(n, 54)`.

    Raises:
        ValueError: an unknown token, or a molecule of more than 54 tokens.
    """
    rows = []
    for smiles in molecules:
        ids = tokenize(smiles)
        if len(ids) > LENGTH:
            raise ValueError(f"{smiles!r} has {len(ids)} tokens; the model holds {LENGTH}")
        rows.append(bytes(ids) + bytes([PAD]) * (LENGTH - len(ids)))
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, LENGTH).copy()


def decode(tokens: Tensor | NDArray[np.integer] | Sequence[Sequence[int]]) -> list[str]:
    """Ids of shape `(n, length)` to SMILES, each read up to its first PAD.

    `decode(encode(s)) == s`. The result need not be a valid molecule.

    Raises:
        ValueError: a mask is left.
    """
    result = []
    for row in np.asarray(tokens).tolist():
        ids = row[: row.index(PAD)] if PAD in row else row
        if MASK in ids:
            raise ValueError("a sequence still holds masks; sample to the end before decoding")
        result.append("".join(TOKENS[i] for i in ids))
    return result


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """Size of the transformer; `width` is divisible by `heads`, the quotient is even."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    expansion: int = 4
    vocabulary: int = VOCABULARY
    length: int = LENGTH


class MoleculeNet(nn.Module):
    """Bidirectional pre-norm transformer, rotary and learned absolute positions, squared ReLU.

    Called with ids of shape `(B, L)`, `L <= config.length`; returns logits `(B, L, V)`, float32
    or the autocast type. There is no time input.
    """

    def __init__(self, config: NetConfig) -> None:
        """Build with random weights."""
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.place = nn.Embedding(config.length, config.width)
        self.count = nn.Linear(4 * config.vocabulary, config.width, bias=False)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)
        half = config.width // config.heads // 2
        rates = 100.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(config.length, dtype=torch.float32)[:, None] * rates
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.place.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(B, L, V)` of tokens `(B, L)`."""
        length = tokens.shape[1]
        counts = self.count(_counts(tokens, self.config.vocabulary))
        y = self.embed(tokens) + self.place.weight[:length] + counts
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        for block in self.blocks:
            y = block(y, cos, sin)
        logits: Tensor = self.head(self.norm(y))
        return logits


def _counts(tokens: Tensor, vocabulary: int) -> Tensor:
    """How often each token stands to the left and right of a position, and the parity of that.

    Brackets must balance and ring digits come in pairs: counts say so at once, attention would
    have to learn to count. Masks are counted too. Shape `(B, L, 4 V)`.
    """
    ones = functional.one_hot(tokens, vocabulary).float()
    left = ones.cumsum(1) - ones
    right = ones.sum(1, keepdim=True) - left - ones
    both = torch.cat([left, right], -1)
    return torch.cat([both / 4, 1 - 2 * both.remainder(2)], -1)


class _Block(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        width, inner = config.width, config.expansion * config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down_out = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.mix_out.weight)
        nn.init.zeros_(self.down_out.weight)

    def forward(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = y.shape
        qkv = self.qkv(self.norm1(y)).view(batch, length, 3, self.heads, -1).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        y = y + self.mix_out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = y + self.down_out(functional.relu(self.up(self.norm2(y))).square())
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2104.09864): halves of the head are the pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def save_net(net: MoleculeNet, path: Path, training: dict[str, object]) -> None:
    """Write weights in float16, with architecture and training run as metadata."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().half() for name, value in net.state_dict().items()}
    metadata = {"format": "fewstep.molecules", "version": "1", "tokens": " ".join(TOKENS)}
    metadata |= {"config": json.dumps(asdict(net.config)), "training": json.dumps(training)}
    save_file(state, path, metadata=metadata)


def load_net(path: Path | str = WEIGHTS, *, device: str = "cpu") -> MoleculeNet:
    """The trained network, float32, in evaluation mode.

    Raises:
        ValueError: the file is not such a network, or was trained on other tokens.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != "fewstep.molecules" or metadata.get("version") != "1":
            raise ValueError(f"{path} is not a version 1 molecule network")
        if metadata["tokens"] != " ".join(TOKENS):
            raise ValueError(f"{path} was trained on other tokens")
        net = MoleculeNet(NetConfig(**json.loads(metadata["config"])))
        net.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
    return net.to(device).eval()
