"""Plans: which calls are guided, side by side, of which network; and searches at equal cost."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import optuna
import pytest

from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.space import ScheduleError, StudyError, load_schedule
from fewstep.space import noise as noises
from fewstep.space.baselines import named
from fewstep.space.costs import Prices, pattern
from fewstep.space.plans import PlanDomain, PlannedCall, plan_of, rivals
from tests.studies import STUDY, called, write_study

VP = noises.VPLinear()
DOMAINS = {
    "guided": PlanDomain(VP, 8, scale=3.0),
    "stages": PlanDomain(VP, 6, Prices(beside=0.5), width=3),
    "networks": PlanDomain(VP, 5, Prices(networks={"small": 0.25}), networks=("", "small")),
    "all": PlanDomain(
        VP, 7, Prices(beside=0.5, networks={"s": 0.5}), 2.0, networks=("", "s"), width=2
    ),
}


def calls(schedule, domain) -> str:
    return pattern(schedule.program, guided=domain.scale is not None)


@pytest.mark.parametrize("name", DOMAINS)
def test_parameters_members_and_moves_are_views_of_one_plan(name):
    domain, rng = DOMAINS[name], np.random.default_rng(0)
    a = domain.sample(rng)
    for _ in range(25):
        b = domain.mutate(a, rng)
        assert plan_of(b, guided=domain.scale is not None) != plan_of(
            a, guided=domain.scale is not None
        )
        for s in (b, domain.crossover(a, b, rng), domain.sample(rng)):
            assert domain.contains(s) is None
            again = domain.from_params(domain.params(s))
            assert again.program == s.program
            assert set(domain.params(s)) <= {p.name for p in domain.parameters}
            cost = s.program.cost(domain.prices, guided=domain.scale is not None)
            assert domain.cost - domain._cheapest < cost <= domain.cost + 1e-9
            assert domain.encode(s).shape == domain.encode(a).shape
        a = b
    wild = {p.name: p.choices[int(rng.integers(len(p.choices)))] for p in domain.parameters}
    assert domain.contains(domain.from_params(wild)) is None


def test_at_a_cost_every_pattern_of_guided_calls_is_a_member_once():
    domain, rng = DOMAINS["guided"], np.random.default_rng(1)
    found = {calls(domain.sample(rng), domain) for _ in range(600)}
    assert len(found) == 34  # the ways to write 8 as ones and twos
    assert {"GGGG", "uGGGu", "uuuuuuuu"} <= found
    assert calls(domain.from_params({}), domain) == "GGGG"  # the neutral plan
    late = domain.from_params({"guided_0": False, "guided_4": True, "guided_5": True})
    assert calls(late, domain) == "uGGGu"  # the last call is paid with what is left


def test_stages_and_networks_are_plans_too_and_what_cannot_be_is_refused():
    domain = DOMAINS["stages"]
    wide = domain.from_params({f"beside_{c}": True for c in range(12)})
    assert calls(wide, domain) == "(uuu)(uuu)(uuu)"  # 1 + .5 + .5 each
    assert [call.beside for call in plan_of(wide, guided=False)] == [False, True, True] * 3
    domain = DOMAINS["networks"]
    mixed = domain.from_params({f"network_{c}": "small" for c in (0, 1, 2, 3)})
    assert calls(mixed, domain) == "u[small]u[small]u[small]u[small]uuuu"
    assert domain.contains(DOMAINS["stages"].from_params({})).startswith("its calls uuuuuu are")
    assert plan_of(mixed, guided=False)[0] == PlannedCall(False, "small")
    for wrong, text in (
        ({"cost": 0.5, "networks": ("",)}, r"cost 0\.5 does not pay for one call of 1"),
        ({"width": 0}, "a stage has one call or more"),
        ({"start": "nobody/time"}, r"space\.start: solver 'nobody' is unknown"),
        ({"networks": ("", "")}, "name each value once"),
    ):
        with pytest.raises(ScheduleError, match=text):
            PlanDomain(**{"noise": VP, "cost": 5} | wrong)


def test_rivals_cost_as_much_guided_throughout_in_an_interval_or_on_one_network():
    domain = PlanDomain(VP, 6, Prices(networks={"small": 0.5}), scale=3.0, networks=("", "small"))
    found = rivals(domain)
    patterns = Counter(name.rpartition("/")[2] for name in found)
    assert {"GGG", "uGGu", "GGuu", "uuGG"} <= set(patterns)
    assert "G[small]" * 6 in patterns
    assert patterns["GGG"] > 50
    for name, schedule in found.items():
        assert schedule.program.cost(domain.prices) == 6, name
    assert len(rivals(PlanDomain(VP, 4))) == len(named(VP, 4))  # no guidance, no intervals


TEXT = (
    STUDY.replace("nfe = [3]", "cost = [4]\nguidance = [3]\nrace = []")
    .replace('"evolution"', '"s3+refine"')
    .replace("candidates = 104", "candidates = 10")
    .replace("generation = 8", "generation = 5")
    .replace("rounds = 2\n", "rounds = 2\nshort = [8, 1]\ntop = 1\n")
)


def _search(folder, text=TEXT, *overrides, **more):
    return run.search(load_study(write_study(folder, text), overrides), folder / "out", **more)


def trials(out):
    """The trials that were plans."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    told = optuna.load_study(study_name="tiny-cost04", storage=storage).trials
    return [t for t in told if "plan_calls" in t.user_attrs]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return _search(tmp_path_factory.mktemp("plans"))


