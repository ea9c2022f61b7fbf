"""Models and tokenizers given as objects train like the folders that they were loaded from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from peft import LoraConfig, PeftModel, get_peft_model
from stop_after import stop_after
from tiny_models import FAMILIES, tiny, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizer

from logratio import DPOTrainer, EvaluateConfig, PrecomputeConfig, TrainConfig, evaluate, precompute
from logratio.errors import ConfigError, SettingTypeError
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.dataset import VocabularyError
from logratio.training.fingerprint import model_fingerprint, parameter_count
from logratio.training.given_model import GivenModel, given_model
from logratio.training.models import ModelFolderError, load_model
from logratio.training.run_folder import RunExistsError, settings_of

# Warnings of peft and transformers about their own arguments are not under test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]

FAST: dict[str, Any] = {"lr": 1e-2, "batch_size": 4, "epochs": 2, "show_progress": False}
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 16)


def load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **more})


def losses(trainer: DPOTrainer) -> list[float]:
    return [values["loss"] for values in trainer.train().history]


@pytest.fixture(scope="module")
def expected(
    tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of training the folder."""
    output = tmp_path_factory.mktemp("expected")
    return losses(DPOTrainer(tiny_model, pairs, output=output, **FAST))


def test_an_object_is_trained_in_place_like_its_folder(
    tiny_model: Path, pairs: Path, tmp_path: Path, expected: list[float]
) -> None:
    model = load(tiny_model)
    output = tmp_path / "policy"
    trainer = DPOTrainer(model, pairs, output=output, **FAST)
    assert losses(trainer) == expected
    saved = load(output).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())
    recorded = settings_of(output) or {}
    assert recorded["model"] == str(tiny_model)
    folder = trainer.config.model
    del trainer
    assert not Path(folder).exists()
    found = evaluate(EvaluateConfig(output, tiny_model, pairs), show_progress=False)
    assert found.accuracy == 1


