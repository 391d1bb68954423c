"""Searches of masked and particle schedules: the same driver, files, log and command line."""

import dataclasses
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest

from fewstep.experiments.__main__ import main
from fewstep.experiments.cli.page import Paged
from fewstep.search import run
from fewstep.search.config import load_study, study_from_dict
from fewstep.search.verdict import Row
from fewstep.search.work import Block, Evaluator, load_problem
from fewstep.space import FewstepError, ScheduleError, StudyError, load_schedule
from tests.drawn_studies import STUDY, write_drawn
from tests.studies import trial_table

KINDS = ("masked", "particles")
STRATEGIES = ("random", "evolution", "tpe", "cmaes", "s3")


def _search(folder, kind, out, *overrides, **options):
    config = load_study(write_drawn(folder, kind), overrides)
    return run.search(config, out, display=Paged(), **options)


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return request.param, _search(folder, request.param, folder / "out", "search.nfe=[2,3]")


def test_a_search_leaves_what_every_search_leaves(finished):
    kind, outcome = finished
    out = outcome.out
    for name in ("results.json", "study.json", "study.journal", "curves.png", "report.html"):
        assert (out / name).stat().st_size > 0
    assert (out / "pareto.png").stat().st_size > 0
    assert not (out / "samples.png").exists()  # neither problem has a picture
    schedule = load_schedule(out / "schedules" / "nfe03.json")
    assert (schedule.kind, schedule.nfe) == (kind, 3)
    origin = schedule.provenance
    assert set(origin) >= {"model", "objective", "score", "interval", "baselines", "seeds"}
    assert "teacher" not in origin
    assert json.loads((out / "study.json").read_text())["objective"]["name"] == outcome.objective


def test_results_compare_with_the_best_named_and_hold_the_facts(finished):
    kind, outcome = finished
    data = json.loads((outcome.out / "results.json").read_text())
    for row in data["rows"]:
        assert row["teacher_self_error"] is None
        assert row["ratio"] == pytest.approx(row["found_score"] / row["best_named_score"])
        selected = [s for s in row["named"] if s["stream"] == "select"]
        assert row["best_named"] == min(selected, key=lambda s: s["score"])["name"]
        (fact,) = row["facts"]
        assert fact == {"masked": "measured", "particles": "least_ess"}[kind]
        assert json.loads(json.dumps(Row.from_dict(row).to_dict())) == row
    assert data["objective"] == outcome.objective
    assert fact in (outcome.out / "report.html").read_text()


def test_the_named_schedules_are_told_first_and_trials_have_parameters(finished):
    kind, outcome = finished
    rows = trial_table(outcome.out)
    first = {"masked": "uniform", "particles": "target_score/logsnr/euler"}[kind]
    assert rows[0][-1]["source"] == first
    assert len(rows) == 70
    searched = [row for row in rows if row[-1]["generation"] > 0]
    key = {"masked": "count_0", "particles": "log_zeta_0"}[kind]
    assert all(key in row[3] for row in searched)


def test_calls_are_those_of_every_sequence_or_particle(finished):
    kind, outcome = finished
    paid = [row[-1]["calls"] for row in trial_table(outcome.out)]
    each = 32 * 3 * (16 if kind == "particles" else 1)
    assert set(paid) <= {0, each}
    assert next(r for r in outcome.rows if r.nfe == 3).calls_spent == sum(paid)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_log_cut_anywhere_resumes_to_the_same_end(tmp_path, kind, strategy):
    settings = (f"search.strategy={strategy}", "search.samples=8", "final.samples=16")
    whole = _search(tmp_path, kind, tmp_path / "whole", *settings)
    log = (whole.out / "study.journal").read_bytes()
    for share in (0.1, 0.8):
        out = tmp_path / f"cut{share}"
        out.mkdir()
        (out / "study.journal").write_bytes(log[: int(share * len(log))])
        resumed = _search(tmp_path, kind, out, *settings, resume=True)
        assert trial_table(out) == trial_table(whole.out)
        assert resumed.rows == whole.rows


def test_a_finished_search_resumed_does_nothing_again(finished, tmp_path):
    kind, outcome = finished
    out = tmp_path / "copy"
    shutil.copytree(outcome.out, out)
    again = _search(tmp_path, kind, out, "search.nfe=[2,3]", resume=True)
    assert again.rows == outcome.rows
    if kind == "particles":  # features are not kept: a score of all samples is drawn again
        journals = [(o / "study.journal").read_bytes() for o in (out, outcome.out)]
        assert journals[0] == journals[1]
    data = json.loads((out / "study.json").read_text())
    again = run.search(study_from_dict(data, folder=str(outcome.out.parent)), out, resume=True)
    assert again.rows == outcome.rows


