"""The house rules that no single file shows: packaging, layers, loading, size, tool settings."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
LAYERS = ["space", "samplers", "predictors", "search", "experiments"]
"""Each folder may import only those before it."""

UNPACKED = "experiments/benchmarks"
"""In the repository, not in the wheel: what measures."""

HEAVY = ["ray", "optuna", "mlflow", "sklearn", "matplotlib", "diffusers"]
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PINNED_PICKLES = {
    # `--reference` re-saves MOSES's pickled statistics as plain arrays, once, from a wheel whose
    # sha256 is checked first; nothing else reads them.
    "experiments/benchmarks/metrics_molecules.py",
}
IMPORT_NAMES = {"scikit-learn": "sklearn"}


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


EVERY_FILE = python_files(*LAYERS, "tests")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, at whatever depth it does so."""
    package = ("fewstep", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [str(part) for part in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def requirement_names(group: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9_.-]+", line) for line in group)
    return {IMPORT_NAMES.get(match[0], match[0]) for match in names if match}


# --- packaging -------------------------------------------------------------------------------


def test_every_package_folder_is_listed_and_every_listed_folder_is_a_package() -> None:
    found = {
        "fewstep." + ".".join(path.parent.relative_to(ROOT).parts)
        for path in python_files(*LAYERS)
        if path.name == "__init__.py" and not path.is_relative_to(ROOT / UNPACKED)
    }
    assert found == set(PACKAGES)


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {path.parent for path in python_files(*LAYERS)}
    assert not {name_of(f) for f in folders if not (f / "__init__.py").exists()}


def test_every_package_is_marked_as_typed() -> None:
    for package in PACKAGES:
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert (folder / "py.typed").exists(), f"{package} has no py.typed"


@pytest.mark.parametrize("name", LAYERS)
def test_bare_folder_names_are_not_importable(name: str) -> None:
    # Otherwise a module would exist twice, and Schedule would not be Schedule. Run pytest by
    # `make test` or with PYTHONSAFEPATH=1, never as `python -m pytest`.
    assert importlib.util.find_spec(name) is None


def test_the_repository_root_is_not_on_the_path() -> None:
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


def test_the_installed_version_is_the_one_in_pyproject() -> None:
    assert importlib.metadata.version("fewstep") == PYPROJECT["project"]["version"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no stale `build/lib` of the checkout gets into it."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in LAYERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    out = tree / "wheels"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, tree, cwd=tree)
    assert built.returncode == 0, built.stderr
    return next(out.glob("fewstep-*.whl"))


def test_the_top_level_of_the_wheel_is_exactly_fewstep(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fewstep"}


def test_the_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        f"fewstep/{name_of(path)}"
        for folder in LAYERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".typed", ".toml", ".yaml", ".json", ".html", ".safetensors"}
    }
    out = (f"fewstep/{UNPACKED}/", "fewstep/experiments/results/")
    left_out = {name for name in wanted if name.startswith(out)}
    assert wanted - names == left_out


BLOCKER = """
import sys

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"{name}: an extra, hidden here", name=name)

sys.meta_path.insert(0, Blocked)
"""


@pytest.mark.slow
def test_the_wheel_works_without_its_extras(wheel: Path, tmp_path: Path) -> None:
    # A clean environment that sees the base dependencies of this one but none of the extras.
    # Its .pth file names this environment's packages as a plain path, so the editable install's
    # own .pth is not read: what is imported is the wheel.
    home = tmp_path / "clean"
    venv.create(home, with_pip=False, symlinks=True)
    folder = "Scripts" if os.name == "nt" else "bin"
    python = home / folder / "python"
    installed = run(
        *(sys.executable, "-m", "pip", "--python", python, "install"),
        *("--no-deps", "--no-index", "--quiet", wheel),
    )
    assert installed.returncode == 0, installed.stderr
    printed = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
    site = Path(printed.strip())
    extras = PYPROJECT["project"]["optional-dependencies"]
    hidden = set().union(*(requirement_names(extras[name]) for name in extras if name != "dev"))
    (site / "blocker.py").write_text(f"NAMES = {sorted(hidden)!r}\n{BLOCKER}")
    (site / "zz_base.pth").write_text(f"{Path(pytest.__file__).parents[1]}\nimport blocker\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    quiet = {"env": env, "cwd": tmp_path}

    for name in HEAVY:
        assert "hidden here" in run(python, "-c", f"import {name}", **quiet).stderr
    found = run(python, "-c", "import fewstep.space as s; print(s.__file__)", **quiet)
    assert site in Path(found.stdout.strip()).parents, found.stdout + found.stderr
    for package in ("space", "samplers", "predictors", "experiments"):
        imported = run(python, "-c", f"import fewstep.{package}", **quiet)
        assert imported.returncode == 0, imported.stderr
    if (ROOT / "experiments" / "__main__.py").exists():
        helped = run(home / folder / "fewstep", "--help", **quiet)
        assert helped.returncode == 0, helped.stderr
        assert "Usage" in helped.stdout


# --- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", python_files(*LAYERS), ids=name_of)
def test_a_file_imports_only_from_its_own_layer_and_those_below(path: Path) -> None:
    own = LAYERS.index(path.relative_to(ROOT).parts[0])
    for line, module in imported_modules(path):
        parts = module.split(".")
        assert parts[0] != "tests", f"{name_of(path)}:{line} imports {module}"
        if parts[0] == "fewstep" and len(parts) > 1:
            assert parts[1] in LAYERS[: own + 1], f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("package", ["space", "samplers", "predictors"])
def test_what_samplers_need_imports_nothing_that_searches(package: str) -> None:
    code = f"""
import sys
import fewstep.{package}
print(*sorted({set(HEAVY)!r} & set(sys.modules)))
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [], f"fewstep.{package} imports {result.stdout}"


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_FILE, ids=name_of)
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", python_files(*LAYERS), ids=name_of)
def test_no_module_has_the_name_of_a_standard_one(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names - {"__main__"}


@pytest.mark.parametrize("path", EVERY_FILE, ids=name_of)
def test_nothing_that_is_loaded_can_execute_code(path: Path) -> None:
    # Tests may pickle: they show what can be sent to a worker, and that weights need none.
    a_test = path.is_relative_to(ROOT / "tests")
    for line, module in imported_modules(path):
        where = f"{name_of(path)}:{line}"
        assert a_test or module.split(".")[0] not in PICKLES, f"{where} imports {module}"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        values = {
            key.arg: key.value.value
            for key in node.keywords
            if isinstance(key.value, ast.Constant)
        }
        where = f"{name_of(path)}:{node.lineno}"
        if name_of(path) not in PINNED_PICKLES:
            assert values.get("allow_pickle") is not True, f"{where} allows pickles"
        if ast.unparse(node.func) == "torch.load":
            assert values.get("weights_only") is True, f"{where} needs weights_only=True"


# --- functions, classes, search/ --------------------------------------------------------------

NAMED = {
    "samplers/ode.py:run": "public since the first version, where `check` was one of them",
    "samplers/diffusers.py:__init__": "diffusers reads a scheduler's settings off the parameters",
}
"""Functions of more than eight parameters, and why."""

LARGEST = {"lines": 6_499, "files": 27}
"""search/ holds at most 6,500 lines in 30 files, now and later; lower these where it shrinks."""


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Every function of a file, and whether it is a command, whose parameters are its options."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(d) for d in node.decorator_list]
            yield (
                f"{name_of(path)}:{node.name}",
                node,
                any(d.startswith("app.command") for d in decorators),
            )


@pytest.mark.parametrize("path", python_files(*LAYERS), ids=name_of)
def test_a_function_is_short_and_takes_few_parameters(path: Path) -> None:
    for where, node, command in functions(path):
        begun = node.body[0].lineno if command else node.lineno
        assert (node.end_lineno or 0) - begun + 1 <= 60, f"{where} is too long"
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
        assert count <= 8 or command or where in NAMED, f"{where} takes {count} parameters"


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for path in python_files(*LAYERS):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(f"{name_of(path)}:{node.lineno}")
    assert not {name: where for name, where in found.items() if len(where) > 1}


def test_search_does_not_grow() -> None:
    files = python_files("search")
    assert len(files) <= LARGEST["files"]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines <= LARGEST["lines"]


# --- the tools are alive ---------------------------------------------------------------------


def ruff(code: str, filename: str) -> str:
    tool = Path(sys.executable).with_name("ruff")
    options = ["--stdin-filename", str(ROOT / filename), "--output-format", "concise", "-"]
    return run(tool, "check", "--no-cache", *options, cwd=ROOT, input=code).stdout


@pytest.mark.parametrize("name", LAYERS)
def test_ruff_refuses_imports_of_bare_folder_names(name: str) -> None:
    assert "TID251" in ruff(f"import {name}\n", "samplers/x.py")
    assert "TID251" in ruff(f"from {name}.thing import Thing\n", "tests/test_x.py")
    assert "TID251" not in ruff(f"import fewstep.{name}\n", "tests/test_x.py")


def test_ruff_asks_for_annotations_and_docstrings_except_in_tests() -> None:
    code = "def f(x):\n    return x\n"
    codes = set(re.findall(r"[A-Z]+\d+", ruff(code, "space/x.py")))
    assert {"ANN001", "ANN201", "D100", "D103"} <= codes
    assert "All checks passed" in ruff(code, "tests/test_x.py")


def test_mypy_is_strict_and_reads_the_packages(tmp_path: Path) -> None:
    # Its settings on a file of one line; `make check` runs it on the packages.
    settings = PYPROJECT["tool"]["mypy"]
    assert settings["strict"] is True
    assert settings["packages"] == ["fewstep"]
    (tmp_path / "loose.py").write_text("def f(x): return x\n")
    tool = Path(sys.executable).with_name("mypy")
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", os.devnull]
    result = run(tool, *options, "loose.py", cwd=tmp_path)
    assert "no-untyped-def" in result.stdout, result.stdout + result.stderr


def test_pytest_reads_its_settings(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("importmode") == "importlib"
    assert pytestconfig.getini("xfail_strict") is True
    with pytest.raises(UserWarning, match="an error here"):
        warnings.warn("an error here", stacklevel=1)


def test_the_folders_of_the_makefile_are_the_layers() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    match = re.search(r"^FOLDERS := (.*)$", makefile, re.MULTILINE)
    assert match is not None
    assert match[1].split() == LAYERS
