"""Exports of the annotation tools Argilla and Label Studio.

Labels are added to the data under their question's name, as a list of votes if several people
answered. The formats and ``--label`` read them like any other label. A ranking becomes a list.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from logratio.data.layouts.values import Part, Row, checked, take
from logratio.data.records import InvalidRecordError

Votes = dict[str, list[Any]]
"""The answers of all people, by question."""

_MARK = re.compile(r"[_ -]?(\d+|[a-zA-Z])$")
_TEXTS = ("body", "html", "text", "title")  # of an item in a list of Label Studio
_KINDS = {"choices": "choices", "rating": "rating", "number": "number", "pairwise": "selected"}
"""The key of the chosen value in Label Studio, by the type of the result."""


def looks_argilla(row: Row) -> bool:
    """Return whether a row is a record of Argilla."""
    names = ("responses", "suggestions")
    return isinstance(row.get("fields"), dict) and any(name in row for name in names)


def argilla(row: Row) -> Iterator[Part]:
    """Convert a record of Argilla 2 or 1: its fields, and the answers to its questions.

    Submitted responses are used; a suggestion only for a question without a response. An answer
    that ranks fields becomes a ranked list, one per person; ranks may tie.

    Raises:
        InvalidRecordError: R317 if no question was answered; E2xx for a malformed record.
    """
    fields = take(row, "fields", dict)
    responses, suggestions = _collected(_responses(row)), _collected(_suggestions(row))
    votes = suggestions | responses
    if not votes:
        raise InvalidRecordError("R317", "the record has neither a response nor a suggestion")
    ranked = [name for name, values in votes.items() if _ranks(values[0], fields)]
    if not ranked:
        yield _with_labels(fields, votes)
        return
    if len(ranked) > 1:
        names = " and ".join(map(repr, ranked))
        raise InvalidRecordError("E210", f"{names} both rank the answers: keep only one of them")
    for value in votes[ranked[0]]:
        ranks = _ranks(value, fields)
        rest = {name: text for name, text in fields.items() if name not in ranks}
        answers = [{"text": fields[name], "rank": rank} for name, rank in ranks.items()]
        yield {**rest, "completions": answers}


def _responses(row: Row) -> Iterator[tuple[str, Any]]:
    """Yield questions and answers; Argilla 2 stores them by question, Argilla 1 by person."""
    given = row.get("responses") or {}
    if isinstance(given, list):
        for one in (checked(response, dict, "a response") for response in given):
            if _is_submitted(one):
                for name, answer in take(one, "values", dict, "a response").items():
                    yield name, checked(answer, dict, "an answer").get("value")
        return
    for name, answers in checked(given, dict, "'responses'").items():
        for answer in checked(answers or [], list, f"'responses' to {name!r}"):
            if _is_submitted(checked(answer, dict, "a response")):
                yield name, answer.get("value")


def _is_submitted(response: Mapping[str, Any]) -> bool:
    return response.get("status") in (None, "submitted")


def _suggestions(row: Row) -> Iterator[tuple[str, Any]]:
    given = row.get("suggestions") or {}
    if isinstance(given, list):
        for one in (checked(suggestion, dict, "a suggestion") for suggestion in given):
            yield take(one, "question_name", str, "a suggestion"), one.get("value")
        return
    for name, suggestion in checked(given, dict, "'suggestions'").items():
        if suggestion is not None:
            yield name, checked(suggestion, dict, "a suggestion").get("value")


def _ranks(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rank of each field that an answer ranks; empty if it is not a ranking.

    A ranking names every field that shares a stem; otherwise it could be a multiple choice.
    """
    if not isinstance(value, list) or len(value) < 2:
        return {}
    ranks = dict(_rank(item, place) for place, item in enumerate(value, 1))
    alike = {name for name in fields if _stem(name) in {_stem(str(one)) for one in ranks}}
    return ranks if len(ranks) == len(value) and set(ranks) == alike else {}


def _rank(item: Any, place: int) -> tuple[str, Any]:
    """Return the name and rank of an item in a ranking; the default rank is its place."""
    if isinstance(item, dict):
        return str(item.get("value")), item.get("rank", place)
    return str(item), place