def test_a_small_space_is_searched_whole_and_its_best_is_kept(tmp_path):
    settings = ("search.strategy=random", "budget.candidates=60", "final.top=1")
    outcome = _search(tmp_path, "masked", tmp_path / "out", *settings)
    table = trial_table(outcome.out)
    told = {
        tuple(row[3][f"count_{k}"] for k in range(3)) for row in table if row[-1]["generation"] > 0
    }
    assert told == {(a, b, 5 - a - b) for a in range(1, 4) for b in range(1, 5 - a)}
    (row,) = outcome.rows
    assert row.found_search_score == min(values[0] for _, _, values, _, _ in table)


@pytest.mark.slow
def test_more_calls_are_better_and_token_by_token_is_the_floor(tmp_path):
    settings = ("search.nfe=[1,3,5]", "final.samples=8192", "search.block=[4,4096]")
    outcome = _search(tmp_path, "masked", tmp_path / "out", "budget.candidates=16", *settings)
    scores = [row.best_named_score for row in outcome.rows]
    assert all(a > b for a, b in pairwise(scores))


@pytest.mark.slow
def test_evolution_finds_particles_better_than_every_policy(tmp_path):
    more = ("budget.candidates=200", "final.samples=512", "search.samples=128")
    outcome = _search(tmp_path, "particles", tmp_path / "out", "search.nfe=[4]", *more)
    assert outcome.rows[0].interval[1] < 1


def test_the_strength_of_a_step_can_be_searched(tmp_path):
    settings = ("model.dense=true", "space.strength=[1.0, 2.5]", "final.samples=16")
    outcome = _search(tmp_path, "particles", tmp_path / "out", *settings)
    made = [row for row in trial_table(outcome.out) if row[-1]["generation"] > 0]
    assert outcome.rows[0].failed == 0
    assert {row[3][f"b_{i}"] for row in made for i in range(3)} > {2.0}


def test_how_a_reward_is_weighed_and_when_it_acts_is_searched(tmp_path):
    settings = ("model.tilt='state'", "space.reward_weight=['gradient', 'path']")
    more = ("space.strength=[0.0, 1.5]", "final.samples=16", "search.samples=8")
    more = (*more, "budget.candidates=100")
    outcome = _search(tmp_path, "particles", tmp_path / "out", *settings, *more)
    made = [row for row in trial_table(outcome.out) if row[-1]["generation"] > 0]
    assert outcome.rows[0].failed == 0
    assert {row[3]["reward_weight"] for row in made} == {"gradient", "path"}
    assert len({row[3]["b_1"] for row in made}) > 3
    row = json.loads((outcome.out / "results.json").read_text())["rows"][0]
    assert any("+path/" in entry["name"] for entry in row["named"])


@pytest.mark.parametrize("kind", KINDS)
def test_s3_starts_from_what_other_numbers_of_calls_taught(tmp_path, kind):
    settings = ["search.strategy=s3", "search.nfe=[3,4]", "search.samples=8", "final.samples=16"]
    if kind == "masked":  # counts alone leave next to nothing to find
        settings.append("space.temperature=[0.5, 2.0]")
    outcome = _search(tmp_path, kind, tmp_path / "out", *settings)
    sources = [row[-1]["source"] for row in trial_table(outcome.out, "tiny-nfe04")]
    assert "adopted" in sources
    assert "adopted" not in [row[-1]["source"] for row in trial_table(outcome.out)]


def test_particles_race_and_their_facts_survive(tmp_path):
    settings = ("search.race=[8,16]", "final.samples=16", "search.block=[4,8]")
    outcome = _search(tmp_path, "particles", tmp_path / "out", *settings)
    samples = {row[-1]["samples"] for row in trial_table(outcome.out)}
    assert samples > {8}
    assert 0 < outcome.rows[0].facts["least_ess"][0] <= 1


def test_samples_without_a_measure_are_left_out_and_counted(tmp_path):
    outcome = _search(tmp_path, "masked", tmp_path / "out", "model.broken='gaps'")
    found, named = outcome.rows[0].facts["measured"]
    assert 0.2 < found < 1
    assert 0.2 < named < 1
    assert np.isfinite(outcome.rows[0].interval).all()


def test_a_prompt_leaves_fewer_positions_to_decide(tmp_path):
    outcome = _search(tmp_path, "masked", tmp_path / "out", "model.given=2", "search.nfe=[2]")
    schedule = load_schedule(outcome.out / "schedules" / "nfe02.json")
    assert schedule.length == 3


