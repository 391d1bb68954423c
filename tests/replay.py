"""Recorded reference cases as schedules: what each case says, in our vocabulary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fewstep.experiments.cli.usf import from_usf
from fewstep.space import OdeSchedule, StepSpec
from fewstep.space.baselines import dpm, f_pndm, in_basis, multistep, s_pndm, unipc
from tests.oracles import reference_noise

TABLEAUS = {
    "2heun": "heun2",
    "3kutta": "kutta3",
    "3ral": "ral3",
    "3heun": "heun3",
    "3vdh": "vdh3",
    "3ssprk": "ssprk3",
}
TABLEAUS |= {"4rk": "rk4", "1euler": "euler1"}


class Unsupported(Exception):
    """A case this version cannot run; the message says what it waits for."""


@dataclass
class Replay:
    """One schedule to run and the outputs it must reproduce, by field name."""

    schedule: OdeSchedule
    frame: str
    expected: dict[str, Tensor]
    x_T: Tensor


@cache
def load(path: Path):
    return json.loads(path.read_text())


def index(folder: Path) -> list[dict]:
    return load(folder / "index.json")


def replays(folder: Path, entry: dict) -> list[Replay]:
    """The schedules of one index entry (USF has one per variant)."""
    data = load(folder / entry["file"])
    z = torch.tensor(load(folder / "mixture.json")["z"], dtype=torch.float64)
    if entry["method"] == "usf":
        return [_usf(folder, data, variant) for variant in entry["expect"]]
    case = next(c for c in data["cases"] if c["id"] == entry["id"])
    x_T = torch.tensor(data["x_T"], dtype=torch.float64) if "x_T" in data else z
    if entry["frame"] == "vp_edm_ablation":
        x_T = z * math.sqrt(-math.expm1(-10.05))  # sigma(t_0) s(t_0)
    schedule = _schedule(entry["method"], entry["frame"], case)
    expect = entry["expect"]
    return [
        Replay(
            schedule,
            entry["frame"],
            {expect: torch.tensor(case[expect], dtype=torch.float64)},
            x_T,
        )
    ]


def _usf(folder: Path, data: dict, variant: str) -> Replay:
    published = load(folder / data["schedule"])
    schedule = from_usf(published, v3="identity", zero_as_released=variant == "exact_v3")
    m = torch.tensor(load(folder / "mixture.json")["average_x0"], dtype=torch.float64)
    if schedule.first == "mean":
        schedule = schedule.with_constant(m)
    expected = torch.tensor(data["variants"][variant]["x_final"], dtype=torch.float64)
    return Replay(
        schedule,
        data["frame"],
        {variant: expected},
        torch.tensor(data["x_T"], dtype=torch.float64),
    )


def _schedule(method: str, frame: str, case: dict) -> OdeSchedule:
    noise = reference_noise("vp_linear" if frame == "vp_edm_ablation" else frame)
    if method.startswith("ts-"):
        return _time_shift(method, noise, case)
    times = _times(frame, case)
    if method in ("dc", "dc-ratio1"):
        return _dc(noise, times, case)
    if method == "unipc":
        spec = (
            unipc(case["variant"], case["prediction"])
            if "prediction" in case
            else unipc(case["variant"])
        )
        return multistep(noise, times, case["order"], lower_final=True, spec=spec)
    if method.startswith(("dpmpp-", "dpm-")) or method == "ddim":
        return _dpm(method, noise, times, case)
    if method in ("deis-tab", "deis-rhoab"):
        return multistep(
            noise, times, case["degree"] + 1, spec=in_basis("t" if method == "deis-tab" else "rho")
        )
    if method == "deis-logrho":
        return multistep(noise, times, case["order"], lower_final=True, spec=in_basis("lam"))
    if method == "deis-rhork":
        step = StepSpec(formulation="noise", basis="rho", tableau=TABLEAUS[case["rk"]])
        return OdeSchedule(noise=noise, times=times, steps=(step,) * (len(times) - 1))
    if method in ("ipndm", "ipndm_v"):
        return multistep(
            noise, times, case["order"], spec=in_basis("adams" if method == "ipndm" else "rho")
        )
    if method in ("heun", "dpm_2", "euler"):
        return _edm(method, frame, noise, times)
    raise Unsupported(f"method {method} is of a kind this version does not know")


def _times(frame: str, case: dict) -> tuple[float, ...]:
    if frame == "vp_edm_ablation":
        n = case["steps"]
        return (*(1 + i / (n - 1) * (1e-3 - 1) for i in range(n)), 0.0)
    times = tuple(float(t) for t in case["timesteps"])
    if frame != "sd_discrete":
        return times
    return (*times, -1.0 if case["sigmas"][-1] == 0 else 0.0)


def _dpm(method: str, noise, times, case) -> OdeSchedule:
    formulation = "noise" if method.startswith("dpm-") else "data"
    if case.get("dynamic_thresholding"):
        options = {"threshold": {"quantile": 0.995, "minimum": 1.0}}
    else:
        options = {}
    if case.get("step_kind") == "singlestep":
        return singlestep(formulation, noise, times, case["order"])
    taylor = case.get("solver_type") in ("taylor", "heun")
    second = case.get("second_difference_factor", 1) == 2
    spec = (
        dpm(formulation, case["order"], taylor=taylor, true_second=second)
        if method != "ddim"
        else dpm("data", 1)
    )
    schedule = multistep(noise, times, case.get("order", 1), lower_final=True, spec=spec)
    return schedule.model_copy(update={"options": options})


def singlestep(formulation: str, noise, times, order: int) -> OdeSchedule:
    """Blocks of 1, 2 or 3 calls; a block's later steps start from its first point."""
    n = len(times) - 1
    blocks = [order] * (n // order) + ([n % order] if n % order else [])
    if order == 3 and n % 3 == 0:
        blocks = [3] * (n // 3 - 1) + [2, 1]
    steps: list[StepSpec] = []
    for size in blocks:
        steps.append(StepSpec(formulation=formulation))
        if size == 2:
            steps.append(StepSpec(order=2, start=1, relaxation="bh2", formulation=formulation))
        elif size == 3:
            steps += [StepSpec(order=2, start=k, formulation=formulation) for k in (1, 2)]
    return OdeSchedule(noise=noise, times=times, steps=tuple(steps))


def _edm(method: str, frame: str, noise, times) -> OdeSchedule:
    variable = (
        {"formulation": "velocity", "basis": "t"}
        if frame == "vp_edm_ablation"
        else {"formulation": "noise"}
    )
    one = StepSpec(**variable)
    if method == "euler":
        return OdeSchedule(noise=noise, times=times, steps=(one,) * (len(times) - 1))
    if method == "dpm_2":
        two = StepSpec(formulation="noise", basis="lam", tableau="midpoint2")
    else:
        two = StepSpec(**{"basis": "rho"} | variable, tableau="heun2")
    last = one if times[-1] == 0 else two
    return OdeSchedule(noise=noise, times=times, steps=(*(two,) * (len(times) - 2), last))


def _dc(noise, times, case) -> OdeSchedule:
    base = multistep(
        noise, times, case["solver_order"], lower_final=True, spec=unipc(case["solver_type"])
    )
    steps = []
    for i, (step, ratio) in enumerate(zip(base.steps, case["ratios"], strict=True)):
        changes: dict = {"compensation": ratio}
        if i in case["disable_corrector"]:
            changes |= {"corrector": "none", "corrector_relaxation": "none"}
        steps.append(step.model_copy(update=changes))
    return OdeSchedule(
        noise=noise, times=times, steps=tuple(steps), compensation_order=case["dc_order"]
    )


def _time_shift(method: str, noise, case) -> OdeSchedule:
    """TS-DPM's PNDM code and the algorithm of the paper; windows there are full widths."""
    if not method.startswith(("ts-pnm-", "ts-paper-")):
        raise Unsupported(f"method {method} is a record of an upstream defect")
    released = method.startswith("ts-pnm-")
    options = {}
    if case.get("shift", True) and case["window"] is not None:
        rule = {
            "rule": "variance",
            "window": case["window"] // 2,
            "cutoff": case["cutoff"],
            "semantics": "pnm" if released else "paper",
        }
        options = {"time_shift": rule}
    if not released:
        times = tuple(map(float, case["grid"]))
        steps = (StepSpec(),) * (len(times) - 1)
        return OdeSchedule(noise=noise, times=times, steps=steps, options=options)
    labels = range(1, 1001, 1000 // case["S_argument"])
    times = (*map(float, reversed(labels[:-1])), 0.0)
    n = len(times) - 1
    if method == "ts-pnm-euler":
        steps = (StepSpec(formulation="noise"),) * n
    elif method == "ts-pnm-s_pndm":
        steps = s_pndm(n)
    else:  # the released code truncates the level of a stage to a label
        steps = f_pndm(n, "label")
    return OdeSchedule(noise=noise, times=times, steps=steps, options=options)