def test_a_search_by_cost_finds_a_plan_and_says_calls_depth_and_cost(finished, capsys):
    (row,) = finished.rows
    assert (row.cost, row.depth) == (4, row.nfe)
    schedule = load_schedule(finished.out / "schedules" / "cost04_w3.json")
    kept = schedule.program
    assert kept.cost(Prices()) == 4
    if row.use == "found":
        assert pattern(kept) == row.calls
    data = json.loads((finished.out / "results.json").read_text())
    assert data["pareto"] == [4]
    assert data["rows"][0]["calls"] == row.calls
    assert any("/" in s.name and set(s.name.rpartition("/")[2]) <= {"u", "G"} for s in row.named)
    code, out, _ = called(capsys, "report", finished.out, "--no-decisions")
    assert code == 0
    assert row.calls in out


def test_every_plan_is_scored_after_a_fit_that_is_counted(finished):
    told = trials(finished.out)
    assert len(told) == 10
    assert len({t.user_attrs["digest"] for t in told}) == 5  # all plans of cost 4
    paid = [t for t in told if t.user_attrs["calls"]]
    assert len(paid) == 5  # a plan proposed again costs nothing
    for t in told:
        fitted = load_schedule(t.user_attrs["schedule"])
        assert fitted.nfe == len(fitted.program.t)
        assert t.user_attrs["plan_calls"] > 0
        assert t not in paid or t.user_attrs["calls"] > t.user_attrs["plan_calls"]
        assert any(name.startswith("guided_") for name in t.params)


def test_a_search_by_cost_goes_on_where_it_was_killed(finished, tmp_path):
    folder = tmp_path / "again"
    config = load_study(write_study(folder, TEXT), ["budget.candidates=5"])
    first = run.search(config, folder / "out")
    more = run.search(load_study(folder / "study.toml"), folder / "out", resume=True)
    assert more.rows[0].trials >= first.rows[0].trials

    def told(out):
        return [(t.params, t.value, t.user_attrs["digest"]) for t in trials(out)]

    assert told(folder / "out") == told(finished.out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("cost = [4]", "cost = [4]\nnfe = [3]"), "give one of nfe"),
        (("cost = [4]", "cost = [4, 4]"), r"cost \[4, 4\] names a number twice"),
        (('"s3+refine"', '"compensation"'), "go with search.nfe, not with search.cost"),
        (("[teacher]", "[prices]\nguided = 0\n[teacher]"), "prices.guided = 0"),
        (("[teacher]", "[space]\nwidth = 0\n[teacher]"), "a stage has one call or more"),
        (("[teacher]", "[space]\norders = [1]\n[teacher]"), "space.orders is an unknown key"),
    ],
)
def test_studies_by_cost_that_make_no_sense_are_refused_in_a_line(tmp_path, change, text):
    with pytest.raises(StudyError, match=text):
        _search(tmp_path, TEXT.replace(*change))
