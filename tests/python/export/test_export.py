"""Exports: ONNX Runtime gives torch's numbers, or the export leaves no file."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import peft
import pytest
import torch
from tiny_bundle import BETA, plain_sums, tiny_bundle, tiny_graph
from tiny_models import FAMILIES, mamba_config, save_tiny_model, tiny, word_tokenizer
from transformers import PreTrainedConfig

from logratio._rust import candidate_layout
from logratio.bundle import GRAPH, WEIGHTS, read_manifest, verify_files
from logratio.data import TokenizationRules
from logratio.errors import ConfigError
from logratio.export import (
    ExportConfig,
    ExportError,
    ExportResult,
    export,
    export_bundle,
    graph,
    loading,
    plan_export,
)
from logratio.export.graph import GraphError
from logratio.extras import MissingExtraError
from logratio.forecast import OutputError
from logratio.graph_inputs import graph_inputs
from logratio.logps.checks import UnsupportedModelError
from logratio.serving import Reranker
from logratio.training import VocabularyError, load_model
from logratio.training.models import ModelFolderError, quietly

Group = tuple[list[int], list[list[int]]]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle`, `policy` and `reference`."""
    return tiny_bundle(tmp_path_factory)


def save_family(folder: Path, config: PreTrainedConfig, seed: int) -> Path:
    tiny(config, seed, 2.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def one_layer(family: str) -> PreTrainedConfig:
    """A family whose layers are all alike, and traced in half the time; the tiny bundle has two."""
    config = FAMILIES[family]()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


def rewards(bundle: Path, groups: Sequence[Group], chunk: int = 128) -> list[np.ndarray]:
    """Run a bundle's graph without `serving`; return rewards, policy sums, reference sums."""
    session = onnxruntime.InferenceSession(bundle / GRAPH, providers=["CPUExecutionProvider"])
    layout = candidate_layout(
        [np.array(prompt, np.int32) for prompt, _ in groups],
        [[np.array(ids, np.int32) for ids in candidates] for _, candidates in groups],
        chunk,
    )
    return list(session.run(None, graph_inputs(layout)))


def random_groups(seed: int, vocabulary: int) -> list[Group]:
    """Prompts of 1 and 40 tokens (traced: 5), candidates of 1 … 33 (traced: 4)."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(number) for number in random.integers(3, vocabulary, length)]

    return [(ids(40), [ids(33), ids(2)]), (ids(1), [ids(1), ids(20), ids(7)])]


def check_against_torch(bundle: Path, policy: Path, reference: Path, vocabulary: int) -> None:
    groups = random_groups(1, vocabulary)
    found = rewards(bundle, groups)
    expected = [
        np.concatenate([plain_sums(model, *group) for group in groups])
        for model in (load_model(policy), load_model(reference))
    ]
    bound = 1e-4 + 1e-6 * np.abs(expected[0])
    assert (np.abs(found[1] - expected[0]) <= bound).all()
    assert (np.abs(found[2] - expected[1]) <= bound).all()
    np.testing.assert_allclose(found[0], BETA * (expected[0] - expected[1]), atol=1e-4)
    alone = [
        rewards(bundle, [(prompt, [candidate])], chunk=16)[0]
        for prompt, candidates in groups
        for candidate in candidates
    ]
    np.testing.assert_allclose(found[0], np.concatenate(alone), atol=2e-5)


def test_bundle_gives_torchs_rewards(tiny_folder: Path) -> None:
    check_against_torch(
        tiny_folder / "bundle", tiny_folder / "policy", tiny_folder / "reference", vocabulary=20
    )


def test_the_manifest_describes_the_bundle(tiny_folder: Path) -> None:
    folder = tiny_folder / "bundle"
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files)
    assert manifest.beta == BETA
    assert manifest.graph.kind == "two_models"
    assert manifest.graph.opset == 23
    assert manifest.policy["digest"] != manifest.reference["digest"]
    assert manifest.policy["hard"]["config"]["model_type"] == "llama"
    assert manifest.special_ids == {"bos": 1, "eos": 2, "pad": 2}
    # max_length is limited to the models' positions.
    assert TokenizationRules.from_dict(manifest.tokenization).max_length == 512
    assert set(manifest.files) == {GRAPH, "tokenizer.json", "tokenizer_config.json"}
    assert 0 < max(manifest.parity.values()) < 1e-4
    assert [group.case for group in manifest.golden] == [
        *("ids", "ids", "ids", "long", "text", "truncated"),
    ]
    assert manifest.method is None  # this policy has no record of its training


def test_the_repr_of_a_result_is_one_line(tiny_folder: Path) -> None:
    output = tiny_folder / "bundle"
    result = ExportResult(output, read_manifest(output), 1.5)
    assert repr(result) == f"ExportResult({str(output)!r}, two_models, opset 23)"


def test_the_graph_contains_no_paths_of_this_machine(tiny_folder: Path) -> None:
    content = (tiny_folder / "bundle" / GRAPH).read_bytes()
    places = [b"site-packages", str(tiny_folder.parent).encode(), str(Path.cwd()).encode()]
    assert [place for place in places if place in content] == []


def test_the_graph_has_no_transpose_of_a_weight(tiny_folder: Path) -> None:
    model = onnx_ir.load(tiny_folder / "bundle" / GRAPH)
    transposed = [
        node.name
        for node in model.graph.all_nodes()
        if node.op_type == "Transpose" and node.inputs[0] and node.inputs[0].is_initializer()
    ]
    assert transposed == []


def weight_bytes(bundle: Path) -> int:
    """Add up the weights in a bundle's graph."""
    values = onnx_ir.load(bundle / GRAPH).graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def adapter_of(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter with an effect."""
    chosen: dict[str, Any] = {"r": 4, "target_modules": "all-linear", **settings}
    with quietly():
        model = peft.get_peft_model(
            load_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **chosen)
        )
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.slow
def test_an_adapter_shares_its_base_and_export_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_model(tmp_path / "base", layers=1)  # base and adapter are traced apart
    adapter = adapter_of(base, tmp_path / "adapter")
    (tmp_path / "bundle").mkdir()  # an empty folder is allowed
    capfd.readouterr()
    forecast = plan_export(ExportConfig(adapter, base, tmp_path / "bundle", BETA))
    result = export_bundle(
        ExportConfig(adapter, base, tmp_path / "bundle", BETA), show_progress=False
    )
    assert capfd.readouterr() == ("", "")
    assert result.manifest.graph.kind == "adapter"
    files = (base / "model.safetensors", adapter / "adapter_model.safetensors")
    stored = sum(path.stat().st_size for path in files)
    assert weight_bytes(tmp_path / "bundle") < 1.05 * stored
    assert forecast.disk_bytes < 1.05 * stored
    assert result.manifest.policy["hard"]["adapter"] is not None
    check_against_torch(tmp_path / "bundle", adapter, base, vocabulary=20)
    assert "one base with its adapter" in result.to_text()
    assert Reranker.load(tmp_path / "bundle").best_of("the cat", ["sits", "runs"]).error is None


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_family_gives_torchs_rewards(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "gpt2":  # one family takes the path of those that opset 23 cannot express
        monkeypatch.setattr(export, "OPSETS", (20,))
    config = FAMILIES[family]() if family == "gemma3" else one_layer(family)
    policy, reference = (
        save_family(tmp_path / name, config, seed) for seed, name in enumerate("pr")
    )
    result = export_bundle(
        ExportConfig(policy, reference, tmp_path / "bundle", BETA), show_progress=False
    )
    assert result.manifest.graph.opset == (20 if family == "gpt2" else 23)
    check_against_torch(tmp_path / "bundle", policy, reference, vocabulary=config.vocab_size)


@pytest.fixture
def ready_graph(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make every export write the tiny bundle's graph, without tracing."""
    monkeypatch.setattr(export, "trace", lambda *_, **__: tiny_graph(tmp_path_factory))


def exported(tiny_folder: Path, output: Path, **changes: Any) -> export.ExportResult:
    settings = {
        "policy": tiny_folder / "policy", "reference": tiny_folder / "reference", "beta": BETA,
        "output": output, **changes,
    }  # fmt: skip
    return export_bundle(ExportConfig(**settings), show_progress=False)


@pytest.mark.usefixtures("ready_graph")
def test_a_wrong_graph_is_refused_and_leaves_no_file(
    tiny_folder: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    other, output = make_model("other", seed=7), tmp_path / "there" / "bundle"
    with pytest.raises(ExportError, match="not exact enough"):
        exported(tiny_folder, output, policy=other)
    with pytest.raises(ExportError, match="reward"):  # right log-probs, another beta
        exported(tiny_folder, output, beta=2 * BETA)
    assert list(output.parent.iterdir()) == []


@pytest.mark.usefixtures("ready_graph")
def test_an_interrupt_leaves_no_file(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exported(tiny_folder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ready_graph")
def test_large_weights_go_to_a_separate_file(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "SINGLE_FILE_BYTES", 1000)
    result = exported(tiny_folder, tmp_path / "bundle")
    assert {GRAPH, WEIGHTS} <= result.manifest.files.keys()
    assert result.manifest.files[WEIGHTS].size > 10 * 1000
    texts = ["sits on the mat", "sad"]
    split, whole = Reranker.load(tmp_path / "bundle"), Reranker.load(tiny_folder / "bundle")
    assert split.score("the cat", texts) == whole.score("the cat", texts)


def test_the_next_opset_is_tried_if_one_fails(
    tiny_folder: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def trace(_: object, opset: int, **__: object) -> onnx_ir.Model:
        tried.append(opset)
        model = tiny_graph(tmp_path_factory)
        if len(tried) == 1:
            raise GraphError("cannot be written")
        if len(tried) == 2:
            next(iter(model.graph)).op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(export, "trace", trace)
    monkeypatch.setattr(export, "OPSETS", (25, 24, 23))
    assert exported(tiny_folder, tmp_path / "bundle").manifest.graph.opset == 23
    assert tried == [25, 24, 23]
    tried.clear()
    monkeypatch.setattr(export, "OPSETS", (25, 24))
    with pytest.raises(ExportError, match=r"cannot be written; .*INVALID_GRAPH"):
        exported(tiny_folder, tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.usefixtures("ready_graph")
def test_the_rules_of_the_training_are_used(
    tiny_folder: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    policy = make_model("policy")
    rules = {**TokenizationRules(max_prompt_length=600).to_dict(), "append_eos": False}
    (policy / "training.json").write_text(json.dumps({"rules": rules}))
    used = exported(tiny_folder, tmp_path / "bundle", policy=policy).manifest.tokenization
    assert used == {**rules, "max_length": 512, "max_prompt_length": 511}
    assert Reranker.load(tmp_path / "bundle").score("the cat", ["sits"])[0].tokens == 1  # no EOS
    (policy / "training.json").write_text(json.dumps({"rules": {"max_length": -1}}))
    with pytest.raises(ExportError, match=r"training\.json"):
        exported(tiny_folder, tmp_path / "second", policy=policy)


@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("length", [2, 3, 9])
def test_short_limits_are_exported_too(tiny_folder: Path, tmp_path: Path, length: int) -> None:
    rules = TokenizationRules(max_length=length)
    manifest = exported(tiny_folder, tmp_path / "bundle", rules=rules).manifest
    longest = max(
        len(group.prompt_ids) + len(ids) for group in manifest.golden for ids in group.candidates
    )
    assert longest <= length
    Reranker.load(tmp_path / "bundle")


def test_the_plan_is_a_forecast_and_writes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "bundle"
    config = ExportConfig(tiny_folder / "policy", tiny_folder / "reference", output, BETA)
    forecast = plan_export(config)
    actual = sum(path.stat().st_size for path in (tiny_folder / "bundle").iterdir())
    assert 0.5 * actual < forecast.disk_bytes < 2 * actual
    assert forecast.memory_bytes > 1e8
    assert "memory" in forecast.to_text()
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises(ModelFolderError, match="no such model folder"):
        exported(tiny_folder, tmp_path / "b", policy=tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="no such model folder"):
        exported(tiny_folder, tmp_path / "b", reference=tmp_path / "nowhere")
    for beta in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="beta"):
            exported(tiny_folder, tmp_path / "b", beta=beta)
    with pytest.raises(ExportError, match="not empty"):
        exported(tiny_folder, tiny_folder / "bundle")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file, not a folder"):
        exported(tiny_folder, tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write here"):
        exported(tiny_folder, tmp_path / "file" / "bundle")
    with pytest.raises(UnsupportedModelError, match="512 positions cannot score 513"):
        exported(tiny_folder, tmp_path / "b", rules=TokenizationRules(max_length=513))
    assert not (tmp_path / "b").exists()


def test_incompatible_models_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    mamba = save_family(tmp_path / "mamba", mamba_config(), 0)
    with pytest.raises(UnsupportedModelError, match="carry a state across tokens"):
        exported(tiny_folder, tmp_path / "b", policy=mamba)
    other = save_family(tmp_path / "other", FAMILIES["llama"](), 0)
    with pytest.raises(ExportError, match=r"different vocabularies \(20 and 211 ids\)"):
        exported(tiny_folder, tmp_path / "b", reference=other)
    tuned = tmp_path / "tuned"
    with quietly():
        peft.get_peft_model(
            load_model(tiny_folder / "reference"),
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        ).save_pretrained(str(tuned))
    with pytest.raises(ModelFolderError, match="an adapter of type PROMPT_TUNING"):
        exported(tiny_folder, tmp_path / "b", policy=tuned)
    bare = save_tiny_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=re.escape("tokenizer.json")):
        exported(tiny_folder, tmp_path / "b", policy=bare, reference=bare)
    (bare / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelFolderError, match="does not know this model"):
        exported(tiny_folder, tmp_path / "b", policy=bare)


def test_a_reference_with_other_ids_for_the_same_tokens_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Its embedding has as many rows, so that only the tokenizer shows the difference."""
    other = save_tiny_model(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"dog "').replace('"dog"', '"cat"'))
    with pytest.raises(VocabularyError, match=r"'cat' has the id 6 there and 5 here"):
        exported(tiny_folder, tmp_path / "b", reference=other)
    assert not (tmp_path / "b").exists()


def test_the_tokenizer_may_be_in_the_references_folder(
    tiny_folder: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    policy = make_model("bare")
    (policy / "tokenizer.json").unlink()
    config = ExportConfig(policy, tiny_folder / "reference", tmp_path / "b", BETA)
    assert plan_export(config).disk_bytes > 0


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra_is_named(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"logratio\[export\].*logratio\[export-cpu\]"):
        exported(tiny_folder, tmp_path / "b")
