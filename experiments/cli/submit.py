"""The command that sends a search to a cluster as a job, follows it, and stops it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.experiments.cli.app import Overwrite, Resume, Settings, app
from fewstep.space.errors import StudyError

if TYPE_CHECKING:
    from fewstep.search.config import StudyConfig

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@app.command(
    epilog="Examples:  fewstep submit study.toml --address http://head:8265 --out /shared/runs/a"
    "   |   fewstep submit a --address http://head:8265 --follow",
)
def submit(
    study: Annotated[
        str,
        typer.Argument(
            help="Study file; with --follow, --stop or --resume also a study's name.",
            metavar="STUDY.toml|NAME",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="The cluster's dashboard, http://HEAD:8265; default RAY_ADDRESS.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder that all machines share, absolute, for what the search leaves.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the job's log.")] = True,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the log of a study's latest job.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop a study's job.")] = False,
    python: Annotated[str, typer.Option("--python", help="The cluster's Python.")] = "python",
) -> None:
    """Run a search on a Ray cluster as a job; it goes on when this machine leaves."""
    if resume + follow + stop + overwrite > 1:
        raise StudyError("give one of --resume, --overwrite, --follow and --stop")
    client = _client(address)
    if stop or follow:
        job = _latest(client, _name(study))
        _stop(client, job) if stop else _follow(client, job)
        return
    words = {"--resume": resume, "--overwrite": overwrite}
    given = list(settings or [])
    if resume and not Path(study).is_file():
        study, out, given = _before(client, study, out, given)
    job = _send(client, study, out, given, [w for w, on in words.items() if on], python)
    if wait:
        _follow(client, job)
    else:
        print(f"follow it: {_following(client, job)}")


def _following(client: Any, job: str) -> str:
    return f"fewstep submit {job} --address {client.get_address()} --follow"


def _client(address: str | None) -> Any:
    """The cluster's job server, if it answers within seconds."""
    from fewstep.experiments.cli.addresses import use_token

    place = (address or os.environ.get("RAY_ADDRESS") or "").rstrip("/")
    if not place.startswith(("http://", "https://")):
        raise StudyError(
            f"--address {place or 'is missing'}: jobs go to the cluster's dashboard, e.g. "
            "http://HEAD:8265"
        )
    try:
        with urllib.request.urlopen(f"{place}/api/version", timeout=5) as answer:
            json.load(answer)
    except ValueError:
        raise StudyError(f"--address {place}: that is no Ray dashboard") from None
    except OSError as error:
        if not (isinstance(error, urllib.error.HTTPError) and error.code in (401, 403)):
            why = getattr(error, "reason", error)
            raise StudyError(f"--address {place}: no dashboard answers there ({why})") from None
    use_token()
    try:
        from ray.job_submission import JobSubmissionClient

        for logger in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private"):
            logging.getLogger(f"ray.{logger}").setLevel(logging.WARNING)
        return JobSubmissionClient(place)
    except ImportError:
        raise StudyError("submitting needs Ray: pip install 'fewstep[search]'") from None
    except Exception as error:  # a server of another version, or without jobs
        raise StudyError(f"--address {place}: {' '.join(str(error).split())[:300]}") from None


def _send(
    client: Any, study: str, out: Path | None, settings: list[str], words: list[str], python: str
) -> str:
    """Submit the job; its id."""
    from fewstep.search.cluster import pack, versions
    from fewstep.search.config import load_study

    config = lasting(load_study(study, settings), out)
    if any(job.status not in _ENDED for job in _jobs(client, config.name)):
        raise StudyError(
            f"a job of the study {config.name} is running: follow it with --follow, stop it with "
            "--stop, or give this one another name (--set name=...)"
        )
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
        packed = pack(config, Path(folder), print)
        (Path(folder) / "study.json").write_text(json.dumps(packed.resolved()), encoding="utf-8")
        command = [python, "-m", "fewstep.experiments.search_job", "study.json", "--out", str(out)]
        try:
            job = client.submit_job(
                entrypoint=shlex.join([*command, *words]),
                submission_id=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {
                        "FEWSTEP_SENT": json.dumps(versions()),
                        "RAY_USAGE_STATS_ENABLED": "0",
                    },
                },
                metadata={
                    "fewstep.study": config.name,
                    "fewstep.file": str(Path(study).resolve()),
                    "fewstep.out": str(out),
                    "fewstep.set": json.dumps(settings),
                },
            )
        except Exception as error:  # whatever a client of a service may raise
            raise StudyError(
                f"the job was refused: {' '.join(str(error).split())[:300]}"
            ) from None
    print(f"job {job}: results will be in {out}, on the cluster", flush=True)
    return str(job)


