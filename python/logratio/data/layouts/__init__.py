"""Named functions that convert layouts in which a row is not one record.

`FormatSettings.rows` and ``--rows`` take these names. The formats read the converted rows like any
other. A part that a function leaves out is yielded as an `InvalidRecordError` and counted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from logratio.data.layouts import annotations, public_sets
from logratio.data.layouts.values import Part, Row, is_number, take
from logratio.data.readers.json import HOLDERS

_SUMMARIES = (
    "--columns prompt=info.{text},output_1=summaries.0.text,output_2=summaries.1.text "
    "--label 'choice: 0=output_1 1=output_2'"
)
_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_QUESTIONS = ("prompt", "question", "instruction", "query")
_ANSWERS = ("response", "completion", "output", "answer")
_RATINGS = ("score", "reward", "rank", "rating", _HELPSTEER[0])


def looks_candidates(row: Row) -> bool:
    """Return whether a row has a prompt and a list of candidates, as for `logratio rank`."""
    texts = row.get("candidates")
    if "prompt" not in row or not isinstance(texts, list) or not texts:
        return False
    return all(isinstance(text, str) for text in texts)


def candidates(row: Row) -> Iterator[Part]:
    """Yield each candidate as an answer to the prompt, for `logratio precompute`.

    The label has no meaning: the cache has the log-probs of answers, not their labels.

    Raises:
        InvalidRecordError: E201 or E203 if there is no list of candidates.
    """
    texts: list[Any] = take(row, "candidates", list)
    for text in texts:
        yield {"prompt": row.get("prompt"), "completion": text, "label": True}


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of rows.

    Attributes:
        title: Its usual name.
        looks: Returns whether the keys of a row match the layout.
        function: Converts one row to rows and errors.
        flags: Recommended flags besides ``--rows``.
    """

    title: str
    looks: Callable[[Row], bool]
    function: Callable[[Row], Iterator[Part]]
    flags: str = ""


LAYOUTS: Mapping[str, Layout] = {
    "argilla": Layout("Argilla's records", annotations.looks_argilla, annotations.argilla),
    "candidates": Layout("candidates to rank", looks_candidates, candidates),
    "label-studio": Layout(
        "Label Studio's export", annotations.looks_label_studio, annotations.label_studio
    ),
    "math-shepherd": Layout(
        "Math-Shepherd",
        public_sets.looks_math_shepherd,
        public_sets.math_shepherd,
        "--group-by question",
    ),
    "oasst": Layout("OASST's trees", public_sets.looks_oasst, public_sets.oasst),
    "prm800k": Layout("PRM800K", public_sets.looks_prm800k, public_sets.prm800k),
}


def advice(row: Row) -> str:
    """Suggest flags for a row that no format recognises.

    Returns:
        The end of a sentence, or "" if the row matches no layout.
    """
    for name, layout in LAYOUTS.items():
        if layout.looks(row):
            flags = " ".join(filter(None, (f"--rows {name}", layout.flags)))
            return f"; this looks like {layout.title}: {flags}"
    return _summaries(row) or _rated(row) or _around_rows(row)


def _summaries(row: Row) -> str:
    """Suggest flags for summarize_from_feedback's comparisons of posts or articles."""
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(info, dict) or not isinstance(summaries, list) or "choice" not in row:
        return ""
    text = next((key for key in ("post", "article") if info.get(key)), "post")
    return f"; this looks like summarize_from_feedback: {_SUMMARIES.format(text=text)}"


def _rated(row: Row) -> str:
    """Suggest flags for rows that each hold one rated answer.

    Returns:
        The end of a sentence, or "" for other rows.
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


def _around_rows(row: Row) -> str:
    """Suggest a command for an object around a list of rows that has other keys as well."""
    found = [name for name in HOLDERS if _are_objects(row.get(name))]
    if len(found) != 1:
        return ""
    return (
        f"; its rows seem to be in the list `{found[0]}`, but an object around a list of rows must "
        f"have no other key: write the rows to a file of their own, as with `jq -c '.{found[0]}[]'`"
    )


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _is_rating(value: Any) -> bool:
    return any(map(is_number, value)) if isinstance(value, list) else is_number(value)
