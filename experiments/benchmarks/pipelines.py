"""Every pipeline that diffusers tests: does a schedule file give there what a search sees?

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers CHECKOUT
    python -P -m fewstep.experiments.benchmarks.pipelines CHECKOUT [wan flux ...] [--out OUT.json]

diffusers' own tests make each pipeline tiny, with random weights (`get_dummy_components`), and
call it (`get_dummy_inputs`); text encoders and tokenizers that they would download are made here.
Of each pipeline are compared, from the noise that it draws,

    file     the pipeline with `FewstepScheduler` and a file of four calls of DPM-Solver++ 2M,
             against `sample` on `PipelineDenoiser`, as a search asks it
    stock    the pipeline with its own scheduler in four steps, against the schedule that fewstep
             reads off that scheduler

as the largest difference over the largest value. "refused" has fewstep's reason, "not made" that
of the pipeline or of this benchmark. Differences are expected where pipelines draw further noise
(encoders, DDPM's steps) and where they change states between steps (inpainting).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import logging
import sys
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers import sample, start
from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.samplers.pipelines import PipelineDenoiser
from fewstep.space import save_schedule
from fewstep.space.baselines import baseline
from fewstep.space.errors import FewstepError, one_line

STEPS = 4
OURS = frozenset(
    "generator num_inference_steps output_type return_dict prompt latents timesteps sigmas "
    "callback_on_step_end batch_size".split()
)


class Encoding(dict[str, Any]):
    """What a tokenizer returns."""

    __getattr__ = dict.__getitem__

    def to(self, *_: Any, **__: Any) -> Encoding:
        """Everything is on the CPU."""
        return self


class Tokenizer:
    """Forty ids or fewer for any text, the same for the same text; its vocabulary has seven."""

    model_max_length, vocab_size, padding_side = 16, 1000, "right"
    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 2, 1, 0, 3
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012

    def __call__(self, text: Any = None, *_: Any, **k: Any) -> Encoding:
        """Ids and mask."""
        padded = k.get("padding") == "max_length" and k.get("max_length")
        count = padded or min(k.get("max_length") or 8, 40)
        rows = [self._ids(t, count) for t in ([text] if isinstance(text, str) else text)]
        ids = torch.as_tensor(np.stack(rows))
        if k.get("return_tensors") is not None:
            return Encoding(input_ids=ids, attention_mask=torch.ones_like(ids))
        lists = ids[0].tolist() if isinstance(text, str) else ids.tolist()
        return Encoding(input_ids=lists, attention_mask=torch.ones_like(ids).tolist())

    def _ids(self, text: str, count: int) -> np.ndarray:
        seed = int(hashlib.md5(str(text).encode(), usedforsecurity=False).hexdigest()[:8], 16)
        ids = np.random.default_rng(seed).integers(2, 7, count)
        ids[-1] = self.eos_token_id
        return ids

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **k: Any) -> Any:
        """The messages as one text."""
        if not tokenize:
            return str(messages)
        made = self([str(messages)], **{**k, "return_tensors": "pt"})
        return made if k.get("return_dict") else made["input_ids"]

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Words."""
        return text.split()

    def __len__(self) -> int:
        return self.vocab_size


def without_hub() -> None:
    """Make what diffusers' tests load from the hub: tiny T5 and BERT encoders, tokenizers."""
    import transformers as t
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # else everything that is on the hub waits for it
    transformers: Any = t
    small: dict[str, Any] = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    t5 = transformers.T5Config(vocab_size=1103, relative_attention_num_buckets=8, **small)
    umt5 = transformers.UMT5Config(vocab_size=1103, **small)
    bert = transformers.BertConfig(
        vocab_size=1124,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
    )

    def config(name: str, *_: Any, **__: Any) -> Any:
        if "t5" not in name:
            raise OSError(f"{name} is on the hub")
        return t5

    transformers.AutoConfig.from_pretrained = config
    for name, settings in (
        ("T5EncoderModel", t5),
        ("UMT5EncoderModel", umt5),
        ("BertModel", bert),
    ):
        kind = getattr(transformers, name)

        def load(*_: Any, kind: Any = kind, settings: Any = settings, **__: Any) -> Any:
            torch.manual_seed(0)
            return kind(settings).eval()

        kind.from_pretrained = load
    for name in dir(transformers):
        if name.endswith(("Tokenizer", "TokenizerFast")):
            getattr(transformers, name).from_pretrained = lambda *_, **__: Tokenizer()


