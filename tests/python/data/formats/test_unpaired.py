"""The rows that `--loss sft` reads, and the errors of preference losses for them."""

import json
from pathlib import Path
from typing import Any

import pytest

from logratio.data import FormatSettings
from logratio.data.formats import Decoder
from logratio.data.inspection import inspect
from logratio.data.records import InvalidRecordError, Source

HERE = Source("rows.jsonl", 1)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ALPACA: dict[str, Any] = {"instruction": "Add.", "input": "1 2", "output": "3"}
ROWS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "alpaca": (ALPACA, (user("Add.\n1 2"),), (says("3"),)),
    "alpaca without input": (ALPACA | {"input": ""}, (user("Add."),), (says("3"),)),
    "alpaca with system": (
        ALPACA | {"system": "s"},
        ({"role": "system", "content": "s"}, user("Add.\n1 2")),
        (says("3"),),
    ),
    "question and answer": ({"question": "q", "answer": "a"}, (user("q"),), (says("a"),)),
    "query and response": ({"query": "q", "response": "a"}, (user("q"),), (says("a"),)),
    "prompt and response": ({"prompt": "q", "response": "a"}, "q", "a"),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, "q", "a"),
    "chat": ({"messages": [user("q"), says("a")]}, (user("q"),), (says("a"),)),
}


@pytest.mark.parametrize("case", ROWS)
def test_answers_to_imitate_are_read(case: str) -> None:
    row, prompt, answer = ROWS[case]
    decoded = Decoder(FormatSettings(demonstrations=True)).decode(row, HERE)
    (record,) = decoded.records
    assert record.prompt == prompt
    assert [(one.role, one.answer) for one in record.completions] == [("demonstration", answer)]
    assert not decoded.extra_keys


@pytest.mark.parametrize("case", ROWS)
def test_a_loss_of_pairs_names_the_loss_that_reads_them(case: str) -> None:
    with pytest.raises(InvalidRecordError, match="train it with --loss sft"):
        Decoder().decode(ROWS[case][0], HERE)


def test_two_answers_are_not_a_demonstration() -> None:
    with pytest.raises(InvalidRecordError, match="E206"):
        Decoder(FormatSettings(demonstrations=True)).decode(ALPACA | {"answer": "4"}, HERE)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ALPACA, "reads 2 of 2 rows: the answer; preference losses cannot use it"),
        (ROWS["chat"][0], "reads 2 of 2 rows: every answer of the chat; preference losses"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "reads 2 of 2 rows: the better answer\n"),
        (
            {"question": "q", "answers": ["a", "b"], "scores": [1, 2]},
            "reads 2 of 2 rows: the best answer\n",
        ),
        ({"prompt": "q", "completion": "a", "label": True}, "reads none of these rows\n"),
    ],
    ids=["alpaca", "chat", "pair", "list", "thumb"],
)
def test_inspection_reports_imitation(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2)
    found = inspect([path])
    assert found.is_known
    assert f"  --loss sft {words}" in found.to_text()
