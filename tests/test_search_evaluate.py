from dataclasses import replace

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.samplers.problems import conditions
from fewstep.samplers.sample_noise import noise_of
from fewstep.samplers.streams import cut
from fewstep.search.config import load_study
from fewstep.search.scoring import assemble
from fewstep.search.work import Block, Evaluator, load_problem
from fewstep.space import ModelError, OdeSchedule, StepSpec, StudyError
from fewstep.space.baselines import baseline, named
from tests.studies import write_study


@pytest.fixture
def make(tmp_path):
    def made(**arguments):
        path = write_study(tmp_path)
        config = load_study(path, [f"model.{k}={v!r}".lower() for k, v in arguments.items()])
        evaluator = Evaluator.of(config)
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
    for members in cut(schedules, size):
        blocks = Block.cover([schedules[i] for i in members], "search", range(16), block)
        parts = [block.run(evaluator) for block in blocks]
        results = assemble(parts, evaluator.objective, parts[0].values[0])
        found |= dict(zip(members, results, strict=True))
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
    x = torch.from_numpy(Block((schedule,), "search", 0, 16, "samples").run(evaluator).values[0])
    z = noise_of(0, "search", range(16), problem.shape)
    cond = conditions(problem, range(16))
    plain = sample(schedule, problem.denoiser, start(schedule, z), cond=cond)
    assert torch.allclose(x, plain, atol=1e-5)


def test_starts_of_different_scale_run_in_one_batch(make):
    evaluator = make(edm=True)
    noise = evaluator.problem.denoiser.noise
    schedules = [baseline("ddim/edm", noise, 4, t_start=t) for t in (20.0, 10.0)]
    assert cut(schedules, 8) == [(0, 1)]
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


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (RuntimeError("CUDA out of memory"), "oom"),
        (MemoryError(), "oom"),
        (KeyError("no class 7"), "error"),
    ],
)
def test_what_the_model_raises_is_pinned_on_the_candidate_that_meets_it(make, raised, status):
    evaluator = make()
    noise = evaluator.problem.denoiser.noise
    schedules = [baseline(f"ddim/{grid}", noise, 3) for grid in ("time", "edm", "quadratic")]
    plain, poison = evaluator.problem.denoiser, schedules[1].times[1]

    class Fussy:
        noise = plain.noise

        def __call__(self, x, t, **more):
            if (t == poison).any():
                raise raised
            return plain(x, t, **more)

    again = replace(evaluator.problem, denoiser=Fussy())
    fussy = Evaluator(again, evaluator.objective, 0)
    fussy.share("search", evaluator.reference("search"))
    results = _scores(fussy, schedules, 3, 16)
    assert [r.status for r in results] == ["ok", status, "ok"]
    assert str(raised) in results[1].message


def test_a_fault_of_the_executor_is_no_candidates_status(make, monkeypatch):
    evaluator = make()
    schedule = baseline("ddim/time", evaluator.problem.denoiser.noise, 3)
    monkeypatch.setattr("fewstep.samplers.ode.stack", lambda programs: programs[7])
    with pytest.raises(IndexError):
        Block((schedule,), "search", 0, 4).run(evaluator)


def test_schedules_with_the_time_shift_run_like_all_others(make):
    evaluator = make()
    noise = evaluator.problem.denoiser.noise
    plain = baseline("ddim/time", noise, 4)
    rule = {"rule": "variance", "cutoff": 0.1, "semantics": "paper"}
    still, moved = (
        plain.model_copy(update={"options": {"time_shift": {**rule, "window": w}}})
        for w in (0, 40)
    )
    results = _scores(evaluator, [plain, still, moved], 3, 16)
    assert [r.status for r in results] == ["ok"] * 3
    assert results[1].score == pytest.approx(results[0].score, rel=1e-5)
    assert abs(results[2].score / results[0].score - 1) > 1e-3


@pytest.mark.parametrize("broken", ["shape", "nan"])
def test_a_broken_model_raises_when_the_task_is_strict(make, broken, tmp_path):
    config = load_study(write_study(tmp_path), [f"model.broken={broken}"])
    good = make()
    evaluator = Evaluator(load_problem(config), good.objective, 0)
    schedule = baseline("ddim/time", good.problem.denoiser.noise, 3)
    with pytest.raises(ModelError):
        Block((schedule,), "search", 0, 4, "samples", strict=True).run(evaluator)


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
    given = [f"model.{k}={v}" for k, v in {"factory": factory, **arguments}.items()]
    config = load_study(write_study(tmp_path), given)
    with pytest.raises(StudyError) as error:
        load_problem(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_schedule_for_another_noise_schedule_is_refused(make):
    problem, other = make().problem, make(edm=True)
    schedule = baseline("ddim/time", other.problem.denoiser.noise, 3)
    with pytest.raises(ModelError, match="was made for noise schedule edm"):
        problem.check(schedule, "mine.json")


def test_a_network_in_a_lower_precision_and_compiled_is_the_same_search_to_that_precision(
    tmp_path,
):
    import torch

    from fewstep.search.config import load_study
    from fewstep.space import StudyError
    from tests.studies import write_study

    model = tmp_path / "dense.py"
    model.write_text(
        "import torch\nfrom fewstep.samplers import Problem, from_model\n"
        "from fewstep.space.noise import VPLinear\n\n"
        "def problem():\n"
        "    torch.manual_seed(0)\n    net = torch.nn.Linear(2, 2)\n"
        "    net.requires_grad_(False)\n"
        "    return Problem(from_model(lambda x, t: net(x), VPLinear(), output='x0'), (2,))\n"
    )
    study = write_study(tmp_path)
    factory = "model.factory=dense:problem"
    x, t = torch.randn(4, 2), torch.full((4,), 0.5, dtype=torch.float64)

    def answer(*settings):
        return load_problem(load_study(study, [factory, *settings])).denoiser(x, t)

    plain = answer()
    assert torch.equal(answer("search.compile=eager"), plain)
    low = answer("search.autocast=bfloat16")
    assert low.dtype == plain.dtype
    assert 0 < (low - plain).abs().max() < 0.05
    with pytest.raises(StudyError, match="compile"):
        answer("search.compile=nobackend")
