"""Masked schedules in diffusers' block-wise text pipeline, on a tiny model from its config."""

import pytest
import torch

from fewstep.space import ScheduleError, load_schedule, save_schedule
from fewstep.space.baselines import named
from fewstep.space.masked import MaskedSchedule
from fewstep.space.noise import VPLinear

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "LLaDA2Pipeline"):
    pytest.skip("this diffusers has no LLaDA2Pipeline", allow_module_level=True)

from fewstep.samplers.llada2 import FewstepBlockScheduler, stock_schedule  # noqa: E402

MASK, VOCABULARY, BLOCK = 29, 30, 8
QUIET = {"threshold": 1.0, "editing_threshold": None, "mask_token_id": MASK, "output_type": "seq",
         "eos_early_stop": False}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    net = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        net.bert.embeddings.word_embeddings.weight.mul_(40)
        net.cls.predictions.bias[MASK] = -1e4  # stock code would commit a mask as a token
    return net


def pipeline(model, scheduler):
    pipe = diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = torch.tensor([[3, 5, 7], [2, 2, 9]])


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("threshold", [1.0, 0.3, 0.05])
def test_the_stock_counts_as_a_file_replay_to_the_same_tokens(model, tmp_path, steps, threshold):
    settings = QUIET | {"gen_length": 21, "num_inference_steps": steps, "threshold": threshold}
    stock = pipeline(model, diffusers.BlockRefinementScheduler(block_length=BLOCK))
    wanted = stock(input_ids=PROMPT, **settings).sequences
    made = stock_schedule(BLOCK, steps, threshold=threshold)
    path = save_schedule(made, tmp_path / "stock.json")
    ours = pipeline(model, FewstepBlockScheduler(schedule=str(path)))
    assert torch.equal(ours(input_ids=PROMPT, **settings).sequences, wanted)
    assert load_schedule(path) == made


@pytest.mark.parametrize(
    "choices",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "positions": "entropy", "mode": "extrapolate"},
        {"positions": "drawn", "ends_last": True},
        {"remask": 0.4, "remask_by": "drawn"},
        {"max_entropy": 0.5, "block": 4},
    ],
)
def test_a_searched_schedule_runs_and_fills_every_block(model, choices):
    calls = []
    handle = model.register_forward_hook(lambda *a: calls.append(1))
    schedule = MaskedSchedule.from_counts((1, 3, 4), **choices)
    scheduler = FewstepBlockScheduler(schedule=schedule.to_dict(), ends=(1,))
    settings = QUIET | {"temperature": schedule.calls[0].temperature, "gen_length": 21}
    draws = [
        pipeline(model, scheduler)(
            input_ids=PROMPT, num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed), **settings,
        ).sequences
        for seed in (0, 0, 1)
    ]  # fmt: skip
    handle.remove()
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape == (2, 21)
    assert not bool((draws[0] == MASK).any())
    if choices.get("positions") != "drawn":
        assert not torch.equal(draws[0], draws[2])
    assert len(calls) <= 3 * 3 * 3
    saved = FewstepBlockScheduler.from_config(scheduler.config)
    assert saved.schedule == schedule


def test_what_the_pipeline_asks_and_the_file_does_not_is_said(model):
    schedule = MaskedSchedule.from_counts((4, 4))
    ours = pipeline(model, FewstepBlockScheduler(schedule=schedule.to_dict()))
    with pytest.raises(ScheduleError, match="pass num_inference_steps=2"):
        ours(input_ids=PROMPT, gen_length=5, num_inference_steps=4, **QUIET)
    with pytest.raises(ScheduleError, match="pass block_length=8"):
        ours(input_ids=PROMPT, gen_length=5, num_inference_steps=2, block_length=4, **QUIET)
    said = "not used: temperature=0.0, threshold=0.7, editing_threshold=0.5"
    with pytest.warns(UserWarning, match=said):
        ours(input_ids=PROMPT, gen_length=5, num_inference_steps=2, mask_token_id=MASK,
             output_type="seq")  # fmt: skip

    def change(pipe, step, index, given):
        given["block_x"][:, -1] = 4
        return given

    with pytest.raises(ScheduleError, match="a callback may only read"):
        ours(input_ids=PROMPT, gen_length=5, num_inference_steps=2, callback_on_step_end=change,
             temperature=1.0, **QUIET)  # fmt: skip


def test_files_that_cannot_run_here_are_refused_in_one_line():
    hidden = MaskedSchedule.from_counts((4, 4), block=4, hide_future=True)
    ode = next(iter(named(VPLinear(), 4).values()))
    for given, match in (
        (hidden.to_dict(), "call 0: hide_future cannot be run here"),
        (ode.to_dict(), "kind 'ode' cannot unmask text"),
        (None, "schedule is missing"),
    ):
        with pytest.raises(ScheduleError, match=match) as caught:
            FewstepBlockScheduler(schedule=given)
        assert "\n" not in str(caught.value)
