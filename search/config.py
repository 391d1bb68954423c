"""The study file: what a search is asked to do, read from TOML and checked before anything runs.

Everything that decides a result stands in the file (and in `--set key=value`), so the resolved
form that a search writes into its folder is enough to repeat it. What only decides how fast it
runs, or where it reports, is marked so in `RUN_ONLY` and may differ when a search is resumed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.predictors.settings import CompensationTable, CprTable, Positive, RefineTable, Table
from fewstep.search.tables import ObjectiveTable, PricesTable, TeacherTable, TrackingTable
from fewstep.space.errors import StudyError

RUN_ONLY = (
    *("search.workers", "search.cpus", "search.gpus", "search.timeout", "search.retries"),
    *("search.storage", "search.files", "refine.timeout", "compensation.timeout"),
    *("teacher.cache", "tracking", "description"),
)
"""Settings that a resumed search may change: they decide speed and place, never a score."""


STAGES = ("refine", "compensation")
"""What a strategy may end in: "NAME+refine", or "refine" alone."""


class ModelTable(BaseModel):
    """[model]: exactly one of `factory`, with its keyword arguments, and `pipeline`.

    Args:
        factory: "module.path:function"; it returns a `Problem`, a `MaskedProblem` or a
            `ParticleProblem` (`fewstep.samplers.problems`). All other keys are its arguments.
        pipeline: folder of a saved diffusers pipeline, relative to the study file. The other keys
            are then `prompts`, `call`, `device` and `dtype`.
        prompts: text file with one prompt a line, relative to the study file.
        call: arguments of the pipeline's call, such as guidance_scale; files of images are
            relative to the study file.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    factory: str | None = None
    pipeline: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("factory", "pipeline") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of factory and pipeline (found {' and '.join(given) or 'none'})"
            )
        if self.factory is None:
            self._check_pipeline()
            return self
        module, _, function = self.factory.partition(":")
        if not (module and function and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"{self.factory!r} is not of the form module.path:function")
        return self

    def _check_pipeline(self) -> None:
        kinds: dict[str, type] = {"prompts": str, "call": dict, "device": str, "dtype": str}
        for name, value in (self.model_extra or {}).items():
            if name not in kinds:
                raise ValueError(
                    f"{name} is an unknown key beside pipeline: use {', '.join(kinds)}"
                )
            if not isinstance(value, kinds[name]):
                what = "a table" if kinds[name] is dict else "text"
                raise ValueError(f"{name} = {value!r} must be {what}")

    def built_by(self, folder: str) -> tuple[str, dict[str, Any]]:
        """What makes the problem, given the study file's folder: import path and arguments."""
        arguments = dict(self.model_extra or {})
        if self.factory is not None:
            return self.factory, arguments
        base = Path(folder)
        arguments["pipeline"] = str(base / str(self.pipeline))
        if "prompts" in arguments:
            arguments["prompts"] = str(base / arguments["prompts"])
        arguments["call"] = {
            name: str(base / value) if "image" in name and isinstance(value, str) else value
            for name, value in arguments.get("call", {}).items()
        }
        return "fewstep.samplers.pipelines:pipeline_problem", arguments


class BudgetTable(Table):
    """[budget]: exactly one of these.

    Args:
        candidates: candidates per NFE, the named solvers included (per cost: plans, beside them);
            or one number for each.
        calls: network evaluations of the whole search: sum over candidates of samples x NFE (x
            particles x models).
        seconds: wall time of the whole search before the final scoring; the result then depends on
            the machine.
    """

    candidates: Positive | tuple[Positive, ...] | None = None
    calls: Positive | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [n for n in ("candidates", "calls", "seconds") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of candidates, calls, seconds (found {given or 'none'})"
            )
        return self


