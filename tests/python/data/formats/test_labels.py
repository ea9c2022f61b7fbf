"""The meaning of a label's values; no meaning is suggested that the values do not name."""

import re
import shlex
from typing import Any

import pytest
from chats_for_tests import assistant, user

from logratio.data.formats import Decoder, FormatSettings, FormatSettingsError, Label, detect
from logratio.data.records import InvalidRecordError, Source

Row = dict[str, Any]
HERE = Source("f", 1)


def winner(row: Row, label: str | None = None) -> str:
    """Return the answer that training would prefer, or the code of the refusal."""
    try:
        decoded = Decoder(FormatSettings(label=label)).decode(row, HERE)
    except InvalidRecordError as error:
        return error.code
    (record,) = decoded.records
    answer = record.completions[0].answer
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def flags(reason: str) -> list[str]:
    """Return the labels that a sentence suggests, parsed as by a shell."""
    words = shlex.split(reason.replace("`", ""))
    return [words[at + 1] for at, word in enumerate(words) if word == "--label"]


VALUES = [
    ("vote: <0=a >0=b 0=tie", -3, "good a"),
    ("vote: <0=a >0=b 0=tie", "2", "good b"),
    ("vote: <0=a >0=b 0=tie", 0, "R310"),
    ("vote: -3..-1=a 0=tie 1..3=b", -1, "good a"),
    ("vote: -3..-1=a 0=tie 1..3=b", 0.0, "R310"),
    ("vote: -3..-1=a 0=tie 1..3=b", 4, "E212"),
    ("vote: -3..-1=a 0=tie 1..3=b", 0.5, "E212"),
    ("vote: <=2=a 3=tie >=4=b", 2, "good a"),
    ("vote: <=2=a 3=tie >=4=b", 4, "good b"),
    ("vote: 1..3=a 2=tie >3=b", 2, "R310"),
    ("vote: A=a B=b", "B", "good b"),
    ("vote: A=a B=b", " b ", "good b"),
    ("vote: A=a B=b", "C", "E212"),
    ("vote: A=a B=b", ["A"], "good a"),
    ("vote: A=a B=b", ["A", "B", "B"], "good b"),
    ("vote: A=a B=b", ["A", "B"], "R310"),
    ("vote: A=a B=b", ["A", "C"], "E212"),
    ("vote: A=a B=b", [], "E212"),
    ("vote: [1,0]=a [0,1]=b", [0, 1], "good b"),
    ('vote: "[1, 0]"=a "[0, 1]"=b', [1, 0], "good a"),
    ("vote: true=a false=b", False, "good b"),
]


@pytest.mark.parametrize(("label", "value", "expected"), VALUES)
def test_values_ranges_votes_and_one_hot_lists(label: str, value: Any, expected: str) -> None:
    assert winner({"prompt": "u", "a": "good a", "b": "good b", "vote": value}, label) == expected


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("vote: <0=a >-1=b", "overlap"),
        ("vote: 1..3=a 3..5=b", "overlap"),
        ("vote: 3..1=a 4=b", "is empty"),
        ("vote: 1=a 1=b", "two meanings"),
        ("*_*: 1=a 2=b", "write it as"),
    ],
)
def test_labels_that_contradict_themselves(label: str, words: str) -> None:
    with pytest.raises(FormatSettingsError, match=words):
        Label.parse(label)
    assert Label.parse("vote: 1..3=a >3=b").meaning(3.5) == "b"


HOT: Row = {"prompt": "u", "response_a": "good a", "response_b": "good b"}


def hot(first: Any, second: Any, tie: Any) -> Row:
    return HOT | {"winner_a": first, "winner_b": second, "winner_tie": tie}


def test_one_hot_columns() -> None:
    label = "winner_*: a=response_a b=response_b tie=tie"
    assert winner(hot(1, 0, 0), label) == "good a"
    assert winner(hot("0", "1.0", ""), label) == "good b"
    assert winner(hot(False, False, True), label) == "R310"
    assert winner(hot(1, 1, 0), label) == "E212"
    assert winner(hot(0, 0, 0), label) == "E212"
    assert winner(hot(0, 7, 0), label) == "E212"
    found = detect([hot(1, 0, 0), hot(0, 1, 0), hot(0, 0, 1)])
    assert flags(found.reason) == [label]
    read = Decoder(FormatSettings(label=label)).decode(hot(1, 0, 0) | {"id": 3}, HERE)
    assert read.extra_keys == ("id",)


UNSURE: dict[str, tuple[tuple[str, str], list[Any]]] = {
    "a signed scale": (("response1", "response2"), [-2, 3, 0]),
    "only positive": (("response1", "response2"), [-1]),
    "one number": (("output_1", "output_2"), [1]),
    "from zero": (("output_1", "output_2"), [1, 0]),
    "a third": (("output_1", "output_2"), [0, 1, 2]),
    "letters by number": (("response_A", "response_B"), [1, 0]),
    "letters from one": (("response_A", "response_B"), [1, 2]),
    "booleans": (("response_a", "response_b"), [True, False]),
    "words": (("response_a", "response_b"), ["yes", "no"]),
    "a scale of five": (("response_a", "response_b"), [1, 5, 3]),
    "a scale of six": (("response_a", "response_b"), [1, 6]),
}


