"""The append-only log of a search, one JSON line per event, from which a killed search goes on.

Events: what each generation proposed, and the results of each block of candidates as it arrives. A
search is a function of its study and of this log: resuming replays the log and evaluates what it
does not hold. A block is one line, so it is there whole or not at all; a line torn by a kill is
cut off. Per-sample scores, and what else was measured beside them, are float32, base64 of their
little-endian bytes.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from fewstep.search.work import Result
from fewstep.search.yardstick import Array
from fewstep.space.errors import StudyError

Key = tuple[str, int, str]
"""(stream, samples, digest) of an evaluation."""


class Record:
    """The log of one output folder, held open and locked by one process.

    Args:
        path: the log file; created if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[Key, Result] = {}
        self.generations: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.notes: dict[str, Any] = {}
        self.elapsed = 0.0
        self._file = _locked(path)
        self._replay()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _replay(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                raise StudyError(
                    f"{self.path}: line {number} is damaged: the log was edited; start anew with "
                    "--overwrite"
                ) from None
            self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "note":
            self.notes |= event["values"]
        elif kind == "generation":
            self.generations[event["nfe"], event["generation"]] = event["proposals"]
            self.elapsed = max(self.elapsed, event["elapsed"])
        elif kind == "block":
            for row in event["results"]:
                self.results[event["stream"], event["samples"], row["digest"]] = _result(
                    row, event["samples"]
                )
            self.elapsed = max(self.elapsed, event["elapsed"])

    def _append(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        self._take(event)

    def note(self, **values: Any) -> None:
        """Keep JSON values by name (the frozen study, the tracking runs)."""
        self._append({"event": "note", "values": values})

    def generation(
        self, nfe: int, generation: int, proposals: Sequence[Mapping[str, Any]], elapsed: float
    ) -> None:
        """Keep what a generation proposed: {"schedule", "source", "note", "constant"} each."""
        line = {"event": "generation", "nfe": nfe, "generation": generation, "elapsed": elapsed}
        self._append(line | {"proposals": [dict(p) for p in proposals]})

    def block(
        self,
        stream: str,
        samples: int,
        digests: Sequence[str],
        results: Sequence[Result],
        elapsed: float,
    ) -> None:
        """Keep the results of a block of candidates; their measures stay available in memory."""
        rows = [_row(digest, result) for digest, result in zip(digests, results, strict=True)]
        self._append(
            {
                "event": "block",
                "stream": stream,
                "samples": samples,
                "elapsed": elapsed,
                "results": rows,
            }
        )
        for digest, result in zip(digests, results, strict=True):
            self.results[stream, samples, digest] = result


def _locked(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StudyError(
            f"{path.parent}: another search is writing there: wait for it, or choose another --out"
        ) from None
    return file


def _row(digest: str, result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {
        "digest": digest,
        "status": result.status,
        "calls": result.calls,
        "seconds": round(result.seconds, 6),
    }
    if result.status != "ok":
        return row | {"message": result.message}
    row["score"] = result.score
    if result.per_sample is not None:
        row["per_sample"] = _packed(result.per_sample)
        if result.measures is not None and result.measures.shape[1] > 1:
            row["further"] = _packed(result.measures[:, 1:])
    return row


def packed_image(image: Tensor) -> dict[str, Any]:
    """A constant image as JSON, for the log: its shape, and its numbers like scores."""
    return {"shape": list(image.shape), "numbers": _packed(image.detach().float().cpu().numpy())}


def unpacked_image(data: Mapping[str, Any]) -> Tensor:
    """The image that `packed_image` wrote, float32."""
    return torch.from_numpy(_unpacked(data["numbers"])).float().reshape(data["shape"])


def _packed(values: Array) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> Array:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def _result(row: Mapping[str, Any], samples: int) -> Result:
    cost = {"calls": row["calls"], "seconds": row["seconds"]}
    if row["status"] != "ok":
        return Result(float("inf"), row["status"], row["message"], **cost)
    per_sample: Array | None = None
    if "per_sample" in row:
        per_sample = _unpacked(row["per_sample"])
    measures = None if per_sample is None else per_sample[:, None]
    if measures is not None and "further" in row:
        further = _unpacked(row["further"]).reshape(len(measures), -1)
        measures = np.concatenate([measures, further], axis=1)
    return Result(row["score"], "ok", "", per_sample, measures, samples=samples, **cost)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole: to a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def prepare_out(out: Path, *, resume: bool, overwrite: bool) -> Path:
    """Check and make the output folder; returns the path of its log.

    Raises:
        StudyError: it is a file, cannot be written, or holds a search and neither `resume` nor
            `overwrite` is set.
    """
    if out.exists() and not out.is_dir():
        raise StudyError(f"--out {out} is a file: name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"--out {out} cannot be made: {error.strerror or error}") from None
    if not os.access(out, os.W_OK):
        raise StudyError(f"--out {out} cannot be written to")
    log = out / "log.jsonl"
    held = log.exists() and log.stat().st_size > 0
    if held and overwrite:
        _clear(out, log)
    elif held and not resume:
        raise StudyError(
            f"--out {out} already holds a search: add --resume to go on, --overwrite to start "
            "anew, or name another folder"
        )
    return log


def _clear(out: Path, log: Path) -> None:
    _locked(log).close()  # nobody is writing
    names = (
        "log.jsonl",
        "study.journal",
        "results.json",
        "samples.png",
        "curves.png",
        "pareto.png",
        "report.html",
        "study.json",
        "cpr.json",
        "decisions.json",
        "decisions.png",
    )
    for name in names:
        (out / name).unlink(missing_ok=True)
    for path in (out / "schedules").glob("*"):
        if path.suffix in (".json", ".safetensors"):
            path.unlink()
