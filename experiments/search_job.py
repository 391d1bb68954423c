"""A search as a job on a cluster: what `fewstep submit` runs there, and a script for `ray submit`.

    fewstep submit STUDY.toml --address http://HEAD:8265 --out /shared/runs/mine
    ray submit cluster.yaml search_job.py STUDY.toml --out /shared/runs/mine

It is `fewstep search` with all its options, on the cluster that it finds itself in. A job's folder
goes with it, so --out and the tracking address must lie elsewhere: relative ones are refused.
"""

from __future__ import annotations

import json
import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run `fewstep search` on the cluster that runs this job."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        from fewstep.experiments.__main__ import main as command_line
        from fewstep.search.cluster import __file__ as place
        from fewstep.search.cluster import differing, versions
    except ImportError as error:
        what = f"{sys.executable} lacks {error.name}: install what fewstep[search] needs there"
        sys.exit(f"fewstep: error: {what}, or name another Python with --python")
    os.environ["FEWSTEP_JOB"] = "1"
    here = versions()
    where = os.path.dirname(os.path.dirname(place))
    print(f"fewstep {here['fewstep']} from {where}", file=sys.stderr)
    sent = json.loads(os.environ.get("FEWSTEP_SENT", "{}"))
    line = differing(sent, here)
    if line:
        print(f"the cluster has {line}: scores may differ in their last digits", file=sys.stderr)
    address = [] if any(a.startswith("--address") for a in given) else ["--address", "auto"]
    command_line(["search", *given, *address])


if __name__ == "__main__":
    main()
