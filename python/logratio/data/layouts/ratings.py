"""Rows of one answer and its rating: those with one prompt have to come together."""

from typing import Any

from logratio.data.layouts.values import Row, is_number

_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_QUESTIONS = ("prompt", "question", "instruction", "query")
_ANSWERS = ("response", "completion", "output", "answer")
_RATINGS = ("score", "reward", "rank", "rating", _HELPSTEER[0])


def looks_rated(row: Row) -> str:
    """Say with which flags rows of one answer and its rating are read.

    Returns:
        The end of a sentence; empty where the row is none of these.
    """
    question, answer = _first(row, _QUESTIONS), _first(row, _ANSWERS)
    rating = next((name for name in _RATINGS if _is_rating(row.get(name))), None)
    if question is None or answer is None or rating is None:
        return ""
    title = "HelpSteer2's ratings" if all(n in row for n in _HELPSTEER) else "one rated answer"
    flags = f"--score {rating}"
    if not isinstance(row[answer], list):
        flags = f"--group-by {question} {flags}"
    return f"; this looks like {title}: {flags}"


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _is_rating(value: Any) -> bool:
    return any(map(is_number, value)) if isinstance(value, list) else is_number(value)
