"""From a configuration to everything a run needs, refusing what cannot work before it is long."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from logratio._rust import ROLES, Store
from logratio.data.formats import FormatSettings
from logratio.data.readers.inputs import Inputs, as_inputs
from logratio.data.store.build import build_store
from logratio.data.store.load import datasets_of, is_store, load_store, rules_of, source_names
from logratio.data.store.row_report import DataReport
from logratio.data.tokenization.groups import TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.extras import require
from logratio.forecast import check_writable
from logratio.progress import reading_progress
from logratio.training.config import ConfigError as ConfigError
from logratio.training.config import PathLike, TrainConfig
from logratio.training.fingerprint import Fingerprint, model_fingerprint
from logratio.training.lora_bf16 import with_low_adapters
from logratio.training.losses import LOSSES, PAIR_LOSSES
from logratio.training.models import (
    ADAPTER_CONFIG,
    base_folder,
    check_lora_targets,
    check_model_folder,
    check_router_loss,
    default_device,
    load_model,
    merged,
    precision_of,
    with_lora,
)
from logratio.training.reference import AdapterReference, FrozenReference, Reference
from logratio.training.vocabulary import check_embedding, check_ids


@dataclass(frozen=True)
class Dataset:
    """Tokenized records, with what became of every row of the files."""

    store: Store
    report: DataReport
    tokenizer: PreferenceTokenizer


def load_dataset(
    model: PathLike,
    data: Inputs,
    rules: TokenizationRules,
    formats: FormatSettings | None = None,
    *,
    path: Path | None = None,
    refused: Path | None = None,
    max_bad_fraction: float = 0.0,
    show_progress: bool = True,
    recorded_date: Callable[[], str | None] | None = None,
) -> Dataset:
    """Tokenize `data` with the tokenizer in `model`, or open the sealed store that `data` names.

    Where the rules name no date and the chat template reads one, it is that of the store, else
    what `recorded_date` finds, else today's.

    Raises:
        BadDataError: malformed rows, each named by file:line and code.
        StoreMismatchError: the store was made with another tokenizer or other rules.
        VocabularyError: the model has no embedding for the data's ids, or transformers reads
            the tokenizer's folder otherwise.
        ConfigError: nothing is left to work on.
    """
    tokenizer = PreferenceTokenizer.load(Path(model), rules)
    check_ids(model, tokenizer)
    data = as_inputs(data)
    if rules.date is None and tokenizer.reads_date:
        is_sealed = is_store(data)
        date = rules_of(Store.open(data[0])).date if is_sealed else None
        date = date or (recorded_date() if recorded_date and not is_sealed else None)
        tokenizer = PreferenceTokenizer(tokenizer.files, replace(rules, date=date))
    if is_store(data):
        store, report = load_store(data[0], tokenizer)
    else:
        with reading_progress(show=show_progress) as tell:
            store, report = build_store(
                data,
                tokenizer,
                path,
                formats=formats,
                max_bad_fraction=max_bad_fraction,
                progress=tell,
                refused=refused,
            )
    if refused and report.refused == 0:
        refused.unlink(missing_ok=True)
    if len(store) == 0:
        raise ConfigError("no record is left to work on:\n" + report.to_text())
    _check_positions(model, store)
    check_embedding(model, tokenizer, store)
    return Dataset(store, report, tokenizer)


def check_groups(store: Store, roles: tuple[str, ...], what: str) -> None:
    """Refuse groups whose completions are something else than these.

    Raises:
        ConfigError: with their number and the place of the first.
    """
    offsets, found = store.completion_offsets(), store.roles()
    fits = np.diff(offsets) == len(roles)
    first = offsets[:-1][fits]
    fits[fits] = np.all([found[first + n] == ROLES.index(r) for n, r in enumerate(roles)], axis=0)
    wrong = np.flatnonzero(~fits)
    if len(wrong):
        (place,) = source_names(store, wrong[:1].tolist())
        raise ConfigError(
            f"{what} needs groups of {' and '.join(roles)}, and {len(wrong):,} groups are "
            f"something else (the first: {place})"
        )


def check_mix(mix: tuple[float, ...] | None, store: Store) -> None:
    """Refuse weights that do not fit the data.

    Raises:
        ConfigError: there is not one weight above 0 for each input.
    """
    if mix is None:
        return
    inputs = max(datasets_of(store)) + 1
    if len(mix) != inputs or not all(math.isfinite(weight) and weight > 0 for weight in mix):
        raise ConfigError(f"mix must hold a weight above 0 for each of the {inputs} inputs")


def _check_positions(model: PathLike, store: Store) -> None:
    """Refuse sequences that are longer than the model has positions."""
    positions = max_positions(model)
    groups = np.diff(store.completion_offsets())
    longest = int((np.repeat(store.prompt_lengths(), groups) + store.completion_lengths()).max())
    if positions and longest > positions:
        raise ConfigError(
            f"the longest sequence has {longest} tokens and the model {positions} positions: "
            f"set max_length to {positions} or less"
        )


def max_positions(model: PathLike) -> int | None:
    """Read how many positions a model has; None where its config names no limit."""
    config = json.loads((base_folder(model) / "config.json").read_text())
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


def check_config(config: TrainConfig) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: with the setting's name.
        ModelFolderError: a folder holds no model, or one that asks for its router's loss.
        OutputError: the output folder cannot be written to.
    """
    if config.loss not in LOSSES:
        raise ConfigError(f"loss {config.loss!r} is unknown; there are {', '.join(LOSSES)}")
    _check_ranges(config)
    if not (math.isfinite(config.max_grad_norm) and config.max_grad_norm > 0):
        raise ConfigError("max_grad_norm must be above 0: a gradient is scaled down to it")
    if not (math.isfinite(beta_of(config)) and beta_of(config) > 0):
        raise ConfigError("beta must be above 0: it is the weight that keeps the policy close")
    if not 0 <= config.label_smoothing < 0.5:
        raise ConfigError("label_smoothing must be in [0, 0.5)")
    _check_options(config)
    _check_memory(config)
    for folder in (config.model, config.reference or config.model):
        check_model_folder(Path(folder))
    check_router_loss(config.model)
    if config.lora and (Path(config.model) / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{config.model} is itself an adapter: merge it first "
            "(merge_and_unload() and save_pretrained() of peft), then add a new one"
        )
    if config.lora:
        check_lora_targets(config.lora, config.model)
    check_writable(Path(config.output))


