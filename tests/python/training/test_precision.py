"""Precision: how far bfloat16 is from float32, and that layouts differ by no more than rounding."""

import dataclasses
import gc
import gzip
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny
from torch import Tensor, nn

from logratio.data import PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.feed import lay_out
from logratio.logps.batch import to_torch
from logratio.logps.completion import score, transformer
from logratio.training import (
    EvaluateConfig,
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    evaluate,
    load_model,
    models,
    precomputation,
    precompute,
    train,
    update_loop,
)
from logratio.training import trainer as trainer_module
from logratio.training.config import Precision
from logratio.training.fingerprint import model_fingerprint
from logratio.training.models import autocast, default_precision, precision_of
from logratio.training.policy import build_policy
from logratio.training.reference import AdapterReference, StaleCacheError, build_reference
from logratio.training.run_folder import identity, settings_of

LOW: tuple[Precision, ...] = ("bf16", "bf16-weights")
CUDA = torch.device("cuda")
low = pytest.mark.parametrize("precision", LOW)


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=2e-3, batch_size=8, epochs=8, save_every=0
    )


def logps(folder: Path, precision: Precision, data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's log-prob, their sums, and their numbers, of 40 pairs in the shared layout."""
    rules = TokenizationRules(max_length=256)
    store, _ = build_store([data], PreferenceTokenizer.load(folder, rules), max_bad_fraction=1.0)
    batch = to_torch(lay_out(store, np.arange(min(40, len(store))), "shared"))
    with torch.no_grad(), autocast(precision, torch.device("cpu")):
        per_token = score(load_model(folder, precision=precision), batch)
    return per_token, batch.targets.sums(per_token), batch.targets.lengths


@low
def test_log_probs_are_near_those_of_float32(
    shared: Path, tmp_path: Path, precision: Precision
) -> None:
    """The bounds that README states; measured on 100 pairs: 0.04, 1.4 and 1.4 nats."""
    folder, data = shared / "models/stories260K", tmp_path / "hh.jsonl"
    with gzip.open(shared / "data/hh/harmless-base.test.jsonl.gz", "rt") as lines:
        data.write_text("".join(islice(lines, 50)))
    exact, exact_sums, lengths = logps(folder, "fp32", data)
    tokens, sums, _ = logps(folder, precision, data)
    assert (tokens.dtype, sums.dtype) == (torch.float32, torch.float64)
    gap = (tokens - exact).abs()
    assert 0 < float(gap.mean()) <= 0.05
    assert float(gap.max()) <= 2.0
    walk = (lengths / 64).clamp(min=1).sqrt()
    assert bool(((sums - exact_sums).abs() <= 3.0 * walk).all())


def test_sums_are_added_up_in_float32(tiny_model: Path) -> None:
    """Of 300 tokens a sum in bfloat16 would be off by nats."""
    model = tiny(FAMILIES["llama"]()).bfloat16()
    from logratio.logps.checks import batch_of

    batch = batch_of([([1, 2, 3], [[5, 7, 11] * 100])], "shared")
    with torch.no_grad():
        tokens = score(model, batch)
    truth = tokens.double().sum()
    assert float(batch.targets.sums(tokens)[0].double() - truth) == pytest.approx(0, abs=1e-2)
    assert abs(float(tokens.bfloat16().cumsum(0, dtype=torch.bfloat16)[-1]) - float(truth)) > 1


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_weights_are_rounded_and_adapters_are_not(
    config: TrainConfig, lora: LoraSettings | None
) -> None:
    changed = dataclasses.replace(config, precision="bf16-weights", lora=lora)
    policy = build_policy(changed, "cpu")
    trained = {p.dtype for p in policy.parameters() if p.requires_grad}
    assert trained == {torch.float32 if lora else torch.bfloat16}
    assert any(p.dtype == torch.bfloat16 for p in policy.parameters())
    reference = build_reference(changed, policy)
    model = getattr(reference, "model", policy)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def parameters_of(shape: torch.Size) -> set[int]:
    """Storages of all parameters of a shape that are alive in this process."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is nn.Parameter]
    return {p.untyped_storage().data_ptr() for p in alive if p.shape == shape}


@pytest.mark.parametrize("precision", ["fp32", "bf16-weights"])
def test_with_adapters_the_reference_is_no_second_model(
    config: TrainConfig, precision: Precision
) -> None:
    """One embedding comes into being for policy and reference together; two with a frozen one."""
    lora = dataclasses.replace(config, lora=LoraSettings(rank=4), precision=precision)
    for changed, copies in ((lora, 1), (dataclasses.replace(lora, reference=config.model), 2)):
        shape = torch.Size((20, 32))
        before = parameters_of(shape)
        policy = build_policy(changed, "cpu")
        reference = build_reference(changed, policy)
        tied = policy.get_input_embeddings().weight.shape  # type: ignore[operator]
        assert tied == shape
        matrices = parameters_of(shape) - before
        heads = 2  # the embedding and the head, which are not tied in this model
        assert len(matrices) == heads * copies
        assert isinstance(reference, AdapterReference) == (copies == 1)
        del policy, reference


@low
def test_a_reference_is_computed_as_the_policy_is(
    config: TrainConfig, precision: Precision
) -> None:
    cache = Path(config.output).with_name("cache")
    settings: dict[str, Any] = {"precision": precision, "epochs": 1, "overwrite": True}
    precompute(PrecomputeConfig(config.model, config.data, cache, precision=precision))
    changed = dataclasses.replace(config, cache=cache, **settings)
    cached = train(changed, show_progress=False).history
    live = train(dataclasses.replace(changed, cache=None), show_progress=False).history
    for one, other in zip(cached, live, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    for another in {"fp32", *LOW} - {precision}:
        with pytest.raises(StaleCacheError, match="differs in compute_dtype"):
            train(dataclasses.replace(changed, precision=another), show_progress=False)


def test_every_precision_is_a_reference_of_its_own(tiny_model: Path) -> None:
    found = {p: model_fingerprint(tiny_model, p) for p in ("fp32", *LOW)}
    assert len({fingerprint.name for fingerprint in found.values()}) == 3
    assert found["bf16-weights"].hard["compute_dtype"] == "bfloat16"


@low
def test_evaluation_computes_in_it(config: TrainConfig, precision: Precision) -> None:
    model = str(config.model)
    result = evaluate(
        EvaluateConfig(model, model, config.data, beta=0.1, precision=precision),
        show_progress=False,
    )
    assert result.margin == 0.0
    assert result.logratio_chosen == 0.0


@low
def test_a_loss_curve_lies_within_the_spread_of_padded_reruns(
    config: TrainConfig, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reruns round elsewhere: other micro-batches, and another kernel of attention."""

    def curve(layout: str, kernel: str = "sdpa", **changes: Any) -> np.ndarray:
        def build(config: TrainConfig, device: str) -> nn.Module:
            policy = build_policy(config, device)
            transformer(policy).set_attn_implementation(kernel)
            return policy

        monkeypatch.setattr(trainer_module, "build_policy", build)
        monkeypatch.setattr(update_loop, "choose_layout", lambda *_, **__: (layout, "asked for"))
        changed = dataclasses.replace(config, precision=precision, overwrite=True, **changes)
        return np.array([row["loss"] for row in train(changed, show_progress=False).history])

    def far(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one - other).mean())

    reruns = [("sdpa", 1), ("eager", 8192), ("sdpa", 8192), ("eager", 1)]
    padded = [curve("padded", kernel, token_budget=tokens) for kernel, tokens in reruns]
    spread = max(far(one, other) for one in padded for other in padded)
    shared = curve("shared")
    wrong = curve("shared", lr=1.1 * config.lr)
    assert min(far(shared, one) for one in padded) <= spread
    assert min(far(wrong, one) for one in padded) > spread > 0


