"""Export two model folders as a bundle, or fail without leaving any file."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from logratio import bundle
from logratio.bundle import (
    ADAPTER,
    CACHED_REFERENCE,
    CHUNK,
    GRAPH,
    MANIFEST,
    REFERENCE_FREE,
    REFERENCE_INPUT,
    REWARD_MODEL,
    SHARED_BASE,
    GraphInfo,
    Manifest,
    Precision,
    read_manifest,
    verify_files,
)
from logratio.data.tokenization.tokenizer_files import write_tokenizer
from logratio.durable import sync
from logratio.export.agreement import SAMPLED, sampled_groups
from logratio.export.families import max_positions
from logratio.export.graph import OPSETS, GraphError, Scorer, open_graph, trace, write
from logratio.export.kinds import notes_of
from logratio.export.loading import Calibration, Loaded, Models, one_nat_per_token
from logratio.export.parity import Graph, ParityError, golden_inputs, probing_inputs
from logratio.export.plan import ExportConfig, ExportError, ExportPlan, make_plan
from logratio.export.scorer import ONE_BASE, TWO_MODELS
from logratio.export.shared_base import Base, plan_of_base
from logratio.export.verification import check_graph, golden_groups
from logratio.export.weights import store_weights, to_half
from logratio.forecast import size
from logratio.progress import progress, say
from logratio.training.fingerprint import model_fingerprint
from logratio.training.run_folder import settings_of


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
    if GRAPH in manifest.files:
        bundle.check_graph_file(folder, manifest.files, manifest.graph.opset)
    for path in (*folder.iterdir(), folder):
        sync(path)
    folder.replace(output)
    sync(output.parent)


VERSIONED = ("logratio", "torch", "transformers", "onnx", "onnxscript", "tokenizers")
_STEPS = 4
_KINDS = {
    ONE_BASE: "one base with its adapter",
    TWO_MODELS: "two models",
    REWARD_MODEL: "a reward model",
    CACHED_REFERENCE: "the policy; reference log-probs are an input",
    REFERENCE_FREE: "the policy, without a reference",
    SHARED_BASE: "an adapter for the graph of its base",
}


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
        precision = self.manifest.precision
        kind = f"{_KINDS[graph.kind]}, {precision.name}"
        worst = max(self.manifest.parity.values())
        unit = "" if self.manifest.is_reward_model else "nats "
        start = (
            f"{self.output}: {kind}, {size(sum(entry.size for entry in files.values()))}, opset "
            f"{graph.opset}; reward {graph.reward}"
        )
        exactness = (
            f"differs from torch by at most {worst:.1e} {unit}per sequence"
            if precision.agreement is None
            else _agreement_text(precision)
        )
        digest = bundle.digest_of(bundle.manifest_bytes(self.output))
        return f"{start}; {exactness}; {self.seconds:.0f} s; digest {digest}"


def _agreement_text(precision: Precision) -> str:
    measured = precision.agreement
    assert measured is not None
    return (
        f"{precision.stored_share:.0%} of the weights in {precision.name}; of "
        f"{measured.candidates} candidates ({measured.source}) rewards differ from float32 by "
        f"{measured.reward_error_mean:.1e} on average, at most {measured.reward_error_max:.1e}; "
        f"order of pairs kept: {measured.pairwise:.1%}, best of a prompt: {measured.top1:.1%}"
        + ("; beyond the bounds, forced" if precision.forced else "")
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
    plan = make_plan(config)
    if plan.base is not None and not plan.base.exists():
        say(_export(plan_of_base(plan), config, show_progress=show_progress).to_text())
    return _export(plan, config, show_progress=show_progress)


def _export(plan: ExportPlan, config: ExportConfig, *, show_progress: bool) -> ExportResult:
    start = time.monotonic()
    with (
        partial_folder(plan.output) as folder,
        progress("exporting", _STEPS, "steps", show=show_progress) as advance,
    ):
        manifest = _Export(plan, folder, force=config.force).run(lambda done: advance(1, done))
        publish(folder, manifest, plan.output)
        advance(1, "published")
    return ExportResult(plan.output, manifest, time.monotonic() - start)


class _Export:
    """One export: its verification groups and its steps."""

    def __init__(self, plan: ExportPlan, folder: Path, *, force: bool) -> None:
        self._plan, self._folder, self._force = plan, folder, force
        length = plan.rules.max_length
        self._golden_inputs = golden_inputs(plan.tokenizer, plan.vocabulary_size, length)
        self._checked = self._golden_inputs + probing_inputs(
            plan.config, plan.vocabulary_size, length
        )
        self._policy = model_fingerprint(plan.policy).to_dict()
        self._reference = dict(plan.reward.reference)
        if plan.reference is not None:
            self._reference = model_fingerprint(plan.reference).to_dict()
        self._base = None if plan.base is None else Base.read(plan.base, self._reference)
        if plan.takes_adapters:
            return  # a base's own reward is not used
        for note in notes_of(plan.policy, plan.reference, self._reference, self._policy):
            say(f"warning: {note}")

    def run(self, report: Callable[[str], None]) -> Manifest:
        """Write graph and tokenizer into the folder, and return the manifest."""
        plan = self._plan
        try:
            loaded = self._load()
            report("models loaded, golden values computed")
            files = self._write_tokenizer()
            session, opset, names, share = self._write_model(loaded.scorer, files)
            files |= {name: bundle.describe_file(self._folder / name) for name in names}
            report("graph written")
            checked = check_graph(session, plan, loaded, self._checked, force=self._force)
        except ParityError as error:
            raise ExportError(f"the graph is not exact enough: {error}") from error
        report("graph verified against torch")
        return Manifest(
            beta=plan.reward.beta,
            policy=self._policy,
            reference=self._reference,
            tokenization=plan.rules.to_dict(),
            special_ids=_special_ids(plan),
            graph=GraphInfo(
                opset,
                self._kind(loaded),
                CHUNK,
                plan.vocabulary_size,
                max_positions(plan.config),
                plan.reward.length_normalized,
                per_token=loaded.kind != REWARD_MODEL,
                takes_adapters=plan.takes_adapters,
                layout=plan.layout,
            ),
            files=files,
            golden=golden_groups(loaded.kind, self._golden_inputs, loaded.expected, checked.own),
            parity=checked.parity,
            versions=_versions(),
            method=_method(plan.policy),
            precision=replace(
                plan.precision,
                stored_share=share,
                agreement=checked.agreement,
                forced=checked.forced,
            ),
            base=self._base.digest if self._base else None,
        )

    def _kind(self, loaded: Loaded) -> str:
        return SHARED_BASE if self._base else loaded.kind

    def _write_tokenizer(self) -> dict[str, bundle.FileEntry]:
        names = write_tokenizer(self._plan.tokenizer.files, self._folder)
        return {name: bundle.describe_file(self._folder / name) for name in names}

    def _load(self) -> Loaded:
        plan = self._plan
        models = Models(plan.policy, plan.reference, plan.reward)
        calibration = plan.calibration
        if calibration is None and not plan.precision.is_exact:
            groups = sampled_groups(models.policy, plan.tokenizer, plan.rules.max_length)
            if not groups:
                raise ExportError("the policy samples only one candidate: give --data")
            calibration = Calibration(SAMPLED, groups)
        return models.load(self._checked, calibration)

    def _write_model(
        self, scorer: Scorer, tokenizer: Mapping[str, bundle.FileEntry]
    ) -> tuple[Any, int, list[str], float]:
        """Write the graph, or the adapter for that of the base.

        Args:
            scorer: The models.
            tokenizer: The files of the tokenizer.

        Returns:
            A session, the graph's opset, the names of the files, and the share of the weights that
            have less than 32 bits.
        """
        properties = bundle.graph_properties(self._plan.reward.beta, self._policy, self._reference)
        properties[bundle.TOKENIZATION] = bundle.tokenization_digest(
            self._plan.rules.to_dict(), _special_ids(self._plan), tokenizer, self._golden_inputs
        )
        if self._base is None:
            return self._write_graph(scorer, properties)
        session, base = self._base.write_policy(scorer, self._folder, properties), self._base
        return session, base.manifest.graph.opset, [ADAPTER], base.manifest.precision.stored_share

    def _write_graph(
        self, scorer: Scorer, properties: Mapping[str, str]
    ) -> tuple[Any, int, list[str], float]:
        """Write the graph in the newest opset that both torch and ONNX Runtime support."""
        precision, reasons = self._plan.precision, []
        if precision.dtype == "float16":
            to_half(scorer)
        for opset in OPSETS:
            try:
                model = trace(scorer, opset, takes_adapters=self._plan.takes_adapters)
                share = store_weights(model, precision)
                files = write(model, self._folder, properties)
                session = open_graph(self._folder / GRAPH)
                self._check_runs(session)
                return session, int(model.opset_imports[""]), files, share
            except GraphError as error:
                reasons.append(str(error))
                for name in (GRAPH, bundle.WEIGHTS):
                    (self._folder / name).unlink(missing_ok=True)
        raise ExportError(f"this model cannot be exported to ONNX ({'; '.join(reasons)})")

    def _check_runs(self, session: Any) -> None:
        """Run the graph: kernels may refuse what a file may contain.

        Raises:
            GraphError: ONNX Runtime cannot run it.
        """
        takes_reference = REFERENCE_INPUT in {given.name for given in session.get_inputs()}
        graph = Graph(session, one_nat_per_token if takes_reference else None)
        try:
            graph.values(self._golden_inputs)
        except Exception as error:  # the library raises many unrelated types
            raise GraphError(f"ONNX Runtime cannot run it: {str(error).strip()[:200]}") from error


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
