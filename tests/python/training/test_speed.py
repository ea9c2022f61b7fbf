"""Figures of speed: what they count, and that they change nothing."""

import dataclasses
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from stop_after import stop_after
from torch.utils.flop_counter import FlopCounterMode

from logratio.data.feed import Feed, FeedSettings
from logratio.logps.completion import transformer
from logratio.training import LoraSettings, RunInterruptedError, TrainConfig, load_model, speed
from logratio.training.dataset import load_dataset
from logratio.training.lora import with_lora
from logratio.training.speed import Speedometer, Work, peak_flops, peak_memory
from logratio.training.trainer import DPOTrainer

CPU = torch.device("cpu")
FIGURES = {
    *("speed/tokens_per_second", "speed/pairs_per_second", "speed/mfu", "speed/tokens_saved"),
    "memory/peak_gb",
}


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    """Eight updates in two epochs."""
    settings: dict[str, Any] = {"batch_size": 4, "epochs": 2, "save_every": 0}
    return TrainConfig(tiny_model, [pairs_file], tmp_path / "out", **settings)


def rows(folder: Path | str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def flops_of_a_pass(model: torch.nn.Module, tokens: int) -> int:
    """Count the products of a forward and backward pass, as torch executes them."""
    ids = torch.arange(tokens)[None] % 9
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    attention = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if "attention" in str(operation) or "bmm" in str(operation)
    )
    return int(counter.get_total_flops() - attention)


@pytest.mark.parametrize("rank", [None, 4])
def test_flops_are_those_that_torch_counts(tiny_model: Path, rank: int | None) -> None:
    """Logits at every token, so that all are targets; torch counts no norms and biases."""
    model = load_model(tiny_model)
    if rank:
        model = with_lora(model, LoraSettings(rank=rank), tiny_model)
    transformer(model).enable_input_require_grads()  # adapters: the backward pass reaches layer 0
    expected = flops_of_a_pass(model, 32)
    assert Work.of(model).flops(32, 32) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("layout", ["shared", "tree", "padded"])
def test_tokens_are_those_that_the_layout_computes(config: TrainConfig, layout: str) -> None:
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    lengths = store.completion_lengths().astype(int)
    prompts = np.repeat(store.prompt_lengths(), 2).astype(int)
    feed = Feed(store, FeedSettings(groups_per_update=16, token_budget=60, layout=layout))
    meter = Speedometer(Work(6.0, 0.0), 1.0, CPU)
    micro_batches = list(meter.counted(iter(feed)))
    assert len(micro_batches) > 1
    count = meter._count
    assert (count.groups, count.targets) == (16, lengths.sum())
    assert count.rows == (prompts + lengths).sum()
    computed = {
        "shared": store.shared_lengths().sum(),
        "padded": count.rows,
        "tree": sum(micro.layout.input_ids.size for micro in micro_batches),
    }
    assert count.tokens == computed[layout]
    assert (count.tokens < count.rows) == (layout != "padded")


def test_figures_are_counts_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Speedometer(Work(6.0, 2.0), 100.0, CPU)
    ticks = iter([0.0, 2.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))  # type: ignore[attr-defined]
    list(meter.counted(iter(())))
    count = meter._count
    count.groups, count.tokens, count.rows, count.targets = 4, 30, 40, 10
    figures = meter.figures()
    assert figures.keys() == FIGURES
    assert figures["speed/tokens_per_second"] == 15.0
    assert figures["speed/pairs_per_second"] == 2.0
    assert figures["speed/tokens_saved"] == 0.25
    assert figures["speed/mfu"] == (6 * 30 + 2 * 10) / 2.0 / 100.0
    assert 0.05 < figures["memory/peak_gb"] < 1000
    memory = f"{figures['memory/peak_gb']:.1f} GB"
    assert meter.note() == f"15 tokens/s, 25 % saved, 100 % MFU, {memory}"


class Micro:
    """A micro-batch that can be referred to weakly."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout


def test_a_micro_batch_is_not_kept(config: TrainConfig) -> None:
    """Its buffer is free before the next one is requested."""
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    settings = FeedSettings(groups_per_update=4, token_budget=4096)
    layouts = [micro.layout for micro in Feed(store, settings)]
    given: list[weakref.ref[Micro]] = []

    def made() -> Iterator[Any]:
        for layout in layouts:
            assert all(micro() is None for micro in given)
            one = Micro(layout)
            given.append(weakref.ref(one))
            yield one
            del one

    for micro in Speedometer(Work(1.0, 1.0), 1.0, CPU).counted(made()):
        del micro
    assert len(given) == 4


def test_the_figures_of_a_run_are_in_their_own_file(config: TrainConfig, run: Run) -> None:
    result = DPOTrainer(config=config, show_progress=False).train()
    found = rows(config.output, "speed.jsonl")
    assert [row["step"] for row in found] == [*range(1, 9)]
    assert all(row.keys() == FIGURES | {"step"} for row in found)
    assert all(row["speed/mfu"] > 0 and 0 < row["speed/tokens_saved"] < 1 for row in found)
    assert not FIGURES & result.history[0].keys()
    assert not FIGURES & rows(config.output, "metrics.jsonl")[0].keys()


def test_a_resumed_run_has_each_row_once(config: TrainConfig) -> None:
    with stop_after(3), pytest.raises(RunInterruptedError):
        DPOTrainer(config=config, show_progress=False).train()
    resumed = dataclasses.replace(config, resume=True)
    DPOTrainer(config=resumed, show_progress=False).train()
    assert [row["step"] for row in rows(config.output, "speed.jsonl")] == [*range(1, 9)]


def test_the_progress_line_has_the_speed(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logratio.progress.LINE_EVERY", 0.0)
    DPOTrainer(config=config).train()
    line = next(line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line)
    assert line.startswith("dpo: 4/32 pairs, ")
    assert "s left loss 0.69" in line
    assert re.search(r" tokens/s, \d+ % saved, \d+ % MFU, [\d.]+ GB$", line)


def test_the_peak_is_the_data_sheets_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "flops_per_second", lambda setting, precision: 7.0)
    cuda = torch.device("cuda")
    for name, expected in (
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Unknown 9000", 7.0),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(cuda, None, "bf16") == expected
    assert peak_flops(cuda, None, "fp32") == 7.0
    assert peak_flops(CPU, "cpu", "fp32") == 7.0


def test_peak_memory_is_of_the_process() -> None:
    before = peak_memory(CPU)
    block = np.ones(2 * before // 8 + 1)
    assert peak_memory(CPU) - before > 0.5 * block.nbytes
