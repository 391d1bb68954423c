"""What the tutorials show runs as it stands there, with a smaller search.

A block with a title is a file; the others run from top to bottom, Python in one namespace.
A block after `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import re
import shlex
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.studies import called
from tests.test_wild_search import settings
from tests.tiny_pipelines import with_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^\n]+ -->\n)?^```(?P<kind>sh|python|toml)"
    r'(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```',
    re.MULTILINE | re.DOTALL,
)
SMALL = settings("search.workers=0")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture
def follow(tmp_path, monkeypatch, capsys):
    """A function that follows a page, and returns the names its Python left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("my_model", "remote_model"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    def follow_page(name):
        names = {}
        blocks = [b.groupdict() for b in BLOCK.finditer((DOCS / name).read_text("utf-8"))]
        assert blocks
        for block in blocks:
            if block["title"]:
                (tmp_path / block["title"]).write_text(block["text"])
        for block in blocks:
            if block["skip"] or block["title"]:
                continue
            if block["kind"] == "toml":
                assert tomllib.loads(block["text"])
            elif block["kind"] == "python":
                exec(compile(block["text"], name, "exec"), names)
            else:
                for line in block["text"].replace("\\\n", " ").splitlines():
                    command, *arguments = shlex.split(line, comments=True)
                    assert command == "fewstep", line
                    extra = SMALL if arguments[0] == "search" else ()
                    code, _, err = called(capsys, *arguments, *extra)
                    assert code == 0, f"{line}: {err}"
        return names

    return follow_page


def test_the_tutorial_with_a_module(follow):
    names = follow("module.md")
    assert names["images"].shape == (16, 1, 8, 8)
    assert torch.isfinite(names["images"]).all()
    assert Path("before.png").stat().st_size > 0


def test_the_tutorial_with_a_pipeline(follow, tmp_path):
    with_text(tmp_path / "tokenizer").save_pretrained(tmp_path / "my_pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nrain\n")
    names = follow("pipeline.md")
    assert names["image"].size == (8, 8)
    assert Path("runs/mine/samples.png").stat().st_size > 0


def test_the_tutorial_with_a_remote_model(follow, tmp_path):
    code = re.search(r'```python title="server.py"\n(.*?)^```', (DOCS / "remote.md").read_text(),
                     re.MULTILINE | re.DOTALL)  # fmt: skip
    made: dict = {}
    exec(code.group(1), made)
    server = made["serve"](8765)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        follow("remote.md")
    finally:
        server.shutdown()
        server.server_close()
    assert Path("runs/remote/schedules/nfe04.json").exists()


def test_the_questions(follow):
    names = follow("questions.md")
    assert len(names["study"].trials) == 20
    assert abs(names["study"].best_params["x"] - 0.3) < 0.05


def test_the_page_of_costs(follow):
    assert set(follow("costs.md")["denoiser"].networks) == {"small"}


def test_the_page_of_the_file_format(follow):
    follow("files.md")
    assert Path("schedule.schema.json").stat().st_size > 0
