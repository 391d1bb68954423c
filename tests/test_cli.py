"""The command line: one clear line for every mistake, and the commands for schedule files."""

import json
import shutil
import subprocess
import sys

import pytest

from fewstep.experiments.__main__ import main
from fewstep.space import ProgramSchedule, load_schedule, save_schedule
from fewstep.space.baselines import baseline
from fewstep.space.noise import VPLinear
from tests.drawn_studies import write_drawn
from tests.studies import STUDY, called, fewstep, refused, write_study


@pytest.fixture
def file(tmp_path):
    return save_schedule(baseline("dpmpp2m/logsnr", VPLinear(), 4), tmp_path / "s.json")


def _edited(file, change):
    data = json.loads(file.read_text())
    change(data)
    path = file.with_name("edited.json")
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUDY.replace("samples = 8", "sampels = 8"), "search.sampels is an unknown key"),
        (STUDY.replace("nfe = [3]", "nfe = [0]"), "search.nfe.0 = 0"),
        (STUDY.replace('factory = "tiny_model:problem"', ""), "one of factory and pipeline"),
        (STUDY.replace("tiny_model", "no_such_model"), "cannot import no_such_model"),
        (STUDY.replace('"evolution"', '"magic"'), "strategy 'magic' is unknown"),
        (STUDY + "\n[space]\ncolour = 1", "space.colour is an unknown key"),
        (STUDY + "\n[objective]\nname = 'fid'", "objective.name = 'fid': use endpoint_mse or"),
        (STUDY.replace('"tiny_model:problem"', '"tiny_model:problem"\nbroken = "shape"'), "shape"),
        (STUDY.replace('"tiny_model:problem"', '"tiny_model:problem"\nbroken = "nan"'), "finite"),
    ],
)
def test_a_wrong_study_is_one_line_and_exit_code_2(capsys, tmp_path, text, message):
    study = write_study(tmp_path, text)
    assert message in refused(capsys, "search", study, "--out", tmp_path / "out", "-q")


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    study = write_study(tmp_path)
    assert "is a file" in refused(capsys, "search", study, "--out", study)


def test_wrong_use_is_one_line(capsys, tmp_path):
    refused(capsys, "serach")
    refused(capsys, "search")
    refused(capsys, "search", tmp_path / "absent.toml")
    refused(capsys, "search", write_study(tmp_path), "--set", "nonsense")
    refused(capsys, "search", write_study(tmp_path), "--resume", "--overwrite")
    refused(capsys, "baseline", "magic/logsnr", "--nfe", 4)
    refused(capsys, "baseline", "heun/edm", "--nfe", 4)
    refused(capsys, "baseline", "ddim/time", "--noise", "vp_lienar")
    refused(capsys, "baseline", "ddim/time", "--noise", "vp_linear:beta_min=abc")
    refused(capsys, "report", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99 is unknown"),
        (lambda d: d["times"].__setitem__(2, d["times"][1]), "times"),
        (lambda d: d["times"].__setitem__(2, float("nan")), "NaN"),
        (lambda d: d["steps"][0].update(order=3), "step 0"),
        (lambda d: d["program"]["r"].__setitem__(1, 0.5), "program.r"),
        (lambda d: d.pop("steps") and d.pop("program"), "steps"),
    ],
)
def test_a_broken_schedule_file_is_one_line(capsys, file, change, message):
    path = _edited(file, change)
    for command in (("show", path), ("lint", path), ("export", path, file.parent, "--to", "csv")):
        assert message in refused(capsys, *command)


def test_a_truncated_schedule_file_is_one_line(capsys, file):
    file.write_text(file.read_text()[:-40])
    assert "truncated" in refused(capsys, "show", file)


