"""Validate the settings of a run, and derive values that depend only on them."""

from pathlib import Path

from logratio.errors import ConfigError
from logratio.extras import require
from logratio.forecast import check_writable
from logratio.logps.checks import unsplit_by_config
from logratio.training.config import TrainConfig
from logratio.training.given_model import given_model
from logratio.training.lora import check_adapters
from logratio.training.methods.objective import Objective, check_own_losses
from logratio.training.models import (
    architecture,
    base_folder,
    check_model_folder,
    check_reward_folder,
    default_device,
)
from logratio.training.router_loss import router_coefficient
from logratio.training.trackers import trackers_of


def check_settings(config: TrainConfig) -> None:
    """Check the settings of a run that can be checked without its models.

    Raises:
        ConfigError: A setting is invalid; the message names it.
        DeviceError, MissingExtraError: The device or an optional dependency is not usable.
    """
    check_own_losses(Objective.of(config))
    _check_schedule(config)
    _check_options(config)
    _check_moving_reference(config)
    _check_divergences(config)
    _check_study(config)
    _check_evaluation(config)
    _check_memory(config)
    _check_reward_model(config)
    _check_context_parallel(config)
    trackers_of(config.report_to)


def check_folders(config: TrainConfig) -> None:
    """Check the folders of a run, and the settings that depend on the model.

    Raises:
        ConfigError: A setting does not fit the model; the message names it.
        ModelFolderError: A folder contains no loadable model.
        OutputError: The output folder is not writable.
    """
    scores = Objective.of(config).scores
    for folder in (config.model, config.reference or config.model):
        check_model_folder(Path(folder), rewards=scores)
    if scores:
        check_reward_folder(Path(config.model))
    if router_coefficient(config) and Objective.of(config).needs_divergences:
        raise ConfigError(
            f"--loss {config.loss} has no router's loss: set --router-aux-loss-coef 0"
        )
    _check_splitting(config)
    check_adapters(config)
    check_writable(Path(config.output))


def _check_schedule(config: TrainConfig) -> None:
    """Refuse settings that the schedule would silently ignore."""
    scheduler = config.lr_scheduler
    for flag, value in (("--warmup", config.warmup), ("--decay", config.decay)):
        if value > 1 and not float(value).is_integer():
            raise ConfigError(
                f"{flag} {value:g} is neither a share below 1 nor a whole number of updates"
            )
    if config.min_lr_rate and scheduler == "constant":
        raise ConfigError("--lr-scheduler constant has no --min-lr-rate: the rate does not decay")
    for name, flag in (("decay", "--decay"), ("decay_type", "--decay-type")):
        if getattr(config, name) != getattr(TrainConfig, name) and scheduler != "wsd":
            raise ConfigError(f"--lr-scheduler {scheduler} has no {flag}: only wsd has one")


def _check_options(config: TrainConfig) -> None:
    """Refuse options that conflict, or that the loss would silently ignore."""
    if config.resume and config.overwrite:
        raise ConfigError("--resume continues a run and --overwrite replaces it: give one of them")
    if config.precompute and not config.cache:
        raise ConfigError("--precompute fills a cache: give its folder as --cache")
    if not needs_reference(config) and (config.cache or config.reference):
        raise ConfigError(f"--loss {config.loss} has no reference; remove --cache and --reference")


def _check_context_parallel(config: TrainConfig) -> None:
    """Refuse what is not computed for a prompt that several processes share."""
    if config.context_parallel_size == 1:
        return
    objective = Objective.of(config)
    of_whole = objective.needs_confidences or objective.needs_divergences
    reasons = {
        f"--loss {config.loss}, which takes whole distributions of tokens": of_whole,
        f"--loss {config.loss}, which trains a reward model": objective.scores,
        "--share-beginnings": config.share_beginnings,
        "--compile": config.compile_layers != "off",
    }
    if found := [what for what, has in reasons.items() if has]:
        raise ConfigError(f"--context-parallel-size does not support {found[0]}: leave one out")


def _check_splitting(config: TrainConfig) -> None:
    """Refuse models whose config says that their prompts cannot be split."""
    if config.context_parallel_size == 1 or given_model(config.model):
        return
    if router_coefficient(config):
        raise ConfigError(
            "--context-parallel-size: the loss of routers counts the tokens of whole sequences: "
            "set --router-aux-loss-coef 0"
        )
    for folder in {config.model, config.reference or config.model}:
        if reason := unsplit_by_config(architecture(base_folder(Path(folder)))):
            raise ConfigError(
                f"--context-parallel-size: {folder} has {reason}, and its prompts are not split. "
                "--activation-checkpointing all saves memory in each process"
            )


