"""Policies that are adapters over the graph of one base."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import Run
from shared_traces import shared_traces
from tiny_bundle import BETA, accept_files, plain_sums
from tiny_models import save_tiny_model, tiny, word_tokenizer
from transformers import GPT2Config

from logratio.bundle import (
    ADAPTER,
    GRAPH,
    BundleError,
    digest_of,
    manifest_bytes,
    read_manifest,
    write_triton_repository,
)
from logratio.errors import ConfigError
from logratio.export import ExportConfig, ExportError, export_bundle
from logratio.serving import Reranker, SharedBase
from logratio.serving.config import ServeConfig
from logratio.serving.configured_bundles import ConfiguredBundles
from logratio.serving.session import Stop
from logratio.training import load_model
from logratio.training.models import quietly

PROMPT = "the cat sits"
TEXTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 3, "target_modules": "all-linear", "rank_pattern": {"o_proj": 5}},
}


def adapted(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """Save an adapter that changes the model it is for."""
    model = load_model(base)
    with quietly():
        policy = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, weights in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, 0, 0.5)
    policy.save_pretrained(str(folder))
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its bundle `base`, and for each adapter a folder and a bundle."""
    folder = tmp_path_factory.mktemp("shared")
    model = save_tiny_model(folder / "model", 0)
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        policy = adapted(model, folder / name, seed, **settings)
        config = ExportConfig(policy, model, folder / f"{name}-bundle", BETA, base=folder / "base")
        with shared_traces():
            export_bundle(config, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> SharedBase:
    return SharedBase.load(folder / "base")


def reward_in_float64(folder: Path, name: str) -> tuple[np.ndarray, list[int]]:
    """β times the log-ratios that torch gives in float64, and the lengths."""
    tokenizer = Reranker.load(folder / f"{name}-bundle", base=folder / "base").encoder
    group = tokenizer.encode(PROMPT, TEXTS)
    ids: Sequence[Any] = [list(one.ids) for one in group.candidates]
    policy, reference = (
        plain_sums(load_model(folder / one).double(), list(group.prompt_ids), ids)
        for one in (name, "model")
    )
    return BETA * (policy - reference), [len(one) for one in ids]


@pytest.mark.parametrize("name", ADAPTERS)
def test_rewards_are_those_of_torch(folder: Path, base: SharedBase, name: str) -> None:
    reranker = Reranker.load(folder / f"{name}-bundle", base=base)
    expected, lengths = reward_in_float64(folder, name)
    assert np.ptp(expected) > 0.01
    scores = reranker.score(PROMPT, TEXTS)
    np.testing.assert_allclose([one.reward for one in scores], expected, atol=1e-5)
    values = reranker.token_scores(PROMPT, TEXTS)
    assert [len(one) for one in values if one is not None] == lengths
    sums = [float(one.sum()) for one in values if one is not None]
    np.testing.assert_allclose(BETA * np.array(sums), expected, atol=1e-5)
    for text, score in zip(TEXTS, scores, strict=True):
        assert reranker.score(PROMPT, [text])[0].reward == score.reward


def test_a_policys_bundle_has_only_its_adapter(folder: Path) -> None:
    manifest, base = (read_manifest(folder / name) for name in ("one-bundle", "base"))
    assert ADAPTER in manifest.files and GRAPH not in manifest.files
    assert manifest.files[ADAPTER].size < base.files[GRAPH].size / 10
    assert manifest.base == digest_of(manifest_bytes(folder / "base"))
    assert (manifest.graph.kind, base.graph.takes_adapters) == ("shared_base", True)
    assert manifest.reference["digest"] == base.policy["digest"]


def test_a_base_scores_alone_too(folder: Path) -> None:
    reranker = Reranker.load(folder / "base")
    scores = reranker.score(PROMPT, TEXTS)
    assert [one.reward for one in scores] == [one.policy_logps for one in scores]


def test_the_base_must_be_given_and_must_be_the_same(
    folder: Path, base: SharedBase, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"give base.*sha256:"):
        Reranker.load(folder / "one-bundle")
    with pytest.raises(ConfigError, match="has a graph: remove base"):
        Reranker.load(folder / "base", base=base)
    with pytest.raises(BundleError, match="takes no adapters"):
        Reranker.load(folder / "one-bundle", base=folder / "two-bundle")
    other = shutil.copytree(folder / "base", tmp_path / "other")
    values = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(values, indent=2))
    with pytest.raises(BundleError, match="exported for a base with the digest"):
        Reranker.load(folder / "one-bundle", base=other)


def test_an_adapter_of_another_bundle_is_refused(
    folder: Path, base: SharedBase, tmp_path: Path
) -> None:
    mixed = shutil.copytree(folder / "one-bundle", tmp_path / "mixed")
    shutil.copy(folder / "two-bundle" / ADAPTER, mixed / ADAPTER)
    with pytest.raises(BundleError, match=r"altered|bytes instead of"):
        Reranker.load(mixed, base=base)
    accept_files(mixed)
    with pytest.raises(BundleError, match="belongs to another base, policy or reward"):
        Reranker.load(mixed, base=base)


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_adapter_is_refused_or_gives_the_same_rewards(
    folder: Path, base: SharedBase, tmp_path: Path, seed: int
) -> None:
    damaged = shutil.copytree(folder / "one-bundle", tmp_path / "damaged")
    content = bytearray((damaged / ADAPTER).read_bytes())
    chance = random.Random(seed)
    for _ in range(4):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    (damaged / ADAPTER).write_bytes(content[: len(content) - seed % 2 * 100])
    accept_files(damaged)
    expected = Reranker.load(folder / "one-bundle", base=base).score(PROMPT, TEXTS)
    try:
        found = Reranker.load(damaged, base=base).score(PROMPT, TEXTS)
    except BundleError:
        return
    np.testing.assert_allclose(
        [one.reward for one in found], [one.reward for one in expected], atol=1e-3
    )


