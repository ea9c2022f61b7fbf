"""Flags of transformers, TRL and other trainers: what they are called here, or what to do instead.

The one table of them. A flag with exactly the same meaning is accepted; any other ends the command
with the sentence that says what has its effect.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from logratio.errors import LogratioError


class ForeignFlagError(LogratioError, ValueError):
    """A flag of another tool that has no equal here."""


SAME: Mapping[str, str] = {
    "--learning-rate": "--lr",
    "--lora-r": "--lora-rank",
    "--loss-type": "--loss",
    "--model-name-or-path": "--model",
    "--model-path": "--model",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--output-dir": "--output",
    "--overwrite-output-dir": "--overwrite",
    "--ref-model": "--reference",
    "--ref-model-name-or-path": "--reference",
    "--reference-model": "--reference",
    "--save-steps": "--save-every",
    "--train-file": "--data",
    "--use-peft": "--lora",
    "--warmup-ratio": "--warmup",
}
VALUES: Mapping[tuple[str, str], str] = {("--loss-type", "sigmoid"): "dpo"}
"""Values that a flag with the same meaning spells differently."""

_BATCH = (
    "--batch-size is the number of pairs in an update (TRL's per-device batch × accumulation × "
    "devices); --token-budget bounds what is computed at a time and changes no result"
)
_PRECISION = "--precision fp32, bf16 (autocast) or bf16-weights; there is no fp16"
_METRICS = (
    "every update is written to metrics.jsonl and TensorBoard's events in --output; leave it out"
)
_EVALUATION = (
    "run `logratio evaluate --policy OUTPUT --reference MODEL --data held_out.jsonl` after the run"
)
_HUB = "data are files: `hf download ORG/NAME --repo-type dataset --local-dir DIR`, then --data DIR"
_ONE_PROCESS = "training runs in one process on one device; leave it out"
_TARGETS = "--lora-target NAME, once for each name"
_DROPOUT = "dropout is off in training, so that two passes see the same network; leave it out"

INSTEAD: Mapping[str, str] = {
    "--attn-implementation": "attention is chosen at the start; leave it out",
    "--bf16": "--precision bf16",
    "--config": "flags are given on the command line; there is no configuration file",
    "--dataset": _HUB,
    "--dataset-config": _HUB,
    "--dataset-name": _HUB,
    "--ddp": _ONE_PROCESS,
    "--deepspeed": _ONE_PROCESS,
    "--disable-dropout": _DROPOUT,
    "--do-eval": _EVALUATION,
    "--dtype": _PRECISION,
    "--eval-steps": _EVALUATION,
    "--eval-strategy": _EVALUATION,
    "--evaluation-strategy": _EVALUATION,
    "--fp16": _PRECISION,
    "--fsdp": _ONE_PROCESS,
    "--gradient-accumulation-steps": _BATCH,
    "--gradient-checkpointing": "--activation-checkpointing auto (the default), all or off",
    "--load-in-4bit": "--quantization 4bit, of `logratio precompute`",
    "--load-in-8bit": "--quantization 8bit, of `logratio precompute`",
    "--logging-dir": _METRICS,
    "--logging-steps": _METRICS,
    "--lora-dropout": _DROPOUT,
    "--lora-modules": _TARGETS,
    "--lora-target-modules": _TARGETS,
    "--lr-scheduler-type": "the rate rises over --warmup, then falls along a cosine to 0",
    "--max-completion-length": "--max-length bounds prompt + completion",
    "--max-seq-length": "--max-length bounds prompt + completion",
    "--max-steps": "--epochs; an update has --batch-size pairs",
    "--micro-batch-size": _BATCH,
    "--optim": "--optimizer adamw, adamw8bit or adamw-host",
    "--padding-free": "nothing is padded; leave it out",
    "--per-device-eval-batch-size": "--token-budget bounds what is computed at a time",
    "--per-device-train-batch-size": _BATCH,
    "--precompute-ref-log-probs": "--cache DIR --precompute",
    "--reference-free": "--loss simpo, which has no reference",
    "--report-to": _METRICS,
    "--resume-from-checkpoint": "--resume, which finds the newest valid checkpoint in --output",
    "--rpo-alpha": "there is no such term here; leave it out",
    "--save-strategy": "--save-every N, in updates; 0 for none",
    "--save-total-limit": "the last two checkpoints are kept; leave it out",
    "--tf32": _PRECISION,
    "--torch-dtype": _PRECISION,
    "--train-batch-size": _BATCH,
    "--trust-remote-code": "code from a model's folder is never run; leave it out",
    "--use-cpu": "--device cpu",
    "--use-logits-to-keep": "logits are only made where they count; leave it out",
    "--warmup-steps": "--warmup, the share of the updates in which the rate rises, as 0.1",
    "--weight-decay": "weights do not decay here; leave it out",
}


def translated(arguments: Sequence[str], known: AbstractSet[str]) -> list[str]:
    """Spell flags as the command does.

    Args:
        arguments: of the command line.
        known: the command's own flags, which mean what they mean here.

    Raises:
        ForeignFlagError: a flag of another tool has no equal; says what to do.
    """
    spelled: list[str] = []
    given = ""  # the foreign flag that a value belongs to
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
        elif given in INSTEAD:
            raise ForeignFlagError(f"there is no {flag}; use instead: {INSTEAD[given]}")
        spelled.append(flag + equals + value)
    return spelled
