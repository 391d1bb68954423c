"""A pipeline, prompts and images from files: nothing is downloaded, no code in them is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.space.errors import ModelError


def load_pipeline(
    folder: str | Path, *, device: str | None = None, dtype: str | None = None
) -> Any:
    """Load a saved pipeline from its folder; nothing is downloaded, no code in it is run.

    Args:
        folder: what `pipe.save_pretrained` wrote.
        device: where it runs; None is a GPU if there is one.
        dtype: a floating point type of torch, such as "bfloat16"; None is float32.

    Raises:
        ModelError: no such folder, or diffusers cannot load it.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"pipeline {folder}: no model_index.json there: save it with pipe.save_pretrained"
        )
    kind = getattr(torch, dtype or "float32", None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ModelError(f"dtype {dtype!r} is no floating point type of torch: use bfloat16")
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils import deprecation_utils
    except ImportError:
        raise ModelError("a pipeline needs diffusers: pip install 'fewstep[diffusers]'") from None
    _check_class(folder)
    renamed = hasattr(deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE")
    options = {"dtype" if renamed else "torch_dtype": kind, "use_safetensors": True}
    try:
        pipeline = loaded_quietly(DiffusionPipeline, folder, **options)
        return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise ModelError(f"pipeline {folder}: {type(error).__name__}: {line}") from error


def loaded_quietly(kind: Any, folder: Path, **options: Any) -> Any:
    """A pipeline of a class from its folder, without the progress bars of every part.

    Args:
        kind: the class.
        folder: where it was saved.
        options: further arguments of its `from_pretrained`.
    """
    from diffusers.utils import is_accelerate_available, is_transformers_available, logging

    bars = [logging]
    if is_transformers_available():
        from transformers.utils import logging as texts

        bars.append(texts)
    if not is_accelerate_available():  # which diffusers says in five lines
        options["low_cpu_mem_usage"] = False
    bars = [bar for bar in bars if bar.is_progress_bar_enabled()]  # others stay off
    for bar in bars:
        bar.disable_progress_bar()
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    finally:
        for bar in bars:
            bar.enable_progress_bar()


def _check_class(folder: Path) -> None:
    """Refuse a pipeline of somebody's own class, whose code is not diffusers'."""
    import diffusers

    try:
        name = json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"]
        known = isinstance(name, str) and hasattr(diffusers, name)
    except Exception:  # no such entry, or a class whose import fails: diffusers says what is wrong
        return
    if not known:
        raise ModelError(
            f"pipeline {folder}: its class {name} is not one of diffusers': load it in a function "
            "that returns pipelines.pipeline_problem(pipe), and name that as model.factory"
        )


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        ModelError: the file cannot be read or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"prompts {path}: cannot be read ({error})") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ModelError(f"prompts {path}: the file is empty: write one prompt a line")
    return found


def with_images(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with images for the paths of image files.

    Raises:
        ModelError: a file is no image.
    """
    loaded = dict(call)
    for name, value in call.items():
        if "image" in name and isinstance(value, str | Path):
            from PIL import Image, UnidentifiedImageError

            try:
                loaded[name] = Image.open(value).convert("L" if "mask" in name else "RGB")
            except (OSError, UnidentifiedImageError) as error:
                raise ModelError(f"call.{name} {value}: no image there ({error})") from None
    return loaded
