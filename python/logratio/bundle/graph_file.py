"""Check the ONNX file of a bundle before ONNX Runtime reads it.

The manifest's hashes detect damage, but whoever makes a bundle also writes its manifest. So the
graph may only contain what an export writes: its operators, tensors whose bytes are in the bundle,
one loop whose length is that of its input, and no functions, other files or unknown fields. Reads
the protobuf itself, since a server does not need to install ``onnx``.
"""

import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logratio.bundle.files import GRAPH, WEIGHTS, BundleError, FileEntry, open_regular_file
from logratio.bundle.operators import DOMAINS, GROWING, OPERATORS, PADDED
from logratio.bundle.protobuf import (
    BYTES,
    FIXED32,
    VARINT,
    Buffer,
    Field,
    MalformedError,
    Reader,
    Span,
    signed,
)

Message = Mapping[int, str]
"""The fields of a message by number, with their kind; ``*`` marks those that may be repeated."""

_MESSAGES: Mapping[str, Message] = {
    "model": {
        **{1: "int", 2: "text", 3: "text", 4: "text", 5: "int", 6: "text"},
        **{7: "graph", 8: "opset*", 14: "entry*"},
    },
    "opset": {1: "text", 2: "int"},
    "entry": {1: "text", 2: "text"},
    "graph": {
        **{1: "node*", 2: "text", 5: "tensor*", 10: "text", 11: "value*", 12: "value*"},
        **{13: "value*", 16: "entry*"},
    },
    "node": {
        **{1: "text*", 2: "text*", 3: "text", 4: "text", 5: "attribute*", 6: "text", 7: "text"},
        **{8: "text", 9: "entry*"},
    },
    "attribute": {
        **{1: "text", 2: "float", 3: "int", 4: "text", 5: "tensor", 6: "graph"},
        **{7: "float*", 8: "int*", 13: "text", 20: "int"},
    },
    "tensor": {
        **{1: "int*", 2: "int", 8: "text", 9: "text", 12: "text", 13: "entry*", 14: "int"},
        **{16: "entry*"},
    },
    "value": {1: "text", 2: "type", 3: "text", 4: "entry*"},
    "type": {1: "tensor type", 6: "text"},
    "tensor type": {1: "int", 2: "shape"},
    "shape": {1: "dimension*"},
    "dimension": {1: "int", 2: "text", 3: "text"},
}
"""What an export writes. Left out of ONNX: functions, training, sparse and string tensors,
attributes with references, lists of tensors or graphs, sequences, settings of several devices."""
_WIRE = {"int": {VARINT}, "float": {FIXED32}, "int*": {VARINT, BYTES}, "float*": {FIXED32, BYTES}}

_TYPES: Mapping[int, tuple[str, int]] = {
    **{1: ("float32", 32), 10: ("float16", 16), 11: ("float64", 64), 16: ("bfloat16", 16)},
    **{2: ("uint8", 8), 3: ("int8", 8), 6: ("int32", 32), 7: ("int64", 64), 9: ("bool", 8)},
    **{21: ("uint4", 4), 22: ("int4", 4)},
}
"""Names and bits per value of the tensor types; text and complex numbers are left out."""
_EXTERNAL = 1
_INPUT, _OUTPUT = 11, 12
"""Fields of a graph."""
_LONGEST_LIST = 64
"""Values of an int64 tensor that may be a shape."""
_MOST_VALUES = 2**24
"""Values of one result whose shape is written in the graph: 64 MiB of float32."""
_NODES = 500_000
_LOOP = "Scan"


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        dtype: Type of its values, such as ``int64``.
        shape: Its sizes; -1: any.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass
class GraphFile:
    """What a checked graph contains.

    Attributes:
        opset: Version of the ONNX operators.
        nodes: Number of nodes, with those of the loop over the head's chunks.
        operators: How often each operator occurs.
        tensor_bytes: Bytes of all tensors, by type.
        inputs: The inputs by name.
        outputs: The outputs by name.
    """

    opset: int = 0
    nodes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    tensor_bytes: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, Port] = field(default_factory=dict)
    outputs: dict[str, Port] = field(default_factory=dict)