def _stem(name: str) -> str:
    return _MARK.sub("", name)


def looks_label_studio(row: Row) -> bool:
    """Return whether a row is a task of Label Studio with its annotations."""
    return isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def label_studio(row: Row) -> Iterator[Part]:
    """Convert a task of Label Studio: its data and the chosen values.

    A pairwise comparison is stored under ``pairwise``, as ``left`` or ``right`` (under its own name
    if a task has several). An order of items becomes a ranked list, one per person; an item that
    the person left out is counted (R317). Skipped annotations are ignored.

    Raises:
        InvalidRecordError: R317 if nothing was chosen, E212 for items sorted into several buckets,
            E2xx for a malformed task.
    """
    data = take(row, "data", dict)
    results = [*_results(take(row, "annotations", list))]
    orders = [_order(one) for one in results if one.get("type") == "ranker"]
    if orders:
        for order in orders:
            yield from _ordered(data, order)
        return
    votes = _collected(_chosen(results))
    if not votes:
        raise InvalidRecordError("R317", "no annotation of the task compares anything")
    yield _with_labels(data, votes)


def _results(annotations: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for annotation in annotations:
        one = checked(annotation, dict, "an annotation")
        if not one.get("was_cancelled"):
            for result in checked(one.get("result") or [], list, "'result' of an annotation"):
                yield checked(result, dict, "a result")


def _chosen(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the question and the answer of each result."""
    compared = {one.get("from_name") for one in results if one.get("type") == "pairwise"}
    for one in results:
        kind = one.get("type")
        if kind in _KINDS:
            value = take(one, "value", dict, "a result").get(_KINDS[kind])
            is_only = kind == "pairwise" and len(compared) == 1
            name = "pairwise" if is_only else take(one, "from_name", str, "a result")
            yield name, value[0] if isinstance(value, list) and len(value) == 1 else value


def _order(result: dict[str, Any]) -> list[str]:
    """Return the ids of the items, best first."""
    order = take(result, "value", dict, "a result").get("ranker")
    if isinstance(order, dict):
        if len(order) != 1:
            names = ", ".join(map(repr, order))
            raise InvalidRecordError(
                "E212", f"items are sorted into the buckets {names}, which is not an order"
            )
        (order,) = order.values()
    return [str(name) for name in checked(order, list, "'ranker' of a result")]


def _ordered(data: Mapping[str, Any], order: list[str]) -> Iterator[Part]:
    """Build a ranked list from the order that one person gave."""
    name, items = _items(data)
    for one in order:
        if one not in items:
            raise InvalidRecordError("E212", f"{one!r} is ranked, but {name!r} has no such item")
    for one in items:
        if one not in order:
            yield InvalidRecordError("R317", f"the item {one!r} of {name!r} is not ranked")
    answers = [{"text": items[one], "rank": rank} for rank, one in enumerate(order, 1)]
    yield {**{key: value for key, value in data.items() if key != name}, "completions": answers}


def _items(data: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Find the list that was ranked: its key, and the text of each item by its id."""
    for name, value in data.items():
        if isinstance(value, list) and value and all(map(_is_item, value)):
            return name, {str(item["id"]): _text(item) for item in value}
    raise InvalidRecordError("E201", "items are ranked, but the data has no list of {id, body}")


def _is_item(value: Any) -> bool:
    return isinstance(value, dict) and "id" in value


def _text(item: Mapping[str, Any]) -> str:
    return next((item[key] for key in _TEXTS if isinstance(item.get(key), str) and item[key]), "")


def _collected(answers: Iterable[tuple[str, Any]]) -> Votes:
    votes: Votes = {}
    for name, value in answers:
        if value is not None:
            votes.setdefault(name, []).append(value)
    return votes


def _with_labels(data: Mapping[str, Any], votes: Votes) -> Row:
    """Add the answers to the data: a single answer unchanged, several as a list."""
    if twice := data.keys() & votes.keys():
        reason = f"{min(twice)!r} names both data and a question: rename one"
        raise InvalidRecordError("E210", reason)
    labels = {name: values[0] if len(values) == 1 else values for name, values in votes.items()}
    return {**data, **labels}
