"""The model card: README.md next to the weights, which says how the model was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio import __version__
from logratio.data.store.row_report import DataReport
from logratio.durable import write_atomic
from logratio.errors import hub_id
from logratio.intervals import spread
from logratio.training.config import TrainConfig
from logratio.training.given_model import name_of
from logratio.training.methods.objective import ALONE, Objective, Term
from logratio.training.models import ADAPTER_CONFIG
from logratio.training.run_info import resolved_settings
from logratio.training.trackers import flat

CARD_FILE = "README.md"
MARK = "<!-- Written by logratio, which replaces this file unless this line is deleted. -->"
_LEFT_OUT = {
    *("model", "data", "output", "cache", "reference", "eval_data", "loss", "beta"),
    *("resume", "overwrite", "report", "report_to", "run_name", "project", "device", "read_mode"),
    *("precompute", "save_every", "keep_checkpoints", "offload_activations"),
    *("activation_checkpointing", "revision", "parallel", "stall_timeout"),
}
"""Settings that are shown elsewhere on the card, or that do not change the model."""
_OFF = {
    *("label_smoothing", "gamma", "eval_share", "eval_samples", "max_bad_fraction"),
    *("lora.dropout", "compile_layers", "formats.lists"),
    *("study_flipped_labels", "router_aux_loss_coef"),
}
"""Settings whose default does nothing."""
_EVALUATED = {
    "eval_loss": "loss",
    "eval_rewards/accuracies": "preference accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_expected_calibration_error": "calibration error",
    "eval_kl": "KL from the reference, nats per completion",
    "eval_sample_length": "mean length of samples, tokens",
}


@dataclass(frozen=True)
class Made:
    """How a model was made.

    Attributes:
        config: Settings of the run.
        data: The report on the rows of its data.
        steps: Number of updates of the saved model.
        stop_reason: Why the run ended early; None: it did not.
        evaluation: The row of the saved model's evaluation, or None.
        versions: Versions of the libraries, by name.
    """

    config: TrainConfig
    data: DataReport
    steps: int
    stop_reason: str | None
    evaluation: Mapping[str, Any] | None
    versions: Mapping[str, str]


def write_card(made: Made, folder: Path, output: Path) -> None:
    """Write the model card to `folder`, whose files will be moved to `output`.

    A card in `output` that logratio did not write, or that lacks `MARK`, is kept.

    Args:
        made: How the model was made.
        folder: The folder with the new files; a card that is already there is replaced.
        output: The output folder of the run.
    """
    card = folder / CARD_FILE
    card.unlink(missing_ok=True)  # peft writes one of its own
    if _may_replace(output / CARD_FILE):
        card.write_text(card_of(made), encoding="utf-8")


def _may_replace(card: Path) -> bool:
    """Return whether there is no card, or one that logratio wrote."""
    try:
        return MARK in card.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:  # it cannot be read, so it is kept
        return False


def card_of(made: Made) -> str:
    """Return the card as Markdown, with metadata for the Hugging Face hub in front."""
    config = made.config
    link = " + ".join(_link(term) for term in Objective.of(config).terms)
    title = config.run_name or Path(config.output).resolve().name
    parts = [
        f"---\n{_metadata(config)}\n---\n{MARK}",
        f"# {_cell(title)}",
        f"A fine-tuned version of `{_name(name_of(config.model))}`, trained with {link} by "
        f"logratio {__version__}.",
        "## Use",
        f"```python\n{_usage(config)}\n```",
        "## Training",
        _table(_training(made)),
    ]
    if made.evaluation:
        parts += _evaluation_section(made.evaluation)
    shown = [(name, value) for name, value in flat(resolved_settings(config))
             if _matters(name, value, config)]  # fmt: skip
    parts += [_SETTINGS, _table(shown), "## Versions", _table(list(made.versions.items()))]
    return "\n\n".join(parts) + "\n"


_SETTINGS = "## Settings"


def add_evaluation(output: Path, row: Mapping[str, Any]) -> None:
    """Add an evaluation to the card of a run that had none, such as that of a sweep.

    A card that logratio did not write, or that has an evaluation, stays as it is.

    Args:
        output: The output folder of the run.
        row: The evaluation, with the names of `evaluations.jsonl`.
    """
    card = output / CARD_FILE
    if not card.is_file() or not _may_replace(card):
        return
    text = card.read_text("utf-8")
    if "## Evaluation" not in text:
        before, found, after = text.partition(f"{_SETTINGS}\n")
        section = "\n\n".join(_evaluation_section(row))
        write_atomic(card, f"{before}{section}\n\n{found}{after}")


def _evaluation_section(row: Mapping[str, Any]) -> list[str]:
    return [
        "## Evaluation",
        f"On {row['groups']:,} held-out groups, after update {row['step']:,}:",
        _table(_evaluation(row)),
    ]


def hub_name(folder: str | Path) -> str | None:
    """Return the id of the hub that a model comes from, if that is known; else None.

    It is known of a snapshot in the hub's cache, and of a folder whose config records it.
    """
    name = name_of(folder).partition("@")[0]
    if _is_id(name):
        return name
    for file, key in (("config.json", "_name_or_path"), (ADAPTER_CONFIG, _BASE)):
        try:
            recorded = json.loads((Path(folder) / file).read_text("utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(recorded, str) and _is_id(recorded):
            return recorded
    return None


_BASE = "base_model_name_or_path"


def _is_id(name: str) -> bool:
    return name.count("/") == 1 and hub_id(name) == name and not Path(name).exists()


def _link(term: Term) -> str:
    """Return the name of a method with a link to its paper."""
    number = term.method.paper.partition("arXiv ")[2].partition(",")[0]
    title = term.method.title
    return f"[{title}](https://arxiv.org/abs/{number})" if number else title


def _metadata(config: TrainConfig) -> str:
    """Return the card's metadata as YAML."""
    from huggingface_hub import ModelCardData

    tags = [config.loss, "logratio", *(["lora"] if config.trains_adapter else [])]
    data = ModelCardData(
        base_model=hub_name(config.model),
        library_name="peft" if config.trains_adapter else "transformers",
        pipeline_tag="text-classification" if Objective.of(config).scores else "text-generation",
        tags=tags,
    )
    return str(data.to_yaml())


