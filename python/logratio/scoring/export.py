"""From two model folders to a bundle, or to a refusal that leaves nothing behind."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from logratio import bundle
from logratio.bundle import CHUNK, GRAPH, GoldenGroup, GraphInfo, Manifest
from logratio.data.tokenizer_files import write_tokenizer
from logratio.extras import require
from logratio.forecast import size
from logratio.logps.completion import transformer
from logratio.progress import progress
from logratio.scoring.families import max_positions, use_exportable_attention
from logratio.scoring.folder import beside, publish
from logratio.scoring.golden import (
    GoldenInput,
    golden_inputs,
    plain_logps,
    probing_inputs,
    training_logps,
)
from logratio.scoring.graph import OPSETS, GraphError, trace, write
from logratio.scoring.pair import ModelPair, join
from logratio.scoring.parity import Expected, ParityError, check_parity
from logratio.scoring.plan import ExportConfig as ExportConfig
from logratio.scoring.plan import ExportError as ExportError
from logratio.scoring.plan import ExportPlan, make_plan
from logratio.scoring.plan import plan_export as plan_export
from logratio.scoring.scorer import RewardScorer
from logratio.training.fingerprint import model_fingerprint
from logratio.training.models import load_model

VERSIONED = ("logratio", "torch", "transformers", "onnx", "onnxscript", "tokenizers")
_STEPS = 4
_ERRORS_ONLY = 3


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle.

    Attributes:
        output: Its folder.
        manifest: What it says of itself.
        seconds: The export took.
    """

    output: Path
    manifest: Manifest
    seconds: float

    def to_text(self) -> str:
        """Tell it to a person."""
        graph, files = self.manifest.graph, self.manifest.files
        kind = "one base with its adapter" if graph.kind == "adapter" else "two models"
        worst = max(self.manifest.parity.values())
        return (
            f"{self.output}: {kind}, {size(sum(entry.size for entry in files.values()))}, opset "
            f"{graph.opset}; differs from torch by at most {worst:.1e} nats per sequence; "
            f"{self.seconds:.0f} s; digest {bundle.digest_of(self.output)}"
        )


def export_bundle(config: ExportConfig, *, show_progress: bool = True) -> ExportResult:
    """Write policy and reference as a bundle that `serving` loads.

    The bundle appears in `config.output` complete or not at all: it is written beside it, must
    give torch's log-probs on golden groups, and is then renamed.

    Raises:
        ExportError: The graph cannot be made, or does not give torch's log-probs.
        ModelFolderError, UnsupportedModelError, OutputError, MissingExtraError: Before anything
            long; see `plan_export`.
    """
    start = time.monotonic()
    plan = make_plan(config)
    with (
        beside(plan.output) as folder,
        progress("exporting", _STEPS, "steps", show=show_progress) as advance,
    ):
        manifest = _Export(plan, folder).run(lambda done: advance(1, done))
        publish(folder, manifest, plan.output)
        advance(1, "published")
    return ExportResult(plan.output, manifest, time.monotonic() - start)


class _Export:
    """One export: the groups it is checked on, and the steps to a manifest."""

    def __init__(self, plan: ExportPlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        length = plan.rules.max_length
        self._carried = golden_inputs(plan.tokenizer, plan.vocabulary_size, length)
        self._checked = self._carried + probing_inputs(plan.config, plan.vocabulary_size, length)
        self._policy = model_fingerprint(plan.policy).to_dict()
        self._reference = model_fingerprint(plan.reference).to_dict()

    def run(self, report: Callable[[str], None]) -> Manifest:
        """Write graph and tokenizer into the folder and return the manifest of both."""
        pair, expected, training = _load(self._plan, self._checked)
        report("models loaded, golden log-probs computed")
        scorer = RewardScorer(pair.policy, pair.reference, self._plan.beta)
        session, opset, files = self._write_graph(scorer)
        report("graph written")
        try:
            parity = check_parity(session, self._plan.beta, self._checked, expected, training)
        except ParityError as error:
            raise ExportError(f"the graph is not exact enough to be served: {error}") from error
        report("graph equals torch")
        files += write_tokenizer(self._plan.tokenizer.files, self._folder)
        return Manifest(
            beta=self._plan.beta,
            policy=self._policy,
            reference=self._reference,
            tokenization=self._plan.rules.to_dict(),
            special_ids=_special_ids(self._plan),
            graph=GraphInfo(
                opset,
                pair.kind,
                CHUNK,
                self._plan.vocabulary_size,
                max_positions(self._plan.config),
            ),
            files={name: bundle.describe_file(self._folder / name) for name in files},
            golden=_golden(self._carried, expected),
            parity=parity,
            versions=_versions(),
        )

    def _write_graph(self, scorer: RewardScorer) -> tuple[Any, int, list[str]]:
        """Write the graph in the newest opset that torch writes and ONNX Runtime opens.

        Returns:
            A session on it, the opset, the files.
        """
        properties = bundle.graph_properties(self._plan.beta, self._policy, self._reference)
        reasons = []
        for opset in OPSETS:
            try:
                model = trace(scorer, opset)
                files = write(model, self._folder, properties)
                return _open(self._folder / GRAPH), int(model.opset_imports[""]), files
            except GraphError as error:
                reasons.append(str(error))
                for name in bundle.FILE_NAMES:
                    (self._folder / name).unlink(missing_ok=True)
        raise ExportError(f"no ONNX graph can be made of this model ({'; '.join(reasons)})")


def _load(plan: ExportPlan, groups: Sequence[GoldenInput]) -> tuple[ModelPair, Expected, Expected]:
    """Load both models and score the groups with each as it was loaded, before they are joined.

    Returns:
        The models, the log-probs by their own forward, the log-probs as training computes them.
    """
    policy, reference = (
        load_model(folder).requires_grad_(False) for folder in (plan.policy, plan.reference)
    )
    for model in (policy, reference):
        use_exportable_attention(transformer(model))
    expected = Expected(plain_logps(policy, groups), plain_logps(reference, groups))
    training = Expected(training_logps(policy, groups), training_logps(reference, groups))
    return join(policy, reference), expected, training


def _open(graph: Path) -> Any:
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        return runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises a dozen unrelated kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise GraphError(f"ONNX Runtime cannot open it: {reason}") from error


def _golden(groups: Sequence[GoldenInput], expected: Expected) -> list[GoldenGroup]:
    """Join groups with their log-probs; `expected` goes on with groups that are not carried."""
    return [
        GoldenGroup(**asdict(group), policy_logps=policy, reference_logps=reference)
        for group, policy, reference in zip(
            groups, expected.policy, expected.reference, strict=False
        )
    ]


def _special_ids(plan: ExportPlan) -> dict[str, int | None]:
    tokenizer = plan.tokenizer
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that had a hand in it."""
    names = (*VERSIONED, _runtime_distribution())
    return {name: metadata.version(name) for name in names}


def _runtime_distribution() -> str:
    """Name the build of ONNX Runtime that is installed."""
    installed = {distribution.name for distribution in metadata.distributions()}
    return "onnxruntime-gpu" if "onnxruntime-gpu" in installed else "onnxruntime"
