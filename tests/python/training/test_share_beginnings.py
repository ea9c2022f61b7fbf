"""`share_beginnings` from end to end: fewer tokens, the same updates, the same numbers."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_configs import small_config
from small_models import model_of
from tiny_models import WORDS, word_tokenizer
from torch import nn

from logratio.logps.batch import Batch, Layout, SharedBatch, TreeBatch, to_torch
from logratio.training import (
    EvaluateConfig,
    PrecomputeConfig,
    TrainConfig,
    evaluate,
    evaluation,
    precomputation,
    precompute,
    reference_scorer,
    train,
)
from logratio.training.dataset import load_dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.methods.token_weights import WeightedTurns
from logratio.training.reference import open_cache
from logratio.training.reference_scorer import ReferenceScorer
from logratio.training.trainer import DPOTrainer
from logratio.training.update import Updater


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Six conversations of three rated turns below one system prompt of twelve words."""
    rows = []
    for talk in range(6):
        prompt = " ".join(WORDS[5 + i % 9] for i in range(12))
        for turn in range(3):
            prompt += f" {WORDS[5 + talk % 3]} {WORDS[8 + turn]}"
            chosen = f" in the {WORDS[14 + talk % 3]} happy" + " happy" * (talk % 4)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": " under a" + " sad" * 3})
            prompt += chosen
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("budget", [64, 4096])
def test_training_takes_the_same_updates_with_fewer_tokens(
    tiny_model: Path,
    talks: Path,
    tmp_path: Path,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = TrainConfig(
        tiny_model,
        [talks],
        tmp_path / "apart",
        lr=1e-3,
        batch_size=9,
        epochs=2,
        token_budget=budget,
    )
    together = dataclasses.replace(
        apart,
        output=tmp_path / "together",
        share_beginnings=True,
        activation_checkpointing="all" if budget == 64 else "off",
    )
    seen: list[list[frozenset[int]]] = []
    sizes: list[int] = []
    update = Updater.update

    def watched(self: Updater, step: int, rate: float, batches: object, most: int) -> object:
        groups: list[int] = []

        def each() -> object:
            for micro in batches:  # type: ignore[attr-defined]
                groups.extend(micro.layout.groups.tolist())
                sizes.append(micro.layout.input_ids.size)
                yield micro

        done = update(self, step, rate, each(), most)  # type: ignore[arg-type]
        seen[-1].append(frozenset(groups))
        return done

    monkeypatch.setattr(Updater, "update", watched)
    history, computed = [], []
    for config in (apart, together):
        seen.append([])
        sizes.clear()
        history.append(train(config, show_progress=False).history)
        computed.append(sum(sizes))
        assert max(sizes) <= budget
    assert seen[0] == seen[1]
    assert computed[1] < computed[0] * 0.8
    for one, other in zip(*history, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], abs=1e-4) for name in one)
    first, second = (load_file(Path(c.output) / "model.safetensors") for c in (apart, together))
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)


