"""Answers with a score each: WebGPT's comparisons, PPE's best of k."""

from typing import Any

import pytest

from logratio.data.formats import Decoder, FormatSettings
from logratio.data.records import InvalidRecordError, Source

HERE = Source("rows.jsonl", 1)


def web_gpt(first: float, second: float) -> dict[str, Any]:
    return {
        "question": {"dataset": "eli5", "id": "1", "full_text": "why?"},
        "quotes_0": {"title": ["t"], "extract": ["e"]},
        "answer_0": "a",
        "tokens_0": {"prefix": [1], "completion": [2]},
        "score_0": first,
        "quotes_1": {"title": ["t"], "extract": ["e"]},
        "answer_1": "b",
        "tokens_1": {"prefix": [1], "completion": [2]},
        "score_1": second,
    }


@pytest.mark.parametrize(("scores", "winner"), [((0.5, -0.5), "a"), ((-1.0, 1.0), "b")])
def test_the_higher_score_wins(scores: tuple[float, float], winner: str) -> None:
    decoded = Decoder().decode(web_gpt(*scores), HERE)
    (record,) = decoded.records
    assert decoded.format == "rated"
    assert record.prompt == ({"role": "user", "content": "why?"},)
    assert record.completions[0].role == "chosen"
    assert record.completions[0].answer == ({"role": "assistant", "content": winner},)


def test_equal_scores_are_a_tie() -> None:
    with pytest.raises(InvalidRecordError, match="R310"):
        Decoder().decode(web_gpt(0, 0), HERE)


def test_a_score_that_is_not_a_number() -> None:
    with pytest.raises(InvalidRecordError, match="E212"):
        Decoder().decode(web_gpt(0, 1) | {"score_1": "high"}, HERE)


def test_a_label_overrides_scores() -> None:
    row = {"question": "q", "answer_a": "x", "answer_b": "y", "score_a": 1, "score_b": 2}
    assert Decoder().decode(row, HERE).format == "rated"
    with pytest.raises(InvalidRecordError, match="E209"):
        Decoder().decode(row | {"preference": "1"}, HERE)


def best_of_k(*scores: Any, **more: Any) -> dict[str, Any]:
    """A row of PPE: it has the bare question and the prompt that was sampled from."""
    count = len(scores)
    return {
        "question_id": "1",
        "question": "bare",
        "model_name": "m",
        "parsed_outputs": ["A"] * count,
        "scores": list(scores),
        "mean_score": 0.5,
        "prompt": "q",
        **{f"response_{number}": f"r{number}" for number in range(1, count + 1)},
        "conflict_pairs": [[0, 1]],
    } | more


def sides(row: dict[str, Any], **settings: Any) -> list[tuple[Any, ...]]:
    decoded = Decoder(FormatSettings(**settings)).decode(row, HERE)
    assert decoded.format == "best-of-k"
    assert {record.prompt for record in decoded.records} == {"q"}
    return [tuple(one.answer for one in record.completions) for record in decoded.records]


def test_best_of_k_is_every_right_answer_against_every_wrong_one() -> None:
    row = best_of_k(True, False, True, *[False] * 9)
    pairs = sides(row)
    assert sorted(pairs) == sorted(
        (f"r{good}", f"r{bad}") for good in (1, 3) for bad in (2, *range(4, 13))
    )
    assert sides(row, lists="best_worst") == [("r1", "r2")]
    assert not Decoder().decode(row, HERE).left_out


def test_scores_that_are_numbers_may_tie() -> None:
    decoded = Decoder().decode(best_of_k(0.5, 1, 0.5), HERE)
    assert [one.answer for one in decoded.records[0].completions] == ["r2", "r1"]
    assert (len(decoded.records), decoded.left_out) == (2, ("R310",))
    with pytest.raises(InvalidRecordError, match="R310"):
        Decoder().decode(best_of_k(True, True), HERE)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (best_of_k(True, False, scores=[True]), "E212"),
        (best_of_k(True, False, response_4="r4"), "E212"),
        (best_of_k(True, None), "E212"),
        (best_of_k(True, False, response_2=None), "E202"),
        (best_of_k(True, False, prompt=None, question=None), "E202"),
    ],
)
def test_answers_and_scores_must_match_in_number(row: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRecordError) as caught:
        Decoder().decode(row, HERE)
    assert caught.value.code == code
