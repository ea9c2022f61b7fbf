"""Requests and responses of the Open Inference Protocol v2, as pydantic models and as bytes."""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from logratio.serving import example_answers
from logratio.serving.limits import RefusedError

JSON_LENGTH = "inference-header-content-length"
"""Header with the number of bytes of JSON, if the bytes of tensors follow."""
EXTENSIONS = ("binary_tensor_data",)
_SIZE, _BINARY, _BINARY_DEFAULT = "binary_data_size", "binary_data", "binary_data_output"
_LARGEST = 2**31
_DTYPES = {"FP32": "<f4", "INT64": "<i8", "BOOL": "?"}

Parameters = Annotated[
    dict[str, Any],
    Field(default_factory=dict, description="Names and values; see the guide."),
]


class RequestInput(BaseModel):
    """A tensor of text."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(description="`prompt` or `candidates`.")]
    shape: Annotated[list[int], Field(description="One or two sizes.")]
    datatype: Annotated[str, Field(description="`BYTES`: text in UTF-8.")]
    parameters: Parameters
    data: Annotated[
        list[Any] | None, Field(description="Strings, nested as the shape or flat.")
    ] = None


class RequestedOutput(BaseModel):
    """A tensor that the answer must have."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(description="Such as `rewards`; `GET /v2/models/{name}` has all.")]
    parameters: Parameters


class InferRequest(BaseModel):
    """Prompts and candidates as tensors."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["the cat"]},
                        {
                            "name": "candidates",
                            "shape": [2],
                            "datatype": "BYTES",
                            "data": [" sits on the mat", " runs under a tree"],
                        },
                    ]
                }
            ]
        },
    )
    id: Annotated[str | None, Field(description="Repeated in the answer.")] = None
    model_name: Annotated[
        str | None, Field(description="Accepted for kserve's client; the path names the model.")
    ] = None
    parameters: Parameters
    inputs: list[RequestInput]
    outputs: Annotated[
        list[RequestedOutput] | None, Field(description="Default: every output.")
    ] = None


class Tensor(BaseModel):
    """A tensor of the answer."""

    name: Annotated[str, Field(description="Such as `rewards`.")]
    shape: Annotated[list[int], Field(description="The shape of `candidates`.")]
    datatype: Annotated[str, Field(description="`FP32`, `INT64`, `BOOL` or `BYTES`.")]
    parameters: Parameters
    data: Annotated[
        list[Any] | None,
        Field(description="Values, flat; null for a reward that is missing. Absent if binary."),
    ] = None


class InferResponse(BaseModel):
    """The scores as tensors, each of the shape of `candidates`."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.INFER]})
    model_name: Annotated[str, Field(description="The bundle that gave the scores.")]
    model_version: Annotated[str | None, Field(description="The bundle's digest.")] = None
    id: Annotated[str, Field(description="That of the request, or a new one.")]
    parameters: Parameters
    outputs: list[Tensor]


class TensorInfo(BaseModel):
    """Name, type and shape of a tensor; -1: any size."""

    name: Annotated[str, Field(description="The tensor's name.")]
    datatype: Annotated[str, Field(description="The type of its values.")]
    shape: Annotated[list[int], Field(description="Its sizes.")]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: Annotated[str, Field(description="The bundle.")]
    versions: Annotated[list[str], Field(description="The digest of the bundle.")]
    platform: Annotated[str, Field(description="The graph's format.")]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class ServerMetadata(BaseModel):
    """The server."""

    name: Annotated[str, Field(description="Always `logratio`.")]
    version: Annotated[str, Field(description="Version of logratio.")]
    extensions: Annotated[list[str], Field(description="Extensions of the protocol.")]


class Live(BaseModel):
    """The server runs."""

    live: Annotated[bool, Field(description="Always true.")] = True


class ServerReady(BaseModel):
    """The server accepts requests. The protocol names the field `live`, and its clients `ready`."""

    live: Annotated[bool, Field(description="Always true; otherwise the status is 503.")] = True
    ready: Annotated[bool, Field(description="The same.")] = True


class ModelReady(BaseModel):
    """The model accepts requests."""

    name: Annotated[str, Field(description="The bundle.")]
    ready: Annotated[bool, Field(description="Always true; otherwise the status is 503.")] = True


class ErrorText(BaseModel):
    """Why a request was refused."""

    error: Annotated[str, Field(description="The reason, for people.")]


def malformed(message: str) -> RefusedError:
    """Return the error for a request that does not follow the protocol."""
    return RefusedError(400, "malformed", message)


def divided(body: bytes, length: str | None) -> tuple[bytes, memoryview]:
    """Divide a body into its JSON and the bytes of its tensors.

    Args:
        body: The body.
        length: Value of the header `JSON_LENGTH`; None: the body is JSON only.

    Raises:
        RefusedError: 400, the length is no number, or larger than the body.
    """
    if length is None:
        return body, memoryview(b"")
    if not (length.isascii() and length.isdigit() and len(length) < 12):
        raise malformed(f"{JSON_LENGTH} must be a number of bytes")
    size = int(length)
    if size > len(body):
        raise malformed(f"{JSON_LENGTH} is larger than the body")
    return body[:size], memoryview(body)[size:]