def test_a_stopped_run_ends_policy_and_reference(folder: Path, base: SharedBase) -> None:
    reranker = Reranker.load(folder / "one-bundle", base=base)
    group, stop = reranker.encode(PROMPT, TEXTS), Stop()
    (run,) = reranker.runs([group])
    assert len(reranker.compute([group], run, stop)) == len(TEXTS)
    stop.now()
    with pytest.raises(Exception, match="terminate"):
        reranker.compute([group], run, stop)


def test_what_cannot_share_a_base_is_refused(folder: Path, tmp_path: Path) -> None:
    model = folder / "model"

    def export(policy: Path, reference: Path | None = model, **settings: Any) -> None:
        config = ExportConfig(
            policy, reference, tmp_path / "out", BETA, base=folder / "base", **settings
        )
        export_bundle(config, show_progress=False)

    with pytest.raises(ConfigError, match="not a LoRA adapter"):
        export(model)
    with pytest.raises(ConfigError, match="is in float32: remove dtype and bits"):
        export(folder / "one", bits=8)
    dora = adapted(model, tmp_path / "dora", 0, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(ExportError, match="not a plain LoRA over the reference"):
        export(dora)
    other = save_tiny_model(tmp_path / "other", 3)
    with pytest.raises(ExportError, match="made from another model than the reference"):
        export(adapted(other, tmp_path / "policy", 0, target_modules=["q_proj"]), other)
    with pytest.raises(ExportError, match="takes no adapters"):
        config = ExportConfig(
            folder / "one", model, tmp_path / "out", BETA, base=folder / "one-bundle"
        )
        export_bundle(config, show_progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base", "one-bundle"])
def test_triton_takes_no_adapters(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="export without"):
        write_triton_repository(folder / name, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_base_of_convolutions_in_8_bits(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=20)
    tiny(config, 0).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    adapted(tmp_path / "model", tmp_path / "one", 0, target_modules=["c_attn"], fan_in_fan_out=True)
    settings = ExportConfig(
        tmp_path / "one",
        tmp_path / "model",
        tmp_path / "one-bundle",
        BETA,
        base=tmp_path / "base",
        bits=8,
        force=True,
    )
    manifest = export_bundle(settings, show_progress=False).manifest
    assert manifest.precision.bits == 8 and manifest.precision.stored_share > 0.3
    reranker = Reranker.load(tmp_path / "one-bundle", base=tmp_path / "base")
    expected, _ = reward_in_float64(tmp_path, "one")
    found = [one.reward for one in reranker.score(PROMPT, TEXTS)]
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_the_command_line(folder: Path, tmp_path: Path, run: Run) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "candidates": TEXTS}) + "\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": PROMPT, "chosen": TEXTS[0], "rejected": TEXTS[1]}))
    bundle = folder / "one-bundle"
    given = ("--base", folder / "base")
    code, _, error = run("rank", "--bundle", bundle, "--input", rows, "--output", out, *given)
    assert code == 0, error
    scores = Reranker.load(bundle, base=folder / "base").score(PROMPT, TEXTS)
    found = json.loads(out.read_text())["rewards"]
    assert found == pytest.approx([one.reward for one in scores], abs=1e-5)
    code, _, error = run("rank", "--bundle", bundle, "--input", rows)
    assert code == 2 and "give --base" in error
    code, text, error = run("bundle", "inspect", bundle)
    assert code == 0 and "shared base" in text and "sha256" in text
    code, text, error = run("bundle", "verify", bundle, *given)
    assert code == 0 and text.splitlines()[-1] == "sound"
    code, text, error = run("evaluate", "--bundle", bundle, "--data", pairs, *given)
    assert code == 0, error


def test_a_server_has_the_base_in_memory_once(folder: Path) -> None:
    names = {name: folder / f"{name}-bundle" for name in ADAPTERS}
    bundles = ConfiguredBundles(ServeConfig(names, base=folder / "base"))
    loaded = bundles.load_all()
    again = bundles.load("one")
    sessions = {id(one._session) for one in (*loaded.values(), again)}
    assert len(sessions) == 1
    rewards = {name: one.score(PROMPT, TEXTS)[0].reward for name, one in loaded.items()}
    assert again.score(PROMPT, TEXTS)[0].reward == rewards["one"] != rewards["two"]
    with pytest.raises(ConfigError, match="give base"):
        ConfiguredBundles(ServeConfig(names)).load_all()
    with pytest.raises(ConfigError, match="for bundles exported with"):
        ConfiguredBundles(ServeConfig(folder / "base", base=folder / "base")).load_all()
