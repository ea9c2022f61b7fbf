"""Open an ONNX Runtime session on a bundle's graph: the file is checked first, the time limited."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from logratio.adapted_graph import RANK_INPUTS
from logratio.bundle import (
    CACHED_REFERENCE,
    GRAPH,
    INPUTS,
    REFERENCE_INPUT,
    TOKENIZATION,
    BundleError,
    Manifest,
    check_graph_file,
    graph_properties,
)
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.serving.processors import default_threads

T = TypeVar("T")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_OPTIONS = {CUDA: {"use_tf32": "0"}}  # TF32 has 10 mantissa bits: golden rewards would not match
_ERRORS_ONLY, _FATAL_ONLY = 3, 4
_SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")
_SIGNAL_SECONDS = 0.25
"""Longest wait at a time: a handler of a signal only runs between two waits of the first thread, if
the signal came just before one, or woke another thread."""
LOAD_SECONDS = 300.0
"""Time limit for opening a graph, and for its golden groups."""


class ProviderError(LogratioError, RuntimeError):
    """The requested execution provider is not available."""


class Stop:
    """Abort a run of the graph from another thread, after the node being computed.

    Attributes:
        asked: Whether `now` was called.
    """

    def __init__(self) -> None:
        self.asked = False
        self._made: list[Any] = []
        self._lock = threading.Lock()

    def options(self, *, shrink: bool = False, adapter: Any = None) -> Any:
        """Return the ONNX Runtime options to pass to a run.

        Args:
            shrink: Return the memory of the run to the operating system; only on the CPU.
            adapter: The ``onnxruntime.LoraAdapter`` of the run, or None.
        """
        options = require("onnxruntime", "rank").RunOptions()
        options.log_severity_level = _FATAL_ONLY  # a requested abort is not an error
        if shrink:
            options.add_run_config_entry(*_SHRINK)
        if adapter is not None:
            options.add_active_adapter(adapter)
        with self._lock:
            options.terminate = self.asked
            self._made.append(options)
        return options

    def now(self) -> None:
        """Abort the run, and every later run with these options."""
        with self._lock:
            self.asked = True
            for options in self._made:
                options.terminate = True


def within(seconds: float, action: Callable[[], T], late: str) -> T:
    """Call a function in a thread, and wait for it for a limited time.

    ONNX Runtime cannot be interrupted while it opens a graph or computes one node. After the limit
    the thread is left behind: it ends with the process.

    Args:
        seconds: The limit.
        action: The function.
        late: Message of the error after the limit.

    Returns:
        The function's result.

    Raises:
        BundleError: The limit has passed.
    """
    future: Future[T] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # raised again in the waiting thread
            future.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    end = time.monotonic() + seconds
    while not future.done():
        if (left := end - time.monotonic()) <= 0:
            raise BundleError(late)
        wait([future], min(left, _SIGNAL_SECONDS))
    return future.result()


@contextmanager
def stopped_after(seconds: float) -> Iterator[Stop]:
    """Limit the time of graph runs: a run stops after the node being computed."""
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
    load_seconds: float = LOAD_SECONDS,
) -> Any:
    """Check a bundle's graph, and open it.

    Args:
        folder: The bundle.
        manifest: The bundle's manifest.
        providers: ONNX Runtime execution providers, the preferred one first; None for the CPU.
        allow_fallback: Use another provider if the first is not available.
        threads: Threads per run; None: see `default_threads`.
        load_seconds: Time limit in seconds.

    Returns:
        The ``onnxruntime.InferenceSession``.

    Raises:
        BundleError: The graph contains what no export writes, does not match the manifest, or
            takes longer to open.
        ProviderError: ONNX Runtime would use another provider than the requested one.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", "rank")
    warn_of_two_runtimes()
    check_graph_file(folder, manifest.files, manifest.graph.opset)
    wanted = list(providers or [CPU])
    _check_available(runtime, wanted[0], allow_fallback)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = _ERRORS_ONLY
    session = within(
        load_seconds,
        lambda: _open(runtime, folder / GRAPH, options, wanted, allow_fallback),
        f"{folder / GRAPH}: ONNX Runtime did not open it within {load_seconds:g} s",
    )
    if session.get_providers()[0] != wanted[0] and not allow_fallback:
        raise ProviderError(_fallback(wanted[0], session.get_providers()[0]))
    check_graph(session, manifest, folder / GRAPH)
    return session


def _open(runtime: Any, graph: Path, options: Any, wanted: list[str], allow_fallback: bool) -> Any:
    available = set(runtime.get_available_providers())
    usable = [name for name in wanted if name in available] or [CPU]
    if CPU not in usable:
        usable.append(CPU)  # shapes are computed on the CPU for every device
    pairs = [(name, _OPTIONS.get(name, {})) for name in usable]
    try:
        # Its own fallback prints to standard output, where `rank` writes rows.
        return runtime.InferenceSession(
            str(graph), options, providers=pairs, enable_fallback=int(allow_fallback)
        )
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
    wanted = {name: ("tensor(int64)", rank) for name, rank in INPUTS.items()}
    if manifest.graph.kind == CACHED_REFERENCE:
        wanted[REFERENCE_INPUT] = ("tensor(float)", 1)
    if inputs != wanted or not _has_known_defaults(session, manifest):
        raise BundleError(f"{where}: its inputs are not those of a scorer")
    given = dict.fromkeys(manifest.graph.outputs, ("tensor(float)", 1))
    if (per_token := manifest.graph.token_output) is not None:
        given[per_token] = ("tensor(float)", 2)
    if outputs != given:
        raise BundleError(f"{where}: its outputs are not those of a scorer")
    properties = session.get_modelmeta().custom_metadata_map
    stated = graph_properties(
        manifest.beta, manifest.policy, manifest.reference, manifest.format_version
    )
    if (digest := manifest.tokenization_digest) is not None:
        stated[TOKENIZATION] = digest
    for name, value in stated.items():
        if properties.get(name) != value:
            raise BundleError(f"{where}: its {name} differs from the manifest")


def _has_known_defaults(session: Any, manifest: Manifest) -> bool:
    """Return whether the inputs with defaults are those of adapters, if the graph takes them."""
    found = session.get_overridable_initializers()
    if not manifest.graph.takes_adapters:
        return not found
    return bool(found) and all(
        value.name.endswith(RANK_INPUTS) and value.type == "tensor(float)" for value in found
    )


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
