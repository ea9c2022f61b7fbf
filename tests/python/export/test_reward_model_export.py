"""A reward model as a bundle: its rewards are transformers' scores, also for adapters."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, write_pairs
from rewards import plain_scores
from tiny_bundle import rewrite_manifest
from transformers import AutoModelForSequenceClassification

from logratio.bundle import BundleError, read_manifest
from logratio.errors import ConfigError
from logratio.export import ExportConfig, export_bundle
from logratio.export.plan import make_plan
from logratio.serving import Reranker
from logratio.training import LoraSettings, TrainConfig, train
from logratio.training.merging import merge_adapter

PROMPTS = ["the cat sits", "the bird sings loud loud loud"]
ANSWERS = [" in the mat happy", " under a mat sad", " happy", " in the house happy happy happy"]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is a reward model, the same merged, and its bundle."""
    folder = tmp_path_factory.mktemp("rewards")
    data = write_pairs(folder / "pairs.jsonl", 12)
    lora = LoraSettings(rank=4)
    settings = TrainConfig(tiny_model, [data], folder / "adapter", loss="bradley-terry", lora=lora)
    train(dataclasses.replace(settings, lr=1e-2, batch_size=4, epochs=3), show_progress=False)
    merge_adapter(folder / "adapter", folder / "whole")
    export_bundle(ExportConfig(folder / "adapter", None, folder / "bundle"), show_progress=False)
    return folder


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder / "bundle")


def test_rewards_are_the_scores_of_transformers_in_every_batch(
    folder: Path, reranker: Reranker
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "whole").double().eval()
    encoded = [reranker.encode(prompt, ANSWERS) for prompt in PROMPTS]
    groups = [([*one.prompt_ids], [[*c.ids] for c in one.candidates]) for one in encoded]
    with torch.no_grad():
        expected = plain_scores(model, groups).tolist()
    together = reranker.score_many([(prompt, ANSWERS) for prompt in PROMPTS])
    alone = [reranker.score(prompt, [one])[0] for prompt in PROMPTS for one in ANSWERS]
    for scores in ([one for group in together for one in group], alone):
        assert [one.reward for one in scores] == pytest.approx(expected, abs=1e-4)
        assert all(one.policy_logps != one.policy_logps for one in scores)  # NaN: there are none
    assert max(expected) - min(expected) > 1
    best = reranker.best_of(PROMPTS[0], ANSWERS)
    assert best.index == max(range(4), key=expected[:4].__getitem__)


def test_the_manifest_says_what_the_reward_is(folder: Path, reranker: Reranker) -> None:
    manifest = read_manifest(folder / "bundle")
    assert (manifest.graph.kind, manifest.is_reward_model) == ("reward_model", True)
    assert (manifest.graph.outputs, manifest.reference) == (("reward",), {})
    assert max(manifest.parity.values()) < 1e-4
    assert "reward model" in repr(reranker)


def test_rank_writes_rewards_without_log_probs(folder: Path, tmp_path: Path, run: Run) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "ranked.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPTS[0], "candidates": [*ANSWERS, ""]}) + "\n")
    code, _, _ = run("rank", "--bundle", folder / "bundle", "--input", rows, "--output", out)
    assert code == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert [reward is None for reward in row["rewards"]] == [False] * 4 + [True]
    assert len(row["order"]) == 4
    assert "policy_logps" not in row


@pytest.mark.parametrize("change", ["score", "kind", "log-probs"])
def test_a_bundle_with_other_golden_scores_is_refused(
    folder: Path, tmp_path: Path, change: str
) -> None:
    bundle = Path(shutil.copytree(folder / "bundle", tmp_path / "bundle"))
    manifest: dict[str, Any] = json.loads((bundle / "bundle.json").read_text())
    if change == "score":
        manifest["golden"][0]["scores"][0] += 0.01
    elif change == "kind":
        manifest["graph"]["kind"] = "two_models"
    else:
        manifest["golden"][1]["scores"] = None
    rewrite_manifest(bundle, **manifest)
    with pytest.raises(BundleError, match="torch gave" if change == "score" else "kind"):
        Reranker.load(bundle)


def test_a_reference_is_refused_for_a_reward_model_and_needed_for_a_policy(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="remove reference"):
        make_plan(ExportConfig(folder / "whole", tiny_model, tmp_path / "bundle"))
    with pytest.raises(ConfigError, match="remove beta"):
        make_plan(ExportConfig(folder / "whole", None, tmp_path / "bundle", 0.1))
    with pytest.raises(ConfigError, match="reference is missing"):
        make_plan(ExportConfig(tiny_model, None, tmp_path / "bundle", 0.1))


def test_a_pad_token_at_the_end_is_not_scored(tiny_model: Path) -> None:
    """The module that is traced follows transformers for any padding token of the config."""
    import numpy as np

    from logratio._rust import candidate_layout
    from logratio.export.reward_model import ScoreScorer
    from logratio.graph_inputs import graph_inputs
    from logratio.logps.scores import HEAD

    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).eval()
    assert hasattr(model, HEAD)
    groups = [([1, 4, 5], [[6, 2], [2, 2], [7]]), ([1, 6], [[2], [8, 2, 9, 2]])]
    layout = candidate_layout(
        [np.array(prompt, np.int32) for prompt, _ in groups],
        [[np.array(ids, np.int32) for ids in answers] for _, answers in groups],
        4,
    )
    inputs = [torch.from_numpy(one) for one in graph_inputs(layout).values()]
    for pad in (None, 0, 2):
        model.config.pad_token_id = pad
        with torch.no_grad():
            found, expected = ScoreScorer(model)(*inputs), plain_scores(model, groups)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
