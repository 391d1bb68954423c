"""What README shows runs as it stands there."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from fewstep.samplers import Problem
from fewstep.space import noise, save_schedule
from fewstep.space.baselines import baseline

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine" / "schedules"
    folder.mkdir(parents=True)
    save_schedule(baseline("unipc2-bh2/logsnr", noise.VPLinear(), 5), folder / "nfe05.json")
    names = {"model": lambda x, t: 0.1 * x, "Problem": Problem}
    for block in blocks("python"):
        exec(block, names)
    assert names["images"].shape == (16, 3, 32, 32)
    assert torch.isfinite(names["images"]).all()
    assert names["denoiser"].calls == 5
    assert isinstance(names["problem"](), Problem)


def test_the_study_of_the_readme_is_toml_and_names_the_function_shown() -> None:
    (study,) = map(tomllib.loads, blocks("toml"))
    module, function = study["model"]["factory"].split(":")
    assert any(
        b.startswith(f"# {module}.py") and f"def {function}(" in b for b in blocks("python")
    )
    assert study["search"]["nfe"] == [5, 8]


def test_files_the_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
