import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.search.config import load_study
from fewstep.search.evaluate import Evaluator, Task, assemble, chunks, scaled
from fewstep.search.preparing import evaluator_spec
from fewstep.search.problem import ModelSpec, conditions, noise_of
from fewstep.space import ModelError, OdeSchedule, StepSpec, StudyError, stack
from fewstep.space.baselines import baseline, named
from tests.studies import write_study


@pytest.fixture
def make(tmp_path):
    def made(**arguments):
        path = write_study(tmp_path)
        config = load_study(path, [f"model.{k}={v!r}".lower() for k, v in arguments.items()])
        evaluator = Evaluator.from_spec(evaluator_spec(config))
        noise = evaluator.problem.denoiser.noise
        teacher = baseline("dpmpp3m/logsnr", noise, 32)
        z = noise_of(0, "search", range(16), evaluator.problem.shape)
        cond = conditions(evaluator.problem, range(16))
        x = sample(teacher, evaluator.problem.denoiser, start(teacher, z), cond=cond)
        evaluator.share("search", x)
        return evaluator

    return made


def _scores(evaluator, schedules, size, block):
    found = {}
    for chunk in chunks(schedules, evaluator.problem.denoiser.noise, size):
        parts = [evaluator.run(task) for task in chunk.tasks("search", 16, block)]
        results = assemble(parts, evaluator.objective, parts[0].values[0])
        found |= dict(zip(chunk.members, results, strict=True))
    return [found[i] for i in range(len(schedules))]


def test_block_sizes_change_scores_by_rounding_only(make):
    evaluator = make()
    schedules = list(named(evaluator.problem.denoiser.noise, 4).values())[:11]
    one = _scores(evaluator, schedules, 1, 16)
    for size, block in ((4, 16), (11, 5), (3, 1)):
        many = _scores(evaluator, schedules, size, block)
        assert [r.score for r in many] == pytest.approx([r.score for r in one], rel=1e-5)


def test_noise_of_a_sample_does_not_depend_on_its_neighbours():
    whole = noise_of(3, "search", range(6), (2, 2))
    assert torch.equal(whole[4:5], noise_of(3, "search", [4], (2, 2)))
    assert not torch.equal(whole[4:5], noise_of(3, "fresh", [4], (2, 2)))
    assert not torch.equal(whole[4:5], noise_of(4, "search", [4], (2, 2)))


def test_calls_are_counted_where_they_are_paid(make):
    evaluator = make()
    (result,) = _scores(
        evaluator, [baseline("heun/edm", evaluator.problem.denoiser.noise, 5)], 1, 8
    )
    assert result.calls == 16 * 5
    assert result.samples == 16


def test_unit_noise_with_the_scale_in_the_program_equals_sample(make):
    evaluator = make(edm=True)
    problem, noise = evaluator.problem, evaluator.problem.denoiser.noise
    schedule = baseline("dpmpp2m/edm", noise, 6)
    task = Task(stack([scaled(schedule)]), "search", 0, 16, "samples")
    x = torch.from_numpy(evaluator.run(task).values[0])
    z = noise_of(0, "search", range(16), problem.shape)
    cond = conditions(problem, range(16))
    plain = sample(schedule, problem.denoiser, start(schedule, z), cond=cond)
    assert torch.allclose(x, plain, atol=1e-5)


def test_starts_of_different_scale_run_in_one_batch(make):
    evaluator = make(edm=True)
    noise = evaluator.problem.denoiser.noise
    schedules = [baseline("ddim/edm", noise, 4, t_start=t) for t in (20.0, 10.0)]
    assert len(chunks(schedules, noise, 8)) == 1
    together = _scores(evaluator, schedules, 8, 16)
    apart = _scores(evaluator, schedules, 1, 16)
    assert [r.score for r in together] == pytest.approx([r.score for r in apart], rel=1e-5)


def test_a_candidate_that_diverges_is_a_row_and_harms_no_other(make):
    evaluator = make()
    noise = evaluator.problem.denoiser.noise
    good = baseline("ddim/time", noise, 3)
    huge = (1e30, -1e30)
    steps = (StepSpec(), StepSpec(), StepSpec(weights=huge))
    bad = OdeSchedule(noise=noise, times=good.times, steps=steps)
    results = _scores(evaluator, [good, bad, baseline("ipndm2/time", noise, 3)], 3, 16)
    assert [r.status for r in results] == ["ok", "diverged", "ok"]
    assert results[1].score == float("inf")
    assert results[0].score == pytest.approx(_scores(evaluator, [good], 1, 16)[0].score, rel=1e-5)


def test_an_exception_is_pinned_on_the_candidate_that_raises_it(make, monkeypatch):
    evaluator = make()
    noise = evaluator.problem.denoiser.noise
    schedules = [baseline(f"{n}/time", noise, 3) for n in ("ddim", "ipndm2", "dpmpp2m")]
    plain, poison = Task.values, scaled(schedules[1]).b

    def values(task, evaluator):
        if any(torch.equal(b, poison) for b in task.program.b):
            raise RuntimeError("CUDA out of memory")
        return plain(task, evaluator)

    monkeypatch.setattr(Task, "values", values)
    results = _scores(evaluator, schedules, 3, 16)
    assert [r.status for r in results] == ["ok", "oom", "ok"]


@pytest.mark.parametrize("broken", ["shape", "nan"])
def test_a_broken_model_raises_when_the_task_is_strict(make, broken, tmp_path):
    spec = ModelSpec("tiny_model:problem", {"broken": broken}, str(tmp_path))
    write_study(tmp_path)
    good = make()
    evaluator = Evaluator(spec.load(), good.objective, 0)
    program = stack([scaled(baseline("ddim/time", good.problem.denoiser.noise, 3))])
    with pytest.raises(ModelError):
        evaluator.run(Task(program, "search", 0, 4, "samples", strict=True))


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("tiny_model:absent", {}, "has no function absent"),
        ("absent_module:f", {}, "cannot import absent_module"),
        ("tiny_model:not_a_problem", {}, "returned int"),
        ("tiny_model:fails", {}, "RuntimeError: no weights here"),
        ("tiny_model:problem", {"colour": 1}, "colour"),
    ],
)
def test_a_wrong_factory_is_one_line(tmp_path, factory, arguments, message):
    write_study(tmp_path)
    with pytest.raises(StudyError) as error:
        ModelSpec(factory, arguments, str(tmp_path)).load()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_schedule_for_another_noise_schedule_is_refused(make):
    evaluator, other = make(), make(edm=True)
    schedule = baseline("ddim/time", other.problem.denoiser.noise, 3)
    with pytest.raises(ModelError, match="another noise schedule"):
        chunks([schedule], evaluator.problem.denoiser.noise, 4)
