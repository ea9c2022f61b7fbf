"""Smaller precisions: measured against float32, refused beyond bounds, independent of the batch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import peft
import pytest
import torch
from tiny_bundle import (
    BETA,
    accept_files,
    copy_bundle,
    plain_sums,
    rewrite_manifest,
    tiny_bundle,
    tiny_graph,
)
from tiny_models import save_tiny_model, word_tokenizer

from logratio.bundle import GRAPH, Agreement, BundleError, Precision, read_manifest
from logratio.errors import ConfigError, LogratioError
from logratio.export import ExportConfig, ExportError, export, export_bundle
from logratio.export.agreement import agreement, faults
from logratio.export.plan import make_plan
from logratio.export.weights import QuantizationError, quantize, to_half
from logratio.serving import Reranker
from logratio.training import load_model
from logratio.training.models import quietly

PRECISIONS: list[dict[str, Any]] = [
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"bits": 8},
    {"bits": 4},
]
NAMES = ["float16", "bfloat16", "8 bits", "4 bits"]
PROMPT = "the cat sits"
TEXTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
REWARD_ERROR = {"float16": 1e-2, "bfloat16": 0.05, "8 bits": 0.1, "4 bits": 1.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy and reference, and a bundle in each precision."""
    source, folder = tiny_bundle(tmp_path_factory), tmp_path_factory.mktemp("precisions")
    for name, settings in zip(NAMES, PRECISIONS, strict=True):
        config = ExportConfig(
            source / "policy", source / "reference", folder / name, BETA, **settings, force=True
        )
        with pytest.MonkeyPatch.context() as patch:
            if name != "float16":  # the others change the weights of the float32 graph
                patch.setattr(export, "trace", lambda *_, **__: tiny_graph(tmp_path_factory))
            export_bundle(config, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_near_torchs_in_float64(folder: Path, exact: Path, name: str) -> None:
    reranker = Reranker.load(folder / name)
    group = reranker.encode(PROMPT, TEXTS)
    ids = [list(one.ids) for one in group.candidates]
    policy, reference = (
        plain_sums(load_model(exact / model).double(), list(group.prompt_ids), ids)
        for model in ("policy", "reference")
    )
    found = [one.reward for one in reranker.score(PROMPT, TEXTS)]
    gaps = np.abs(found - BETA * (policy - reference))
    assert 0 < gaps.max() < REWARD_ERROR[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_does_not_depend_on_the_other_candidates(folder: Path, name: str) -> None:
    reranker = Reranker.load(folder / name)
    texts = [*TEXTS, "happy", "sad sad"]
    together = [one.reward for one in reranker.score(PROMPT, texts)]
    assert [reranker.score(PROMPT, [text])[0].reward for text in texts] == together
    among = reranker.score_many([(PROMPT, texts), ("the bird sings loud", texts)])[0]
    assert [one.reward for one in among] == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_has_the_measured_error(folder: Path, exact: Path, name: str) -> None:
    manifest = read_manifest(folder / name)
    measured = manifest.precision.agreement
    assert measured is not None and manifest.precision.name == name
    assert (measured.source, measured.groups) == ("sampled", 24)
    assert 100 < measured.candidates <= 24 * 8
    assert 0 < measured.reward_error_mean < measured.reward_error_max < REWARD_ERROR[name]
    assert 0.5 < measured.pairwise <= 1
    assert 0.7 < manifest.precision.stored_share <= 1
    assert manifest.files[GRAPH].size < read_manifest(exact / "bundle").files[GRAPH].size
    assert name in repr(Reranker.load(folder / name))
    known = manifest.golden[0]
    assert known.graph_outputs is not None
    assert known.graph_outputs["policy_logps"] != known.policy_logps  # torch's, in float32


def test_quantized_bundles_have_no_float_products(folder: Path) -> None:
    model = onnx_ir.load(folder / "4 bits" / GRAPH)
    products = [node for node in model.graph.all_nodes() if node.op_type in ("MatMul", "Gemm")]
    constant = [node for node in products if node.inputs[1] and node.inputs[1].is_initializer()]
    assert constant == []
    assert any(node.op_type == "MatMulNBits" for node in model.graph.all_nodes())


def test_a_changed_quantized_graph_is_refused(folder: Path, tmp_path: Path) -> None:

    bundle = Path(shutil.copytree(folder / "8 bits", tmp_path / "bundle"))
    model = onnx_ir.load(bundle / GRAPH)
    name = next(name for name in model.graph.initializers if name.endswith(".packed"))
    value = model.graph.initializers[name]
    packed = value.const_value.numpy().copy()  # type: ignore[union-attr]
    packed[:2] ^= 0x40
    value.const_value = onnx_ir.tensor(packed, name=name)
    onnx_ir.save(model, bundle / GRAPH)
    accept_files(bundle)
    with pytest.raises(BundleError, match="this graph gave"):
        Reranker.load(bundle)


def test_an_adapter_stays_in_float32(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", layers=1)  # base and adapter are traced apart
    with quietly():
        settings = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        torch.manual_seed(0)
        model = peft.get_peft_model(load_model(base), settings)
        model.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    config = ExportConfig(tmp_path / "adapter", base, tmp_path / "b", BETA, bits=4, force=True)
    export_bundle(config, show_progress=False)
    assert read_manifest(tmp_path / "b").graph.kind == "adapter"
    weights = onnx_ir.load(tmp_path / "b" / GRAPH).graph.initializers
    adapters = [value.dtype for key, value in weights.items() if "lora_" in key]
    assert set(adapters) == {onnx_ir.DataType.FLOAT}
    Reranker.load(tmp_path / "b")
    to_half(model)
    kinds = {("lora_" in name, one.dtype) for name, one in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float16)}


def test_bounds_are_enforced_unless_forced(
    exact: Path,
    tmp_path: Path,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = tiny_graph(tmp_path_factory)
    graph.graph.initializers["beta"].const_value = onnx_ir.tensor(np.float32(50.0), name="beta")
    monkeypatch.setattr(export, "trace", lambda *_, **__: graph)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": PROMPT, "candidates": TEXTS}) + "\n")
    config = ExportConfig(
        exact / "policy", exact / "reference", tmp_path / "b", 50.0, dtype="bfloat16", data=data
    )
    with pytest.raises(ExportError, match=r"4 candidates \(rows.jsonl\), a reward differs.*force"):
        export_bundle(config, show_progress=False)
    assert not (tmp_path / "b").exists()
    assert not read_manifest(folder / "float16").precision.forced


def test_agreement_counts_pairs_and_best() -> None:
    found = agreement("x", [[3.0, 2.0, 1.0], [0.0, 5.0]], [[3.5, 1.0, 2.0], [0.0, 4.0]])
    assert (found.source, found.groups, found.candidates) == ("x", 2, 5)
    assert found.reward_error_mean == pytest.approx(0.7)
    assert found.reward_error_max == 1.0
    assert (found.pairwise, found.top1) == (0.75, 1.0)
    assert faults(Precision(bits=4), found) == ["75.0% of the pairs keep their order"]
    assert faults(Precision("float16"), found) == ["a reward differs by 1"]
    alone = agreement("x", [[3.0, 2.0], [1.0]], [[2.0, 3.0], [1.0]])
    assert (alone.groups, alone.top1) == (2, 0.0)  # a single candidate does not count
    lost = Agreement("x", 2, 5, 0.0, float("nan"), 1.0, 0.5)
    assert faults(Precision(bits=8), lost) == ["50.0% of the prompts keep their best candidate"]
    assert faults(Precision("float16"), lost)


def test_contradictions_are_refused_before_weights_are_loaded(exact: Path, tmp_path: Path) -> None:
    def plan(**settings: Any) -> None:
        make_plan(ExportConfig(exact / "policy", output=tmp_path / "b", beta=BETA, **settings))

    reference, rows = exact / "reference", tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="remove dtype"):
        plan(reference=reference, dtype="float16", bits=8)
    with pytest.raises(LogratioError, match="bits must be one of 8, 4 or None"):
        plan(reference=reference, bits=2)
    with pytest.raises(LogratioError, match="dtype"):
        plan(reference=reference, dtype="int8")
    with pytest.raises(ConfigError, match="force is for a smaller precision"):
        plan(reference=reference, force=True)
    with pytest.raises(ConfigError, match="data is missing"):
        plan(reference="cached", bits=8)
    rows.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: no 'candidates'"):
        plan(reference=reference, bits=8, data=rows)
    refused: list[Any] = ["sad", []]
    for wrong in refused:
        rows.write_text(json.dumps({"prompt": PROMPT, "candidates": wrong}) + "\n")
        with pytest.raises(ConfigError, match=r"rows\.jsonl:1: .*candidates is not a list"):
            plan(reference=reference, bits=8, data=rows)
    rows.write_text(json.dumps({"prompt": PROMPT, "candidates": ["sad"]}) + "\n")
    with pytest.raises(ConfigError, match="no row has two candidates"):
        plan(reference=reference, bits=8, data=rows)


def test_a_matrix_that_cannot_be_quantized_is_an_error(exact: Path) -> None:
    model = onnx_ir.load(exact / "bundle" / GRAPH)
    value = next(
        v for k, v in model.graph.initializers.items() if k.endswith("embed_tokens.weight")
    )
    model.graph.append(onnx_ir.node("Neg", [value]))
    with pytest.raises(QuantizationError, match="is read by Gather, Neg"):
        quantize(model, 8)


def test_an_older_bundle_is_read_without_values_per_token(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    bundle = copy_bundle(tmp_path_factory, tmp_path / "bundle")
    older = json.loads((bundle / "bundle.json").read_text())
    del older["precision"]
    for group in older["golden"]:
        del group["graph_outputs"]
    for name in ("length_normalized", "per_token"):
        del older["graph"][name]
    older["format_version"] = 3
    (bundle / "bundle.json").write_text(json.dumps(older))
    assert read_manifest(bundle).precision.is_exact
    rewrite_manifest(bundle, format_version=5)
    with pytest.raises(BundleError, match="reads up to 4"):
        read_manifest(bundle)
