"""Settings of an export, checked before weights are loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from transformers import PreTrainedConfig

from logratio.bundle import (
    CACHED_REFERENCE,
    REWARD_MODEL,
    SHARED_PROMPT,
    TOKENIZER_FILES,
    BundleError,
    Precision,
    read_manifest,
)
from logratio.data.store.row_report import DataReport
from logratio.data.tokenization.groups import TextAs, TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError, LogratioError
from logratio.export.agreement import groups_of_file
from logratio.export.families import check_exportable, layout_of, max_positions, not_quantizable
from logratio.export.graph import SINGLE_FILE_BYTES
from logratio.export.kinds import CACHED, NONE, RewardKind, reward_kind
from logratio.export.loading import Calibration
from logratio.extras import require
from logratio.forecast import Forecast, check_writable, existing_parent
from logratio.hub import local_folder
from logratio.one_process import refuse_multiple_processes
from logratio.progress import say
from logratio.report.run_files import DATA_REPORT_FILE, SETTINGS_FILE
from logratio.synonyms import takes_known_names
from logratio.training.dataset import check_same_ids
from logratio.training.fingerprint import parameter_count
from logratio.training.models import (
    ADAPTER_CONFIG,
    architecture,
    base_folder,
    check_model_folder,
)
from logratio.training.reward_model import is_reward_model
from logratio.training.run_folder import note_unfinished, settings_of
from logratio.validation import Range, changes, check_fields, check_kind

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")

_PROCESS_BYTES = 0.9e9
_COPIES, _COPIES_APART = 4.0, 2.0
"""Copies of the weights at the peak: torch's, ONNX Runtime's, and two more for a single file."""
_SECONDS, _SECONDS_PER_LAYER, _BYTES_PER_SECOND = 8.0, 3.5, 2e8


class ExportError(LogratioError, ValueError):
    """The export failed; no file is left in the output folder."""


@takes_known_names(ref_model="reference")
@dataclass(frozen=True)
class ExportConfig:
    """Settings of one export.

    Attributes:
        policy: Folder of the trained model or adapter, or an id of the Hugging Face hub, as
            "organisation/name" or "organisation/name@revision".
        reference: Folder or id of the reference model or adapter. ``cached``: the graph takes the
            reference's log-probs as an input. ``none``: the reward has no reference: it is that of
            the policy's training, as for SimPO, or β times the mean log-prob per token. None: the
            policy is a reward model, or was trained by a method without a reference.
        output: Folder of the bundle; must be new or empty.
        beta: The reward is beta times the log-ratio in nats. None: the beta of the policy's
            training (its ``training.json``). A reward model has none.
        rules: Tokenization rules. None: those of the policy's training (its ``training.json``),
            or the defaults, limited to the models' maximum positions.
        text_as: How to read a prompt given as a string: ``chat``, a user's message formatted with
            the chat template; or ``text``, plain text. None: as in the policy's training.
        dtype: ``float32``; ``float16``, in which the model also computes; or ``bfloat16``, in which
            only the weights are stored.
        bits: Store matrices in 8 or 4 bits per weight; None: as `dtype`.
        data: Rows with ``prompt`` and ``candidates``, as for `logratio rank`, on which a smaller
            precision is compared with float32. None: candidates sampled from the policy.
        force: Export although the rewards of a smaller precision differ too much.
        base: For a LoRA policy: the bundle of its base, which several policies share. The policy's
            bundle then has only the adapter. If the folder does not exist, it is written first,
            from the reference. None: the bundle has the whole graph.
    """

    policy: str | Path
    reference: str | Path | None
    output: str | Path
    beta: Annotated[float, Range(0, without_low=True)] | None = None
    rules: TokenizationRules | None = None
    text_as: TextAs | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    bits: Literal[8, 4] | None = None
    data: str | Path | None = None
    force: bool = False
    base: str | Path | None = None

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ExportPlan:
    """An export whose settings are valid.

    Attributes:
        policy: The folder of the policy or reward model.
        reference: The reference's folder; None without a reference model.
        reward: What the reward is.
        output: The bundle's folder.
        tokenizer: The tokenizer with the bundle's rules.
        config: The policy's config.
        precision: The precision of the graph, not yet measured.
        calibration: The groups of `ExportConfig.data`; None without it.
        base: The bundle of the base that the policy's adapter needs; None for a whole graph.
        takes_adapters: Whether the graph gets inputs for adapters.
        layout: The layout of the graph: see `bundle.GraphInfo`.
    """

    policy: Path
    reference: Path | None
    reward: RewardKind
    output: Path
    tokenizer: PreferenceTokenizer
    config: PreTrainedConfig
    precision: Precision
    calibration: Calibration | None
    base: Path | None = None
    takes_adapters: bool = False
    layout: str = SHARED_PROMPT

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size of the models; the tokenizer may have fewer ids."""
        return int(self.config.vocab_size)

    @property
    def rules(self) -> TokenizationRules:
        """The tokenization rules."""
        return self.tokenizer.rules

    @property
    def forecast(self) -> Forecast:
        """Upper bound of memory, disk and time: equal weights are stored once."""
        memory = 4.0 * self._parameters()
        disk = memory / 2 if self.precision.dtype != "float32" else memory
        if self.base is not None and self.base.exists():
            disk = 0.0
        copies = _COPIES_APART if disk > SINGLE_FILE_BYTES else _COPIES
        layers = int(self.config.num_hidden_layers)
        is_twice = self.reference is not None and (self.policy / ADAPTER_CONFIG).exists()
        traced = layers * (2 if is_twice else 1)
        return Forecast(
            memory_bytes=_PROCESS_BYTES + copies * memory,
            disk_bytes=disk,
            disk_path=self.output,
            seconds=_SECONDS + _SECONDS_PER_LAYER * traced + disk / _BYTES_PER_SECOND,
            notes=f"{self.precision.name}, {layers} layers",
        )

    def _parameters(self) -> int:
        if self.reference is None:
            return parameter_count(self.policy)
        shares_base = (self.policy / ADAPTER_CONFIG).exists() and base_folder(
            self.policy
        ).resolve() == self.reference.resolve()
        policy = parameter_count(self.policy)
        return policy if shares_base else policy + parameter_count(self.reference)


