"""Tables of the study file for the teacher, prices, the objective and MLflow."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fewstep.predictors.settings import Table
from fewstep.predictors.yardstick import Statistic


class TeacherTable(Table):
    """[teacher]: the reference end points, from many calls on a uniform log-SNR grid.

    Args:
        nfe: network calls.
        solver: a multistep recipe of `space.baselines`.
        check: samples on which the teacher is compared with one of twice the calls; 0 leaves the
            check out.
        cache: folder of computed references; None is the output folder's own.
    """

    nfe: Annotated[int, Field(ge=2)] = 128
    solver: str = "dpmpp3m/logsnr"
    check: Annotated[int, Field(ge=0)] = 64
    cache: str | None = None


class PricesTable(Table):
    """[prices]: what a call of each sort costs, for search.cost; see `space.costs.Prices`.

    Args:
        measure: batch size at which all prices are measured when the search begins, by the clock
            of the machine that begins it, in place of those below; None leaves them.
        guided: a call at a guidance scale other than 1.
        unguided: a call at scale 1.
        beside: share of its price that a call beside the first of its stage costs.
        networks: factors of further networks by name, in place of the denoiser's own.
    """

    measure: Annotated[int, Field(ge=1)] | None = None
    guided: Annotated[float, Field(gt=0)] = 2.0
    unguided: Annotated[float, Field(gt=0)] = 1.0
    beside: Annotated[float, Field(gt=0)] = 1.0
    networks: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @property
    def listed(self) -> dict[str, Any]:
        """The prices themselves."""
        return self.model_dump(exclude={"measure"})


class TrackingTable(Table):
    """[tracking]: MLflow.

    Args:
        enabled: whether to record runs.
        tags: of every run, to find them by.
        uri: tracking URI; None is MLFLOW_TRACKING_URI, or else sqlite:///runs/mlflow.db.
        experiment: name of the MLflow experiment.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "fewstep"
    tags: dict[str, str] = Field(default_factory=dict)


class ObjectiveTable(Table):
    """[objective]: what is minimised.

    Args:
        name: "endpoint_mse" (the default) or "frechet"; a problem whose samples are drawn brings
            its own, and this is left out.
        statistic: of a schedule's per-sample errors, its score (`predictors.yardstick`):
            "geometric" (the default of endpoint_mse), "mean", "median", "trimmed" or "backward".
        features: for frechet: "module.path:function", images (B, *shape) -> (B, F); None takes the
            problem's own.
    """

    name: str | None = None
    statistic: Statistic | None = None
    features: str | None = None
