"""Prices by the clock: in proportion to what calls take, and kept with the search."""

from __future__ import annotations

import json
import time

import pytest
import torch

from fewstep.samplers import Problem, from_model
from fewstep.samplers.denoiser import Networks
from fewstep.samplers.prices import LEAST, TURNS, measured_prices, prices_in_words
from fewstep.search import run
from fewstep.search.config import load_study
from fewstep.search.display import Display
from fewstep.space import StudyError
from fewstep.space import noise as noises
from fewstep.space.costs import Prices
from tests.studies import write_study
from tests.test_plans import TEXT

VP = noises.VPLinear()


class Clock:
    """Seconds that pass only where a network burns them."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def network(self, each: float, start: float = 0.0, slow_first: float = 0.0):
        """A network that takes `start` a call and `each` a sample, and longer the first time."""
        state = {"first": slow_first}

        def net(x, label, k=None):
            self.now += start + each * len(x) + state.pop("first", 0.0)
            return x

        null = {"null_cond": lambda c: {"k": torch.zeros_like(c["k"])}}
        return from_model(net, VP, "eps", **null)


def problem(denoiser, guidance=None) -> Problem:
    return Problem(denoiser, (2,), cond=lambda i: {"k": i}, guidance=guidance)


def test_prices_are_what_calls_take_beside_an_unguided_one(monkeypatch):
    clock = Clock(monkeypatch)
    main = clock.network(1.0, start=8.0, slow_first=500.0)
    both = Networks(main, {"small": (clock.network(0.5), 0.7)})
    found = measured_prices(problem(both, 3.0), 16)
    assert found == Prices(1.7, 1.0, 0.67, {"small": 0.33})  # 40, 24, 40 - 24 and 8 of 24
    assert prices_in_words(found, 16) == (
        "prices measured at batch 16: guided 1.7, unguided 1, 0.67 of it beside another, "
        "network small 0.33 times"
    )
    asked = main.calls
    assert asked == 3 * (TURNS + 1)  # guided, unguided and two at once, a warm-up of each


def test_without_guidance_none_is_asked_for_and_no_price_is_nothing(monkeypatch):
    clock = Clock(monkeypatch)
    idle = clock.network(0.0, start=1.0)
    for guidance in (None, 1.0):
        found = measured_prices(problem(idle, guidance), 2)
        assert found == Prices(2.0, 1.0, LEAST)
    assert idle.forwards == idle.calls // 2 * (2 + 4)  # never a batch of both branches


class Notes(Display):
    def __init__(self):
        self.lines: list[str] = []

    def note(self, text):
        self.lines.append(text)


MEASURED = TEXT.replace("[teacher]", "[prices]\nmeasure = 4\n[teacher]")


def test_a_search_keeps_the_prices_it_began_with(tmp_path, monkeypatch):
    asked: list[int] = []

    def fake(problem, batch):
        asked.append(batch)
        return Prices(guided=3.0)

    monkeypatch.setattr(run, "measured_prices", fake)
    config, notes = load_study(write_study(tmp_path, MEASURED), ["budget.candidates=4"]), Notes()
    first = run.search(config, tmp_path / "out", display=notes)
    assert asked == [4]
    assert (
        "prices measured at batch 4: guided 3, unguided 1, 1 of it beside another" in notes.lines
    )
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["prices"] == {"guided": 3.0, "unguided": 1.0, "beside": 1.0, "networks": {}}
    assert all(len(row.calls.replace("G", "GGG")) <= 4 for row in first.rows)

    monkeypatch.setattr(run, "measured_prices", lambda *_: pytest.fail("measured anew"))
    again = load_study(tmp_path / "study.toml", ["budget.candidates=6"])
    more = run.search(again, tmp_path / "out", resume=True)
    assert more.rows[0].trials > first.rows[0].trials
    rewritten = json.loads((tmp_path / "out" / "results.json").read_text())
    assert rewritten["prices"] == written["prices"]


def test_prices_given_by_name_replace_a_networks_own_and_are_not_measured_without_cost(tmp_path):
    config = load_study(write_study(tmp_path, TEXT), ["prices.networks.small=0.5"])
    assert Prices(**config.prices.listed).of(guided=False, network="small") == 0.5
    with pytest.raises(StudyError, match=r"prices\.measure goes with search\.cost"):
        load_study(
            write_study(tmp_path, TEXT.replace("cost = [4]", "nfe = [3]")), ["prices.measure=4"]
        )
    with pytest.raises(StudyError, match=r"prices\.measure = 0"):
        load_study(write_study(tmp_path, TEXT), ["prices.measure=0"])
