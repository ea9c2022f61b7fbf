"""Chatbot Arena's 55k: conversations as JSON lists of turns, and one-hot columns."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from chats_for_tests import assistant, user

from logratio.data.formats import Decoder, FormatSettings, detect
from logratio.data.readers import open_inputs
from logratio.data.records import InvalidRecordError, PreferenceRecord, Source

HERE = Source("train.csv", 2)
Row = dict[str, Any]


def arena(asked: Any, first: Any, second: Any, winner: str = "model_a") -> Row:
    won = {f"winner_{name}": int(name == winner) for name in ("model_a", "model_b", "tie")}
    sides = {"prompt": asked, "response_a": first, "response_b": second}
    spelled = {name: json.dumps(turns) for name, turns in sides.items()}
    return {"id": 1, "model_a": "x", "model_b": "y", **spelled, **won}


def record(row: Row, **settings: Any) -> PreferenceRecord:
    (found,) = Decoder(FormatSettings(**settings)).decode(row, HERE).records
    return found


def code(row: Row, **settings: Any) -> str:
    with pytest.raises(InvalidRecordError) as caught:
        record(row, **settings)
    return caught.value.code


def test_the_last_answers_are_trained_after_each_models_history() -> None:
    found = record(arena(["a", "b"], ["c", "d"], ["e", "f"], "model_b"))
    assert found.prompt == (user("a"),)
    chosen, rejected = found.completions
    assert (chosen.context, chosen.answer) == ((assistant("e"), user("b")), (assistant("f"),))
    assert (rejected.context, rejected.answer) == ((assistant("c"), user("b")), (assistant("d"),))


def test_common_turns_of_both_models_are_the_prompt() -> None:
    found = record(arena(["a", "b"], ["c", "d"], ["c", "f"]))
    assert found.prompt == (user("a"), assistant("c"), user("b"))
    assert [one.answer for one in found.completions] == [(assistant("d"),), (assistant("f"),)]


def test_it_is_detected_by_its_columns_and_a_tie_is_refused() -> None:
    assert detect([arena(["a"], ["b"], ["c"])]).format == "arena-55k"
    assert code(arena(["a"], ["b"], ["c"], "tie")) == "R310"
    assert code(arena(["a"], ["b"], ["c"], "nobody")) == "E212"


def test_no_answer_is_an_empty_one() -> None:
    assert code(arena(["a"], ["b"], [None])) == "R301"
    found = record(arena(["a", "b"], [None, "d"], ["e", "f"]))
    assert found.completions[0].context == (assistant(""), user("b"))


def test_lists_that_no_string_spells_are_read_alike() -> None:
    row = arena(["a", "b"], ["c", "d"], ["e", "f"])
    plain = row | {name: json.loads(row[name]) for name in ("prompt", "response_a", "response_b")}
    assert record(plain) == record(row)
    spelled, listed = (Decoder().decode(one, HERE).warnings for one in (row, plain))
    assert (spelled, listed) == (("W522",), ())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"response_b": '["c", "d"]'}, "E403"),
        ({"response_b": "c"}, "E215"),
        ({"response_b": 3}, "E203"),
        ({"response_b": '["c'}, "E215"),
        ({"response_b": '["\\ud83d"]'}, "E104"),
        ({"response_a": None}, "E206"),
        ({"winner_tie": 2}, "E212"),
    ],
)
def test_mismatched_conversations_are_named(change: Row, expected: str) -> None:
    assert code(arena(["a"], ["b"], ["c"]) | change) == expected


def test_a_text_prompt_stays_text_also_by_flag() -> None:
    row = arena(["a"], ["b"], ["c"])
    plain = row | {"prompt": "a", "response_a": "b", "response_b": "c"}
    found = record(plain)
    assert (found.prompt, found.completions[0].answer) == ("a", "b")
    assert record(row, strings="text").completions[0].answer == '["b"]'
    decoder = Decoder()
    decoder.decode(row, HERE)
    with pytest.raises(InvalidRecordError, match=r"E204|E215"):
        decoder.decode(plain, HERE)


def test_a_given_label_reads_the_same_turns() -> None:
    row = arena(["a"], ["b"], ["c"])
    label = "winner_*: model_a=response_b model_b=response_a tie=tie"
    assert record(row, label=label).completions[0].answer == (assistant("c"),)


def test_as_a_csv_file(tmp_path: Path) -> None:
    rows = [arena(['say "a", b\n'], ["b"], ["c"]), arena(["a"], ["b"], ["c"], "model_b")]
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (opened,) = open_inputs(path)
    found = [record(row) for _, row in opened if isinstance(row, dict)]
    assert [one.completions[0].answer for one in found] == [(assistant("b"),), (assistant("c"),)]
    assert found[0].prompt == (user('say "a", b\n'),)