def test_an_objects_state_does_not_change_the_run(
    tiny_model: Path, pairs: Path, tmp_path: Path, expected: list[float]
) -> None:
    """Dropout, training mode and gradient checkpointing of the object have no effect."""
    model = load(tiny_model, attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    assert losses(DPOTrainer(model, pairs, output=tmp_path / "o", **FAST)) == expected


def test_an_object_continues_where_a_folder_was_interrupted(
    tiny_model: Path, pairs: Path, tmp_path: Path, expected: list[float]
) -> None:
    output = tmp_path / "o"
    with stop_after(3), pytest.raises(RunInterruptedError):
        DPOTrainer(tiny_model, pairs, output=output, save_every=3, **FAST).train()
    again = DPOTrainer(load(tiny_model), pairs, output=output, save_every=3, resume=True, **FAST)
    assert losses(again) == expected[3:]
    changed = load(tiny_model)
    changed.lm_head.weight.data *= 2
    with pytest.raises(RunExistsError, match="differs in model, reference"):
        DPOTrainer(changed, pairs, output=output, **FAST)


def test_a_finished_run_leaves_the_object_unchanged(
    tiny_model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DPOTrainer(tiny_model, pairs, output=tmp_path / "o", **FAST).train()
    model = load(tiny_model)
    assert DPOTrainer(model, pairs, output=tmp_path / "o", **FAST).train().was_finished
    assert torch.equal(model.lm_head.weight, load(tiny_model).lm_head.weight)
    assert "the model in memory is unchanged" in capsys.readouterr().err


def test_the_cache_of_a_folder_serves_its_object(
    tiny_model: Path, pairs: Path, tmp_path: Path, expected: list[float]
) -> None:
    cache = tmp_path / "cache"
    precompute(PrecomputeConfig(tiny_model, pairs, cache), show_progress=False)
    model = load(tiny_model)
    trainer = DPOTrainer(model, pairs, output=tmp_path / "o", cache=cache, **FAST)
    assert losses(trainer) == pytest.approx(expected, abs=1e-6)
    filled = DPOTrainer(
        load(tiny_model), pairs, output=tmp_path / "p", cache=cache, precompute=True, **FAST
    )
    assert losses(filled) == pytest.approx(expected, abs=1e-6)
    assert len(list(cache.iterdir())) == 1


def test_a_reference_in_memory_is_used_and_not_trained(
    tiny_model: Path, make_model: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    other = make_model("other", seed=3)
    reference = load(other)
    folders = DPOTrainer(tiny_model, pairs, reference=other, output=tmp_path / "a", **FAST)
    objects = DPOTrainer(
        load(tiny_model), pairs, reference=reference, output=tmp_path / "b", **FAST
    )
    assert losses(objects) == losses(folders)
    before, after = load(other).state_dict(), reference.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (settings_of(tmp_path / "b") or {})["reference"] == str(other)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_fingerprint_equals_that_of_a_saved_folder(
    family: str, tied: bool, tmp_path: Path
) -> None:
    config = FAMILIES[family]()
    config.tie_word_embeddings = tied
    model: Any = tiny(config)
    model.save_pretrained(tmp_path)
    given = GivenModel(model)
    model.config.save_pretrained(given.folder)
    found, saved = model_fingerprint(given.folder), model_fingerprint(tmp_path)
    assert found.hard == saved.hard
    assert parameter_count(given.folder) == parameter_count(tmp_path)
    assert given_model(tmp_path) is None
    wrapped = GivenModel(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))
    assert wrapped.weights_digest == saved.hard["weights"]
    assert wrapped.parameter_count() == parameter_count(tmp_path)


def test_the_fingerprint_is_that_of_the_start(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    trainer = DPOTrainer(load(tiny_model), pairs, output=tmp_path / "o", **FAST)
    trainer.train()
    assert model_fingerprint(trainer.config.model).hard == model_fingerprint(tiny_model).hard


def test_a_peft_config_and_a_peft_model_train_the_same_adapter(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    wrapped = get_peft_model(load(tiny_model), ADAPTER)
    first = losses(DPOTrainer(wrapped, pairs, output=tmp_path / "a", **FAST))
    base = load(tiny_model)
    second = DPOTrainer(base, pairs, peft_config=ADAPTER, output=tmp_path / "b", **FAST)
    assert losses(second) == first
    third = DPOTrainer(tiny_model, pairs, peft_config=ADAPTER, output=tmp_path / "c", **FAST)
    assert losses(third) == first
    saved = [load_model(tmp_path / name).state_dict() for name in "abc"]
    trained = [name for name in saved[0] if "lora_" in name]
    assert all(torch.equal(one[name], saved[2][name]) for one in saved for name in saved[2])
    assert all(torch.equal(wrapped.state_dict()[name], saved[0][name]) for name in trained)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model)


def trained_adapter(folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    names = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(load(folder), config)
    for name, weight in model.named_parameters():
        weight.data += 0.01 * ("lora_B" in name)
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"], "lora_dropout": 0.5}])
@pytest.mark.parametrize("precision", ["fp32", "bf16-weights"])
def test_a_trained_adapter_is_trained_further_like_its_folder(
    tiny_model: Path, pairs: Path, tmp_path: Path, options: dict[str, Any], precision: Any
) -> None:
    model = trained_adapter(tiny_model, **options)
    model.save_pretrained(tmp_path / "start")
    more: dict[str, Any] = {"precision": precision, "eval_data": pairs, "eval_samples": 1, **FAST}
    given = DPOTrainer(model, pairs, output=tmp_path / "a", **more)
    found = losses(given)
    assert found[0] == pytest.approx(0.693147, abs=1e-6)
    start = tmp_path / "start"
    again = DPOTrainer(
        start, pairs, tokenizer=tiny_model, output=tmp_path / "b", adapter="continue", **more
    )
    assert losses(again) == found
    assert [*model.peft_config] == ["default"]
    assert given.model is model
    first, second = (load_model(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    state = model.state_dict()
    assert all(torch.equal(state[name].float(), first[name]) for name in first if "lora_" in name)
    assert "model was an object in memory" in (tmp_path / "a" / "run.yaml").read_text()
    longer = DPOTrainer(model, pairs, output=tmp_path / "c", **FAST)  # from what it is now
    assert losses(longer)[0] == pytest.approx(0.693147, abs=1e-6)


def test_the_cache_of_a_trained_adapter_serves_its_object(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    start, cache = tmp_path / "start", tmp_path / "cache"
    trained_adapter(tiny_model).save_pretrained(start)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(start)
    precompute(PrecomputeConfig(start, pairs, cache), show_progress=False)
    model = trained_adapter(tiny_model)
    cached = DPOTrainer(model, pairs, cache=cache, output=tmp_path / "a", **FAST)
    live = DPOTrainer(trained_adapter(tiny_model), pairs, output=tmp_path / "b", **FAST)
    assert losses(cached) == pytest.approx(losses(live), abs=1e-6)


def test_a_trained_adapter_may_have_another_reference(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    def run(name: str, **more: Any) -> DPOTrainer:
        return DPOTrainer(
            trained_adapter(tiny_model), pairs, output=tmp_path / name, **FAST, **more
        )

    assert abs(losses(run("r", reference=tiny_model))[0] - 0.693147) > 1e-4
    continued = run("c", reference=tiny_model, adapter="continue")
    assert isinstance(load_model(continued.train().output), PeftModel)
    simpo = run("s", loss="simpo")
    assert isinstance(load_model(simpo.train().output), PeftModel)


def test_the_base_of_an_adapter_must_be_the_model_that_it_names(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """Otherwise the saved adapter would be loaded over other weights."""
    given: dict[str, Any] = {"peft_config": ADAPTER, **FAST}
    low = load(tiny_model, dtype=torch.bfloat16)
    DPOTrainer(low, pairs, output=tmp_path / "a", dry_run=True, **given)
    model = load(tiny_model)
    DPOTrainer(model, pairs, output=tmp_path / "b", **FAST).train()
    with pytest.raises(ConfigError, match=r"the adapter's base differs in .*weight from .*model0"):
        DPOTrainer(model, pairs, output=tmp_path / "c", **given)


def test_the_dropout_of_a_peft_model_is_that_of_its_config(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    dropping = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.5
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(load(tiny_model), dropping)
    trainer = DPOTrainer(wrapped, pairs, output=tmp_path / "a", **FAST)
    plain = DPOTrainer(tiny_model, pairs, peft_config=ADAPTER, output=tmp_path / "b", **FAST)
    # Both adapters start from the same numbers, so that only the dropout differs.
    assert losses(trainer) != losses(plain)
    layers = trainer.updater.policy.named_modules()
    assert {m.p for name, m in layers if isinstance(m, torch.nn.Dropout) and "lora_" in name} == {
        0.5
    }


def test_an_object_with_another_adapter_or_quantization_is_refused(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="quantization applies while weights are loaded"):
        DPOTrainer(
            load(tiny_model),
            pairs,
            output=tmp_path / "o",
            peft_config=ADAPTER,
            quantization="4bit",
            **FAST,
        )
    named = get_peft_model(load(tiny_model), ADAPTER, adapter_name="mine")
    with pytest.raises(ConfigError, match="the adapters mine: keep one, named default"):
        DPOTrainer(named, pairs, output=tmp_path / "o", **FAST)


def test_only_parameters_that_require_gradients_are_trained(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    model = load(tiny_model)
    model.model.embed_tokens.requires_grad_(False)
    DPOTrainer(model, pairs, output=tmp_path / "o", **FAST).train()
    before, after = load(tiny_model), load(tmp_path / "o")
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient"):
        DPOTrainer(model.requires_grad_(False), pairs, output=tmp_path / "p", **FAST)


def test_an_object_keeps_its_bfloat16_weights_unless_a_precision_is_given(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    low = {"dtype": torch.bfloat16}
    trainer = DPOTrainer(load(tiny_model, **low), pairs, output=tmp_path / "a", **FAST)
    assert trainer.config.precision == "bf16-weights"
    folder = DPOTrainer(tiny_model, pairs, output=tmp_path / "b", precision="bf16-weights", **FAST)
    assert losses(trainer) == losses(folder)
    model = load(tiny_model, **low)
    wide = DPOTrainer(model, pairs, output=tmp_path / "c", precision="fp32", **FAST)
    assert losses(wide)[0] == pytest.approx(0.693147, abs=1e-6)
    assert model.dtype == torch.float32


def test_a_tokenizer_may_be_given_with_a_folder(
    tiny_model: Path, pairs: Path, tmp_path: Path, expected: list[float]
) -> None:
    bare = tmp_path / "bare"
    load(tiny_model).save_pretrained(bare)
    tokens = tmp_path / "tokens"
    word_tokenizer().save_pretrained(tokens)
    for number, tokenizer in enumerate((word_tokenizer(), tokens, str(tokens))):
        output = tmp_path / f"o{number}"
        trainer = DPOTrainer(bare, pairs, tokenizer=tokenizer, output=output, **FAST)
        assert losses(trainer) == expected
        assert AutoTokenizer.from_pretrained(output).get_vocab() == word_tokenizer().get_vocab()
        assert (settings_of(output) or {})["model"] == str(bare)


def test_a_tokenizer_may_be_given_with_an_adapters_folder(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    DPOTrainer(tiny_model, pairs, peft_config=ADAPTER, output=adapter, **FAST).train()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / file).unlink()
    trainer = DPOTrainer(
        adapter, pairs, tokenizer=word_tokenizer(), reference=adapter, output=tmp_path / "o", **FAST
    )
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)


def test_an_object_without_a_folder_needs_its_tokenizer(pairs: Path, tmp_path: Path) -> None:
    model: Any = tiny(FAMILIES["llama"]())
    with pytest.raises(ConfigError, match="pass its tokenizer too, as tokenizer="):
        DPOTrainer(model, pairs, output=tmp_path / "o", **FAST)
    given = {"tokenizer": word_tokenizer(), **FAST}
    with pytest.raises(ConfigError, match="could not name it: save it with"):
        DPOTrainer(model, pairs, peft_config=ADAPTER, output=tmp_path / "o", **given)
    DPOTrainer(model, pairs, output=tmp_path / "o", **given).train()
    recorded = settings_of(tmp_path / "o") or {}
    assert recorded["model"] == "LlamaForCausalLM in memory"


def _quantized(model: Any) -> Any:
    model.is_quantized = True
    return model


def _of_meta(model: Any) -> Any:
    return model.to("meta")


def _slow(_: Any) -> Any:
    class Slow(PreTrainedTokenizer):
        vocab_size = 3

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 2}

        def _tokenize(self, text: Any, **_: Any) -> Any:
            return list(text)

    made: Any = Slow
    return made()


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        (lambda model: model.model, ConfigError, "LlamaModel, which is not a causal language"),
        (lambda model: torch.nn.Linear(2, 2), SettingTypeError, "PreTrainedModel, not Linear"),
        (_quantized, ConfigError, "a quantized model in memory is not supported"),
        (_of_meta, ConfigError, "on the meta device"),
        (lambda model: model.to(torch.bfloat16), ConfigError, r"inv_freq was rounded to 16 bits"),
    ],
)
def test_an_object_that_cannot_be_trained_is_refused(
    change: Callable[[Any], Any],
    kind: type[Exception],
    why: str,
    tiny_model: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    for arguments in ({"model": change(load(tiny_model))},
                      {"model": tiny_model, "reference": change(load(tiny_model))}):  # fmt: skip
        with pytest.raises(kind, match=why):
            DPOTrainer(data=pairs, output=tmp_path / "o", **arguments, **FAST)
    assert not (tmp_path / "o").exists()


def test_other_arguments_that_cannot_be_used_are_refused(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    output, model = tmp_path / "o", load(tiny_model)
    with pytest.raises(ConfigError, match="are the same object"):
        DPOTrainer(model, pairs, reference=model, output=output)
    with pytest.raises(ConfigError, match=r"pass model.merge_and_unload\(\)"):
        DPOTrainer(tiny_model, pairs, reference=get_peft_model(model, ADAPTER), output=output)
    with pytest.raises(ConfigError, match="is a peft model already"):
        wrapped = get_peft_model(load(tiny_model), ADAPTER)
        DPOTrainer(wrapped, pairs, peft_config=ADAPTER, output=output)
    with pytest.raises(ConfigError, match="is a slow tokenizer without"):
        DPOTrainer(load(tiny_model), pairs, tokenizer=_slow(None), output=output)
    with pytest.raises(SettingTypeError, match="tokenizer must be a tokenizer of transformers"):
        DPOTrainer(tiny_model, pairs, tokenizer=3, output=output)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        DPOTrainer(tiny_model, pairs, tokenizer=tmp_path, output=output)
    with pytest.raises(ConfigError, match="config holds all settings: leave lr out"):
        DPOTrainer(config=TrainConfig(tiny_model, pairs, output), lr=1.0)
    with pytest.raises(ConfigError, match="needs a model"):
        DPOTrainer(train_dataset=pairs, output=output)
    with pytest.raises(ConfigError, match="is the folder of an input model"):
        DPOTrainer(load(tiny_model), pairs, output=tiny_model)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    model = load(tiny_model)
    model.resize_token_embeddings(10)
    with pytest.raises(VocabularyError, match=r"in-memory.*embedding has 10 rows"):
        DPOTrainer(model, pairs, tokenizer=word_tokenizer(), output=tmp_path / "o", **FAST)


def test_a_dry_run_changes_nothing(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    model = load(tiny_model).train()
    trainer = DPOTrainer(model, pairs, output=tmp_path / "o", dry_run=True, **FAST)
    assert trainer.forecast.memory_bytes > 0
    assert model.training
    assert not (tmp_path / "o").exists()


def test_a_model_of_an_unsupported_kind_is_refused(pairs: Path, tmp_path: Path) -> None:
    model: Any = tiny(FAMILIES["gemma3"]())
    model.config.use_bidirectional_attention = True
    with pytest.raises(ModelFolderError, match="no next-token log-probs"):
        DPOTrainer(model, pairs, tokenizer=word_tokenizer(), output=tmp_path / "o")


def test_the_best_model_and_held_out_data_work_with_an_object(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"eval_share": 0.25, "eval_samples": 2, "max_new_tokens": 4, **FAST}
    output = tmp_path / "a"
    trainer = DPOTrainer(load(tiny_model), pairs, output=output, best_metric="loss", **given)
    found = trainer.train().evaluations
    expected = DPOTrainer(tiny_model, pairs, output=tmp_path / "b", best_metric="loss", **given)
    assert found == expected.train().evaluations
    with pytest.raises(ConfigError, match="no copy of the model in memory is kept"):
        DPOTrainer(
            load(tiny_model), pairs, output=tmp_path / "c", cache=tmp_path / "cache", **given
        )