def check_graph_file(folder: Path, files: Mapping[str, FileEntry], opset: int) -> GraphFile:
    """Check that a bundle's graph contains only what an export writes.

    Args:
        folder: The bundle.
        files: The manifest's entries; of these, the graph may refer to `WEIGHTS` only.
        opset: The opset in the manifest.

    Returns:
        What the graph contains.

    Raises:
        BundleError: The file is not an ONNX graph, or breaks a rule; the message names it.
    """
    path = folder / GRAPH
    weights = files[WEIGHTS].size if WEIGHTS in files else None
    with os.fdopen(open_regular_file(folder, GRAPH), "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise BundleError(f"{path}: empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                found = read_graph(content, weights)
            except MalformedError as error:
                raise BundleError(f"{path}: not an ONNX file ({error})") from error
            except BundleError as error:
                raise BundleError(f"{path}: {error}") from error
    if found.opset != opset:
        raise BundleError(f"{path}: has opset {found.opset}; the manifest has {opset}")
    return found


def read_graph(content: Buffer, weights: int | None) -> GraphFile:
    """Check a serialized ``ModelProto``.

    Args:
        content: The bytes.
        weights: Size of the file with external weights; None if the bundle has none.

    Raises:
        BundleError: The bytes are not such a message, or break a rule.
    """
    return _Check(content, weights).model()


class _Check:
    """One pass over a graph."""

    def __init__(self, content: Buffer, weights: int | None) -> None:
        self._reader = Reader(content)
        self._whole = (0, len(content))
        self._weights = weights
        self._found = GraphFile()
        self._lists: dict[str, tuple[int, ...]] = {}  # int64 constants that may be shapes, by name
        self._growing: list[tuple[str, str, str]] = []  # node, operator, name of its shape

    def model(self) -> GraphFile:
        domains: dict[str, int] = {}
        for part, kind in self._fields(self._whole, "model"):
            if kind == "opset":
                self._opset(part.span, domains)
            elif kind == "graph":
                self._graph(part.span, in_loop=False)
            elif kind == "entry":
                self._small(part.span, "entry")
        if not self._found.nodes:
            raise BundleError("it has no graph")
        self._found.opset = domains.get("", 0)
        self._check_growth()
        return self._found

    def _fields(self, span: Span, message: str) -> Iterator[tuple[Field, str]]:
        """Yield the fields of a message with their kind; refuse unknown and repeated ones."""
        known, seen = _MESSAGES[message], set()
        for part in self._reader.fields(span):
            kind = known.get(part.number)
            if kind is None:
                raise BundleError(
                    f"field {part.number} of a {message}, which no export writes (such as "
                    "functions, sparse tensors or text)"
                )
            if part.kind not in _WIRE.get(kind, {BYTES}):
                raise MalformedError(f"field {part.number} of a {message} has another type")
            if not kind.endswith("*"):
                if part.number in seen:
                    raise MalformedError(f"field {part.number} of a {message} occurs twice")
                seen.add(part.number)
            yield part, kind.rstrip("*")

    def _small(self, span: Span, message: str) -> dict[int, list[Field]]:
        """Return the fields of a message without large lists."""
        parts: dict[int, list[Field]] = {}
        for part, _ in self._fields(span, message):
            parts.setdefault(part.number, []).append(part)
        return parts

    def _text(self, parts: Mapping[int, list[Field]], number: int) -> str:
        return self._reader.text(parts[number][0].span) if number in parts else ""

    def _number(self, parts: Mapping[int, list[Field]], number: int) -> int:
        return signed(parts[number][0].value) if number in parts else 0

    def _opset(self, span: Span, domains: dict[str, int]) -> None:
        parts = self._small(span, "opset")
        domain, version = self._text(parts, 1), self._number(parts, 2)
        if version not in DOMAINS.get(domain, ()):
            raise BundleError(f"it uses version {version} of the operators {domain or 'ai.onnx'!r}")
        if domain in domains:
            raise BundleError(f"the operators {domain or 'ai.onnx'!r} are imported twice")
        domains[domain] = version

    def _graph(self, span: Span, *, in_loop: bool) -> None:
        for part, kind in self._fields(span, "graph"):
            if kind == "node":
                self._node(part.span, in_loop)
            elif kind == "tensor":
                self._tensor(part.span)
            elif kind == "value":
                self._nested(part.span, "value")
                if not in_loop and part.number in (_INPUT, _OUTPUT):
                    ports = {_INPUT: self._found.inputs, _OUTPUT: self._found.outputs}
                    self._port(part.span, ports[part.number])
            elif kind == "entry":
                self._small(part.span, "entry")

    def _nested(self, span: Span, message: str) -> None:
        """Check the fields of a message and those inside; kinds are not recursive."""
        for part, kind in self._fields(span, message):
            if kind in _MESSAGES:
                self._nested(part.span, kind)

    def _port(self, span: Span, ports: dict[str, Port]) -> None:
        """Keep the name, type and shape of an input or output."""
        value = self._small(span, "value")
        name, inner = self._text(value, 1), value
        for number, message in ((2, "type"), (1, "tensor type")):
            if number not in inner:
                raise BundleError(f"the input or output {name!r:.100} has no type")
            inner = self._small(inner[number][0].span, message)
        kind, shape = self._number(inner, 1), []
        if kind not in _TYPES or name in ports:
            raise BundleError(f"the input or output {name!r:.100} has the type {kind}, or is twice")
        for part in self._small(inner[2][0].span, "shape").get(1, []) if 2 in inner else []:
            size = self._small(part.span, "dimension")
            shape.append(self._number(size, 1) if 1 in size else -1)
        ports[name] = Port(_TYPES[kind][0], tuple(shape))

    def _node(self, span: Span, in_loop: bool) -> None:
        parts = self._small(span, "node")
        name, operator = self._text(parts, 3), self._text(parts, 4)
        domain = self._text(parts, 7)
        if operator not in OPERATORS.get(domain, ()):
            known = f"{domain}.{operator}" if domain else operator
            raise BundleError(f"the operator {known!r:.100}, which no export writes")
        if self._text(parts, 8):
            raise BundleError(f"a variant of the operator {operator}")
        if operator == _LOOP and in_loop:
            raise BundleError("a loop inside a loop")
        self._found.nodes += 1
        if self._found.nodes > _NODES:
            raise BundleError(f"more than {_NODES:,} nodes")
        self._found.operators[operator] += 1
        for part in parts.get(5, []):
            self._attribute(part.span, operator)
        place = GROWING.get(operator)
        inputs = parts.get(1, [])
        if place is not None and place < len(inputs):
            shape = self._reader.text(inputs[place].span)
            self._growing.append((name, operator, shape))

    def _attribute(self, span: Span, operator: str) -> None:
        parts = self._small(span, "attribute")
        name = self._text(parts, 1)
        if 6 in parts:
            if (operator, name) != (_LOOP, "body"):
                raise BundleError(f"a graph inside the operator {operator}")
            self._graph(parts[6][0].span, in_loop=True)
        if 5 in parts:
            self._tensor(parts[5][0].span)
        most = PADDED.get(operator)
        if most is not None and any(abs(n) > most for n in self._integers(parts.get(8, []))):
            raise BundleError(f"the operator {operator} with the attribute {name!r:.40} too large")

    def _integers(self, parts: list[Field]) -> list[int]:
        """Return the values of a repeated field of numbers, packed or not."""
        values: list[int] = []
        for part in parts:
            packed = part.kind == BYTES
            values += map(signed, self._reader.varints(part.span) if packed else [part.value])
        return values

    def _tensor(self, span: Span) -> None:
        """Check that a tensor's bytes are in the bundle, as many as its shape needs."""
        parts = self._small(span, "tensor")
        name = self._text(parts, 8)
        shape = self._integers(parts.get(1, []))
        number = self._number(parts, 2)
        if number not in _TYPES:
            raise BundleError(f"the tensor {name!r:.100} has the type {number}")
        kind, bits = _TYPES[number]
        if any(size < 0 for size in shape):
            raise BundleError(f"the tensor {name!r:.100} has a negative size")
        needed = (math.prod(shape) * bits + 7) // 8
        stored = self._stored(parts, name)
        if stored != needed:
            raise BundleError(f"the tensor {name!r:.100} has {stored} bytes instead of {needed}")
        self._found.tensor_bytes[kind] += needed
        if kind == "int64" and needed <= 8 * _LONGEST_LIST and 9 in parts:
            raw = self._reader.bytes(parts[9][0].span)
            self._remember(name, struct.unpack(f"<{len(raw) // 8}q", raw))

    def _remember(self, name: str, values: Sequence[int]) -> None:
        """Keep a list that may be a shape; of two with one name, the larger shape."""
        self._lists[name] = max(self._lists.get(name, ()), tuple(values), key=_values_in)

    def _stored(self, parts: Mapping[int, list[Field]], name: str) -> int:
        """Return the number of bytes of a tensor, in the graph or in the file of weights."""
        is_external = self._number(parts, 14) == _EXTERNAL
        if is_external != (13 in parts) or (is_external and 9 in parts):
            raise BundleError(f"the tensor {name!r:.100} is stored in two places")
        if not is_external:
            start, end = parts[9][0].span if 9 in parts else (0, 0)
            return end - start
        place: dict[str, str] = {}
        for part in parts[13]:
            entry = self._small(part.span, "entry")
            key = self._text(entry, 1)
            if key in place or key not in {"location", "offset", "length"}:
                raise BundleError(f"the tensor {name!r:.100} has a place with {key!r:.40}")
            place[key] = self._text(entry, 2)
        if self._weights is None or place.get("location") != WEIGHTS:
            raise BundleError(f"its weights point outside the bundle ({place.get('location')!r})")
        offset, length = place.get("offset", "0"), place.get("length", "")
        if not (_is_number(offset) and _is_number(length)):
            raise BundleError(f"the tensor {name!r:.100} has no place in {WEIGHTS}")
        if int(offset) + int(length) > self._weights:
            raise BundleError(f"the tensor {name!r:.100} ends after {WEIGHTS}")
        return int(length)

    def _check_growth(self) -> None:
        """Check the sizes of results whose shape is a constant of the graph."""
        for name, operator, shape in self._growing:
            sizes = self._lists.get(shape, ())
            if _values_in(sizes) > _MOST_VALUES:
                raise BundleError(f"the node {name!r:.100} ({operator}) has the shape {sizes}")


def _values_in(shape: Sequence[int]) -> int:
    return math.prod(max(1, size) for size in shape)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 15
