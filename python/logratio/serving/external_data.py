"""Which files an ONNX graph points to, read from its bytes before any library loads it.

A tensor of a graph can name a file that holds its values. ONNX Runtime follows such names, so a
graph could ask for files that are not the bundle's. This walks the protobuf messages in which a
tensor can stand (onnx.proto3) and reads nothing else; tensors' values are stepped over.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from logratio.bundle import BundleError

# For each message, the fields that hold messages in which a tensor can stand.
_TREE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse tensor",
        23: "sparse tensor",
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_DEEPEST = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer = mmap.mmap | bytes
Span = tuple[int, int]


def check_external_data(graph: Path, allowed: frozenset[str]) -> None:
    """Refuse a graph that points to files other than the allowed ones.

    Args:
        graph: The ONNX file.
        allowed: Names, without folders, that tensors may refer to.

    Raises:
        BundleError: It points elsewhere, or is no protobuf message.
    """
    if graph.stat().st_size == 0:
        raise BundleError(f"{graph}: empty")
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for location in external_locations(content):
            if location not in allowed:
                raise BundleError(f"{graph}: its weights point outside the bundle ({location!r})")


def external_locations(content: Buffer) -> Iterator[str]:
    """Yield every file name that a tensor of a serialized ModelProto refers to.

    Raises:
        BundleError: The bytes are no such message.
    """
    try:
        yield from _locations(content, (0, len(content)), "model", 0)
    except (IndexError, UnicodeDecodeError) as error:
        raise BundleError("the graph is not an ONNX file") from error


def _locations(content: Buffer, span: Span, message: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise BundleError("the graph is nested too deeply")
    for number, kind, place in _fields(content, span):
        if kind != _BYTES or (inner := _TREE[message].get(number)) is None:
            continue
        if inner == "entry":
            yield from _location(content, place)
        else:
            yield from _locations(content, place, inner, depth + 1)


def _location(content: Buffer, span: Span) -> Iterator[str]:
    """Yield the value of a key-value entry whose key is "location"."""
    entry = {number: content[start:end] for number, _, (start, end) in _fields(content, span)}
    if entry.get(1) == b"location":
        yield entry.get(2, b"").decode()


def _fields(content: Buffer, span: Span) -> Iterator[tuple[int, int, Span]]:
    """Yield each field's number, wire type and, of bytes, where they stand."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at)
        number, kind = tag >> 3, tag & 7
        start = at
        if kind == _VARINT:
            _, at = _varint(content, at)
        elif kind == _BYTES:
            size, start = _varint(content, at)
            at = start + size
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise IndexError("a field of no known kind")
        if at > end:
            raise IndexError("a field passes the end of its message")
        yield number, kind, (start, at)


def _varint(content: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a number is too long")
