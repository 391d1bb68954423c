"""The loop: candidates in a batch, calls counted, contracts enforced, wrappers consistent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.samplers import from_model, run, run_candidates, sample, start
from fewstep.samplers.asking import prefix_groups
from fewstep.space import ModelError, OdeSchedule, ScheduleError, StepSpec, stack
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline, named
from tests.oracles import Mixture, gaussian, recorded_mixture

VP = noises.VPLinear()


def net(x, t, label=None):
    """A smooth nonlinear stand-in network in the input's dtype."""
    w = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    y = torch.tanh(x * w + t.reshape(-1, 1, 1, 1)) + 0.3 * x
    return y if label is None else y + 0.1 * label.reshape(-1, 1, 1, 1).to(x.dtype)


def z(batch=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 2, 2, generator=g, dtype=torch.float64).to(dtype)


def test_batched_candidates_equal_one_by_one_runs_to_float32_rounding():
    denoiser = from_model(net, VP, "eps")
    many = list(named(VP, 5).values())[::7]
    x = z()
    together = run(stack([s.program for s in many]), denoiser, x)
    assert together.shape == (len(many), *x.shape)
    for one, s in zip(together, many, strict=True):
        assert torch.allclose(one, sample(s, denoiser, x), rtol=1e-5, atol=2e-5)


def test_candidates_with_equal_prefixes_share_calls_and_nothing_else_changes():
    a = baseline("dpmpp3m/edm", VP, 5)
    late = [s.model_copy(update={"formulation": "noise"}) if i == 3 else s for i, s in enumerate(a.steps)]  # noqa: E501  # fmt: skip
    b = OdeSchedule(noise=VP, times=a.times, steps=tuple(late))
    c = baseline("dpmpp3m/logsnr", VP, 5)
    model = recorded_mixture(VP)
    counted = []

    class Counting:
        noise = VP

        def __call__(self, x, t, *, cond=None, guidance=None):
            counted.append(len(x))
            return model(x, t)

    x = z(dtype=torch.float64)
    programs = [a.program, b.program, c.program]
    program = stack(programs)
    assert prefix_groups(program) == [[0, 0, 0], [0, 0, 2], [0, 0, 2], [0, 0, 2], [0, 1, 2]]
    shared = run_candidates(programs, Counting(), x)
    assert counted == [4, 8, 8, 8, 12]
    assert torch.allclose(shared, run(program, Counting(), x), rtol=0, atol=1e-12)
    guided = stack([s.model_copy(update={"steps": tuple(t.model_copy(update={"guidance": g}) for t in s.steps)}).program for s, g in ((a, 1.0), (a, 2.0))])  # noqa: E501  # fmt: skip
    assert prefix_groups(guided)[0] == [0, 1]


def test_network_calls_are_counted_and_equal_nfe():
    for nfe in (1, 4, 7):
        for name, s in named(VP, nfe).items():
            denoiser = from_model(net, VP, "eps")
            sample(s, denoiser, z(2))
            assert denoiser.calls == s.nfe == nfe, name
            assert denoiser.forwards == 2 * nfe


def test_output_kinds_of_the_same_model_give_the_same_data_prediction():
    model = recorded_mixture(VP)
    x, t = z(dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)
    alpha, sigma = float(VP.alpha(t[:1])), float(VP.sigma(t[:1]))
    D = model(x, t)
    eps = (x - alpha * D) / sigma
    outputs = {
        "eps": eps,
        "x0": D,
        "v": alpha * eps - sigma * D,
        "score": -eps / sigma,
        "flow": eps - D,
    }
    for kind, out in outputs.items():
        wrapped = from_model(lambda x, t, out=out: out, VP, kind)
        assert torch.allclose(wrapped(x, t), D, rtol=0, atol=1e-12), kind


def test_guidance_is_one_batched_call_and_scale_1_is_the_conditional_model():
    seen = []

    def model(x, t, label):
        seen.append(len(x))
        return net(x, t, label)

    denoiser = from_model(
        model, VP, "eps", null_cond=lambda c: {"label": torch.zeros_like(c["label"])}
    )
    x, t, cond = z(), torch.full((4,), 0.5), {"label": torch.arange(1, 5)}
    one = denoiser(x, t, cond=cond, guidance=1.0)
    assert torch.equal(one, denoiser(x, t, cond=cond))
    three = denoiser(x, t, cond=cond, guidance=3.0)
    null = denoiser(x, t, cond={"label": torch.zeros(4, dtype=torch.long)})
    assert torch.allclose(three, null + 3 * (one - null), rtol=1e-4, atol=1e-4)
    per_sample = denoiser(x, t, cond=cond, guidance=torch.tensor([1.0, 3.0, 3.0, 1.0]))
    assert torch.allclose(per_sample[1:3], three[1:3], rtol=1e-5, atol=1e-5)
    assert torch.allclose(per_sample[0], one[0], rtol=1e-5, atol=1e-5)
    assert seen == [4, 4, 8, 4, 8]
    assert denoiser.calls == 5
    assert denoiser.forwards == sum(seen)


