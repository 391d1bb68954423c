"""Sorts of calls: what they cost, that they are paid for, and stages that run as one batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.experiments.cli.programs import asked
from fewstep.predictors.gauss_newton import Batch, Fit
from fewstep.predictors.levenberg import levenberg
from fewstep.samplers import from_model, run, run_candidates, sample, start
from fewstep.samplers.denoiser import Networks, bcast
from fewstep.samplers.replay import Replay
from fewstep.space import (
    ModelError,
    ProgramSchedule,
    ScheduleError,
    load_schedule,
    save_schedule,
    stack,
)
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline, named
from fewstep.space.costs import Prices, call_costs, pattern, stages
from fewstep.space.growing import grown, widened
from fewstep.space.plans import widened_to
from fewstep.space.unknowns import FreeProgram, canonical
from tests.oracles import recorded_mixture
from tests.studies import called

VP = noises.VPLinear()
MODEL = recorded_mixture(VP)


def z(batch: int = 4) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 2, 2, generator=g, dtype=torch.float64)


def fitted(nfe: int = 5, noise: noises.NoiseSchedule = VP) -> ProgramSchedule:
    made = ProgramSchedule.of(baseline("unipc2-bh2/quadratic/low", noise, nfe))
    return made.model_copy(update={"program": canonical(made.program)})


def sorted_as(schedule: ProgramSchedule, scales=None, network=None) -> ProgramSchedule:
    guidance = None if scales is None else torch.tensor(scales, dtype=torch.float64)
    program = replace(schedule.program, guidance=guidance, network=network)
    return schedule.model_copy(update={"program": program})


def net(x, t, label):
    y = torch.tanh(x + t.reshape(-1, 1, 1, 1).to(x)) + 0.1 * label.reshape(-1, 1, 1, 1).to(x)
    return y + 0.3 * x


def counted() -> tuple[list[int], object]:
    """Batch sizes that a guided network is asked, and its denoiser."""
    sizes: list[int] = []

    def spy(x, t, label):
        sizes.append(len(x))
        return net(x, t, label)

    null = {"null_cond": lambda c: {"label": torch.zeros_like(c["label"])}}
    return sizes, from_model(spy, VP, "eps", **null)


COND = {"label": torch.arange(1, 5)}


def test_a_named_solver_is_all_of_one_sort_and_its_file_says_nothing_of_sorts():
    for name, s in named(VP, 5).items():
        program = s.program
        assert (program.nfe, program.depth, program.network) == (5, 5, None), name
        assert pattern(program) == "GGGGG"
        assert pattern(program, guided=False) == "uuuuu"
        assert program.cost(Prices()) == 10
        assert program.cost(Prices(), guided=False) == 5
        assert "network" not in s.to_dict()["program"]


def test_prices_of_sorts_add_up_and_a_network_without_a_price_is_refused():
    s = sorted_as(fitted(4), [1.0, 3.0, 2.0, 1.0], ("", "", "small", "small"))
    assert pattern(s.program) == "uGG[small]u[small]"
    assert call_costs(s.program, Prices(networks={"small": 0.25})) == [1, 2, 0.5, 0.25]
    assert s.program.cost(Prices(guided=3, networks={"small": 0.5})) == 1 + 3 + 1.5 + 0.5
    with pytest.raises(ScheduleError, match="network 'small' has no price"):
        s.program.cost(Prices())
    with pytest.raises(ScheduleError, match="the price of beside is 0"):
        Prices(beside=0)


def test_sorts_survive_the_file_and_wrong_ones_are_named(tmp_path):
    s = sorted_as(fitted(3), [1.0, 3.0, 1.0], ("small", "", ""))
    again = load_schedule(save_schedule(s, tmp_path / "a.json"))
    assert again.program == s.program
    assert again.digest == s.digest
    assert s.digest != sorted_as(fitted(3), [1.0, 3.0, 1.0]).digest
    data = s.to_dict()
    data["program"]["network"] = ["small"]
    with pytest.raises(ScheduleError, match=r"program\.network must be a list of 3 names"):
        load_schedule(data)
    assert grown(s, 4).program.network == ("small", "", "", "")
    assert s.tail(1).program.network == ("", "")


def test_an_unguided_call_asks_the_network_once_also_among_guided_candidates():
    sizes, denoiser = counted()
    a = sorted_as(fitted(3), [1.0, 3.0, 1.0])
    b = sorted_as(fitted(3), [3.0, 3.0, 1.0])
    x = sample(a, denoiser, z(), cond=COND)
    assert sizes == [4, 8, 4]
    assert denoiser.forwards == 4 * a.program.cost(Prices())
    sizes.clear()
    both = run(stack([a.program, b.program]), denoiser, z(), cond=COND)
    assert sorted(sizes[:2]) == [4, 8]  # at the first call one of the two is guided
    assert sum(sizes) == 4 * (a.program.cost(Prices()) + b.program.cost(Prices()))
    assert torch.equal(both[0], x)
    assert torch.equal(both[1], sample(b, denoiser, z(), cond=COND))


@pytest.mark.parametrize("widths", [(1, 2, 1), (2, 2, 2), (3, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("scales", [None, [3.0, 1.0, 2.0]])
def test_a_stage_is_one_batch_with_the_samples_of_one_call_after_another(widths, scales):
    s = widened(sorted_as(fitted(3), scales), widths)
    assert (s.nfe, s.program.depth) == (sum(widths), 3)
    assert [len(stage) for stage in stages(s.program)] == list(widths)
    sizes, denoiser = counted()
    seen = []
    x = sample(s, denoiser, z(), cond=COND, callback=lambda p: seen.append((p.call, p.denoised)))
    guided = [1.0] * 3 if scales is None else scales
    assert sizes == [4 * w * (1 + (g != 1)) for w, g in zip(widths, guided, strict=True)]
    replay = Replay(s, z())
    for c in range(s.nfe):  # one call after the other
        told = s.program.t[c].expand(4)
        scale = None if scales is None else float(s.program.guidance[c])
        D = denoiser(replay.state, told, cond=COND, guidance=scale)
        assert seen[c][0] == c
        assert torch.allclose(seen[c][1], D, rtol=0, atol=1e-12)
        replay.advance(D)
    assert torch.allclose(x, replay.state, rtol=0, atol=1e-12)


def test_stacked_candidates_with_other_stages_and_shared_prefixes_are_those_run_alone():
    names = ("unipc2-bh2/quadratic/low", "ddim/edm", "dpmpp2m/logsnr")
    narrow = [ProgramSchedule.of(baseline(name, VP, 3)) for name in names]
    narrow += [sorted_as(narrow[0])]
    many = [
        sorted_as(widened(s, widths), scales)
        for s, widths, scales in zip(
            narrow,
            [(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)],
            [[1.0, 1, 3, 3, 1], [3.0, 1, 1, 3, 3], [1.0, 1, 1, 1, 1], [1.0, 1, 3, 3, 2]],
            strict=True,
        )
    ]
    sizes, denoiser = counted()
    alone = [sample(s, denoiser, z(), cond=COND) for s in many]
    paid = sum(sizes)
    sizes.clear()
    programs = [s.program for s in many]
    for together in (
        run(stack(programs), denoiser, z(), cond=COND),
        run_candidates(programs, denoiser, z(), cond=COND),
    ):
        for a, b in zip(alone, together, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert sum(sizes) < 2 * paid  # the first and last have calls in common


def test_calls_of_another_network_ask_that_one_and_one_not_offered_is_refused():
    main, small = counted(), counted()
    s = sorted_as(fitted(3), [1.0, 3.0, 3.0], ("small", "", "small"))
    denoiser = Networks(main[1], {"small": (small[1], 0.25)})
    x = sample(s, denoiser, z(), cond=COND)
    assert (main[0], small[0]) == ([8], [4, 8])
    assert torch.equal(x, sample(sorted_as(s, [1.0, 3.0, 3.0]), main[1], z(), cond=COND))
    plain = sorted_as(s, [1.0, 3.0, 3.0])
    pair = run(stack([s.program, plain.program]), denoiser, z(), cond=COND)
    assert torch.equal(pair[0], x)
    for wrong in (main[1], Networks(main[1], {"other": (small[1], 1)})):
        with pytest.raises(ScheduleError, match="asks network 'small' at some calls"):
            sample(s, wrong, z(), cond=COND)
    with pytest.raises(ModelError, match="another noise schedule"):
        Networks(main[1], {"edm": (recorded_mixture(noises.EDM()), 1)})
    with pytest.raises(ModelError, match="at price 0"):
        Networks(main[1], {"free": (small[1], 0)})


@pytest.mark.parametrize(
    "noise", [VP, noises.EDM(), noises.RectifiedFlow(t_start=0.98), noises.VPCosine()]
)
def test_queries_beside_a_call_share_its_weight_and_nearly_keep_the_samples(noise):
    s = fitted(5, noise)
    wide = widened(s, (2, 2, 2, 2, 2))
    model = recorded_mixture(noise)
    x = start(s, z(64))
    truth = sample(baseline("dpmpp3m/logsnr", noise, 100), model, x)
    before, after = (float((sample(one, model, x) - truth).square().mean()) for one in (s, wide))
    assert after < 4 * before + 1e-4
    wider = widened(wide, [1, 2] * 5)  # and a stage may grow
    assert [len(stage) for stage in stages(wider.program)] == [3] * 5
    assert float((sample(wider, model, x) - truth).square().mean()) < 4 * before + 1e-4
    assert bool((wide.program.b[-1] != 0).all() == (s.program.b[-1] != 0).all())
    with pytest.raises(ScheduleError, match="no widths of 5 calls"):
        widened(s, (2, 2))
    noisy = ProgramSchedule.of(baseline("ddpm/time", VP, 4))
    with pytest.raises(ScheduleError, match="fresh noise"):
        widened(noisy, (2, 2, 2, 2))


def test_the_calls_of_a_plan_join_their_stages_one_by_one():
    scales, names = [1.0, 3.0, 3.0, 2.0, 1.0, 3.0], ("", "small", "", "", "small", "")
    plan = sorted_as(widened(fitted(3), (3, 1, 2)), scales, names).program
    heads = [stage[0] for stage in stages(plan)]
    found = sorted_as(fitted(3), [scales[c] for c in heads], tuple(names[c] for c in heads))
    for width, kept in ((2, [0, 1, 3, 4, 5]), (3, [0, 1, 2, 3, 4, 5])):
        found = widened_to(plan, found, width)
        lengths = [min(len(stage), width) for stage in stages(plan)]
        assert [len(stage) for stage in stages(found.program)] == lengths
        assert [scale == 1 for scale in found.program.guidance] == [scales[c] == 1 for c in kept]
        assert found.program.network == tuple(names[c] for c in kept)
    assert pattern(found.program) == pattern(plan)


def test_a_fit_keeps_stages_and_unguided_calls_and_gains_from_the_second_query():
    s = sorted_as(fitted(3), [1.0, 2.0, 2.0])
    wide = widened(s, (2, 1, 2))

    class Pulled:
        noise = VP

        def __call__(self, x, t, *, cond=None, guidance=None):
            scale = torch.as_tensor(1.0 if guidance is None else guidance)
            return MODEL(x, t) * bcast(scale, x) ** 0.1

    x = z(48)
    target = sample(baseline("dpmpp3m/logsnr", VP, 60), Pulled(), x, guidance=2.0)
    data = Batch(x, target)
    model = FreeProgram(canonical(wide.program), VP, guided=True, staged=True)
    fit = Fit(model, Pulled(), data)
    theta = torch.zeros(model.size, dtype=torch.float64)
    first = fit.losses([theta])[0]
    theta = levenberg(theta, fit.linearise, fit.losses, rounds=6)
    found = model.program(theta)
    assert fit.losses([theta])[0] < 0.3 * first
    assert [len(stage) for stage in stages(found)] == [2, 1, 2]
    assert pattern(found) == "(uu)G(GG)"
    assert not bool((found.guidance == wide.program.guidance)[2:].any())


def test_show_says_in_words_what_each_call_asks(tmp_path, capsys):
    s = widened(sorted_as(fitted(3), [1.0, 3.5, 1.0], ("", "small", "")), (1, 2, 1))
    assert asked(s.program) == [
        "unguided",
        "guided 3.5, network small",
        "guided 3.5, network small, beside call 1",
        "unguided",
    ]
    plain = sorted_as(s, s.program.guidance.tolist())
    code, out, _ = called(capsys, "show", save_schedule(plain, tmp_path / "a.json"))
    assert code == 0
    assert "4 calls in 3 stages, u(GG)u: 2 unguided (u) ask the network once, 2 guided" in out
    assert "6 network evaluations" in out
    assert "unguided" in out.split("asks")[1]
