"""IgLM, an autoregressive language model of antibodies, as judge and as source of sequences.

IgLM (Shuai, Ruffolo and Gray 2021.12.13.472419) is a GPT-2 of 12.9 M parameters trained on whole
antibodies, independent of AntiBERTy: its nats per residue say how natural a sequence is, as
GPT-2's perplexity does for text. The weights are read from the pinned wheel of iglm 0.1.0, whose
licence allows non-commercial use only: it is fetched for this benchmark, and nothing of it is
imported, shipped or converted.

    [chain] [species] residues [SEP];    the chain is [HEAVY], the species [HUMAN]

    python -m fewstep.experiments.models.assets iglm
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.experiments.models.antibodies import RESIDUES
from fewstep.experiments.models.assets import read_member
from fewstep.samplers.categorical import draw, uniforms

__all__ = ["IgLM", "draw_sequences", "load_judge", "surprise"]

_SEP, _HUMAN, _HEAVY = 3, 26, 31
Cache = list[tuple[Tensor, Tensor]]


class IgLM(nn.Module):
    """GPT-2, pre-norm, with a cache of keys and values.

    Args:
        width: of the embedding.
        heads: of every layer.
        layers: how many.
        inner: width of the perceptrons.
    """

    def __init__(self, width: int, heads: int, layers: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(33, width), nn.Embedding(512, width)
        self.h = nn.ModuleList(
            nn.ModuleDict({
                "ln_1": nn.LayerNorm(width), "c_attn": nn.Linear(width, 3 * width),
                "c_proj": nn.Linear(width, width), "ln_2": nn.LayerNorm(width),
                "c_fc": nn.Linear(width, inner), "c_out": nn.Linear(inner, width),
            })
            for _ in range(layers)
        )  # fmt: skip
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits of the next token `(B, L, 33)` after ids `(B, L)`, and the cache."""
        done = 0 if past is None else past[0][0].shape[2]
        y = self.wte(tokens) + self.wpe.weight[done : done + tokens.shape[1]]
        cache: Cache = []
        for i, block in enumerate(self.h):
            assert isinstance(block, nn.ModuleDict)
            parts = block["c_attn"](block["ln_1"](y)).chunk(3, -1)
            q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            cache.append((k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
            y = y + block["c_proj"](mixed.transpose(1, 2).flatten(2))
            inner = functional.gelu(block["c_fc"](block["ln_2"](y)), approximate="tanh")
            y = y + block["c_out"](inner)
        return functional.linear(self.ln_f(y), self.wte.weight), cache


def load_judge(name: str = "IgLM") -> IgLM:
    """The published network, "IgLM" (12.9 M parameters) or "IgLM-S" (1.4 M), frozen.

    Raises:
        AssetError: the pinned wheel is absent or is another file.
    """
    folder = f"iglm/trained_models/{name}"
    config = json.loads(read_member("iglm", f"{folder}/config.json"))
    data = read_member("iglm", f"{folder}/pytorch_model.bin")
    stored: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    layers = int(config["n_layer"])
    net = IgLM(config["n_embd"], config["n_head"], layers, config["n_inner"])
    theirs = {"c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc",
              "c_out": "mlp.c_proj", "ln_1": "ln_1", "ln_2": "ln_2"}  # fmt: skip
    state = {"wte.weight": stored["transformer.wte.weight"]}
    state["wpe.weight"] = stored["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        state[f"ln_f.{kind}"] = stored[f"transformer.ln_f.{kind}"]
        for i in range(layers):
            for ours, name_ in theirs.items():
                value = stored[f"transformer.h.{i}.{name_}.{kind}"]
                flip = kind == "weight" and not ours.startswith("ln")  # GPT-2 stores W transposed
                state[f"h.{i}.{ours}.{kind}"] = value.T.contiguous() if flip else value
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def _ids(sequence: str) -> list[int]:
    return [_HEAVY, _HUMAN, *(5 + RESIDUES.index(letter) for letter in sequence), _SEP]


@torch.no_grad()
def surprise(judge: IgLM, sequences: Sequence[str], batch: int = 32) -> Tensor:
    """Nats per residue of heavy chains, as IgLM's authors count them (end included), `(n,)`."""
    found = []
    for start in range(0, len(sequences), batch):
        rows = [_ids(s) for s in sequences[start : start + batch]]
        width = max(map(len, rows))
        tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        log_p = judge(tokens[:, :-1])[0].double().log_softmax(-1)
        loss = -log_p.gather(2, tokens[:, 1:, None])[:, 1:, 0]
        real = tokens[:, 2:] != 0
        found.append((loss * real).sum(-1) / real.sum(-1))
    return torch.cat(found)


@torch.no_grad()
def draw_sequences(judge: IgLM, count: int, *, seed: int = 0, batch: int = 32) -> list[str]:
    """Human heavy chains of 100 to 140 residues drawn from IgLM at temperature 1.

    The span tokens that IgLM is also trained with are left out of its law.
    """
    generator, found = torch.Generator().manual_seed(seed), list[str]()
    allowed = torch.full((33,), float("-inf"))
    allowed[[_SEP, *range(5, 25)]] = 0.0
    while len(found) < count:
        tokens = torch.tensor([[_HEAVY, _HUMAN]] * batch)
        cache, ended = None, torch.zeros(batch, dtype=torch.bool)
        fresh = tokens
        for _ in range(141):
            logits, cache = judge(fresh, cache)
            law = (logits[:, -1] + allowed).double().softmax(-1)
            fresh = draw(law, uniforms(batch, generator=generator))[:, None]
            tokens = torch.cat([tokens, fresh], 1)
            ended |= fresh[:, 0] == _SEP
            if bool(ended.all()):
                break
        for row in tokens[:, 2:].tolist():
            if _SEP in row and 100 <= row.index(_SEP) <= 140:
                found.append("".join(RESIDUES[i - 5] for i in row[: row.index(_SEP)]))
    return found[:count]
