"""The store of a search: its trials in an Optuna storage, each added whole once it is finished.

A search is a name in a storage and the studies that belong to it:

    digits                  what was asked and other notes, as user attributes; no trials
    digits-nfe05            the trials of one number of calls (or digits-cost08), in the order told
    digits-nfe05-select     scores on the noise that chooses the schedule to keep
    digits-nfe05-fresh      scores on fresh noise

A later search of the same name is "digits.2": nothing of an earlier one is ever changed. A trial
holds what a resumed search needs: the score as value, real parameters, and as user attributes the
digest, the schedule itself where parameters do not express it (with its constant image), the
scores of the samples, status, stage, source, cost. A failed candidate is a trial of state FAIL,
one that lost a race PRUNED. Scores of samples, and what else was measured beside them, are
float32, base64 of their little-endian bytes. Nothing here is executed when it is read.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.yardstick import Array
from fewstep.search.record import reached
from fewstep.search.strategies import Evaluated
from fewstep.search.work import Result
from fewstep.space.errors import FewstepError, StudyError
from fewstep.space.files import load_schedule
from fewstep.space.plans import PlanDomain
from fewstep.space.protocol import Domain

_OWN = frozenset(
    "digest source status samples calls seconds elapsed generation size message schedule image "
    "scores further".split()
)


_BEAT = 20.0  # seconds between signs of life in a storage that others use too
_WHO = (socket.gethostname(), os.getpid())


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


@dataclass(frozen=True)
class Kept:
    """A trial as it is kept.

    Args:
        schedule: the candidate.
        result: what its evaluation gave and cost; calls and seconds are 0 for one scored before.
        source: see `Evaluated`.
        generation: number of its generation, which has `size` candidates.
        note: further numbers and words.
        elapsed: seconds since the search began.
        expressed: whether its parameters express its schedule.
    """

    schedule: Any
    result: Result
    source: str = ""
    generation: int = 0
    size: int = 0
    note: Mapping[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0
    expressed: bool = False

    @property
    def evaluated(self) -> Evaluated:
        """The candidate as strategies see it."""
        return Evaluated.of(self.schedule, self.result, self.source)


class Store:
    """One search in a storage.

    Args:
        storage: see `record.open_storage`.
        name: the study's name.
        resume: whether to go on with a search that is there.
        folder: the output folder: of several searches of one name it tells which.
        identity: the settings that decide scores; a search that is gone on with began with them.

    Raises:
        StudyError: `resume`, and the search there began with other settings.
    """

    def __init__(
        self, storage: Any, name: str, folder: Path, identity: Mapping[str, Any], resume: bool
    ) -> None:
        import optuna

        self._optuna, self._storage = optuna, storage
        self._alone = isinstance(storage, optuna.storages.JournalStorage)  # the folder's own
        self._closed = threading.Event()
        self._studies: dict[str, Trials] = {}
        asked = json.loads(json.dumps(identity))
        held = self._held(name)
        self.resumed = resume and bool(held)
        if self.resumed:
            self.name = self._choose(held, str(folder.resolve()), asked)
            self._study = optuna.load_study(study_name=self.name, storage=storage)
            self._check_owner()
        else:
            self._study = self._begin(name)
            self.name = self._study.study_name
            self.note(identity=asked, folder=str(folder.resolve()))
        self._folder = folder
        if "id" not in self.notes:
            self.note(id=uuid.uuid4().hex)
        self.id: str = self.notes["id"]
        if not self._alone:
            threading.Thread(target=self._own, daemon=True).start()

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted."""
        return dict(self._study.user_attrs)

    def note(self, **values: Any) -> None:
        """Keep JSON values by name; what is kept already is not written again."""
        with reached(self.name):
            kept = self.notes
            for name, value in values.items():
                if name not in kept or kept[name] != value:
                    self._study.set_user_attr(name, value)

    def trials(self, nfe: int, stream: str = "", domain: Domain | None = None) -> Trials:
        """The trials of a number of calls, on the search's noise or another stream's."""
        word = "cost" if isinstance(domain, PlanDomain) else "nfe"
        name = f"{self.name}-{word}{nfe:02d}" + (f"-{stream}" if stream else "")
        if name not in self._studies:
            if name in self._optuna.get_all_study_names(self._storage):
                study = self._optuna.load_study(study_name=name, storage=self._storage)
            else:
                study = self._optuna.create_study(storage=self._storage, study_name=name)
                study.set_user_attr("search", self.name)
            self._studies[name] = Trials(study, domain)
        return self._studies[name]

    def _own(self) -> None:
        """Say, as long as the search runs, that it does: nobody else goes on with it then."""
        while not self._closed.is_set():
            with contextlib.suppress(Exception):  # `reached` says that a storage is away
                self._study.set_user_attr("owner", [*_WHO, time.time()])
            self._closed.wait(_BEAT)

    def _check_owner(self) -> None:
        host, process, beat = self.notes.get("owner") or ("", 0, 0)
        away = time.time() - beat
        if away > 3 * _BEAT or (host == _WHO[0] and not _lives(process)):
            return
        raise StudyError(
            f"the search {self.name} is running (process {process} on {host}): wait for it, or if "
            f"that machine is gone, try again in {3 * _BEAT - away:.0f} s"
        )

    def close(self, *, keep: bool = False) -> None:
        """Let go of the search; one that has no trial yet is taken back, unless `keep`."""
        self._closed.set()
        began = keep or self.resumed or any(trials.count for trials in self._studies.values())
        with contextlib.suppress(Exception):
            if not self._alone:
                self._study.set_user_attr("owner", None)
            for name in () if began else (*self._studies, self.name):
                self._optuna.delete_study(study_name=name, storage=self._storage)
            for file in () if began else ("study.json", *["study.journal"] * self._alone):
                (self._folder / file).unlink(missing_ok=True)
        if not self._alone:  # the connections of a database, which Optuna keeps
            getattr(self._storage, "_backend", self._storage).engine.dispose()

    def _held(self, name: str) -> dict[str, dict[str, Any]]:
        """The notes of the searches of this name, the latest last."""
        pattern = re.compile(re.escape(name) + r"(\.\d+)?")
        found = {}
        for summary in self._optuna.get_all_study_summaries(self._storage):
            if pattern.fullmatch(summary.study_name) and "identity" in summary.user_attrs:
                found[summary.study_name] = dict(summary.user_attrs)
        return dict(sorted(found.items(), key=lambda pair: _count(pair[0], name)))

    def _choose(
        self, held: Mapping[str, dict[str, Any]], folder: str, asked: Mapping[str, Any]
    ) -> str:
        here = [name for name, notes in held.items() if notes.get("folder") == folder]
        same = [name for name, notes in held.items() if notes["identity"] == asked]
        chosen = next((n for n in reversed(here) if n in same), None)
        chosen = chosen or (here[-1] if here else same[-1] if same else list(held)[-1])
        kept = held[chosen]["identity"]
        keys = sorted(k for k in {*kept, *asked} if kept.get(k) != asked.get(k))
        if keys:
            raise StudyError(
                f"--resume: {keys[0]} is {asked.get(keys[0])!r} but the search {chosen} began "
                f"with {kept.get(keys[0])!r}: set it back, or --overwrite"
            )
        return chosen

    def _begin(self, name: str) -> Any:
        """A study that no other search has; the storage decides who comes first."""
        number = 1
        while True:
            try:
                return self._optuna.create_study(
                    storage=self._storage, study_name=name if number == 1 else f"{name}.{number}"
                )
            except self._optuna.exceptions.DuplicatedStudyError:
                if self._alone and number == 1:  # the folder's own journal: a kill cut its begin
                    torn = self._optuna.load_study(study_name=name, storage=self._storage)
                    if not torn.user_attrs.get("identity"):
                        return torn
                number += 1