def _jobs(client: Any, name: str) -> list[Any]:
    """The jobs of a study, the latest last; or the one of that id."""
    found = [
        job
        for job in client.list_jobs()
        if name in ((job.metadata or {}).get("fewstep.study"), job.submission_id)
    ]
    return sorted(found, key=lambda job: job.start_time or 0)


def _latest(client: Any, name: str) -> str:
    found = _jobs(client, name)
    if not found:
        raise StudyError(f"the cluster knows no job of a study {name}")
    return str(found[-1].submission_id)


def _name(study: str) -> str:
    """A study's name, given it or its file."""
    from fewstep.search.config import load_study

    return load_study(study).name if Path(study).is_file() else study


def _before(
    client: Any, name: str, out: Path | None, settings: list[str]
) -> tuple[str, Path, list[str]]:
    """What a study's latest job was given, to go on with."""
    kept = client.get_job_info(_latest(client, name)).metadata
    if not Path(kept["fewstep.file"]).is_file():
        raise StudyError(f"{kept['fewstep.file']} is not here: name the study file to go on with")
    return (
        kept["fewstep.file"],
        out or Path(kept["fewstep.out"]),
        json.loads(kept["fewstep.set"]) + settings,
    )


def _follow(client: Any, job: str) -> None:
    """Print a job's log until it ends; its exit code becomes ours."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        print(f"\nthe job goes on: follow it with {_following(client, job)}", flush=True)
        raise
    while (info := client.get_job_info(job)).status not in _ENDED:
        time.sleep(0.5)
    if info.status != "SUCCEEDED":
        print(f"job {job}: {info.status.lower()}", flush=True)
        raise typer.Exit(info.driver_exit_code or (143 if info.status == "STOPPED" else 1))


def _stop(client: Any, job: str) -> None:
    client.stop_job(job)
    print(f"{job} is told to stop", flush=True)
    while (info := client.get_job_info(job)).status not in _ENDED:
        time.sleep(0.5)
    print(f"{job}: {info.status.lower()}; go on with --resume")


def lasting(config: StudyConfig, out: Path | None) -> StudyConfig:
    """The study of a job, whose folder goes with it: everything must lie somewhere that stays.

    The MLflow database of a study that names none lies beside the output folder.

    Raises:
        StudyError: a relative path; the setting is named.
    """
    if out is None or not out.is_absolute():
        raise StudyError(
            f"--out {out or 'is missing'}: a job's own folder is deleted with it; name an "
            f"absolute one that all machines share, e.g. --out /shared/runs/{config.name}"
        )
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    for what, uri in (("search.storage", config.search.storage), ("tracking.uri", given)):
        if uri is not None and _relative(uri):
            raise StudyError(
                f"{what} = {uri!r} is relative, and a job's own folder is deleted with it: name "
                "an absolute path, or a server"
            )
    if config.teacher.cache is not None and not Path(config.teacher.cache).is_absolute():
        raise StudyError("teacher.cache is relative: name an absolute path, or leave it out")
    tracking = config.tracking.model_copy(
        update={"uri": given or f"sqlite:///{out.parent / 'mlflow.db'}"}
    )
    return config.model_copy(update={"tracking": tracking})


def _relative(uri: str) -> bool:
    """Whether a URI names a file by a relative path."""
    scheme, found, rest = uri.partition("://")
    if not found:
        return not uri.startswith(("/", "databricks"))
    return scheme == "sqlite" and not rest.startswith("//")
