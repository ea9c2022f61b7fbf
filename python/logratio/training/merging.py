"""Merge an adapter into its base and write the result as a whole model."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from logratio.bundle import TOKENIZER_FILES
from logratio.durable import finalize, sync, system_errors
from logratio.errors import ConfigError, LogratioError
from logratio.forecast import check_writable
from logratio.hub import local_folder
from logratio.logps.completion import Group, batch_of, score, transformer
from logratio.logps.scores import has_scalar_head, score_completions
from logratio.one_process import refuse_multiple_processes
from logratio.report.run_files import SETTINGS_FILE
from logratio.training.config import PathLike, Precision
from logratio.training.fingerprint import parameter_count
from logratio.training.memory import is_out_of_memory
from logratio.training.models import (
    ADAPTER_CONFIG,
    ModelFolderError,
    base_folder,
    check_model_folder,
    default_device,
    is_quantized,
    load_model,
    merged,
    quietly,
)
from logratio.training.reference_checks import TOLERANCES
from logratio.training.run_folder import settings_of
from logratio.validation import PATH, check_argument

MergeDtype = Literal["auto", "float32", "bfloat16", "float16"]
COPIED = (*TOKENIZER_FILES, "added_tokens.json", "generation_config.json", "vocab.json",
          "merges.txt", "tokenizer.model", SETTINGS_FILE)  # fmt: skip
"""Files that the whole model gets from the adapter's folder, or else from its base's."""
SEQUENCES, PROMPT, COMPLETION = 8, 16, 48
"""Sequences on which adapter and whole model are compared, and their tokens."""
ROUNDS_LIKE: dict[torch.dtype, Precision] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16-weights",
    torch.float16: "bf16-weights",
}
"""The precision whose tolerance bounds the rounding of stored weights; float16 rounds less."""


class MergeError(LogratioError, ArithmeticError):
    """The whole model's log-probs differ from the adapter's by more than rounding explains."""


@dataclass(frozen=True)
class MergeResult:
    """A merged model.

    Attributes:
        output: Folder of the whole model.
        dtype: Name of the dtype of its weights, for example "bfloat16".
        largest_gap: Largest difference of a token's log-prob, or of a reward model's score, between
            adapter and whole model, in nats, as read from the folder and computed in float32.
        tokens: Number of compared tokens, or scores.
        quantization: The quantization of the base that the adapter was trained over, or None. The
            model was merged into the base without it.
    """

    output: Path
    dtype: str
    largest_gap: float
    tokens: int
    quantization: str | None = None


def merge_adapter(
    model: PathLike, output: PathLike, *, dtype: MergeDtype = "auto", device: str | None = None
) -> MergeResult:
    """Write a whole model that equals an adapter over its base.

    The weights are added in float32 and rounded once to `dtype`. If the adapter changes only one of
    a tied head and embeddings, they are untied, also in the config. Before the folder appears, the
    model is read from it, and its log-probs are compared with the adapter's.

    Args:
        model: Folder of the adapter; its base is a local folder.
        output: Folder for the whole model; it must not exist, or be empty. It appears complete or
            not at all.
        dtype: Dtype of the written weights; "auto": that of the base's files.
        device: Device for the computation; None: a GPU if available, else the CPU.

    Returns:
        The folder, and the largest difference found.

    Raises:
        ConfigError: `model` is not an adapter, its base is quantized, `output` is not empty, or
            torchrun started several processes.
        ModelFolderError: A folder contains no loadable model, or an adapter that cannot be merged.
        MergeError: Adapter and whole model differ by more than rounding explains; nothing is
            written.
        OutputError: The output folder is not writable, or its disk is too small.
        SettingTypeError: An argument has the wrong type.

    Example:
        >>> merge_adapter("adapter", "whole").largest_gap < 1e-3
        True
    """
    check_argument("model", PATH, model)
    check_argument("output", PATH, output)
    refuse_multiple_processes("merge")
    folder, output = local_folder(model), Path(output)
    _check(folder, output, dtype)
    where = default_device(device)
    stored = _dtype_of(base_folder(folder)) if dtype == "auto" else getattr(torch, dtype)
    check_writable(output, stored.itemsize * parameter_count(folder))
    adapted = load_model(folder, device=where, frozen=True)
    groups = _probe(transformer(adapted).config.get_text_config().vocab_size)
    expected = _logps(adapted, groups)
    with _written_whole(output) as partial:
        _save(_merge(adapted, folder), partial, stored)
        _copy_files(folder, partial)
        del adapted
        found = _logps(load_model(partial, device=where, frozen=True), groups)
        gap = _compare(found, expected, stored, folder)
    bits = (settings_of(folder) or {}).get("quantization")
    return MergeResult(output, str(stored).removeprefix("torch."), gap, len(found), bits)


def _check(folder: Path, output: Path, dtype: str) -> None:
    """Refuse what cannot be merged before a weight is loaded."""
    check_model_folder(folder, rewards=True)
    base = base_folder(folder)
    if not (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(f"{folder} is a whole model already: there is no adapter to merge")
    if is_quantized(base):
        raise ConfigError(
            f"the base {base} is quantized, and merging would round the adapter to its few bits: "
            "set base_model_name_or_path in adapter_config.json to the base before quantization"
        )
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty; choose another folder")


def _dtype_of(base: Path) -> torch.dtype:
    """Return the dtype of a model's weights, as its config records it; float32 if it does not."""
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    stored = getattr(config, "dtype", None)
    return stored if stored in ROUNDS_LIKE else torch.float32


def _probe(vocabulary: int) -> list[Group]:
    """Draw the token ids of prompts and completions to compare, the same in every run."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (SEQUENCES, PROMPT + COMPLETION), generator=random).tolist()
    return [(row[:PROMPT], [row[PROMPT:]]) for row in ids]


@torch.no_grad()
def _logps(model: nn.Module, groups: list[Group]) -> Tensor:
    device = transformer(model).device
    values = score_completions if has_scalar_head(model) else score
    return torch.cat([values(model, batch_of([one], "padded", device)).cpu() for one in groups])


def _merge(adapted: nn.Module, folder: Path) -> nn.Module:
    try:
        return merged(adapted)
    except (NotImplementedError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelFolderError(f"{folder}: peft cannot merge this adapter: {error}") from error


def _save(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    with quietly(), system_errors(folder):
        model.to(dtype).save_pretrained(folder)  # type: ignore[operator]


def _copy_files(folder: Path, partial: Path) -> None:
    """Copy the tokenizer, the generation settings and the settings of the training."""
    for name in COPIED:
        # The settings of the base's training do not describe the adapter's.
        places = (folder,) if name == SETTINGS_FILE else (folder, base_folder(folder))
        if source := next((p / name for p in places if (p / name).exists()), None):
            shutil.copyfile(source, partial / name)


def _compare(found: Tensor, expected: Tensor, dtype: torch.dtype, folder: Path) -> float:
    gap, most = (found - expected).abs().max(), TOLERANCES[ROUNDS_LIKE[dtype], False].token
    if not bool(gap <= most):  # NaN too
        raise MergeError(
            f"{folder}: a log-prob of the whole model differs from the adapter's by {gap:.3g} nats "
            f"(rounding to {str(dtype).removeprefix('torch.')} explains at most {most:g}); nothing "
            "was written"
        )
    return float(gap)


@contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output`, and rename it to `output` on success."""
    partial = output.with_name(f".{output.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            finalize(path)
        sync(partial)
        partial.rename(output)  # fails if another process has written there meanwhile
        sync(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
