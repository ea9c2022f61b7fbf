"""What an export is told, and everything that can be refused before weights are loaded."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig

from logratio.bundle import TOKENIZER_FILES
from logratio.data import DataReport, PreferenceTokenizer, TokenizationRules
from logratio.data.truncation import TextAs
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.forecast import Forecast, check_writable, existing_parent
from logratio.progress import say
from logratio.scoring.families import check_exportable, max_positions
from logratio.scoring.graph import SINGLE_FILE_BYTES
from logratio.synonyms import takes_known_names
from logratio.training.fingerprint import parameter_count
from logratio.training.models import (
    ADAPTER_CONFIG,
    architecture,
    base_folder,
    check_model_folder,
)
from logratio.training.run_folder import (
    DATA_REPORT_FILE,
    SETTINGS_FILE,
    reward_beta,
    settings_of,
)
from logratio.training.shares import refuse_several
from logratio.validation import check_fields, check_kind

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")

_PROCESS_BYTES = 0.9e9
_COPIES, _COPIES_APART = 4.0, 2.0
"""Of the weights at the peak: torch's and ONNX Runtime's, and two of a file that is one message."""
_SECONDS, _SECONDS_PER_LAYER, _BYTES_PER_SECOND = 8.0, 3.5, 2e8


class ExportError(LogratioError, ValueError):
    """The export cannot be made as asked; nothing was left in the output folder."""


@takes_known_names(ref_model="reference")
@dataclass(frozen=True)
class ExportConfig:
    """Settings of one export.

    Attributes:
        policy: Folder of the trained model or adapter.
        reference: Folder of the model (or adapter) it was kept close to.
        output: Folder of the bundle; new, or empty.
        beta: The reward is beta times the log-ratio, in nats; that of the policy's training
            (its ``training.json``) where None.
        rules: How text becomes ids; None: as the policy was trained (its ``training.json``), else
            the defaults, both cut to the positions that the models have.
        text_as: What a prompt that is a string is: ``chat``, the turn of a user that the chat
            template writes, or ``text``, as it stands. None: as the policy was trained.
    """

    policy: str | Path
    reference: str | Path
    output: str | Path
    beta: float | None = None
    rules: TokenizationRules | None = None
    text_as: TextAs | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ExportPlan:
    """An export that can begin.

    Attributes:
        policy: The policy's folder.
        reference: The reference's folder.
        beta: Reward per nat.
        output: The bundle's folder.
        tokenizer: Loaded, with the bundle's rules.
        config: The policy's.
    """

    policy: Path
    reference: Path
    beta: float
    output: Path
    tokenizer: PreferenceTokenizer
    config: PreTrainedConfig

    @property
    def vocabulary_size(self) -> int:
        """Ids that the models know; the tokenizer may use fewer."""
        return int(self.config.vocab_size)

    @property
    def rules(self) -> TokenizationRules:
        """How text becomes ids."""
        return self.tokenizer.rules

    @property
    def forecast(self) -> Forecast:
        """What the export will need; equal weights are stored once, so it may be less."""
        disk = 4.0 * self._parameters()
        copies = _COPIES_APART if disk > SINGLE_FILE_BYTES else _COPIES
        layers = int(self.config.num_hidden_layers)
        traced = layers * (2 if (self.policy / ADAPTER_CONFIG).exists() else 1)
        return Forecast(
            memory_bytes=_PROCESS_BYTES + copies * disk,
            disk_bytes=disk,
            disk_path=self.output,
            seconds=_SECONDS + _SECONDS_PER_LAYER * traced + disk / _BYTES_PER_SECOND,
            notes=f"float32, {layers} layers",
        )

    def _parameters(self) -> int:
        shares_base = (self.policy / ADAPTER_CONFIG).exists() and base_folder(
            self.policy
        ).resolve() == self.reference.resolve()
        own = parameter_count(self.policy)
        return own if shares_base else own + parameter_count(self.reference)


def plan_export(config: ExportConfig) -> Forecast:
    """Check everything that can be checked without the weights, and say what the export needs.

    Raises:
        ConfigError, ExportError, ModelFolderError, UnsupportedModelError, OutputError,
            MissingExtraError: What stands in the way.
    """
    return make_plan(config).forecast


def make_plan(config: ExportConfig) -> ExportPlan:
    """Check everything that can be checked without the weights.

    Raises:
        ConfigError, ExportError, ModelFolderError, UnsupportedModelError, OutputError,
            MissingExtraError: What stands in the way.
    """
    check_kind(config, ExportConfig)
    refuse_several("export")
    for library in LIBRARIES:
        require(library, "export")
    policy, reference, output = map(Path, (config.policy, config.reference, config.output))
    for folder in (policy, reference):
        check_model_folder(folder)
    beta = reward_beta(policy, config.beta)
    if not (math.isfinite(beta) and beta > 0):
        raise ExportError(f"beta is {beta}; it is that of the training, above 0")
    _check_output(output)
    architecture = _architectures(policy, reference)
    folder = _tokenizer_folder(policy, reference)
    rules = _rules(config, policy, architecture)
    if config.rules is None:
        rules = _settled(rules, _tokenizer(folder, rules))
    tokenizer = _tokenizer(folder, rules)
    check_exportable(architecture, tokenizer.rules.max_length)
    if tokenizer.vocabulary_size > architecture.vocab_size:
        raise ExportError(
            f"{folder}: its tokenizer knows {tokenizer.vocabulary_size} ids, and the policy "
            f"{architecture.vocab_size}"
        )
    plan = ExportPlan(policy, reference, beta, output, tokenizer, architecture)
    check_writable(existing_parent(output.parent), plan.forecast.disk_bytes)
    return plan


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"{output}: not empty, and a bundle never overwrites anything")
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output}: a file of this name is in the way")


def _architectures(policy: Path, reference: Path) -> PreTrainedConfig:
    """Return the policy's configuration; the reference may differ in all but the vocabulary."""
    own, other = (architecture(base_folder(folder)) for folder in (policy, reference))
    check_exportable(own, 0)
    check_exportable(other, 0)
    if own.vocab_size != other.vocab_size:
        raise ExportError(
            f"policy and reference have different vocabularies ({own.vocab_size} and "
            f"{other.vocab_size} ids), so their log-probs cannot be compared"
        )
    return own