def test_blocks_of_another_size_give_masked_sequences_the_same_scores(tmp_path):
    evaluator = Evaluator.of(load_study(write_drawn(tmp_path, "masked")))
    problem = evaluator.problem
    schedule = problem.named(3)["linear"]
    parts = {}
    for size in (24, 5):
        blocks = Block.cover([schedule], "x", range(24), size)
        parts[size] = np.concatenate([block.run(evaluator).values[0] for block in blocks])
    assert np.array_equal(parts[24], parts[5])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_do_not_change_a_result(tmp_path):
    one = _search(tmp_path, "particles", tmp_path / "one", "budget.candidates=56")
    two = _search(
        tmp_path, "particles", tmp_path / "two", "budget.candidates=56", "search.workers=1"
    )
    assert one.rows == two.rows


def test_mlflow_holds_the_curve_and_the_facts(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/ml/mlflow.db"
    settings = ("tracking.enabled=true", f"tracking.uri={uri}")
    _search(tmp_path, "masked", tmp_path / "out", "budget.candidates=20", *settings)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fewstep")
    runs = client.search_runs([experiment.experiment_id])
    (child,) = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert {"best_total_variation", "measured", "ratio"} <= set(child.data.metrics)
    assert child.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("masked", ("teacher.nfe=64",), "teacher: a MaskedProblem has no teacher"),
        ("particles", ("refine.top=1",), "refine: a ParticleProblem has no teacher"),
        ("masked", ("search.strategy=evolution+refine",), "cannot be refined: use evolution"),
        ("masked", ("search.strategy=refine",), "cannot be refined: use s3"),
        ("masked", ("objective.name=frechet",), "brings its own, 'total_variation'"),
        ("masked", ("objective.features=a:b",), "objective.features"),
        ("masked", ("search.race=[8]",), "total_variation cannot"),
        ("masked", ("space.orders=[1]",), "space.orders is an unknown key"),
        ("masked", ("space.modes=['sideways']",), "modes must be out of"),
        ("masked", ("search.nfe=[6]",), "nfe 6 must lie in 1..5"),
        ("masked", ("model.given=5",), "leaves no position"),
        ("masked", ("model.broken='nan'",), "NaN"),
        ("masked", ("model.broken='shape'",), "(B, K) is needed"),
        ("masked", ("model.broken='mask'",), "allow the mask token"),
        ("masked", ("model.broken='long'",), "length 5 exceeds the model's 4"),
        ("particles", ("model.broken='noise'",), "share the schedule's noise"),
        ("particles", ("space.zeta=[2.0, 3.0]",), "around 1"),
        ("particles", ("space.resample=['ess']",), "must hold 'never'"),
        ("particles", ("model.broken='reward'",), "reward of particle 0 of population 0 is nan"),
        ("particles", ("space.reward_weight=['path']",), "are for a target with a reward"),
        ("particles", ("space.ramp=[0.1, 3.0]",), "are for a target with a reward"),
        ("particles", ("space.own_ramp=2.0",), "space.own_ramp is an unknown key"),
        (
            "particles",
            ("model.tilt='data'", "space.reward_weight=['gradient', 'path']"),
            "guides can be weighed in two ways",
        ),
        ("particles", ("space.strength=[1.0, 3.0]",), "needs log_density of model 0"),
        ("particles", ("space.strength=[2.5, 3.0]", "model.dense=true"), "the target's own, 2"),
        ("particles", ("search.nfe=[900]",), "do not fit"),
        ("particles", ("search.strategy=magic",), "strategy 'magic' is unknown"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path, kind, settings, message):
    with pytest.raises(FewstepError) as error:
        _search(tmp_path, kind, tmp_path / "out", *settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_open_strategy_is_s3_without_refinement(tmp_path):
    study = write_drawn(tmp_path, "masked", STUDY.replace('strategy = "evolution"\n', ""))
    outcome = run.search(load_study(study, ["budget.candidates=30"]), tmp_path / "out")
    assert json.loads((outcome.out / "study.json").read_text())["search"]["strategy"] == "s3"


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return leaving.value.code, out, err


def test_the_command_line_reads_every_kind(finished, tmp_path, capsys):
    kind, outcome = finished
    files = [outcome.out / "schedules" / f"nfe0{n}.json" for n in (2, 3)]
    study = write_drawn(tmp_path, kind)
    word = {"masked": "count", "particles": "zeta"}[kind]
    code, out, _ = _run(capsys, "show", files[1])
    assert (code, word in out, outcome.objective in out) == (0, True, True)
    code, out, _ = _run(capsys, "lint", *files)
    assert (code, out.count(f"ok, {kind}")) == (0, 2)
    code, out, _ = _run(capsys, "compare", *files, "--study", study, "-n", 16)
    assert code == 0
    assert f"{outcome.objective}, 16 samples" in out
    code, out, _ = _run(capsys, "baseline", "list", "--nfe", 3, "--study", study)
    name = out.splitlines()[0]
    named = tmp_path / "named.json"
    assert _run(capsys, "baseline", name, "--nfe", 3, "--study", study, "--out", named)[0] == 0
    assert load_schedule(named).kind == kind
    code, _, err = _run(capsys, "baseline", "magic", "--nfe", 3, "--study", study)
    assert (code, "is not named" in err) == (2, True)
    code, out, _ = _run(capsys, "export", files[1], tmp_path, "--to", "csv")
    assert (code, len((tmp_path / "nfe03.csv").read_text().splitlines())) == (0, 4)
    code, _, err = _run(capsys, "export", files[1], tmp_path, "--to", "diffusers")
    assert (code, "has no such form" in err) == (2, True)
    code, _, err = _run(capsys, "sample", files[1], "--study", study, "--out", tmp_path / "a.png")
    assert (code, "a picture" in err) == (2, True)


def test_a_schedule_of_another_kind_or_length_is_refused_in_one_line(finished, tmp_path, capsys):
    kind, outcome = finished
    file = outcome.out / "schedules" / "nfe03.json"
    other = write_drawn(tmp_path, "particles" if kind == "masked" else "masked")
    code, _, err = _run(capsys, "compare", file, file, "--study", other)
    assert (code, err.count("\n"), "needs kind" in err) == (2, 1, True)
    if kind == "masked":
        given = ("--set", "model.given=1")
        code, _, err = _run(capsys, "compare", file, file, "--study",
                            write_drawn(tmp_path, "masked"), *given)  # fmt: skip
        assert (code, "4 free ones" in err) == (2, True)


def test_a_file_with_a_changing_strength_needs_densities(tmp_path, capsys):
    study = write_drawn(tmp_path, "particles")
    problem = load_problem(load_study(study))
    schedule = problem.named(3)["target_score+systematic/logsnr/euler"]
    data = schedule.to_dict()
    data["steps"][1]["b"] = 1.5
    file = tmp_path / "b.json"
    file.write_text(json.dumps(data))
    code, _, err = _run(capsys, "compare", file, file, "--study", study)
    assert (code, err.count("\n")) == (2, 1)
    assert "needs log_density of model 0" in err


def test_counts_that_do_not_sum_are_named(finished, tmp_path, capsys):
    kind, outcome = finished
    data = json.loads((outcome.out / "schedules" / "nfe03.json").read_text())
    field = {"masked": "calls", "particles": "steps"}[kind]
    data[field][0] |= {"masked": {"count": 9}, "particles": {"zeta": -1}}[kind]
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(data))
    for command in ("show", "lint"):
        code, _, err = _run(capsys, command, file)
        assert (code, err.count("\n")) == (2, 1)
        assert {"masked": "the counts sum to", "particles": "zeta -1"}[kind] in err


def test_samples_with_a_picture_are_drawn(tmp_path, capsys):
    settings = ("model.score='surprise'", "budget.candidates=16", "final.samples=16")
    outcome = _search(tmp_path, "masked", tmp_path / "out", *settings)
    assert (outcome.out / "samples.png").stat().st_size > 0
    file = outcome.out / "schedules" / "nfe03.json"
    study, picture = write_drawn(tmp_path, "masked"), tmp_path / "drawn.png"
    more = ("--set", "model.score='surprise'", "--n", 3, "--out", picture)
    code, _, err = _run(capsys, "sample", file, "--study", study, *more)
    assert code == 0, err
    assert picture.stat().st_size > 0


def test_a_model_that_fails_on_one_schedule_is_a_row_and_a_schedule_that_does_not_fit_is_none(
    tmp_path,
):
    """An exception of the model is its candidate's status; the others are scored."""
    evaluator = Evaluator.of(load_study(write_drawn(tmp_path, "masked")))
    fine = evaluator.problem.named(3)["uniform"]
    other = type(fine).from_counts([3, 1, 1])
    plain = evaluator.problem.denoiser

    def fussy(tokens, t):
        if ((tokens == plain.mask).sum(-1) == 1).any():
            raise ValueError("one is too few")
        return plain(tokens, t)

    fussy.mask, fussy.length = plain.mask, plain.length
    again = Evaluator(
        dataclasses.replace(evaluator.problem, denoiser=fussy), evaluator.objective, 0
    )
    result = Block((fine, other), "x", 0, 8).run(again)
    assert result.status == ("ok", "error")
    assert "one is too few" in result.message[1]
    with pytest.raises(ScheduleError, match="free positions"):
        Block((fine, type(fine).from_counts([2, 2, 2])), "x", 0, 8).run(evaluator)


def test_a_factory_of_something_else_is_told_what_a_problem_is(tmp_path):
    study = write_drawn(tmp_path, "joint")
    with pytest.raises(StudyError, match="returned Tensor: it must return a Problem, MaskedProb"):
        Evaluator.of(load_study(study))
