"""A folder of tensors that is whole or absent, written by one process or by all of them.

It is written under a temporary name, with a manifest of the files' hashes, and renamed when it is
complete. Tensors of a model that every process has are one file each kind. Those of a sharded
model are one file a process, which any number of processes can read.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from logratio.durable import finalize, sync, system_errors
from logratio.errors import LogratioError
from logratio.training.parallel.processes import ALONE, Processes
from logratio.training.parallel.sharded_files import is_sharded, reasons, write_shards

MANIFEST = "manifest.json"
SHARDS = "shards"
"""Subfolder with the tensors of a sharded model, of all processes."""

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by kind: "weights", "optimizer"."""


class SaveError(LogratioError, OSError):
    """A model or checkpoint could not be written; files saved earlier are unchanged."""


class Writing:
    """A folder that is being written: `finish` completes it. All processes of a run do the same.

    Args:
        final: The folder.
        what: What it contains, for messages.
        tensors: The tensors. Those of a sharded model may change once this returns.
        processes: The processes of the run.
        add: Adds other files to the folder, in the first process.
        background: Write the shards of a sharded model in a thread, from a copy in host memory.

    Raises:
        SaveError: The folder cannot be created.
    """

    def __init__(
        self,
        final: Path,
        what: str,
        tensors: Tensors,
        processes: Processes,
        add: Callable[[Path], None] = lambda _: None,
        *,
        background: bool = False,
    ) -> None:
        self.final, self._what, self._processes = final, what, processes
        self._partial = final.with_name(f".partial-{final.name}")
        self._future: Future[None] | None = None
        self._is_sharded = any(
            isinstance(tensor, DTensor) for some in tensors.values() for tensor in some.values()
        )
        try:
            if processes.is_first:
                self._begin(tensors, add)
            if self._is_sharded:
                processes.wait()
                together = {n: tensor for some in tensors.values() for n, tensor in some.items()}
                self._future = write_shards(
                    together, self._partial / SHARDS, processes, background=background
                )
        except OSError as error:
            raise self._failed(error) from error
        except BaseException:
            self._remove()
            raise

    def _begin(self, tensors: Tensors, add: Callable[[Path], None]) -> None:
        """Create the folder, with all files that this process alone writes."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        with system_errors(self._partial):
            for name, some in {} if self._is_sharded else tensors.items():
                save_file(dict(some), self._partial / f"{name}.safetensors")
            add(self._partial)

    @property
    def is_written(self) -> bool:
        """Whether `finish` need not wait for the disk of this process."""
        return self._future is None or self._future.done()

    def finish(self) -> Path:
        """Wait until all is written, and give the folder its name, which is returned.

        Raises:
            SaveError: Something could not be written; the message names it, and the rank.
        """
        try:
            digests = dict[str, str]()
            if self._future:
                self._future.result()
                for some in self._processes.share(self._digests_of_shards()):
                    digests |= some
            if self._processes.is_first:
                self._complete(digests)
        except OSError as error:
            raise self._failed(error) from error
        except BaseException as error:
            self._remove()
            if failures := reasons(error):
                raise self._failed(OSError(failures)) from error
            raise
        self._processes.wait()
        return self.final

    def _digests_of_shards(self) -> dict[str, str]:
        """Hash this process's part of the shards."""
        files = sorted((self._partial / SHARDS).iterdir())
        own = files[self._processes.rank :: self._processes.count]
        return {f"{SHARDS}/{path.name}": digest(path) for path in own}

    def _complete(self, digests: dict[str, str]) -> None:
        """Write the manifest, and rename the folder."""
        files = [path for path in sorted(self._partial.iterdir()) if path.is_file()]
        digests |= {path.name: digest(path) for path in files}
        manifest = {"format_version": 1, "files": dict(sorted(digests.items()))}
        (self._partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, self._partial / MANIFEST]:
            finalize(path)
        sync(self._partial)
        shutil.rmtree(self.final, ignore_errors=True)
        self._partial.rename(self.final)
        sync(self.final.parent)

    def _remove(self) -> None:
        if self._processes.is_first:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _failed(self, error: OSError) -> SaveError:
        self._remove()
        return SaveError(f"{self._what} could not be saved ({error}); {_kept(self.final.parent)}")


def _kept(folder: Path) -> str:
    last = max(folder.glob("checkpoint-*"), default=None)
    if last is None:
        return "no earlier checkpoint exists"
    return f"{last} is complete: free some disk space, then continue from it with --resume"


def damage(path: Path, processes: Processes = ALONE) -> str | None:
    """Describe the damage of a checkpoint, or return None if it is intact.

    Processes of a run call this together; each reads a part of the files.
    """
    found = processes.share(_damage(path, processes.rank, processes.count))
    return next((reason for reason in found if reason), None)


def _damage(path: Path, part: int, parts: int) -> str | None:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if not any(name.startswith(("weights.safetensors", SHARDS)) for name in dict(files)):
            return f"{MANIFEST} was altered"
        for name, expected in [*files.items()][part::parts]:
            if digest(path / name) != expected:
                return f"{name} was altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"
    return None


def is_whole(path: Path, model: nn.Module) -> bool:
    """Return whether neither the folder's tensors nor the model's are sharded."""
    return not (path / SHARDS).exists() and not is_sharded(model)


def tensor_folder(path: Path) -> Path:
    """Return the subfolder with the tensors."""
    return path / SHARDS if (path / SHARDS).exists() else path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
