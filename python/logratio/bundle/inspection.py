"""What a bundle contains, from its files alone: for `logratio bundle inspect`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logratio.bundle.files import SIGNATURE
from logratio.bundle.graph_file import GraphFile
from logratio.bundle.manifest import Manifest, digest_of


def describe(
    folder: Path, content: bytes, manifest: Manifest, graph: GraphFile | None
) -> dict[str, Any]:
    """Return the properties of a bundle as JSON values.

    Args:
        folder: The bundle.
        content: The content of its ``bundle.json``.
        manifest: The same, parsed.
        graph: Its checked graph; None if that is in the bundle of its base.

    Returns:
        Nested dicts; sizes are in bytes, lengths in tokens.
    """
    rules = manifest.tokenization
    return {
        "digest": digest_of(content),
        "format_version": manifest.format_version,
        "kind": manifest.graph.kind,
        "method": manifest.method,
        "reward": manifest.graph.reward,
        "precision": asdict(manifest.precision),
        "beta": None if manifest.is_reward_model else manifest.beta,
        "policy": _model(manifest.policy),
        "reference": None if manifest.is_reward_model else _model(manifest.reference),
        "tokenizer": {"special_ids": manifest.special_ids, "rules": rules},
        "base": manifest.base,
        "takes_adapters": manifest.graph.takes_adapters,
        "layout": manifest.graph.layout,
        "graph": None if graph is None else _graph(graph),
        "limits": {
            "max_length": rules.get("max_length"),
            "max_positions": manifest.graph.max_positions,
            "vocabulary_size": manifest.graph.vocabulary_size,
        },
        "golden_groups": dict(Counter(group.case for group in manifest.golden)),
        "parity": manifest.parity,
        "files": {name: entry.size for name, entry in sorted(manifest.files.items())},
        "is_signed": (folder / SIGNATURE).exists(),
        "versions": manifest.versions,
    }


def _graph(graph: GraphFile) -> dict[str, Any]:
    return {
        "opset": graph.opset,
        "nodes": graph.nodes,
        "operators": dict(sorted(graph.operators.items())),
        "tensor_bytes": dict(graph.tensor_bytes.most_common()),
    }


def _model(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's type and digest; a fingerprint may have other fields."""
    hard = fingerprint.get("hard")
    config = hard.get("config") if isinstance(hard, dict) else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return {"model_type": kind, "digest": fingerprint.get("digest")}
