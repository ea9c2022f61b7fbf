"""The error message of a missing extra."""

import json
import sys
from pathlib import Path

import pytest
from repository import manifest

from logratio.extras import WITHOUT_CPU_VARIANT, MissingExtraError, require


def test_present_module_is_imported() -> None:
    assert require("json", "serve") is json


def test_missing_module_names_both_kinds_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtraError) as caught:
        require("fastapi", "serve")
    assert "fastapi is not installed" in str(caught.value)
    assert "pip install 'logratio[serve]'" in str(caught.value)
    assert "'logratio[serve-cpu]'" in str(caught.value)
    assert caught.value.name == "fastapi"


@pytest.mark.parametrize("extra", sorted(WITHOUT_CPU_VARIANT))
def test_an_extra_without_a_cpu_variant(extra: str) -> None:
    extras = manifest("pyproject.toml")["project"]["optional-dependencies"]
    assert extra in extras and f"{extra}-cpu" not in extras
    with pytest.raises(MissingExtraError, match=rf"pip install 'logratio\[{extra}\]'$"):
        require("absent_library", extra)


def test_missing_submodule_counts_as_its_library() -> None:
    with pytest.raises(MissingExtraError, match=r"^absent_library is not installed"):
        require("absent_library.inner", "rank")


def test_a_missing_dependency_of_a_library_is_reported_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import absent_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_library'") as caught:
        require("half_installed", "rank")
    assert not isinstance(caught.value, MissingExtraError)
