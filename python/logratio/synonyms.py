"""Option names of transformers, TRL and other trainers, and their equivalents here.

The same tables serve command line flags and config fields. A name with exactly the same meaning is
accepted; any other raises an error that names the alternative.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, get_args, get_type_hints

from logratio.errors import LogratioError, SettingTypeError, UnknownSettingError

Kind = TypeVar("Kind")


class ForeignFlagError(LogratioError, ValueError):
    """A flag of another trainer without an exact equivalent."""

    __str__ = Exception.__str__  # it names the flag as it was given


SAME: Mapping[str, str] = {
    "--early-stopping-patience": "--early-stop",
    "--eval-file": "--eval-data",
    "--eval-steps": "--eval-every",
    "--learning-rate": "--lr",
    "--lora-r": "--lora-rank",
    "--lora-target-modules": "--lora-target",
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
    "--ref-model-mixup-alpha": "--reference-mixup-alpha",
    "--ref-model-sync-steps": "--reference-sync-steps",
    "--save-steps": "--save-every",
    "--save-total-limit": "--keep-checkpoints",
    "--sync-ref-model": "--sync-reference",
    "--train-file": "--data",
    "--use-dora": "--lora-dora",
    "--use-peft": "--lora",
    "--use-rslora": "--lora-rslora",
    "--validation-file": "--eval-data",
    "--warmup-ratio": "--warmup",
    "--warmup-steps": "--warmup",
}
VALUES: Mapping[tuple[str, str], str] = {
    ("--loss-type", "sigmoid"): "dpo",
    ("--loss-type", "exo_pair"): "exo",
    ("--loss-type", "nca_pair"): "nca",
    ("--loss-type", "sppo_hard"): "sppo",
    ("--loss-type", "aot_unpaired"): "aot-unpaired",
    ("--loss-type", "apo_zero"): "apo-zero",
    ("--loss-type", "apo_down"): "apo-down",
    ("--loss-type", "apo_zero_unpaired"): "apo-zero-unpaired",
    ("--lr-scheduler-type", "constant_with_warmup"): "constant",
    ("--lr-scheduler-type", "cosine_with_min_lr"): "cosine",
    ("--lr-scheduler-type", "warmup_stable_decay"): "wsd",
}
"""Values with another name in a flag of the same meaning."""
LOSSES: Mapping[str, str] = {
    "kto_pair": "kto, which takes pairs apart into good and bad answers",
    "bco_pair": "bco, which has the paper's shift δ that TRL leaves out",
    "aot_pair": "aot, over the pairs of an update",
}
"""Losses of TRL whose nearest method here has another formula: the method and the difference."""
SWITCHES: Mapping[str, tuple[str, str]] = {
    "--load-in-4bit": ("--quantization", "4bit"),
    "--load-in-8bit": ("--quantization", "8bit"),
}
"""Flags without a value that mean a value of another flag."""

_BATCH = (
    "set `--batch-size`, the number of pairs in an update (TRL's per-device batch × accumulation × "
    "devices); `--token-budget` bounds the micro-batch and does not change results"
)
_PRECISION = "use `--precision fp32`, `bf16` (autocast) or `bf16-weights`; there is no fp16"
_EVALUATION = (
    "give `--eval-data FILE` or `--eval-share 0.05`, with `--eval-every N`; default: each epoch"
)
_HUB = (
    "download it with `hf download ORG/NAME --repo-type dataset --local-dir DIR`, then give "
    "`--data DIR`"
)
_TARGETS = "use `--lora-target NAME`, with one or more names"
_LENGTH = "use `--max-length N`, the maximum of prompt + completion"
_START = "use `--adapter continue`, whose reference is the adapter at its start"

INSTEAD: Mapping[str, str] = {
    "--ddp": "start the command with torchrun, and use `--parallel ddp`",
    "--fsdp": "start the command with torchrun, and use `--parallel fsdp`",
    "--fsdp-config": "start the command with torchrun, and use `--parallel fsdp`",
    "--bf16": "use `--precision bf16`",
    "--compile-layers": "use `--compile on` or `auto`",
    "--dataset": _HUB,
    "--dataset-config": _HUB,
    "--dataset-name": _HUB,
    "--do-eval": _EVALUATION,
    "--ddp-timeout": "use `--stall-timeout N`, in seconds",
    "--dtype": _PRECISION,
    "--eval-strategy": _EVALUATION,
    "--evaluation-strategy": _EVALUATION,
    "--fp16": _PRECISION,
    "--full-determinism": "use `--deterministic`",
    "--gradient-accumulation-steps": _BATCH,
    "--gradient-checkpointing": "use `--activation-checkpointing auto` (the default), `all` or "
    "`off`",
    "--eval-on-start": "evaluate the model at the start with logratio.evaluate",
    "--optim-args": "use `--adam-epsilon N`, `--weight-decay N` and the other settings of AdamW",
    "--push-to-hub": "upload the output folder with `hf upload ORG/NAME FOLDER`",
    "--truncation-mode": "use `--prompt-truncation keep_start` or `keep_end`",
    "--load-best-model-at-end": "use `--best-metric METRIC`, whose best model is saved",
    "--load-in-4bit": "use `--quantization 4bit` of `logratio precompute` and `logratio train`",
    "--load-in-8bit": "use `--quantization 8bit` of `logratio precompute` and `logratio train`",
    "--lora-modules": _TARGETS,
    "--lr-scheduler-kwargs": "use `--min-lr-rate N`, and for wsd `--decay N` and `--decay-type`",
    "--max-completion-length": _LENGTH,
    "--max-seq-length": _LENGTH,
    "--micro-batch-size": _BATCH,
    "--model-adapter-name": _START,
    "--optim": "use `--optimizer adamw`, `adamw8bit` or `adamw-host`",
    "--peft-config": "use `--lora` and its flags; in Python, DPOTrainer takes peft_config",
    "--per-device-eval-batch-size": "use `--token-budget N`, the tokens computed at a time",
    "--per-device-train-batch-size": _BATCH,
    "--precompute-ref-log-probs": "use `--cache DIR --precompute`",
    "--ref-adapter-name": _START,
    "--reference-free": "use `--loss simpo`, which has no reference",
    "--cpo-alpha": "use `--loss cpo --loss-option alpha={1}`",
    "--desirable-weight": "use `--loss-option desirable_weight={1}`",
    "--discopop-tau": "use `--loss discopop --loss-option tau={0.05}`",
    "--f-alpha-divergence-coef": "use `--loss f-dpo-alpha --loss-option alpha=0.5`, one minus the "
    "coefficient of TRL",
    "--f-divergence-type": "use `--loss f-dpo-forward-kl`, `f-dpo-js` or `f-dpo-alpha`",
    "--ld-alpha": "use `--loss ld-dpo --loss-option alpha={0.5}`",
    "--loss-weights": "write the weights with the methods: `--loss dpo:0.8+sft:0.2`",
    "--orpo-alpha": "use `--loss orpo --beta {0.1}`",
    "--rpo-alpha": "add sft with a weight: `--loss dpo+sft:{0.2}`",
    "--simpo-gamma": "use `--loss simpo --gamma {1}`",
    "--undesirable-weight": "use `--loss-option undesirable_weight={1}`",
    "--use-weighting": "use `--loss wpo`",
    "--resume-from-checkpoint": "use `--resume`, which finds the newest valid checkpoint in the "
    "output folder",
    "--save-strategy": "use `--save-every N`, in updates; 0 for none",
    "--tf32": "use `--precision bf16` for speed; float32 never uses TF32",
    "--torch-compile": "use `--compile on` or `auto`",
    "--torch-dtype": _PRECISION,
    "--train-batch-size": _BATCH,
    "--use-cpu": "use `--device cpu`",
}
"""What to do instead of giving a flag: a clause, with flags in backticks. A number in braces is an
example, which the number that was given replaces."""

_METRICS = "every update is logged to metrics.jsonl and TensorBoard events in the output folder"
_SHARDING = "torch's DDP and FSDP2 divide the work of several processes"
_DROPOUT = "the model's dropout is always off, so that two passes use the same network"

UNSUPPORTED: Mapping[str, str] = {
    "--bias": "biases of the base are not trained",
    "--lora-bias": "biases of the base are not trained",
    "--lora-task-type": "models are causal language models",
    "--peft-type": "adapters are LoRA adapters",
    "--task-type": "models are causal language models",
    "--attn-implementation": "the attention kernel is chosen automatically",
    "--dataloader-drop-last": "every epoch has all groups",
    "--deepspeed": _SHARDING,
    "--disable-dropout": _DROPOUT,
    "--label-smoothing-factor": "it smooths a next-token loss, which these losses have not",
    "--neftune-noise-alpha": "embeddings get no noise",
    "--parallelism-config": _SHARDING,
    "--train-sampling-strategy": "groups are drawn in a random order, from the seed",
    "--logging-dir": _METRICS,
    "--logging-steps": _METRICS,
    "--padding-free": "batches are never padded",
    "--trust-remote-code": "code in a model folder is never run",
    "--use-logits-to-keep": "logits are only computed for the tokens of the loss",
}
"""Why a flag without any equivalent is not needed or does not exist: a clause without flags."""


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
    for place, argument in enumerate(arguments):
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
            number = value if equals else next(iter(arguments[place + 1 :]), None)
            raise ForeignFlagError(f"no option {flag}: {_with_number(INSTEAD[given], number)}")
        elif given in UNSUPPORTED:
            raise ForeignFlagError(f"{flag} is not supported: {UNSUPPORTED[given]}. Remove it.")
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
        UnknownSettingError: A name is unknown or has no exact equivalent; the message names the
            alternative.
        SettingTypeError: A field is given twice.
    """
    known = {field.name for field in fields(kind)}
    named: dict[str, Any] = {}
    for given, value in settings.items():
        name = given if given in known else own_name(kind, given)
        if name not in known:
            raise UnknownSettingError(_unknown(kind, given, value))
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


