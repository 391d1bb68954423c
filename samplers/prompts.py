"""Prompt embeddings that a pipeline makes once per prompt.

`PromptCache` takes the place of a pipeline's `encode_prompt` while the pipeline is called. The
pipelines' methods differ in arguments and results, so nothing of them is assumed: the first list
of several prompts is encoded whole and prompt by prompt, and where the shapes say that the whole
is the parts one after another, prompts are kept one by one; where they do not (sequences padded
to the longest of a list), whole lists are kept.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT = 512
"""Prompts, or lists of prompts, whose embeddings are kept."""


class PromptCache:
    """A pipeline's `encode_prompt` that does not encode the same prompt twice.

    Args:
        encode: the pipeline's bound method.
    """

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode, self._signature = encode, inspect.signature(encode)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._rules: dict[tuple[type, ...], tuple[str, ...] | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See the pipeline's method."""
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if any(isinstance(v, Tensor) for v in given.values()):
            return self._encode(**given)
        prompts = given.get("prompt")
        if not isinstance(prompts, list) or len(prompts) < 2:
            return self._one(given)
        parts = [self._one(_row(given, len(prompts), i)) for i in range(len(prompts))]
        if not all(isinstance(part, tuple) for part in parts):
            return self._one(given)
        kind = tuple(type(value) for value in parts[0])  # with and without guidance
        if kind not in self._rules:
            whole = self._one(given)
            self._rules[kind] = _rules(whole, parts)
            return whole
        rules = self._rules[kind]
        try:
            return self._one(given) if rules is None else _joined(parts, rules)
        except RuntimeError:  # lengths that differ
            return self._one(given)

    def _one(self, given: Mapping[str, Any]) -> Any:
        key = repr(sorted(given.items()))
        if key not in self._kept:
            self._kept[key] = self._encode(**given)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _row(given: Mapping[str, Any], count: int, i: int) -> dict[str, Any]:
    return {k: [v[i]] if isinstance(v, list) and len(v) == count else v for k, v in given.items()}


def _rules(whole: Any, parts: Sequence[Any]) -> tuple[str, ...] | None:
    """For each result whether rows are joined, or equal for all; None where neither holds."""
    rules = []
    for all_, first in zip(whole, parts[0], strict=True):
        if isinstance(all_, Tensor) and isinstance(first, Tensor):
            joined = len(first) == 1 and all_.shape == (len(parts), *first.shape[1:])
            same = all_.shape == first.shape and torch.equal(all_, first)
            rules.append("join" if joined else "same" if same else "")
        elif isinstance(all_, list) and isinstance(first, list):
            rules.append("join" if len(all_) == len(parts) * len(first) else "")
        else:
            rules.append("same" if all_ is None and first is None else "")
    return tuple(rules) if all(rules) else None


def _joined(parts: Sequence[Any], rules: Sequence[str]) -> tuple[Any, ...]:
    columns = []
    for rule, column in zip(rules, zip(*parts, strict=True), strict=True):
        if rule == "same":
            columns.append(column[0])
        elif isinstance(column[0], Tensor):
            columns.append(torch.cat(column))
        else:
            columns.append([x for part in column for x in part])
    return tuple(columns)