def _usage(config: TrainConfig) -> str:
    """Return code that loads the model from its folder."""
    folder = Path(config.output).resolve().name
    task = "SequenceClassification" if Objective.of(config).scores else "CausalLM"
    package, kind = "transformers", f"AutoModelFor{task}"
    if config.trains_adapter:
        package, kind = "peft", f"AutoPeftModelFor{task}"
    lines = [f"from {package} import {kind}", "from transformers import AutoTokenizer"]
    if package == "transformers":
        lines = [f"from transformers import {kind}, AutoTokenizer"]
    one = ", num_labels=1" if config.trains_adapter and Objective.of(config).scores else ""
    lines += ["", f'model = {kind}.from_pretrained("{folder}"{one})']
    return "\n".join([*lines, f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'])


def _training(made: Made) -> list[tuple[str, Any]]:
    config, data = made.config, made.data
    settings = resolved_settings(config)
    kept = f"{data.kept:,} kept of {data.read:,} rows ({data.refused:,} refused"
    rows = [
        ("method", config.loss),
        ("β", settings["beta"] if Objective.of(config).has_beta else None),
        ("reference", _name(name_of(config.reference)) if config.reference else None),
        ("data", ", ".join(map(_name, settings["data"]))),
        ("groups", f"{kept}, {data.deduplicated:,} duplicates left out)"),
        ("held-out data", ", ".join(map(_name, settings["eval_data"] or []))),
        ("updates", f"{made.steps:,} of {config.batch_size:,} groups each"),
        ("stopped early", made.stop_reason),
    ]
    return [(name, value) for name, value in rows if value]


def _evaluation(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, words in _EVALUATED.items():
        if name in row:
            text = f"{row[name]:.4g}"
            if name == "eval_rewards/accuracies" and row.get("accuracy_interval"):
                low, high = row["accuracy_interval"]
                text += f" (95 %: {low:.3f} to {high:.3f})"
            if name == "eval_kl" and row.get("kl"):
                error = spread(row["kl"]["standard_error"])
                text += f"{error}{error and ' (95 %)'}"
            rows.append((words, text))
    return rows


def _matters(name: str, value: Any, config: TrainConfig) -> bool:
    """Whether a setting may have had an effect on the model of this run."""
    outer = name.partition(".")[0]
    if outer in _LEFT_OUT or outer in _without_effect(config) or value in (None, "", []):
        return False
    if name in _OFF and value in (0, "off", "pairs"):
        return False
    return value is not False or name == "rules.append_eos"


def _without_effect(config: TrainConfig) -> set[str]:
    """Return the settings that other settings of the run make void."""
    void = set[str]()
    void |= {*ALONE} - {name for term in Objective.of(config).terms for name in term.options}
    if not config.sync_reference:
        void |= {"reference_mixup_alpha", "reference_sync_steps"}
    if config.lr_scheduler != "wsd":
        void |= {"decay", "decay_type"}
    if config.lr_scheduler == "constant":
        void.add("min_lr_rate")
    if config.max_steps:
        void.add("epochs")
    if not config.eval_samples:
        void.add("max_new_tokens")
    if not (Path(config.model) / ADAPTER_CONFIG).exists():
        void.add("adapter")
    return void


def _name(given: object) -> str:
    """Return a path as it was given, but only the last part of an absolute one."""
    path = Path(str(given))
    return path.name if path.is_absolute() else str(given)


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    """Return a value as text that breaks neither a table nor the page."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
