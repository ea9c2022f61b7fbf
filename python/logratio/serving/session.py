"""Open an ONNX Runtime session on a bundle's graph, after checking its external data."""

import mmap
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from logratio.bundle import GRAPH, INPUTS, WEIGHTS, BundleError, Manifest, graph_properties
from logratio.errors import LogratioError
from logratio.extras import require

# Per protobuf message type, the fields that can contain a tensor at any depth.
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
    """Check that a graph's external data is only in the allowed files.

    ONNX Runtime would read any path, so a manipulated graph could load files outside the bundle.

    Args:
        graph: The ONNX file.
        allowed: File names, without folders, that tensors may refer to.

    Raises:
        BundleError: A tensor refers to another file, or the file is not a protobuf message.
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
        BundleError: The bytes are not a ModelProto.
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
    """Yield each field's number, wire type, and the span of its content."""
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
            raise IndexError("unknown wire type")
        if at > end:
            raise IndexError("a field exceeds its message")
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
            raise IndexError("a varint is too long")


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_OPTIONS = {CUDA: {"use_tf32": "0"}}  # TF32 has 10 mantissa bits: golden rewards would not match
_ERRORS_ONLY, _FATAL_ONLY = 3, 4


class ProviderError(LogratioError, RuntimeError):
    """The requested execution provider is not available."""


class Stop:
    """Abort a run of the graph from another thread, after the node being computed.

    Attributes:
        asked: Whether `now` was called.
        options: The ONNX Runtime options to pass to the run.
    """

    def __init__(self) -> None:
        self.asked = False
        self.options = require("onnxruntime", "rank").RunOptions()
        self.options.log_severity_level = _FATAL_ONLY  # a requested abort is not an error

    def now(self) -> None:
        """Abort the run, and every later run with these options."""
        self.asked = True
        self.options.terminate = True


@contextmanager
def stopped_after(seconds: float) -> Iterator[Stop]:
    """Limit the time of graph runs, since a graph may contain an endless loop."""
    stop = Stop()
    watchdog = threading.Timer(seconds, stop.now)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield stop
    finally:
        watchdog.cancel()


def open_session(
    folder: Path,
    manifest: Manifest,
    *,
    providers: Sequence[str] | None = None,
    allow_fallback: bool = False,
    threads: int | None = None,
) -> Any:
    """Open a verified bundle's graph.

    Args:
        folder: The bundle.
        manifest: The bundle's manifest.
        providers: ONNX Runtime execution providers, the preferred one first; None for the CPU.
        allow_fallback: Use another provider if the first is not available.
        threads: Threads per run; None: ``OMP_NUM_THREADS``, or the CPUs of this process.

    Returns:
        The ``onnxruntime.InferenceSession``.

    Raises:
        BundleError: The graph does not match the manifest.
        ProviderError: ONNX Runtime would use another provider than the requested one.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", "rank")
    warn_of_two_runtimes()
    weights = frozenset({WEIGHTS} & manifest.files.keys())
    check_external_data(folder / GRAPH, weights)
    wanted = list(providers or [CPU])
    _check_available(runtime, wanted[0], allow_fallback)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = _ERRORS_ONLY
    session = _open(runtime, folder / GRAPH, options, wanted)
    if session.get_providers()[0] != wanted[0] and not allow_fallback:
        raise ProviderError(_fallback(wanted[0], session.get_providers()[0]))
    check_graph(session, manifest, folder / GRAPH)
    return session


def _open(runtime: Any, graph: Path, options: Any, wanted: list[str]) -> Any:
    available = set(runtime.get_available_providers())
    usable = [name for name in wanted if name in available] or [CPU]
    if CPU not in usable:
        usable.append(CPU)  # shapes are computed on the CPU for every device
    pairs = [(name, _OPTIONS.get(name, {})) for name in usable]
    try:
        return runtime.InferenceSession(str(graph), options, providers=pairs)
    except Exception as error:  # the library raises many unrelated types
        reason = str(error).strip().split("\n")[0][:200]
        raise BundleError(f"{graph}: ONNX Runtime cannot open it ({reason})") from error


def _check_available(runtime: Any, wanted: str, allow_fallback: bool) -> None:
    available = runtime.get_available_providers()
    if wanted not in available and not allow_fallback:
        raise ProviderError(f"{_fallback(wanted, CPU)}; installed here: {', '.join(available)}")


def _fallback(wanted: str, used: str) -> str:
    return (
        f"{wanted} cannot be used, and ONNX Runtime would use {used} instead; request {used}, "
        "or allow the fallback"
    )


def check_graph(session: Any, manifest: Manifest, where: Path) -> None:
    """Check that a session's graph has the inputs, outputs and properties of the manifest.

    Raises:
        BundleError: One of them differs.
    """
    inputs = {value.name: (value.type, len(value.shape)) for value in session.get_inputs()}
    outputs = {value.name: (value.type, len(value.shape)) for value in session.get_outputs()}
    if inputs != {name: ("tensor(int64)", rank) for name, rank in INPUTS.items()}:
        raise BundleError(f"{where}: its inputs are not those of a scorer")
    if outputs != dict.fromkeys(manifest.graph.outputs, ("tensor(float)", 1)):
        raise BundleError(f"{where}: its outputs are not those of a scorer")
    properties = session.get_modelmeta().custom_metadata_map
    stated = graph_properties(
        manifest.beta, manifest.policy, manifest.reference, manifest.format_version
    )
    for name, value in stated.items():
        if properties.get(name) != value:
            raise BundleError(f"{where}: its {name} differs from the manifest")


def default_threads() -> int:
    """Return ``OMP_NUM_THREADS`` if set, else the number of CPUs this process may use."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdigit() and int(value) > 0:
        return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def warn_of_two_runtimes() -> None:
    """Warn if two builds of ONNX Runtime are installed: they overwrite each other's files."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(both) > 1:
        warnings.warn(
            f"{' and '.join(both)} are both installed and overwrite each other: uninstall both, "
            "then install one",
            RuntimeWarning,
            stacklevel=3,
        )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
