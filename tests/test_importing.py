"""Published USF schedules: all 40 import or are refused with the reason; pickles stay shut."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from fewstep.experiments.cli.importing import import_usf
from fewstep.space import ScheduleError, load_schedule, save_schedule
from tests.oracles import REFERENCE

PUBLISHED = sorted((REFERENCE / "usf_schedules").glob("*.json"))
RELEASED = sorted((REFERENCE / "usf_pth").glob("*.pth"))


def test_there_are_forty():
    assert len(PUBLISHED) == 40
    assert len(RELEASED) == 3


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_every_published_schedule_imports_or_is_refused_with_the_reason(path, tmp_path):
    data = json.loads(path.read_text())
    if data["uses_v3"]:
        with pytest.raises(ScheduleError, match="DPM-Solver-v3 steps with per-pixel statistics"):
            import_usf(path)
    s = import_usf(path, v3="identity")
    assert s.nfe == s.program.nfe == data["nfe"]
    skips = [c for c in data["skip_coefficients"] if c != 1.0]
    assert bool(skips) == ("skip_coefficients" in s.provenance)
    assert load_schedule(save_schedule(s, tmp_path / "s.json")).digest == s.digest


@pytest.mark.parametrize("path", RELEASED, ids=lambda p: p.stem)
def test_a_released_pickle_and_its_json_form_are_the_same_program(path):
    a = import_usf(path, v3="identity")
    b = import_usf(REFERENCE / "usf_schedules" / f"{path.stem}.json", v3="identity")
    assert torch.allclose(a.program.b, b.program.b, rtol=0, atol=1e-9)
    assert torch.allclose(a.program.t, b.program.t, rtol=0, atol=1e-9)


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_bad_files_are_one_clear_line_and_nothing_is_executed(tmp_path):
    hostile = tmp_path / "lsun_nfe5.pth"
    torch.save({"timesteps": Hostile()}, hostile)
    (tmp_path / "lsun_raw.pth").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "cut.json").write_text('{"timesteps": [')
    (tmp_path / "other.json").write_text('{"noise_schedule": {"kind": "edm"}}')
    (tmp_path / "unknown.json").write_text('{"timesteps": [1.0]}')
    for name, words in (
        ("lsun_nfe5.pth", "not a published USF schedule"),
        ("lsun_raw.pth", "not a published USF schedule"),
        ("cut.json", "not a published USF schedule"),
        ("other.json", "is missing"),
        ("unknown.json", "name --family"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(ScheduleError, match=words) as caught:
            import_usf(tmp_path / name)
        assert "\n" not in str(caught.value)
