"""One good answer, or some, against several worse ones."""

from typing import Any

import pytest

from logratio.data.formats import Decoder, FormatSettings
from logratio.data.records import InvalidRecordError, PreferenceRecord, Source

HERE = Source("rows.jsonl", 1)
ROW: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}
REWARD_BENCH_2: dict[str, Any] = {
    "id": "1",
    "prompt": "q",
    "chosen": ["a", "b"],
    "rejected": ["c", "d", "e"],
    "num_correct": 2,
    "num_incorrect": 3,
    "total_completions": 5,
    "models": ["m"] * 5,
    "subset": "Ties",
}


def decode(row: dict[str, Any], **settings: Any) -> list[PreferenceRecord]:
    decoded = Decoder(FormatSettings(**settings)).decode(row, HERE)
    assert not decoded.left_out
    assert decoded.format == "several"
    return list(decoded.records)


def sides(records: list[PreferenceRecord]) -> list[tuple[Any, ...]]:
    return [tuple(completion.answer for completion in record.completions) for record in records]


def test_each_rejected_string_is_a_pair() -> None:
    records = decode(ROW)
    assert sides(records) == [("a", "b"), ("a", "c")]
    assert {record.prompt for record in records} == {"q"}


def test_best_and_worst_is_one_pair_and_a_group_holds_all() -> None:
    assert sides(decode(ROW, lists="best_worst")) == [("a", "b")]
    (group,) = decode(ROW, lists="groups")
    assert sides([group]) == [("a", "b", "c")]
    assert [side.score for side in group.completions] == [1, 0, 0]


def test_reward_bench_2() -> None:
    wanted = [(good, bad) for good in "ab" for bad in "cde"]
    assert sides(decode(REWARD_BENCH_2)) == wanted


def test_two_lists_that_nothing_counts_could_be_steps() -> None:
    row = {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}
    with pytest.raises(InvalidRecordError, match="E210"):
        decode(row)
    assert sides(decode(row, format="several")) == [("a", "b"), ("a", "c")]


def test_an_empty_and_an_equal_answer_are_left_out_and_counted() -> None:
    decoded = Decoder().decode(ROW | {"rejected": ["b", "", "a"]}, HERE)
    assert sides(list(decoded.records)) == [("a", "b")]
    assert decoded.left_out == ("R301", "R302")


def test_a_question_is_needed() -> None:
    with pytest.raises(InvalidRecordError, match="E201"):
        Decoder().decode({"chosen": "a", "rejected": ["b", "c"]}, HERE)


RM_BENCH = {
    "id": "1",
    "prompt": "q",
    "chosen": ["a", "b", "c"],
    "rejected": ["d", "e", "f"],
    "domain": "safety-refuse",
}


def test_rm_bench() -> None:
    assert sides(decode(RM_BENCH)) == [(good, bad) for good in "abc" for bad in "def"]
    assert sides(decode(RM_BENCH, lists="best_worst")) == [("a", "d")]


@pytest.mark.parametrize(
    "change",
    [
        {"domain": None},
        {"domain": 3},
        {"chosen": ["a", "b"]},
        {"rejected": ["d", "e", "f", "g"]},
        {"rejected": ["a", "e", "f"]},  # as solutions with one first step
    ],
)
def test_lists_similar_to_rm_bench_could_be_steps(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRecordError, match=r"--format prmbench.*--format several"):
        decode(RM_BENCH | change)


def test_steps_in_a_domain_stay_steps() -> None:
    row = RM_BENCH | {"first_diff": 0}
    assert Decoder().decode(row, HERE).format == "prmbench"
