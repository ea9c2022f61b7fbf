"""An adapter that is trained further: its reference is the adapter as it was, without a copy."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, make_adapter
from conftest import Run, write_pairs
from safetensors.torch import load_file
from stop_after import stop_after
from tiny_models import save_tiny_model
from torch import Tensor, nn

from logratio.errors import ConfigError
from logratio.logps.checks import batch_of
from logratio.logps.completion import completion_loss, score, transformer
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    dpo_loss,
    load_model,
    precompute,
    train,
)
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.config import Precision
from logratio.training.methods.logps import PairLogps
from logratio.training.models import autocast
from logratio.training.policy import REFERENCE, build_policy
from logratio.training.reference import AdapterReference, FrozenReference, build_reference
from logratio.training.trainer import DPOTrainer
from logratio.training.validation import reference_kind

GROUPS = [([1, 4, 5], [[8, 12, 2], [13, 2]]), ([1, 4, 6, 9], [[10, 17, 2], [11, 3, 18, 2]])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module", params=KINDS)
def start(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each kind; never changed by a test."""
    folder = tmp_path_factory.mktemp(request.param) / "start"
    return make_adapter(base, folder, **KINDS[request.param])


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("plain") / "start", **KINDS["plain"])


def settings(start: Path, folder: Path, **changes: Any) -> TrainConfig:
    data = write_pairs(folder / "pairs.jsonl", 16)
    config = TrainConfig(
        start, [data], folder / "out", lr=1e-2, batch_size=4, epochs=2, save_every=0,
        adapter="continue",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in train(config, show_progress=False).history]