def test_guidance_without_conditions_is_an_error_not_a_double_cost():
    seen = []

    def model(x, t, **cond):
        seen.append(len(x))
        return x

    x, t = z(), torch.full((4,), 0.5)
    denoiser = from_model(model, VP, "eps", null_cond=lambda c: {"text": c["label"]})
    for cond in (None, {}):
        with pytest.raises(ModelError, match="there are no conditions"):
            denoiser(x, t, cond=cond, guidance=3.0)
    with pytest.raises(ModelError, match=r"null_cond returned conditions \['text'\]"):
        denoiser(x, t, cond={"label": torch.arange(4)}, guidance=3.0)
    with pytest.raises(ModelError, match="give null_cond"):
        from_model(model, VP, "eps")(x, t, cond={"label": torch.arange(4)}, guidance=3.0)
    assert seen == []
    denoiser(x, t, guidance=1.0)
    assert seen == [4]


def test_an_image_of_another_shape_than_the_samples_is_named():
    s = baseline("ddim/time", VP, 4).model_copy(update={"first": "mean"})
    with pytest.raises(ScheduleError, match=r"constant image has shape \(3, 2, 2\)"):
        sample(s.with_constant(torch.zeros(3, 2, 2)), gaussian(VP), torch.zeros(5, 2, 2))


def test_guidance_in_the_schedule_reaches_the_network_call_by_call():
    asked = []

    class Spy:
        noise = VP

        def __call__(self, x, t, *, cond=None, guidance=None):
            asked.append(torch.as_tensor(guidance).expand(len(x)).tolist())
            return torch.zeros_like(x)

    steps = tuple(StepSpec(guidance=g) for g in (1.0, 4.0, 2.0))
    s = OdeSchedule(noise=VP, times=(1.0, 0.6, 0.3, 0.001), steps=steps)
    sample(s, Spy(), z(2))
    assert asked == [[1.0, 1.0], [4.0, 4.0], [2.0, 2.0]]
    two = stack([s.program, s.model_copy(update={"steps": steps[::-1]}).program])
    asked.clear()
    run(two, Spy(), z(2))
    # unguided images are asked apart from guided ones: they cost half
    assert asked == [[1.0, 1.0], [2.0, 2.0], [4.0] * 4, [1.0, 1.0], [2.0, 2.0]]


def test_state_and_history_stay_float32_for_a_half_precision_network():
    kinds = []

    def half(x, t):
        kinds.append(x.dtype)
        return net(x, t)

    denoiser = from_model(half, VP, "eps", dtype=torch.bfloat16)
    out = sample(baseline("unipc3-bh2/edm", VP, 6), denoiser, z().to(torch.bfloat16))
    assert out.dtype == torch.float32
    assert set(kinds) == {torch.bfloat16}


