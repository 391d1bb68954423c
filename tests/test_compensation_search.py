"""Compensation as a study's strategy: from the file to a schedule that is explained."""

import shutil

import pytest

from fewstep.experiments.cli import explain
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.space import StudyError, load_schedule
from fewstep.space.baselines import baseline
from fewstep.space.noise import VPLinear
from tests.studies import STUDY, trial_table, write_study

BASE = "unipc2-bh2/quadratic/low"
TEXT = (
    STUDY.replace("nfe = [3]", "nfe = [4, 5]").replace('"evolution"', '"compensation"')
    + f"""
[compensation]
base = "{BASE}"
samples = 48
"""
)


def _search(folder, *overrides, text=TEXT, out="out", **options):
    config = load_study(write_study(folder, text), overrides)
    return run.search(config, folder / out, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return _search(tmp_path_factory.mktemp("compensated"), "search.samples=64")


@pytest.mark.parametrize("nfe", [4, 5])
def test_the_base_is_told_compensated_after_the_named_solvers(finished, nfe):
    table = trial_table(finished.out, f"tiny-nfe{nfe:02d}")
    *named, last = table
    assert len(named) <= 104
    assert not any(row[-1]["source"].startswith("compensation:") for row in named)
    attributes = last[-1]
    assert attributes["source"] == f"compensation:{BASE}"
    assert attributes["compensation_after"] <= attributes["compensation_before"]
    assert attributes["ratios"][:2] == [1.0, 1.0]
    assert all(0.5 <= ratio <= 1.6 for ratio in attributes["ratios"])
    assert len(attributes["ratios"]) == nfe
    row = next(r for r in finished.rows if r.nfe == nfe)
    assert row.calls_spent == sum(r[-1]["calls"] for r in table) + attributes["compensation_calls"]
    assert attributes["compensation_calls"] >= 48 * nfe


def test_only_the_ratios_of_the_base_move(finished):
    rows = [row[-1] for n in (4, 5) for row in trial_table(finished.out, f"tiny-nfe{n:02d}")]
    made = [
        load_schedule(row["schedule"]) for row in rows if row["source"].startswith("compensation:")
    ]
    assert [s.nfe for s in made] == [4, 5]
    for schedule in made:
        base = baseline(BASE, VPLinear(), schedule.nfe)
        assert schedule.times == base.times
        plain = [s.model_copy(update={"compensation": 1.0}) for s in schedule.steps]
        assert plain == list(base.steps)
        assert any(s.compensation != 1 for s in schedule.steps)
        lines = explain.headline(schedule)
        assert any("through 3 points in t" in line for line in lines)
        heads = [str(column.header) for column in explain.steps_table(schedule).columns]
        assert "compensation" in heads


def test_a_search_cut_before_its_end_compensates_nothing_twice(finished, tmp_path):
    text = (finished.out / "study.journal").read_bytes()
    for share in (0.7, 1.0):
        out = tmp_path / f"cut{share}"
        shutil.copytree(finished.out, out)
        (out / "study.journal").write_bytes(text[: int(share * len(text))])
        again = _search(tmp_path, "search.samples=64", out=out.name, resume=True)
        assert again.rows == finished.rows
        for name in ("tiny-nfe04", "tiny-nfe05"):
            assert trial_table(out, name) == trial_table(finished.out, name)


def test_without_a_base_the_best_candidates_are_compensated_and_lam_interpolates(tmp_path):
    overrides = (
        "search.nfe=[4]",
        "search.strategy=random+compensation",
        "compensation.base=[]",
        "compensation.top=2",
        "compensation.order=1",
        "compensation.variable=lam",
    )
    outcome = _search(tmp_path, *overrides)
    sources = [row[-1]["source"] for row in trial_table(outcome.out, "tiny-nfe04")]
    assert sum(s.startswith("compensation:") for s in sources) == 2
    assert len(sources) == 106


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compensation.base=unipc9/time", "compensation.base: solver 'unipc9' is unknown"),
        ("compensation.base=ddpm/time", "compensation.base: ddpm/time adds fresh noise"),
        ("compensation.base=heun/edm", "compensation.base: heun makes an odd number of calls"),
        ("compensation.low=1.2", "compensation.low = 1.2"),
        ("search.options={elite=3}", r"has its own table, \[compensation\]"),
        ("search.strategy=s3+compensate", "with \\+refine or \\+compensation"),
    ],
)
def test_a_wrong_table_is_one_line_before_anything_runs(tmp_path, override, message):
    with pytest.raises(StudyError, match=message) as error:
        _search(tmp_path, override)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "study.journal").exists()
