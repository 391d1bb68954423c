"""Warm starts: schedule files that join a search's first generation."""

import json

import numpy as np
import pytest

from fewstep.experiments.cli.rescore import load_evaluator
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.search.family import domain_of
from fewstep.search.preparing import load_warm, warm_start
from fewstep.space import (
    OdeSchedule,
    ProgramSchedule,
    StepSpec,
    StudyError,
    load_schedule,
    save_schedule,
)
from fewstep.space.baselines import baseline, named
from fewstep.space.domain import OdeDomain
from fewstep.space.growing import grown
from fewstep.space.masked_domain import MaskedDomain
from fewstep.space.noise import EDM, VPLinear
from tests.drawn_studies import STUDY as DRAWN
from tests.drawn_studies import write_drawn
from tests.studies import STUDY, trial_table, write_study

NOISE = VPLinear()


def moved(nfe: int, share: float = 0.3) -> OdeSchedule:
    """A member that is no named solver."""
    plain = baseline("dpmpp2m/logsnr", NOISE, nfe)
    times = list(plain.times)
    times[1] += share * (times[0] - times[1])
    return plain.model_copy(update={"times": tuple(times)})


def search(folder, out, warm, *overrides):
    text = STUDY.replace("nfe = [3]", f"nfe = [3]\nwarm = {json.dumps(warm)}")
    return run.search(load_study(write_study(folder, text), overrides), out)


def test_a_member_joins_after_the_named_solvers_and_is_none_of_them(tmp_path):
    given = moved(3)
    save_schedule(given, tmp_path / "files" / "mine.json")
    settings = ("budget.candidates=150",)
    outcome = search(tmp_path, tmp_path / "out", ["files/mine.json"], *settings)
    table = [row[-1] for row in trial_table(outcome.out)]
    sources = [a["source"] for a in table]
    at = sources.index("import:mine")
    solvers = named(NOISE, 3)
    assert at == len(solvers)
    assert sources[:at] == list(solvers)
    assert {a["generation"] for a in table[: at + 1]} == {0}
    assert sources.count("import:mine") == 1
    assert "adopted" not in table[at]
    assert "lam_1" in trial_table(outcome.out)[at][3]
    (row,) = outcome.rows
    assert not any(s.name.startswith("import") for s in row.named)
    assert table[at + 1]["generation"] == 1


def test_the_budget_counts_the_warm_start_and_its_files_change_the_search(tmp_path):
    save_schedule(moved(3), tmp_path / "mine.json")
    few = len(named(NOISE, 3)) + 1
    settings = (f"budget.candidates={few}", "search.strategy=refine")
    with_it = search(tmp_path, tmp_path / "a", ["mine.json"], *settings)
    assert sum(r[-1]["source"] == "import:mine" for r in trial_table(with_it.out)) == 1
    fewer = (f"budget.candidates={few - 1}", *settings[1:])
    without = search(tmp_path, tmp_path / "b", ["mine.json"], *fewer)
    assert not any(r[-1]["source"] == "import:mine" for r in trial_table(without.out))


def test_a_log_cut_after_the_first_generation_resumes_without_the_files(tmp_path):
    path = save_schedule(moved(3), tmp_path / "mine.json")
    text = STUDY.replace("nfe = [3]", 'nfe = [3]\nwarm = ["mine.json"]')
    config = load_study(write_study(tmp_path, text), ["budget.candidates=150"])
    whole = run.search(config, tmp_path / "whole")
    log = (whole.out / "study.journal").read_bytes().splitlines(keepends=True)
    last = next(i for i, line in enumerate(log) if b'"generation":1' in line)
    out = tmp_path / "cut"
    out.mkdir()
    (out / "study.journal").write_bytes(b"".join(log[:last]))
    path.unlink()
    assert run.search(config, out, resume=True).rows == whole.rows
    assert trial_table(out) == trial_table(whole.out)


@pytest.mark.parametrize("nfe", [2, 3, 4, 7])
def test_files_of_any_nfe_give_members_and_say_how_they_were_changed(nfe):
    domain = OdeDomain(NOISE, 4)
    given = {"x": moved(nfe)}
    every = warm_start(given, domain, [])
    found = [p for p in every if "outside" not in p.note]
    assert found
    assert all(domain.contains(p.schedule) is None for p in found)
    assert all(p.source == "import:x" for p in every)
    longer = [grown(given["x"], 4)] if nfe < 4 else []
    assert [p.schedule for p in every if p not in found] == longer
    if nfe == 4:
        assert [p.note for p in found] == [{}]
    else:
        assert {p.note["adopted"] for p in found} == {f"it makes {nfe} calls, not 4"}
    assert len({p.schedule.digest for p in found}) == len(found)
    assert warm_start(given, domain, [p.schedule for p in every]) == []


