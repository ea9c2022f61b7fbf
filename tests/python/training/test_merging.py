"""A merged model equals its adapter within the rounding of its dtype, and appears complete."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, make_adapter
from conftest import Run, write_pairs
from safetensors import safe_open
from tiny_models import GROUPED, WORDS, save_tiny_model, tiny, word_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from logratio import merge_adapter
from logratio.errors import ConfigError
from logratio.forecast import OutputError
from logratio.logps.checks import batch_of
from logratio.logps.completion import score
from logratio.training import (
    LoraSettings,
    MergeError,
    ModelFolderError,
    TrainConfig,
    load_model,
    merging,
    train,
)
from logratio.training.run_folder import reward_beta

GROUPS = [([1, 4, 5], [[8, 12, 2], [13, 2]]), ([1, 4, 6, 9], [[10, 17, 2], [11, 3, 18, 2]])]
MERGED = {**KINDS, "head": {"target_modules": ["q_proj", "lm_head"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("plain") / "start", **KINDS["plain"])


def tied(folder: Path) -> Path:
    sizes = {**GROUPED, "vocab_size": len(WORDS), "tie_word_embeddings": True}
    tiny(LlamaConfig(**sizes, pad_token_id=0), scale=2.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def logps(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = score(model, batch_of(GROUPS, "padded"))
    return found


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_model_equals_its_adapter(
    base: Path, tmp_path: Path, kind: str, is_tied: bool
) -> None:
    start = tied(tmp_path / "tied") if is_tied else base
    adapter = make_adapter(start, tmp_path / "adapter", **MERGED[kind])
    result = merge_adapter(adapter, tmp_path / "whole")
    assert result.largest_gap < 1e-4
    expected, found = logps(load_model(adapter)), logps(load_model(tmp_path / "whole"))
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert float((expected - logps(load_model(start))).abs().max()) > 0.01
    stays_tied = is_tied and kind in ("plain", "dora")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == stays_tied
    assert whole.config.tie_word_embeddings == stays_tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(plain: Path, tmp_path: Path, dtype: str) -> None:
    exact = merge_adapter(plain, tmp_path / "exact")
    result = merge_adapter(plain, tmp_path / "low", dtype=dtype)  # type: ignore[arg-type]
    assert (exact.dtype, result.dtype) == ("float32", dtype)
    assert 1e-5 < result.largest_gap < 0.75
    with (
        safe_open(tmp_path / "exact" / "model.safetensors", "pt") as whole,
        safe_open(tmp_path / "low" / "model.safetensors", "pt") as low,
    ):
        for name in whole.keys():  # noqa: SIM118
            assert torch.equal(
                low.get_tensor(name), whole.get_tensor(name).to(getattr(torch, dtype))
            )


def test_the_dtype_is_that_of_the_base(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert merge_adapter(adapter, tmp_path / "whole").dtype == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16


def test_the_whole_model_has_all_files_and_the_beta_of_its_training(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    config = TrainConfig(
        base, [data], tmp_path / "adapter", beta=0.3, lr=1e-2, lora=LoraSettings(rank=2)
    )
    train(config, show_progress=False)
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    (tmp_path / "whole").mkdir()  # an empty folder may exist
    merge_adapter(tmp_path / "adapter", tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not {name for name in names if name.startswith(("adapter", "."))}
    generation = json.loads((tmp_path / "whole" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.5
    assert reward_beta(tmp_path / "whole", None) == 0.3
    again = TrainConfig(
        tmp_path / "whole", [data], tmp_path / "next", lora=LoraSettings(rank=2), max_steps=1
    )
    assert len(train(again, show_progress=False).history) == 1


def test_a_model_is_never_written_over(plain: Path, base: Path, tmp_path: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    for output in (base, plain, base / "config.json"):
        with pytest.raises((ConfigError, OutputError), match="is not empty"):
            merge_adapter(plain, output)
    assert (base / "model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="whole model already"):
        merge_adapter(base, tmp_path / "whole")
    with pytest.raises(ModelFolderError, match="no such model folder"):
        merge_adapter(tmp_path / "absent", tmp_path / "whole")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fault", ["differs", "fails"])
def test_a_failed_merge_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def wrong(model: Any, folder: Path) -> Any:
        if fault == "fails":
            raise OSError(28, "No space left on device")
        return model.unload()  # the base without the adapter

    monkeypatch.setattr(merging, "_merge", wrong)
    with pytest.raises(
        MergeError if fault == "differs" else OSError, match=r"differs from|No space"
    ):
        merge_adapter(plain, tmp_path / "whole")
    assert not [*tmp_path.iterdir()]


def test_an_adapter_whose_base_is_missing_is_refused(plain: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(plain, tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelFolderError, match="not a local folder"):
        merge_adapter(adapter, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # peft's
def test_an_adapter_that_peft_cannot_merge_is_refused(base: Path, tmp_path: Path) -> None:
    """A bias of the adapter has no place in a layer without bias."""
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelFolderError, match="peft cannot merge this adapter"):
        merge_adapter(adapter, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_command_prints_the_largest_difference(run: Run, plain: Path, tmp_path: Path) -> None:
    code, out, err = run("merge", "--model", plain, "--output", tmp_path / "whole")
    assert code == 0, err
    assert "largest difference of a log-prob from the adapter's: " in out
    assert "weights in float32" in out
    code, _, err = run("merge", "--model", plain, "--output", tmp_path / "whole")
    assert (code, "is not empty" in err) == (2, True)


def test_merging_a_quantized_training_is_stated(run: Run, plain: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(plain, tmp_path / "adapter"))
    (adapter / "training.json").write_text('{"quantization": "4bit"}')
    code, _, err = run("merge", "--model", adapter, "--output", tmp_path / "whole")
    assert code == 0
    assert "trained over a base in 4bit, and is merged into the base without quantization" in err
