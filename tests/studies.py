"""A tiny exact model as a user would write it, and studies of it: seconds, not minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewstep.experiments.__main__ import main
from fewstep.experiments.benchmarks import killed
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.space import load_schedule

MODEL = '''
"""Two Gaussians in the plane; exact. `broken` breaks the contract on purpose."""

import os
import time

import torch

from fewstep.samplers import Problem
from fewstep.space.noise import EDM, VPLinear


class Mixture:
    def __init__(self, noise, broken=""):
        self.noise, self.broken = noise, broken

    def __call__(self, x, t, *, cond=None, guidance=None):
        t = t.to(torch.float64)
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha, sigma = (f(t).to(x).reshape(shape) for f in (self.noise.alpha, self.noise.sigma))
        means = torch.tensor([[-1.0] * x.shape[1], [1.2] * x.shape[1]])
        v = torch.tensor([0.09, 0.16])
        spread = alpha**2 * v + sigma**2
        square = ((x[:, None] - alpha[:, None] * means) ** 2).sum(-1)
        logits = -x.shape[1] / 2 * torch.log(spread) - square / (2 * spread)
        if guidance is not None:  # towards the likelier mode
            logits = logits * torch.as_tensor(guidance).to(x).reshape(-1, 1)
        r = torch.softmax(logits, dim=1)
        gain = (v * alpha / spread)[..., None]
        each = means + gain * (x[:, None] - alpha[:, None] * means)
        out = (r[..., None] * each).sum(1)
        if cond is not None:
            out = out + 0.01 * cond["shift"][:, None].to(out)
        if self.broken == "shape":
            return out[:, :1]
        if self.broken == "nan":
            return out * float("nan")
        trap = self.broken.removeprefix("die of ")
        if trap != self.broken and os.path.exists(trap):  # once
            os.unlink(trap)
            os._exit(1)
        if self.broken == "hang":
            time.sleep(60)
        if self.broken == "slow":
            time.sleep(len(x) / 32)
        return out


def problem(dim=2, broken="", edm=False, guidance=None):
    noise = EDM(sigma_max=20.0, sigma_min=0.01) if edm else VPLinear()
    return Problem(
        Mixture(noise, broken),
        (dim,),
        cond=lambda i: {"shift": (i % 3).to(torch.float32)},
        guidance=guidance,
        fingerprint=f"tiny{dim}{edm}",
        features=lambda x: torch.cat([x, x**2], dim=1),
    )


def not_a_problem():
    return 5


def fails():
    raise RuntimeError("no weights\\nhere")
'''

STUDY = f"""
name = "tiny"
[model]
factory = "tiny_model:problem"
[budget]
candidates = 104
[search]
strategy = "evolution"{killed.SMALL}"""


def write_study(folder: Path, text: str = STUDY) -> Path:
    """The study file, its model beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_model.py").write_text(MODEL)
    path = folder / "study.toml"
    path.write_text(text)
    return path


def command(*arguments: str) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-P", "-m", "fewstep.experiments", *arguments]


def environment(**extra: str) -> dict[str, str]:
    """One thread, no stray path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **extra}


def fewstep(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and wait."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=300,
    )


def called(capsys: Any, *arguments: object) -> tuple[Any, str, str]:
    """The command line in this process: its exit code, what it printed, its errors."""
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return leaving.value.code, out, err


def refused(capsys: Any, *arguments: object) -> str:
    """The one clear line with which the command line refuses."""
    code, _, err = called(capsys, *arguments)
    assert code == 2
    assert err.startswith("fewstep: error: ")
    assert err.count("\n") == 1
    return err


def trial_table(out: Path, name: str = "tiny-nfe03") -> list[tuple[Any, ...]]:
    """What a search did: every trial without its clock times."""
    return killed.trials(out, name)


GUIDED = (
    STUDY.replace("nfe = [3]", "nfe = [3, 5]\nguidance = [1, 3]")
    .replace("candidates = 104", "candidates = 12")
    .replace('"evolution"', '"random"')
    + """
[cpr]
fit = true
samples = 24
held = 16
rounds = 2
template = "unipc2-bh2/quadratic/low"
"""
)
"""Two guidance scales at two numbers of calls, and the regression between."""


def guided_search(folder, *overrides, text=GUIDED, out="out", **options):
    config = load_study(write_study(folder, text), overrides)
    return run.search(config, folder / out, **options)


def predicted(capsys, cpr, file, nfe, guidance):
    """The schedule that `export --cpr` writes for a setting, and what `show` says of it."""
    setting = ("--nfe", nfe, "--guidance", guidance)
    code, text, _ = called(capsys, "export", "--cpr", cpr, "--out", file, *setting)
    assert code == 0
    assert f"{nfe} network calls, to be sampled with guidance {guidance:g}\n" in text
    made = load_schedule(file)
    assert made.nfe == nfe
    assert made.provenance["cpr"] == {"nfe": nfe, "guidance": guidance}
    assert made.provenance["guidance"] == guidance
    assert made.provenance["model"] == "tiny2False"
    said = called(capsys, "show", file)[1]
    assert f"predicted for NFE {nfe}, guidance {guidance:g}" in said
    return made, said
