"""All steps on real data and real weights, if they are available."""

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_stories import run_seeds
from tiny_models import tiny
from transformers import GPT2Config

from logratio.data import TokenizationRules
from logratio.export.export import export_bundle
from logratio.export.plan import ExportConfig
from logratio.serving import Reranker
from logratio.training import (
    EvaluateConfig,
    PrecomputeConfig,
    TrainConfig,
    evaluate,
    load_model,
    precompute,
    train,
)
from logratio.training.evaluation import sample_completions

pytestmark = [pytest.mark.shared, pytest.mark.slow]


@pytest.mark.long
def test_the_policy_learns_story_preferences(shared: Path, tmp_path: Path) -> None:
    """Three seeds: the issue's bounds, each on the mean."""
    results = run_seeds(range(3), shared, tmp_path)
    accuracy = np.mean([result.accuracy for result in results])
    before = np.mean([result.positive_before for result in results])
    after = np.mean([result.positive_after for result in results])
    recovered = np.mean([result.recovered for result in results])
    assert accuracy >= 0.80, results
    assert before == pytest.approx(0.28, abs=0.08), results
    assert after >= 0.90, results
    assert recovered >= 1 / 3, results


def test_all_steps_on_real_dialogues(shared: Path, tmp_path: Path) -> None:
    """HH transcripts with the GPT-2 tokenizer: cache, training, evaluation, export, ranking."""
    data = first_dialogues(shared, tmp_path / "hh.jsonl.gz", 600)
    model = gpt2_with_real_tokenizer(shared, tmp_path / "model")
    rules = TokenizationRules(max_length=256, prompt_truncation="keep_end")
    cache, policy, bundle = (tmp_path / name for name in ("cache", "policy", "bundle"))
    made = precompute(PrecomputeConfig(model, [data], cache, rules=rules))
    assert made.new > 1100
    result = train(TrainConfig(model, [data], policy, cache=cache, lr=1e-4, rules=rules))
    report = json.loads((policy / "data_report.json").read_text())
    assert report["read"] == 600
    assert 550 <= report["kept"] <= 600
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert all(np.isfinite(row["loss"]) for row in result.history)
    few = first_dialogues(shared, tmp_path / "few.jsonl.gz", 200)
    measured = evaluate(EvaluateConfig(policy, model, [few], rules=rules))
    assert measured.accuracy > 0.6  # on pairs that it was trained on
    export_bundle(ExportConfig(policy, model, bundle, 0.1))
    scores = Reranker.load(bundle).score(
        "\n\nHuman: Hello there\n\nAssistant:", [" Hi!", " Go away.", " How are you?"]
    )
    assert all(np.isfinite(score.reward) for score in scores)


def first_dialogues(shared: Path, target: Path, count: int) -> Path:
    """Write the first `count` real pairs to a separate file."""
    with gzip.open(shared / "data" / "hh" / "harmless-base.test.jsonl.gz", "rt") as source:
        lines = list(islice(source, count))
    with gzip.open(target, "wt") as file:
        file.writelines(lines)
    return target


def gpt2_with_real_tokenizer(shared: Path, folder: Path) -> Path:
    """Write a small random GPT-2 with the real tokenizer of 50,257 entries."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=1024)
    tiny(config, scale=1.0).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared / "models" / "gpt2-tokenizer" / name).read_bytes())
    return folder


def test_known_text_of_a_real_model(shared: Path) -> None:
    """stories260K continues greedily with its published text."""
    from tokenizers import Tokenizer

    folder = shared / "models" / "stories260K"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = tokenizer.encode("Once upon a time").ids
    with torch.no_grad():
        (ids,) = sample_completions(
            load_model(folder), [start], max_new_tokens=60, stop_ids=[2], greedy=True
        )
    text = tokenizer.decode(start + ids)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
