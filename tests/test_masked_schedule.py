"""Masked schedules: their file, their digests, the named counts, and one line for bad input."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.experiments.benchmarks.ancestral import ancestral
from fewstep.samplers import from_subs, sample_masked, start_masked
from fewstep.samplers.masked import anneal
from fewstep.space import ModelError, ScheduleError, load_schedule, save_schedule
from fewstep.space.counts import COUNTS, counts_by_name, split
from fewstep.space.masked import CallSpec, MaskedNoise, MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain


def blank(batch: int, length: int = 4, mask: int = 3) -> Tensor:
    return torch.full((batch, length), mask)


# --- schedules and their file ----------------------------------------------------------------


def test_a_schedule_survives_its_file_bit_for_bit(tmp_path) -> None:
    schedule = MaskedSchedule(
        length=10,
        calls=(
            CallSpec(count=3, temperature=0.1 + 0.2),
            CallSpec(count=6, mode="extrapolate", top_p=0.95, positions="confidence"),
            CallSpec(),
        ),
        noise=MaskedNoise(floor=1e-3),
        variable="fraction",
        provenance={"model": "table"},
    )
    path = save_schedule(schedule, tmp_path / "masked.json")
    loaded = load_schedule(path)
    assert loaded == schedule
    assert loaded.digest == schedule.digest
    assert loaded.to_dict() == schedule.to_dict()
    assert schedule.to_dict()["nfe"] == 3


def test_equal_samplers_have_equal_digests() -> None:
    base = MaskedSchedule.from_counts((2, 1, 1))
    same = MaskedSchedule(
        length=4,
        calls=(
            CallSpec(count=2, temperature=1 + 1e-14),
            CallSpec(count=1, mode="extrapolate"),
            CallSpec(count=1, positions="confidence"),
        ),
        variable="fraction",
        provenance={"anything": 1},
    )
    assert base.digest == same.digest
    for other in (
        MaskedSchedule.from_counts((1, 2, 1)),
        MaskedSchedule.from_counts((2, 1, 1), temperature=0.9),
        MaskedSchedule.from_counts((2, 1, 1), positions="confidence"),
    ):
        assert other.digest != base.digest
    assert MaskedSchedule.token_by_token(5).exact
    assert not base.exact


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("length", "calls"), [(54, 8), (54, 12), (54, 54), (54, 1), (5, 4)])
def test_named_counts_are_compositions_of_the_length(name: str, length: int, calls: int) -> None:
    counts = counts_by_name(name, length, calls)
    assert len(counts) == calls
    assert sum(counts) == length
    assert min(counts) >= 1


def test_named_counts_have_their_shapes() -> None:
    assert counts_by_name("uniform", 54, 8) == (7, 7, 6, 7, 7, 6, 7, 7)
    cosine = counts_by_name("cosine", 54, 8)
    assert list(cosine) == sorted(cosine)
    assert counts_by_name("reverse_cosine", 54, 8)[0] > 8
    assert split([1.0, 0.0, 0.0], 3) == (1, 1, 1)


# --- refusals: one clear line ----------------------------------------------------------------


def _refused(make, match: str, error=ScheduleError) -> None:
    with pytest.raises(error, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_schedules_that_mean_nothing_are_refused() -> None:
    one = CallSpec()
    _refused(lambda: MaskedSchedule(length=5, calls=(one, one)), "counts sum to 2 but length is 5")
    _refused(lambda: MaskedSchedule(length=1, calls=()), "calls is empty")
    _refused(lambda: CallSpec(count=0), "count 0 must be 1 or more")
    _refused(lambda: CallSpec(temperature=-1), "temperature -1.* must be 0 or more")
    _refused(lambda: CallSpec(temperature=math.nan), "temperature")
    _refused(lambda: CallSpec(top_p=1.5), "top_p 1.5 is outside")
    _refused(lambda: CallSpec(heat=2), "heat is not a field")
    _refused(lambda: MaskedNoise(floor=1), "floor")
    first = CallSpec(count=2, mode="extrapolate")
    _refused(lambda: MaskedSchedule(length=2, calls=(first,)), "call 0 cannot extrapolate")
    _refused(lambda: counts_by_name("sine", 4, 2), "unknown: use one of uniform")
    _refused(lambda: counts_by_name("cosine", 4, 5), "5 calls for 4 positions")
    good = MaskedSchedule.from_counts((1, 1)).to_dict()
    _refused(lambda: load_schedule(good | {"nfe": 3}), "nfe is 3 in the file")
    _refused(lambda: load_schedule(good | {"calls": [{"count": "x"}, {}]}), "call 0: count")
    _refused(lambda: load_schedule(good | {"version": 2}), "version 2 is unknown")
    _refused(lambda: load_schedule(good | {"length": 3}), "counts sum to 2")


def test_inputs_that_do_not_fit_are_refused() -> None:
    denoiser = from_subs(lambda x: torch.zeros(*x.shape, 4), 3, length=4)
    four = MaskedSchedule.token_by_token(4)
    tokens = blank(2)
    tokens[1, 0] = 0
    _refused(
        lambda: sample_masked(four, denoiser, tokens),
        "counts sum to 4 but sequence 1 has 3 free positions",
    )
    _refused(lambda: start_masked(denoiser, 1, 5), "exceeds the model's 4", ModelError)
    _refused(
        lambda: start_masked(denoiser, 1, 4, prompt=[0] * 5), "prompt of 5 tokens", ModelError
    )
    _refused(
        lambda: sample_masked(MaskedSchedule.token_by_token(9), denoiser, blank(1, 9)),
        "length 9 exceeds the model's 4",
        ModelError,
    )
    _refused(
        lambda: sample_masked(four, denoiser, blank(1), u=torch.rand(1, 2, 4)), "u must be float64"
    )
    warm = MaskedSchedule.from_counts((2, 2))
    _refused(lambda: anneal(warm, denoiser, blank(1), power=2), "annealing needs count 1")
    _refused(lambda: anneal(four, denoiser, blank(1), power=0), "power 0 must be positive")
    _refused(lambda: ancestral(denoiser, blank(1), 0), "steps 0")


class _Bad:
    mask, length = 4, None

    def __init__(self, value: float, mask_logit: float) -> None:
        self.value, self.mask_logit = value, mask_logit

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, 5), self.value)
        logits[..., 4] = self.mask_logit
        return logits


def test_broken_logits_are_refused() -> None:
    schedule = MaskedSchedule.from_counts((2, 1))
    for bad, match in (
        (_Bad(math.nan, -math.inf), "call 0: the logits hold NaN"),
        (_Bad(-math.inf, -math.inf), "forbid every token"),
        (_Bad(0.0, 0.0), "allow the mask token: wrap with from_subs"),
    ):
        _refused(lambda b=bad: sample_masked(schedule, b, blank(1, 3, 4)), match, ModelError)
    for bad, match in ((_Bad(math.nan, -math.inf), "NaN"), (_Bad(0.0, 0.0), "mask token")):
        _refused(lambda b=bad: ancestral(b, blank(1, 3, 4), 1), match, ModelError)
    short = from_subs(lambda x: torch.zeros(1, 2, 5), 4)
    _refused(lambda: sample_masked(schedule, short, blank(1, 3, 4)), "returned logits", ModelError)
    low = from_subs(lambda x: torch.zeros(*x.shape, 4), 4)
    _refused(lambda: sample_masked(schedule, low, blank(1, 3, 4)), "outside a vocab", ModelError)


# --- the search space ------------------------------------------------------------------------

DOMAINS = [
    MaskedDomain(20, 8),
    MaskedDomain(
        20,
        6,
        modes=("parallel", "extrapolate"),
        positions=("uniform", "confidence"),
        temperature=(0.7, 1.2),
    ),
    MaskedDomain(5, 5),
    MaskedDomain(7, 1, temperature=(0.5, 1.0)),
]


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_move_stays_in_the_space_and_parameters_are_exact(domain: MaskedDomain) -> None:
    rng = np.random.default_rng(0)
    pool = [*domain.baselines().values(), *(domain.sample(rng) for _ in range(20))]
    for schedule in pool:
        other = pool[int(rng.integers(len(pool)))]
        child = domain.crossover(domain.mutate(schedule, rng), other, rng)
        for member in (schedule, child, *domain.neighbours(child)):
            assert domain.contains(member) is None
            assert sum(member.counts) == domain.length
            params = domain.params(member)
            assert domain.from_params(params) == domain.canonical(member)
            assert domain.params(domain.from_params(params)) == domain.params(
                domain.canonical(member)
            )
            assert domain.canonical(member).digest == member.digest
            assert set(params) == set(domain.distributions())
            assert domain.encode(member).shape == domain.encode(schedule).shape
    if domain.nfe not in (1, domain.length):
        assert all(domain.mutate(s, rng).digest != s.digest for s in pool)


def test_the_rule_of_a_last_call_that_decides_all_the_rest_is_no_choice() -> None:
    open_ = MaskedDomain(9, 3, positions=("uniform", "confidence"))
    closed = MaskedDomain(9, 3, positions=("confidence",))
    surest = open_.baselines()["uniform/confidence"]
    assert surest.calls[-1].positions == "uniform"
    assert closed.contains(surest) is None
    assert closed.canonical(surest).digest == surest.digest
    assert "not open" in str(closed.contains(open_.baselines()["uniform"]))


def test_a_run_of_calls_changes_alike() -> None:
    domain = MaskedDomain(
        12, 6, modes=("parallel", "extrapolate"), positions=("uniform", "confidence"),
        temperature=(0.5, 2.0),
    )  # fmt: skip
    rng, stems = np.random.default_rng(3), set()
    parent = domain.baselines()["uniform/extrapolate"]
    before = domain.params(parent)
    for _ in range(60):
        child = domain.params(domain.mutate(parent, rng, rates={"count": 0, "run": 1}))
        changed = [name for name in before if child[name] != before[name]]
        stem = {name.rpartition("_")[0] for name in changed}
        calls = sorted(int(name.rpartition("_")[2]) for name in changed)
        assert len(stem) == 1
        assert calls == list(range(calls[0], calls[-1] + 1))
        assert len({child[name] for name in changed}) == 1
        stems |= stem
    assert stems == {"mode", "positions", "temperature"}


def test_any_values_become_a_member() -> None:
    domain = DOMAINS[1]
    assert domain.from_params({}).counts == counts_by_name("uniform", 20, 6)
    wild = domain.from_params({"count_0": 1e9, "count_1": -3, "temperature_2": 99, "mode_1": "x"})
    assert domain.contains(wild) is None
    assert wild.calls[2].temperature == 1.2


def test_what_is_no_member_is_said() -> None:
    domain = DOMAINS[0]
    assert "calls, not 8" in str(domain.contains(MaskedSchedule.token_by_token(20)))
    assert "positions, not 20" in str(domain.contains(MaskedSchedule.token_by_token(8)))
    assert "no masked schedule" in str(domain.contains(3))
    hot = MaskedSchedule.from_counts(counts_by_name("uniform", 20, 8), temperature=2.0)
    _refused(lambda: domain.params(hot), "temperature 2.0 is outside")
    _refused(lambda: MaskedDomain(4, 5), "nfe 5 must lie in 1..4")
    _refused(lambda: MaskedDomain(4, 2, temperature=(2.0, 3.0)), "must enclose 1")
    _refused(lambda: MaskedDomain(4, 2, modes=("x",)), "modes must be out of")
