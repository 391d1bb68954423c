r"""A small masked diffusion model of molecules: MOSES SMILES as at most 20 pieces.

SMILES are cut by `\[[^\]]+\]|Br|Cl|.` into 24 tokens (13 to 54 a molecule), then the 230 most
frequent neighbours are joined, one pair after the other (byte-pair encoding; on SMILES: Li and
Fourches 2021, "SMILES Pair Encoding"). A molecule is then 9.9 pieces on average and 0.03% of them,
which are left out, have more than 20: a network that must be trained on a CPU sees three times as
many molecules in the same time, and has three times fewer chances to break one. A molecule is
padded to 20 with PAD, an ordinary token of the model, and is read up to its first PAD. MASK is
the last id and is never predicted.

The network is a bidirectional transformer without a time input (the optimal prediction given the
visible tokens does not depend on the time, Ou et al. 2406.03736 and Zheng et al. 2409.02908), and
returns raw logits; "SUBS" of MDLM (Sahoo et al. 2406.07524, section 3.2.3: no probability on
the mask, visible tokens carry over) is applied by `fewstep.samplers.masked.from_subs`.

The weights are trained by `train_molecules.py` and shipped beside this file, in half precision
with the architecture and the training run in the file's metadata; the pairs are
`molecules_pieces.json`, made by `learn_pieces`.
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
from fewstep.samplers import MaskedProblem, fingerprint, from_subs
from fewstep.samplers.curve import load_curve

__all__ = [
    "CURVE",
    "LENGTH",
    "MASK",
    "PAD",
    "PAIRS",
    "PIECES",
    "TOKENS",
    "VOCABULARY",
    "WEIGHTS",
    "MoleculeNet",
    "NetConfig",
    "decode",
    "encode",
    "learn_pieces",
    "load_net",
    "load_smiles",
    "problem",
    "save_net",
    "tokenize",
]

TOKENS: tuple[str, ...] = (
    "#", "(", ")", "-", "1", "2", "3", "4", "5", "6", "=", "Br", "C", "Cl", "F", "N", "O", "S",
    "[H]", "[nH]", "c", "n", "o", "s",
)  # fmt: skip
PAIRS: tuple[tuple[int, int], ...] = tuple(
    (int(a), int(b))
    for a, b in json.loads(Path(__file__).with_name("molecules_pieces.json").read_text("ascii"))
)
PAD = len(TOKENS) + len(PAIRS)
MASK = PAD + 1
VOCABULARY = MASK + 1
LENGTH = 20
WEIGHTS = Path(__file__).with_name("molecules.safetensors")
CURVE = Path(__file__).with_name("molecules_curve.json")
"""The cross-entropy curve of the network shipped, as `benchmarks.masked curve` writes it."""

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


def _pieces() -> tuple[str, ...]:
    pieces = list(TOKENS)
    for a, b in PAIRS:
        pieces.append(pieces[a] + pieces[b])
    return tuple(pieces)


PIECES = _pieces()
"""What each id below PAD stands for: the tokens, then the joined pairs."""


def _join(ids: NDArray[np.uint8], pair: tuple[int, int], new: int) -> NDArray[np.uint8]:
    """Replace every occurrence of a pair of neighbours, leftmost first, by one id."""
    at = np.flatnonzero((ids[:-1] == pair[0]) & (ids[1:] == pair[1]))
    if pair[0] == pair[1] and len(at):  # in a run a a a a, every other pair
        fresh = np.concatenate([[True], np.diff(at) > 1])
        first = at[fresh][np.cumsum(fresh) - 1]
        at = at[(at - first) % 2 == 0]
    ids[at] = new
    keep = np.ones(len(ids), dtype=bool)
    keep[at + 1] = False
    return ids[keep]


def _flat(molecules: Iterable[str]) -> NDArray[np.uint8]:
    """Token ids of all molecules one after the other, each closed by PAD."""
    return np.frombuffer(
        b"".join(bytes(tokenize(smiles)) + bytes([PAD]) for smiles in molecules), dtype=np.uint8
    ).copy()


def learn_pieces(molecules: Iterable[str], pairs: int = 230) -> list[tuple[int, int]]:
    """Byte-pair encoding: the pairs to join, most frequent first at each turn."""
    ids, result = _flat(molecules), []
    for new in range(len(TOKENS), len(TOKENS) + pairs):
        inner = (ids[:-1] != PAD) & (ids[1:] != PAD)
        code = ids[:-1][inner].astype(np.int64) * 256 + ids[1:][inner]
        first, second = divmod(int(np.bincount(code).argmax()), 256)
        result.append((first, second))
        ids = _join(ids, (first, second), new)
    return result


def encode(molecules: Iterable[str], *, drop: bool = False) -> NDArray[np.uint8]:
    """SMILES to ids, PAD-filled, with shape `(n, 20)`.

    Args:
        molecules: SMILES.
        drop: leave out molecules of more than 20 pieces instead of raising.

    Raises:
        ValueError: an unknown token, or a molecule of more than 20 pieces.
    """
    ids = _flat(molecules)
    for i, pair in enumerate(PAIRS):
        ids = _join(ids, pair, len(TOKENS) + i)
    ends = np.flatnonzero(ids == PAD)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    sizes = ends - starts
    if not drop and len(sizes) and sizes.max() > LENGTH:
        longest = int(sizes.argmax())
        count = f"molecule {longest} has {sizes[longest]} pieces"
        raise ValueError(f"{count}; the model holds {LENGTH}")
    row = np.repeat(np.arange(len(ends)), sizes + 1)
    column = np.arange(len(ids)) - np.repeat(starts, sizes + 1)
    inside = (ids != PAD) & (column < LENGTH)
    result = np.full((len(ends), LENGTH), PAD, dtype=np.uint8)
    result[row[inside], column[inside]] = ids[inside]
    return result[sizes <= LENGTH]


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
        result.append("".join(PIECES[i] for i in ids))
    return result


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """Size of the transformer; `width` is divisible by `heads`, the quotient is even.

    `counted` adds what brackets and ring digits need (see `_contents`); molecules only.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    expansion: int = 4
    vocabulary: int = VOCABULARY
    length: int = LENGTH
    counted: bool = True


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
        contents = _contents()
        self.register_buffer("contents", contents, persistent=False)
        self.count = nn.Linear(4 * contents.shape[1], config.width, bias=False)
        self.blocks = nn.ModuleList(_TransformerBlock(config) for _ in range(config.depth))
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
        y = self.embed(tokens) + self.place.weight[:length]
        if self.config.counted:
            y = y + self.count(_counts(tokens, self.get_buffer("contents")))
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        for block in self.blocks:
            y = block(y, cos, sin)
        logits: Tensor = self.head(self.norm(y))
        return logits