def test_baseline_writes_a_schedule_that_show_explains(capsys, tmp_path):
    out = tmp_path / "b.json"
    noise = "vp_linear:beta_min=0.1,beta_max=10"
    code, _, _ = called(
        capsys, "baseline", "unipc2-bh2/logsnr", "--nfe", 5, "--noise", noise, "-o", out
    )
    assert code == 0
    assert load_schedule(out).noise.beta_max == 10
    code, text, _ = called(capsys, "show", out)
    assert code == 0
    assert "unipc2-bh2/logsnr" in text
    assert text.count("reuse") == 4


def test_compare_names_every_difference(capsys, file, tmp_path):
    other = save_schedule(baseline("dpmpp2m/logsnr/low", VPLinear(), 4), tmp_path / "low.json")
    assert "the same sampler" in called(capsys, "compare", file, file)[1]
    assert "step 3, order: 2 and 1" in called(capsys, "compare", file, other)[1]


def test_compare_and_sample_with_a_model(capsys, file, tmp_path):
    study = write_study(tmp_path)
    code, text, _ = called(capsys, "compare", file, file, "--study", study, "-n", 8)
    assert code == 0
    assert "1.000" in text
    assert "no images" in refused(capsys, "sample", file, "--study", study)


def test_a_schedule_for_another_model_is_refused(capsys, file, tmp_path):
    study = write_study(tmp_path)
    error = refused(capsys, "sample", file, "--study", study, "--set", "model.edm=true")
    assert "another" in error


def test_export_to_csv_and_sigmas(capsys, file, tmp_path):
    schedule = load_schedule(file)
    assert called(capsys, "export", file, "--to", "csv", tmp_path)[0] == 0
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert len(lines) == 1 + schedule.nfe
    column = lines[0].split(",").index("r")
    assert [float(line.split(",")[column]) for line in lines[1:]] == schedule.program.r.tolist()
    assert called(capsys, "export", file, "--to", "sigmas", tmp_path)[0] == 0
    data = json.loads((tmp_path / "s.sigmas.json").read_text())
    assert data["times"] == list(schedule.times)
    assert "unknown" in refused(capsys, "export", file, "--to", "excel", tmp_path)


def test_a_small_search_prints_its_cost_and_its_table(capsys, tmp_path):
    study = write_study(tmp_path)
    code, out, err = called(capsys, "search", study, "--out", tmp_path / "out")
    assert code == 0
    assert "network evaluations" in err
    assert "best named" in out
    assert called(capsys, "report", tmp_path / "out")[0] == 0


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    with pytest.raises(SystemExit):
        main(["search", str(write_study(folder)), "--out", str(folder / "out"), "-q"])
    return folder / "out"


def test_report_says_which_decisions_mattered_and_keeps_it(capsys, searched):
    code, text, _ = called(capsys, "report", searched, "-n", 8)
    assert code == 0
    assert "best named" in text
    assert "on 8 fresh samples" in text
    assert (searched / "decisions.png").stat().st_size > 0
    kept = (searched / "decisions.json").read_bytes()
    assert called(capsys, "report", searched, "-n", 8)[1] == text
    assert (searched / "decisions.json").read_bytes() == kept
    assert (searched / "report.html").read_text().count('<section id="decisions">') == 1
    assert "on 12 fresh samples" in called(capsys, "report", searched, "--samples", 12)[1]
    assert "decision" not in called(capsys, "report", searched, "--no-decisions")[1]


