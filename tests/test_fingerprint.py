"""The reference's identity: every hard field makes another one, nothing else does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from logratio.training import LoraSettings, TrainConfig, load_model, train
from logratio.training.fingerprint import model_fingerprint, parameter_count
from logratio.training.models import ModelFolderError

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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_weights(one_bit), "weights"),
        (change_weights(another_name), "weights"),
        (change_weights(another_shape), "weights"),
        (change_weights(another_dtype), "weights"),
        (change_config("rms_norm_eps", 1e-3), "config"),
        (change_config("sliding_window", 7), "config"),
        (change_config("hidden_act", "gelu"), "config"),
        (change_config("rope_parameters", {"rope_type": "default", "rope_theta": 7.0}), "config"),
        (change_config("quantization_config", {"bits": 4}), "config"),
    ],
)
def test_hard_fields(make_model: Callable[..., Path], change: Change, field: str) -> None:
    folder = make_model("model")
    before = model_fingerprint(folder)
    change(folder)
    after = model_fingerprint(folder)
    assert before.digest != after.digest
    assert before.differences(after.hard) == [field]


@pytest.mark.parametrize(
    "change",
    [
        change_config("transformers_version", "9.9"),
        change_config("_name_or_path", "elsewhere"),
        change_config("use_cache", False),
    ],
)
def test_what_cannot_change_a_log_prob(make_model: Callable[..., Path], change: Change) -> None:
    folder = make_model("model")
    before = model_fingerprint(folder)
    change(folder)
    assert model_fingerprint(folder).digest == before.digest


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