def test_the_same_schedule_twice_gives_the_same_image_and_seeds_decide_the_noise():
    denoiser = from_model(net, VP, "eps")
    s = baseline("dpmpp3m/edm", VP, 6)
    assert torch.equal(sample(s, denoiser, z()), sample(s, denoiser, z()))
    ddpm = baseline("ddpm/time", VP, 6)
    draw = lambda seed: sample(ddpm, denoiser, z(), generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_ancestral_sampling_has_the_right_variance_on_a_gaussian():
    """DDPM steps on N(0, v): after many steps the sample variance is v again."""
    one = torch.ones(1, dtype=torch.float64)
    model = Mixture(VP, one, torch.zeros(1, 1, dtype=torch.float64), 0.25 * one)
    x = torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = sample(
        baseline("ddpm/logsnr", VP, 200), model, x, generator=torch.Generator().manual_seed(1)
    )
    assert float(y.var()) == pytest.approx(0.25, rel=0.05)


def test_callback_sees_every_call():
    seen = []
    s = baseline("ddim/time", VP, 4)
    sample(s, from_model(net, VP, "eps"), z(), callback=seen.append)
    assert [p.call for p in seen] == [0, 1, 2, 3]
    assert [float(p.t[0]) for p in seen] == pytest.approx(list(s.times[:-1]))


def test_start_scales_unit_noise_by_the_frame():
    unit = z()
    assert torch.equal(start(baseline("ddim/time", VP, 2), unit), unit)
    assert torch.equal(start(baseline("ddim/edm", noises.EDM(), 2), unit), 80.0 * unit)


def test_a_model_that_breaks_the_contract_is_named_in_one_line():
    s = baseline("ddim/time", VP, 3)
    with pytest.raises(ModelError, match="must return a tensor of the state's shape"):
        sample(s, from_model(lambda x, t: x[:, :1], VP, "eps"), z())
    with pytest.raises(ModelError, match=r"network call 0 .* is not finite"):
        sample(s, from_model(lambda x, t: x * float("nan"), VP, "eps"), z())
    with pytest.raises(ModelError, match="output 'noise' is unknown"):
        from_model(net, VP, "noise")
    with pytest.raises(ModelError, match="no unconditional branch"):
        from_model(net, VP, "eps")(z(), torch.ones(4), guidance=2.0)
    needs_m = OdeSchedule(
        noise=VP, times=(1.0, 0.5, 0.1, 0.001), steps=(StepSpec(),) * 3, first="mean"
    )
    with pytest.raises(ScheduleError, match="constant image"):
        sample(needs_m, from_model(net, VP, "eps"), z())


def test_a_candidate_that_diverges_does_not_spoil_its_batch():
    a = baseline("ddim/time", VP, 3)
    b = OdeSchedule(noise=VP, times=(0.5, 0.3, 0.2, 0.001), steps=a.steps)
    model = from_model(lambda x, t: net(x, t) / (t.reshape(-1, 1, 1, 1) != 0.5), VP, "eps")
    out = run_candidates([a.program, b.program], model, z())
    assert bool(torch.isfinite(out[0]).all())
    assert not bool(torch.isfinite(out[1]).all())


def test_gradients_of_a_loss_agree_with_central_differences():
    """Times, shifts, compensation, relaxation, power: through compile and loop, float64."""
    from fewstep.space import compile

    steps = (
        StepSpec(corrector="reuse"),
        StepSpec(order=2, relaxation="linear", weights=(0.02,)),
        StepSpec(order=3, formulation="noise", corrector="reuse", weights=(0.01, 0.02)),
        StepSpec(order=2, basis="t", formulation="noise", weights=(0.0, 0.0)),
        StepSpec(order=2, basis="power", power=0.5, formulation="noise", weights=(0.0, 0.0)),
    )  # fmt: skip
    s = OdeSchedule(noise=VP, times=(1.0, 0.72, 0.5, 0.3, 0.12, 0.01), steps=steps)
    model, x = recorded_mixture(VP), z(dtype=torch.float64)
    f64 = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    values = {
        "times": f64(*s.times),
        "compensation": f64(1, 1, 1.05, 0.97, 1.1),
        "dt_query": f64(0.0, 0.01, -0.01, 0.004, 0.002),
        "dt_start": f64(0.0, 0.0, 0.01, 0.0, 0.003),
        "dt_land": f64(0.0, -0.01, 0.0, 0.002, 0.0),
        "relaxation_coefficient": f64(0, 0.1, 0, 0, 0),
        "power": f64(1, 1, 1, 1, 0.5),
    }

    def loss(v):
        return run(compile(s, v), model, x).square().mean()

    for name, value in values.items():
        free = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(values | {name: free}), free, allow_unused=True)
        for i in range(len(value)):
            if name == "times" and i in (0, len(value) - 1):
                continue
            step = torch.zeros_like(value)
            step[i] = 1e-5
            at = {k: float(loss(values | {name: value + k * step})) for k in (-2, -1, 1, 2)}
            slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / 12e-5
            assert float(gradient[i]) == pytest.approx(slope, rel=1e-6, abs=1e-8), (name, i)


class _Moves(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if given and isinstance(out, torch.Tensor) and func in _COPIES:
            self.count += out.device != given[-1].device
        return out


_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def test_what_calls_need_is_on_the_device_before_the_loop():
    """On the meta device, which is another than the program's: as many copies for any calls."""
    noise, counts = VP, {}
    for nfe in (3, 9):
        names = ("ddim/time", "dpmpp2m/time", "unipc2-bh2/edm")
        scales = torch.linspace(2, 3, 3 * nfe).reshape(3, nfe).double()
        guided = [replace(baseline(n, noise, nfe).program, guidance=w) for n, w in zip(names, scales, strict=True)]  # noqa: E501  # fmt: skip
        moves, inside = _Moves(), []

        class Meta:
            def __call__(self, x, t, *, cond=None, guidance=None, moves=moves, inside=inside):
                assert x.device == t.device == guidance.device == torch.device("meta")
                inside.append(moves.count)
                return x * t.reshape(-1, 1).to(x.dtype)

        with moves:
            run_candidates(guided, Meta(), torch.zeros(4, 2, device="meta"))
        assert inside == [inside[0]] * nfe
        assert moves.count == inside[0]
        counts[nfe] = moves.count
    assert counts[3] == counts[9] <= 4


def test_a_denoiser_says_how_many_images_a_call_of_it_should_hold():
    noise, held = VP, []
    programs = [baseline(f"ddim/{g}", noise, 3).program for g in ("time", "edm", "logsnr")]

    class Small:
        piece = 9

        def __call__(self, x, t, *, cond=None, guidance=None):
            held.append(len(x))
            return 0.5 * x

    x = torch.randn(4, 2)
    run_candidates(programs, Small(), x)
    assert held == [4, 8, 4, 8, 4]
