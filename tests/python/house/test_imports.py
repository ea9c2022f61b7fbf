"""Import rules, which keep training, export and serving independent."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from repository import PACKAGE, python_sources, relative

TORCH = {"torch", "transformers", "peft", "accelerate"}
GRAPHS = {"onnx", "onnxscript", "onnxruntime"}
SERVER = {"fastapi", "prometheus_client", "starlette", "uvicorn"}
HEAVY = TORCH | GRAPHS | SERVER | {"numpy", "tokenizers", "jinja2", "matplotlib", "tensorboardX"}

# Modules that a folder (or top-level module) must never import, anywhere in its code.
FORBIDDEN = {
    "data": {*TORCH, *GRAPHS, *SERVER}
    | {f"logratio.{folder}" for folder in ("training", "export", "serving", "cli", "demo")},
    "cache": {*TORCH, *GRAPHS, *SERVER, "tokenizers", "jinja2"}
    | {f"logratio.{folder}" for folder in ("data", "training", "export", "serving", "cli", "demo")},
    "logps": {*GRAPHS, *SERVER}
    | {f"logratio.{folder}" for folder in ("training", "export", "serving", "cli", "demo")},
    "training": {*GRAPHS, *SERVER}
    | {f"logratio.{folder}" for folder in ("export", "serving", "cli", "demo")},
    "export": {*SERVER} | {f"logratio.{folder}" for folder in ("serving", "cli", "demo")},
    "serving": {*TORCH, "onnx", "onnxscript"}
    | {f"logratio.{folder}" for folder in ("training", "export", "cli", "demo")},
    "integrations": {*GRAPHS, *SERVER}
    | {f"logratio.{folder}" for folder in ("export", "serving", "cli", "demo")},
    "demo": {"logratio.cli", "logratio._rust"},
    "report": {*TORCH, *GRAPHS, *SERVER, "tokenizers", "pyarrow", "logratio._rust"}
    | {f"logratio.{folder}" for folder in ("data", "cache", "logps", "training")}
    | {f"logratio.{folder}" for folder in ("export", "serving", "integrations", "cli", "demo")},
    "bundle": {*HEAVY, "logratio"},
    "extras": {*HEAVY, "logratio"},
}
# Only these folders import the compiled module directly; others use it through them.
MAY_NAME_RUST = {"cache", "data", "integrations", "logps", "training", "export", "serving"}


def imported(source: str, package: str) -> Iterator[str]:
    """Return the dotted names that `source`, a module of `package`, imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def breaches(names: Iterator[str], forbidden: set[str]) -> set[str]:
    """Return the names that are or belong to a forbidden module."""
    return {name for name in names if any(f"{name}.".startswith(f"{no}.") for no in forbidden)}


def room(path: Path) -> str:
    """Return the first folder below the package, or the module itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def loaded_by(code: str) -> set[str]:
    """Return the top-level names in `sys.modules` after running `code` in a new interpreter."""
    report = "print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", f"import sys\n{code}\n{report}"]
    return set(subprocess.check_output(command, text=True).split("\n")[-2].split())


@pytest.mark.parametrize("path", python_sources(), ids=relative)
def test_modules_import_only_what_their_folder_may(path: Path) -> None:
    package = ".".join(["logratio", *path.relative_to(PACKAGE).parent.parts])
    names = list(imported(path.read_text(), package))
    own = ("logratio.errors", f"logratio.{room(path)}.")
    named = (name for name in names if not name.startswith(own))
    assert not breaches(named, FORBIDDEN.get(room(path), set()))
    if room(path) not in MAY_NAME_RUST:
        assert not breaches(iter(names), {"logratio._rust"})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("def f():\n    from torch import nn", {"torch.nn"}),
        ("from logratio import training", {"logratio.training"}),
        ("from ..training.loop import x", {"logratio.training.loop.x"}),
        ("from .training import x", set()),
        ("import torchless", set()),
    ],
)
def test_every_form_of_import_is_detected(source: str, found: set[str]) -> None:
    names = imported(source, "logratio.serving")
    assert breaches(names, {"torch", "logratio.training"}) == found


def test_importing_the_package_is_cheap() -> None:
    before = loaded_by("")
    assert loaded_by("import logratio") - before == {"logratio"}


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("data", TORCH | GRAPHS | SERVER | {"matplotlib"}),
        ("bundle", HEAVY),
        ("cache", TORCH | GRAPHS | SERVER | {"tokenizers", "pyarrow"}),
        ("serving", TORCH | {"onnx", "onnxscript"}),
        ("training", GRAPHS | SERVER),
        ("report", TORCH | GRAPHS | SERVER | {"tokenizers", "pyarrow", "matplotlib"}),
    ],
)
def test_importing_a_folder_loads_no_forbidden_library(folder: str, never: set[str]) -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted((PACKAGE / folder).rglob("*.py"))
    ]
    assert len(modules) > 1
    assert not loaded_by("\n".join(f"import {module}" for module in modules)) & never


def test_importing_the_integrations_is_cheap() -> None:
    assert loaded_by("import logratio.integrations") - loaded_by("") == {"logratio"}


def test_columns_for_other_trainers_need_no_torch() -> None:
    loaded = loaded_by("import logratio.integrations.table")
    assert not loaded & (TORCH | GRAPHS | SERVER | {"datasets", "pyarrow", "trl"})


def test_training_imports_the_metrics_writer_only_in_a_run() -> None:
    """A machine that only precomputes or evaluates does not need it."""
    assert "tensorboardX" not in loaded_by("import logratio.training")


def test_command_line_loads_nothing_heavy_before_a_command_runs() -> None:
    assert not loaded_by("import logratio.cli") & HEAVY


def test_pyarrow_is_imported_only_for_formats_that_need_it() -> None:
    assert "pyarrow" not in loaded_by("import logratio.data.readers")


@pytest.mark.parametrize(
    "command",
    [
        *([], ["rank"], ["serve"], ["train"], ["export"], ["cache"], ["cache", "export"]),
        *(["bundle"], ["bundle", "verify"]),
    ],
)
def test_help_works_without_torch_and_without_the_extras(command: list[str]) -> None:
    absent = sorted((HEAVY | {"logratio._rust"}) - {"jinja2"})
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        f"sys.argv = ['logratio', *{command}, '--help']\n"
        "from logratio.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def exceptions_of_the_package() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in python_sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                yield f"{relative(path)}:{node.name}", node


def test_every_exception_derives_from_the_base_class() -> None:
    found = dict(exceptions_of_the_package())
    own = {node.name for node in found.values()} | {"Exception"}
    bases = {name: {ast.unparse(base) for base in node.bases} for name, node in found.items()}
    assert len(found) > 30
    assert not [name for name, its in bases.items() if not its & own]


def first_imports() -> dict[str, set[str]]:
    """Return the modules of the package that each imports when it is first imported itself."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in python_sources()
    }
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        found[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= (names & modules.keys()) or {node.module}
        found[name].discard(name)
    return found


def test_no_module_imports_itself_through_others() -> None:
    graph = first_imports()
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # raises CycleError with the modules
