"""Choose the kernel for shared-prompt attention, and explain why faster ones are not used."""

import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from os import environ
from pathlib import Path
from shutil import which
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch

from logratio.errors import LogratioError

Kernel = Literal["flash3_merged", "flash3", "merged", "varlen", "flash_attn", "flex", "sdpa"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
"""Kernels, fastest first: variable-length attention of FlashAttention-3, of torch
(FlashAttention-2) and of flash-attn 2; FlexAttention; and `scaled_dot_product_attention` group by
group, which runs everywhere. "Merged" kernels attend to prompts in a separate call; the other
variable-length kernels attend to gathered keys."""

MERGED: tuple[Kernel, ...] = ("flash3_merged", "merged")
TRACED: tuple[Kernel, ...] = ("merged", "varlen")
"""Kernels that torch.compile makes a part of a layer's graph."""
FLASH3: tuple[Kernel, ...] = ("flash3_merged", "flash3")

HALF = (torch.float16, torch.bfloat16)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Mark a function that compiled layers call once, when they are traced."""
    marked: Function = torch.compiler.assume_constant_result(function)
    return marked


class KernelError(LogratioError, ValueError):
    """The requested kernel does not support the model's attention."""


@dataclass(frozen=True)
class Wanted:
    """Requirements of a layer on its attention kernel.

    Attributes:
        device: Device type: "cpu", "cuda", and so on.
        dtype: Dtype of queries, keys and values.
        head_dim: Head dimension of queries and keys.
        value_dim: Head dimension of values.
        heads: Number of query heads.
        key_heads: Number of key and value heads; divides `heads`.
        softcap: Cap of the scores (Gemma 2), or None.
        dropout: Dropout probability of the attention weights.
        sinks: Whether the layer has attention sinks (gpt-oss).
        sequences: Whether the batch has `Sequences`.
        windowed: Whether the layer has a sliding window, of any length.
        tree: Whether the row is a tree, whose runs see paths of other runs.
        repeated: Whether prompts have so many completions that merging costs less than gathering
            their keys (`flash.merging_pays`).
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    heads: int = 1
    key_heads: int = 1
    softcap: float | None = None
    dropout: float = 0.0
    sinks: bool = False
    sequences: bool = True
    windowed: bool = False
    tree: bool = False
    repeated: bool = False


class Choice(NamedTuple):
    """The chosen kernel, and the reason for each faster one that was skipped."""

    name: Kernel
    passed_over: tuple[tuple[Kernel, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return self.name + (f" ({reasons})" if reasons else "")


Missing = tuple[tuple[Kernel, str], ...]
"""Kernels that are not installed, each with the missing dependency."""


def kernel_for(wanted: Wanted, missing: Missing = (), forced: Kernel | None = None) -> Choice:
    """Return the fastest kernel that supports `wanted`, or `forced`.

    Args:
        wanted: Requirements of the layer.
        missing: Kernels that cannot be used on this machine.
        forced: The only kernel to consider; None: all.

    Raises:
        KernelError: The forced kernel does not support `wanted`; the message gives the reason.
    """
    passed_over: list[tuple[Kernel, str]] = []
    for name in KERNELS if forced is None else (forced,):
        reason = dict(missing).get(name) or _refusal(name, wanted)
        if forced is None and name in MERGED and not wanted.repeated:
            reason = reason or "gathering the keys of these prompts costs less"
        if reason is None:
            break
        passed_over.append((name, reason))
    else:
        raise KernelError(f"{forced} cannot compute this attention: {passed_over[0][1]}")
    return Choice(name, tuple(passed_over))


def _refusal(name: Kernel, wanted: Wanted) -> str | None:
    """Return the reason why a kernel does not support `wanted`, or None."""
    if name == "sdpa":
        return None
    if wanted.device != "cuda":
        return f"the device is {wanted.device}"
    if not wanted.sequences:
        return "the batch was laid out without cu_seqlens_q"
    if wanted.sinks:
        return "it does not support sinks"
    if wanted.dropout and name != "flash_attn":
        return "it does not support dropout"
    if name == "flex":
        return _flex_refusal(wanted)
    if name not in ("flash3", "flash_attn") and wanted.softcap is not None:
        return "it does not support soft-capping"
    if name in MERGED and wanted.tree:
        return "it does not support trees"
    if name in MERGED and wanted.windowed:
        return "it does not support windows that extend from a completion into its prompt"
    return _flash_refusal(wanted)


def _flash_refusal(wanted: Wanted) -> str | None:
    if wanted.dtype not in HALF:
        return f"{wanted.dtype} is neither float16 nor bfloat16"
    if wanted.head_dim != wanted.value_dim:
        return f"heads of {wanted.head_dim} with values of {wanted.value_dim}"
    if wanted.head_dim > 256 or wanted.head_dim % 8:
        return f"heads of {wanted.head_dim}"
    return None


def _flex_refusal(wanted: Wanted) -> str | None:
    """Refuse head dimensions for which FlexAttention's tiles exceed the GPU's shared memory."""
    if wanted.dtype not in (*HALF, torch.float32):
        return f"{wanted.dtype}"
    whole = 128 if wanted.dtype in HALF else 64
    for size in (wanted.head_dim, wanted.value_dim):
        if not (16 <= size <= whole or size in (128, 256)):
            return f"heads of {size}"
    return None


@cache
def missing_kernels() -> Missing:
    """Return the kernels that are not installed, and what each of them needs."""
    missing: list[tuple[Kernel, str]] = []
    if find_spec("flash_attn_interface") is None:
        missing += [(name, "FlashAttention-3 is not installed") for name in FLASH3]
    if lacking := _flash_lacks():
        missing.append(("flash_attn", lacking))
    if lacking := _compiler_lacks():
        missing.append(("flex", f"it is compiled on its first use, which needs {lacking}"))
    return tuple(missing)


def _flash_lacks() -> str | None:
    """Return the reason why flash-attn 2 is not usable, or None.

    Version 4 has the same package name, but not this function.
    """
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"flash-attn cannot be imported: {error}"
    return None


def _compiler_lacks() -> str | None:
    """Return the missing dependency of Triton's compiler, or None."""
    if find_spec("triton") is None:
        return "triton"
    if not (environ.get("CC") or which("gcc") or which("clang")):
        return "a C compiler"
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's Python, whose headers are in the prefix scheme
        scheme = "posix_prefix"
    if not (Path(sysconfig.get_path("include", scheme)) / "Python.h").is_file():
        return "Python.h (the development files of Python)"
    return None


_FORCED: ContextVar[Kernel | None] = ContextVar("kernel", default=None)


@contextmanager
def use_kernel(name: Kernel) -> Iterator[None]:
    """Use this kernel for batches whose forward pass starts in the block, for tests and benchmarks.

    Raises:
        KernelError: The name is unknown.
    """
    if name not in KERNELS:
        raise KernelError(f"unknown kernel {name!r}: choose one of {', '.join(KERNELS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def forced_kernel() -> Kernel | None:
    """Return the kernel set by `use_kernel`, or None.

    Batches store it, because their backward pass may run outside of the block, in another thread.
    """
    return _FORCED.get()


@cache
def report_choice(choice: Choice) -> None:
    """Print, once per choice, which kernel is used on a GPU and why no faster one."""
    sys.stderr.write(f"shared-prompt attention: {choice}\n")
