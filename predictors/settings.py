"""Settings of the fits of schedules: a study file's tables of the same names are these."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fewstep.predictors.cpr_family import MOVED, Decision

Positive = Annotated[int, Field(ge=1)]


class Table(BaseModel):
    """A table of a study file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RefineTable(Table):
    """[refine]: the continuous stage of strategies that end in "refine".

    Args:
        top: best candidates that are tried as starts, per NFE, beside the best named solver; each
            is refined on `batch` samples, and the one that got furthest on more.
        grow: refine the NFEs one after another, from the fewest calls on; the best schedule of
            each, with calls of weight 0 added (`space.growing`), is a start of the next.
        mean: programs may also use the mean m of the teacher's samples, y_0 = p_0 x_T + k_0 m:
            an analytical first step that costs no call. The image lies beside the schedule file.
            Without it, and for pipelines that do not scale their input, they start at the noise.
        samples: noise it is fitted on, at most: four times as many each time, from `batch` on,
            until training and held-out error agree within 10 %.
        held: noise the iterate is chosen by.
        loss: "huber", by which the few samples that end in another mode of the data count by
            their distance, or "mean", by its square.
        rounds: Gauss-Newton rounds on `batch` samples, at most; a third as many on more.
        batch: samples that a fit begins on, and that run as one piece.
        timeout: seconds after which the refinement of one NFE counts as hung; None never.
        knobs: what may move: "times" and "weights" (all numbers of the program), and "guidance"
            (of every guided call); "times" alone keeps the start's other choices and its steps.
        stages: keep the zeros that make calls run side by side (`space.costs`).
        short: (samples, rounds) of the fit that comes before a plan is scored (search.cost).
    """

    top: Positive = 2
    grow: bool = False
    mean: bool = True
    samples: Annotated[int, Field(ge=2)] = 1024
    held: Annotated[int, Field(ge=2)] = 512
    loss: Literal["huber", "mean"] = "huber"
    rounds: Positive = 12
    batch: Positive = 64
    timeout: Annotated[float, Field(gt=0)] | None = None
    knobs: tuple[Literal["times", "weights", "guidance"], ...] = ("times", "weights")
    stages: bool = False
    short: tuple[Annotated[int, Field(ge=8)], Positive] = (64, 4)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.knobs != ("times",) and not {"times", "weights"} <= set(self.knobs):
            raise ValueError(
                f"knobs {list(self.knobs)}: use [times], or times and weights with or without "
                "guidance"
            )
        return self

    def keeping_sorts(self) -> Self:
        """Of a fit that keeps a plan: guidance scales move, sorts of calls and stages stay."""
        return self.model_copy(update={"knobs": ("times", "weights", "guidance"), "stages": True})

    def shortened(self) -> Self:
        """Of the short fit of a plan."""
        samples, rounds = self.short
        changes = {"samples": samples, "held": samples, "batch": samples, "rounds": rounds}
        return self.keeping_sorts().model_copy(update=changes)


class CompensationTable(Table):
    """[compensation]: one ratio per step (DC-Solver), for strategies ending in "compensation".

    Args:
        base: named solvers to compensate, "solver/grid" or "solver/grid/low"; none takes the best
            candidates.
        top: how many of them, per NFE.
        samples: noise the ratios are fitted on.
        order: older points that the newest output is interpolated with, beside itself.
        variable: interpolate in "t", as published, or in "lam".
        low: smallest ratio.
        high: largest ratio.
        held: share of the samples that only check.
        polish: Gauss-Newton rounds, at most.
        timeout: seconds after which one base counts as hung; None never.
    """

    base: tuple[str, ...] = ()
    top: Positive = 4
    samples: Annotated[int, Field(ge=2)] = 256
    order: Annotated[int, Field(ge=1, le=3)] = 2
    variable: Literal["t", "lam"] = "t"
    low: Annotated[float, Field(lt=1)] = 0.5
    high: Annotated[float, Field(gt=1)] = 1.6
    held: Annotated[float, Field(ge=0, lt=1)] = 0.4
    polish: Annotated[int, Field(ge=0)] = 8
    timeout: Annotated[float, Field(gt=0)] | None = None

    @field_validator("base", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class CprTable(Table):
    """[cpr]: schedules for the settings between those searched (`predictors.cpr`), fitted last.

    Refinement at several guidance scales needs none of this: its programs are interpolated
    (`predictors.between`), and only `held` counts there, the noise on which that is tried.

    Args:
        fit: whether; None after compensation at several settings by endpoint_mse. On digits the
            regression predicts six times the error of what refinement finds.
        template: named solver whose decisions become polynomials; None is the one base that is
            compensated, else the one with the lowest mean log error over all settings.
        decisions: which, out of gap, query, start, land, compensation, guidance.
        samples: noise it is fitted on, per guidance scale.
        held: noise the round is chosen by.
        rounds: Gauss-Newton rounds, at most.
    """

    fit: bool | None = None
    template: str | None = None
    decisions: Annotated[tuple[Decision, ...], Field(min_length=1)] = MOVED
    samples: Annotated[int, Field(ge=8)] = 64
    held: Annotated[int, Field(ge=8)] = 64
    rounds: Positive = 6
