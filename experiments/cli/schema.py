"""The command that writes the JSON Schema of schedule files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewstep.experiments.cli.app import app


@app.command("schema", epilog="Example:  fewstep schema --out docs/schedule.schema.json")
def schema(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; default standard output."),
    ] = None,
) -> None:
    """Write the JSON Schema of schedule files."""
    from fewstep.space.schema import schema as built

    text = json.dumps(built(), indent=1) + "\n"
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(out)
