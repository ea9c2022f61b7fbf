"""Tensors in shards, in safetensors files: torch.distributed.checkpoint with Hugging Face's format.

Each process writes one file with its shards and their places in the whole tensors. Any number of
processes can read them, and files of whole tensors too. Unlike torch's own format, no file is a
pickle.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor

from logratio.training.parallel.processes import Processes


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are divided among processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, processes: Processes, *, background: bool
) -> "Future[None]":
    """Write sharded tensors to `folder`; all processes call this together.

    Args:
        tensors: The tensors by name.
        folder: The folder, on a file system that all processes share.
        processes: The processes.
        background: Copy the tensors to host memory, and write the copy in a thread.

    Returns:
        The end of the writing. Its exception, if any, is the same in all processes: see `reasons`.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    done = Future[None]()
    if background:
        group = processes.group_for_writing
        started: Any = async_save(dict(tensors), storage_writer=writer, process_group=group)
        started.add_done_callback(partial(_pass_on, done))
        return done
    try:
        save(dict(tensors), storage_writer=writer)
        done.set_result(None)
    except CheckpointException as error:
        done.set_exception(error)
    return done


def _pass_on(done: "Future[None]", started: "Future[Any]") -> None:
    if error := started.exception():
        done.set_exception(error)
    else:
        done.set_result(None)


def read_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors from the files in `folder`, in shards or whole.

    Processes with shards call this together; a process with whole tensors reads alone.

    Raises:
        OSError: A process could not read; the message names its rank.
    """
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    reader = HuggingFaceStorageReader(str(folder))
    try:
        load(dict(tensors), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise OSError(reasons(error)) from error


def reasons(error: BaseException) -> str:
    """Describe which ranks could not write or read, and why; "" for another exception."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in failures.items())


def whole_weights(policy: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather the whole weights of a sharded policy on the host, one at a time.

    All processes call this together; those that do not `keep` the weights get an empty dict.
    Frozen weights of a policy with adapters stay away: only the adapters are saved.
    """
    gathered, kept = dict[int, Tensor](), dict[str, Tensor]()
    has_adapters = hasattr(policy, "peft_config")
    named: Any = policy.state_dict(keep_vars=True).items()
    for name, tensor in named:
        if has_adapters and not tensor.requires_grad:
            continue
        if id(tensor) not in gathered:  # tied weights are one tensor
            gathered[id(tensor)] = _gathered(tensor, keep=keep)
        if keep:
            kept[name] = gathered[id(tensor)]
    return kept


def _gathered(tensor: Tensor, *, keep: bool) -> Tensor:
    """Gather a whole tensor on the host, or drop it at once and return the shard."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if keep else tensor