def _check_ranges(config: TrainConfig) -> None:
    """Refuse numbers that are out of range, each by its name."""
    for name in ("batch_size", "epochs", "token_budget"):
        count = getattr(config, name)
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise ConfigError(f"lr must be above 0, not {config.lr}")
    if not 0 <= config.warmup < 1:
        raise ConfigError(f"warmup is a share of the updates, in [0, 1), not {config.warmup}")


def _check_options(config: TrainConfig) -> None:
    """Refuse an option that the loss would ignore: rivals do so in silence."""
    options = PAIR_LOSSES[config.loss].options if config.loss in PAIR_LOSSES else frozenset()
    if config.label_smoothing and "label_smoothing" not in options:
        raise ConfigError(f"loss {config.loss} has no label_smoothing")
    if config.gamma != TrainConfig.gamma and "gamma" not in options:
        raise ConfigError(f"loss {config.loss} has no gamma")
    if config.loss == "sft" and config.beta is not None:
        raise ConfigError("loss sft has no beta")
    if config.resume and config.overwrite:
        raise ConfigError("resume continues a run and overwrite replaces it: give one of them")
    if config.precompute and not config.cache:
        raise ConfigError("precompute fills a cache: name one with --cache")
    if not needs_reference(config) and (config.cache or config.reference):
        raise ConfigError(f"loss {config.loss} has no reference; leave --cache and --reference out")


def _check_memory(config: TrainConfig) -> None:
    """Refuse settings of memory that do not exist, or that would do nothing on the device."""
    device = default_device(config.device)
    if config.offload_activations and device.type == "cpu":
        raise ConfigError("offload_activations: on a CPU they lie in host memory already")
    _check_optimizer(config)


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that is not there, or that would round updates away."""
    if config.optimizer != "adamw8bit":
        return
    if config.precision == "bf16-weights" and not config.lora:
        raise ConfigError(
            "adamw8bit keeps no float32 copy of the weights, and bfloat16 weights would lose most "
            "of its updates: use adamw or adamw-host, or precision bf16, which takes as many bytes"
        )
    require("bitsandbytes", "quantized")


def beta_of(config: TrainConfig) -> float:
    """Return β: the given one, or the loss's default (1 for sft, which has none)."""
    if config.beta is not None:
        return config.beta
    return PAIR_LOSSES[config.loss].default_beta if config.loss in PAIR_LOSSES else 1.0


def needs_reference(config: TrainConfig) -> bool:
    """Tell whether the loss compares with a reference."""
    return config.loss in PAIR_LOSSES and PAIR_LOSSES[config.loss].needs_reference


def reference_kind(config: TrainConfig) -> str:
    """Return where the reference comes from: none, cached, adapter or frozen."""
    if not needs_reference(config):
        return "none"
    if config.cache:
        return "cached"
    return "adapter" if config.lora and not config.reference else "frozen"


def build_policy(config: TrainConfig, device: str) -> nn.Module:
    """Load the policy, with fresh adapters if asked; only what trains requires gradients."""
    precision, adapts = precision_of(config), config.lora is not None
    model = load_model(config.model, device=device, precision=precision, frozen=adapts)
    if (Path(config.model) / ADAPTER_CONFIG).exists():
        return merged(model).requires_grad_(True)
    if config.lora is None:
        return model
    policy = with_lora(model, config.lora, Path(config.model))
    return policy if precision == "fp32" else with_low_adapters(policy)


def build_reference(config: TrainConfig, policy: nn.Module) -> Reference | None:
    """Make the reference that `reference_kind` names, unless it is a cache."""
    kind, source = reference_kind(config), config.reference or config.model
    if kind == "adapter":
        return AdapterReference(policy)
    if kind == "frozen":
        device = next(policy.parameters()).device
        return FrozenReference(
            load_model(source, device=device, precision=precision_of(config), frozen=True)
        )
    return None


def starts_at_reference(config: TrainConfig) -> bool:
    """Tell whether the policy equals the reference before its first update."""
    if not needs_reference(config):
        return False
    if config.reference is None:
        return True
    start: Fingerprint = model_fingerprint(config.model, precision_of(config))
    return start.digest == model_fingerprint(config.reference, precision_of(config)).digest