@pytest.fixture
def default_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose on this CPU as on a GPU."""
    chosen = models.default_precision
    monkeypatch.setattr(models, "default_precision", lambda _: chosen(CUDA))


def test_it_depends_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_precision(torch.device("cpu")) == "fp32"
    assert default_precision(CUDA) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: False)
    assert default_precision(CUDA) == "fp32"  # before Ampere, bf16 is emulated


def test_an_explicit_precision_overrides_the_default(
    config: TrainConfig, default_is_bf16: None
) -> None:
    assert precision_of(config) == "bf16"
    assert precision_of(dataclasses.replace(config, precision="fp32")) == "fp32"
    remote = PrecomputeConfig(config.model, config.data, "cache", engine="ray", device="cuda")
    assert precision_of(remote) == "bf16"  # without a GPU here


def test_all_commands_agree_before_the_first_fingerprint(
    config: TrainConfig, default_is_bf16: None, tmp_path: Path
) -> None:
    """A cache that `precompute` fills with the default is a hit for `train` with the default."""
    cache = tmp_path / "cache"
    wanted = PrecomputeConfig(config.model, config.data, cache, device="cpu")
    scored = precomputation.prepare(wanted, show_progress=False)
    assert "precision bf16 (default on this device)" in scored.forecast.notes
    assert scored.fingerprint.precision == "bf16"
    assert scored.run().new > 0
    assert identity(config) == identity(dataclasses.replace(config, precision="bf16"))
    evaluated = EvaluateConfig(config.model, config.model, config.data, device="cpu")
    assert precision_of(evaluated) == "bf16"
    trained = train(dataclasses.replace(config, cache=cache, epochs=1), show_progress=False)
    settings = settings_of(trained.output)
    assert settings is not None
    assert settings["precision"] == settings["identity"]["precision"] == "bf16"
    assert settings["deterministic"] is False


def test_a_miss_names_the_precision_as_its_cause(
    config: TrainConfig,
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    precomputation.prepare(PrecomputeConfig(config.model, config.data, cache, device="cpu")).run()
    monkeypatch.setattr(models, "default_precision", lambda _: "bf16")
    with pytest.raises(StaleCacheError) as missed:
        trainer_module.DPOTrainer(
            config=dataclasses.replace(config, cache=cache), show_progress=False
        )
    assert "was filled with precision fp32, and this run computes in bf16" in str(missed.value)
    assert "give precision fp32 here" in str(missed.value)
    model = make_model("other", seed=1)
    other = dataclasses.replace(config, model=model, output=tmp_path / "another", cache=cache)
    with pytest.raises(StaleCacheError, match="was filled with a different reference"):
        trainer_module.DPOTrainer(config=other, show_progress=False)
