"""What bench_step.py claims: the same pairs, the same numbers, ratios of what was measured."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_step
import numpy as np
import pytest
import shared_material
import step_material
import step_ours
import step_plain
import torch
from step_arms import ARMS
from step_flops import forward_flops, useful_flops
from step_gate import GateError, check
from step_material import (
    LONGEST,
    SHAPES,
    Shape,
    Wanted,
    drawn_pairs,
    make,
    plan_updates,
    write_store,
)
from step_models import MODELS
from step_ours import pairs_of
from step_patches import LOOP, TRAINER, UPDATE, apart
from step_plain import collate, cosine, padded_pairs, sums
from step_record import Pair, Spec, pair_hash
from step_summary import compare, control, interval
from step_tuning import CANDIDATES, fastest
from tiny_models import FAMILIES, VOCABULARY, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from logratio._rust import Store
from logratio.data import TokenizationRules
from logratio.data.feed import lay_out
from logratio.logps.batch import to_torch
from logratio.logps.checks import batch_of
from logratio.logps.completion import score
from logratio.training import TrainConfig
from logratio.training.reference import StaleCacheError, cached_reference
from logratio.training.schedule import learning_rate


def some_pairs(count: int = 5, seed: int = 0) -> list[Pair]:
    return drawn_pairs(Shape(9, 14, 0.8), count, VOCABULARY, seed)


def rows_of(pairs: list[Pair]) -> list[dict[str, Any]]:
    names = ("prompt", "chosen", "rejected")
    return [
        {name: np.asarray(ids).tolist() for name, ids in zip(names, pair, strict=True)}
        | {"reference": [-1.0, -2.0]}
        for pair in pairs
    ]


def sealed(path: Path, pairs: list[Pair]) -> Store:
    tokenizer: Any = SimpleNamespace(digest="none", rules=TokenizationRules())
    return write_store(path, pairs, tokenizer)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_what_ours_feeds_is_named_as_it_was_written(tmp_path: Path, layout: str) -> None:
    pairs = some_pairs()
    store = sealed(tmp_path / "pairs.store", pairs)
    fed = pairs_of(lay_out(store, np.array([3, 0, 4]), layout))()
    assert pair_hash(fed) == pair_hash([pairs[group] for group in (0, 3, 4)])


def test_what_rivals_feed_is_named_as_it_was_written() -> None:
    pairs = some_pairs()
    rows = collate(rows_of(pairs), "cpu")
    fed = padded_pairs(rows.ids, rows.attention_mask, rows.completion_mask)
    assert pair_hash(fed) == pair_hash(pairs)


def test_a_name_tells_pairs_apart_but_not_their_order() -> None:
    pairs = some_pairs()
    prompt, chosen, rejected = pairs[0]
    assert pair_hash(pairs) == pair_hash(pairs[::-1])
    assert pair_hash(pairs) != pair_hash(pairs[1:])
    assert pair_hash([(prompt, chosen, rejected)]) != pair_hash([(prompt, rejected, chosen)])
    moved = [*np.asarray(prompt).tolist(), int(np.asarray(chosen)[0])]
    assert pair_hash([pairs[0]]) != pair_hash([(moved, np.asarray(chosen)[1:], rejected)])


def test_shapes_are_what_their_names_say() -> None:
    lengths = {
        name: np.array([[len(ids) for ids in pair] for pair in drawn_pairs(shape, 200, 512, 0)])
        for name, shape in SHAPES.items()
    }
    assert np.array_equal(np.unique(lengths["no-gain"], axis=0), [[1, 200, 200]])
    assert 550 < np.median(lengths["long-prompt"][:, 0]) < 650
    assert 25 < np.median(lengths["short-prompt"][:, 0]) < 35
    assert 170 < np.median(lengths["short-prompt"][:, 1:]) < 230
    for found in lengths.values():
        assert (found[:, 0] + found[:, 1:].max(axis=1)).max() <= LONGEST


def test_the_plan_gives_every_pair_once(tmp_path: Path) -> None:
    store = sealed(tmp_path / "pairs.store", some_pairs(12))
    for order in ("shuffled", "length_grouped"):
        updates = plan_updates(store, order, batch=4, seed=0)
        assert [len(groups) for groups in updates] == [4, 4, 4]
        assert sorted(np.concatenate(updates).tolist()) == list(range(12))


def test_the_plain_recipe_computes_what_ours_does(tmp_path: Path) -> None:
    pairs, model = some_pairs(), tiny(FAMILIES["llama"]())
    batch = to_torch(lay_out(sealed(tmp_path / "pairs.store", pairs), np.arange(5)))
    ours = batch.targets.sums(score(model, batch)).reshape(-1, 2)
    ours.tanh().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    plain = sums(model, collate(rows_of(pairs), "cpu")).reshape(2, -1).T.double()
    plain.tanh().sum().backward()
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_every_arm_has_one_rate() -> None:
    config = TrainConfig("model", ["pairs"], "out", lr=1.0, warmup=0.0)
    wanted = [learning_rate(config, done, 7) for done in range(7)]
    assert [cosine(done, 7) for done in range(7)] == pytest.approx(wanted, abs=1e-12)


def a_record(arm: str, seconds: list[float], above: float, **other: float) -> dict[str, Any]:
    metrics = {"loss": 0.69, "chosen": -100.0, "rejected": -120.0, "grad_norm": 2.0} | other
    return {
        "arm": arm,
        "seconds": seconds,
        "metrics": [metrics] * len(seconds),
        "pairs": ["same"] * len(seconds),
        "memory": {"above_model": above, "above_model_and_moments": above - 10},
    }


def test_the_gate_lets_equal_work_through() -> None:
    ours, theirs = a_record("ours", [1, 1], 50), a_record("plain", [4, 4], 90, chosen=-100.001)
    assert check(ours, theirs, "fp32")["sums"] == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chosen", -100.1),
        ("rejected", -119.9),
        ("grad_norm", 2.01),
        ("loss", 0.70),
        ("loss", float("nan")),
    ],
)
def test_the_gate_refuses_other_numbers(name: str, value: float) -> None:
    with pytest.raises(GateError, match="plain"):
        check(a_record("ours", [1], 50), a_record("plain", [4], 90, **{name: value}), "fp32")


def test_the_gate_refuses_other_pairs() -> None:
    theirs = a_record("plain", [4, 4], 90) | {"pairs": ["same", "other"]}
    with pytest.raises(GateError, match="update 1"):
        check(a_record("ours", [1, 1], 50), theirs, "fp32")


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        {
            "ours": a_record("ours", [9, 1 * slow, 1 * slow], 50),
            "ours-again": a_record("ours-again", [9, 1 * slow, 1.2 * slow], 50),
            "ours-cold": a_record("ours-cold", [2, 1, 1], 50) | {"reference_seconds": 2.0},
            "trl": a_record("trl", [9, 3 * slow, 5 * slow], 200) | {"reference_seconds": 7.0},
        }
        for slow in (1, 10, 3)
    ]
    row = compare(rounds, "ours", "trl", warmup=1)
    assert (row["ratio"], row["interval"], row["memory_ratio"]) == (4.0, [4.0, 4.0], 0.25)
    assert row["memory_ratio_without_moments"] == pytest.approx(40 / 190)
    cold = compare(rounds[:1], "ours-cold", "trl", warmup=1)
    assert (cold["timed"], cold["ratio"], cold["interval"]) == ("cold", 24 / 6, None)
    assert control(rounds, 1)["control"]["ratio"] == pytest.approx(1 / 1.1)
    assert control(rounds, 1)["flagged"]


def test_an_interval_holds_the_median_and_grows_with_the_spread() -> None:
    narrow, wide = interval([4.0, 4.1, 4.2]), interval([2.0, 4.1, 9.0])
    assert narrow == [4.0, 4.2]
    assert wide == [2.0, 9.0]


def test_operations_are_those_that_torch_counts() -> None:
    config, tokens = MODELS["toy"](), 40
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.int64))
    causal = forward_flops(config, 0, [tokens], shared=True)
    above_the_diagonal = 4 * config.hidden_size * config.num_hidden_layers * tokens**2 / 2
    rotary = counter.get_total_flops() - causal - above_the_diagonal
    assert 0 <= rotary < 1e-3 * causal


def test_sharing_saves_the_second_prompt_and_nothing_of_the_head() -> None:
    config = MODELS["small"]()
    shared, apart = (forward_flops(config, 100, [30, 50], shared=s) for s in (True, False))
    prompt = forward_flops(config, 100, [], shared=True)
    assert apart - shared == pytest.approx(prompt)
    assert useful_flops(config, [(100, 30, 50)]) == 3 * shared


@pytest.mark.shared
def test_ours_and_plain_pass_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (TRAINER, "build_policy"),
        (TRAINER.Precompute, "run"),
        (TRAINER, "DPOTrainer"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # the worker exchanges them
    for owner, name in ((TRAINER.DPOTrainer, "_feed"), (UPDATE.Updater, "update")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(LOOP, "FeedSettings", LOOP.FeedSettings)
    make(Wanted(str(tmp_path), "toy", "hh", batch=3, updates=2))
    records = []
    for name, worker in (("ours", step_ours), ("plain", step_plain)):
        path = tmp_path / f"{name}.json"
        settings = dict(ARMS[name].settings)
        worker.run(Spec(str(tmp_path), str(path), name, settings, batch=3, warmup=1, measured=1))
        records.append(json.loads(path.read_text()))
    assert check(records[0], records[1], "fp32")["sums"] < 1e-5
    assert [len(record["seconds"]) for record in records] == [2, 2]
    assert min(record["memory"]["above_model"] for record in records) > 0


def test_prompts_apart_are_the_same_targets() -> None:
    model, groups = tiny(FAMILIES["llama"]()), [(p, [c, r]) for p, c, r in some_pairs()]
    batch = batch_of([(list(p), [list(c) for c in both]) for p, both in groups], "shared")
    row = apart(batch)
    assert row.input_ids.shape[1] == sum(2 * len(p) + len(c) + len(r) for p, (c, r) in groups)
    assert torch.equal(
        row.input_ids.flatten()[row.targets.logit_index[0]],
        batch.input_ids[0, len(groups[0][0]) - 1],
    )
    assert torch.allclose(score(model, row), score(model, batch), atol=1e-5)


def test_both_sides_are_tuned() -> None:
    spec = Spec("material", "result", "arm", batch=12)
    rival, own = (CANDIDATES[name](spec) for name in ("trl-tuned", "ours-fastest"))
    assert [arm.settings["micro_batch"] for arm in rival.values()] == [12, 6, 3]
    configs = [arm.settings["config"] for arm in own.values()]
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == 6
    for config in configs:
        TrainConfig("model", [], "output", **config)
    assert {config["activation_checkpointing"] for config in configs} == {"off"}


def test_the_fastest_that_ended_is_taken() -> None:
    assert fastest({"a": 3.0, "b": "exit status 1", "c": 2.0}) == "c"
    assert fastest({"a": "exit status 1", "b": "exit status 1"}) == "a"


def test_the_cache_is_made_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    """A cache serves one precision: made in another, ours would refuse to start."""
    made = Wanted(str(tmp_path), "toy", "long-prompt", batch=2, updates=1, precision="bf16-weights")
    make(made)
    settings = {"model": tmp_path / "model", "data": [], "output": tmp_path / "none"}
    store = Store.open(tmp_path / "pairs.store")
    for precision, fits in (("bf16-weights", True), ("fp32", False)):
        config = TrainConfig(**settings, cache=tmp_path / "cache", precision=precision)  # type: ignore[arg-type]
        with nullcontext() if fits else pytest.raises(StaleCacheError):
            cached_reference(config, store)


def test_drawn_shapes_need_no_shared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_material, "SHARED", tmp_path / "absent")
    material = make(Wanted(str(tmp_path), "toy", "no-gain", batch=1, updates=1))
    assert material["completion_tokens"] == [[200, 200]]


def test_a_missing_folder_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_material, "SHARED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--models", "toy"])
    monkeypatch.setattr(bench_step, "bench", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="LOGRATIO_SHARED"):
        bench_step.main()


def test_the_plan_of_a_gpu_fits_in_minutes() -> None:
    given = ["--device", "cuda"]
    options = bench_step.parsed(given)
    assert options.models == ["0.5B"]
    assert (options.precision, options.batch, options.rounds) == ("bf16-weights", 32, 1)
    names = [*options.ours, *options.arms]
    assert not set(names) & set(CANDIDATES)  # a process for each candidate
    assert len(names) <= 4
    asked = bench_step.parsed([*given, "--models", "toy", "--precision", "fp32", "--rounds", "2"])
    assert (asked.models, asked.precision, asked.rounds) == (["toy"], "fp32", 2)


def test_trl_is_left_out_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_material, "find_spec", lambda _: None)
    monkeypatch.setattr("venv.create", lambda *_, **__: pytest.fail("downloads"))
    options = bench_step.parsed(["--device", "cuda"])
    assert bench_step.with_rival(options, tmp_path) is None
    assert options.arms == ["plain-cached"]
    assert "TRL is not installed: trl left out; give --install-rival" in capsys.readouterr().out
