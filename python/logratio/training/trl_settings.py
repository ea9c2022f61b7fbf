"""A DPOConfig of TRL, or TrainingArguments of transformers, as settings of a run.

Every field that changes the result is carried over, with its default too, or refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from logratio.data.tokenization.groups import TokenizationRules
from logratio.errors import ConfigError
from logratio.progress import say
from logratio.synonyms import VALUES, instead_of
from logratio.training.methods.table import METHODS
from logratio.training.parallel.processes import processes_of
from logratio.training.selection import LOWER_IS_BETTER
from logratio.training.trackers import KNOWN

SAME_MEANING: Mapping[str, str] = {
    "output_dir": "output",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "full_determinism": "deterministic",
    "beta": "beta",
    "activation_offloading": "offload_activations",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "sync_ref_model": "sync_reference",
    "ref_model_mixup_alpha": "reference_mixup_alpha",
    "ref_model_sync_steps": "reference_sync_steps",
}
"""Fields that are settings under the same or another name."""

COMPUTED = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("bf16", "fp16", "model_init_kwargs", "torch_compile", "use_cpu", "save_strategy"),
    *("save_steps", "save_total_limit", "resume_from_checkpoint", "max_length", "loss_type"),
    *("precompute_ref_log_probs", "label_smoothing", "eval_strategy", "eval_steps"),
    *("f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha"),
    *("use_weighting", "loss_weights"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("report_to", "run_name", "project", "fsdp", "fsdp_config"),
}
"""Fields that settings are computed from."""

WITHOUT_EFFECT = {
    # the layout of batches, and how they are read
    *("padding_free", "pad_to_multiple_of", "pad_token", "precompute_ref_batch_size"),
    *("dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    *("dataloader_multiprocessing_context", "remove_unused_columns", "length_column_name"),
    *("label_names", "auto_find_batch_size", "use_liger_kernel", "liger_kernel_config"),
    *("torch_empty_cache_steps", "accelerator_config", "use_cache"),
    # memory: recomputed as far as needed
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "torch_compile_backend", "torch_compile_mode"),
    # several devices; a run here has one
    *("average_tokens_across_devices", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
    *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"),
    # evaluation is not requested by these alone
    *("do_eval", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    # logs and checkpoints
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"),
    *("logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm", "logging_dir"),
    *("include_num_input_tokens_seen", "skip_memory_metrics", "debug", "save_only_model"),
    *("save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("ignore_data_skip", "do_train", "do_predict", "data_seed", "overwrite_output_dir"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
}
"""Fields that cannot change the trained weights here beyond rounding and the data's order."""

_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw8bit"),
}
_LOSSES = {
    **{name: name for name in ("ipo", "hinge", "robust", "discopop")},
    **{"sigmoid": "dpo", "sigmoid_norm": "ln-dpo", "exo_pair": "exo", "nca_pair": "nca"},
    **{"sppo_hard": "sppo", "apo_zero": "apo-zero", "apo_down": "apo-down"},
}
"""Losses of TRL with the same formula here. Its bco_pair has no shift, and its sft is a mean over
the tokens of a micro-batch."""
_OF_ONE_BATCH = {"aot": "aot", "aot_unpaired": "aot-unpaired"}
"""Losses of TRL that depend on its micro-batches; the same here if an update has only one."""
_DIVERGENCES = {"forward_kl": "f-dpo-forward-kl", "js_divergence": "f-dpo-js"}
"""Divergences of TRL, and DPO with them."""
_SMOOTHED = ("robust", "exo_pair")
"""Losses of TRL that `label_smoothing` changes."""
_SCHEDULES = {"linear", "cosine", "constant"}


def is_training_arguments(given: Any) -> bool:
    """Return whether `given` is `TrainingArguments` of transformers or a subclass of it."""
    return any(kind.__name__ == "TrainingArguments" for kind in type(given).__mro__)


