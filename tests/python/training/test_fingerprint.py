"""Fingerprints: every hard field changes them, and nothing else does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from logratio.cache import DamagedFingerprintError
from logratio.cache.identity import record_conditions
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    load_model,
    precompute,
    train,
)
from logratio.training.fingerprint import (
    Fingerprint,
    model_fingerprint,
    model_settings,
    parameter_count,
    stored_fingerprint,
)
from logratio.training.lora import with_lora
from logratio.training.models import ModelFolderError
from logratio.training.precomputation import prepare
from logratio.training.reference import (
    StaleCacheError,
    open_cache,
    soft_differences,
    stored_conditions,
)
from logratio.training.reference_scorer import write_fingerprint

Change = Callable[[Path], None]


def change_config(name: str, value: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def change_weights(edit: Callable[[dict[str, object]], object]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)  # type: ignore[arg-type]
        save_file(tensors, path)

    return change


NORM = "model.norm.weight"


def one_bit(tensors: dict[str, object]) -> None:
    tensors[NORM].view(-1)[0] += 1e-7 * tensors[NORM].view(-1)[0].abs() + 1e-7  # type: ignore[attr-defined]


def another_name(tensors: dict[str, object]) -> None:
    tensors["model.other.weight"] = tensors.pop(NORM)


def another_shape(tensors: dict[str, object]) -> None:
    tensors[NORM] = tensors[NORM].reshape(2, -1)  # type: ignore[attr-defined]


def another_dtype(tensors: dict[str, object]) -> None:
    tensors[NORM] = tensors[NORM].bfloat16()  # type: ignore[attr-defined]


def another_tensor(tensors: dict[str, object]) -> None:
    tensors["model.extra.weight"] = tensors[NORM].clone()  # type: ignore[attr-defined]


def one_tensor_less(tensors: dict[str, object]) -> None:
    del tensors[NORM]


def shadow(folder: Path) -> None:
    """A file that transformers does not load holds a tensor of the same name."""
    tensors = load_file(folder / "model.safetensors")
    save_file({NORM: tensors[NORM] + 1}, folder / "zzz.safetensors")


def default_rope(**settings: object) -> Change:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **settings}
    return change_config("rope_parameters", rope)


HARD: dict[str, tuple[Change, str]] = {
    "one bit": (change_weights(one_bit), "weights"),
    "tensor's name": (change_weights(another_name), "weights"),
    "tensor's shape": (change_weights(another_shape), "weights"),
    "tensor's dtype": (change_weights(another_dtype), "weights"),
    "a tensor more": (change_weights(another_tensor), "weights"),
    "a tensor less": (change_weights(one_tensor_less), "weights"),
    "a name twice": (shadow, "weights"),
    "rope_theta": (default_rope(rope_theta=50000.0), "config"),
    "rope_scaling": (default_rope(rope_type="linear", factor=2.0), "config"),
    **{
        name: (change_config(name, value), "config")
        for name, value in {
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
            "hidden_act": "gelu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "vocab_size": 32,
            "max_position_embeddings": 256,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "pad_token_id": 3,
            "model_type": "mistral",
            "final_logit_softcapping": 30.0,
            "logit_scale": 0.5,
            "quantization_config": {"quant_method": "gptq", "bits": 4},
            "a_field_of_tomorrow": 1,
        }.items()
    },
}


@pytest.mark.parametrize("name", HARD)
def test_hard_fields(make_model: Callable[..., Path], name: str) -> None:
    change, field = HARD[name]
    folder = make_model("model")
    before = model_fingerprint(folder)
    change(folder)
    after = model_fingerprint(folder)
    assert before.digest != after.digest
    assert before.differences(after.hard) == [field]
    assert after.explain(before.hard).startswith(field)


def test_a_changed_hard_field_misses_the_cache(
    make_model: Callable[..., Path], pairs_file: Path, tmp_path: Path
) -> None:
    """Each field is changed alone, and all 32 completions are missing then (F18)."""
    config = PrecomputeConfig(make_model("model"), [pairs_file], tmp_path / "cache")
    first = precompute(config, show_progress=False)
    assert len(prepare(config, show_progress=False).missing) == 0
    for number, (name, (change, field)) in enumerate(HARD.items()):
        folder = make_model(f"model-{number}")
        change(folder)
        other = model_fingerprint(folder)
        with pytest.raises(StaleCacheError, match=f"differs in .*{field}"):
            open_cache(config.cache, other)
        asked = dataclasses.replace(config, model=folder)
        assert len(prepare(asked, show_progress=False).missing) == first.new, name


def test_a_name_in_two_files_counts_with_both(make_model: Callable[..., Path]) -> None:
    """Which of them is loaded is transformers' choice."""
    folder = make_model("model")
    shadow(folder)
    before = model_fingerprint(folder)
    change_weights(one_bit)(folder)
    assert model_fingerprint(folder).digest != before.digest


def test_an_adapters_bytes_and_scale_are_hard(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    policy = with_lora(load_model(tiny_model), LoraSettings(rank=2), tiny_model)
    policy.save_pretrained(folder)  # type: ignore[operator]
    seen = [model_fingerprint(tiny_model).digest, model_fingerprint(folder).digest]
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "lora_alpha": 7}))
    seen.append(model_fingerprint(folder).digest)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    seen.append(model_fingerprint(folder).digest)
    seen.append(model_fingerprint(folder, "bf16").digest)
    assert len(set(seen)) == 5
    turned = {**settings, "lora_alpha": 7, "target_modules": settings["target_modules"][::-1]}
    path.write_text(json.dumps({**turned, "lora_dropout": 0.5, "peft_version": "0"}))
    assert model_fingerprint(folder).digest == seen[3]


