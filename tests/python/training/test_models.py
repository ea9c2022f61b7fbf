"""Models and adapters that cannot be scored correctly are refused before loading weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_configs import small_config
from tiny_models import SIZES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    ReformerConfig,
    ViTConfig,
)

from logratio.logps.checks import UnsupportedModelError, batch_of, check_causality, choose_layout
from logratio.logps.completion import score
from logratio.training import TrainConfig
from logratio.training.models import (
    ModelFolderError,
    architecture,
    check_model_folder,
    load_model,
    merged,
)
from logratio.training.validation import check_folders

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, on ties


def folder_of(config: PreTrainedConfig, folder: Path) -> Path:
    """A model's folder whose weights are not one byte long: nobody may reach them."""
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_diffusion_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelFolderError, match="a diffusion pipeline, which has no next-token"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig(), "type bart, an encoder-decoder"),
        (ViTConfig(), "type vit, for which transformers has no causal language model"),
        (LlavaConfig(), "type llava, a vision-language model: .* Images .* are planned"),
        (Qwen2_5_VLConfig(), "type qwen2_5_vl, a vision-language model"),
        (Idefics3Config(), "type idefics3, a vision-language model"),
        (ReformerConfig(is_decoder=True), "hashes tokens at random"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "tokens attend to later tokens"),
    ],
)
def test_models_without_next_token_log_probs_are_refused(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    folder = folder_of(config, tmp_path / "model")
    for refused in (load_model, check_model_folder):
        with pytest.raises(ModelFolderError, match=reason):
            refused(folder)
    data = tmp_path / "none.jsonl"
    with pytest.raises(ModelFolderError, match=reason):
        check_folders(TrainConfig(folder, [data], tmp_path / "out", device="cpu"))


def test_bidirectional_attention_of_images_only_is_accepted(tmp_path: Path) -> None:
    """Gemma 4 has the value "vision", and its text attention is causal."""
    Gemma4TextConfig(use_bidirectional_attention="vision").save_pretrained(tmp_path)
    assert architecture(tmp_path).use_bidirectional_attention == "vision"


@pytest.mark.parametrize("content", [{"model_type": "never-heard-of"}, {"hidden_size": 4}])
def test_an_unknown_type_is_a_readable_error(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ModelFolderError, match="the installed transformers does not know this model"
    ):
        check_model_folder(tmp_path)


def test_a_head_in_bfloat16_behind_a_body_in_float32_is_the_models_own() -> None:
    """Mamba keeps its residuals in float32, and casts them before its head."""
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert choose_layout(model)[0] == "padded"
    groups = [([3, 5, 7], [[4, 6], [9]])]
    with torch.no_grad():
        own = [
            torch.log_softmax(model(torch.tensor([p + c]), use_cache=False).logits[0].double(), -1)
            for p, completions in groups
            for c in completions
        ]
        found = score(model, batch_of(groups, "padded"))
    expected = [own[0][2, 4], own[0][3, 6], own[1][2, 9]]
    assert found.tolist() == pytest.approx([float(e) for e in expected], abs=0.05)


def test_a_model_that_fails_under_autocast_is_a_readable_error() -> None:
    model = AutoModelForCausalLM.from_config(small_config("dbrx"), dtype=torch.float32).eval()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedModelError, match="code fails under precision bf16"),
    ):
        choose_layout(model)


def test_a_model_that_sees_the_future_is_refused() -> None:
    """BERT has a class for causal language models, which is causal only if its config says so."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    for is_decoder in (True, False):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=50, intermediate_size=64, is_decoder=is_decoder, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        if is_decoder:
            check_causality(model)
        else:
            with pytest.raises(UnsupportedModelError, match="is not causal: a token changes"):
                check_causality(model)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, tie_word_embeddings=request.param)
    )
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, config: Any) -> Path:
    """Save an adapter whose numbers are far from zero."""
    torch.manual_seed(1)
    model = get_peft_model(load_model(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora" in name or "prompt" in name or "saved" in name or "modules_to" in name
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]
        ),
    ],
    ids=["prefix", "prompt", "alora"],
)
def test_adapters_outside_of_layers_are_refused(
    make: Callable[[], Any], base: Path, tmp_path: Path
) -> None:
    """The engine calls the inner model: they would be ignored in silence."""
    folder = adapter(base, tmp_path / "adapter", make())
    with pytest.raises(ModelFolderError, match=r"outside of the model's layers|activated LoRA"):
        load_model(folder)


ENDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "layers": {"target_modules": ["q_proj", "v_proj"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.fixture(params=ENDS)
def adapted(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Iterator[Path]:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **ENDS[request.param])
    yield adapter(base, tmp_path / "adapter", config)


def test_a_merged_adapter_gives_its_own_logits_also_when_it_is_loaded_again(
    adapted: Path, base: Path, tmp_path: Path
) -> None:
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        plain = load_model(base).double()(input_ids=ids).logits
        truth = load_model(adapted).double()(input_ids=ids).logits
        whole = merged(load_model(adapted).double())
        ours = whole(input_ids=ids).logits
        whole.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
        again = load_model(tmp_path / "merged").double()(input_ids=ids).logits
    assert (truth - plain).abs().max() > 0.01
    assert torch.allclose(ours, truth, atol=1e-10)
    assert torch.allclose(again, truth, atol=1e-5)  # saved in float32


def test_ends_that_no_adapter_changed_stay_tied(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    whole: Any = merged(load_model(adapter(base, tmp_path / "adapter", config)))
    head, embeddings = whole.get_output_embeddings(), whole.get_input_embeddings()
    assert (head.weight is embeddings.weight) == whole.config.tie_word_embeddings
