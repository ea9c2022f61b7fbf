"""Rules for the source tree: names and sizes of files, and forbidden constructs."""

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT, manifest, python_sources, relative, rust_sources, tracked

TOP_LEVEL = {
    *("Cargo.toml", "Cargo.lock", "pyproject.toml", "Makefile", ".gitignore", ".ci"),
    ".github",
    *("README.md", "CHANGELOG.md", "LICENSE", "rust", "python", "tests", "benches"),
}
VAGUE = {"utils", "util", "helpers", "common", "misc", "shared_code"}
HOSTS = re.compile(r"\b(pypi|pythonhosted|debian)\.org\b|\b(static|index)\.crates\.io\b")
MACHINE_PATHS = re.compile(r"(?<![\w.:/])/(home|root|Users|work|mnt)/")
PICKLES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
RISKY_CALLS = {
    *("eval", "exec", "torch.load", "np.load", "numpy.load", "os.system", "yaml.load"),
    *("torch.hub.load", "importlib.reload"),
}


def test_top_level_is_fixed() -> None:
    assert {name.split("/")[0] for name in tracked()} == TOP_LEVEL


def test_file_names_are_specific() -> None:
    assert not [name for name in tracked() if set(Path(name).with_suffix("").parts) & VAGUE]


@pytest.mark.parametrize("path", python_sources(), ids=relative)
def test_python_file_and_its_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 600, "is it still one idea?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.body[0].lineno < 60, node.name


@pytest.mark.parametrize("path", rust_sources(), ids=relative)
def test_rust_files_are_short_and_keep_python_apart(path: Path) -> None:
    code = path.read_text().split("\n#[cfg(test)]\nmod tests {")[0]
    assert code.count("\n") <= 600, "is it still one idea?"
    spoken = re.sub(r"//.*", "", code)
    if relative(path) != "rust/mmap.rs":
        assert not re.search(r"\bunsafe\b|\bunsafe_code\b", spoken)
    if not relative(path).startswith("rust/python"):
        assert not re.search(r"\b(pyo3|numpy)\b", spoken)


def test_unsafe_code_is_denied_except_for_the_memory_map() -> None:
    assert manifest("Cargo.toml")["lints"]["rust"]["unsafe_code"] == "deny"
    assert "unsafe_code" in (ROOT / "rust/mmap.rs").read_text()


def test_cargo_runs_every_rust_test() -> None:
    listed = {test["path"] for test in manifest("Cargo.toml")["test"]}
    assert listed == {relative(path) for path in (ROOT / "tests" / "rust").glob("*.rs")}


def test_no_file_contains_a_registry_or_a_machines_path() -> None:
    found = []
    for name in tracked():
        if name == "Cargo.lock":  # cargo writes the address of its registry
            continue
        text = (ROOT / name).read_text(errors="ignore")
        text = text.replace("/mnt/models", "")  # where KServe puts a model in every container
        found += [(name, hit.group()) for hit in HOSTS.finditer(text)]
        found += [(name, hit.group()) for hit in MACHINE_PATHS.finditer(text)]
    assert not found


def risks(source: str) -> Iterator[str]:
    """Return the constructs in `source` that can run code from data, or hide what they run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in RISKY_CALLS:
            yield ast.unparse(node.func)
        elif isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "shell"}:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.arg
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.arg


@pytest.mark.parametrize("path", python_sources(), ids=relative)
def test_data_is_never_executed(path: Path) -> None:
    assert not list(risks(path.read_text()))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from dill.source import x", ["dill.source"]),
        ("torch.load(path, weights_only=True)", ["torch.load"]),
        ("eval(text)", ["eval"]),
        ("model.eval()", []),
        ("load(path, trust_remote_code=True)", ["trust_remote_code"]),
        ("load(path, trust_remote_code=flag)", ["trust_remote_code"]),
        ("load(path, trust_remote_code=False)", []),
    ],
)
def test_a_risk_is_detected(source: str, found: list[str]) -> None:
    assert list(risks(source)) == found


@pytest.mark.parametrize("path", python_sources(), ids=relative)
def test_names_spell_out_the_reference(path: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                names.add(name)
    assert not [name for name in names if name.startswith("ref_")]


def test_the_package_contains_only_sources_stubs_and_the_page() -> None:
    inside = [name for name in tracked() if name.startswith(f"{relative(PACKAGE)}/")]
    assert {Path(name).suffix for name in inside} <= {".html", ".py", ".pyi", ".typed"}


def run_make(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the Makefile in an empty folder."""
    make = shutil.which("make")
    assert make, "make is not installed"
    shutil.copy(ROOT / "Makefile", folder)
    return subprocess.run(
        [make, "-C", str(folder), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_names_the_required_python(tmp_path: Path) -> None:
    done = run_make(".venv/created", "PYTHON=no-such-python", folder=tmp_path)
    assert done.returncode != 0
    assert "logratio needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_reports_missing_rust(tmp_path: Path) -> None:
    done = run_make(".venv/created", folder=tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "logratio needs Rust" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_fails_without_the_shared_material(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / ".ci" / "run")],
        env=os.environ | {"LOGRATIO_SHARED": str(tmp_path / "absent")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "CI needs the shared data and models" in done.stderr
    assert not done.stdout
