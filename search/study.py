"""The Optuna study beside a search: finished trials added whole, in the order proposed.

The studies are for looking and for other tools (optuna-dashboard, importances): real parameters
with distributions, the score as value, and as user attributes the digest, the source, the cost and
the status. A failed candidate is a trial of state FAIL. Storage is a journal file in the output
folder, or any Optuna storage URL.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.search.strategies import Evaluated
from fewstep.space.errors import FewstepError, StudyError

if TYPE_CHECKING:
    import optuna


def study_name(name: str, nfe: int) -> str:
    """Name of the Optuna study of one NFE, e.g. "digits-nfe05"."""
    return f"{name}-nfe{nfe:02d}"


def open_storage(url: str | None, out: Path) -> Any:
    """The storage a study asks for: an Optuna URL, or the journal in the output folder.

    Raises:
        StudyError: Optuna is not installed, or the storage cannot be opened.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise StudyError("searching needs Optuna: pip install 'fewstep[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if url is not None:
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:
            raise StudyError(
                f"search.storage {url}: {' '.join(str(error).split())[:200]}"
            ) from None
    path = out / "study.journal"
    _repair(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _repair(path: Path) -> None:
    """Cut a line torn by a kill, and drop its writer's lock: the log's lock is ours."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


class TrialTable:
    """The trials of one NFE.

    Args:
        storage: see `open_storage`.
        name: name of the study.
        domain: answers `params(schedule)` and `distributions()`; None stores trials without
            parameters.
        fresh: delete a study of that name first.
    """

    def __init__(self, storage: Any, name: str, domain: Any, *, fresh: bool = False) -> None:
        import optuna

        self._optuna = optuna
        if fresh and name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        self.study: optuna.Study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
        self._domain = domain
        self._distributions: dict[str, Any] = {} if domain is None else domain.distributions()
        self._digests = [t.user_attrs.get("digest") for t in self.study.get_trials(deepcopy=False)]

    def tell(
        self,
        number: int,
        evaluated: Evaluated,
        *,
        calls: int,
        seconds: float,
        message: str,
        note: Mapping[str, Any],
    ) -> None:
        """Add trial `number`; one that a resumed search already holds is only compared.

        Raises:
            StudyError: the study holds another candidate at this number.
        """
        digest = evaluated.schedule.digest
        if number < len(self._digests):
            if self._digests[number] != digest:
                raise StudyError(
                    f"trial {number} of {self.study.study_name} is another candidate: the storage "
                    "belongs to another search"
                )
            return
        ok = evaluated.status == "ok"
        params = self._params(evaluated.schedule)
        attributes = {
            "digest": digest,
            "source": evaluated.source,
            "status": evaluated.status,
            "samples": evaluated.samples,
            "calls": calls,
            "seconds": round(seconds, 6),
        }
        if message:
            attributes["message"] = message
        state = self._optuna.trial.TrialState
        trial = self._optuna.trial.create_trial(
            state=state.COMPLETE if ok else state.FAIL,
            value=evaluated.score if ok else None,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs=attributes | {k: v for k, v in note.items() if k not in attributes},
        )
        self.study.add_trial(trial)
        self._digests.append(digest)

    def _params(self, schedule: Any) -> dict[str, Any]:
        if self._domain is None:
            return {}
        try:
            params: dict[str, Any] = self._domain.params(schedule)
        except FewstepError:
            return {}  # a named solver that the search space does not hold
        return params

    def remember(self, **values: Any) -> None:
        """Keep values as attributes of the study."""
        for name, value in values.items():
            self.study.set_user_attr(name, value)
