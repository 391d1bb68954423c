import json
from pathlib import Path

import pytest

from fewstep.search.config import load_study, study_from_dict
from fewstep.space import StudyError
from tests.studies import STUDY, write_study

STUDIES = sorted((Path(__file__).parents[1] / "experiments" / "studies").glob("*.toml"))


def _data(**tables):
    base = {"model": {"factory": "m:f"}, "budget": {"candidates": 5}, "search": {"nfe": [4]}}
    for name, values in tables.items():
        base[name] = base.get(name, {}) | values
    return base


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"search": {"nef": 3}}, "search.nef is an unknown key"),
        ({"model": {"factory": "nofunction"}}, "not of the form module.path:function"),
        ({"search": {"nfe": [0]}}, "search.nfe.0 = 0"),
        ({"search": {"nfe": []}}, "nfe is empty"),
        ({"search": {"nfe": [4, 4]}}, "names a number twice"),
        ({"search": {"seed": -1}}, "search.seed = -1"),
        ({"budget": {"candidates": [5, 6]}}, "holds 2 numbers for 1 NFEs"),
        ({"budget": {"calls": 100}}, "exactly one of candidates, calls, seconds"),
        ({"final": {"samples": float("nan")}}, "final.samples"),
    ],
)
def test_a_wrong_study_is_one_line_that_names_the_key(tables, message):
    with pytest.raises(StudyError) as error:
        study_from_dict(_data(**tables))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_factory_is_named():
    with pytest.raises(StudyError, match="exactly one of factory and pipeline"):
        study_from_dict({"model": {}, "budget": {"candidates": 5}, "search": {"nfe": [4]}})


def test_arguments_of_the_factory_are_the_other_keys_of_its_table():
    _, arguments = study_from_dict(_data(model={"guidance": 2.0})).model.built_by("")
    assert arguments == {"guidance": 2.0}


def test_overrides_read_toml_values_and_text(tmp_path):
    path = write_study(tmp_path)
    overrides = ["search.samples=32", "search.nfe=[4, 5]", "search.strategy=random"]
    config = load_study(path, [*overrides, "budget.calls=100000"])
    assert config.search.samples == 32
    assert config.search.nfe == (4, 5)
    assert config.search.strategy == "random"
    assert config.budget.candidates is None
    assert config.candidates() == dict.fromkeys((4, 5), 100000 // (32 * 9))


@pytest.mark.parametrize("override", ["search.samples", "=3", "search.samples.deep=3"])
def test_a_malformed_override_is_refused(tmp_path, override):
    with pytest.raises(StudyError):
        load_study(write_study(tmp_path), [override])


def test_a_broken_or_absent_file_is_one_line(tmp_path):
    with pytest.raises(StudyError, match="no such study file"):
        load_study(tmp_path / "absent.toml")
    with pytest.raises(StudyError, match="not valid TOML"):
        load_study(write_study(tmp_path, STUDY + "\n[search"))


def test_identity_leaves_out_what_only_decides_speed_and_place(tmp_path):
    path = write_study(tmp_path)
    a = load_study(path, ["search.workers=0", "tracking.enabled=false"])
    b = load_study(path, ["search.workers=2", "tracking.enabled=true"])
    c = load_study(path, ["search.samples=9"])
    assert a.identity() == b.identity()
    assert a.identity() != c.identity()
    assert json.loads(json.dumps(a.resolved()))["search"]["samples"] == 8


def test_a_budget_that_pays_for_nothing_is_refused():
    config = study_from_dict({**_data(), "budget": {"calls": 10}})
    with pytest.raises(StudyError, match="does not pay for one candidate"):
        config.candidates()


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_studies_that_are_shipped_can_be_read(path):
    config = load_study(path)
    assert config.name == path.stem
    assert config.candidates() is not None
    scales = config.search.guidance or ()
    names = {config.at_guidance(scale).name for scale in scales}
    assert len(names) == len(scales)


def test_a_budget_is_shared_evenly_by_the_scales():
    config = study_from_dict(_data(search={"guidance": [1, 4.5]}) | {"budget": {"calls": 1000}})
    part = config.at_guidance(4.5)
    assert part.budget.calls == 500
    assert part.scale == 4.5
    with pytest.raises(StudyError, match=r"lists 2 scales: choose one"):
        config.scale  # noqa: B018