@pytest.mark.parametrize("case", UNSURE)
def test_no_meaning_is_suggested_that_the_values_do_not_carry(case: str) -> None:
    names, values = UNSURE[case]
    rows = [{"prompt": "u", names[0]: "1", names[1]: "2", "preference": v} for v in values]
    found = detect(rows)
    assert "do not name the better output" in found.reason
    offered = flags(found.reason)
    assert len(offered) >= 2
    better = []
    for flag in offered:  # each reads every row, but they prefer different answers
        assert not [r for r in detect(rows, FormatSettings(label=flag)).refused if r[1] == "E"]
        better.append([winner(row, flag) for row in rows])
    assert len({tuple(one) for one in better}) >= 2


def test_an_unknown_label_gets_a_template_flag() -> None:
    rows = [{"prompt": "u", "x_a": "1", "x_b": "2", "label": value} for value in "pqr"]
    reason = detect(rows).reason
    assert flags(reason) == ["label: VALUE=x_a OTHER=x_b THIRD=tie"]


def test_a_label_under_another_name_is_found() -> None:
    rows = [
        {"prompt": "u", "x_a": "1", "x_b": "2", "human_verdict": value, "note": "n"}
        for value in ("a", "b")
    ]
    assert flags(detect(rows).reason) == ["human_verdict: a=x_a b=x_b"]


def test_rows_that_the_flag_cannot_read_are_reported() -> None:
    rows = [{"x_a": "1", "x_b": "2", "label": value} for value in "ab"]
    assert re.search(r"cannot be read with it: \[E201\] the key 'prompt' is missing",
                     detect(rows).reason)  # fmt: skip


def test_a_label_with_an_unknown_key_suggests_the_nearest() -> None:
    row = {"prompt": "u", "response_a": "1", "response_b": "2", "winner": "a"}
    with pytest.raises(InvalidRecordError, match=r"E209.*'Winner'.*did you mean 'winner'"):
        Decoder(FormatSettings(label="Winner: a=response_a b=response_b")).decode(row, HERE)
    with pytest.raises(InvalidRecordError, match=r"E209.*'Response_A'.*did you mean 'response_a'"):
        Decoder(FormatSettings(label="winner: a=Response_A b=Response_B")).decode(row, HERE)


CHAT_A = [user("u"), assistant("good a")]
CHAT_B = [user("u"), assistant("good b")]
STEER3 = {"domain": "code", "language": "c", "context": [user("u")], "response1": "good a",
          "response2": "good b", "individual_preference": []}  # fmt: skip
STEER2 = {"split": "train", "prompt": "u", "response_1": "good a", "response_2": "good b",
          "preference_statement": "s", "preference_elaboration": "e"}  # fmt: skip
PPE = {"question_id": "1", "prompt": "u", "response_1": "good a", "response_2": "good b",
       "model_a": "x", "model_b": "y", "language": "English"}  # fmt: skip
ARENA = {"id": "1", "model_a": "x", "model_b": "y", "conversation_a": CHAT_A,
         "conversation_b": CHAT_B, "turn": 1}  # fmt: skip
PUBLISHED = [
    ("helpsteer3", STEER3, "overall_preference", [(-3, "good a"), (1, "good b"), (0, "R310")]),
    ("helpsteer2", STEER2, "preference_strength", [(-1, "good a"), (3, "good b"), (0, "R310")]),
    ("ppe", PPE, "winner", [("model_a", "good a"), ("model_b", "good b"), ("tie", "R310")]),
    ("arena-chat", ARENA, "winner", [("model_b", "good b"), ("both_bad", "R310"), ("x", "E212")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "key", "expected"), PUBLISHED)
def test_public_datasets_are_read_as_their_cards_define(
    name: str, row: Row, key: str, expected: list[tuple[Any, str]]
) -> None:
    for value, better in expected:
        assert winner(row | {key: value}) == better
    assert detect([row | {key: expected[0][0]}]).format == name
    label = f"{key}: <0=response_2 >0=response_1" if name == "helpsteer2" else None
    if label:
        assert winner(row | {key: -1}, label) == "good b"


@pytest.mark.parametrize(
    ("value", "meanings"),
    [
        (1, "1=good 0=bad"),
        (-1, "1=good -1=bad"),
        ("yes", "yes=good no=bad"),
        ("No", "Yes=good No=bad"),
        ("TRUE", "TRUE=good FALSE=bad"),
        ("fine", "fine=good …=bad"),
    ],
)
def test_advice_for_a_thumb_has_the_value_of_the_row(value: object, meanings: str) -> None:
    row = {"prompt": "p", "completion": "c", "label": value}
    with pytest.raises(InvalidRecordError, match="E209") as refused:
        Decoder(FormatSettings()).decode(row, HERE)
    assert f"--label 'label: {meanings}'" in str(refused.value)
    if "…" not in meanings:
        settings = FormatSettings(label=f"label: {meanings}")
        assert Decoder(settings).decode(row, HERE).records
