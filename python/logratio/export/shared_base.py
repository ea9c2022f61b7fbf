"""Export a policy as an adapter for the graph of its base, in the base's bundle."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from logratio.adapted_graph import Adapter, write_adapter
from logratio.bundle import (
    ADAPTER,
    GRAPH,
    OUTPUTS,
    REFERENCE_FREE,
    TOKEN_LOGRATIOS,
    BundleError,
    Manifest,
    adapter_tie,
    check_graph_file,
    digest_of,
    manifest_bytes,
    parse_manifest,
    verify_files,
)
from logratio.export.adapter_inputs import adapter_weights
from logratio.export.graph import Scorer, open_graph
from logratio.export.kinds import RewardKind
from logratio.export.plan import ExportError, ExportPlan
from logratio.export.scorer import RewardScorer


class _Output(NamedTuple):
    name: str
    shape: list[str]


@dataclass(frozen=True)
class AdaptedSession:
    """A session on a base's graph, with an adapter: it has the outputs of a graph of both models.

    Attributes:
        session: The ONNX Runtime session.
        adapter: The policy.
    """

    session: Any
    adapter: Adapter

    def get_outputs(self) -> list[_Output]:
        """Return the outputs, as ``InferenceSession.get_outputs``."""
        found = [_Output(name, ["candidates"]) for name in OUTPUTS]
        return [*found, _Output(TOKEN_LOGRATIOS, ["chunks", "chunk"])]

    def run(self, names: list[str], feed: Mapping[str, Any]) -> list[Any]:
        """Run the graph as policy and as reference, as ``InferenceSession.run``."""
        import onnxruntime

        def options(adapter: Any) -> Any:
            made = onnxruntime.RunOptions()
            if adapter is not None:
                made.add_active_adapter(adapter)
            return made

        return self.adapter.run(self.session, names, feed, options)


@dataclass(frozen=True)
class Base:
    """The bundle of a base model.

    Attributes:
        folder: The bundle.
        manifest: Its manifest.
        digest: Its digest.
    """

    folder: Path
    manifest: Manifest
    digest: str

    @classmethod
    def read(cls, folder: Path, reference: Mapping[str, Any]) -> "Base":
        """Read and verify a base's bundle.

        Args:
            folder: The bundle.
            reference: Fingerprint of the model that must be the base, as a dict.

        Raises:
            ExportError: The folder is not a bundle, was altered, or has another model.
        """
        try:
            content = manifest_bytes(folder)
            manifest = parse_manifest(content, folder)
            verify_files(folder, manifest.files)
            check_graph_file(folder, manifest.files, manifest.graph.opset)
        except BundleError as error:
            raise ExportError(f"--base {folder}: {error}") from error
        if manifest.policy["digest"] != reference["digest"]:
            raise ExportError(f"--base {folder} was made from another model than the reference")
        return cls(folder, manifest, digest_of(content))

    def write_policy(
        self, scorer: Scorer, folder: Path, properties: Mapping[str, str]
    ) -> AdaptedSession:
        """Write the adapter of a policy.

        Args:
            scorer: The policy, whose reference is its base.
            folder: The folder of the policy's bundle.
            properties: What the graph of a bundle stores, to tie it to the manifest.

        Raises:
            ExportError: The policy is not a plain LoRA over the base.
        """
        if (
            not isinstance(scorer, RewardScorer)
            or scorer.policy.model is not scorer.reference.model
        ):
            raise ExportError(
                "--base: the policy is not a plain LoRA over the reference. DoRA, adapters of the "
                "head or the embeddings and layers trained whole change more than a shared base "
                "allows; export without --base"
            )
        path, tie = folder / ADAPTER, adapter_tie(self.digest, properties)
        write_adapter(path, adapter_weights(scorer.policy.model), tie)
        session = open_graph(self.folder / GRAPH)
        adapter = Adapter(path, scorer.beta, tie)
        adapter.check_fits(session)
        return AdaptedSession(session, adapter)


def plan_of_base(plan: ExportPlan) -> ExportPlan:
    """Return the plan of a base's bundle: the reference alone, with inputs for adapters."""
    assert plan.reference is not None and plan.base is not None
    return replace(
        plan,
        policy=plan.reference,
        reference=None,
        reward=RewardKind(REFERENCE_FREE, 1.0),
        output=plan.base,
        calibration=None,
        base=None,
        takes_adapters=True,
    )