def _contents() -> Tensor:
    """How often each of the 24 tokens, the mask and PAD stands in each id, `(V, 26)`."""
    table = torch.zeros(VOCABULARY, len(TOKENS) + 2)
    for i, piece in enumerate(PIECES):
        for token in tokenize(piece):
            table[i, token] += 1
    table[MASK, -2] = table[PAD, -1] = 1
    return table


def _counts(tokens: Tensor, contents: Tensor) -> Tensor:
    """How often each token stands to the left and right of a position, and the parity of that.

    Brackets must balance and ring digits come in pairs: counts say so at once, attention would
    have to learn to count. Shape `(B, L, 4 * 26)`.
    """
    own = contents[tokens]
    left = own.cumsum(1) - own
    right = own.sum(1, keepdim=True) - left - own
    both = torch.cat([left, right], -1)
    return torch.cat([both / 4, 1 - 2 * both.remainder(2)], -1)


class _TransformerBlock(nn.Module):
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
    metadata = {"format": "fewstep.molecules", "version": "1", "tokens": " ".join(PIECES)}
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
        if metadata["tokens"] != " ".join(PIECES):
            raise ValueError(f"{path} was trained on other tokens")
        net = MoleculeNet(NetConfig(**json.loads(metadata["config"])))
        net.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
    return net.to(device).eval()


def problem(*, path: Path | str | None = None, device: str = "cpu") -> MaskedProblem:
    """The study factory: schedules that draw molecules, scored by Frechet ChemNet Distance.

    The score is the distance less what as many molecules of the test set have for being so few
    (`metrics_molecules.fcd_floor`): strings that are no molecule are left out, and a schedule is
    to gain nothing by the number of the others. The plain distance and the shares of valid strings
    and of distinct molecules among them are reported beside it. The counts of least expected
    divergence of the weights shipped are among the named schedules, as "dp". Needs rdkit and the
    `fcd_torch` wheel.

    Args:
        path: weights of the network; by default those shipped.
        device: where the network runs.

    Raises:
        StudyError: rdkit or the pinned wheel is absent; the message says how to get it.
    """
    from fewstep.experiments.benchmarks.metrics_molecules import MoleculeScore

    net = load_net(WEIGHTS if path is None else path, device=device)
    score = MoleculeScore(device)
    return MaskedProblem(
        denoiser=from_subs(net, MASK, length=LENGTH),
        length=LENGTH,
        objective="excess_fcd",
        measure=score.measure,
        score=score.distance,
        facts=score.facts,
        prompt=lambda indices: torch.full((len(indices), LENGTH), MASK, device=device),
        curve=load_curve(CURVE).falling if path is None else None,
        fingerprint=fingerprint(net, "molecules"),
        picture=score.picture,
    )
