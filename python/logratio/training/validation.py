"""Validate the settings of a run, and derive values that depend only on them."""

import math
from pathlib import Path

from logratio.errors import ConfigError
from logratio.extras import require
from logratio.forecast import check_writable
from logratio.training.config import TrainConfig
from logratio.training.lora import check_adapters
from logratio.training.losses import LOSSES, PAIR_LOSSES
from logratio.training.models import (
    check_model_folder,
    check_router_loss,
    default_device,
)
from logratio.training.schedule import DECAYS
from logratio.training.trackers import trackers_of


def check_settings(config: TrainConfig) -> None:
    """Check the settings of a run that can be checked without its models.

    Raises:
        ConfigError: A setting is invalid; the message names it.
        DeviceError, MissingExtraError: The device or an optional dependency is not usable.
    """
    if config.loss not in LOSSES:
        raise ConfigError(f"loss {config.loss!r} is unknown; choose from {', '.join(LOSSES)}")
    _check_ranges(config)
    if not (math.isfinite(config.max_grad_norm) and config.max_grad_norm > 0):
        raise ConfigError("max_grad_norm must be above 0: gradients are clipped to it")
    if not (math.isfinite(beta_of(config)) and beta_of(config) > 0):
        raise ConfigError("beta must be above 0: it is the weight that keeps the policy close")
    if not 0 <= config.label_smoothing < 0.5:
        raise ConfigError("label_smoothing must be in [0, 0.5)")
    _check_options(config)
    _check_evaluation(config)
    _check_memory(config)
    trackers_of(config.report_to)


def check_folders(config: TrainConfig) -> None:
    """Check the folders of a run, and the settings that depend on the model.

    Raises:
        ConfigError: A setting does not fit the model; the message names it.
        ModelFolderError: A folder contains no loadable model, or one that requests a router loss.
        OutputError: The output folder is not writable.
    """
    for folder in (config.model, config.reference or config.model):
        check_model_folder(Path(folder))
    check_router_loss(config.model)
    check_adapters(config)
    check_writable(Path(config.output))


_RANGES = (
    *(("min_lr_rate", 0.0, 1.0), ("decay", 1e-6, 1.0), ("weight_decay", 0.0, 10.0)),
    *(("adam_beta1", 0.0, 0.999999), ("adam_beta2", 0.0, 0.99999999), ("adam_epsilon", 0.0, 1.0)),
)
"""Settings with the smallest and the largest value that make sense."""


def _check_ranges(config: TrainConfig) -> None:
    """Check the ranges of numeric settings."""
    for name in ("batch_size", "epochs", "token_budget", "max_steps", "keep_checkpoints"):
        count = getattr(config, name)
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise ConfigError(f"lr must be above 0, not {config.lr}")
    if not 0 <= config.warmup < 1:
        raise ConfigError(f"warmup is a share of the updates, in [0, 1), not {config.warmup}")
    if config.lr_scheduler not in DECAYS:
        known = ", ".join(DECAYS)
        raise ConfigError(f"lr_scheduler {config.lr_scheduler!r} is unknown; there are {known}")
    for name, low, high in _RANGES:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must be in [{low:g}, {high:g}], not {value}")


def _check_options(config: TrainConfig) -> None:
    """Refuse options that the loss would silently ignore, and options that conflict."""
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
        raise ConfigError("precompute fills a cache: give its folder with --cache")
    if not needs_reference(config) and (config.cache or config.reference):
        raise ConfigError(f"loss {config.loss} has no reference; remove --cache and --reference")


def _check_evaluation(config: TrainConfig) -> None:
    """Check the settings of held-out evaluation."""
    if not 0 <= config.eval_share < 1:
        raise ConfigError(f"eval_share is a share of the data, in [0, 1), not {config.eval_share}")
    if config.eval_share and config.eval_data is not None:
        raise ConfigError("eval_data and eval_share both name held-out data: give one of them")
    for name in ("eval_every", "early_stop"):
        count = getattr(config, name)
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    wanted = [n for n in ("eval_every", "eval_samples", "best_metric") if getattr(config, n)]
    if wanted and config.eval_data is None and not config.eval_share:
        raise ConfigError(f"{wanted[0]} needs held-out data: give eval_data or eval_share")
    if config.early_stop and not config.best_metric:
        raise ConfigError(
            "early_stop needs best_metric, the metric that must improve, for example "
            "rewards/accuracies or loss"
        )


def _check_memory(config: TrainConfig) -> None:
    """Refuse memory settings that have no effect on the device."""
    device = default_device(config.device)
    if config.offload_activations and device.type == "cpu":
        raise ConfigError("offload_activations has no effect on a CPU; remove it")
    _check_optimizer(config)


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that is not installed, or that would lose updates to rounding."""
    if config.optimizer != "adamw8bit":
        return
    saved = config.lora.modules_to_save if config.lora else ()
    if config.precision == "bf16-weights" and (saved or not config.trains_adapter):
        raise ConfigError(
            "adamw8bit keeps no float32 copy of the weights, so bfloat16 weights would lose most "
            "updates to rounding: use adamw or adamw-host, or precision bf16, which takes as much "
            "memory"
        )
    require("bitsandbytes", "quantized")


def beta_of(config: TrainConfig) -> float:
    """Return the configured β, or the default of the loss (1 for sft, which does not use it)."""
    if config.beta is not None:
        return config.beta
    return PAIR_LOSSES[config.loss].default_beta if config.loss in PAIR_LOSSES else 1.0


def needs_reference(config: TrainConfig) -> bool:
    """Return whether the loss uses a reference."""
    return config.loss in PAIR_LOSSES and PAIR_LOSSES[config.loss].needs_reference


def reference_kind(config: TrainConfig) -> str:
    """Return the kind of reference: "none", "cached", "adapter" or "frozen"."""
    if not needs_reference(config):
        return "none"
    if config.cache:
        return "cached"
    return "adapter" if config.trains_adapter and not config.reference else "frozen"
