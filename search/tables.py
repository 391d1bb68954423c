"""Tables of the study file that belong to one stage; the rest of the file is `config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Decision = Literal["gap", "query", "start", "land", "compensation", "guidance"]


class Table(BaseModel):
    """A table of a study file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CompensationTable(Table):
    """[compensation]: one ratio per step (DC-Solver), for strategies ending in "compensation".

    Args:
        base: named solvers to compensate, "solver/grid" or "solver/grid/low"; none takes the best
            candidates.
        top: how many of them, per NFE.
        samples: noise the ratios are found on.
        teacher: network calls of the states that are matched (the original has 200).
        order: older points that the newest output is interpolated with, beside itself.
        variable: interpolate in "t", as published, or in "lam".
        low: smallest ratio.
        high: largest ratio.
        held: share of the samples that only check.
        polish: Gauss-Newton rounds on the end point.
    """

    base: tuple[str, ...] = ()
    top: Annotated[int, Field(ge=1)] = 4
    samples: Annotated[int, Field(ge=2)] = 256
    teacher: Annotated[int, Field(ge=8)] = 100
    order: Annotated[int, Field(ge=1, le=3)] = 2
    variable: Literal["t", "lam"] = "t"
    low: Annotated[float, Field(lt=1)] = 0.5
    high: Annotated[float, Field(gt=1)] = 1.6
    held: Annotated[float, Field(ge=0, lt=1)] = 0.4
    polish: Annotated[int, Field(ge=0)] = 4

    @field_validator("base", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class CprTable(Table):
    """[cpr]: schedules for the settings between those searched (`predictors.cpr`), fitted last.

    Args:
        fit: whether; None where there are several settings and the objective is endpoint_mse.
        template: named solver whose decisions become polynomials; None is the one base that is
            compensated, else the one with the lowest mean log error over all settings.
        decisions: which, out of gap, query, start, land, compensation, guidance.
        samples: noise it is fitted on, per guidance scale.
        held: noise the round is chosen by.
        rounds: Gauss-Newton rounds, at most.
    """

    fit: bool | None = None
    template: str | None = None
    decisions: Annotated[tuple[Decision, ...], Field(min_length=1)] = (
        "gap",
        "query",
        "compensation",
    )
    samples: Annotated[int, Field(ge=8)] = 64
    held: Annotated[int, Field(ge=8)] = 64
    rounds: Annotated[int, Field(ge=1)] = 6