def aliases_of(kind: Any) -> Mapping[str, str]:
    """Return the further names of a dataclass's fields, and the fields."""
    return _ALIASES.get(kind, {})


def foreign_names() -> list[str]:
    """Return the names of other trainers' settings with an equivalent here."""
    return [flag[2:].replace("-", "_") for flag in SAME]


def instead_of(given: str, value: Any = None, *, in_file: bool = False) -> str | None:
    """Return what to do instead of giving a setting without an equivalent, in terms of fields.

    Args:
        given: The setting's name elsewhere.
        value: Its value; if it is a number, the advice has it in place of an example.
        in_file: Write fields as in a settings file, not as in Python.
    """
    flag = _flag(given)
    if flag in UNSUPPORTED:
        return f"{UNSUPPORTED[flag]}. Remove it."
    if flag not in INSTEAD:
        return None
    return re.sub(
        "`(--[^`]*)`",
        lambda quoted: f"`{_as_settings(quoted[1], in_file)}`",
        _with_number(INSTEAD[flag], value),
    )


def _with_number(advice: str, value: Any) -> str:
    """Put a number in place of the example in an advice."""
    try:
        number = f"{float(value):g}"
    except (TypeError, ValueError):
        number = r"\1"
    return re.sub(r"\{(.*?)\}", number, advice)


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Return the name that `given` probably misspells; None if no name is similar enough."""
    near = get_close_matches(given, list(known), 1, cutoff=0.8)
    return near[0] if near else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_FIELDS = {
    "compile": "compile_layers={}",
    "lora_target": "lora=LoraSettings(targets=({},))",
    "max_length": "rules=TokenizationRules(max_length={})",
}
"""How flags are written in Python if not as a field of the same name."""
_SWITCHES = {"deterministic", "precompute", "resume"}
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")


def _as_settings(flags: str, in_file: bool) -> str:
    """Return flags and their values as keyword arguments, or as keys of a file."""
    found = re.findall(r"--([a-z][a-z0-9-]*)(?: ((?!--)\S+))?", flags)
    write = _as_key if in_file else _as_setting
    return ", ".join(write(flag.replace("-", "_"), value) for flag, value in found)


def _as_key(name: str, value: str) -> str:
    if name == "loss_option":
        return f"loss_options: {{{value.replace('=', ': ')}}}"
    if name in _SWITCHES:
        return f"{name}: true"
    return f"{name}: {'…' if value.isupper() else value}" if value else name


def _as_setting(name: str, value: str) -> str:
    if name == "loss_option":
        option, _, number = value.partition("=")
        return f'loss_options={{"{option}": {number}}}'
    if name in _SWITCHES:
        return f"{name}=True"
    if not value:
        return name
    is_example = value.isupper()
    shown = "…" if is_example else value if _NUMBER.fullmatch(value) else f'"{value}"'
    return _FIELDS.get(name, f"{name}={{}}").format(shown)


def _unknown(kind: Any, given: str, value: Any) -> str:
    """Return the error for a name that is not a field, with a suggestion."""
    start = f"{kind.__name__} has no {given}"
    if _flag(given) in UNSUPPORTED:
        return f"{kind.__name__}: {given} is not supported: {instead_of(given)}"
    if advice := instead_of(given, value):
        return f"{start}: {advice}"
    for field, inner in nested(kind):
        for name in (given, given.removeprefix(f"{field}_")):
            if own_name(inner, name) in {one.name for one in fields(inner)}:
                return f"{start}: write {field}={inner.__name__}({name}=…)"
    known = {field.name for field in fields(kind)}
    others = [*foreign_names(), *_ALIASES.get(kind, ())]
    near = nearest(given, [*known, *(name for name in others if own_name(kind, name) in known)])
    return f"{start}: did you mean {near}?" if near else start


def nested(kind: Any) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that are dataclasses themselves."""
    hints = get_type_hints(kind)
    inner = [(name, one) for name, hint in hints.items() for one in (hint, *get_args(hint))]
    return [(name, one) for name, one in inner if isinstance(one, type) and is_dataclass(one)]
