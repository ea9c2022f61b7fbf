"""The repository as the tests of the house see it: its root, its tracked files, its manifests."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "logratio"


def tracked() -> list[str]:
    """Paths of the files that git tracks and that are there, relative to the root."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def manifest(name: str) -> dict[str, Any]:
    """Read pyproject.toml or Cargo.toml."""
    return tomllib.loads((ROOT / name).read_text())


def python_sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def rust_sources() -> list[Path]:
    """Every Rust file of the crate, its tests and benches left out."""
    return sorted((ROOT / "rust").rglob("*.rs"))


def relative(path: Path) -> str:
    """Spell `path` as the repository does; good as a test's id."""
    return path.relative_to(ROOT).as_posix()
