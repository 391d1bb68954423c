"""The whole search on a tiny exact model: what it leaves, and that killing it changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

from fewstep.experiments.benchmarks.killed import table
from fewstep.experiments.cli.page import Paged
from fewstep.predictors.yardstick import level
from fewstep.search import run
from fewstep.search.config import load_study, study_from_dict
from fewstep.search.record import held, open_storage
from fewstep.search.store import Store, Trials
from fewstep.space import StudyError, load_schedule
from tests.studies import STUDY, command, environment, fewstep, trial_table, write_study

STRATEGIES = ("random", "evolution", "tpe", "cmaes", "nsgaii", "qmc", "s3", "random+refine")


def _search(folder, out, *overrides, **options):
    config = load_study(write_study(folder), overrides)
    return run.search(config, out, display=Paged(), **options)


def _results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return _search(folder, folder / "out")


def test_a_search_leaves_schedules_results_and_pages(finished):
    out = finished.out
    for name in ("results.json", "study.json", "study.journal", "curves.png", "report.html"):
        assert (out / name).stat().st_size > 0
    schedule = load_schedule(out / "schedules" / "nfe03.json")
    assert schedule.nfe == 3
    origin = schedule.provenance
    assert origin["model"] == "tiny2False"
    assert set(origin) >= {"objective", "score", "interval", "baselines", "seeds", "fewstep"}
    assert "data:image/png" in (out / "report.html").read_text()
    assert not list(out.glob(".*"))


def test_results_hold_what_the_design_promises(finished):
    (row,) = _results(finished.out)["rows"]
    promised = {"nfe", "best_named", "best_named_score", "found_score", "ratio", "interval"}
    assert set(row) >= promised | {"teacher_self_error", "calls_spent"}
    assert row["ratio"] == pytest.approx(row["found_score"] / row["best_named_score"])
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    selected = [s for s in row["named"] if s["stream"] == "select"]
    assert row["best_named"] == min(selected, key=lambda s: s["score"])["name"]
    assert row["samples"] in (16, 32, 64, 128, 256)  # doubled, at most 16 times
    assert row["comparison"]["geometric"] == pytest.approx(row["ratio"])
    assert set(row["frechet"]) == {"found", "named"}
    assert row["use"] in ("found", row["best_named"])


def test_the_named_solvers_are_told_first_and_every_score_is_paid_once(finished):
    table = trial_table(finished.out)
    assert len(table) == 104
    attributes = [row[-1] for row in table]
    assert all("/" in a["source"] for a in attributes[:8])
    paid = {}
    for a in attributes:
        paid[a["digest"]] = paid.get(a["digest"], 0) + a["calls"]
    assert all(0 < calls < 8 * 3 for calls in paid.values())  # prefixes share calls in a block
    assert _results(finished.out)["rows"][0]["calls_spent"] == sum(paid.values())


def test_trials_carry_real_parameters(finished):
    found = [row[3] for row in trial_table(finished.out) if row[-1]["generation"] > 0]
    assert len(found) == 9
    assert all("lam_1" in params for params in found)


def test_scores_in_the_store_are_those_of_the_samples_in_the_store(finished):
    store = _store(finished.out)
    for stream, samples in (("", 8), ("select", 16), ("fresh", 16)):
        kept = [k for k in _results_of(store, stream) if k.status == "ok"]
        assert kept
        for result in kept:
            assert len(result.per_sample) == result.samples == samples
            assert result.score == pytest.approx(level(result.per_sample, "geometric"))


def _store(out, name="tiny"):
    storage = open_storage(None, out)
    identity = json.loads(json.dumps(load_study(out.parent / "study.toml").identity(budget=False)))
    identity |= {"objective.name": "endpoint_mse", "objective.statistic": "geometric"}
    return Store(storage, name, out, identity, resume=True)


def _results_of(store, stream):
    trials = store.trials(3, stream)
    return [trials.result(*key) for key in _keys(trials)]


def _keys(trials):
    table = trials.study.get_trials(deepcopy=False)
    return {(t.user_attrs["digest"], t.user_attrs["samples"]) for t in table}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_journal_cut_anywhere_resumes_to_the_same_end(tmp_path, strategy):
    """Every prefix of the journal is a place where a kill may have struck."""
    settings = (f"search.strategy={strategy}", "budget.candidates=120")
    whole = _search(tmp_path, tmp_path / "whole", *settings)
    journal = (whole.out / "study.journal").read_bytes()
    rng = np.random.default_rng(5)
    for share in (rng.uniform(0.02, 0.5), rng.uniform(0.5, 1.0)):
        out = tmp_path / f"cut{share:.3f}"
        out.mkdir()
        (out / "study.journal").write_bytes(journal[: int(share * len(journal))])
        resumed = _search(tmp_path, out, *settings, resume=True)
        assert trial_table(out) == trial_table(whole.out)
        assert resumed.rows == whole.rows
        digests = [load_schedule(o / "schedules" / "nfe03.json").digest for o in (out, whole.out)]
        assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random+refine"])  # all: experiments/benchmarks/killed.py
def test_a_search_killed_at_any_instant_ends_as_if_it_had_not_been(tmp_path, strategy):
    study = write_study(tmp_path, STUDY.replace("candidates = 104", "candidates = 120"))
    settings = ("-q", "--strategy", strategy)
    on_a_worker = ("--set", "search.workers=1")  # of a cluster that the command starts
    done = fewstep("search", str(study), "--out", "whole", *settings, *on_a_worker, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "whole" / "study.journal").stat().st_size
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command("search", str(study), "--out", "killed", *settings),
        cwd=tmp_path,
        env=environment(),
    )
    log, limit = out / "study.journal", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and log.stat().st_size >= 0.6 * size:
            break
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = fewstep("search", str(study), "--out", "killed", *settings, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert trial_table(out) == trial_table(tmp_path / "whole")
    assert _results(out) == _results(tmp_path / "whole")


def test_generations_in_flight_change_the_search_by_their_lag_only(tmp_path):
    """Lag 2 is another search than lag 1, and is itself repeatable."""
    settings = ("budget.candidates=130", "search.lag=2")
    one = _search(tmp_path, tmp_path / "one", *settings)
    two = _search(tmp_path, tmp_path / "two", *settings)
    assert trial_table(one.out) == trial_table(two.out)
    assert len(trial_table(one.out)) == 130


def test_a_finished_search_resumed_does_nothing_again(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    before = (out / "study.journal").read_bytes()
    again = _search(tmp_path, out, resume=True)
    assert again.rows == finished.rows
    assert (out / "study.journal").read_bytes() == before


def test_more_budget_goes_on_and_ends_as_if_it_had_been_there_from_the_start(tmp_path):
    settings = ["search.strategy=evolution", "search.lag=2"]
    whole = _search(tmp_path, tmp_path / "whole", *settings, "budget.candidates=123")
    out = tmp_path / "parts"
    for candidates in (40, 110, 123):  # within the named solvers, within a generation
        parts = _search(tmp_path, out, *settings, f"budget.candidates={candidates}", resume=True)
        assert len(trial_table(out)) == candidates
    assert trial_table(out) == trial_table(whole.out)
    assert parts.rows == whole.rows


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_a_search_stopped_at_any_trials_ends_as_if_it_had_not_been(tmp_path, monkeypatch, kind):
    """Within generations too: in flight are two, of which the first is told in part."""
    settings = ["search.strategy=evolution", "search.lag=2", "budget.candidates=123"]
    whole = _search(tmp_path, tmp_path / "whole", *settings)
    url = f"sqlite:///{tmp_path}/trials.db"
    settings += [f"search.storage={url}"] if kind == "database" else []
    plain, rng = Trials.add, np.random.default_rng()
    for k, at in enumerate(sorted(rng.integers(2, 125, size=3))):
        folder = tmp_path / ("out" if kind == "journal" else f"out{k}")

        def add(trials, kept, at=at):
            if trials.count == at:
                raise KeyboardInterrupt
            plain(trials, kept)

        monkeypatch.setattr(Trials, "add", add)
        try:
            _search(tmp_path, folder, *settings, resume=True)
        except KeyboardInterrupt:
            pass
        else:
            assert at >= 123
    monkeypatch.setattr(Trials, "add", plain)
    last = _search(tmp_path, folder, *settings, resume=True)
    assert last.rows == whole.rows
    found = _table_of(url, "tiny-nfe03") if kind == "database" else trial_table(folder)
    assert found == trial_table(whole.out)


def test_a_database_holds_a_search_for_any_folder_and_later_ones_beside_it(tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    settings = ("search.strategy=evolution", f"search.storage={url}")
    short = _search(tmp_path, tmp_path / "one", *settings, "budget.candidates=110")
    opened = [os.readlink(f) for f in Path("/proc/self/fd").glob("*") if f.is_symlink()]
    assert str(tmp_path / "trials.db") not in opened  # a search closes what it opened
    whole = _search(
        tmp_path, tmp_path / "elsewhere", *settings, "budget.candidates=118", resume=True
    )
    shutil.copytree(tmp_path / "elsewhere" / "teacher", tmp_path / "two" / "teacher")
    plain = _search(tmp_path, tmp_path / "plain", settings[0], "budget.candidates=118")
    assert whole.rows == plain.rows
    assert _table_of(url, "tiny-nfe03") == trial_table(plain.out)
    assert not (tmp_path / "one" / "study.journal").exists()
    _search(tmp_path, tmp_path / "two", *settings, "budget.candidates=100", "search.seed=1")
    assert _table_of(url, "tiny-nfe03") == trial_table(plain.out)
    assert len(_table_of(url, "tiny.2-nfe03")) == 100
    with pytest.raises(StudyError, match=r"search\.samples is 9"):
        _search(tmp_path, tmp_path / "three", *settings, "search.samples=9", resume=True)
    assert short.rows[0].trials == 110


def _table_of(url, name):
    return table(optuna.load_study(study_name=name, storage=url))


def test_a_damaged_journal_is_one_line_and_a_torn_one_is_cut(finished, tmp_path):
    lines = (finished.out / "study.journal").read_bytes().splitlines(keepends=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.journal").write_bytes(b"".join([*lines[:6], b'{"op_code"\n', *lines[6:]]))
    with pytest.raises(StudyError, match=r"study\.journal: line 7 is damaged"):
        _search(tmp_path, out, resume=True)
    (out / "study.journal").write_bytes(b"".join(lines)[:-20])
    again = _search(tmp_path, out, resume=True)
    assert again.rows == finished.rows


def test_a_study_written_down_reads_back(finished):
    data = json.loads((finished.out / "study.json").read_text())
    again = study_from_dict(data, folder=str(finished.out.parent))
    assert again.identity() == {
        **load_study(finished.out.parent / "study.toml").identity(),
        "objective.name": "endpoint_mse",
        "objective.statistic": "geometric",
    }


def test_resuming_another_study_names_the_setting(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    with pytest.raises(StudyError, match=r"search\.samples is 9"):
        _search(tmp_path, out, "search.samples=9", resume=True)


def test_an_output_folder_is_never_overwritten_unasked(finished, tmp_path):
    with pytest.raises(StudyError, match="--overwrite"):
        _search(tmp_path, finished.out)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StudyError, match="is a file"):
        _search(tmp_path, file)


def test_two_searches_cannot_write_to_one_folder(tmp_path):
    out = tmp_path / "out"
    with held(out, resume=False, overwrite=False):
        with pytest.raises(StudyError, match="another search"):
            _search(tmp_path, out)


@pytest.mark.parametrize(("broken", "word"), [("shape", "(8, 1)"), ("nan", "not finite")])
def test_a_broken_model_is_named_before_anything_is_searched(tmp_path, broken, word):
    from fewstep.space import ModelError

    with pytest.raises(ModelError) as error:
        _search(tmp_path, tmp_path / "out", f"model.broken='{broken}'")
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_refined_candidates_are_told_last_with_their_cost_and_win_here(tmp_path):
    settings = ("refine.rounds=6", "refine.samples=128", "refine.held=64", "refine.batch=32")
    more = ("search.strategy=refine", "search.samples=64", "final.samples=128")
    outcome = _search(tmp_path, tmp_path / "out", *settings, *more)
    table = [row[-1] for row in trial_table(outcome.out)]
    refined = [a for a in table if a["source"].startswith("refine:")]
    assert table[-len(refined) :] == refined
    assert len(refined) == 1
    (row,) = outcome.rows
    assert row.source.startswith("refine:")
    assert not row.best_named.startswith("refine")
    assert row.ratio < 0.9
    spent = sum(a["calls"] for a in table) + sum(a["refine_calls"] for a in refined)
    assert row.calls_spent == spent


def test_with_grow_each_nfe_starts_from_the_one_below_and_a_cut_between_them_resumes(tmp_path):
    settings = ["refine.grow=true", "search.nfe=[3,4]", "search.strategy=refine"]
    settings += ["refine.rounds=6", "refine.samples=128", "refine.held=64", "refine.batch=32"]
    settings += ["search.samples=64", "final.samples=128", "cpr.fit=false"]
    whole = _search(tmp_path, tmp_path / "whole", *settings)
    tried = [trial_table(whole.out, f"tiny-nfe0{n}")[-1][-1]["refine_starts"] for n in (3, 4)]
    assert not any("grown" in name for name in tried[0])
    assert tried[1][0] == "grown:nfe03"  # its score stays that of fewer calls' best
    log = (whole.out / "study.journal").read_bytes().splitlines(keepends=True)
    ends = [i for i, line in enumerate(log) if b'"source":"refine:' in line]
    assert len(ends) == 2
    out = tmp_path / "cut"
    out.mkdir()
    (out / "study.journal").write_bytes(b"".join(log[: ends[1]]))
    assert _search(tmp_path, out, *settings, resume=True).rows == whole.rows
    assert trial_table(out, "tiny-nfe04") == trial_table(whole.out, "tiny-nfe04")


def test_with_the_mean_schedules_have_an_image_beside_them_and_a_cut_search_resumes(tmp_path):
    settings = ["refine.mean=true", "refine.grow=true", "search.nfe=[2,3]", "cpr.fit=false"]
    settings += ["refine.rounds=6", "refine.samples=64", "refine.held=64", "refine.batch=32"]
    settings.append("search.strategy=refine")
    whole = _search(tmp_path, tmp_path / "whole", *settings)
    path = whole.out / "schedules" / "nfe02.json"
    schedule = load_schedule(path)
    assert bool((schedule.program.k != 0).any())
    assert path.with_suffix(".safetensors").exists()
    assert schedule.constant.shape == (2,)
    log = (whole.out / "study.journal").read_bytes().splitlines(keepends=True)
    ends = [i for i, line in enumerate(log) if b'"source":"refine:' in line]
    assert len(ends) == 2
    for kept in (ends[1], ends[1] + 1):  # before a refinement was told, and after
        out = tmp_path / f"cut{kept}"
        out.mkdir()
        (out / "study.journal").write_bytes(b"".join(log[:kept]))
        assert _search(tmp_path, out, *settings, resume=True).rows == whole.rows
    more = ["search.nfe=[3]", "search.strategy=random", f"search.warm=['{path}']"]
    more.append("budget.candidates=200")  # the named solvers come first
    warm = _search(tmp_path, tmp_path / "warm", *more)
    log = (warm.out / "study.journal").read_bytes().splitlines(keepends=True)
    out = tmp_path / "warm_cut"
    out.mkdir()
    first = next(i for i, line in enumerate(log) if b'"source":"import' in line)
    (out / "study.journal").write_bytes(b"".join(log[: first + 1]))
    assert _search(tmp_path, out, *more, resume=True).rows == warm.rows
    assert any(row[-1]["source"] == "import:nfe02" for row in trial_table(out))


def test_frechet_searches_too(tmp_path):
    outcome = _search(tmp_path, tmp_path / "out", "objective.name=frechet", "budget.candidates=20")
    (row,) = outcome.rows
    assert row.found_median is None
    assert row.interval[0] <= row.interval[1]


def test_one_run_fills_a_ladder_and_names_its_pareto_front(tmp_path):
    settings = ("search.nfe=[3, 4, 6]", "search.strategy=random", "budget.candidates=30")
    out = _search(tmp_path, tmp_path / "out", *settings).out
    results = _results(out)
    score = {row["nfe"]: row["found_score"] for row in results["rows"]}
    undominated = [n for n in score if not any(m < n and score[m] <= score[n] for m in score)]
    assert results["pareto"] == undominated
    assert (out / "pareto.png").stat().st_size > 0
    assert sorted(p.name for p in (out / "schedules").iterdir()) == [
        "nfe03.json",
        "nfe04.json",
        "nfe06.json",
    ]


def test_a_row_that_fewer_calls_match_is_off_the_front(finished):
    from dataclasses import replace

    from fewstep.experiments.cli.closing import results_table
    from fewstep.search.verdict import pareto

    (row,) = finished.rows
    rows = [replace(row, nfe=n, found_score=s) for n, s in ((8, 3.0), (4, 5.0), (6, 2.0))]
    assert [r.nfe for r in pareto(rows)] == [4, 6]
    assert list(results_table(rows, "score").columns[0].cells) == ["8*", "4", "6"]
