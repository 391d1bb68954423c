"""Searches for diffusers pipelines, from the command line to the files, with tiny budgets."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.search.config import load_study
from fewstep.search.work import load_problem
from fewstep.space import load_schedule

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.studies import called, refused
from tests.tiny_pipelines import build, with_text

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SMALL = [
    *("search.samples=2", "search.race=[]", "search.block=[2,2]", "budget.candidates=3"),
    *("search.generation=2", "teacher.nfe=6", "teacher.check=0", "tracking.enabled=false"),
    *("final.samples=2", "final.top=1", "final.pictures=2", "final.resamples=100"),
    *("refine.samples=2", "refine.held=2", "refine.batch=2", "refine.rounds=1"),
]
FACTORY = """
import sys

from fewstep.samplers.pipelines import pipeline_problem
from tests.tiny_pipelines import build


def problem(name):
    pipe, call = build(name)
    return pipeline_problem(pipe, (), call)
"""
FEATURES = """
def colours(images):
    assert images.shape[1] == 3
    assert 0 <= images.min() < images.max() <= 1
    return images.mean((2, 3))
"""
STUDY = """
[model]
factory = "tiny_factory:problem"
name = "flux"

[search]
nfe = [3]
workers = 0
strategy = "s3"

[budget]
candidates = 3
"""


def settings(*more: str) -> list[str]:
    return [word for setting in (*SMALL, *more) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with_text(folder / "tokenizer").save_pretrained(folder / "sd")
    build("ddpm")[0].save_pretrained(folder / "ddpm")
    (folder / "prompts.txt").write_text("a cat\na dog\nrain\n")
    return folder


def run(capsys, *arguments) -> str:
    code, out, err = called(capsys, *arguments)
    assert code == 0, err
    return out


def problem_of(study):
    return load_problem(load_study(study))


@pytest.mark.slow
def test_a_pipeline_is_searched_by_its_folder_and_compared_with_its_own_scheduler(
    saved, tmp_path, capsys
):
    out = tmp_path / "out"
    words = ["search", "--pipeline", saved / "sd", "--prompts", saved / "prompts.txt"]
    said = run(capsys, *words, "--nfe", "2", "3", "--out", out, *settings())
    assert f"study: {out / 'study.toml'}" in said
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["nfe"] for row in rows] == [2, 3]
    for row in rows:
        assert "stock:EulerDiscreteScheduler" in [s["name"] for s in row["named"]]
    assert (out / "samples.png").stat().st_size > 0
    study = load_study(out / "study.toml")
    assert (study.search.nfe, study.search.workers) == ((2, 3), 0)
    problem = problem_of(out / "study.toml")
    schedule = load_schedule(out / "schedules" / "nfe03.json")
    z = torch.randn(2, *problem.shape, generator=torch.Generator().manual_seed(0))
    cond = problem.cond(torch.arange(2))
    assert sample(schedule, problem.denoiser, start(schedule, z), cond=cond).isfinite().all()
    again = run(capsys, *words, "--nfe", "2", "3", "--out", out, "--resume", *settings())
    assert "2" in again


def test_a_pipeline_without_text_is_searched_by_a_study(saved, tmp_path, capsys):
    study = tmp_path / "study.toml"
    study.write_text(
        f'[model]\npipeline = "{saved / "ddpm"}"\n[search]\nnfe = [2]\nworkers = 0\n'
        'strategy = "random"\n[budget]\ncandidates = 3\n'
    )
    run(capsys, "search", study, "--out", tmp_path / "out", "-q", *settings())
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert "stock:DDPMScheduler" in [s["name"] for s in row["named"]]


def test_a_pipeline_that_a_factory_returns_is_searched(tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny_factory.py").write_text(FACTORY)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.syspath_prepend(tmp_path)
    run(capsys, "search", tmp_path / "study.toml", "--out", tmp_path / "out", "-q", *settings())
    sys.modules.pop("tiny_factory")
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert "stock:FlowMatchEulerDiscreteScheduler" in [s["name"] for s in row["named"]]


def test_features_that_the_user_names_get_decoded_images(saved, tmp_path, capsys, monkeypatch):
    (tmp_path / "my_features.py").write_text(FEATURES)
    study = tmp_path / "study.toml"
    study.write_text(
        f'[model]\npipeline = "{saved / "sd"}"\nprompts = "{saved / "prompts.txt"}"\n'
        '[search]\nnfe = [2]\nworkers = 0\nstrategy = "random"\n[budget]\ncandidates = 3\n'
        '[objective]\nname = "frechet"\nfeatures = "my_features:colours"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    more = ("search.samples=4", "search.block=[2,4]", "final.samples=4")
    run(capsys, "search", study, "--out", tmp_path / "out", "-q", *settings(*more))
    sys.modules.pop("my_features")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["objective"] == "frechet"
    assert results["rows"][0]["found_score"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give a study file, or --pipeline DIR"),
        (["--pipeline", "PIPE", "STUDY"], "give a study file, or --pipeline DIR"),
        (["STUDY", "--nfe", "4", "6"], "--prompts and --nfe go with --pipeline"),
        (["--pipeline", "PIPE"], "--nfe is missing"),
        (["--pipeline", "nowhere", "--nfe", "4"], "no model_index.json there"),
        (["--pipeline", "PIPE", "--nfe", "4", "--prompts", "nowhere"], "no such file"),
        (["--pipeline", "PIPE", "--nfe", "0"], "--nfe"),
    ],
)
def test_a_wrong_call_is_one_line(saved, tmp_path, capsys, words, line):
    places = {"PIPE": saved / "ddpm", "STUDY": tmp_path / "study.toml"}
    out = ["--out", tmp_path / "out"] if "--pipeline" in words else []
    assert line in refused(capsys, "search", *(places.get(w, w) for w in words), *out)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ('factory = "a:b"\npipeline = "x"', "exactly one of factory and pipeline"),
        ('pipeline = "x"\nprompt = "a cat"', "prompt is an unknown key beside pipeline"),
        ('pipeline = "x"\ncall = 3', "call = 3 must be a table"),
        ('pipeline = "x"', "no model_index.json there"),
    ],
)
def test_a_wrong_model_table_is_one_line(tmp_path, capsys, table, line):
    study = tmp_path / "study.toml"
    study.write_text(f"[model]\n{table}\n[search]\nnfe = [3]\n[budget]\ncandidates = 3\n")
    assert line in refused(capsys, "search", study, "--out", tmp_path / "out")
