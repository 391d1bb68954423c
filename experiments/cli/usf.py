"""Published USF schedules (arXiv 2312.07243, released search space) as `OdeSchedule`s.

The released format stores, per step, a Taylor order, a prediction type, the points each derivative
is estimated from, a scaling of the first derivative, and a corrector; globally the times, the
analytical first step and factors on the U-Net's skip connections. Skip factors edit the network,
not the solver: they are reported, never applied. DPM-Solver-v3 steps need per-pixel statistics of
one checkpoint and do not fit a triangular program; with identity statistics they are data
prediction, which is what `v3="identity"` asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fewstep.space import noise as noises
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.schedule import OdeSchedule, StepSpec

_FORMULATIONS = {"noise_prediction": "noise", "data_prediction": "data"}
_V3 = "dpmsolver_v3_prediction"
_FIRST = {"no_afs": "network", "average_x0": "mean", "zero_x0": "zero"}


def from_usf(
    data: Mapping[str, Any],
    *,
    v3: Literal["refuse", "identity"] = "refuse",
    zero_as_released: bool = False,
) -> OdeSchedule:
    """Convert one published schedule (the JSON form of its dictionary).

    Args:
        data: the published fields and `noise_schedule`.
        v3: what to do with DPM-Solver-v3 steps: refuse them, or read them with identity statistics
            (= data prediction).
        zero_as_released: replay `zero_x0` as the released code does (eps = x outside EDM) instead
            of D = 0.

    Raises:
        ScheduleError: v3 steps where they are refused, or a choice the released search never
            makes.
    """
    noise, to_time = _noise(data["noise_schedule"])
    predictions: Sequence[str] = data["prediction_types"]
    if _V3 in predictions and v3 == "refuse":
        where = ", ".join(str(i) for i, p in enumerate(predictions) if p == _V3)
        raise ScheduleError(
            f"steps {where} are DPM-Solver-v3 steps with per-pixel statistics of one checkpoint, "
            "which no program can hold: "
            "import with --v3 identity to read them as data prediction"
        )
    steps = []
    for i, prediction in enumerate(predictions):
        order = int(data["orders"][i])
        fields: dict[str, Any] = {
            "order": order,
            "formulation": _FORMULATIONS.get(prediction, "data"),
        }
        fields["start"] = -1 - int(data["start_points"][i])
        derivatives = data["derivative_types"][i] if order > 1 else []
        fields |= _predictor(i, order, derivatives)
        fields |= _corrector(i, data["corrector_types"][i])
        steps.append(StepSpec(**fields))
    first: Any = _FIRST[data["afs"]]
    if first == "zero" and zero_as_released:
        first = "usf_zero"
    skips = [float(s) for s in data.get("skip_coefficients") or []]
    provenance: dict[str, Any] = {"imported_from": "usf", "name": data.get("name", "")}
    if any(s != 1.0 for s in skips):
        provenance["skip_coefficients"] = skips
    if _V3 in predictions:
        provenance["v3"] = "identity statistics (data prediction)"
    times = tuple(to_time(float(t)) for t in data["timesteps"])
    return OdeSchedule(
        noise=noise, times=times, steps=tuple(steps), first=first, provenance=provenance
    )


def _noise(data: Mapping[str, Any]) -> tuple[NoiseSchedule, Any]:
    kind = data["kind"]
    if kind == "edm":
        return noises.EDM(), lambda t: t
    if kind == "vp_linear_continuous":
        scale = 999.0 if str(data.get("label", "")).startswith("999") else 1.0
        return noises.VPLinear(
            beta_min=data["beta_0"], beta_max=data["beta_1"], label_scale=scale
        ), lambda t: t
    if kind == "vp_discrete_interp":
        betas = "linear" if data["betas"] == "linear" else "scaled_linear"
        n = int(data["num_train_timesteps"])
        return noises.VPDiscrete(
            betas=betas, beta_start=data["beta_start"], beta_end=data["beta_end"], n=n
        ), lambda t: n * t - 1
    raise ScheduleError(
        f"noise_schedule.kind {kind!r} is not one of USF's: edm, vp_linear_continuous, "
        "vp_discrete_interp"
    )


def _predictor(i: int, order: int, derivatives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for k, derivative in enumerate(derivatives[: order - 1]):
        points = sorted((int(p) for p in derivative["active_points"]), reverse=True)
        if points != list(range(-2, -2 - len(points), -1)):
            raise ScheduleError(
                f"step {i}: derivative {k + 1} uses points {points}, not the nearest ones: USF's "
                "search never does"
            )
        if len(points) != order - 1:
            if k > 0:
                raise ScheduleError(
                    f"step {i}: derivative {k + 1} has {len(points)} points for order {order}: "
                    "only the first may have fewer"
                )
            fields["slope_points"] = len(points)
        if derivative["relaxation"] is not None and k == 0:
            fields |= {
                "relaxation": derivative["relaxation"],
                "relaxation_coefficient": float(derivative["relaxation_coefficient"] or 0.0),
            }
    return fields


def _corrector(i: int, corrector: Mapping[str, Any]) -> dict[str, Any]:
    if corrector["type"] == "no_corrector":
        return {}
    if corrector["type"] not in ("pseudo", "implicit") or int(corrector["start_point"]) != -2:
        raise ScheduleError(
            f"step {i}: corrector {corrector['type']!r} from point {corrector['start_point']} is "
            "not one of USF's"
        )
    order = int(corrector["taylor_order"])
    fields: dict[str, Any] = {
        "corrector": "reuse" if corrector["type"] == "pseudo" else "reeval",
        "corrector_order": order,
    }
    for k, derivative in enumerate(corrector["derivative_type"]):
        points = sorted((int(p) for p in derivative["active_points"]), reverse=True)
        nearest = [-1, *range(-3, -2 - len(points), -1)]
        if points != nearest or derivative["relaxation"] is not None:
            raise ScheduleError(
                f"step {i}: the corrector's derivative {k + 1} is scaled or skips points: USF's "
                "search never does"
            )
        if len(points) != order - 1:
            if k > 0:
                raise ScheduleError(
                    f"step {i}: the corrector's derivative {k + 1} has {len(points)} points for "
                    f"order {order}"
                )
            fields["corrector_slope_points"] = len(points)
    return fields
