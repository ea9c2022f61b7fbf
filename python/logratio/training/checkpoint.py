"""Atomic checkpoints, and the signal handling that saves one when a run is interrupted."""

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from logratio.errors import LogratioError
from logratio.progress import is_silent
from logratio.training.checkpoint_folder import (
    Writing,
    damage,
    is_whole,
    tensor_folder,
)
from logratio.training.config import UNRECORDED
from logratio.training.optimizers import FUSED, MasterAdamW, create_state
from logratio.training.parallel.processes import ALONE, Processes
from logratio.training.parallel.sharded_files import read_shards

Tensors = Mapping[str, Tensor]
"""Tensors by name."""


class RunInterruptedError(LogratioError):
    """A run was stopped by a signal; its state has been saved.

    Attributes:
        exit_code: 128 + the signal number, as shells expect.
    """

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {where}")
        self.exit_code = 128 + signal_number


_NOTICE = (
    b"\nstopping once the work in progress is saved; press Ctrl-C again to stop without saving\n"
)


@contextmanager
def interrupts() -> Iterator[Callable[[], int | None]]:
    """Catch the first signal inside the block; a second one ends the process at once.

    The first one prints what happens now, since an update can take minutes: of several processes,
    to which a launcher passes it on, the first one does.

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
        if not is_silent():
            with suppress(OSError):  # not `say`: it may arrive inside a write to sys.stderr
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


_BEST = "best-"


@dataclass(frozen=True)
class Position:
    """Progress of a run.

    Attributes:
        step: Number of updates done.
        identity: Settings that identify the run, so that another run is not resumed from it.
        selection: State of the choice of the best evaluation; None in checkpoints of versions
            without evaluation.
        memory: Running numbers of the loss, for each method that has any.
    """

    step: int
    identity: dict[str, Any]
    selection: dict[str, Any] | None = None
    memory: dict[str, dict[str, float]] = field(default_factory=dict)


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
    final = begin_save(folder, model, optimizer, at, processes).finish()
    if processes.is_first:
        remove_old(folder, at, keep)
    return final


def begin_save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    at: Position,
    processes: Processes = ALONE,
    *,
    reference: Tensors | None = None,
    background: bool = False,
) -> Writing:
    """Begin to write a checkpoint, which `finish` of the result completes: see `save`.

    Args:
        folder: Folder of the run's checkpoints.
        model: The model.
        optimizer: Its optimizer.
        at: Progress of the run.
        processes: The processes of the run.
        reference: Weights of a reference that changes during the run, by name; None: it stays.
        background: Write the shards of a sharded model while the run goes on.
    """

    def add(partial: Path) -> None:
        save_file(_random_states(), partial / "random.safetensors")
        state = {**asdict(at), "python_random": random.getstate()}
        (partial / "state.json").write_text(json.dumps(state))

    tensors = {"weights": _trainable(model), "optimizer": _optimizer_tensors(model, optimizer)}
    if reference is not None:
        tensors["reference"] = dict(reference)
    final, what = folder / f"checkpoint-{at.step:08d}", f"the checkpoint of update {at.step}"
    return Writing(final, what, tensors, processes, add, background=background)


def remove_old(folder: Path, at: Position, keep: int) -> None:
    """Remove all but the last `keep` checkpoints, and the best models that no checkpoint needs."""
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    _remove_bests(folder, at)


def save_best(folder: Path, model: nn.Module, step: int, processes: Processes = ALONE) -> Path:
    """Write the trained weights after update `step` to `best-<step>` in `folder`.

    Earlier ones stay until no checkpoint needs them: see `save`.

    Raises:
        SaveError: The weights were not written; checkpoints are unchanged.
    """
    final = folder / f"{_BEST}{step:08d}"
    weights = {"weights": _trainable(model)}
    return Writing(final, f"the best model, of update {step},", weights, processes).finish()


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
    reference: Tensors | None = None,
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
        return _load(path, model, optimizer, reference), refused
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


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], where: tuple[str, str] = ("before", "now")
) -> str:
    """Describe the settings in which two identities differ, with their values; "" if in none.

    Args:
        one: An identity.
        other: The identity to compare it with; only its settings are compared.
        where: The words after the values of `one` and of `other`.
    """
    names = [name for name, value in other.items() if one.get(name) != value]
    return ", ".join(f"{name}{_values(one.get(name), other[name], where)}" for name in names)


def _values(one: Any, other: Any, where: tuple[str, str]) -> str:
    """Return both values for a message, unless they are digests or too long to compare."""
    texts = [json.dumps(value) for value in (one, other)]
    if max(map(len, texts)) >= 30:
        return ""
    return f" ({texts[0]} {where[0]}, {texts[1]} {where[1]})"


def _load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    reference: Tensors | None,
) -> Position:
    _restore_weights(path, model)
    if is_whole(path, model):
        _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
    else:
        create_state(optimizer)
        read_shards(_optimizer_tensors(model, optimizer), tensor_folder(path))
    if reference is not None:
        _restore_reference(path, model, reference)
    state = json.loads((path / "state.json").read_text())
    _restore_random(load_file(path / "random.safetensors"), state["python_random"])
    return Position(
        state["step"], state["identity"], state.get("selection"), state.get("memory", {})
    )


def _restore_reference(path: Path, model: nn.Module, reference: Tensors) -> None:
    """Fill the weights of a reference that changes during the run."""
    if not is_whole(path, model):
        read_shards(reference, tensor_folder(path))
        return
    saved = load_file(path / "reference.safetensors")
    for name, tensor in reference.items():
        tensor.copy_(saved[name])


def _restore_weights(path: Path, model: nn.Module) -> None:
    if not is_whole(path, model):
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        read_shards(trained, tensor_folder(path))
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path / "weights.safetensors").items():
            parameters[name].copy_(value)


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