def test_report_of_a_schedule_file_needs_its_study(capsys, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = write_study(tmp_path)
    picture = tmp_path / "deep" / "p.png"
    code, text, _ = called(capsys, "report", file, "--study", study, "-n", 8, "-o", picture)
    assert code == 0
    assert "s: the error is" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--study" in refused(capsys, "report", file)
    assert "is a folder" in refused(capsys, "report", file, "--study", study, "-o", tmp_path)
    assert "another" in refused(
        capsys, "report", file, "--study", study, "--set", "model.edm=true"
    )
    assert "samples" in refused(capsys, "report", file, "--study", study, "-n", 1)


def test_report_of_schedules_without_a_solver_is_the_tables(capsys, tmp_path):
    study = write_drawn(tmp_path, "masked")
    assert called(capsys, "search", study, "--out", tmp_path / "out", "-q")[0] == 0
    code, text, _ = called(capsys, "report", tmp_path / "out")
    assert code == 0
    assert "best named" in text
    assert not (tmp_path / "out" / "decisions.png").exists()
    file = tmp_path / "out" / "schedules" / "nfe03.json"
    assert "no solver's steps" in refused(capsys, "report", file, "--study", study)


def test_report_of_a_damaged_folder_is_one_line(capsys, searched, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(searched, out)
    (out / "decisions.json").unlink(missing_ok=True)
    assert "--set goes with" in refused(capsys, "report", out, "--set", "search.seed=1")
    (out / "schedules" / "nfe03.json").unlink()
    assert "no such file" in refused(capsys, "report", out)
    (out / "study.json").write_text("{")
    assert "study.json is absent or damaged" in refused(capsys, "report", out)
    (out / "results.json").write_text("[]")
    assert "results.json is damaged" in refused(capsys, "report", out)


def test_a_folder_whose_model_lies_beside_the_study_asks_for_it(searched):
    (searched / "decisions.json").unlink(missing_ok=True)
    alone = fewstep("report", str(searched), "-n", "8", cwd=searched)
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == 1
    assert "--study" in alone.stderr
    study = str(searched.parent / "study.toml")
    assert fewstep("report", ".", "--study", study, "-n", "8", cwd=searched).returncode == 0


def test_help_answers_without_the_search_libraries(capsys):
    heavy = ("ray", "optuna", "mlflow", "matplotlib")
    code = f"""
import sys
from fewstep.experiments.__main__ import app
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert called(capsys, "--help")[0] == 0
    assert called(capsys, "search", "--help")[0] == 0


def test_a_schedule_without_its_image_says_what_is_missing(capsys, tmp_path):
    import torch

    plain = baseline("dpmpp2m/logsnr", VPLinear(), 4)
    schedule = plain.model_copy(update={"first": "mean"}).with_constant(torch.ones(1, 2))
    path = save_schedule(schedule, tmp_path / "mean.json")
    assert "missing" not in called(capsys, "lint", path)[1]
    path.with_suffix(".safetensors").unlink()
    for command in ("lint", "show"):
        code, out, _ = called(capsys, command, path)
        assert code == 0
        assert "put it beside the file" in out


def test_a_program_without_steps_is_explained_and_compared(capsys, tmp_path):
    import torch

    steps = baseline("dpmpp3m/logsnr", VPLinear(), 5)
    plain = save_schedule(ProgramSchedule.of(steps), tmp_path / "plain.json")
    code, out, _ = called(capsys, "show", plain)
    assert code == 0
    assert "a program without steps: x_T belongs to time 1" in out
    rows = [line.split() for line in out.splitlines() if line.split()[-2:-1] == ["dpmpp3m"]]
    assert [row[0] for row in rows] == ["2", "3", "4"]
    assert all(row[-1] == "0" for row in rows)
    assert called(capsys, "compare", plain, save_schedule(steps, tmp_path / "steps.json"))[1] == (
        "the same sampler\n"
    )
    mean = ProgramSchedule.of(steps.model_copy(update={"first": "mean"}))
    one, two = (
        save_schedule(mean.with_constant(torch.full((1, 2), v)), tmp_path / f"{v}.json")
        for v in (0.0, 0.5)
    )
    out = called(capsys, "compare", one, two)[1]
    assert out == "constant image: another, RMS difference 0.5\n"
    assert "missing" not in called(capsys, "lint", one)[1]
    one.with_suffix(".safetensors").unlink()
    for command in ("lint", "show"):
        assert "put it beside the file" in called(capsys, command, one)[1]
    other = save_schedule(
        ProgramSchedule.of(baseline("dpmpp2m/logsnr", VPLinear(), 5)), tmp_path / "2m.json"
    )
    out = called(capsys, "compare", plain, other)[1]
    assert "call 0" not in out
    assert "call 2, newest: 2.0" in out