def settings_of_trl(args: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that equals one with `args` in TRL, up to the order of the data.

    Args:
        args: A `DPOConfig` or `TrainingArguments`.
        given: Settings that the caller gives in addition; they take precedence.

    Returns:
        Fields of `TrainConfig`.

    Raises:
        ConfigError: A field that changes the result has no equivalent; the message names it.
    """
    _refuse_unsupported(args)
    found = {ours: getattr(args, n) for n, ours in SAME_MEANING.items() if hasattr(args, n)}
    for part in (_length, _schedule, _machine, _sharding, _checkpoints, _reference, _tracking):
        found |= part(args)
    if any(given.get(name) is not None for name in ("eval_data", "eval_dataset", "eval_share")):
        found |= _evaluations(args)
    elif (strategy := _plain(args.eval_strategy)) != "no":
        raise ConfigError(
            f"args: eval_strategy={strategy!r} needs held-out data: give eval_dataset, or "
            "eval_share=0.05"
        )
    for name, part in {"loss": _objective, "rules": _rules}.items():
        found |= {} if name in given else part(args)
    return found


def _refuse_unsupported(args: Any) -> None:
    """Refuse fields that change the result, are not carried over and differ from their default."""
    for field in fields(args):
        if field.name in {*SAME_MEANING, *COMPUTED, *WITHOUT_EFFECT}:
            continue
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(args, field.name)
        if value not in (made, None):
            raise _refusal(field.name, value)


def _refusal(name: str, value: Any, instead: str | None = None) -> ConfigError:
    advice = instead or instead_of(name) or "leave it at its default"
    return ConfigError(f"args: {name}={_plain(value)!r} has no equivalent here: {advice}")


def _plain(value: Any) -> Any:
    """Return the value of an enum of transformers; anything else unchanged."""
    return getattr(value, "value", value)


def _length(args: Any) -> dict[str, Any]:
    """Return the number of groups per update, and of updates."""
    per_device, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if args.max_steps > 0:
        length: dict[str, Any] = {"max_steps": args.max_steps}
    elif args.num_train_epochs == int(args.num_train_epochs):
        length = {"epochs": int(args.num_train_epochs)}
    else:
        raise ConfigError(
            f"args: num_train_epochs={args.num_train_epochs} is not whole: set max_steps"
        )
    return {"batch_size": per_device * steps * processes_of().count, **length}


def _schedule(args: Any) -> dict[str, Any]:
    """Return the schedule of the learning rate, and the optimizer."""
    kind, options = _plain(args.lr_scheduler_type), dict(args.lr_scheduler_kwargs or {})
    found: dict[str, Any] = {"lr_scheduler": VALUES.get(("--lr-scheduler-type", kind), kind)}
    if kind == "cosine_with_min_lr":
        lowest = options.pop("min_lr", None)  # a rate, in place of a share of the peak
        share = options.pop("min_lr_rate", None)
        found["min_lr_rate"] = lowest / args.learning_rate if lowest is not None else share or 0.0
    if kind == "warmup_stable_decay":
        found |= _stable_decay(options)
    elif kind not in _SCHEDULES | {"cosine_with_min_lr", "constant_with_warmup"}:
        raise _refusal("lr_scheduler_type", kind, f"choose {', '.join(sorted(_SCHEDULES))}")
    if options:
        raise _refusal("lr_scheduler_kwargs", options)
    name = _plain(args.optim)
    if name not in _OPTIMIZERS:
        raise _refusal("optim", name)
    warms_up = kind != "constant"
    return {
        **found,
        "warmup": _warmup(args) if warms_up else 0.0,
        "optimizer": _OPTIMIZERS[name],
    }


def _stable_decay(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of warmup_stable_decay that have an equivalent out of `options`."""
    if not (updates := options.pop("num_decay_steps", None)):
        raise ConfigError("args: lr_scheduler_kwargs need num_decay_steps, as in transformers")
    if options.get("warmup_type") == "linear":
        del options["warmup_type"]
    return {
        "decay": float(updates),
        "decay_type": options.pop("decay_type", "cosine"),
        "min_lr_rate": options.pop("min_lr_ratio", 0.0),
    }


def _warmup(args: Any) -> float:
    """Return the updates with a rising learning rate: a share of all, or their number."""
    return float(getattr(args, "warmup_ratio", None) or args.warmup_steps)


_OFFLOAD = (
    "a run computes on the device that keeps its weights, so shards on the host would train on "
    "CPUs; use more processes, or a LoRA"
)


def _sharding(args: Any) -> dict[str, Any]:
    """Return how several processes divide the model, if the arguments ask for FSDP.

    As in accelerate, one process alone shards nothing.
    """
    given = getattr(args, "fsdp", None)
    if not given:
        return {}
    config = dict(getattr(args, "fsdp_config", None) or {})
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    names = {_plain(word) for word in words}  # of older versions
    if config.get("cpu_offload") or "offload" in names:
        raise _refusal("fsdp_config", {"cpu_offload": True}, _OFFLOAD)
    if config.get("xla"):
        raise _refusal("fsdp_config", {"xla": True}, "remove it; XLA is not supported")
    is_hybrid = bool(names & {"hybrid_shard", "hybrid_shard_zero2"})
    found = "hsdp" if is_hybrid else "ddp" if "no_shard" in names else "fsdp"
    return {"parallel": found} if processes_of().count > 1 else {}


def _machine(args: Any) -> dict[str, Any]:
    """Return the precision and the device."""
    if args.fp16:
        raise _refusal("fp16", True)
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    older = options.pop("torch_dtype", "float32")
    dtype = str(options.pop("dtype", older)).removeprefix("torch.")
    found: dict[str, Any] = {}
    if "revision" in options:
        found["revision"] = options.pop("revision")
    if dtype not in ("float32", "bfloat16"):
        raise _refusal("model_init_kwargs", {"dtype": dtype})
    if others := options.keys() - {"attn_implementation", "use_cache", "low_cpu_mem_usage"}:
        raise _refusal("model_init_kwargs", {name: options[name] for name in sorted(others)})
    if dtype == "bfloat16":
        found["precision"] = "bf16-weights"
    else:
        found["precision"] = "bf16" if args.bf16 else "fp32"
    if args.use_cpu:
        found["device"] = "cpu"
    return found | ({"compile_layers": "on"} if args.torch_compile else {})


def _checkpoints(args: Any) -> dict[str, Any]:
    """Return when checkpoints are written, and whether a run is resumed."""
    every = {"steps": args.save_steps, "no": 0}.get(_plain(args.save_strategy))
    if every is None or every != int(every):
        when = f"save_strategy {_plain(args.save_strategy)}, save_steps {args.save_steps}"
        say(f"{when}: checkpoints are written every save_every updates, 200 by default")
    found = {} if every is None or every != int(every) else {"save_every": int(every)}
    if args.save_total_limit is not None:
        found["keep_checkpoints"] = max(1, args.save_total_limit)
    given = args.resume_from_checkpoint
    if given not in (None, False, True, "True", "False"):
        raise _refusal("resume_from_checkpoint", given)
    return found | ({"resume": True} if given in (True, "True") else {})


def _tracking(args: Any) -> dict[str, Any]:
    """Return the trackers, the name of the run and its project; print a note for other trackers."""
    given = args.report_to or []
    names = [given] if isinstance(given, str) else list(given)
    found: dict[str, Any] = {}
    if known := [name for name in names if name in (*KNOWN, "all")]:
        found["report_to"] = known
    if others := [name for name in names if name not in (*KNOWN, "all", "none")]:
        say(f"report_to: {', '.join(others)} is not supported; metrics.jsonl has all metrics")
    if args.run_name not in (None, args.output_dir):
        found["run_name"] = args.run_name
    if getattr(args, "project", None) not in (None, "huggingface"):  # the default there
        found["project"] = args.project
    return found


def _evaluations(args: Any) -> dict[str, Any]:
    """Return when held-out data is evaluated, and by which metric the best model is chosen."""
    found: dict[str, Any] = {}
    if _plain(args.eval_strategy) == "steps":
        every = args.eval_steps or args.logging_steps
        if every != int(every):
            raise _refusal("eval_steps", every)
        found["eval_every"] = int(every)
    if args.load_best_model_at_end:
        found["best_metric"] = metric = args.metric_for_best_model or "loss"
        is_lower_better = metric.removeprefix("eval_") in LOWER_IS_BETTER
        if args.greater_is_better is is_lower_better:
            raise ConfigError(
                f"args: greater_is_better={args.greater_is_better} has no equivalent here for "
                f"{metric}: leave it at its default, or give best_metric to the trainer itself"
            )
    return found


def _objective(args: Any) -> dict[str, Any]:
    """Return the loss and its options. A name of TRL may be that of another formula here."""
    given = getattr(args, "loss_type", "sigmoid")
    kinds = [given] if isinstance(given, str) else list(given)
    known = _LOSSES | (_OF_ONE_BATCH if _is_one_batch(args) else {})
    if missing := [kind for kind in kinds if kind not in known]:
        once = missing[0] in _OF_ONE_BATCH
        reason = "; of TRL's it is equal with gradient_accumulation_steps=1 and one process" * once
        raise ConfigError(
            f"args: loss_type={', '.join(kinds)} has no equivalent here: choose from "
            f"{', '.join(known)}, or give loss to the trainer itself{reason}"
        )
    weights = getattr(args, "loss_weights", None) or [1.0] * len(kinds)
    named = [
        known[kind] + (f":{weight}" if weight != 1 else "")
        for kind, weight in zip(kinds, weights, strict=True)
    ]
    found: dict[str, Any] = {"loss": "+".join(named)} | _smoothed(args, kinds)
    if "discopop" in kinds:
        found["loss_options"] = {"tau": args.discopop_tau}
    return found | _changed_dpo(args, kinds)


def _is_one_batch(args: Any) -> bool:
    """Return whether TRL computes an update in one pass over all of its pairs."""
    steps: int = args.gradient_accumulation_steps
    return steps * processes_of().count == 1


def _smoothed(args: Any, kinds: Sequence[str]) -> dict[str, float]:
    """Return the smoothing of the labels. In TRL it changes some losses only, here all with it."""
    smoothing = getattr(args, "label_smoothing", 0.0)
    if not smoothing:
        if needing := next((kind for kind in kinds if kind in _SMOOTHED), None):
            raise ConfigError(f"args: loss_type={needing} needs label_smoothing above 0")
        return {}
    others = [kind for kind in kinds if kind not in (*_SMOOTHED, *_OF_ONE_BATCH)]
    changed = [kind for kind in others if "label_smoothing" in METHODS[_LOSSES[kind]].options]
    if changed or len(others) == len(kinds):
        raise ConfigError(
            f"args: label_smoothing={smoothing} has no effect on the loss {(changed or others)[0]} "
            "in TRL, and would have one here: leave it out of args, or give it to the trainer "
            "itself"
        )
    return {"label_smoothing": smoothing}


def _changed_dpo(args: Any, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the loss of the fields that change DPO: another divergence, or weights of tokens."""
    changes = {
        "f_divergence_type": _plain(getattr(args, "f_divergence_type", "reverse_kl")),
        "ld_alpha": getattr(args, "ld_alpha", None),
        "use_weighting": getattr(args, "use_weighting", False),
    }
    plain = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
    given = {name: value for name, value in changes.items() if value != plain[name]}
    if not given:
        return {}
    name, value = next(iter(given.items()))
    weighted = getattr(args, "loss_weights", None) not in (None, [1.0])
    if len(given) > 1 or list(kinds) != ["sigmoid"] or weighted:
        raise _refusal(name, value)
    if name == "use_weighting":
        return {"loss": "wpo"}
    if name == "ld_alpha":
        return {"loss": "ld-dpo", "loss_options": {"alpha": value}}
    if value == "alpha_divergence":
        return {
            "loss": "f-dpo-alpha",
            "loss_options": {"alpha": 1 - args.f_alpha_divergence_coef},
        }
    if value not in _DIVERGENCES:
        raise _refusal(name, value)
    return {"loss": _DIVERGENCES[value]}


def _reference(args: Any) -> dict[str, Any]:
    """Return where the reference's log-probs are stored, if they are computed first."""
    if not getattr(args, "precompute_ref_log_probs", False):
        return {}
    return {"cache": str(Path(args.output_dir) / "reference-cache"), "precompute": True}


def _rules(args: Any) -> dict[str, Any]:
    """Return the tokenization rules."""
    if not hasattr(args, "max_length"):
        return {}
    if args.max_length is None:
        raise ConfigError(
            "args: max_length=None does not truncate: give rules=TokenizationRules(max_length=…) "
            "with a length that the model has positions for"
        )
    return {"rules": TokenizationRules(max_length=args.max_length)}
