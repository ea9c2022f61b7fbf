"""`logratio train --dry-run --world-size N`: tables, JSON, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from recipe_models import ARCHITECTURES

from logratio.data import PreferenceTokenizer, build_store


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the config.json of Llama 3.1 405B, and nothing else."""
    ARCHITECTURES["llama-3.1-405b"].save_pretrained(tmp_path / "405b")
    assert [path.name for path in (tmp_path / "405b").iterdir()] == ["config.json"]
    return tmp_path / "405b"


@pytest.fixture
def store(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pairs.store"
    build_store(pairs_file, PreferenceTokenizer.load(tiny_model), path)
    return path


def plan(model: Path, data: Path, *more: Any) -> tuple[Any, ...]:
    given = ("--model", model, "--data", data, "--output", model.parent / "out", "--dry-run")
    return ("train", *given, "--batch-size", "8", *more)


def test_a_config_and_a_store_are_enough(run: Run, bare: Path, store: Path) -> None:
    before = sorted(store.parent.rglob("*"))
    cluster = ("--world-size", "8", "--gpu", "h200", "--precision", "bf16-weights")
    code, out, err = run(*plan(bare, store, *cluster))
    assert code == 0, err
    assert "405.85 billion parameters on 8 GPUs on 1 host: H200, fsdp" in out
    assert "--parallel auto: fsdp, because DDP would sum the gradients" in " ".join(out.split())
    for part in ("weights", "gradients", "optimizer", "gathered", "activations", "logits"):
        assert f"│ {part} " in out
    for part in ("products", "waiting for the slowest rank", "collectives, exposed", "total"):
        assert part in out
    assert "pairs per GPU-hour, MFU" in out
    assert "limited by memory" in out
    assert "a GPU lacks" in out
    assert sorted(store.parent.rglob("*")) == before


def test_text_needs_the_tokenizer_and_no_weights(
    run: Run, bare: Path, tiny_model: Path, pairs_file: Path
) -> None:
    code, _, err = run(*plan(bare, pairs_file, "--world-size", "8"))
    assert code == 2
    assert "no tokenizer.json to count the tokens of the data" in err
    for path in tiny_model.glob("tokenizer*"):
        shutil.copy(path, bare)
    lora = ("--lora", "--quantization", "4bit", "--eval-share", "0.2")
    code, out, err = run(*plan(bare, pairs_file, "--world-size", "8", *lora))
    assert code == 0, err
    assert "406.48 billion parameters" in out  # with the adapters
    assert "all of it while the model is loaded" in out


def test_parallel_is_the_setting_of_the_run(run: Run, bare: Path, store: Path) -> None:
    given = ("--world-size", "8", "--precision", "bf16", "--parallel", "ddp")
    code, out, err = run(*plan(bare, store, *given))
    assert code == 0, err
    assert "on 8 GPUs on 1 host: H100, ddp" in out
    assert "--parallel auto" not in out
    assert "try --parallel fsdp" in " ".join(out.split())


@pytest.mark.parametrize(("parallel", "noted"), [("fsdp", True), ("auto", False)])
def test_without_a_cluster_the_figures_are_those_of_one_process(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path, parallel: str, noted: bool
) -> None:
    given = ("--model", tiny_model, "--data", pairs_file, "--output", tmp_path / "out")
    code, _, err = run("train", *given, "--dry-run", "--parallel", parallel)
    assert code == 0, err
    note = "figures of one process that trains alone (--dry-run --world-size N: of several)"
    assert (note in " ".join(err.split())) == noted


def test_json_has_all_figures(run: Run, bare: Path, store: Path, tmp_path: Path) -> None:
    code, out, err = run(*plan(bare, store, "--world-size", "8", "--json", "-"))
    assert code == 0, err
    found = json.loads(out)
    assert found["parameters"] == 405_853_388_800
    assert found["world_size"] == 8
    assert found["memory"]["total"] > 8e10
    assert set(found["time"]) >= {"compute", "waiting", "gather", "reduce", "exposed", "total"}
    file = tmp_path / "plan.json"
    code, out, _ = run(*plan(bare, store, "--world-size", "8", "--json", file))
    assert code == 0
    assert "MFU" in out
    assert json.loads(file.read_text()) == found


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gpu", "h200"), "--gpu plans a cluster: give --world-size too"),
        (("--gpu", "h100"), "--gpu plans a cluster: give --world-size too"),  # the default
        (("--json", "-"), "--json plans a cluster: give --world-size too"),
        (("--gpus-per-host", "4"), "--gpus-per-host plans a cluster"),
        (("--world-size", "8", "--gpu", "h300"), "gpu 'h300' is unknown"),
        (("--world-size", "12"), "is no multiple of gpus_per_host 8"),
        (("--world-size", "16"), "Give a batch_size of 16 or more, or plan fewer GPUs"),
        (("--world-size", "8", "--precision", "fp32"), "plan with bf16 or bf16-weights"),
        (("--world-size", "8", "--quantization", "4bit"), "quantized weights cannot be trained"),
        (("--world-size", "8", "--context-parallel-size", "2"), "has no forecast of prompts"),
        (("--world-size", "8", "--loss", "sft", "--cache", "c"), "loss sft has no reference"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    more: tuple[str, ...], message: str, run: Run, bare: Path, store: Path
) -> None:
    code, _, err = run(*plan(bare, store, *more))
    assert code == 2
    assert message in " ".join(err.split())


def test_too_few_pairs_for_a_cluster_are_named_and_not_the_batch_size(
    run: Run, bare: Path, store: Path
) -> None:
    code, _, err = run(*plan(bare, store, "--world-size", "64", "--batch-size", "384"))
    assert code == 2
    assert re.search(r"data of \d+ groups for 64 GPUs", " ".join(err.split()))
    assert "Give more data, or plan fewer GPUs" in " ".join(err.split())


def test_a_small_model_is_counted_in_millions(run: Run, tiny_model: Path, store: Path) -> None:
    code, out, err = run(*plan(tiny_model, store, "--world-size", "2", "--gpus-per-host", "2"))
    assert code == 0, err
    assert re.search(r"\d\.\d\d million parameters on 2 GPUs on 1 host", out)


def test_a_plan_starts_no_training(run: Run, bare: Path, store: Path, tmp_path: Path) -> None:
    given = [one for one in plan(bare, store, "--world-size", "8") if one != "--dry-run"]
    code, _, err = run(*given)
    assert code == 2
    assert "add --dry-run" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_config_is_refused(run: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run(*plan(tmp_path / "empty", store, "--world-size", "8"))
    assert code == 2
    assert "a plan needs the model's config, but not its weights" in err


def test_an_encoder_decoder_is_refused(run: Run, store: Path, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path / "t5")
    code, _, err = run(*plan(tmp_path / "t5", store, "--world-size", "8"))
    assert code == 2
    assert "only causal models are supported" in err
