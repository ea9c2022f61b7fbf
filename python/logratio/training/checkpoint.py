"""Atomic checkpoints, and the signal handling that saves one when a run is interrupted."""

import hashlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from logratio.durable import finalize, sync, system_errors
from logratio.errors import LogratioError
from logratio.training.config import UNRECORDED
from logratio.training.optimizers import FUSED, MasterAdamW, create_state
from logratio.training.parallel.processes import Processes
from logratio.training.parallel.sharded_files import is_sharded, read_shards, write_shards


class RunInterruptedError(LogratioError):
    """A run was stopped by a signal; its state has been saved.

    Attributes:
        exit_code: 128 + the signal number, as shells expect.
    """

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {where}")
        self.exit_code = 128 + signal_number


class SaveError(LogratioError, OSError):
    """A model or checkpoint could not be written; files saved earlier are unchanged."""


_NOTICE = (
    b"\nstopping once the work in progress is saved; press Ctrl-C again to stop without saving\n"
)


@contextmanager
def interrupts() -> Iterator[Callable[[], int | None]]:
    """Catch the first signal inside the block; a second one ends the process at once.

    The first one prints what happens now, since an update can take minutes.

    Yields:
        A function that returns the number of the received signal, or None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python delivers signals to the main thread only
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with suppress(OSError):  # not `say`: the signal may arrive inside a write to sys.stderr
            os.write(2, _NOTICE)
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


MANIFEST = "manifest.json"
SHARDS = "shards"
"""Subfolder with the tensors of a sharded model, of all processes."""
ALONE = Processes()
_BEST = "best-"


@dataclass(frozen=True)
class Position:
    """Progress of a run.

    Attributes:
        step: Number of updates done.
        identity: Settings that identify the run, so that another run is not resumed from it.
        selection: State of the choice of the best evaluation; None in checkpoints of versions
            without evaluation.
    """

    step: int
    identity: dict[str, Any]
    selection: dict[str, Any] | None = None


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    at: Position,
    keep: int = 2,
    processes: Processes = ALONE,
) -> Path:
    """Write `checkpoint-<step>` to `folder`, and remove all but the last `keep` checkpoints.

    The checkpoint is written under a temporary name and renamed when complete. All processes of a
    run call this together. The first one writes a model that every process has; each writes its
    shards of a sharded one.

    Returns:
        The folder of the new checkpoint.

    Raises:
        SaveError: The checkpoint was not written; earlier ones are unchanged.
    """
    final = folder / f"checkpoint-{at.step:08d}"
    tensors = {
        "weights": _trainable(model),
        "optimizer": _optimizer_tensors(model, optimizer),
    }

    def add(partial: Path) -> None:
        save_file(_random_states(), partial / "random.safetensors")
        state = {**asdict(at), "python_random": random.getstate()}
        (partial / "state.json").write_text(json.dumps(state))

    _write(final, f"the checkpoint of update {at.step}", tensors, processes, add)
    if processes.is_first:
        for old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        _remove_bests(folder, at)
    return final


def save_best(folder: Path, model: nn.Module, step: int, processes: Processes = ALONE) -> Path:
    """Write the trained weights after update `step` to `best-<step>` in `folder`.

    Earlier ones stay until no checkpoint needs them: see `save`.

    Raises:
        SaveError: The weights were not written; checkpoints are unchanged.
    """
    final = folder / f"{_BEST}{step:08d}"
    weights = {"weights": _trainable(model)}
    _write(final, f"the best model, of update {step},", weights, processes)
    return final


def _write(
    final: Path,
    what: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    processes: Processes,
    add: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write tensors, one file for each name, or shards of them all; `add` adds other files.

    Raises:
        SaveError: Something could not be written; the message names `what`.
    """
    if any(isinstance(t, DTensor) for some in tensors.values() for t in some.values()):
        _write_together(final, what, tensors, processes, add)
        return
    if processes.is_first:
        with _whole_or_absent(final, what) as partial:
            for name, some in tensors.items():
                save_file(dict(some), partial / f"{name}.safetensors")
            add(partial)
            _write_manifest(partial, _digests(partial))
    processes.wait()


def _write_together(
    final: Path,
    what: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    processes: Processes,
    add: Callable[[Path], None],
) -> None:
    """Write every process's shards; the first process completes the folder."""
    together = {name: tensor for some in tensors.values() for name, tensor in some.items()}
    with ExitStack() as stack:
        partial = _partial(final)
        if processes.is_first:
            stack.enter_context(_whole_or_absent(final, what))
        processes.wait()
        try:
            write_shards(together, partial / SHARDS)
            own = _digests(partial, processes.rank, processes.count)
        except OSError as error:
            if processes.is_first:
                raise
            raise SaveError(f"{what} could not be saved ({error})") from error
        digests = {name: hashed for some in processes.share(own) for name, hashed in some.items()}
        if processes.is_first:
            add(partial)
            _write_manifest(partial, digests | _digests(partial, skip=SHARDS))
    processes.wait()


def _partial(final: Path) -> Path:
    return final.with_name(f".partial-{final.name}")


