"""The documents say what is so: the schema is current, and the table of facts is complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fewstep.space.schema import schema

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_the_schema_is_what_the_classes_say():
    written = json.loads((DOCS / "schedule.schema.json").read_text(encoding="utf-8"))
    assert written == schema(), "run: fewstep schema --out docs/schedule.schema.json"


def test_schedule_files_meet_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema())
    files = sorted((ROOT / "experiments" / "studies").glob("*.json"))
    assert files
    for file in files:
        check.validate(json.loads(file.read_text(encoding="utf-8")))


def test_every_fact_that_is_compared_is_in_the_table_of_what_fits():
    source = (ROOT / "samplers" / "fits.py").read_text(encoding="utf-8")
    page = (DOCS / "fits.md").read_text(encoding="utf-8")
    names = set(re.findall(r'Fact\(\s*"([^"]+)"', source))
    assert names
    assert not {name for name in names if f"| {name} |" not in page}


def test_pages_of_the_site_are_those_that_exist():
    listed = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {page.name for page in DOCS.glob("*.md")}
