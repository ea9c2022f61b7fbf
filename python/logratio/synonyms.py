"""Option names of transformers, TRL and other trainers, and their equivalents here.

The same tables serve command line flags and config fields. A name with exactly the same meaning is
accepted; any other raises an error that names the alternative.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, get_args, get_type_hints

from logratio.errors import ConfigError, LogratioError, SettingTypeError

Kind = TypeVar("Kind")


class ForeignFlagError(LogratioError, ValueError):
    """A flag of another trainer without an exact equivalent."""


SAME: Mapping[str, str] = {
    "--early-stopping-patience": "--early-stop",
    "--eval-file": "--eval-data",
    "--eval-steps": "--eval-every",
    "--learning-rate": "--lr",
    "--lora-r": "--lora-rank",
    "--lr-scheduler-type": "--lr-scheduler",
    "--loss-type": "--loss",
    "--metric-for-best-model": "--best-metric",
    "--model-name-or-path": "--model",
    "--model-path": "--model",
    "--model-revision": "--revision",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--output-dir": "--output",
    "--overwrite-output-dir": "--overwrite",
    "--ref-model": "--reference",
    "--ref-model-name-or-path": "--reference",
    "--reference-model": "--reference",
    "--save-steps": "--save-every",
    "--save-total-limit": "--keep-checkpoints",
    "--train-file": "--data",
    "--use-dora": "--lora-dora",
    "--use-peft": "--lora",
    "--use-rslora": "--lora-rslora",
    "--validation-file": "--eval-data",
    "--warmup-ratio": "--warmup",
}
VALUES: Mapping[tuple[str, str], str] = {
    ("--loss-type", "sigmoid"): "dpo",
    ("--lr-scheduler-type", "constant_with_warmup"): "constant",
    ("--lr-scheduler-type", "cosine_with_min_lr"): "cosine",
    ("--lr-scheduler-type", "warmup_stable_decay"): "wsd",
}
"""Values with another name in a flag of the same meaning."""
SWITCHES: Mapping[str, tuple[str, str]] = {
    "--load-in-4bit": ("--quantization", "4bit"),
    "--load-in-8bit": ("--quantization", "8bit"),
}
"""Flags without a value that mean a value of another flag."""

_BATCH = (
    "--batch-size is the number of pairs in an update (TRL's per-device batch × accumulation × "
    "devices); --token-budget bounds the micro-batch and does not change results"
)
_PRECISION = "--precision fp32, bf16 (autocast) or bf16-weights; fp16 is not supported"
_METRICS = (
    "every update is logged to metrics.jsonl and TensorBoard events in --output, and to each "
    "--report-to; leave it out"
)
_EVALUATION = "--eval-data FILE or --eval-share 0.05, with --eval-every N; default: each epoch"
_HUB = "local files: `hf download ORG/NAME --repo-type dataset --local-dir DIR`, then --data DIR"
_ONE_PROCESS = "training runs in one process on one device; leave it out"
_TARGETS = "--lora-target NAME, once for each name"
_DROPOUT = "the model's dropout is always off; --lora-dropout is that of adapters; leave it out"
_START = "--adapter continue, whose reference is the adapter at its start; leave it out"

INSTEAD: Mapping[str, str] = {
    "--attn-implementation": "the attention kernel is chosen automatically; leave it out",
    "--bf16": "--precision bf16",
    "--compile-layers": "--compile on, or auto",
    "--dataset": _HUB,
    "--dataset-config": _HUB,
    "--dataset-name": _HUB,
    "--ddp": _ONE_PROCESS,
    "--deepspeed": _ONE_PROCESS,
    "--disable-dropout": _DROPOUT,
    "--do-eval": _EVALUATION,
    "--dtype": _PRECISION,
    "--eval-strategy": _EVALUATION,
    "--evaluation-strategy": _EVALUATION,
    "--fp16": _PRECISION,
    "--fsdp": _ONE_PROCESS,
    "--full-determinism": "--deterministic",
    "--gradient-accumulation-steps": _BATCH,
    "--gradient-checkpointing": "--activation-checkpointing auto (the default), all or off",
    "--load-best-model-at-end": "--best-metric METRIC, whose best model is saved",
    "--load-in-4bit": "--quantization 4bit, of `logratio precompute` and `logratio train`",
    "--load-in-8bit": "--quantization 8bit, of `logratio precompute` and `logratio train`",
    "--logging-dir": _METRICS,
    "--logging-steps": _METRICS,
    "--lora-modules": _TARGETS,
    "--lora-target-modules": _TARGETS,
    "--max-completion-length": "--max-length, the maximum of prompt + completion",
    "--max-seq-length": "--max-length, the maximum of prompt + completion",
    "--model-adapter-name": _START,
    "--micro-batch-size": _BATCH,
    "--optim": "--optimizer adamw, adamw8bit or adamw-host",
    "--peft-config": "--lora; in Python, DPOTrainer takes peft_config",
    "--padding-free": "batches are never padded; leave it out",
    "--per-device-eval-batch-size": "--token-budget, the tokens computed at a time",
    "--per-device-train-batch-size": _BATCH,
    "--precompute-ref-log-probs": "--cache DIR --precompute",
    "--ref-adapter-name": _START,
    "--reference-free": "--loss simpo, which has no reference",
    "--resume-from-checkpoint": "--resume, which finds the newest valid checkpoint in --output",
    "--rpo-alpha": "this loss term is not supported; leave it out",
    "--save-strategy": "--save-every N, in updates; 0 for none",
    "--tf32": "--precision bf16 for speed; float32 never uses TF32",
    "--torch-compile": "--compile on, or auto",
    "--torch-dtype": _PRECISION,
    "--train-batch-size": _BATCH,
    "--trust-remote-code": "code in a model folder is never run; leave it out",
    "--use-cpu": "--device cpu",
    "--use-logits-to-keep": "logits are only computed for loss tokens; leave it out",
    "--warmup-steps": "--warmup, a share of the updates, such as 0.1",
}


def translated(arguments: Sequence[str], known: AbstractSet[str]) -> list[str]:
    """Translate flags of other trainers to those of the command.

    Args:
        arguments: The command line.
        known: The command's flags, which are never translated.

    Raises:
        ForeignFlagError: A flag has no exact equivalent; the message names the alternative.
    """
    spelled: list[str] = []
    given = ""  # the flag before the current value
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            spelled.append(VALUES.get((given, argument), argument))
            given = ""
            continue
        given = flag.lower().replace("_", "-")
        if given in known:
            flag = flag if flag in known else given
        elif SAME.get(given) in known:
            flag, value = SAME[given], VALUES.get((given, value), value)
        elif not equals and SWITCHES.get(given, ("", ""))[0] in known:
            flag, equals, value = SWITCHES[given][0], "=", SWITCHES[given][1]
        elif given in INSTEAD:
            raise ForeignFlagError(f"no option {flag}; use instead: {INSTEAD[given]}")
        spelled.append(flag + equals + value)
    return spelled


_ALIASES: dict[type, Mapping[str, str]] = {}
"""Further names of the fields of each class that `takes_known_names` decorates."""


def takes_known_names(
    **aliases: str,
) -> Callable[[type[Kind]], type[Kind]]:
    """Let a dataclass accept other trainers' names for its fields.

    Args:
        aliases: Further names of fields, such as ``r="rank"``.

    Example:
        ``TrainConfig(model="m", data="d", output_dir="o", learning_rate=1e-6)``
    """

    def decorated(kind: type[Kind]) -> type[Kind]:
        plain = kind.__init__
        _ALIASES[kind] = aliases

        @wraps(plain)
        def init(self: Any, *arguments: Any, **settings: Any) -> None:
            plain(self, *arguments, **as_fields(kind, settings))

        kind.__init__ = init  # type: ignore[method-assign]
        return kind

    return decorated


def as_fields(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename settings to the fields of a dataclass.

    Raises:
        ConfigError: A name has no exact equivalent; the message names the alternative.
        SettingTypeError: A name is unknown, or a field is given twice.
    """
    known = {field.name for field in fields(kind)}
    named: dict[str, Any] = {}
    for given, value in settings.items():
        name = given if given in known else own_name(kind, given)
        if name not in known:
            raise _unknown(kind, given)
        if name != given and (name in settings or name in named):
            raise SettingTypeError(f"{kind.__name__}: {given} means {name}, which is given too")
        named[name] = own_value(given, value)
    return named


