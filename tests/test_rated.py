"""Two answers with a score each: WebGPT's comparisons."""

from typing import Any

import pytest

from logratio.data.formats import Decoder
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


def test_a_score_that_is_no_number() -> None:
    with pytest.raises(InvalidRecordError, match="E212"):
        Decoder().decode(web_gpt(0, 1) | {"score_1": "high"}, HERE)


def test_a_label_beside_the_scores_decides() -> None:
    row = {"question": "q", "answer_a": "x", "answer_b": "y", "score_a": 1, "score_b": 2}
    assert Decoder().decode(row, HERE).format == "rated"
    with pytest.raises(InvalidRecordError, match="E209"):
        Decoder().decode(row | {"preference": "1"}, HERE)
