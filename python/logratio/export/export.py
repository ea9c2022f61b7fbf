"""Export two model folders as a bundle, or fail without leaving any file."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedConfig

from logratio import bundle
from logratio.bundle import (
    CHUNK,
    GRAPH,
    MANIFEST,
    REWARD_MODEL,
    TOKENIZER_FILES,
    GraphInfo,
    Manifest,
    read_manifest,
    verify_files,
)
from logratio.data.store.row_report import DataReport
from logratio.data.tokenization.groups import TextAs, TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_files import write_tokenizer
from logratio.durable import sync
from logratio.errors import LogratioError
from logratio.export.graph import OPSETS, SINGLE_FILE_BYTES, GraphError, trace, write
from logratio.export.loading import LoadedPair, LoadedRewardModel, load_pair, load_reward_model
from logratio.export.parity import (
    GoldenInput,
    ParityError,
    golden_inputs,
    probing_inputs,
)
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import (
    ADAPTER,
    TWO_MODELS,
    RewardScorer,
    check_exportable,
    max_positions,
)
from logratio.extras import require
from logratio.forecast import Forecast, check_writable, existing_parent, size
from logratio.hub import local_folder
from logratio.one_process import refuse_multiple_processes
from logratio.progress import progress, say
from logratio.report.run_files import DATA_REPORT_FILE, SETTINGS_FILE
from logratio.synonyms import takes_known_names
from logratio.training.fingerprint import model_fingerprint, parameter_count
from logratio.training.models import (
    ADAPTER_CONFIG,
    architecture,
    base_folder,
    check_model_folder,
)
from logratio.training.reward_model import is_reward_model
from logratio.training.run_folder import note_unfinished, reward_beta, settings_of
from logratio.validation import Range, changes, check_fields, check_kind


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Create a temporary folder next to `output`, and remove it unless it was published.

    Yields:
        The folder, on the same file system as `output`, so that the rename is atomic.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, manifest: Manifest, output: Path) -> None:
    """Write the manifest, verify all files, and rename the folder to `output`.

    Raises:
        BundleError: A file does not read back as written (a failing disk), or the graph contains
            what no reranker would load.
        OSError: The disk is full, or `output` was created in the meantime.
    """
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    verify_files(folder, read_manifest(folder).files)
    bundle.check_graph_file(folder, manifest.files, manifest.graph.opset)
    for path in (*folder.iterdir(), folder):
        sync(path)
    folder.replace(output)
    sync(output.parent)


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
        reference: Folder or id of the reference model or adapter; None if the policy is a reward
            model.
        output: Folder of the bundle; must be new or empty.
        beta: The reward is beta times the log-ratio in nats. None: the beta of the policy's
            training (its ``training.json``). A reward model has none.
        rules: Tokenization rules. None: those of the policy's training (its ``training.json``),
            or the defaults, limited to the models' maximum positions.
        text_as: How to read a prompt given as a string: ``chat``, a user's message formatted with
            the chat template; or ``text``, plain text. None: as in the policy's training.
    """

    policy: str | Path
    reference: str | Path | None
    output: str | Path
    beta: Annotated[float, Range(0, without_low=True)] | None = None
    rules: TokenizationRules | None = None
    text_as: TextAs | None = None

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ExportPlan:
    """An export whose settings are valid.

    Attributes:
        policy: The folder of the policy or reward model.
        reference: The reference's folder; None for a reward model.
        beta: Reward per nat; 1 for a reward model.
        output: The bundle's folder.
        tokenizer: The tokenizer with the bundle's rules.
        config: The policy's config.
    """

    policy: Path
    reference: Path | None
    beta: float
    output: Path
    tokenizer: PreferenceTokenizer
    config: PreTrainedConfig

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
        disk = 4.0 * self._parameters()
        copies = _COPIES_APART if disk > SINGLE_FILE_BYTES else _COPIES
        layers = int(self.config.num_hidden_layers)
        is_twice = self.reference is not None and (self.policy / ADAPTER_CONFIG).exists()
        traced = layers * (2 if is_twice else 1)
        return Forecast(
            memory_bytes=_PROCESS_BYTES + copies * disk,
            disk_bytes=disk,
            disk_path=self.output,
            seconds=_SECONDS + _SECONDS_PER_LAYER * traced + disk / _BYTES_PER_SECOND,
            notes=f"float32, {layers} layers",
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
            MissingExtraError: The export is not possible; the message gives the reason.
    """
    return make_plan(config).forecast


def make_plan(config: ExportConfig) -> ExportPlan:
    """Check the settings without loading weights.

    Raises:
        ConfigError, ExportError, ModelFolderError, UnsupportedModelError, OutputError,
            MissingExtraError: The export is not possible; the message gives the reason.
    """
    check_kind(config, ExportConfig)
    refuse_multiple_processes("export")
    for library in LIBRARIES:
        require(library, "export")
    policy, output = local_folder(config.policy), Path(config.output)
    reference = None if config.reference is None else local_folder(config.reference)
    folders = [policy] if reference is None else [policy, reference]
    beta = _check_models(config, folders)
    note_unfinished(policy)
    _check_output(output)
    architecture = _architectures(folders)
    folder = _tokenizer_folder(folders)
    rules = _rules(config, policy, architecture)
    if config.rules is None:
        rules = _with_default_text_as(rules, _tokenizer(folder, rules))
    tokenizer = _tokenizer(folder, rules)
    check_exportable(architecture, tokenizer.rules.max_length)
    if tokenizer.vocabulary_size > architecture.vocab_size:
        raise ExportError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size} ids, but the policy has "
            f"{architecture.vocab_size}"
        )
    plan = ExportPlan(policy, reference, beta, output, tokenizer, architecture)
    check_writable(existing_parent(output.parent), plan.forecast.disk_bytes)
    return plan


def _check_models(config: ExportConfig, folders: Sequence[Path]) -> float:
    """Check the models of an export, the policy first; return β, which is 1 for a reward model."""
    policy, is_scored = folders[0], is_reward_model(folders[0])
    for folder in folders:
        check_model_folder(folder, rewards=is_scored)
    if is_scored:
        for name in ("reference", "beta"):
            if getattr(config, name) is not None:
                raise ExportError(
                    f"{policy} is a reward model, whose score is the reward: remove --{name}"
                )
        return 1.0
    if config.reference is None:
        raise ExportError(
            "--reference is missing: the reward of a policy is β times its log-ratio to the "
            "reference. Only a reward model (--loss bradley-terry) needs none"
        )
    beta = reward_beta(policy, config.beta)
    if not (math.isfinite(beta) and beta > 0):
        raise ExportError(f"beta is {beta}; it must be above 0, the beta of the training")
    return beta


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"{output}: not empty; an export never overwrites files")
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output}: is a file, not a folder")


def _architectures(folders: Sequence[Path]) -> PreTrainedConfig:
    """Return the policy's config; the reference, if any, must have the same vocabulary."""
    first, *others = (architecture(base_folder(folder)) for folder in folders)
    for config in (first, *others):
        check_exportable(config, 0)
    for second in others:
        if first.vocab_size != second.vocab_size:
            raise ExportError(
                f"policy and reference have different vocabularies ({first.vocab_size} and "
                f"{second.vocab_size} ids), so their log-probs cannot be compared"
            )
    return first


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


VERSIONED = ("logratio", "torch", "transformers", "onnx", "onnxscript", "tokenizers")
_STEPS = 4
_KINDS = {
    ADAPTER: "one base with its adapter",
    TWO_MODELS: "two models",
    REWARD_MODEL: "a reward model",
}
_ERRORS_ONLY = 3


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle.

    Attributes:
        output: The bundle's folder.
        manifest: The bundle's manifest.
        seconds: Duration of the export.
    """

    output: Path
    manifest: Manifest
    seconds: float

    def __repr__(self) -> str:
        graph = self.manifest.graph
        return f"ExportResult({str(self.output)!r}, {graph.kind}, opset {graph.opset})"

    def to_text(self) -> str:
        """Return a one-line summary."""
        graph, files = self.manifest.graph, self.manifest.files
        kind = _KINDS[graph.kind]
        worst = max(self.manifest.parity.values())
        unit = "" if self.manifest.is_reward_model else "nats "
        digest = bundle.digest_of(bundle.manifest_bytes(self.output))
        return (
            f"{self.output}: {kind}, {size(sum(entry.size for entry in files.values()))}, opset "
            f"{graph.opset}; differs from torch by at most {worst:.1e} {unit}per sequence; "
            f"{self.seconds:.0f} s; digest {digest}"
        )


def export_bundle(config: ExportConfig, *, show_progress: bool = True) -> ExportResult:
    """Export policy and reference, or a reward model, as a bundle that `Reranker.load` opens.

    The bundle is written to a temporary folder, verified against torch's log-probs on golden
    groups, and renamed to `config.output`, so no partial bundle is ever visible.

    Args:
        config: The settings of the export.
        show_progress: Show a progress bar on a terminal.

    Returns:
        The bundle's folder, manifest and export time.

    Raises:
        ExportError: The graph cannot be created, or its log-probs differ from torch's.
        ModelFolderError, UnsupportedModelError, OutputError, MissingExtraError: As in
            `plan_export`, before the models are loaded.

    Example:
        >>> result = export_bundle(ExportConfig("policy", "reference", "bundle"))
        >>> print(result.to_text())
    """
    start = time.monotonic()
    plan = make_plan(config)
    with (
        partial_folder(plan.output) as folder,
        progress("exporting", _STEPS, "steps", show=show_progress) as advance,
    ):
        manifest = _Export(plan, folder).run(lambda done: advance(1, done))
        publish(folder, manifest, plan.output)
        advance(1, "published")
    return ExportResult(plan.output, manifest, time.monotonic() - start)


class _Export:
    """One export: its verification groups and its steps."""

    def __init__(self, plan: ExportPlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        length = plan.rules.max_length
        self._golden_inputs = golden_inputs(plan.tokenizer, plan.vocabulary_size, length)
        self._checked = self._golden_inputs + probing_inputs(
            plan.config, plan.vocabulary_size, length
        )
        self._policy = model_fingerprint(plan.policy).to_dict()
        reference = plan.reference
        self._reference = {} if reference is None else model_fingerprint(reference).to_dict()

    def run(self, report: Callable[[str], None]) -> Manifest:
        """Write graph and tokenizer into the folder, and return the manifest."""
        checked, beta = self._checked, self._plan.beta
        loaded = _load(self._plan, checked)
        report("models loaded, golden values computed")
        files = self._write_tokenizer()
        session, opset, graph_files = self._write_graph(loaded.scorer(beta), files)
        files |= {name: bundle.describe_file(self._folder / name) for name in graph_files}
        report("graph written")
        try:
            parity = loaded.check(session, beta, checked)
        except ParityError as error:
            raise ExportError(f"the graph is not exact enough: {error}") from error
        report("graph verified against torch")
        return Manifest(
            beta=self._plan.beta,
            policy=self._policy,
            reference=self._reference,
            tokenization=self._plan.rules.to_dict(),
            special_ids=_special_ids(self._plan),
            graph=GraphInfo(
                opset,
                loaded.kind,
                CHUNK,
                self._plan.vocabulary_size,
                max_positions(self._plan.config),
            ),
            files=files,
            golden=loaded.golden(self._golden_inputs),
            parity=parity,
            versions=_versions(),
            method=_method(self._plan.policy),
        )

    def _write_tokenizer(self) -> dict[str, bundle.FileEntry]:
        names = write_tokenizer(self._plan.tokenizer.files, self._folder)
        return {name: bundle.describe_file(self._folder / name) for name in names}

    def _write_graph(
        self, scorer: RewardScorer | ScoreScorer, tokenizer: Mapping[str, bundle.FileEntry]
    ) -> tuple[Any, int, list[str]]:
        """Write the graph in the newest opset that both torch and ONNX Runtime support.

        Args:
            scorer: The models.
            tokenizer: The files of the tokenizer.

        Returns:
            A session on the graph, its opset, and the names of the files.
        """
        properties = bundle.graph_properties(self._plan.beta, self._policy, self._reference)
        properties[bundle.TOKENIZATION] = bundle.tokenization_digest(
            self._plan.rules.to_dict(), _special_ids(self._plan), tokenizer, self._golden_inputs
        )
        reasons = []
        for opset in OPSETS:
            try:
                model = trace(scorer, opset)
                files = write(model, self._folder, properties)
                return _open(self._folder / GRAPH), int(model.opset_imports[""]), files
            except GraphError as error:
                reasons.append(str(error))
                for name in (GRAPH, bundle.WEIGHTS):
                    (self._folder / name).unlink(missing_ok=True)
        raise ExportError(f"this model cannot be exported to ONNX ({'; '.join(reasons)})")


def _load(plan: ExportPlan, groups: Sequence[GoldenInput]) -> LoadedPair | LoadedRewardModel:
    if plan.reference is None:
        return load_reward_model(plan.policy, groups)
    return load_pair(plan.policy, plan.reference, groups)


def _open(graph: Path) -> Any:
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        return runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises many unrelated types
        reason = str(error).strip().split("\n")[0][:200]
        raise GraphError(f"ONNX Runtime cannot open it: {reason}") from error


def _special_ids(plan: ExportPlan) -> dict[str, int | None]:
    tokenizer = plan.tokenizer
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}


def _method(policy: Path) -> str | None:
    """Return the loss that trained the policy; None if it is not recorded."""
    loss = (settings_of(policy) or {}).get("loss")
    return loss if isinstance(loss, str) else None


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that the export used."""
    names = (*VERSIONED, _runtime_distribution())
    return {name: metadata.version(name) for name in names}


def _runtime_distribution() -> str:
    """Return the name of the installed ONNX Runtime package."""
    installed = {distribution.name for distribution in metadata.distributions()}
    return "onnxruntime-gpu" if "onnxruntime-gpu" in installed else "onnxruntime"
