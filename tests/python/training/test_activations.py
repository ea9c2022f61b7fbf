"""Checkpointing and offloading change no gradient; the number of layers is measured."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from gradients import assert_equal, batch, gradients
from safetensors.torch import load_file
from tiny_models import FAMILIES, SIZES, mamba_config, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from logratio.errors import ConfigError
from logratio.logps.completion import score
from logratio.training import LoraSettings, TrainConfig, activations, memory, train
from logratio.training.activations import (
    Choice,
    HostCopy,
    LayerMemory,
    LayerOptions,
    RecomputationError,
    checkpointing_for_memory,
    decoder_layers,
    layer_options,
    layers_that_do_not_fit,
    measure_layers,
)
from logratio.training.lora import with_lora


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_give_the_same_bits(family: str, layout: str) -> None:
    model = tiny(FAMILIES[family]())
    plain = gradients(model, LayerOptions(), layout)
    for count in (1, 2):
        assert_equal(plain, gradients(model, LayerOptions(checkpointed=count), layout))


def test_layers_with_a_state_can_be_checkpointed() -> None:
    model = tiny(mamba_config(), scale=1.0)
    plain = gradients(model, LayerOptions(), "padded")
    assert_equal(plain, gradients(model, LayerOptions(checkpointed=2), "padded"))


@pytest.mark.parametrize(
    "kept", [LayerOptions(checkpointed=1), LayerOptions(2), LayerOptions(1, offload=True)]
)
def test_adapters_get_the_same_gradients(
    kept: LayerOptions, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "WORTH_MOVING", 0)
    model = with_lora(tiny(FAMILIES["llama"]()), LoraSettings(rank=4), tiny_model)
    assert_equal(gradients(model, LayerOptions()), gradients(model, kept))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_offloaded_activations_give_the_same_bits(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "WORTH_MOVING", 0)
    restored: list[tuple[int, ...]] = []
    back = HostCopy.restore

    def restore(copy: HostCopy) -> Tensor:
        restored.append(tuple(copy._host.shape))
        return back(copy)

    monkeypatch.setattr(HostCopy, "restore", restore)
    model = tiny(FAMILIES["llama"]())
    plain = gradients(model, LayerOptions())
    assert_equal(plain, gradients(model, LayerOptions(count, offload=True)))
    weights = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() > 1}
    assert restored
    assert not [shape for shape in restored if tuple(sorted(shape)) in weights]


def test_a_tensor_saved_twice_is_offloaded_once_and_weights_are_not() -> None:
    mover = activations._Mover({(512, 1024)})
    hidden, small = torch.randn(1024, 300), torch.randn(4)
    weight = torch.randn(1024, 512)
    first, again = mover.pack(hidden), mover.pack(hidden)
    assert isinstance(first, HostCopy)
    assert first is again
    assert mover.pack(weight) is weight
    transposed = weight.t()
    assert mover.pack(transposed) is transposed
    assert mover.pack(small) is small
    restored = activations.unpack(first)
    assert torch.equal(restored, hidden)
    assert restored.data_ptr() != hidden.data_ptr()
    assert activations.unpack(again) is restored  # while a reference to it exists


def test_offloaded_tensors_keep_their_strides() -> None:
    """Compiled layers rely on them."""
    turned = torch.randn(3, 5, 7).transpose(0, 2)
    assert HostCopy(turned).restore().stride() == turned.stride()
    assert torch.equal(HostCopy(turned).restore(), turned)
    part = torch.randn(8, 9)[::2, 1:4]
    assert torch.equal(HostCopy(part).restore(), part)


def test_only_the_first_layers_are_recomputed_and_only_with_gradients() -> None:
    model = tiny(LlamaConfig(**{**SIZES, "num_hidden_layers": 5}))
    calls = [0] * 5
    for number, layer in enumerate(decoder_layers(model)):
        norm = layer.get_submodule("input_layernorm")
        norm.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    gradients(model, LayerOptions(checkpointed=3))
    assert calls == [2, 2, 2, 1, 1]
    with torch.no_grad(), layer_options(model, LayerOptions(checkpointed=3)):
        score(model, batch())
    assert calls == [3, 3, 3, 2, 2]


def test_an_earlier_replacement_of_forward_is_restored() -> None:
    model = tiny(FAMILIES["llama"]())
    first, second = decoder_layers(model)
    own = first.forward
    first.forward = own  # libraries that move a layer's inputs replace it too
    with pytest.raises(ZeroDivisionError), layer_options(model, LayerOptions(1)):
        raise ZeroDivisionError
    assert vars(first)["forward"] is own
    assert "forward" not in vars(second)


def test_a_layer_that_fills_a_key_cache_is_not_recomputed() -> None:
    model = tiny(FAMILIES["llama"]())
    with layer_options(model, LayerOptions(1)), pytest.raises(RecomputationError):
        model(torch.ones(1, 3, dtype=torch.int64), use_cache=True)


class ToyLayer(GradientCheckpointingLayer):
    """Saves its input `[T, 8]` and the output of a ReLU, `[T, 32]`, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(hidden)))
        return out


