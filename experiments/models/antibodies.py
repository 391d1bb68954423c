"""AntiBERTy, a pretrained masked language model of antibodies, read out of a wheel.

The network is `AntiBERTy_md_smooth` of antiberty 0.1.3 (Ruffolo, Gray and Sulam 2112.07782; MIT):
a BERT of 8 layers, width 512, 26.0 M parameters, trained to predict masked residues of 558 M
natural antibodies. Nothing of the package is imported; its weights, a torch file of plain tensors
in a member of the zip, are loaded with `weights_only=True` and not copied into this repository.

    tokens     [CLS] residues [SEP] padding;   20 amino acids, ids 5..24;   MASK 4, PAD 0
    y          LayerNorm(word + place + type 0)
    layer      y = LayerNorm(y + attention(y));  y = LayerNorm(y + W_2 gelu(W_1 y))
    logits     decoder(LayerNorm(gelu(W y)))

It was trained at low masking rates, so as a denoiser it wants a prompt: here the framework of a
sequence is given and its three loops are masked.

    python -m fewstep.experiments.models.assets antiberty
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models.assets import read_member
from fewstep.samplers.token_denoiser import SubsDenoiser
from fewstep.space.errors import ModelError

__all__ = ["MASK", "PAD", "RESIDUES", "AntiBerty", "decode", "denoiser", "encode", "load_network"]

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
_MEMBER = "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin"
_WIDTH, _HEADS, _LAYERS, _EPS = 512, 8, 8, 1e-12


class _Layer(nn.Module):
    """One BERT layer, normalised after each of its halves."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        self.mix, self.norm1 = nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH, _EPS)
        self.rise, self.fall = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.norm2 = nn.LayerNorm(_WIDTH, _EPS)

    def forward(self, y: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            part(y).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        y = self.norm1(y + self.mix(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = self.norm2(y + self.fall(functional.gelu(self.rise(y))))
        return out


class AntiBerty(nn.Module):
    """The masked language model; called with ids `(B, L)`, returns logits `(B, L, 25)`."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.word, self.place = nn.Embedding(25, _WIDTH), nn.Embedding(512, _WIDTH)
        self.kind, self.norm = nn.Embedding(2, _WIDTH), nn.LayerNorm(_WIDTH, _EPS)
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.dense, self.norm_out = nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH, _EPS)
        self.decoder = nn.Linear(_WIDTH, 25)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of tokens `(B, L)`; `attention_mask` is 1 for tokens and 0 for padding."""
        mask = tokens != PAD if attention_mask is None else attention_mask.bool()
        y = self.word(tokens) + self.place.weight[: tokens.shape[1]] + self.kind.weight[0]
        y = self.norm(y)
        for layer in self.layers:
            y = layer(y, mask[:, None, None, :])
        logits: Tensor = self.decoder(self.norm_out(functional.gelu(self.dense(y))))
        return logits


_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mix",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "rise",
    "output.dense": "fall",
    "output.LayerNorm": "norm2",
}
_WHOLE = {
    "bert.embeddings.word_embeddings": "word",
    "bert.embeddings.position_embeddings": "place",
    "bert.embeddings.token_type_embeddings": "kind",
    "bert.embeddings.LayerNorm": "norm",
    "cls.predictions.transform.dense": "dense",
    "cls.predictions.transform.LayerNorm": "norm_out",
    "cls.predictions.decoder": "decoder",
}


def load_network(device: str = "cpu") -> AntiBerty:
    """The network with its published weights, in evaluation mode, its parameters frozen.

    Raises:
        AssetError: the pinned wheel is absent or is another file; one line that names the remedy.
    """
    data = read_member("antiberty", _MEMBER)
    stored: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    pairs = dict(_WHOLE)
    for i in range(_LAYERS):
        pairs |= {f"bert.encoder.layer.{i}.{a}": f"layers.{i}.{b}" for a, b in _NAMES.items()}
    state = {
        f"{ours}.{kind}": stored[f"{theirs}.{kind}"]
        for theirs, ours in pairs.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in stored
    }
    net = AntiBerty()
    net.load_state_dict(state)
    return net.to(device).eval().requires_grad_(False)


def denoiser(net: AntiBerty | None = None) -> SubsDenoiser:
    """AntiBERTy behind the contract of masked samplers; only residues are generated."""
    return SubsDenoiser(
        load_network() if net is None else net,
        MASK,
        length=512,
        forbidden=(UNKNOWN, CLS, SEP),
        padding=PAD,
        attention=True,
    )


def encode(sequences: Sequence[str], length: int) -> Tensor:
    """Sequences of residues to ids `(n, length)`: [CLS] residues [SEP], then padding.

    Raises:
        ModelError: a letter that is no amino acid, or a sequence that does not fit.
    """
    tokens = torch.full((len(sequences), length), PAD)
    for row, sequence in zip(tokens, sequences, strict=True):
        if not set(sequence) <= set(RESIDUES) or len(sequence) + 2 > length:
            raise ModelError(f"{sequence!r} must be amino acids, at most {length - 2}")
        ids = [CLS, *(5 + RESIDUES.index(letter) for letter in sequence), SEP]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def decode(tokens: Tensor) -> list[str]:
    """Ids `(n, length)` to residues; a mask is an underscore."""
    letters = {MASK: "_"} | {5 + i: letter for i, letter in enumerate(RESIDUES)}
    return ["".join(letters.get(i, "") for i in row) for row in tokens.tolist()]
