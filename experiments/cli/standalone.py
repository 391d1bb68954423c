"""A schedule as one Python file that needs torch alone, under 80 lines."""

from __future__ import annotations

import json

from fewstep.space import OdeSchedule, ProgramSchedule, StudyError

_FILE = '''"""A few-step sampler: {nfe} network calls on noise schedule {noise}. Needs torch only.

    x = sample(denoise, START_SCALE * torch.randn(shape))

`denoise(x, label, alpha, sigma)` returns the data prediction of x = alpha x0 + sigma eps, x0.
A network told `label` that returns something else is turned into it by

    noise (eps)   (x - sigma * out) / alpha          velocity (v)   alpha * x - sigma * out
    flow          (x - sigma * out) / (alpha + sigma)

{about}
"""

import torch

DIGEST = "{digest}"  # of the schedule this was written from
START_SCALE = {scale!r}  # standard deviation of the start noise
LABEL = {label}
ALPHA = {alpha}
SIGMA = {sigma}
INIT = {init}  # weights of the start noise and of the constant image
R = {r}  # of the state
E = {e}  # of the start noise
K = {k}  # of the constant image
G = {g}  # of fresh noise
B = {b}  # of the data predictions, oldest first
THRESHOLD = {threshold}  # quantile, minimum, maximum; or None


def threshold(D):
    """Clip each sample at its quantile of |D|, then scale the clip to the minimum."""
    quantile, minimum, maximum = THRESHOLD
    if quantile == 0:
        return D.clamp(-minimum, minimum)
    s = torch.quantile(D.abs().flatten(1), quantile, dim=1)
    s = s.clamp(min=minimum, max=maximum).reshape(-1, *(1,) * (D.ndim - 1))
    return D.clamp(-s, s) * (minimum / s)


@torch.no_grad()
def sample(denoise, x_T, m=None, generator=None):
    """Samples from start noise x_T, shape (B, ...); m is the constant image where K needs one."""
    x_T = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    if m is None and (any(K) or INIT[1]):
        raise ValueError("this sampler needs its constant image m, the tensor beside this file")
    x = INIT[0] * x_T + (INIT[1] * m.to(x_T) if INIT[1] else 0.0)
    outputs = []
    for c in range(len(LABEL)):
        D = denoise(x, LABEL[c], ALPHA[c], SIGMA[c]).to(x_T.dtype)
        outputs.append(D if THRESHOLD is None else threshold(D))
        x = R[c] * x
        for weight, D in zip(B[c], outputs):
            if weight:
                x = x + weight * D
        if E[c]:
            x = x + E[c] * x_T
        if K[c]:
            x = x + K[c] * m.to(x_T)
        if G[c]:
            fresh = torch.empty_like(x_T).normal_(generator=generator)
            x = x + G[c] * fresh
    return x
'''


def standalone(schedule: OdeSchedule | ProgramSchedule, scale: float) -> str:
    """The text of the file.

    Args:
        schedule: what it replays.
        scale: standard deviation of the start noise.

    Raises:
        StudyError: a schedule that needs more than its program; the reason.
    """
    if "time_shift" in schedule.options:
        raise StudyError(
            "options.time_shift compiles rows while it samples, which a file without fewstep "
            "cannot: export a schedule without"
        )
    program = schedule.program
    if program.guidance is not None or program.network is not None:
        what = "guidance scale" if program.network is None else "network"
        raise StudyError(
            f"the schedule sets the {what} of every call, which a data prediction does not "
            "take: export a schedule without sorts of its own"
        )
    about = " ".join(
        f"{key}: {schedule.provenance[key]}."
        for key in ("baseline", "study", "model")
        if isinstance(schedule.provenance.get(key), str)
    )
    own = schedule.options.get("threshold")
    limits = None
    if own is not None:
        limits = f"({own.get('quantile', 0.995)!r}, {own.get('minimum', 1.0)!r}, "
        limits += f"{own['maximum']!r})" if "maximum" in own else "None)"
    names = ("label", "alpha", "sigma", "init", "r", "e", "k", "g")
    rows = [row[: c + 1] for c, row in enumerate(program.b.tolist())]
    return _FILE.format(
        nfe=schedule.nfe,
        noise=schedule.noise.type,
        about=about.replace("\\", "/").replace('"', "'") or "Written by fewstep.",
        digest=schedule.digest,
        scale=scale,
        b=json.dumps(rows),
        threshold=limits,
        **{name: json.dumps(getattr(program, name).tolist()) for name in names},
    )
