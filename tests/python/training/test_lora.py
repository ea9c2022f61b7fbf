"""LoRA options: each starts at the base, its gradients are exact, and bad settings are refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from peft import LoraConfig
from safetensors.torch import load_file
from stop_after import stop_after
from tiny_models import FAMILIES, GROUPED, WORDS, tiny, word_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig

from logratio.errors import ConfigError, LogratioError
from logratio.logps.checks import batch_of
from logratio.logps.completion import score, transformer
from logratio.logps.head import Head
from logratio.training import LoraSettings, TrainConfig, load_model, read_lora_config, train
from logratio.training.bfloat16 import held_in_bfloat16, with_bfloat16_adapters
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.config import Precision
from logratio.training.lora import use_dropout, with_lora
from logratio.training.models import autocast
from logratio.training.reference import AdapterReference, evaluating
from logratio.training.run_folder import identity
from logratio.training.trainer import DPOTrainer

CPU = torch.device("cpu")
GROUPS = [
    ([1, 5, 6, 7, 3, 9], [[4, 8, 11, 2], [12, 3, 2]]),
    ([1, 10, 13], [[6, 6, 14, 15, 2], [9, 2]]),
]
ENDS = ("lm_head", "embed_tokens", "model.norm")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init": "gaussian"},
    "saved": {"modules_to_save": ENDS},
    "everything": {"use_rslora": True, "use_dora": True, "modules_to_save": ENDS},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def policy(precision: Precision = "fp32", family: str = "llama", **options: Any) -> Any:
    """Build a policy like a run does, at its start."""
    base: nn.Module = tiny(FAMILIES[family](), scale=2.0).requires_grad_(False)
    if precision == "bf16":
        base = held_in_bfloat16(base)
    base = base.bfloat16() if precision == "bf16-weights" else base
    model = with_lora(base, LoraSettings(rank=4, **options), Path())
    return model if precision == "fp32" else with_bfloat16_adapters(model)


def moved(model: Any, seed: int = 1) -> Any:
    """Change all trained weights, as updates would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def logps(model: nn.Module, precision: Precision = "fp32") -> Tensor:
    with autocast(precision, CPU):
        return score(model, batch_of(GROUPS, "shared"))


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Compute the weights of the adapted model in float64 from the published formulas.

    LoRA: W + s·BA. DoRA: m · (W + s·BA) / ‖W + s·BA‖ for each row, with the norm held constant.
    """
    own = {name: p.double() for name, p in model.get_base_model().named_parameters()}
    weights = {}
    for name, value in own.items():
        layer, _, kind = name.rpartition(".")
        if ".original_module" in layer or "lora_" in name:
            continue
        if ".modules_to_save.default" in layer:
            weights[f"{layer.replace('.modules_to_save.default', '')}.{kind}"] = value
        elif layer.endswith(".base_layer") and kind == "weight":
            weights[f"{layer.removesuffix('.base_layer')}.weight"] = _adapted(model, layer, own)
        else:
            weights[name] = value
    return weights


def _adapted(model: Any, layer: str, own: dict[str, Tensor]) -> Tensor:
    stem, settings = layer.removesuffix(".base_layer"), model.peft_config["default"]
    rank = settings.r**0.5 if settings.use_rslora else settings.r
    a, b = (own[f"{stem}.lora_{which}.default.weight"] for which in "AB")
    weight: Tensor = own[f"{layer}.weight"] + settings.lora_alpha / rank * (b @ a)
    if not settings.use_dora:
        return weight
    magnitude: Tensor = own[f"{stem}.lora_magnitude_vector.default.weight"]
    scale: Tensor = magnitude / weight.norm(dim=1).detach()
    return scale[:, None] * weight


def oracle(model: Any) -> Tensor:
    """Score every completion alone with a float64 model of the adapted weights; differentiable."""
    plain = tiny(FAMILIES["llama"](), scale=2.0).double()
    weights, found = whole_weights(model), []
    for prompt, completions in GROUPS:
        for ids in completions:
            row = torch.tensor([[*prompt, *ids]])
            output: Any = torch.func.functional_call(plain, weights, kwargs={"input_ids": row})
            logits = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logits.gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(found)


@every_option
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_every_option_starts_at_its_base(options: dict[str, Any], precision: Precision) -> None:
    model = policy(precision, **options)
    with torch.no_grad():
        start = logps(model, precision)
        with model.disable_adapter():
            base = logps(model, precision)
    assert torch.allclose(start, base, rtol=0, atol=1e-5 if precision == "fp32" else 0.02)


def test_orthogonal_adapters_start_at_their_base_and_are_not_zero() -> None:
    model = policy(init="orthogonal")
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(bool(p.any()) for p in factors)
    with torch.no_grad(), model.disable_adapter():
        base = logps(model)
    assert torch.allclose(logps(model), base, rtol=0, atol=1e-5)


@every_option
def test_log_probs_and_gradients_equal_float64(options: dict[str, Any]) -> None:
    model = moved(policy(**options))
    found = logps(model)
    weights = torch.linspace(-1, 1, len(found))
    (found * weights).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    truth = oracle(model)
    (truth * weights).sum().backward()
    assert torch.allclose(found.double(), truth, rtol=0, atol=1e-4)
    for name, parameter in trained.items():
        expected = parameter.grad
        assert float((own[name] - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-6, name


@every_option
@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_bfloat16_stays_near_float64(options: dict[str, Any], precision: Precision) -> None:
    model = moved(policy(precision, **options))
    found = logps(model, precision)
    truth = oracle(model).detach()
    assert float((found.detach().double() - truth).norm() / truth.norm()) < 0.03
    found.sum().backward()
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    low = precision == "bf16-weights" and "modules_to_save" in options
    assert kinds == {torch.float32, *([torch.bfloat16] if low else [])}


def test_disabled_adapters_use_the_original_layers_exactly() -> None:
    """The head is read from the wrapper of peft: the trained copy, or the original."""
    base = tiny(FAMILIES["llama"](), scale=2.0)
    model = moved(policy(modules_to_save=ENDS, use_dora=True))
    inner, wrapper = transformer(model), model.get_base_model().lm_head
    head = Head.of(inner)
    assert head is not None
    assert head.weight is wrapper.modules_to_save["default"].weight
    assert head.is_trained
    with model.disable_adapter():
        disabled = Head.of(inner)
        assert disabled is not None
        assert disabled.weight is wrapper.original_module.weight
    batch = batch_of(GROUPS, "shared")
    assert torch.equal(AdapterReference(model).logps(batch), score(base, batch).detach())
    assert float((logps(model) - score(base, batch)).detach().abs().max()) > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_drop_values_and_only_in_training_passes(dora: bool) -> None:
    model = moved(policy(dropout=0.5, use_dora=dora))
    with evaluating(model):
        exact = logps(model)
    use_dropout(model)
    dropping = {type(m).__name__ for m in model.modules() if m.training}
    assert dropping == {"Dropout", "Linear"}
    assert not transformer(model).training
    first, second = logps(model), logps(model)
    assert not torch.equal(first, second)
    with evaluating(model):
        assert torch.equal(logps(model), exact)
    torch.manual_seed(5)
    again = logps(model)
    torch.manual_seed(5)
    assert torch.equal(logps(model), again)
    state = torch.random.get_rng_state()
    AdapterReference(model).logps(batch_of(GROUPS, "shared"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_averages_to_the_whole_adapter() -> None:
    """Kept values are divided by the share that is kept (inverted dropout)."""
    model = moved(policy(dropout=0.5, targets=("q_proj",)))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = layer(x)
        use_dropout(model)
        torch.manual_seed(0)
        mean = layer(x.expand(20_000, -1)).mean(0)
    assert torch.allclose(mean, exact[0], rtol=0, atol=0.02 * float(exact.abs().max()))


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model,
        [pairs_file],
        tmp_path / "out",
        lr=1e-2,
        batch_size=4,
        epochs=2,
        save_every=0,
        lora=LoraSettings(rank=4, dropout=0.2),
    )


def with_(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in train(config, show_progress=False).history]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": "all"}])
def test_a_run_with_dropout_is_repeated_and_resumed_bit_for_bit(
    config: TrainConfig, tmp_path: Path, more: dict[str, Any]
) -> None:
    config = with_(config, **more)
    straight = losses(with_(config, output=tmp_path / "straight"))
    with pytest.raises(RunInterruptedError), stop_after(3):
        losses(config)
    assert losses(with_(config, resume=True)) == straight[3:]
    one, other = adapter(tmp_path / "straight"), adapter(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = losses(with_(config, output=tmp_path / "seed", seed=1))
    off = losses(with_(config, output=tmp_path / "off", lora=LoraSettings(rank=4)))
    assert straight != off
    assert straight != other_seed
    assert straight[0] == pytest.approx(math.log(2), abs=1e-5), "B is zero before the first update"


def test_recomputed_layers_drop_the_same_values(config: TrainConfig, tmp_path: Path) -> None:
    plain = losses(with_(config, activation_checkpointing="off", output=tmp_path / "plain"))
    twice = losses(with_(config, activation_checkpointing="all", output=tmp_path / "twice"))
    assert twice == plain
    one, other = adapter(tmp_path / "plain"), adapter(tmp_path / "twice")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ENDS}])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_a_run_saves_what_it_trained(
    config: TrainConfig, options: dict[str, Any], precision: Precision
) -> None:
    config = with_(config, lora=LoraSettings(rank=4, **options), precision=precision, epochs=6)
    trainer = DPOTrainer(config=config, show_progress=False)
    history = trainer.train().history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in adapter(Path(config.output))}
    assert names >= {"lora_A", "lora_B"}
    assert ("lm_head" in names) == ("modules_to_save" in options)
    batch = batch_of([([1, 4, 5], [[8, 12, 2], [13, 2]])], "padded")
    found = load_model(config.output, precision=precision, frozen=True)
    with torch.no_grad(), autocast(precision, CPU):
        gap = (score(found, batch) - score(trainer.updater.policy, batch)).abs().max()
    assert float(gap) < (1e-5 if precision == "fp32" else 0.1)


def test_the_forecast_counts_layers_that_are_trained_whole(config: TrainConfig) -> None:
    plain, saved = (
        DPOTrainer(config=with_(config, lora=lora), dry_run=True, show_progress=False).forecast
        for lora in (LoraSettings(), LoraSettings(modules_to_save=("lm_head",)))
    )
    weights = len(WORDS) * 32
    assert saved.memory_bytes - plain.memory_bytes == pytest.approx(16 * weights, rel=0.01)


REFUSED = [
    ({"rank": 0}, "rank must be at least 1"),
    ({"alpha": 0.0}, "alpha must be above 0"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ({"modules_to_save": ("heads",)}, "'heads' matches no layer .* choose from .*lm_head"),
    ({"modules_to_save": ("mlp",)}, "model.layers.0.mlp, which is not a single layer"),
    ({"modules_to_save": ("q_proj",)}, "q_proj gets an adapter too"),
    ({"targets": ("lm_head",), "modules_to_save": ("lm_head",)}, "lm_head gets an adapter too"),
    ({"rank": 3, "init": "orthogonal"}, "even rank"),
]


@pytest.mark.parametrize(("lora", "message"), REFUSED)
def test_bad_settings_are_refused_before_the_model_is_loaded(
    config: TrainConfig, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOTrainer(config=with_(config, lora=LoraSettings(**lora)))


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa", "changes the base's weights"),
        ("pissa_niter_16", "changes the base's weights"),
        ("olora", "changes the base's weights"),
        ("loftq", "changes the base's weights"),
        ("eva", "activations on data"),
        ("mica", "checkpoints would not contain"),
        (False, "would not start as the reference"),
    ],
)
def test_an_initialisation_without_an_exact_reference_is_refused(init: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        LoraSettings(init=init)


def test_orthogonal_adapters_in_bfloat16_are_refused(config: TrainConfig) -> None:
    lora = LoraSettings(rank=4, init="orthogonal")
    with pytest.raises(ConfigError, match=r"lora\.init orthogonal needs precision fp32"):
        DPOTrainer(config=with_(config, lora=lora, precision="bf16"))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_copy_of_one_end_of_a_tied_model_is_refused(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    sizes = {**GROUPED, "vocab_size": len(WORDS), "tie_word_embeddings": True}
    tiny(LlamaConfig(**sizes, pad_token_id=0), scale=2.0).save_pretrained(tmp_path / "tied")
    word_tokenizer().save_pretrained(tmp_path / "tied")
    lora = LoraSettings(modules_to_save=(name,))
    with pytest.raises(ConfigError, match="share one matrix"):
        DPOTrainer(config=with_(config, model=tmp_path / "tied", lora=lora))


def test_saved_layers_in_bfloat16_need_an_optimizer_with_copies(config: TrainConfig) -> None:
    lora = LoraSettings(modules_to_save=("lm_head",))
    low = with_(config, lora=lora, precision="bf16-weights", optimizer="adamw8bit")
    with pytest.raises(ConfigError, match="adamw8bit keeps no float32 copy"):
        DPOTrainer(config=low)


def test_names_of_peft_are_accepted() -> None:
    given: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_dropout": 0.1,
        "init_lora_weights": True,
    }  # fmt: skip
    assert LoraSettings(**given) == LoraSettings(4, 8.0, ("q_proj",), 0.1)


def test_runs_of_the_first_version_count_as_equal(config: TrainConfig) -> None:
    """It recorded rank, alpha and targets only."""
    first = identity(with_(config, lora=LoraSettings(rank=4)))["lora"]
    assert first == {"rank": 4, "alpha": 32.0, "targets": []}
    assert identity(config)["lora"] == first | {"dropout": 0.2}


def written(path: Path, **settings: Any) -> Path:
    path.write_text(json.dumps({"peft_type": "LORA"} | settings))
    return path


def test_a_config_that_peft_wrote_is_read(tmp_path: Path) -> None:
    made = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj"], use_rslora=True,
        use_dora=True, modules_to_save=["lm_head"], init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    made.save_pretrained(str(tmp_path))
    expected = LoraSettings(4, 8.0, ("q_proj",), 0.1, True, True, ("lm_head",), "gaussian")
    assert read_lora_config(tmp_path / "adapter_config.json") == expected
    assert read_lora_config(tmp_path) == expected


def test_missing_fields_of_a_config_have_the_defaults_of_peft(tmp_path: Path) -> None:
    found = read_lora_config(written(tmp_path / "a.json", target_modules="all-linear"))
    assert found == LoraSettings(rank=LoraConfig().r, alpha=float(LoraConfig().lora_alpha))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, 'bias "all" not supported'),
        ({"rank_pattern": {"q": 2}, "layers_to_transform": [1]}, "layers_to_transform .* rank_pat"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"lora_bias": True}, "lora_bias"),
        ({"a_new_field": 3}, "a_new_field 3"),
        ({"target_modules": ".*proj"}, "is a pattern"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"r": "16"}, "rank must be a whole number"),
    ],
)
def test_fields_of_a_config_are_never_ignored(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "a.json", **{"target_modules": ["q_proj"]} | settings)
    with pytest.raises(LogratioError, match=message):
        read_lora_config(path)


def test_a_config_file_takes_the_place_of_the_flags(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.json", r=2, target_modules=["q_proj"], use_dora=True)
    given = ("train", "--model", tiny_model, "--data", pairs_file, "--output", tmp_path / "o")
    code, _, err = run(*given, "--lora-config", path, "--max-steps", 1)
    assert code == 0, err
    settings = json.loads((tmp_path / "o" / "training.json").read_text())["lora"]
    assert (settings["rank"], settings["targets"], settings["use_dora"]) == (2, ["q_proj"], True)
    code, _, err = run(*given, "--lora-config", path, "--lora-rank", 4)
    assert (code, "lora-rank and lora-config: give one of them" in err) == (2, True)
    code, _, err = run(*given, "--lora-config", tmp_path / "none.json")
    assert (code, "no such file" in err) == (2, True)


def test_flags_set_every_option(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        *("train", "--model", tiny_model, "--data", pairs_file, "--output", tmp_path / "o"),
        *("--lora", "--lora-rank", 2, "--lora-dropout", 0.1, "--use_rslora", "--use-dora"),
        *("--lora-modules-to-save", "lm_head", "--lora-modules-to-save", "model.norm"),
        *("--lora-init", "gaussian", "--max-steps", 1),
    )
    assert code == 0, err
    saved = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["use_dora"], saved["lora_dropout"]) == (True, True, 0.1)
    assert saved["modules_to_save"] == ["lm_head", "model.norm"]
    assert saved["init_lora_weights"] == "gaussian"
