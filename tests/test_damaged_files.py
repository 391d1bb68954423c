"""Damaged schedule files: whatever is changed in one, it loads or is one clear line."""

from __future__ import annotations

import copy
import json
import random

import pytest

from fewstep.space import OdeSchedule, ProgramSchedule, ScheduleError, StepSpec, load_schedule
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from fewstep.space.masked_domain import MaskedDomain
from fewstep.space.particle_policies import named_policies

VALUES = (
    *(None, True, False, 0, 1, -1, 5, 10**400, 0.5, -2.5, 1e300, float("nan"), float("inf")),
    *("", "x", "none", "data", "linear", [], [1.0], [[]], ["x"], {}, {"a": 1}, [None], [{}]),
)
EACH = 800  # of each file; with tests/test_fits_fuzz.py ten thousand
WORDS = ("program", "steps", "noise", "type", "x", "order", "b", "options", "threshold", "nfe")


def _ode() -> OdeSchedule:
    steps = (
        StepSpec(guidance=1.0),
        StepSpec(order=2, corrector="reuse", weights=(0.1,), dt_query=0.01, guidance=2.0),
        StepSpec(order=2, basis="t", formulation="noise", relaxation="linear", guidance=2.0),
    )
    options = {
        "threshold": {"quantile": 0.9, "minimum": 1.0},
        "time_shift": {"rule": "variance", "window": 3, "cutoff": 0.1},
    }
    times = (1.0, 0.6, 0.2, 0.01)
    return OdeSchedule(noise=noises.VPLinear(), times=times, steps=steps, options=options)


def _files() -> dict[str, dict]:
    edm, flow = noises.EDM(), noises.RectifiedFlow()
    table = noises.VPDiscrete(betas=(0.1, 0.2, 0.3, 0.4))
    made = {
        "steps": _ode(),
        "runge-kutta": baseline("heun/edm", edm, 3),
        "discrete": OdeSchedule(noise=table, times=(3.0, 1.0, -1.0), steps=(StepSpec(),) * 2),
        "program": ProgramSchedule.of(baseline("dpmpp2m/time", flow, 3)),
        "masked": next(iter(MaskedDomain(8, 3).baselines().values())),
        "particles": next(iter(named_policies(noises.VPLinear(), 3).values())),
    }
    files = {name: json.loads(json.dumps(s.to_dict())) for name, s in made.items()}
    bare = {
        n: {k: v for k, v in files[n].items() if k != "program"} for n in ("steps", "discrete")
    }
    return files | {f"{name} without program": file for name, file in bare.items()}


def _spots(data: object, above: tuple = ()) -> list[tuple]:
    """The paths of everything in a JSON value, from its top."""
    found = [above] if above else []
    items = data.items() if isinstance(data, dict) else []
    items = enumerate(data) if isinstance(data, list) else items
    for key, value in items:
        found += _spots(value, (*above, key))
    return found


def mutated(data: dict, rng: random.Random) -> dict:
    """A file with one to three of its parts replaced, removed, doubled or added."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = _spots(data)
        # short paths as often as long ones: most numbers lie deep in a program
        deep = rng.choice(sorted({len(s) for s in spots}))
        *path, last = rng.choice([s for s in spots if len(s) == deep])
        parent = data
        for key in path:
            parent = parent[key]
        what = rng.random()
        if what < 0.6:
            parent[last] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.8:
            del parent[last]
        elif isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
        else:
            parent[rng.choice(WORDS)] = copy.deepcopy(rng.choice(VALUES))
    return data


@pytest.mark.parametrize("name", _files())
def test_a_mutated_file_loads_or_is_one_line(name):
    rng, whole = random.Random(name), _files()[name]
    assert load_schedule(copy.deepcopy(whole)).nfe == whole["nfe"]
    lines: list[str] = []
    for _ in range(EACH):
        data = mutated(whole, rng)
        try:
            schedule = load_schedule(copy.deepcopy(data))
        except ScheduleError as error:
            lines.append(str(error))
        else:
            assert isinstance(schedule.digest, str)
            assert load_schedule(schedule.to_dict()).digest == schedule.digest
    assert not any("\n" in line for line in lines)
    assert EACH // 2 < len(lines) < EACH  # most changes matter, some (provenance, say) do not