@contextmanager
def _whole_or_absent(final: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `final` if the block succeeds.

    Raises:
        SaveError: Something could not be written; the message names `what`.
    """
    partial = _partial(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with system_errors(partial):
            yield partial
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(final.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"{what} could not be saved ({error}); {_kept(final.parent)}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _kept(folder: Path) -> str:
    last = newest(folder)
    if last is None:
        return "no earlier checkpoint exists"
    return f"{last} is complete: free some disk space, then continue from it with --resume"


def load_best(folder: Path, model: nn.Module, step: int, processes: Processes = ALONE) -> None:
    """Restore the weights of `save_best`.

    Raises:
        ResumeError: They are missing or damaged; `model` was not changed.
    """
    path = folder / f"{_BEST}{step:08d}"
    if reason := damage(path, processes):
        raise ResumeError(f"{path}: the best model so far cannot be read: {reason}")
    _restore_weights(path, model)


def _remove_bests(folder: Path, at: Position) -> None:
    """Remove the best models that neither `at` nor a kept checkpoint refers to."""
    states = [at.selection, *(_state(path).get("selection") for path in _checkpoints(folder))]
    needed = {state["best_step"] for state in states if state}
    for path in folder.glob(f"{_BEST}*"):
        if int(path.name.removeprefix(_BEST)) not in needed:
            shutil.rmtree(path, ignore_errors=True)


def _state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a checkpoint; empty if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


class ResumeError(LogratioError, ValueError):
    """No valid checkpoint was found, or the newest belongs to a different run."""


def load_newest(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    processes: Processes = ALONE,
) -> tuple[Position | None, list[str]]:
    """Restore the newest valid checkpoint in `folder`, if it belongs to the run with `identity`.

    It may have been written by another number of processes, sharded or not.

    Returns:
        The restored position, or None if `folder` has no checkpoints; and a message for each
        damaged checkpoint that was skipped.

    Raises:
        ResumeError: All checkpoints are damaged, or the newest valid one belongs to a different
            run; nothing was restored.
    """
    refused = []
    for path in _checkpoints(folder):
        if reason := damage(path, processes):
            refused.append(f"{path}: {reason}")
            continue
        _check_identity(path, identity)
        return _load(path, model, optimizer), refused
    if refused:
        raise ResumeError("no valid checkpoint to resume from: " + "; ".join(refused))
    return None, []


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    saved = UNRECORDED | json.loads((path / "state.json").read_text())["identity"]
    if changed := differences(saved, identity):
        raise ResumeError(
            f"{path}: the run to resume differs in {changed}: give the same settings to continue "
            "it, or --overwrite to start again"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the settings in which two identities differ, with their values; "" if in none."""
    names = [name for name, value in now.items() if before.get(name) != value]
    return ", ".join(f"{name}{_values(before.get(name), now[name])}" for name in names)


def _values(before: Any, now: Any) -> str:
    """Return both values for a message, unless they are digests or too long to compare."""
    texts = [json.dumps(value) for value in (before, now)]
    return f" ({texts[0]} before, {texts[1]} now)" if max(map(len, texts)) < 30 else ""


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
            if _digest(path / name) != expected:
                return f"{name} was altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"
    return None


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    _restore_weights(path, model)
    if _is_whole(path, model):
        _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
    else:
        create_state(optimizer)
        read_shards(_optimizer_tensors(model, optimizer), _shards(path))
    state = json.loads((path / "state.json").read_text())
    _restore_random(load_file(path / "random.safetensors"), state["python_random"])
    return Position(state["step"], state["identity"], state.get("selection"))


def _restore_weights(path: Path, model: nn.Module) -> None:
    if not _is_whole(path, model):
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        read_shards(trained, _shards(path))
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path / "weights.safetensors").items():
            parameters[name].copy_(value)


def _is_whole(path: Path, model: nn.Module) -> bool:
    """Return whether neither a checkpoint nor the model is sharded."""
    return not (path / SHARDS).exists() and not is_sharded(model)


def _shards(path: Path) -> Path:
    """Return the folder with a checkpoint's tensors."""
    return path / SHARDS if (path / SHARDS).exists() else path


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer state by name; a tensor shared by parameters is copied for each.

    safetensors refuses to save tensors that share memory.
    """
    tensors, seen = {}, set()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value).contiguous()  # bitsandbytes stores its step as an int
            if not isinstance(tensor, DTensor):
                place = tensor.device, tensor.data_ptr()
                tensor = tensor.clone() if place in seen else tensor
                seen.add(place)
            tensors[f"{name}:{key}"] = tensor
    return tensors


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for label, value in tensors.items():
        name, key = label.rsplit(":", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = _placed(optimizer, parameter, value)


def _placed(optimizer: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> Tensor | int:
    """Return a value of the state with the type and device that the optimizer uses."""
    if value.dim() == 0 and not value.dtype.is_floating_point:
        return int(value)
    home = (
        optimizer.state_device(parameter)
        if isinstance(optimizer, MasterAdamW)
        else parameter.device
    )
    is_counter = value.dim() == 0 and home.type not in FUSED
    return value if is_counter else value.to(home)


def _random_states() -> dict[str, Tensor]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    assert kind == "MT19937"
    for device in range(torch.cuda.device_count()):
        states[f"cuda:{device}"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random(states: dict[str, Tensor], python_random: list[Any]) -> None:
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, internal, gauss_next = python_random
    random.setstate((version, tuple(internal), gauss_next))
    for device in range(torch.cuda.device_count()):
        if f"cuda:{device}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{device}"], device)


def _write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    manifest = {"format_version": 1, "files": dict(sorted(digests.items()))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        if path.is_file():
            finalize(path)
    sync(folder)


def _digests(folder: Path, part: int = 0, parts: int = 1, skip: str = "") -> dict[str, str]:
    """Hash the files in a folder and its subfolders, or every `parts`-th of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    kept = [name for name in names if not skip or not name.startswith(skip)]
    return {name: _digest(folder / name) for name in kept[part::parts]}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, valid or not; None if there are none."""
    return next(iter(_checkpoints(folder)), None)


def recorded(folder: Path, name: str) -> Any:
    """Return the value of `name` in the newest readable checkpoint's identity, or None."""
    for path in _checkpoints(folder):
        if isinstance(found := _state(path).get("identity"), dict):
            return found.get(name)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, newest first."""
    return sorted(folder.glob("checkpoint-*"), reverse=True)