class Toy(PreTrainedModel):
    """Three layers whose memory can be counted by hand."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.layers = nn.ModuleList(ToyLayer() for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("tokens", [5, 64])
def test_saved_tensors_are_counted_by_storage(tokens: int) -> None:
    model, hidden = Toy(), torch.randn(tokens, 8, requires_grad=True)
    expected = LayerMemory(everything=4.0 * tokens * (8 + 32), inputs=4.0 * tokens * 8)
    assert measure_layers(model, lambda: model(hidden)) == [expected] * 3


def test_measuring_counts_what_is_alive_before_the_backward_pass() -> None:
    """The oracle counts the storages of all saved tensors except weights."""
    model, held = tiny(FAMILIES["qwen3"]()), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer = decoder_layers(model)[0]
    before = layer.forward
    with pytest.MonkeyPatch.context() as patch:

        def kept(*args: object, **options: object) -> object:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return before(*args, **options)

        patch.setattr(layer, "forward", kept)
        alive = score(model, batch())
    expected = sum(nbytes for place, nbytes in held.items() if place not in weights)
    assert alive.requires_grad
    assert measure_layers(model, lambda: score(model, batch()))[0].everything == expected


def test_the_fewest_layers_that_fit_are_checkpointed() -> None:
    layers = [LayerMemory(float(kept), 2.0) for kept in (10, 30, 5, 20)]
    for room in range(80):
        totals = [
            sum(x.inputs for x in layers[:n]) + sum(x.everything for x in layers[n:])
            for n in range(5)
        ]
        fits = [n for n in range(5) if totals[n] <= room]
        assert layers_that_do_not_fit(layers, room) == (fits[0] if fits else 4)


def test_the_choice_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(LlamaConfig(**{**SIZES, "num_hidden_layers": 6}))
    passes = itertools.count()

    def forward() -> Tensor:
        next(passes)
        return score(model, batch())

    weights = 4.0 * sum(p.numel() for p in model.parameters())
    layer = measure_layers(model, forward)[0].everything
    monkeypatch.setattr(activations, "TILES", 1000.0)

    def chosen(free: float, estimate: float = 1e12) -> Choice:
        monkeypatch.setattr(memory, "free_on", lambda _: 3 * weights + free / 0.8)
        return checkpointing_for_memory(model, forward, estimate=estimate, states=2 * weights)

    base = (
        1000 + layer
    )  # tiles, one layer's second pass; gradients and moments are subtracted exactly
    before = next(passes)
    assert chosen(base + 100 * layer, estimate=layer) == Choice(0)
    assert next(passes) == before + 1  # an estimate that fits three times is not measured
    assert chosen(base + 6 * layer) == Choice(0)
    some = chosen(base + 4.5 * layer)
    assert some.layers == 2
    assert some.reason is not None
    assert "2 of 6 layers are recomputed" in some.reason
    assert chosen(-3 * weights / 0.8).layers == 6
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=4, epochs=2, save_every=0
    )


def trained(config: TrainConfig, name: str, **changes: object) -> dict[str, Tensor]:
    """Train with changed settings into another folder; return the weights."""
    output = Path(config.output).with_name(name)
    changed = dataclasses.replace(config, output=output, **changes)  # type: ignore[arg-type]
    train(changed, show_progress=False)
    return load_file(next(output.glob("*model.safetensors")))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_gives_the_same_weights(
    config: TrainConfig,
    lora: LoraSettings | None,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"lora": lora, "precision": precision}
    off = trained(config, "off", activation_checkpointing="off", **settings)
    every = trained(config, "all", activation_checkpointing="all", **settings)
    monkeypatch.setattr(memory, "free_on", lambda _: 0.0)
    assert "recomputed" not in capsys.readouterr().err
    short = trained(config, "short", **settings)
    assert "2 of 2 layers are recomputed" in capsys.readouterr().err
    for weights in (every, short):
        assert all(torch.equal(off[name], weights[name]) for name in off)


def test_impossible_settings_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="must be one of auto, off, all"):
        trained(config, "x", activation_checkpointing="some")
    with pytest.raises(ConfigError, match="has no effect on a CPU"):
        trained(config, "x", offload_activations=True, device="cpu")
    monkeypatch.setattr(activations, "decoder_layers", lambda _: [])
    for wanted in ({"activation_checkpointing": "all"}, {"compile_layers": True}):
        with pytest.raises(ConfigError, match="LlamaForCausalLM has none"):
            trained(config, "x", **wanted)