def _count(study: str, name: str) -> int:
    return int(study[len(name) + 1 :] or 1)


class Trials:
    """The trials of one Optuna study; without a domain they keep no parameters."""

    def __init__(self, study: Any, domain: Domain | None) -> None:
        import optuna

        self._optuna, self.study, self._domain = optuna, study, domain
        self._distributions: dict[str, Any] = {} if domain is None else domain.distributions()
        self.count = len(study.get_trials(deepcopy=False))
        self._results: dict[tuple[str, int], Result] | None = None

    def add(self, kept: Kept) -> None:
        """Append a trial.

        Raises:
            StudyError: another process writes to the study.
        """
        result, ok = kept.result, kept.result.status == "ok"
        stopped = bool(kept.note.get("stopped"))
        params = self._params(kept.schedule)
        states = self._optuna.trial.TrialState
        trial = self._optuna.trial.create_trial(
            state=(states.PRUNED if stopped else states.COMPLETE) if ok else states.FAIL,
            value=result.score if ok else None,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            intermediate_values={result.samples: result.score} if ok and stopped else {},
            user_attrs=_attributes(kept),
        )
        storage = self.study._storage
        with reached(self.study.study_name):
            made = storage.create_new_trial(self.study._study_id, template_trial=trial)
            number = storage.get_trial(made).number
        if number != self.count:
            raise StudyError(
                f"{self.study.study_name}: another process adds trials to it: let one of the two "
                "finish"
            )
        self.count += 1
        if self._results is not None:
            self._results[kept.schedule.digest, result.samples] = result

    def kept(self) -> list[Kept]:
        """Every trial, in the order told."""
        return [self._read(trial) for trial in self.study.get_trials(deepcopy=False)]

    def result(self, digest: str, samples: int) -> Result | None:
        """What a schedule's evaluation on so many samples gave, if it is there."""
        if self._results is None:
            self._results = {}
            for trial in self.study.get_trials(deepcopy=False):
                found = _result(trial)
                key = (trial.user_attrs["digest"], trial.user_attrs["samples"])
                self._results.setdefault(key, found)
        return self._results.get((digest, samples))

    def _params(self, schedule: Any) -> dict[str, Any]:
        if self._domain is None:
            return {}
        try:
            return dict(self._domain.params(schedule))
        except FewstepError:
            return {}  # a named solver that the search space does not hold

    def _read(self, trial: Any) -> Kept:
        attrs, result = trial.user_attrs, _result(trial)
        if "schedule" in attrs:
            schedule = load_schedule(attrs["schedule"])
            if "image" in attrs:
                schedule = schedule.with_constant(unpacked_image(attrs["image"]))
        elif self._domain is not None:
            schedule = self._domain.from_params(trial.params)
        else:
            raise StudyError(f"{self.study.study_name}: trial {trial.number} has no schedule")
        note = {k: v for k, v in attrs.items() if k not in _OWN}
        where = attrs["source"], attrs["generation"], attrs["size"]
        return Kept(schedule, result, *where, note, attrs["elapsed"], "schedule" not in attrs)