def test_precompute_scores_the_same_with_fewer_tokens(
    tiny_model: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tokens = [], [0, 0]
    score = ReferenceScorer._logps

    def counting(self: ReferenceScorer, arrays: Layout) -> np.ndarray:
        tokens[self.layout == "tree"] += arrays.input_ids.size
        return score(self, arrays)

    monkeypatch.setattr(ReferenceScorer, "_logps", counting)
    for share in (False, True):
        config = PrecomputeConfig(
            tiny_model, [talks], tmp_path / str(share), token_budget=256, share_beginnings=share
        )
        assert precompute(config, show_progress=False).new > 30
        store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
        reader = open_cache(config.cache, model_fingerprint(config.model))
        found.append(reader.read(reader.join(store.keys()))[1])
    assert np.abs(found[0] - found[1]).max() <= 1e-5
    assert 0 < tokens[True] < tokens[False] * 0.6


def test_an_evaluation_finds_the_same_with_fewer_tokens(
    tiny_model: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy"
    train(TrainConfig(tiny_model, [talks], policy, lr=1e-3, epochs=2), show_progress=False)
    tokens, sums = Counter[type](), evaluation.model_sums

    def counting(model: nn.Module, batch: Batch, turns: WeightedTurns | None) -> torch.Tensor:
        tokens[type(batch)] += batch.input_ids.numel()
        return sums(model, batch, turns)

    monkeypatch.setattr(evaluation, "model_sums", counting)
    apart = EvaluateConfig(policy, tiny_model, [talks], token_budget=256)
    together = dataclasses.replace(apart, share_beginnings=True)
    one, other = (evaluate(config, show_progress=False).to_dict() for config in (apart, together))
    assert one.keys() == other.keys()
    assert one["pairs"] == other["pairs"] == 18
    assert 0 < one["accuracy"] == other["accuracy"]
    assert one["margin"] == pytest.approx(other["margin"], abs=1e-5)
    assert 0 < tokens[TreeBatch] < tokens[SharedBatch] * 0.6


def test_evaluate_and_precompute_print_what_they_compute_and_save(
    tiny_model: Path,
    talks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    computed = Counter[str]()

    def counting(arrays: Layout, device: torch.device) -> Batch:
        computed["tokens"] += arrays.input_ids.size
        return to_torch(arrays, device)

    monkeypatch.setattr(evaluation, "to_torch", counting)
    monkeypatch.setattr(reference_scorer, "to_torch", counting)
    settings: dict[str, Any] = {"token_budget": 256, "share_beginnings": True}
    commands: list[evaluation.Evaluating | precomputation.Precompute] = [
        evaluation.prepare(EvaluateConfig(tiny_model, tiny_model, [talks], 0.1, **settings)),
        precomputation.prepare(
            PrecomputeConfig(tiny_model, [talks], tmp_path / "cache", **settings)
        ),
    ]
    for models, command in zip((2, 1), commands, strict=True):
        forecast = command.forecast.to_text()
        computed.clear()
        command.run()
        tokens = f"shared beginnings: {computed['tokens'] // models:,} tokens instead of "
        assert tokens in forecast
        assert capsys.readouterr().err.count(tokens) == 1, "once, also for two models"
        assert float(re.findall(r"\(([\d.]+) % saved\)", forecast)[0]) > 40


def test_a_padded_model_says_that_it_shares_no_beginnings(
    talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "lfm2"
    model_of(small_config("lfm2"), 0).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    shared = EvaluateConfig(model, model, [talks], beta=0.1, share_beginnings=True)
    for config in (shared, dataclasses.replace(shared, share_beginnings=False)):
        capsys.readouterr()
        evaluate(config)
        printed = capsys.readouterr().err
        assert "using the padded layout, which is slower" in printed
        assert ("; it shares no beginnings" in printed) == config.share_beginnings
        assert "tokens instead of" not in printed


def test_a_run_is_resumed_only_with_the_same_setting(
    tiny_model: Path, talks: Path, tmp_path: Path
) -> None:
    """Another order of summation rounds differently, and `--resume` must be bit-identical."""
    config = TrainConfig(tiny_model, [talks], tmp_path / "out", lr=1e-3, share_beginnings=True)
    train(config, show_progress=False)
    with pytest.raises(FileExistsError, match="share_beginnings"):
        DPOTrainer(config=dataclasses.replace(config, share_beginnings=False), show_progress=False)


def test_a_model_that_cannot_share_beginnings_says_so(
    tiny_model: Path,
    talks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("logratio.logps.checks.check_tree", lambda _: "it must not")
    config = PrecomputeConfig(tiny_model, [talks], tmp_path / "cache", share_beginnings=True)
    assert precompute(config, show_progress=False).new > 30
    captured = capsys.readouterr()
    note = "within groups, not across them: it must not"
    assert note in captured.out + captured.err
    held_out = EvaluateConfig(tiny_model, tiny_model, [talks], beta=0.1, share_beginnings=True)
    assert evaluate(held_out).margin == 0
    assert capsys.readouterr().err.count(note) == 2, "of the policy and of the reference"
