"""Every recorded case of the original authors' code, through our program and loop, in float64.

`FEWSTEP_REFERENCE` may name another folder of the same layout. A case marked `record_only`
documents an upstream defect and is not matched.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fewstep.samplers import sample
from tests.oracles import REFERENCE, recorded_mixture, reference_noise
from tests.replay import Unsupported, index, replays

FOLDER = Path(os.environ.get("FEWSTEP_REFERENCE", REFERENCE))
CASES = index(FOLDER)
MATCHED = [c for c in CASES if not c.get("record_only")]


@pytest.mark.parametrize("entry", MATCHED, ids=[c["id"] for c in MATCHED])
def test_the_original_authors_output_is_reproduced(entry):
    try:
        cases = replays(FOLDER, entry)
    except Unsupported as reason:
        pytest.skip(f"{entry['id']}: {reason}")
    for case in cases:
        frame = "vp_linear" if case.frame == "vp_edm_ablation" else case.frame
        model = recorded_mixture(reference_noise(frame), FOLDER)
        x = sample(case.schedule, model, case.x_T)
        for name, expected in case.expected.items():
            error = ((x - expected).abs() / (1 + expected.abs())).max()
            assert error < 1e-9, f"{entry['id']} {name}: {float(error):.2e}"
        assert model.calls == case.schedule.nfe == entry["nfe"]


def test_every_case_is_accounted_for():
    """The index lists only methods this project knows, or defects kept for study."""
    known = ("dc", "deis", "dpm", "ddim", "heun", "euler", "ipndm", "ts-", "unipc", "usf")
    unknown = [c["id"] for c in CASES if not c["method"].startswith(known)]
    assert not unknown, f"cases of unknown methods: {unknown}"
    assert len(MATCHED) > 0.8 * len(CASES)
    assert torch.get_default_dtype() == torch.float32
