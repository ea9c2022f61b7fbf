"""Tiny bundles for many test files: exported once a session, copied where a test changes one."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from tiny_models import save_tiny_model
from torch import nn

from logratio.bundle import GRAPH, MANIFEST, describe_file
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
        export_bundle(ExportConfig(policy, reference, folder / "bundle", BETA), show_progress=False)
        _folder.append(folder)
    return _folder[0]


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
    """Replace values of a bundle's manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_template(folder: Path, template: str, **rules: object) -> Path:
    """Give a bundle a chat template, with a golden chat as an export writes one."""
    (folder / "chat_template.jinja").write_text(template)
    manifest = json.loads((folder / MANIFEST).read_text())
    rewrite_manifest(
        folder,
        tokenization=manifest["tokenization"] | rules,
        golden=[group for group in manifest["golden"] if group["prompt"] is None],
    )
    accept_files(folder)
    messages, completions = [{"role": "user", "content": "the cat"}], ["sits on", "runs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reranker, "_check_chat", lambda self: None)
        reranker = Reranker.load(folder)
    group = reranker.encode(messages, completions)
    scores = reranker.score(messages, completions)
    chat = {
        "prompt_ids": list(group.prompt_ids),
        "candidates": [list(candidate.ids) for candidate in group.candidates],
        "policy_logps": [score.policy_logps for score in scores],
        "reference_logps": [score.reference_logps for score in scores],
        "completions": completions,
        "messages": messages,
    }
    golden = json.loads((folder / MANIFEST).read_text())["golden"]
    rewrite_manifest(folder, golden=[*golden, chat])
    return folder


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
