"""One record's JSON text to an object: what Python lets through is refused here."""

import json
import re
from typing import Any

from logratio.data.containers.rows import OTHER_ENCODING
from logratio.data.records import InvalidRecordError, Refusal, Source

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = re.compile(r'"\s*+:')
_raw_decode = json.JSONDecoder().raw_decode


def parse_record(
    source: Source, content: bytes, *, column: int | None = 1, is_cut: bool = False
) -> dict[str, Any] | Refusal:
    """Parse one record.

    Args:
        source: Where it stands.
        content: UTF-8, without white space around it.
        column: Where in its line the record begins, from 1; None: columns are not told.
        is_cut: The file ended before the record did, as far as can be told.

    Returns:
        The object, or why it is refused.
    """
    try:
        return _object(content.decode())
    except UnicodeDecodeError as error:
        if is_cut and error.end == len(content) and "unexpected end" in error.reason:
            return Refusal(source, "E102", "the file ends inside a character")
        reason = (
            f"byte {error.start + 1} of the record is not UTF-8 ({error.reason}): {OTHER_ENCODING}"
        )
        return Refusal(source, "E103", reason, column and column + error.start)
    except json.JSONDecodeError as error:
        return _malformed(source, error, column, is_cut)
    except InvalidRecordError as error:
        return Refusal(source, error.code, error.reason)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        return Refusal(source, "E101", f"JSON that cannot be read: {error}")


def parse_value(text: str) -> Any:
    """Parse JSON that stands in a cell of a table.

    Raises:
        ValueError: It is no JSON.
        InvalidRecordError: It is JSON of a kind that is refused: E104, E205.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def json_type(value: object) -> str:
    """Name a value's type as JSON does; a type that JSON has not by its Python name."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if type(value) in names or value is None:
        return names.get(type(value), "null")
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"


def _object(text: str) -> dict[str, Any]:
    row, end = _raw_decode(text)
    # Reading without a hook is half as long; text in which no name can stand twice needs none.
    if end != len(text) or type(row) is not dict or len(_NAMES.findall(text)) != _count_names(row):
        row = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(row, dict):
        raise InvalidRecordError("E203", f"a record must be a JSON object, not {json_type(row)}")
    if _SURROGATE.search(text):
        _check_surrogates(row)
    return row


def _count_names(row: dict[str, Any]) -> int:
    """Count the names in an object and in what it holds."""
    count = len(row)
    for value in row.values():
        if type(value) is list:
            count += sum([_count_in(item) for item in value])
        elif type(value) is dict:
            count += _count_names(value)
    return count


def _count_in(item: Any) -> int:
    if type(item) is dict:
        return _count_names(item)
    return sum([_count_in(inner) for inner in item]) if type(item) is list else 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRecordError("E205", f"the key {twice!r} stands twice in one object")
    return row


def _check_surrogates(value: Any) -> None:
    """Refuse halves of characters: Python holds them, no tokenizer and no file takes them."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InvalidRecordError("E104", f"the escape \\u{code:04x} is half a character") from None


def _malformed(
    source: Source, error: json.JSONDecodeError, column: int | None, is_cut: bool
) -> Refusal:
    if error.lineno > 1:  # of a record over several lines
        column, where = None, f" (line {error.lineno} of the record, column {error.colno})"
    else:
        column, where = column and column + error.pos, ""
    if is_cut and _looks_cut(error):
        return Refusal(source, "E102", "the file ends inside a record", column)
    return Refusal(source, "E101", f"malformed JSON: {error.msg}{where}", column)


def _looks_cut(error: json.JSONDecodeError) -> bool:
    """Say whether a line without its end was cut, and is not merely malformed."""
    return not error.doc.endswith("}") or error.pos >= len(error.doc)