def test_what_is_outside_the_space_is_scored_as_it_is_and_as_the_member_next_to_it():
    steps = (StepSpec(), StepSpec(order=2, weights=(0.2,), dt_land=0.01), StepSpec(order=2))
    given = baseline("dpmpp2m/logsnr", NOISE, 3).model_copy(update={"steps": steps})
    domain = OdeDomain(NOISE, 3)
    itself, member = warm_start({"refined": given}, domain, [])
    assert itself.schedule == given
    assert "step 1: weights (0.2,) is not open" in itself.note["outside"]
    assert "step 1: weights (0.2,) is not open" in member.note["adopted"]
    assert domain.contains(member.schedule) is None
    mean = given.model_copy(update={"first": "mean", "steps": (*steps, StepSpec())[:3]})
    assert all("outside" not in p.note for p in warm_start({"m": mean}, domain, []))


def test_one_of_fewer_calls_is_scored_with_calls_added_where_that_is_possible():
    plain = baseline("dpmpp2m/logsnr", NOISE, 3)
    steps = (StepSpec(), *(StepSpec(order=2, weights=(0.2,), dt_land=0.01) for _ in range(2)))
    given = plain.model_copy(update={"steps": steps})
    longer, *members = warm_start({"refined": given}, OdeDomain(NOISE, 5), [])
    assert longer.schedule == grown(given, 5)
    assert "outside" in longer.note
    assert all("adopted" in p.note for p in members)
    corrected = baseline("unipc2-bh2/logsnr", NOISE, 3)
    steps = (corrected.steps[0].model_copy(update={"dt_land": 0.01}), *corrected.steps[1:])
    with_it = {"x": corrected.model_copy(update={"steps": steps})}
    found = warm_start(with_it, OdeDomain(NOISE, 5), [])
    assert found
    assert found[0].schedule == grown(with_it["x"], 5)  # correctors grow like any program
    assert "outside" in found[0].note


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "no such file"),
        ("damaged.json", "not valid JSON"),
        ("edm.json", "another (vp_linear)"),
        ("program.json", "a fitted program of 4 calls, to which calls can be added"),
        ("masked.json", "kind 'masked'"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_is_searched(tmp_path, name, message):
    (tmp_path / "damaged.json").write_text("{")
    save_schedule(baseline("ddim/logsnr", EDM(), 3), tmp_path / "edm.json")
    save_schedule(next(iter(MaskedDomain(8, 3).baselines().values())), tmp_path / "masked.json")
    save_schedule(ProgramSchedule.of(baseline("ddim/logsnr", NOISE, 4)), tmp_path / "program.json")
    with pytest.raises(StudyError) as error:
        search(tmp_path, tmp_path / "out", [name])
    assert message in str(error.value)
    assert "search.warm" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_files_of_one_name_keep_apart(tmp_path):
    for folder, nfe in (("a", 3), ("b", 4)):
        save_schedule(moved(nfe), tmp_path / folder / "s.json")
    text = STUDY.replace("nfe = [3]", 'nfe = [3]\nwarm = ["a/s.json", "b/s.json"]')
    config = load_study(write_study(tmp_path, text))
    found = load_warm(config, load_evaluator(config).problem)
    assert list(found) == ["s", "b/s.json"]
    assert found["s"] == load_schedule(tmp_path / "a" / "s.json")


@pytest.mark.parametrize("kind", ["masked", "particles"])
def test_schedules_of_other_kinds_start_every_nfe(tmp_path, kind):
    text = DRAWN.replace("nfe = [3]", 'nfe = [3]\nwarm = ["mine.json"]')
    config = load_study(write_drawn(tmp_path, kind, text))
    problem = load_evaluator(config).problem
    domain = domain_of(config, problem, 3)
    given = domain.sample(np.random.default_rng(5))
    save_schedule(given, tmp_path / "mine.json")
    (proposal,) = warm_start(load_warm(config, problem), domain, [])
    assert proposal.schedule.digest == given.digest
    assert proposal.source == "import:mine"
    save_schedule(domain.with_nfe(4).sample(np.random.default_rng(5)), tmp_path / "mine.json")
    (proposal,) = warm_start(load_warm(config, problem), domain, [])
    assert domain.contains(proposal.schedule) is None
    assert "calls" in proposal.note["adopted"]
