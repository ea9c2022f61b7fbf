"""`logratio methods` is legible in a terminal of 80 columns."""

import json

import pytest
from conftest import Run

from logratio.training.methods.table import METHODS, MIXTURES


def test_the_table_fits_80_columns_and_cuts_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("methods")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    shown = {line.split()[0].rstrip(":") for line in lines if line.strip()}
    assert shown >= {*METHODS, *MIXTURES}
    for method in METHODS.values():
        for name, option in method.options.items():
            assert f"{name}={option.default:g}" in out
    assert "logratio methods METHOD" in out


def test_what_the_table_leaves_out_is_shown_for_one_method_and_as_json(run: Run) -> None:
    _, out, _ = run("methods", "kto")
    assert "paper: arXiv 2402.01306" in out
    assert "initial value: 0.5" in out
    assert "desirable_weight: λ_D; above 0, default 1" in out
    every = json.loads(run("methods", "--json")[1])
    assert every.keys() == METHODS.keys()
    assert all({"paper", "initial_value", "formula"} <= one.keys() for one in every.values())
