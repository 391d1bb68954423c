r"""A search as a submitted Ray job: the same study, evaluated by the whole cluster.

    ray job submit --address http://HEAD:8265 \
        --runtime-env-json '{"working_dir": "my_study", "py_modules": ["dist/fewstep-....whl"]}' \
        -- python -m fewstep.experiments.search_job study.toml --out /shared/runs/mine

The working directory is the folder of the study and its model, never this repository: workers
import the WHEEL sent along, so a search is tied to a build, and later edits cannot reach it. The
folder --out and the tracking URI must outlive the job; a relative one lies in the job's copy.
All options of `fewstep search` hold; `--address` defaults to the job's cluster.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from fewstep.experiments.__main__ import main as command_line


def main(arguments: list[str] | None = None) -> None:
    """Run `fewstep search` on the cluster that runs this job."""
    given = sys.argv[1:] if arguments is None else arguments
    here = Path(__file__).resolve().parents[1]
    print(f"fewstep {version('fewstep')} from {here}", file=sys.stderr)
    address = [] if any(a.startswith("--address") for a in given) else ["--address", "auto"]
    command_line(["search", *given, *address])


if __name__ == "__main__":
    main()
