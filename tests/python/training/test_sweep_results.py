"""Rows of a sweep survive a crash, and the choice follows its rule."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from logratio.training.sweep_results import (
    SweepResult,
    SweepRow,
    append_row,
    choose,
    draw,
    read_rows,
    try_to_draw,
)


def row(name: str, accuracy: float, kl: float | None = None, pairs: int = 100) -> SweepRow:
    estimate = None if kl is None else {"nats": kl, "standard_error": 0.1}
    return SweepRow(
        name, "dpo", 0.1, 1e-6, 0, evaluation={"accuracy": accuracy, "pairs": pairs, "kl": estimate}
    )


def failed(name: str) -> SweepRow:
    return SweepRow(name, "dpo", 0.1, 1e-6, 0, failed="NonFiniteError: loss is nan")


@pytest.mark.parametrize(
    ("rows", "budget", "best", "reason"),
    [
        ([row("a", 0.9, 5), row("b", 0.6, 1)], None, "a", "the highest accuracy"),
        ([row("a", 0.9, 5), row("b", 0.6, 1)], 2.0, "b", "at most 2 nats"),
        ([row("a", 0.9, 5), row("b", 0.6, 1)], 5.0, "a", "at most 5 nats"),
        ([row("a", 0.9, 5), row("b", 0.88, 1)], None, "b", "the lowest KL of 2 runs within one"),
        ([row("a", 1.0, 5), row("b", 0.995, 1)], None, "b", "lowest KL"),  # error above 0 at 1
        ([row("a", 0.9, 5, 10**6), row("b", 0.88, 1, 10**6)], None, "a", "the highest accuracy"),
        ([row("a", 0.9), row("b", 0.89)], None, "a", "without a KL"),
        ([row("a", 0.9), row("b", 0.6, 1)], 2.0, "b", "the highest accuracy"),  # a: KL unknown
        ([failed("a"), row("b", 0.6, 1)], None, "b", "the highest accuracy"),
        ([row("a", 0.9, 5)], 1.0, None, "no run with a KL of at most 1 nats has finished"),
        ([failed("a")], 1.0, None, "no run has finished"),
    ],
)
def test_the_choice(
    rows: list[SweepRow], budget: float | None, best: str | None, reason: str
) -> None:
    chosen, why = choose(rows, budget)
    assert (chosen.name if chosen else None) == best
    assert reason in why


def test_the_standard_error_is_that_of_a_binomial_share() -> None:
    found = row("a", 0.7, pairs=10_000).accuracy_error
    assert found == pytest.approx(math.sqrt(0.7 * 0.3 / 10_000), rel=1e-3)


def test_rows_are_read_as_written_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    assert read_rows(path) == {}
    rows = [failed("a"), row("b", 0.5, 1.0), row("a", 0.6, 2.0)]
    for one in rows:
        append_row(path, one)
    assert read_rows(path) == {"a": rows[2], "b": rows[1]}


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_line_cut_off_by_a_crash_is_replaced(tmp_path: Path, length: int) -> None:
    path = tmp_path / "sweep.jsonl"
    append_row(path, row("a", 0.5))
    line = json.dumps(dataclasses.asdict(row("b", 0.6)))
    with path.open("a") as file:
        file.write(line[:length])
    assert read_rows(path) == {"a": row("a", 0.5)}
    append_row(path, row("c", 0.7))
    assert read_rows(path) == {"a": row("a", 0.5), "c": row("c", 0.7)}


def result(folder: Path) -> SweepResult:
    rows = [row("a", 0.7, 1.0), failed("b"), row("c", 0.9, 3.0), row("d", 0.5)]
    return SweepResult(folder, rows, *choose(rows, 2.0))


def test_runs_are_ranked_by_accuracy(tmp_path: Path) -> None:
    assert [one.name for one in result(tmp_path).ranked] == ["c", "a", "d", "b"]
    assert repr(result(tmp_path)) == f"SweepResult('{tmp_path}', 4 runs, best a)"


def test_the_picture_shows_finished_runs_with_a_kl(tmp_path: Path) -> None:
    draw(result(tmp_path), 2.0, tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text()
    for shown in ("2 runs", "KL budget", "chosen", "held-out accuracy"):
        assert shown in text
    draw(result(tmp_path), 2.0, tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text() == text


def test_a_picture_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.svg").mkdir()
    assert try_to_draw(result(tmp_path), None) is None
    assert "no picture was drawn" in capsys.readouterr().err

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("logratio.extras.importlib.import_module", missing)
    assert try_to_draw(result(tmp_path), None) is None
    assert "pip install 'logratio[plots]'" in capsys.readouterr().err
