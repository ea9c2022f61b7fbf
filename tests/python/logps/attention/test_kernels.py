"""Which attention kernel is chosen for what, why not a faster one, and how one is forced."""

import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracle import Group
from tiny_models import FAMILIES, tiny

from logratio.logps.attention import SharedPrompt, SharedPromptError, kernels, use_kernel
from logratio.logps.attention.kernels import (
    FLASH3,
    Kernel,
    KernelError,
    Missing,
    Wanted,
    kernel_for,
)
from logratio.logps.checks import batch_of
from logratio.logps.completion import score

GROUPS: list[Group] = [([1, 2, 3], [[4, 5], [6]])]
NO_FLASH3: Missing = tuple((name, "FlashAttention-3 is not installed") for name in FLASH3)
NO_FLASH: Missing = (*NO_FLASH3, ("flash_attn", "flash-attn is not installed"))
NOTHING: Missing = (*NO_FLASH, ("flex", "no compiler"))


def wanted(dtype: torch.dtype = torch.bfloat16, size: int = 64, **more: object) -> Wanted:
    return Wanted("cuda", dtype, size, **{"value_dim": size, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "missing", "name"),
    [
        (wanted(), (), "flash3"),
        (wanted(repeated=True), (), "flash3_merged"),
        (wanted(repeated=True), NO_FLASH3, "merged"),
        (wanted(repeated=True, windowed=True), (), "flash3"),
        (wanted(repeated=True, windowed=True), NO_FLASH3, "varlen"),
        (wanted(repeated=True, softcap=50.0), (), "flash3"),
        (wanted(repeated=True, softcap=50.0), NO_FLASH3, "flash_attn"),
        (wanted(torch.float32, repeated=True), (), "flex"),
        (wanted(), NO_FLASH3, "varlen"),
        (wanted(torch.float16, 128), NOTHING, "varlen"),
        (wanted(size=256), NO_FLASH3, "varlen"),
        (wanted(size=8), NO_FLASH3, "varlen"),
        (wanted(softcap=50.0), (), "flash3"),
        (wanted(softcap=50.0), NO_FLASH3, "flash_attn"),
        (wanted(softcap=50.0), NO_FLASH, "flex"),
        (wanted(softcap=50.0), NOTHING, "sdpa"),
        (wanted(dropout=0.1), (), "flash_attn"),
        (wanted(dropout=0.1), NO_FLASH, "sdpa"),
        (wanted(sinks=True), (), "sdpa"),
        (wanted(sequences=False), (), "sdpa"),
        (wanted(torch.float32), (), "flex"),
        (wanted(torch.float32, 128), (), "flex"),
        (wanted(torch.float32, 256), (), "flex"),
        (wanted(torch.float32, 96), (), "sdpa"),
        (wanted(torch.float32, 8), (), "sdpa"),
        (wanted(torch.float32), NOTHING, "sdpa"),
        (wanted(torch.float64), (), "sdpa"),
        (wanted(size=60), (), "flex"),
        (wanted(size=192, value_dim=128), (), "sdpa"),
        (wanted(size=128, value_dim=64), (), "flex"),
        (wanted(size=512), (), "sdpa"),
        (Wanted("cpu", torch.bfloat16, 64, 64), (), "sdpa"),
        (Wanted("mps", torch.bfloat16, 64, 64), (), "sdpa"),
    ],
)
def test_the_fastest_kernel_that_can_is_chosen(what: Wanted, missing: Missing, name: str) -> None:
    choice = kernel_for(what, missing)
    assert choice.name == name
    faster = kernels.KERNELS[: kernels.KERNELS.index(choice.name)]
    assert tuple(passed for passed, _ in choice.passed_over) == faster
    assert all(reason for _, reason in choice.passed_over)


def test_a_choice_reads_as_a_sentence() -> None:
    assert str(kernel_for(wanted(repeated=True))) == "flash3_merged"
    assert str(kernel_for(wanted(windowed=True), NO_FLASH)) == (
        "varlen (not flash3_merged: FlashAttention-3 is not installed; "
        "not flash3: FlashAttention-3 is not installed; "
        "not merged: it does not support windows that extend from a completion into its prompt)"
    )


