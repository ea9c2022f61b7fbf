"""Tiny bundles for many test files: exported once a session, copied where a test changes one."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from shared_traces import shared_traces
from tiny_models import save_tiny_model
from torch import nn

from logratio.bundle import (
    GRAPH,
    MANIFEST,
    TOKENIZATION,
    BundleError,
    describe_file,
    golden_digest,
    read_manifest,
)
from logratio.export import ExportConfig, export_bundle
from logratio.serving import Reranker

BETA = 0.25
_folder: list[Path] = []


def tiny_bundle(factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle`, and the Llamas `policy` and `reference` that it was made from."""
    if not _folder:
        folder = factory.mktemp("tiny")
        policy, reference = (
            save_tiny_model(folder / "policy", 0),
            save_tiny_model(folder / "reference", 1),
        )
        with shared_traces():
            config = ExportConfig(policy, reference, folder / "bundle", BETA)
            export_bundle(config, show_progress=False)
        _folder.append(folder)
    return _folder[0]


def other_bundle(factory: pytest.TempPathFactory) -> Path:
    """A bundle with other scores than the tiny one: its policy and reference are exchanged."""
    folder = tiny_bundle(factory)
    if not (folder / "other").exists():
        config = ExportConfig(folder / "reference", folder / "policy", folder / "other", BETA)
        with shared_traces():
            export_bundle(config, show_progress=False)
    return folder / "other"


def tiny_graph(factory: pytest.TempPathFactory) -> onnx_ir.Model:
    """A fresh copy of the tiny bundle's graph, in memory."""
    model = onnx_ir.load(tiny_bundle(factory) / "bundle" / GRAPH)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def copy_bundle(factory: pytest.TempPathFactory, to: Path) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle(factory) / "bundle", to))


def rewrite_manifest(folder: Path, **values: object) -> None:
    """Replace values of a bundle's manifest, and the hashes that depend on them, as an attacker."""
    path = folder / MANIFEST
    changed = json.loads(path.read_text()) | values
    if isinstance(changed["golden"], list):
        changed["golden_digest"] = asdict(golden_digest(changed["golden"]))
    path.write_text(json.dumps(changed))
    with contextlib.suppress(BundleError):  # the values may be meant to be wrong
        _store_digest(folder)


def _store_digest(folder: Path) -> None:
    """Store the hash of the tokenization in the graph, and the graph's hash in the manifest."""
    manifest = read_manifest(folder)
    digest = manifest.tokenization_digest
    graph, known = folder / GRAPH, manifest.files.get(GRAPH)
    if digest is None or not graph.is_file() or describe_file(graph) != known:
        return
    content = graph.read_bytes()
    start = content.rfind(TOKENIZATION.encode()) + len(TOKENIZATION) + 2  # tag and length
    if start < len(TOKENIZATION) + 2:
        return
    graph.write_bytes(content[:start] + digest.encode() + content[start + len(digest) :])
    values = json.loads((folder / MANIFEST).read_text())
    values["files"][GRAPH] = asdict(describe_file(graph))
    (folder / MANIFEST).write_text(json.dumps(values))


def with_template(folder: Path, template: str, **rules: object) -> Path:
    """Give a bundle a chat template and other rules, with golden groups as an export writes."""
    (folder / "chat_template.jinja").write_text(template)
    accept_files(folder)
    return with_rules(folder, chat=[{"role": "user", "content": "the cat"}], **rules)


def with_rules(folder: Path, chat: list[dict[str, str]] | None = None, **rules: object) -> Path:
    """Give a bundle other tokenization rules, and golden groups that fit them."""
    manifest = json.loads((folder / MANIFEST).read_text())
    rewrite_manifest(folder, tokenization=manifest["tokenization"] | rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reranker, "replay", lambda *_: None)
        reranker = Reranker.load(folder, truncate_completions=True)
    text = _golden(reranker, {"prompt": "the cat", "completions": ["sits on", "runs"]})
    limit = len(text["prompt_ids"]) + 1
    known = [text, _golden(reranker, text | {"max_length": limit})]
    known += [_golden(reranker, {"messages": chat, "completions": ["sits on"]})] if chat else []
    golden = [group for group in manifest["golden"] if not group["completions"]]
    rewrite_manifest(folder, golden=[*golden, *known])
    return folder


def _golden(reranker: Reranker, text: dict[str, Any]) -> dict[str, Any]:
    """A golden group of a text, with the scores that the bundle gives it."""
    encoder = reranker.encoder
    if "max_length" in text:
        encoder = encoder.shortened(text["max_length"])
    prompt: Any = text.get("prompt", text.get("messages"))
    group = encoder.encode(prompt, text["completions"])
    (scores,) = reranker.score_groups([group])
    return text | {
        "prompt_ids": list(group.prompt_ids),
        "candidates": [list(candidate.ids) for candidate in group.candidates],
        "policy_logps": [score.policy_logps for score in scores],
        "reference_logps": [score.reference_logps for score in scores],
    }


def accept_files(folder: Path) -> None:
    """Update the manifest to the current files, after changing a bundle deliberately."""
    files = {
        path.name: {"size": entry.size, "sha256": entry.sha256}
        for path in folder.iterdir()
        if path.name != MANIFEST and (entry := describe_file(path))
    }
    rewrite_manifest(folder, files=files)


@torch.no_grad()
def plain_sums(
    model: nn.Module, prompt: Sequence[int], candidates: Sequence[Sequence[int]]
) -> np.ndarray:
    """Sum each candidate's log-probs, one sequence at a time, in float64: `[N]`."""
    sums = []
    for candidate in candidates:
        ids = torch.tensor([[*prompt, *candidate]])
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(candidate) - 1)
        sums.append(float(logps[rows, torch.tensor(candidate)].sum()))
    return np.array(sums)
