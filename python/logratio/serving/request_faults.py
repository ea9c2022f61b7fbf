"""Messages about invalid and unknown fields of requests, which never repeat their values."""

import re
from collections.abc import Collection, Iterator, Sequence

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from logratio.serving.compatible_protocol import OpenRlhfRequest, PairsRequest, TeiRequest
from logratio.serving.limits import RefusedError
from logratio.serving.open_inference_protocol import (
    InferRequest,
    RequestedOutput,
    RequestInput,
)
from logratio.serving.protocol import UNSUPPORTED, Document, RerankRequest, Turn
from logratio.serving.score_protocol import BestOfRequest, PromptAndCandidates, ScoreRequest

_KINDS = {
    "missing": "is missing",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be at least 1",
    "literal_error": "must be one of the values in /openapi.json",
}
"""Messages for pydantic's error types; pydantic's own messages may quote the request."""
_MODELS: tuple[type[BaseModel], ...] = (
    *(RerankRequest, Document, Turn, TeiRequest, PairsRequest, OpenRlhfRequest),
    *(ScoreRequest, PromptAndCandidates, BestOfRequest),
    *(InferRequest, RequestInput, RequestedOutput),
)
_TEXTS = {"query", "prompt"}
"""Fields that are a string or chat messages."""


def names_of(model: type[BaseModel]) -> Iterator[str]:
    """Yield the fields of a request as clients write them."""
    for name, info in model.model_fields.items():
        yield name
        others = getattr(info.validation_alias, "choices", ())
        yield from (str(other) for other in others if other != name)


_NAMES = {name for model in _MODELS for name in names_of(model)}


def warnings_of(*requests: BaseModel, strict: bool) -> list[str]:
    """Describe the unknown fields of a request, which are ignored.

    Args:
        requests: The request, and the objects in it that may have unknown fields.
        strict: Refuse them instead.

    Raises:
        RefusedError: 422, there are unknown fields, and `strict` is set.
    """
    # A field of another server that is null changes nothing there either.
    fate = "not supported" if strict else "ignored"
    unknown = {
        _unknown(name, type(request), fate)
        for request in requests
        for name, value in (request.model_extra or {}).items()
        if value is not None
    }
    if strict and unknown:
        raise RefusedError(422, "malformed", "; ".join(sorted(unknown)[:5]))
    return sorted(unknown)[:20]


def _unknown(name: str, model: type[BaseModel], fate: str) -> str:
    """Describe an unknown field; only plain words of the request are repeated."""
    if name in UNSUPPORTED and model in (RerankRequest, TeiRequest):
        return f"{name} is {fate}: {UNSUPPORTED[name]}"
    return _unknown_field(name, model)


def _unknown_field(name: str, model: type[BaseModel]) -> str:
    shown = f" {name}" if re.fullmatch("[a-z_]{1,40}", name) else ""
    place = " of a chat message" if model is Turn else ""
    return f"unknown field{shown}{place}: there are {', '.join(model.model_fields)}"


def describe(error: RequestValidationError) -> str:
    """Describe the invalid fields, without their values."""
    faults: dict[str, str] = {}
    for fault in error.errors()[:20]:
        if fault["type"] == "json_invalid":
            return "the body is not JSON"
        within = fault["loc"][1:]
        place = [part for part in within if part in _NAMES or isinstance(part, int)]
        if fault["type"] == "extra_forbidden":
            name = str(within[-1])
            faults[".".join(map(str, [*place, name]))] = _unknown_field(name, Turn)
        elif not place:
            return (
                "the body is not a JSON object; is the header Content-Type: application/json set?"
            )
        else:
            faults |= _fault(place, fault["type"])
    inner = _with_inner(faults)
    return "; ".join(sorted(text for where, text in faults.items() if where not in inner)[:5])


def _with_inner(faults: Collection[str]) -> set[str]:
    """Return the places of chats that also have a fault in one of their messages."""
    return {
        where
        for where in faults
        if where.rpartition(".")[2] in _TEXTS
        and any(other.startswith(f"{where}.") for other in faults)
    }


def _fault(place: Sequence[int | str], kind: str) -> dict[str, str]:
    """Return an invalid value's place and what must be there."""
    if place[0] == "documents" and len(place) > 1:  # neither kind of document fits
        place, must = place[:2], "must be a string or an object with text"
    elif place[-1] in _TEXTS and kind != "missing":
        must = "must be a string or a list of chat messages"
    else:
        must = _KINDS.get(kind, "has another type")
    where = ".".join(map(str, place))
    return {where: f"{where} {must}"}
