"""Programs in the words of solvers: levels, shares, effective order, nearest named step."""

from dataclasses import replace

import pytest
import torch

from fewstep.experiments.cli.programs import described, program_differences, program_table, shares
from fewstep.space import ProgramSchedule
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from fewstep.space.growing import grown
from fewstep.space.program import written_out
from tests.test_program_schedule import fitted

VP = noises.VPLinear()


@pytest.mark.parametrize("noise", [VP, noises.EDM(), noises.RectifiedFlow(t_start=0.98)])
@pytest.mark.parametrize("name", ["ddim", "dpmpp3m", "deis-tab2", "ipndm4"])
def test_a_named_solver_is_its_own_nearest_and_lies_where_it_asks(name, noise):
    schedule = ProgramSchedule.of(baseline(f"{name}/logsnr", noise, 7))
    steps, lands = described(schedule)
    assert steps[-1].nearest == name
    assert all(step.distance < 1e-9 for step in steps)
    assert all(step.lies == pytest.approx(step.asked, abs=1e-6) for step in steps)
    end = torch.tensor(schedule.end, dtype=torch.float64)
    assert lands == pytest.approx(min(float(noise.lam(end)), 12.0), abs=1e-6)
    assert all(sum(step.shares) + step.image == pytest.approx(1) for step in steps)


def test_the_effective_order_of_exponential_steps_in_lam_is_their_order():
    """Exact weights in the data formulation meet every moment that they have points for."""
    schedule = ProgramSchedule.of(baseline("unipc3-bh2/logsnr", VP, 8))
    assert described(schedule)[0][0].order == 1
    two, three = (
        [s.order for s in described(ProgramSchedule.of(baseline(f"{n}/logsnr", VP, 24)))[0]]
        for n in ("dpmpp2m", "dpmpp3m")
    )
    assert two[2:-1] == [pytest.approx(2)] * 21
    assert min(three[3:-1]) > 2.3
    ddim = described(ProgramSchedule.of(baseline("ddim/logsnr", VP, 6)))[0]
    assert {step.order for step in ddim} == {1.0}


def test_what_is_said_does_not_depend_on_how_rows_are_written():
    s = fitted()
    p, rest, _ = written_out(s.program)
    rows = {"e": p[1:], "k": rest[1:, 0], "b": rest[1:, 1:]}
    flat = s.model_copy(
        update={"program": replace(s.program, r=torch.zeros_like(s.program.r), **rows)}
    )
    assert flat.digest != s.digest
    assert torch.allclose(shares(flat.program), shares(s.program), rtol=1e-9, atol=1e-9)
    assert program_differences(flat, s) == []


def test_a_call_of_weight_0_splits_a_step_and_takes_nothing():
    s = grown(ProgramSchedule.of(baseline("dpmpp2m/logsnr", VP, 4)), 5)
    steps = described(s)[0]
    assert steps[2].shares[0] == pytest.approx(0, abs=1e-9)
    assert steps[2].lies == pytest.approx(steps[2].asked, abs=1e-3)
    assert steps[2].shares[1:] == pytest.approx(steps[1].shares, abs=1e-9)


def test_runge_kutta_stages_and_fitted_programs_have_a_table():
    for schedule in (
        fitted(guided=True),
        ProgramSchedule.of(baseline("heun/edm", noises.EDM(), 5)),
        ProgramSchedule.of(baseline("ddpm/time", VP, 3)),
    ):
        table = program_table(schedule)
        assert table.row_count == schedule.nfe
        for step in described(schedule)[0]:
            assert all(abs(share) < 100 for share in step.shares)