class Texts:
    """The input tensors of a request by name, as flat lists of strings with their shapes."""

    def __init__(self, inputs: Sequence[RequestInput], binary: memoryview) -> None:
        """Decode the tensors.

        Args:
            inputs: The inputs of the request.
            binary: The bytes after the JSON.

        Raises:
            RefusedError: 400, a tensor occurs twice, is no text, or has not the size of its shape.
        """
        self.shapes: dict[str, list[int]] = {}
        self.values: dict[str, list[str]] = {}
        start = 0
        for number, tensor in enumerate(inputs):
            if tensor.name in self.values:
                raise malformed(f"inputs.{number} has the name of an earlier input")
            size = _binary_size(tensor, number)
            if size is None:
                values = _from_json(tensor, number)
            else:
                if size > len(binary) - start:
                    raise malformed(f"inputs.{number} has less bytes than {_SIZE}")
                values = _from_bytes(bytes(binary[start : start + size]), number)
                start += size
            if len(values) != (elements := _elements(tensor.shape, number)):
                raise malformed(
                    f"inputs.{number} has {len(values)} elements, and its shape has {elements}"
                )
            self.shapes[tensor.name], self.values[tensor.name] = tensor.shape, values
        if start != len(binary):
            raise malformed("the body has more bytes than its tensors")


def _elements(shape: Sequence[int], number: int) -> int:
    """Return how many elements a shape has."""
    if len(shape) not in (1, 2) or not all(0 <= size < _LARGEST for size in shape):
        raise malformed(f"inputs.{number}.shape must be one or two sizes")
    return math.prod(shape)


def _binary_size(tensor: RequestInput, number: int) -> int | None:
    """Return the number of bytes of a binary tensor; None if its data are in the JSON."""
    if tensor.datatype != "BYTES":
        raise malformed(f"inputs.{number} must have the datatype BYTES")
    if unknown := tensor.parameters.keys() - {_SIZE}:
        raise malformed(f"inputs.{number} has {_parameters(unknown)}: there is {_SIZE}")
    size = tensor.parameters.get(_SIZE)
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise malformed(f"inputs.{number}: {_SIZE} must be a number of bytes")
    if tensor.data is not None:
        raise malformed(f"inputs.{number} has both data and {_SIZE}")
    return size


def _parameters(names: set[str]) -> str:
    """Describe unknown parameters without their names, which could be text."""
    return "an unknown parameter" if len(names) == 1 else f"{len(names)} unknown parameters"


def _from_json(tensor: RequestInput, number: int) -> list[str]:
    if tensor.data is None:
        raise malformed(f"inputs.{number} has no data")
    values = [*_flat(tensor.data)]
    if not all(isinstance(value, str) for value in values):
        raise malformed(f"inputs.{number}.data must have strings only")
    return values


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value  # a shape has two dimensions at most
        else:
            yield value


def _from_bytes(content: bytes, number: int) -> list[str]:
    """Decode strings, each after its length in four bytes."""
    values, place = [], 0
    while place < len(content):
        if place + 4 > len(content):
            raise malformed(f"inputs.{number}: its bytes end within a length")
        (size,) = struct.unpack_from("<I", content, place)
        place += 4
        if place + size > len(content):
            raise malformed(f"inputs.{number}: its bytes end within an element")
        try:
            values.append(content[place : place + size].decode())
        except UnicodeDecodeError:
            raise malformed(f"inputs.{number}: element {len(values)} is not UTF-8") from None
        place += size
    return values


def is_binary(request: InferRequest, output: RequestedOutput | None) -> bool:
    """Return whether an output is wanted as bytes after the JSON.

    Raises:
        RefusedError: 400, the parameter is neither true nor false, or the output has others.
    """
    wanted: object = request.parameters.get(_BINARY_DEFAULT, False)
    if output is not None:
        if unknown := output.parameters.keys() - {_BINARY}:
            raise malformed(f"an output has {_parameters(unknown)}: there is {_BINARY}")
        wanted = output.parameters.get(_BINARY, wanted)
    if not isinstance(wanted, bool):
        raise malformed(f"{_BINARY} and {_BINARY_DEFAULT} must be true or false")
    return wanted


def encoded(response: InferResponse, binary: Mapping[str, bool]) -> tuple[bytes, int | None]:
    """Write an answer.

    Args:
        response: The answer, whose tensors have data.
        binary: Which tensors are written as bytes, by name.

    Returns:
        The body, and how many of its bytes are JSON; None if all are.
    """
    content, parts = response.model_dump(exclude_none=True), []
    for tensor in content["outputs"]:
        values = tensor["data"]
        if binary[tensor["name"]]:
            parts.append(_to_bytes(values, tensor["datatype"]))
            tensor["parameters"] = {_SIZE: len(parts[-1])}
            del tensor["data"]
        else:  # JSON has no NaN
            tensor["data"] = [_finite(value) for value in values]
        if not tensor["parameters"]:
            del tensor["parameters"]
    if not content["parameters"]:
        del content["parameters"]
    text = json.dumps(content, allow_nan=False).encode()
    return b"".join([text, *parts]), len(text) if any(binary.values()) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _to_bytes(values: Sequence[Any], datatype: str) -> bytes:
    if datatype == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.array(values, _DTYPES[datatype]).tobytes()