def _rules(config: ExportConfig, policy: Path, architecture: PreTrainedConfig) -> TokenizationRules:
    if config.rules is not None:
        return replace(config.rules, text_as=config.text_as or config.rules.text_as)
    rules = _trained_rules(policy) or TokenizationRules()
    rules = replace(rules, text_as=config.text_as or rules.text_as or _trained_as(policy))
    length = min(rules.max_length, max_positions(architecture))
    prompt = rules.max_prompt_length
    return replace(
        rules,
        max_length=length,
        max_prompt_length=None if prompt is None else min(prompt, length - 1),
    )


def _trained_as(policy: Path) -> TextAs | None:
    """Tell from the policy's training what a string is; None where the training does not tell.

    A policy that was trained on chats alone gets strings as a user's turn: nobody would want them
    as they stand.
    """
    report = policy / DATA_REPORT_FILE
    try:
        counts = DataReport.from_dict(json.loads(report.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if counts.text_rows and counts.chat_rows:
        say(
            f"{report}: {counts.text_rows:,} rows were trained as plain text and "
            f"{counts.chat_rows:,} through the chat template; the bundle reads strings as plain "
            "text (--chat: as a user's turn)"
        )
        return "text"
    if counts.chat_rows:
        return "chat"
    return "text" if counts.text_rows else None


def _settled(rules: TokenizationRules, tokenizer: PreferenceTokenizer) -> TokenizationRules:
    """Choose what a string is where neither the user nor the training tells: say so."""
    if rules.text_as is not None or tokenizer.chat_template is None:
        return rules
    say(
        "nothing records how the policy was trained: strings are read as a user's turn, which the "
        "chat template writes (--text: as they stand)"
    )
    return replace(rules, text_as="chat")


def _trained_rules(policy: Path) -> TokenizationRules | None:
    """Read the rules that `logratio train` wrote beside the policy."""
    settings = settings_of(policy)
    if settings is None:
        return None
    try:
        return TokenizationRules.from_dict(settings["rules"])
    except (ValueError, KeyError, TypeError) as error:
        path = policy / SETTINGS_FILE
        raise ExportError(f"{path}: its rules cannot be read ({error})") from error


def _tokenizer_folder(policy: Path, reference: Path) -> Path:
    places = (policy, base_folder(policy), reference, base_folder(reference))
    found = next((folder for folder in places if (folder / TOKENIZER_FILES[0]).exists()), None)
    if found is None:
        raise ExportError(
            f"neither {policy} nor {reference} holds a tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return found


def _tokenizer(folder: Path, rules: TokenizationRules) -> PreferenceTokenizer:
    try:
        return PreferenceTokenizer.load(folder, rules)
    except ValueError as error:
        raise ExportError(f"{folder}: its tokenizer cannot be used: {error}") from error