@pytest.mark.parametrize(
    "change",
    [
        change_config("transformers_version", "9.9"),
        change_config("_name_or_path", "elsewhere"),
        change_config("use_cache", False),
        change_config("dtype", "bfloat16"),
        change_config("attention_dropout", 0.5),
        change_config("attn_implementation", "eager"),
        change_config("architectures", ["OtherName"]),
        change_config("id2label", {"0": "good", "1": "bad"}),
        default_rope(rope_theta=10000),
    ],
)
def test_what_cannot_change_a_log_prob(make_model: Callable[..., Path], change: Change) -> None:
    folder = make_model("model")
    before = model_fingerprint(folder)
    change(folder)
    assert model_fingerprint(folder).digest == before.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_default_equals_an_omitted_one(tmp_path: Path, family: str) -> None:
    config = FAMILIES[family]()
    spelled, left_out = tmp_path / "spelled", tmp_path / "left_out"
    for folder, is_short in ((spelled, False), (left_out, True)):
        folder.mkdir()
        written = json.loads(config.to_json_string(use_diff=False))
        default = json.loads(type(config)().to_json_string(use_diff=False))
        if is_short:
            kept = ("model_type", *(k for k in written if written[k] != default.get(k)))
            written = {name: written[name] for name in kept}
        (folder / "config.json").write_text(json.dumps(written))
    assert len((left_out / "config.json").read_text()) < len((spelled / "config.json").read_text())
    assert model_settings(spelled) == model_settings(left_out)


def test_an_old_name_of_a_setting_equals_the_new_one(make_model: Callable[..., Path]) -> None:
    folder = make_model("model")
    before = model_fingerprint(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    rope = settings.pop("rope_parameters")
    path.write_text(json.dumps({**settings, "rope_theta": rope["rope_theta"]}))
    assert model_fingerprint(folder).digest == before.digest


def test_differences_of_small_fields_show_their_values(make_model: Callable[..., Path]) -> None:
    folder = make_model("model")
    before = model_fingerprint(folder)
    default_rope(rope_theta=50000.0)(folder)
    after = model_fingerprint(folder, "bf16")
    assert after.explain(before.hard) == (
        "compute_dtype float32 -> bfloat16 autocast over float32, "
        "config.rope_parameters.rope_theta 10000 -> 50000"
    )
    change_weights(one_bit)(folder)
    assert before.explain(model_fingerprint(folder).hard).endswith("50000 -> 10000, weights")


def test_a_stored_fingerprint_is_trusted_as_far_as_its_digest(
    tiny_model: Path, tmp_path: Path
) -> None:
    fingerprint = model_fingerprint(tiny_model)
    folder = tmp_path / fingerprint.name
    folder.mkdir()
    write_fingerprint(folder, fingerprint)
    path = folder / "fingerprint.json"
    assert stored_fingerprint(path) == fingerprint
    good = path.read_text()
    forged = json.loads(good)
    forged["hard"]["compute_dtype"] = "bfloat16"
    renamed = Fingerprint(forged["hard"], {}).to_dict()
    for text in ("", "{}", "[]", good[:-9], json.dumps(forged), json.dumps(renamed)):
        path.write_text(text)
        with pytest.raises(DamagedFingerprintError, match=r"fingerprint\.json"):
            stored_fingerprint(path)
        with pytest.raises(DamagedFingerprintError, match=r"fingerprint\.json"):
            open_cache(tmp_path, fingerprint)
        with pytest.raises(StaleCacheError, match=r"fingerprint\.json"):
            open_cache(tmp_path, Fingerprint({"another": 1}, {}))


def test_every_kind_of_writer_leaves_its_soft_fields(tmp_path: Path) -> None:
    for device in ("cpu", "a GPU", "cpu"):
        record_conditions(tmp_path, {"torch": "2.15", "device": device})
    assert len(list(tmp_path.iterdir())) == 2
    assert soft_differences(tmp_path, {"device": "cpu"}) == {"device": "device a GPU (here cpu)"}
    assert soft_differences(tmp_path, {"torch": "2.15", "layout": "shared"}) == {}
    assert soft_differences(tmp_path, {"torch": "3", "device": "a GPU"}) == {
        "device": "device cpu (here a GPU)",
        "torch": "torch 2.15 (here 3)",
    }
    (tmp_path / "conditions-0.json").write_text("[1]")
    with pytest.raises(DamagedFingerprintError, match="conditions-0"):
        stored_conditions(tmp_path)


def test_the_spread_over_files_does_not_matter(make_model: Callable[..., Path]) -> None:
    folder = make_model("model")
    before = model_fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    assert model_fingerprint(folder).digest == before.digest


def test_an_adapter_is_part_of_the_identity(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    config = TrainConfig(tiny_model, [pairs_file], out, lora=LoraSettings(rank=2), batch_size=8)
    train(config, show_progress=False)
    adapter, base = model_fingerprint(out), model_fingerprint(tiny_model)
    assert base.differences(adapter.hard) == ["adapter"]
    parameters = sum(parameter.numel() for parameter in load_model(out).parameters())
    assert parameter_count(out) == parameters


def test_parameters_are_counted_from_headers(tiny_model: Path) -> None:
    expected = sum(parameter.numel() for parameter in load_model(tiny_model).parameters())
    assert parameter_count(tiny_model) == expected


def test_a_cut_file_is_refused(make_model: Callable[..., Path]) -> None:
    path = make_model("model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="safetensors"):
        model_fingerprint(path.parent)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        model_fingerprint(path.parent)


def test_no_model_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError):
        model_fingerprint(tmp_path)