class Watch:
    """The first state that a scheduler's `step` is given, and the last that it returns."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.steps = scheduler, 0
        self.first: Tensor = torch.empty(0)
        self.last: Tensor = torch.empty(0)

    def __enter__(self) -> Watch:
        step, watch = self.scheduler.step, self

        def watched(*a: Any, **k: Any) -> Any:
            if watch.steps == 0:
                watch.first = (a[2] if len(a) > 2 else k["sample"]).detach().clone()
            watch.steps += 1
            made = step(*a, **k)
            after = made[0] if isinstance(made, tuple) else made.prev_sample
            watch.last = after.detach().clone()
            return made

        watched.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
        self.scheduler.step = watched
        return self

    def __exit__(self, *error: object) -> None:
        del self.scheduler.step


def inputs(test: Any) -> dict[str, Any]:
    """The arguments of a test's call, of four steps from noise."""
    make = test.get_dummy_inputs
    given: dict[str, Any] = (
        make("cpu") if "device" in inspect.signature(make).parameters else make()
    )
    accepts = inspect.signature(test.pipeline_class.__call__).parameters
    given |= {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    given |= {"strength": 1.0}
    return {
        k: v for k, v in given.items() if k in accepts and k not in ("timesteps", "batch_size")
    }


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def compared(test: Any, folder: Path) -> dict[str, Any]:
    """What became of one pipeline."""
    components = test.get_dummy_components()
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe = test.pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    own, given = pipe.scheduler, inputs(test)
    found: dict[str, Any] = {"scheduler": type(own).__name__}
    with Watch(own) as stock:
        pipe(**given)
    prompt = given.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else (prompt or [])
    call = {name: value for name, value in inputs(test).items() if name not in OURS}
    try:
        denoiser = PipelineDenoiser(pipe, prompts, call)
    except FewstepError as error:
        return found | {"refused": one_line(error)}
    try:
        schedule: Any = denoiser.stock(stock.steps)
        z = stock.first / float(getattr(own, "init_noise_sigma", 1.0))
        found["stock"] = apart(sample(schedule, denoiser, start(schedule, z)), stock.last)
    except FewstepError as error:
        found["stock"] = one_line(error)
    grid = "logsnr" if denoiser.scales_input else "time"
    schedule = baseline(f"dpmpp2m/{grid}", denoiser.noise, STEPS)
    file = save_schedule(schedule, folder / "four.json")
    try:
        pipe.scheduler = FewstepScheduler.from_config(own.config, schedule=str(file))
        with Watch(pipe.scheduler) as ours:
            pipe(**inputs(test))
        pipe.scheduler = own
        found["file"] = apart(sample(schedule, denoiser, ours.first), ours.last)
    except FewstepError as error:
        found["file"] = one_line(error)
    return found


def tests(checkout: Path, only: list[str]) -> Iterator[tuple[str, Any]]:
    """Every pipeline class with one of diffusers' tests that makes it; None if that failed."""
    sys.path.insert(0, str(checkout))
    seen = set[Any]()
    for path in sorted((checkout / "tests" / "pipelines").glob("*/test_*.py")):
        if (only and path.parent.name not in only) or "onnx" in path.name:
            continue
        module = f"tests.pipelines.{path.parent.name}.{path.stem}"
        try:
            every = vars(importlib.import_module(module))
        except (ImportError, RuntimeError, unittest.SkipTest) as error:
            yield path.stem, one_line(error)
            continue
        for kind in every.values():
            if inspect.isclass(kind) and kind.__module__ == module:
                pipeline = _class_of(kind) if hasattr(kind, "get_dummy_components") else None
                if inspect.isclass(pipeline) and pipeline not in seen:
                    seen.add(pipeline)
                    yield pipeline.__name__, kind


def _class_of(kind: Any) -> Any:
    """The pipeline that a test is of; None where only its children say."""
    try:
        return kind().pipeline_class
    except Exception:
        return None


def main() -> None:
    """Print a line for each pipeline, and the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers, for its tests")
    parser.add_argument("only", nargs="*", help="folders of tests/pipelines; nothing means all")
    parser.add_argument("--out", type=Path, help="where to write all of it as JSON")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    without_hub()
    every: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in tests(a.checkout, a.only):
            try:
                if isinstance(kind, str):
                    raise ImportError(kind)
                every[name] = compared(kind(), Path(folder))
            except Exception as error:  # of the pipeline, or of what stands for its parts here
                every[name] = {"not made": f"{type(error).__name__}: {one_line(error, 150)}"}
            print(name, json.dumps(every[name]), flush=True)
    ran = [r for r in every.values() if "not made" not in r and "refused" not in r]
    same = {
        k: sum(not isinstance(r[k], str) and r[k] < 1e-5 for r in ran) for k in ("file", "stock")
    }
    print(
        f"{len(every)} pipelines: {len(ran)} ran, of which {same['file']} agree on a file and "
        f"{same['stock']} on their own scheduler to 1e-5; "
        f"{sum('refused' in r for r in every.values())} refused with a reason; "
        f"{sum('not made' in r for r in every.values())} could not be made here"
    )
    if a.out:
        a.out.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