class SearchTable(Table):
    """[search].

    Args:
        nfe: the numbers of network calls to find schedules for.
        cost: instead, what the calls of a schedule may cost together, at the study's [prices]:
            which calls are guided, run side by side, or ask another network is then searched.
        guidance: scales to find schedules for, each with its own search and teacher; one search of
            all NFEs runs for each. None is the problem's own scale.
        strategy: name of a strategy (`fewstep.search.strategies`); with "+refine" or
            "+compensation" at the end its best candidates are refined or compensated; "refine" and
            "compensation" alone take the named solvers.
        options: keyword arguments of the strategy.
        generation: candidates proposed at a time.
        ladder: whether an NFE's strategy also sees the results of the NFEs searched before it.
        lag: generation g sees the results of generations up to g - lag; 1 waits for each, 2 keeps
            one in flight.
        warm: schedule files of any number of calls, relative to the study file, that join the
            first candidates (`search.preparing`).
        seed: of the noise of the samples and of the strategy.
        samples: samples a candidate is scored on.
        race: smaller numbers of samples, ascending, at which the losers of a paired test against
            the best are stopped (`search.scoring`); none scores every candidate on all samples.
        block: (candidates, samples) that run as one batch; scores belong to it to the last bit.
        workers: evaluator processes; 0 evaluates in this process; [least, most] begins when the
            least are there and takes in more as they come; None is one per core, or GPU if used.
        storage: Optuna storage URL; None is the journal file in the output folder.
        timeout: seconds after which one block of candidates counts as hung; None never.
        retries: how often a block is tried again after its worker died.
        cpus: CPUs per worker, or a part of one.
        gpus: GPUs per worker, or a part of one; the factory's own argument decides whether the
            model uses one.
        autocast: dtype that the network runs in, "bfloat16" or "float16"; None is its own. The
            state stays float32. A pipeline has its own [model] dtype.
        compile: backend of torch.compile for the network's calls, such as "inductor"; None does
            not compile.
        files: further files and folders beside the study file that its module reads: they are
            sent to a cluster too.
    """

    nfe: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    cost: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    guidance: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    strategy: str = "s3+refine"
    options: dict[str, Any] = Field(default_factory=dict)
    generation: Positive = 32
    ladder: bool = True
    lag: Positive = 1
    warm: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0)] = 0
    samples: Annotated[int, Field(ge=2)] = 256
    race: tuple[Annotated[int, Field(ge=8)], ...] = ()
    block: tuple[Positive, Positive] = (8, 64)
    workers: Annotated[int, Field(ge=0)] | tuple[Positive, Positive] | None = None
    storage: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0)] = 2
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    autocast: Literal["bfloat16", "float16"] | None = None
    compile: str | None = None
    files: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {list(self.workers)}: the least comes first")
        if not self.settings:
            raise ValueError(
                "nfe is empty: name at least one number of network calls, or give cost"
            )
        if self.nfe and self.cost:
            raise ValueError("give one of nfe, the numbers of calls, and cost, what they may cost")
        if len(set(self.settings)) != len(self.settings):
            raise ValueError(f"{self.word} {list(self.settings)} names a number twice")
        if self.cost and self.warm:
            raise ValueError("warm schedules join a search by nfe: leave it out beside cost")
        if self.guidance is not None and len(set(self.guidance)) != max(len(self.guidance), 1):
            raise ValueError(
                f"guidance {list(self.guidance)} is empty or names a scale twice: name each once"
            )
        if any(a >= b for a, b in pairwise(self.levels)):
            raise ValueError(
                f"race {list(self.race)} must ascend and stay below samples = {self.samples}"
            )
        return self

    @property
    def settings(self) -> tuple[int, ...]:
        """The numbers of calls, or the costs: the search at each is a rung."""
        return self.nfe or self.cost

    @property
    def word(self) -> str:
        """What these numbers are."""
        return "NFE" if self.nfe else "cost"

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of samples that candidates are scored on, ascending; the last is all."""
        return (*self.race, self.samples)

    @property
    def bounds(self) -> tuple[int, int | None]:
        """The least and the most workers; None is as many as the cluster has room for."""
        if isinstance(self.workers, tuple):
            return self.workers
        return 1, self.workers


class FinalTable(Table):
    """[final]: the re-scoring on fresh seeds.

    Args:
        samples: fresh samples at first; they double until the 95 % interval of the geometric
            ratio is within 10 %.
        most: fresh samples at most; None is 16 times `samples`.
        top: candidates of the search that are compared on separate samples for the one to keep.
        named: "best_grid": every named solver on the grid it did best on in the search; "all":
            every pair.
        resamples: bootstrap resamples of intervals that have no formula.
        pictures: samples in the picture.
    """

    samples: Annotated[int, Field(ge=2)] = 1024
    most: Annotated[int, Field(ge=2)] | None = None
    top: Positive = 8
    named: Literal["best_grid", "all"] = "best_grid"
    resamples: Annotated[int, Field(ge=100)] = 1000
    pictures: Annotated[int, Field(ge=1, le=64)] = 16

    @property
    def limit(self) -> int:
        """Fresh samples at most."""
        return 16 * self.samples if self.most is None else self.most


class StudyConfig(Table):
    """A whole study file.

    Args:
        name: name of the study; default the file's.
        folder: folder of the study file, where the factory's module may lie; "" if there is none.
        description: what MLflow shows beside the runs.
    """

    name: str = "study"
    folder: str = Field(default="", exclude=True)
    description: str = ""
    model: ModelTable
    budget: BudgetTable
    search: SearchTable
    space: dict[str, Any] = Field(default_factory=dict)
    teacher: TeacherTable = TeacherTable()
    objective: ObjectiveTable = ObjectiveTable()
    refine: RefineTable = RefineTable()
    compensation: CompensationTable = CompensationTable()
    cpr: CprTable = CprTable()
    prices: PricesTable = PricesTable()
    final: FinalTable = FinalTable()
    tracking: TrackingTable = TrackingTable()

    @property
    def base_strategy(self) -> str | None:
        """The strategy that proposes candidates; None where only named solvers are improved."""
        first, _, last = self.search.strategy.rpartition("+")
        return (first or None) if last in STAGES else self.search.strategy

    @property
    def finish(self) -> str | None:
        """The stage that improves the best candidates: one of `STAGES`, or None."""
        last = self.search.strategy.rpartition("+")[2]
        return last if last in STAGES else None

    @property
    def scale(self) -> float | None:
        """The guidance scale of this search; None is the problem's own.

        Raises:
            StudyError: the study lists several.
        """
        scales = self.search.guidance
        if scales is None:
            return None
        if len(scales) > 1:
            raise StudyError(
                f"search.guidance lists {len(scales)} scales: choose one, e.g. --set "
                f"'search.guidance=[{scales[-1]:g}]'"
            )
        return scales[0]

    def at_guidance(self, scale: float) -> StudyConfig:
        """The part of this study at one of its guidance scales; budgets are shared evenly."""
        scales, given = self.search.guidance or (scale,), self.budget
        changes: dict[str, Any] = {}
        if given.calls is not None:
            changes["calls"] = max(1, given.calls // len(scales))
        if given.seconds is not None:
            changes["seconds"] = given.seconds / len(scales)
        return self.model_copy(
            update={
                "name": f"{self.name}-w{scale:g}",
                "search": self.search.model_copy(update={"guidance": (scale,)}),
                "budget": given.model_copy(update=changes),
            }
        )

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as JSON."""
        return self.model_dump(mode="json")

    def identity(self, *, budget: bool = True) -> dict[str, Any]:
        """The resolved settings that decide scores, flat: {"search.samples": 256, ...}.

        The budget, which decides only where a search ends, may be left out.
        """
        left = RUN_ONLY if budget else (*RUN_ONLY, "budget")
        return {
            name: value
            for name, value in _flatten(self.resolved())
            if not any(name == r or name.startswith(f"{r}.") for r in left)
        }

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        given, search = self.budget.candidates, self.search
        if isinstance(given, tuple) and len(given) != len(search.settings):
            raise ValueError(
                f"budget.candidates holds {len(given)} numbers for {len(search.settings)} "
                f"{search.word}s: give one for each, or a single number"
            )
        if search.cost and (self.finish == "compensation" or self.cpr.fit):
            raise ValueError("compensation and cpr go with search.nfe, not with search.cost")
        if self.prices.measure is not None and not search.cost:
            raise ValueError("prices.measure goes with search.cost: leave it out")
        if search.race and self.objective.name == "frechet":
            raise ValueError(
                "search.race compares candidates sample by sample, which the objective frechet "
                "cannot: remove race"
            )
        return self

    def calls_of(self, nfe: int) -> int | None:
        """Network evaluations of one NFE where candidates race for a budget in calls."""
        if self.budget.calls is None or not (self.search.race or self.search.cost):
            return None
        return self.budget.calls * nfe // sum(self.search.settings)

    def candidates(self, per_sample: int = 1) -> dict[int, int] | None:
        """Candidates that the budget pays for by NFE; None if that shows as the search goes.

        One sample and one call take `per_sample` network evaluations.

        Raises:
            StudyError: the calls do not pay for one candidate.
        """
        nfes, given = self.search.settings, self.budget.candidates
        if isinstance(given, tuple):
            return dict(zip(nfes, given, strict=True))
        if given is not None:
            return dict.fromkeys(nfes, given)
        if self.budget.calls is None:
            return None
        needed = self.search.samples * sum(nfes) * per_sample
        if self.budget.calls < needed:
            raise StudyError(
                f"budget.calls = {self.budget.calls} does not pay for one candidate per NFE: "
                f"{needed} are needed"
            )
        if self.search.race or self.search.cost:
            return None
        return dict.fromkeys(nfes, self.budget.calls // needed)


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """Read and check a study file.

    Args:
        path: the TOML file, or the resolved form that a search writes (study.json).
        overrides: "table.key=value" strings; the value is read as TOML, or else as text.

    Raises:
        StudyError: no such file, not TOML, an unknown key or a value out of range; one line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path}: not valid TOML: {error}") from None
    except ValueError as error:
        raise StudyError(f"{path}: not valid JSON: {error}") from None
    for override in overrides:
        _override(data, override)
    data.setdefault("name", path.stem)
    return study_from_dict(data, folder=str(path.resolve().parent), source=str(path))


def study_from_dict(
    data: dict[str, Any], *, folder: str = "", source: str = "study"
) -> StudyConfig:
    """Build a study from its parsed form; see `load_study`."""
    try:
        return StudyConfig(**(data | {"folder": folder}))
    except ValidationError as error:
        raise StudyError(f"{source}: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "study"
    if first["type"] == "extra_forbidden":
        return f"{where} is an unknown key: check the spelling, or remove it"
    if first["type"] == "missing":
        return f"{where} is missing: add it"
    cause = first.get("ctx", {}).get("error")
    if cause is not None:
        return f"{where}: {cause}"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise StudyError(f"--set {text!r}: write table.key=value, e.g. search.samples=128")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table = data
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise StudyError(f"--set {text!r}: {part} is a value, not a table")
    if parts == ["budget", parts[-1]]:
        table.clear()  # one kind of budget replaces another
    table[parts[-1]] = parsed


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
