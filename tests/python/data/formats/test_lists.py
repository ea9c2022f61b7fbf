"""Which score ranks a list: UltraFeedback's original rows have seven scores."""

from typing import Any

import pytest

from logratio.data.formats import Decoder, FormatSettings
from logratio.data.inspection import inspect
from logratio.data.records import InvalidRecordError, Source

HERE = Source("rows.jsonl", 1)


def answer(text: str, overall: float, fine: float, helpful: str, honest: str) -> dict[str, Any]:
    return {
        "annotations": {
            "helpfulness": {"Rating": helpful, "Rationale": "r"},
            "honesty": {"Rating": honest, "Rationale": "r"},
        },
        "custom_system_prompt": "s",
        "model": "m",
        "response": text,
        "critique": "c",
        "fine-grained_score": fine,
        "overall_score": overall,
    }


def original() -> dict[str, Any]:
    """A row of the original UltraFeedback: every score gives another order."""
    completions = [answer("a", 8, 2.5, "5", "1"), answer("b", 3, 4.5, "3", "5")]
    return {"source": "s", "instruction": "q", "models": ["m", "n"], "completions": completions}


def best(row: dict[str, Any], **settings: Any) -> str:
    (record,) = Decoder(FormatSettings(**settings)).decode(row, HERE).records
    return str(record.completions[0].answer)


def test_the_score_that_was_used_and_the_others_are_named() -> None:
    (warning,) = Decoder().decode(original(), HERE).warnings
    assert warning == "W525"
    assert warning.what == (  # type: ignore[attr-defined]
        "ranked by 'overall_score'; --score NAME ranks by another: annotations.helpfulness.Rating, "
        "annotations.honesty.Rating, fine-grained_score"
    )


@pytest.mark.parametrize(
    ("score", "winner"),
    [
        ("overall_score", "a"),
        ("fine-grained_score", "b"),
        ("annotations.helpfulness.Rating", "a"),
        ("annotations.honesty.Rating", "b"),
    ],
)
def test_each_score_can_be_chosen(score: str, winner: str) -> None:
    assert f"'content': '{winner}'" in best(original(), score=score)
    assert not Decoder(FormatSettings(score=score)).decode(original(), HERE).warnings


def test_ratings_alone_are_no_choice_of_ours() -> None:
    row = original()
    for item in row["completions"]:
        del item["overall_score"]
        del item["fine-grained_score"]
    with pytest.raises(
        InvalidRecordError, match=r"choose --score annotations\.helpfulness\.Rating or"
    ):
        Decoder().decode(row, HERE)
    assert "'content': 'b'" in best(row, score="annotations.honesty.Rating")


def test_an_answer_without_that_score_is_named() -> None:
    row = original()
    row["completions"][1]["annotations"]["honesty"]["Rating"] = "N/A"
    with pytest.raises(InvalidRecordError, match=r"E212.*answer 2 of 'completions' has no number"):
        best(row, score="annotations.honesty.Rating")


def test_lists_of_scores_parallel_to_answers() -> None:
    row = {"question": "q", "answers": ["a", "b"], "ranks": [1, 2], "rewards": [0.1, 0.9]}
    (warning,) = Decoder().decode(row, HERE).warnings
    assert "ranked by 'ranks'; --score NAME ranks by another: rewards" in warning.what  # type: ignore[attr-defined]
    assert "'content': 'a'" in best(row)
    assert "'content': 'b'" in best(row, score="rewards")


def test_a_single_score_needs_no_warning() -> None:
    row = {"question": "q", "answers": ["a", "b"], "scores": [1, 2]}
    assert not Decoder().decode(row, HERE).warnings


def test_inspection_tells_it() -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist([original()] * 2)
    printed = inspect([table]).to_text()
    assert (
        "[W525] 2 × a list that another score could also rank: ranked by 'overall_score'" in printed
    )