@pytest.mark.parametrize(
    ("name", "what", "missing", "reason"),
    [
        ("merged", wanted(windowed=True), (), "does not support windows"),
        ("merged", wanted(softcap=30.0), (), "not support soft-capping"),
        ("flash3_merged", wanted(), NO_FLASH3, "not installed"),
        ("flash3", wanted(dropout=0.5), (), "not support dropout"),
        ("varlen", wanted(torch.float32), (), "neither float16 nor bfloat16"),
        ("varlen", wanted(softcap=30.0), (), "not support soft-capping"),
        ("flash_attn", wanted(), NO_FLASH, "not installed"),
        ("flex", wanted(dropout=0.5), (), "not support dropout"),
        ("flex", wanted(torch.float64), (), "float64"),
        ("varlen", wanted(size=12), (), "heads of 12"),
        ("varlen", wanted(value_dim=32), (), "values of 32"),
        ("varlen", wanted(sequences=False), (), "laid out without cu_seqlens_q"),
    ],
)
def test_a_forced_kernel_is_used_or_refused(
    name: Kernel, what: Wanted, missing: Missing, reason: str
) -> None:
    with pytest.raises(KernelError, match=f"{name} cannot compute this attention: .*{reason}"):
        kernel_for(what, missing, forced=name)
    assert kernel_for(wanted(), (), forced=name).name == name


def test_a_batch_keeps_the_kernel_it_was_forced_to() -> None:
    batch = batch_of(GROUPS, "shared")
    with use_kernel("flex"):
        forced = SharedPrompt(batch)  # type: ignore[arg-type]
    assert forced.kernel == "flex"
    assert SharedPrompt(batch).kernel is None  # type: ignore[arg-type]


def test_a_forced_kernel_reaches_the_attention() -> None:
    model, batch = tiny(FAMILIES["llama"]()), batch_of(GROUPS, "shared")
    with use_kernel("varlen"), pytest.raises(SharedPromptError, match="the device is cpu"):
        score(model, batch)


def test_an_unknown_kernel_is_named() -> None:
    sentence = "unknown kernel 'cudnn': choose one of flash3_merged, "
    with pytest.raises(KernelError, match=sentence), use_kernel("cudnn"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [("triton", "triton"), ("compiler", "a C compiler"), ("header", "Python.h")],
)
def test_what_flex_lacks_to_be_compiled_is_named(
    lacking: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "Python.h").touch()
    include = tmp_path / "empty" if lacking == "header" else tmp_path
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(include))
    monkeypatch.setattr(kernels, "find_spec", lambda _: None if lacking == "triton" else "there")
    monkeypatch.setattr(kernels, "_flash_lacks", lambda: None)
    monkeypatch.setattr(kernels, "which", lambda _: None if lacking == "compiler" else "/bin/gcc")
    monkeypatch.delenv("CC", raising=False)
    kernels.missing_kernels.cache_clear()
    found = dict(kernels.missing_kernels())
    kernels.missing_kernels.cache_clear()
    assert reason in found["flex"]
    assert "flash_attn" not in found


@pytest.mark.parametrize("has_function", [True, False])
def test_flash_attn_is_what_has_its_function(
    has_function: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fourth version is a package of the same name without it."""
    module = ModuleType("flash_attn")
    if has_function:
        module.flash_attn_varlen_func = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(kernels, "find_spec", lambda _: "there")
    reason = kernels._flash_lacks()
    assert reason is None if has_function else "cannot be imported" in str(reason)


def test_a_kernel_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    choice = kernel_for(wanted(torch.float32), NOTHING)
    kernels.report_choice.cache_clear()
    for _ in range(3):
        kernels.report_choice(choice)
    assert capsys.readouterr().err == f"shared-prompt attention: {choice}\n"