def plan_export(config: ExportConfig) -> Forecast:
    """Check the settings without loading weights, and estimate memory, disk and time.

    Args:
        config: The settings of the export.

    Raises:
        ConfigError, ExportError, ModelFolderError, UnsupportedModelError, OutputError,
            MissingExtraError, VocabularyError: The export is not possible; the message gives the
            reason.
    """
    return make_plan(config).forecast


def make_plan(config: ExportConfig) -> ExportPlan:
    """Check the settings without loading weights.

    Raises:
        ConfigError, ExportError, ModelFolderError, UnsupportedModelError, OutputError,
            MissingExtraError, VocabularyError: The export is not possible; the message gives the
            reason.
    """
    check_kind(config, ExportConfig)
    refuse_multiple_processes("export")
    for library in LIBRARIES:
        require(library, "export")
    precision = _precision(config)
    _check_precision(config, precision)
    policy, output = local_folder(config.policy), Path(config.output)
    named = None if config.reference is None else str(config.reference)
    reference = None if named in (None, CACHED, NONE) else local_folder(str(named))
    folders = [policy] if reference is None else [policy, reference]
    for folder in folders:
        check_model_folder(folder, rewards=is_reward_model(policy))
    reward = reward_kind(policy, named, config.beta)
    note_unfinished(policy)
    _check_output(output)
    base = _base(config, policy, reference)
    architectures = _architectures(folders)
    architecture = architectures[0]
    _check_bits(precision, architectures)
    folder = _tokenizer_folder(folders)
    rules = _rules(config, policy, architecture)
    if config.rules is None:
        rules = _with_default_text_as(rules, _tokenizer(folder, rules))
    tokenizer = _tokenizer(folder, rules)
    for one in architectures:
        check_exportable(one, tokenizer.rules.max_length)
    if tokenizer.vocabulary_size > architecture.vocab_size:
        raise ExportError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size} ids, but the policy has "
            f"{architecture.vocab_size}"
        )
    if reference is not None:
        check_same_ids(reference, policy, tokenizer)
    calibration = None if precision.is_exact else _calibration(config, reward, tokenizer)
    plan = ExportPlan(
        *(policy, reference, reward, output, tokenizer, architecture, precision, calibration, base),
        layout=layout_of(*architectures),
    )
    check_writable(existing_parent(output.parent), plan.forecast.disk_bytes)
    return plan


def _precision(config: ExportConfig) -> Precision:
    """Return the precision of the settings, or that of a base that exists."""
    wanted = Precision(config.dtype, config.bits)
    if config.base is None or not Path(config.base).exists():
        return wanted
    try:
        base = read_manifest(config.base)
    except BundleError as error:
        raise ExportError(f"--base: {error}") from error
    if not base.graph.takes_adapters:
        raise ExportError(f"--base {config.base}: a bundle whose graph takes no adapters")
    found = Precision(base.precision.dtype, base.precision.bits)
    if not wanted.is_exact and wanted != found:
        raise ConfigError(
            f"--base {config.base} is in {found.name}: remove --dtype and --bits, or name another "
            "folder"
        )
    return found


def _check_precision(config: ExportConfig, precision: Precision) -> None:
    if config.bits is not None and config.dtype != "float32":
        raise ConfigError(f"--bits {config.bits} quantizes float32 weights: remove --dtype")
    if precision.is_exact:
        for name, value in (("data", config.data), ("force", config.force or None)):
            if value is not None:
                raise ConfigError(
                    f"--{name} is for a smaller precision: give --dtype or --bits, or remove it"
                )


def _check_bits(precision: Precision, configs: Sequence[PreTrainedConfig]) -> None:
    """Refuse to quantize models whose weights are not all those of products of matrices."""
    if precision.bits is None:
        return
    for config in configs:
        if part := not_quantizable(config):
            raise ConfigError(
                f"--bits {precision.bits}: the {part} of {config.model_type} models cannot be "
                "quantized: remove --bits; --dtype float16 or bfloat16 halves the size, too"
            )


