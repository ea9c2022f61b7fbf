"""One process, two and three train the same weights, replicated and sharded, in float64."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from method_groups import write_answers, write_lists
from rank_server import RankServer
from run_numbers import gap, numbers
from tiny_models import WORDS, tiny, word_tokenizer
from transformers import LlamaConfig, MixtralConfig

TRAIN = "rank_workers:train_in_float64"
EXACT = 1e-12
TIED, EXPERTS = "tied", "experts"
"""The cases that need other models."""
ANSWERS, LISTS = "kto", "lipo"
"""The cases that need other data."""

CASES: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"epochs": 2},
    "few groups": {"batch_size": 2, "token_budget": 20},
    "lora": {"lora": {"rank": 4}, "lr": 1e-2},
    "cached": {"cache": "cache", "precompute": True},
    "simpo": {"loss": "simpo"},
    "padded": {"activation_checkpointing": "all", "weight_decay": 0.1},
    "evaluated": {
        "epochs": 2,
        "eval_share": 0.3,
        "eval_every": 2,
        "best_metric": "loss",
        "eval_samples": 3,
    },
    TIED: {},
    EXPERTS: {"router_aux_loss_coef": 0.1, "batch_size": 2, "loss": "simpo"},
    "bco": {"loss": "bco", "token_budget": 30},
    "beta-dpo": {"loss": "beta-dpo", "loss_options": {"alpha": 0.2}},
    "aot-unpaired": {"loss": "aot-unpaired", "eval_share": 0.3, "eval_every": 2},
    "mixture": {"loss": "aot:0.5+ipo:0.1+sft:0.2", "lora": {"rank": 4}, "lr": 1e-2},
    "wpo": {"loss": "wpo"},
    "ld-dpo": {"loss": "ld-dpo", "cache": "cache", "precompute": True},
    "bradley-terry": {"loss": "bradley-terry", "loss_options": {"center": 0.1}, "eval_share": 0.3},
    "reward adapter": {"loss": "bradley-terry", "lora": {"rank": 4}, "lr": 1e-2},
    "moving reference": {"epochs": 2, "sync_reference": True, "reference_sync_steps": 2},
    ANSWERS: {"loss": "kto", "eval_share": 0.3, "eval_every": 2},
    LISTS: {"loss": "lipo"},
}
BY_LOSS = ("simpo", "bco", "beta-dpo", "aot-unpaired", "wpo", "ld-dpo", ANSWERS, LISTS)
"""Cases that differ from others by their loss only, which does not know how a model is divided."""
UNEVEN = ("lora", "evaluated", TIED, EXPERTS)
"""Cases whose weights are sharded over three processes, which divides them unevenly."""
WAYS = {
    **{case: [(2, "ddp"), (3 if case in UNEVEN else 2, "fsdp")] for case in CASES},
    **{case: [(2, "ddp") if n % 2 else (2, "fsdp")] for n, case in enumerate(BY_LOSS)},
    "dpo": [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")],
}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(ranks: RankServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a case once for each way; return its folder."""
    folder = tmp_path_factory.mktemp("data")
    data = dict.fromkeys(CASES, write_pairs(folder / "pairs.jsonl", 14))
    data[ANSWERS] = write_answers(folder / "answers.jsonl", 14)
    data[LISTS] = write_lists(folder / "lists.jsonl", 14)
    models = dict.fromkeys(CASES, tiny_model)
    models[TIED] = save(tmp_path_factory.mktemp("tied"), LlamaConfig, tie_word_embeddings=True)
    models[EXPERTS] = save(tmp_path_factory.mktemp("experts"), MixtralConfig, num_local_experts=3)

    @cache
    def run(case: str, count: int, parallel: str, hosts: int = 1, whole: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("run")
        settings = {
            **{"model": str(models[case]), "data": str(data[case])},
            **{"output": str(folder / "out"), "batch_size": 4, "epochs": 1, "lr": 1e-3},
            **{"token_budget": 48, "report": False},
            **({"parallel": parallel} if count > 1 else {}),
            **CASES[case],
        }
        if "cache" in settings:
            settings["cache"] = str(folder / "cache")
        ranks(count, TRAIN, settings, whole, hosts=hosts).well()
        return folder / "out"

    return run


def save(folder: Path, config: type[Any], **settings: Any) -> Path:
    """Write a small model of a family to `folder`."""
    made = config(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    tiny(made, scale=2.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "count", "parallel"), [(case, *way) for case, ways in WAYS.items() for way in ways]
)
def test_weights_and_metrics_equal_those_of_one_process(
    trained: Train, case: str, count: int, parallel: str
) -> None:
    alone, several = trained(case, 1, ""), trained(case, count, parallel)
    assert gap(alone, several) < EXACT
    assert numbers(several) == pytest.approx(numbers(alone), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("case", ["dpo", "lora"])
def test_hybrid_shards_on_two_hosts_give_the_same_weights(trained: Train, case: str) -> None:
    assert gap(trained(case, 1, ""), trained(case, 4, "hsdp", 2)) < EXACT


@pytest.mark.parametrize("case", ["few groups", TIED])
def test_gradients_may_be_summed_after_each_micro_batch(trained: Train, case: str) -> None:
    assert gap(trained(case, 1, ""), trained(case, 2, "fsdp", 1, False)) < EXACT


def test_hosts_add_their_shards_of_gradients_once_an_update(trained: Train) -> None:
    assert gap(trained("few groups", 1, ""), trained("few groups", 4, "hsdp", 2, False)) < EXACT
