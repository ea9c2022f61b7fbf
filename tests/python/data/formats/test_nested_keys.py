"""`--columns prompt=info.post`: paths into objects and lists."""

import json
from typing import Any

import pytest

from logratio.data import PreferenceRecord
from logratio.data.formats import Decoder, FormatSettings
from logratio.data.formats.row import ABSENT, value_at
from logratio.data.records import InvalidRecordError, Source

HERE = Source("rows", 1)
ROW: dict[str, Any] = {
    "info": {"post": "a post", "title": "t"},
    "summaries": [{"text": "short"}, {"text": "shorter", "note": None}],
    "choice": 1,
    "a.b": "literal",
    "a": {"b": "inner"},
    "spelled": json.dumps({"deep": ["x", {"y": "z"}]}),
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("info.post", "a post"),
        ("summaries.1.text", "shorter"),
        ("summaries.1.note", None),
        ("a.b", "literal"),
        ("spelled.deep.1.y", "z"),
        ("summaries.2.text", ABSENT),
        ("summaries.text", ABSENT),
        ("info.nothing", ABSENT),
        ("nothing.at.all", ABSENT),
        ("choice.0", ABSENT),
        ("info.", ABSENT),
    ],
)
def test_a_path_finds_its_value(key: str, value: Any) -> None:
    assert value_at(ROW, key) is value or value_at(ROW, key) == value


def decode(**settings: Any) -> tuple[PreferenceRecord, tuple[str, ...]]:
    decoded = Decoder(FormatSettings(**settings)).decode(ROW, HERE)
    (record,) = decoded.records
    return record, decoded.extra_keys


def test_summarize_from_feedback_is_read_by_paths() -> None:
    record, extra = decode(
        columns={
            "question": "info.post",
            "output_1": "summaries.0.text",
            "output_2": "summaries.1.text",
        },
        label="choice: 0=output_1 1=output_2",
    )
    assert record.prompt == ({"role": "user", "content": "a post"},)
    answers = [completion.answer[0]["content"] for completion in record.completions]  # type: ignore[index]
    assert answers == ["shorter", "short"]
    assert set(extra) == {"a.b", "a", "spelled"}


def test_a_path_that_leads_nowhere_is_named() -> None:
    columns = {"prompt": "info.post", "chosen": "summaries.0.text", "rejected": "summaries.7.text"}
    with pytest.raises(InvalidRecordError, match=r"summaries\.7\.text"):
        decode(columns=columns)
