"""Which kernel computes the attention of shared prompts, and why not a faster one."""

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from os import environ
from pathlib import Path
from shutil import which
from typing import Literal, NamedTuple, get_args

import torch

from logratio.errors import LogratioError

Kernel = Literal["flash3_merged", "flash3", "merged", "varlen", "flash_attn", "flex", "sdpa"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
"""Fastest first: variable-length attention of FlashAttention-3, torch (FlashAttention-2) and
flash-attn 2, FlexAttention, and `scaled_dot_product_attention` group by group, which runs
everywhere. Those that are "merged" attend to prompts apart, the others to gathered keys."""

MERGED: tuple[Kernel, ...] = ("flash3_merged", "merged")
FLASH3: tuple[Kernel, ...] = ("flash3_merged", "flash3")

HALF = (torch.float16, torch.bfloat16)


class KernelError(LogratioError, ValueError):
    """A kernel that was asked for cannot do what the model needs."""


@dataclass(frozen=True)
class Wanted:
    """What a layer wants of its attention.

    Attributes:
        device: "cpu", "cuda" ….
        dtype: of queries, keys and values.
        head_dim: of queries and keys.
        value_dim: of values.
        heads: of queries.
        key_heads: of keys and values; divides `heads`.
        softcap: scores are capped at this (Gemma 2), or None.
        dropout: share of the attention weights to drop.
        sinks: whether there are scores that have no value (gpt-oss).
        sequences: whether the batch brings its `Sequences`.
        windowed: whether a token sees the tokens of a window only; how many is no criterion.
        repeated: whether a batch has its prompts' keys so often that gathering them costs more than
            merging (`merged.merging_pays`).
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
    repeated: bool = False


class Choice(NamedTuple):
    """A kernel, and the reason for each faster one that was passed over."""

    name: Kernel
    passed_over: tuple[tuple[Kernel, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return self.name + (f" ({reasons})" if reasons else "")


Missing = tuple[tuple[Kernel, str], ...]
"""Kernels that are not installed here, each with what is missing."""


def kernel_for(wanted: Wanted, missing: Missing = (), forced: Kernel | None = None) -> Choice:
    """Return the fastest kernel that does what is wanted, or `forced`.

    Raises:
        KernelError: the forced one cannot do it; says why.
    """
    passed_over: list[tuple[Kernel, str]] = []
    for name in KERNELS if forced is None else (forced,):
        reason = dict(missing).get(name) or _refusal(name, wanted)
        if forced is None and name in MERGED and not wanted.repeated:
            reason = reason or "gathering these prompts' keys costs less"
        if reason is None:
            break
        passed_over.append((name, reason))
    else:
        raise KernelError(f"{forced} cannot compute this attention: {passed_over[0][1]}")
    return Choice(name, tuple(passed_over))


def _refusal(name: Kernel, wanted: Wanted) -> str | None:
    """Say why a kernel cannot do what is wanted, or return None."""
    if name == "sdpa":
        return None
    if wanted.device != "cuda":
        return f"the device is {wanted.device}"
    if not wanted.sequences:
        return "the batch was laid out without cu_seqlens_q"
    if wanted.sinks:
        return "it has no sinks"
    if wanted.dropout and name != "flash_attn":
        return "it has no dropout"
    if name == "flex":
        return _flex_refusal(wanted)
    if name not in ("flash3", "flash_attn") and wanted.softcap is not None:
        return "it has no soft-capping"
    if name in MERGED and wanted.windowed:
        return "a window reaches from a completion into its prompt"
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
    """Refuse what its tiles do not fit: at other head sizes they exceed the shared memory."""
    if wanted.dtype not in (*HALF, torch.float32):
        return f"{wanted.dtype}"
    whole = 128 if wanted.dtype in HALF else 64
    for size in (wanted.head_dim, wanted.value_dim):
        if not (16 <= size <= whole or size in (128, 256)):
            return f"heads of {size}"
    return None


@cache
def missing_kernels() -> Missing:
    """Return which kernels are not installed here, and what each of them lacks."""
    missing: list[tuple[Kernel, str]] = []
    if find_spec("flash_attn_interface") is None:
        missing += [(name, "FlashAttention-3 is not installed") for name in FLASH3]
    if lacking := _flash_lacks():
        missing.append(("flash_attn", lacking))
    if lacking := _compiler_lacks():
        missing.append(("flex", f"it is compiled on its first use, which needs {lacking}"))
    return tuple(missing)


def _flash_lacks() -> str | None:
    """Say what is wrong with flash-attn 2, or return None: later ones share its name alone."""
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"flash-attn cannot be imported: {error}"
    return None


def _compiler_lacks() -> str | None:
    """Name what Triton lacks to compile a kernel, or return None."""
    if find_spec("triton") is None:
        return "triton"
    if not (environ.get("CC") or which("gcc") or which("clang")):
        return "a C compiler"
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's own Python, whose header is not where it installs to
        scheme = "posix_prefix"
    if not (Path(sysconfig.get_path("include", scheme)) / "Python.h").is_file():
        return "Python.h (the development files of Python)"
    return None


_FORCED: ContextVar[Kernel | None] = ContextVar("kernel", default=None)


@contextmanager
def use_kernel(name: Kernel) -> Iterator[None]:
    """Let batches whose forward pass begins in this block use this kernel: for tests and benches.

    Raises:
        KernelError: no kernel has this name.
    """
    if name not in KERNELS:
        raise KernelError(f"no kernel is named {name!r}: choose one of {', '.join(KERNELS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def forced_kernel() -> Kernel | None:
    """Return what `use_kernel` asks for; a batch keeps it, for its backward runs elsewhere."""
    return _FORCED.get()


@cache
def tell(choice: Choice) -> None:
    """Say once which kernel is used on a GPU, and why not a faster one."""
    sys.stderr.write(f"attention of shared prompts: {choice}\n")