def _check_moving_reference(config: TrainConfig) -> None:
    """Check the settings of a reference that follows the policy."""
    if not config.sync_reference:
        for name in ("reference_mixup_alpha", "reference_sync_steps"):
            if getattr(config, name) != getattr(TrainConfig, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --sync-reference")
        return
    if not needs_reference(config):
        raise ConfigError(f"--loss {config.loss} has no reference; remove --sync-reference")
    if config.cache:
        raise ConfigError(
            "--sync-reference changes the reference, and --cache has log-probs of one that stays: "
            "remove one of them"
        )
    if config.trains_adapter or config.quantization:
        raise ConfigError(
            "--sync-reference mixes the weights of policy and reference, so all weights must be "
            "trained: remove the adapter"
        )
    if config.precision == "bf16-weights" and config.reference_mixup_alpha < 1:
        raise ConfigError(
            "--sync-reference mixes weights, and bfloat16 would round the mixture away: use "
            "--precision bf16, or --reference-mixup-alpha 1"
        )


def _check_divergences(config: TrainConfig) -> None:
    """Check that a loss of whole distributions has a reference in memory."""
    if not Objective.of(config).needs_divergences:
        return
    if config.cache:
        raise ConfigError(
            f"--loss {config.loss} compares whole distributions, and --cache has log-probs of "
            "tokens only: remove --cache"
        )


def _check_study(config: TrainConfig) -> None:
    """Check the settings that are for study only."""
    objective = Objective.of(config)
    if config.study_flipped_labels and objective.data not in ("pairs", "labelled answers"):
        raise ConfigError(
            f"--study-flipped-labels flips pairs and labelled answers, and --loss {config.loss} "
            f"trains on {objective.data}"
        )
    if not config.study_uniform_reference:
        return
    if not objective.needs_reference:
        raise ConfigError(
            f"--loss {config.loss} has no reference; remove --study-uniform-reference"
        )
    given = ("cache", "reference", "sync_reference", "eval_samples")
    if used := next((name for name in given if getattr(config, name)), None):
        raise ConfigError(
            "--study-uniform-reference has no model, so remove --" + used.replace("_", "-")
        )
    if objective.needs_divergences:
        raise ConfigError(f"--loss {config.loss} needs a reference in memory")


def _check_evaluation(config: TrainConfig) -> None:
    """Check the settings of held-out evaluation."""
    if config.eval_share and config.eval_data is not None:
        raise ConfigError("--eval-data and --eval-share both name held-out data: give one of them")
    wanted = [n for n in ("eval_every", "eval_samples", "best_metric") if getattr(config, n)]
    if wanted and config.eval_data is None and not config.eval_share:
        flag = wanted[0].replace("_", "-")
        raise ConfigError(f"--{flag} needs held-out data: give --eval-data or --eval-share")
    if config.max_new_tokens != TrainConfig.max_new_tokens and not config.eval_samples:
        raise ConfigError("max_new_tokens has no effect without samples: give eval_samples")
    if config.early_stop and not config.best_metric:
        raise ConfigError(
            "--early-stop needs --best-metric, the metric that must improve, for example "
            "rewards/accuracies or loss"
        )


def _check_reward_model(config: TrainConfig) -> None:
    """Refuse settings that need log-probs or a language model, if a reward model is trained."""
    if not Objective.of(config).scores:
        return
    if config.eval_samples:
        raise ConfigError(
            f"--loss {config.loss} trains a reward model, which cannot write: remove --eval-samples"
        )
    if given_model(config.model):
        raise ConfigError(
            f"--loss {config.loss} puts a scalar head on a model that it loads: give the model's "
            "folder or id, not an object"
        )


def _check_memory(config: TrainConfig) -> None:
    """Refuse memory settings that have no effect on the device."""
    device = default_device(config.device)
    if config.offload_activations and device.type == "cpu":
        raise ConfigError("--offload-activations has no effect on a CPU; remove it")
    _check_optimizer(config)


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that is not installed, or that would lose updates to rounding."""
    if config.optimizer != "adamw8bit":
        return
    saved = config.lora.modules_to_save if config.lora else ()
    if config.precision == "bf16-weights" and (saved or not config.trains_adapter):
        raise ConfigError(
            "--optimizer adamw8bit keeps no float32 copy of the weights, so bfloat16 weights would "
            "lose most updates to rounding: use adamw or adamw-host, or --precision bf16, which "
            "takes as much memory"
        )
    require("bitsandbytes", "quantized")


def beta_of(config: TrainConfig) -> float:
    """Return the β of the rewards: as configured, or the method's default; 1 if it has none."""
    return Objective.of(config).beta


def needs_reference(config: TrainConfig) -> bool:
    """Return whether the loss uses a reference."""
    return Objective.of(config).needs_reference


def reference_kind(config: TrainConfig) -> str:
    """Return the kind of reference: "none", "uniform", "cached", "adapter" or "frozen"."""
    if not needs_reference(config):
        return "none"
    if config.study_uniform_reference:
        return "uniform"
    if config.cache:
        return "cached"
    return "adapter" if config.trains_adapter and not config.reference else "frozen"
