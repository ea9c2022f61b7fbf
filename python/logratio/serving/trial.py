"""Load a bundle in another process, within limits of time and memory.

A graph can make ONNX Runtime compute for hours, allocate all memory or crash, already while it is
opened. In another process this does not affect the caller, so `logratio bundle verify` loads
bundles there.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logratio.bundle import BundleError, read_manifest
from logratio.errors import LogratioError
from logratio.serving.session import LOAD_SECONDS

_PROCESS_BYTES, _COPIES = 6 * 2**30, 4
"""Address space of a process without a bundle, and the copies of the files that it may map."""
_PATIENCE = 1.5
"""The child ends itself after the limit; it is killed after this multiple of it."""


@dataclass(frozen=True)
class Trial:
    """A bundle that loads.

    Attributes:
        groups: Number of golden groups that were scored.
        largest: Largest difference of a reward from the export.
    """

    groups: int
    largest: float


def try_bundle(
    folder: str | Path,
    *,
    seconds: float = LOAD_SECONDS,
    memory_bytes: int | None = None,
    expect: str | None = None,
    base: str | Path | None = None,
) -> Trial:
    """Load a bundle on the CPU in another process, and score its golden groups.

    Args:
        folder: The bundle.
        seconds: Time limit of the process.
        memory_bytes: Limit of its address space, on Linux. None: 6 GiB and four times the bundle.
        expect: The bundle's digest; None: any.
        base: The bundle of its base, if it is an adapter.

    Returns:
        What the golden groups gave.

    Raises:
        BundleError: The bundle is refused, or the process crashed, or it exceeded a limit.
        LogratioError: ONNX Runtime cannot be used here.
    """
    if memory_bytes is None:
        folders = [folder] if base is None else [folder, base]
        sizes = [one.size for place in folders for one in read_manifest(place).files.values()]
        memory_bytes = _PROCESS_BYTES + _COPIES * sum(sizes)
    task: dict[str, Any] = {"folder": str(folder), "seconds": seconds, "memory_bytes": memory_bytes}
    task |= {"expect": expect, "base": None if base is None else str(base)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "logratio.serving.trial"],
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=_PATIENCE * seconds,
            env=os.environ | {"MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"{folder}: it did not load within {seconds:g} s") from error
    return _result(folder, done, memory_bytes)


def _result(
    folder: str | Path, done: "subprocess.CompletedProcess[bytes]", memory_bytes: int
) -> Trial:
    """Read what the process wrote, or why it wrote nothing."""
    limit = f"with {memory_bytes / 2**30:.1f} GiB of memory"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BundleError(f"{folder}: loading it {limit} crashed the process ({name})")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BundleError(f"{folder}: loading it {limit} failed: {' '.join(last)}") from error
    if "error" in answer:
        kind = BundleError if answer["is_refusal"] else LogratioError
        raise kind(answer["error"])
    return Trial(**answer)


def _limit(task: dict[str, Any]) -> None:
    """Limit this process: its memory, and no new files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (task["memory_bytes"], task["memory_bytes"]))


def _attempt(task: dict[str, Any]) -> dict[str, Any]:
    from logratio.serving.reranker import Reranker

    try:
        reranker = Reranker.load(
            task["folder"],
            expect=task["expect"],
            load_seconds=task["seconds"],
            base=task["base"],
        )
        return asdict(Trial(len(reranker.manifest.golden), reranker.largest_difference))
    except MemoryError:
        limit = f"{task['memory_bytes'] / 2**30:.1f} GiB"
        return {"error": f"{task['folder']}: needs more than {limit}", "is_refusal": True}
    except LogratioError as error:
        return {"error": str(error), "is_refusal": isinstance(error, BundleError)}


def main() -> None:
    """Load the bundle that standard input names, and print the result as a line of JSON."""
    task = json.loads(sys.stdin.read())
    _limit(task)
    answer = _attempt(task)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a thread may still be inside ONNX Runtime


if __name__ == "__main__":
    main()