def gradients(policy: nn.Module, reference: Any) -> dict[str, Tensor]:
    """Gradients of two micro-batches of DPO, with the reference scored before each."""
    for group in GROUPS:
        batch = batch_of([group], "padded")
        sums = reference.sums(batch)

        def loss(logps: Tensor, part: Any, sums: Tensor = sums) -> Tensor:
            own = part.targets.sums(logps)
            each = part.targets.lengths
            pairs = PairLogps(own[0::2], own[1::2], sums[0::2], sums[1::2], each[0::2], each[1::2])
            return dpo_loss(pairs, beta=0.5).sum()

        completion_loss(policy, batch, loss).backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def nudged(policy: nn.Module) -> nn.Module:
    """Move the trained weights, as updates do."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy


def test_gradients_equal_those_with_a_second_model_in_float64(start: Path, tmp_path: Path) -> None:
    config = settings(start, tmp_path)
    policy = nudged(build_policy(config, "cpu").double())
    assert reference_kind(config) == "adapter"
    reference = build_reference(config, policy)
    assert isinstance(reference, AdapterReference)
    found = gradients(policy, reference)
    other = nudged(build_policy(config, "cpu").double())
    expected = gradients(other, FrozenReference(load_model(start).double()))
    assert found.keys() == expected.keys()
    assert found
    assert not any(f".{REFERENCE}." in name for name in found)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12), name


def test_the_reference_stays_where_the_policy_started(start: Path, tmp_path: Path) -> None:
    policy = build_policy(settings(start, tmp_path), "cpu")
    batch = batch_of(GROUPS, "shared")
    before = score(load_model(start), batch).detach()
    assert torch.equal(score(policy, batch).detach(), before)
    nudged(policy)
    assert torch.equal(AdapterReference(policy).logps(batch), before)
    assert not torch.equal(score(policy, batch).detach(), before)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_a_run_starts_at_ln_2_and_saves_one_adapter(
    start: Path, tmp_path: Path, precision: Precision
) -> None:
    config = settings(start, tmp_path, precision=precision, epochs=4)
    trainer = DPOTrainer(config=config, show_progress=False)
    history = trainer.train().history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["loss"] < 0.9 * math.log(2)
    output = Path(config.output)
    assert not (output / REFERENCE).exists()
    saved, before = (load_file(f / "adapter_model.safetensors") for f in (output, start))
    assert saved.keys() == before.keys()
    assert not any(torch.equal(saved[n].float(), before[n].float()) for n in saved if "lora" in n)
    batch, cpu = batch_of(GROUPS, "padded"), torch.device("cpu")
    again = load_model(output, precision=precision, frozen=True)
    with torch.no_grad(), autocast(precision, cpu):
        gap = (score(again, batch) - score(trainer.updater.policy, batch)).abs().max()
    assert float(gap) < (1e-5 if precision == "fp32" else 0.1)


def test_layers_trained_whole_start_with_their_exact_weights(base: Path, tmp_path: Path) -> None:
    """Under bf16 the frozen head is rounded; the trained copy must not be."""
    start = make_adapter(base, tmp_path / "start", **KINDS["saved"])
    policy = build_policy(settings(start, tmp_path, precision="bf16"), "cpu")
    exact = load_file(start / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    copies = transformer(policy).get_output_embeddings().modules_to_save
    assert torch.equal(copies["default"].weight, exact)
    assert torch.equal(copies[REFERENCE].weight, exact)
    assert not torch.equal(exact, exact.bfloat16().float())


def test_a_cache_is_the_same_reference(plain: Path, tmp_path: Path) -> None:
    config = settings(plain, tmp_path)
    cache = tmp_path / "cache"
    precompute(PrecomputeConfig(plain, config.data, cache), show_progress=False)
    kept = losses(config)
    cached = losses(dataclasses.replace(config, cache=cache, output=tmp_path / "cached"))
    assert cached == pytest.approx(kept, rel=1e-3, abs=1e-5)
    with_cache = build_policy(dataclasses.replace(config, cache=cache), "cpu")
    assert REFERENCE not in with_cache.peft_config  # type: ignore[operator]


def test_a_run_is_resumed_bit_for_bit(plain: Path, tmp_path: Path) -> None:
    config = settings(plain, tmp_path)
    straight = losses(dataclasses.replace(config, output=tmp_path / "straight"))
    with pytest.raises(RunInterruptedError), stop_after(3):
        losses(config)
    assert losses(dataclasses.replace(config, resume=True)) == straight[3:]
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "out")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_reference_is_a_second_model(plain: Path, base: Path, tmp_path: Path) -> None:
    config = settings(plain, tmp_path, reference=base)
    policy = build_policy(config, "cpu")
    assert isinstance(build_reference(config, policy), FrozenReference)
    assert len(losses(config)) == 8


def evaluations(config: TrainConfig) -> list[dict[str, Any]]:
    losses(config)
    lines = (Path(config.output) / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_held_out_samples_compare_with_the_start(plain: Path, tmp_path: Path) -> None:
    """Also if the reference is only in a cache, or is a second model with the same weights."""
    kept = settings(plain, tmp_path, eval_share=0.25, eval_samples=2, max_new_tokens=4)
    second = Path(shutil.copytree(plain, tmp_path / "second"))
    cache = {"cache": tmp_path / "cache", "precompute": True}
    expected = evaluations(dataclasses.replace(kept, output=tmp_path / "a", reference=second))
    found = [evaluations(kept)]
    found.append(evaluations(dataclasses.replace(kept, output=tmp_path / "b", **cache)))  # type: ignore[arg-type]
    for rows in found:
        for name in ("eval_loss", "eval_kl", "eval_reference_sample_length"):
            values = [row[name] for row in rows]
            assert values == pytest.approx([row[name] for row in expected], rel=1e-3, abs=1e-3)


def test_the_forecast_is_that_of_an_adapter(plain: Path, tmp_path: Path) -> None:
    kept, whole = (
        DPOTrainer(
            config=settings(plain, tmp_path, adapter=how), dry_run=True, show_progress=False
        ).forecast
        for how in ("continue", "merge")
    )
    assert kept.memory_bytes < whole.memory_bytes
    assert "the reference is the adapter at its start" in kept.notes
    assert "a second model in memory" in whole.notes


def test_settings_that_do_not_fit_the_folder_are_refused(
    plain: Path, base: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"model": base}, r"is not an adapter; give lora=LoraSettings\(\)"),
        ({"lora": LoraSettings(), "adapter": "merge"}, "logratio merge --model .*start --output"),
        ({"lora": LoraSettings()}, "itself an adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            DPOTrainer(config=settings(plain, tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "trains biases of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "would change the base's weights again"),
        ({"peft_type": "LOHA"}, "type LOHA are not supported"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft's, for LoHa
def test_adapters_that_cannot_be_kept_twice_are_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    start = make_adapter(base, tmp_path / "start", target_modules=["q_proj"])
    path = start / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        DPOTrainer(config=settings(start, tmp_path))


def test_the_command_continues_an_adapter(run: Run, plain: Path, tmp_path: Path) -> None:
    config = settings(plain, tmp_path)
    code, _, err = run(
        *("train", "--model", plain, "--data", config.data[0], "--output", tmp_path / "o"),
        *("--adapter", "continue", "--max-steps", 1),
    )
    assert code == 0, err
    assert "the reference is the adapter at its start" in " ".join(err.split())
    assert (tmp_path / "o" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "o" / "training.json").read_text())["adapter"] == "continue"