def _attributes(kept: Kept) -> dict[str, Any]:
    result, schedule = kept.result, kept.schedule
    found: dict[str, Any] = {
        "digest": schedule.digest,
        "source": kept.source,
        "status": result.status,
        "samples": result.samples,
        "calls": result.calls,
        "seconds": round(result.seconds, 6),
        "elapsed": round(kept.elapsed, 3),
        "generation": kept.generation,
        "size": kept.size,
    }
    if result.message:
        found["message"] = result.message
    if not kept.expressed:
        body = schedule.to_dict()
        found["schedule"] = {k: v for k, v in body.items() if k != "provenance"}
        constant = getattr(schedule, "constant", None)  # lies beside a schedule, not in it
        if constant is not None:
            found["image"] = packed_image(constant)
    if result.per_sample is not None:
        found["scores"] = _packed(result.per_sample)
        if result.measures is not None and result.measures.shape[1] > 1:
            found["further"] = _packed(result.measures[:, 1:])
    return found | {k: v for k, v in kept.note.items() if k not in found}


def _result(trial: Any) -> Result:
    attrs = trial.user_attrs
    cost = {name: attrs[name] for name in ("calls", "seconds", "samples")}
    if attrs["status"] != "ok":
        return Result(float("inf"), attrs["status"], attrs.get("message", ""), **cost)
    if "scores" not in attrs:
        return Result(trial.value, **cost)
    per_sample = _unpacked(attrs["scores"])
    measures = per_sample[:, None]
    if "further" in attrs:
        further = _unpacked(attrs["further"]).reshape(len(measures), -1)
        measures = np.concatenate([measures, further], axis=1)
    return Result(trial.value, "ok", "", per_sample, measures, **cost)


def packed_image(image: Tensor) -> dict[str, Any]:
    """A constant image as JSON: its shape, and its numbers like scores."""
    return {"shape": list(image.shape), "numbers": _packed(image.detach().float().cpu().numpy())}


def unpacked_image(data: Mapping[str, Any]) -> Tensor:
    """The image that `packed_image` wrote, float32."""
    return torch.from_numpy(_unpacked(data["numbers"])).float().reshape(data["shape"])


def _packed(values: Array) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> Array:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