def own_name(kind: type, given: str) -> str:
    """Return the name here of a setting that another trainer calls `given`; else `given`."""
    flag = _flag(given)
    flag = SWITCHES.get(flag, (flag, ""))[0]
    aliases = _ALIASES.get(kind, {})
    return aliases.get(given) or SAME.get(flag, flag)[2:].replace("-", "_")


def own_value(given: str, value: Any) -> Any:
    """Return the value here of the setting `given`, such as "dpo" for a loss_type "sigmoid"."""
    if isinstance(value, bool) and _flag(given) in SWITCHES:
        return SWITCHES[_flag(given)][1] if value else None
    if isinstance(value, list):
        return [own_value(given, one) for one in value]
    return VALUES.get((_flag(given), value), value) if isinstance(value, str) else value


def foreign_names() -> list[str]:
    """Return the names of other trainers' settings with an equivalent here."""
    return [flag[2:].replace("-", "_") for flag in SAME]


def instead_of(given: str) -> str | None:
    """Return what to write instead of a setting without an equivalent, with names of fields."""
    advice = INSTEAD.get(_flag(given))
    return advice and re.sub(r"--([a-z][a-z-]*)", lambda m: m[1].replace("-", "_"), advice)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(kind: Any, given: str) -> LogratioError:
    """Return the error for a name that is not a field, with a suggestion."""
    start = f"{kind.__name__} has no {given}"
    if advice := instead_of(given):
        return ConfigError(f"{start}; use instead: {advice}")
    for field, inner in nested(kind):
        for name in (given, given.removeprefix(f"{field}_")):
            if name in {one.name for one in fields(inner)}:
                return SettingTypeError(f"{start}: write {field}={inner.__name__}({name}=…)")
    near = get_close_matches(given, [field.name for field in fields(kind)], 1)
    return SettingTypeError(f"{start}" + (f": did you mean {near[0]}?" if near else ""))


def nested(kind: Any) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that are dataclasses themselves."""
    hints = get_type_hints(kind)
    inner = [(name, one) for name, hint in hints.items() for one in (hint, *get_args(hint))]
    return [(name, one) for name, one in inner if isinstance(one, type) and is_dataclass(one)]