def _calibration(
    config: ExportConfig, reward: RewardKind, tokenizer: PreferenceTokenizer
) -> Calibration | None:
    """Read the groups on which a smaller precision is compared; None: sample them later."""
    if config.data is None:
        if reward.name in (CACHED_REFERENCE, REWARD_MODEL):
            raise ConfigError(
                "--data is missing: without a reference model or a language model, no rewards can "
                "be compared. Give rows with prompt and candidates, as for `logratio rank`"
            )
        return None
    groups, references = groups_of_file(Path(config.data), tokenizer)
    source = Path(config.data).name
    if reward.name != CACHED_REFERENCE:
        return Calibration(source, groups)
    known = {}
    for group, values in zip(groups, references, strict=True):
        if len(values) != len(group.candidates):
            raise ConfigError(f"--data {config.data}: a row lacks reference_logps per candidate")
        for ids, value in zip(group.candidates, values, strict=True):
            known[(*group.prompt_ids, -1, *ids)] = value
    return Calibration(source, groups, lambda prompt, ids: known[(*prompt, -1, *ids)])


def _base(config: ExportConfig, policy: Path, reference: Path | None) -> Path | None:
    """Return the folder of the base's bundle, if the policy is to be an adapter for it."""
    if config.base is None:
        return None
    if reference is None or not (policy / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"--base: {policy} is not a LoRA adapter with a reference model; export without --base"
        )
    base = Path(config.base)
    if base.resolve() == Path(config.output).resolve():
        raise ConfigError("--base and --output are the same folder")
    check_writable(existing_parent(base.parent))
    return base


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"{output}: not empty; an export never overwrites files")
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output}: is a file, not a folder")


def _architectures(folders: Sequence[Path]) -> list[PreTrainedConfig]:
    """Return the configs of policy and reference, which must have the same vocabulary."""
    first, *others = (architecture(base_folder(folder)) for folder in folders)
    for config in (first, *others):
        check_exportable(config, 0)
    for second in others:
        if first.vocab_size != second.vocab_size:
            raise ExportError(
                f"policy and reference have different vocabularies ({first.vocab_size} and "
                f"{second.vocab_size} ids), so their log-probs cannot be compared"
            )
    return [first, *others]


def _rules(config: ExportConfig, policy: Path, architecture: PreTrainedConfig) -> TokenizationRules:
    if config.rules is not None:
        return replace(config.rules, text_as=config.text_as or config.rules.text_as)
    rules = _trained_rules(policy) or TokenizationRules()
    rules = replace(rules, text_as=config.text_as or rules.text_as or _trained_as(policy))
    return rules.limited(max_positions(architecture))


def _trained_as(policy: Path) -> TextAs | None:
    """Return how the policy's training read strings; None if it is not recorded.

    After training on chats only, a string is read as a user's message.
    """
    report = policy / DATA_REPORT_FILE
    try:
        counts = DataReport.from_dict(json.loads(report.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if counts.text_rows and counts.chat_rows:
        say(
            f"{report}: {counts.text_rows:,} rows were trained as plain text and "
            f"{counts.chat_rows:,} with the chat template; the bundle reads strings as plain text "
            "(--chat: as a user's message)"
        )
        return "text"
    if counts.chat_rows:
        return "chat"
    return "text" if counts.text_rows else None


def _with_default_text_as(
    rules: TokenizationRules, tokenizer: PreferenceTokenizer
) -> TokenizationRules:
    """Read strings as chat if neither the user nor the training decides, and print a note."""
    if rules.text_as is not None or tokenizer.chat_template is None:
        return rules
    say(
        "no record of how the policy was trained: strings are read as a user's message with the "
        "chat template (--text: as plain text)"
    )
    return replace(rules, text_as="chat")


def _trained_rules(policy: Path) -> TokenizationRules | None:
    """Read the rules that `logratio train` stored in the policy's folder."""
    settings = settings_of(policy)
    if settings is None:
        return None
    try:
        return TokenizationRules.from_dict(settings["rules"])
    except (ValueError, KeyError, TypeError) as error:
        path = policy / SETTINGS_FILE
        raise ExportError(f"{path}: cannot read its rules ({error})") from error


def _tokenizer_folder(folders: Sequence[Path]) -> Path:
    places = [place for folder in folders for place in (folder, base_folder(folder))]
    found = next((folder for folder in places if (folder / TOKENIZER_FILES[0]).exists()), None)
    if found is None:
        raise ExportError(
            f"no tokenizer.json in {' or '.join(map(str, folders))}; create one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return found


def _tokenizer(folder: Path, rules: TokenizationRules) -> PreferenceTokenizer:
    try:
        return PreferenceTokenizer.load(folder, rules)
    except ValueError as error:
        raise ExportError(f"{folder}: its tokenizer cannot be used: {error}") from error
