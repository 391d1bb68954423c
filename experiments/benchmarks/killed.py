"""Searches killed with SIGKILL at random instants end with the trials of one that ran through.

    python -m fewstep.experiments.benchmarks.killed [--kills 10] [--strategies s3+refine tpe ...]

A small search of a Gaussian runs once undisturbed, then is killed and resumed, again and
again, until it has been killed so many times; every search that ends must have the same trials,
their clock times aside. Prints a line per strategy; the exit code is 1 if any differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

STRATEGIES = ("s3+refine", "evolution", "tpe", "cmaes", "nsgaii")
MODEL = """
import torch

from fewstep.samplers import Problem
from fewstep.space.noise import VPLinear


class Gaussian:
    noise = VPLinear()

    def __call__(self, x, t, *, cond=None, guidance=None):
        alpha, sigma = (f(t.double()).to(x)[:, None] for f in (self.noise.alpha, self.noise.sigma))
        v = torch.tensor([0.1, 2.0])
        return alpha * v / (alpha**2 * v + sigma**2) * x


def problem():
    return Problem(Gaussian(), (2,), fingerprint="gaussian")
"""
SMALL = """
nfe = [3]
generation = 8
samples = 8
block = [4, 8]
workers = 0
[teacher]
nfe = 16
check = 4
[refine]
rounds = 2
samples = 8
held = 8
batch = 8
[final]
samples = 16
most = 16
resamples = 200
top = 3
pictures = 2
[tracking]
enabled = false
"""
"""What makes [search] and the tables after it small; tests search so, too."""

STUDY = f"""
name = "killed"
[model]
factory = "killed_model:problem"
[budget]
candidates = 140
[search]{SMALL}"""


def trials(out: Path, name: str) -> list[tuple[Any, ...]]:
    """What a search did, from its journal: see `table`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / "study.journal")))
    return table(optuna.load_study(study_name=name, storage=storage))


def table(study: optuna.Study) -> list[tuple[Any, ...]]:
    """The trials of a study without their clock times."""
    rows = []
    for t in study.get_trials(deepcopy=False):
        said = {k: v for k, v in t.user_attrs.items() if k not in ("seconds", "elapsed")}
        rows.append((t.number, t.state.name, t.values, t.params, said))
    return rows


def started(study: Path, out: Path, strategy: str) -> subprocess.Popen[bytes]:
    """A search in a process of its own, which goes on with what is there."""
    words = [sys.executable, "-P", "-m", "fewstep.experiments", "search", str(study), "--quiet"]
    words += ["--out", str(out), "--resume", "--set", f"search.strategy={strategy}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)  # type: ignore[call-overload,no-any-return]


def differing(folder: Path, strategy: str, kills: int, rng: random.Random) -> int:
    """How many of the searches that were killed, so often in all, ended with other trials."""
    study, begun = folder / "study.toml", time.monotonic()
    study.write_text(STUDY)
    (folder / "killed_model.py").write_text(MODEL)
    if started(study, folder / "whole", strategy).wait() != 0:
        raise SystemExit(f"{strategy}: the undisturbed search failed")
    seconds, done, wrong, attempt = time.monotonic() - begun, 0, 0, 0
    whole = trials(folder / "whole", "killed-nfe03")
    while done < kills:
        out = folder / f"killed{attempt}"
        while True:
            process = started(study, out, strategy)
            try:
                process.wait(rng.uniform(0.3, 1.0) * seconds if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
        wrong += process.returncode != 0 or trials(out, "killed-nfe03") != whole
        attempt += 1
    print(f"{strategy}: {done} kills, {attempt} searches, {wrong} differ", flush=True)
    return wrong


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of each strategy")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    a = parser.parse_args(argv)
    wrong = 0
    for strategy in a.strategies:
        with tempfile.TemporaryDirectory() as folder:
            wrong += differing(Path(folder), strategy, a.kills, random.Random(a.seed))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
