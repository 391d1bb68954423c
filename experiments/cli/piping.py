"""A study file for a diffusers pipeline, with a budget that its owner can pay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fewstep.space.errors import StudyError

_STUDY = """\
# Written by `fewstep search --pipeline`. Edit it and run it again:
#   fewstep search {study} --out {out} --overwrite
# Twice the samples and candidates cost twice the time; the search says how long before it starts.
name = {name}

[model]
pipeline = {pipeline}
{prompts}
[model.call]  # arguments of the pipeline's call, such as guidance_scale or height

[search]
nfe = {nfe}
samples = 16       # of noise (and prompts) that candidates are scored on
race = [8]         # ... those that lose on the first 8 get no more
block = [8, 8]     # candidates x samples that run as one batch at most
workers = 0        # in this process: one copy of the model

[budget]
candidates = 200   # per number of calls, the named solvers and the pipeline's own included

[teacher]
nfe = 50           # calls of the reference that errors are measured against
check = 8

[refine]           # the last stage, which fits the numbers of the best candidates
top = 1
samples = 8
held = 8
batch = 4
rounds = 4
mean = false       # no mean image: schedules start at the noise, and run in every pipeline

[final]            # the verdict, on noise the search has not seen
samples = 32
most = 64          # doubled until the ratio is known to 10 %, at most to this
top = 4
pictures = 8
"""


def write_study(
    pipeline: Path, prompts: Path | None, nfe: Sequence[int], out: Path, *, keep: bool
) -> Path:
    """The study file OUT/study.toml of a search for a pipeline, the prompts copied beside it.

    Args:
        pipeline: folder of a saved pipeline.
        prompts: text file with one prompt a line; None for a pipeline without text.
        nfe: numbers of network calls.
        out: folder of the search.
        keep: leave a study file that is there as it is.

    Raises:
        StudyError: a folder or file that is not there.
    """
    study = out / "study.toml"
    if keep and study.is_file():
        return study
    if not (pipeline / "model_index.json").is_file():
        raise StudyError(
            f"--pipeline {pipeline}: no model_index.json there: save the pipeline with "
            "pipe.save_pretrained and name that folder"
        )
    if prompts is not None and not prompts.is_file():
        raise StudyError(f"--prompts {prompts}: no such file: write one prompt a line")
    if not nfe:
        raise StudyError("--nfe is missing: name numbers of network calls, e.g. --nfe 4 6 8")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if prompts is not None and prompts.resolve() != (out / "prompts.txt").resolve():
            shutil.copyfile(prompts, out / "prompts.txt")
        text = _STUDY.format(
            study=study,
            out=out,
            name=json.dumps(pipeline.resolve().name),
            pipeline=json.dumps(str(pipeline.resolve())),
            prompts='prompts = "prompts.txt"\n' if prompts is not None else "",
            nfe=json.dumps(list(nfe)),
        )
        study.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"--out {out}: {error.strerror or error}") from None
    return study


def spread(arguments: Sequence[str], option: str) -> list[str]:
    """Arguments with `option 4 6 8` as `option 4 option 6 option 8`, as the parser wants it."""
    found: list[str] = []
    last = ""
    for argument in arguments:
        if last == option and found and found[-1] != option and argument.isdigit():
            found.append(option)
        elif argument.startswith("-"):
            last = argument
        elif not argument.isdigit():
            last = ""
        found.append(argument)
    return found
