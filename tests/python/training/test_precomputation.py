"""The reference cache end to end: correct values, resumption after a kill, stale caches."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from oracle import in_float64, per_token_logps

from logratio._rust import CacheReader, CacheWriter, CorruptCacheError
from logratio.cache import ReferenceCache
from logratio.data import TokenizationRules
from logratio.errors import ConfigError
from logratio.training import PrecomputeConfig, load_model, precompute
from logratio.training.dataset import load_dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.precomputation import PrecomputeResult
from logratio.training.reference import StaleCacheError, open_cache


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> PrecomputeConfig:
    return PrecomputeConfig(tiny_model, [pairs_file], tmp_path / "cache", token_budget=64)


def quiet(config: PrecomputeConfig) -> PrecomputeResult:
    return precompute(config, show_progress=False)


def test_values_are_the_oracles(config: PrecomputeConfig) -> None:
    result = quiet(config)
    assert (result.new, result.hits) == (32, 0)
    shown = f"PrecomputeResult(32 new, 0 hits, {result.tokens:,} tokens, {str(result.folder)!r})"
    assert repr(result) == shown
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    reader = open_cache(config.cache, model_fingerprint(config.model))
    model = in_float64(load_model(config.model))
    for index in range(len(store)):
        prompt, completions, _, _ = store.group(index)
        first = int(store.completion_offsets()[index])
        keys = store.keys()[first : first + len(completions)]
        _, logps = reader.read(reader.join(keys))
        group = (prompt.tolist(), [ids.tolist() for ids in completions])
        with torch.no_grad():
            expected = per_token_logps(model, [group])
        assert torch.allclose(torch.from_numpy(logps).double(), expected, atol=1e-5)


def test_a_second_run_scores_nothing_and_loads_no_model(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    monkeypatch.setattr("logratio.training.reference_scorer.load_model", None)
    again = quiet(dataclasses.replace(config, token_budget=9))
    assert (again.new, again.hits, again.tokens) == (0, 32, 0)


def test_only_new_completions_are_scored(config: PrecomputeConfig, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few.jsonl", 5)
    assert quiet(dataclasses.replace(config, data=[few])).new == 10
    assert quiet(config).new == 22


def test_truncation_is_part_of_the_key(config: PrecomputeConfig) -> None:
    """TRL serves the uncut completion's log-probs when max_length changes."""
    quiet(config)
    shorter = dataclasses.replace(config, rules=TokenizationRules(max_length=8))
    assert quiet(shorter).new > 0


@pytest.mark.parametrize("change", ["weights", "config", "precision"])
def test_another_reference_is_another_folder(
    config: PrecomputeConfig, make_model: Callable[..., Path], change: str
) -> None:
    first = quiet(config)
    other = config
    if change == "weights":
        other = dataclasses.replace(config, model=make_model("other", 5))
    elif change == "config":
        folder = make_model("other")  # equal weights
        settings = json.loads((folder / "config.json").read_text())
        settings["rope_parameters"]["rope_theta"] = 500.0
        (folder / "config.json").write_text(json.dumps(settings))
        other = dataclasses.replace(config, model=folder)
    else:
        other = dataclasses.replace(config, precision="bf16")
    second = quiet(other)
    assert second.folder != first.folder
    assert second.new == 32
    expected = {"precision": "compute_dtype"}.get(change, change)
    here = model_fingerprint(config.model)
    there = json.loads((second.folder / "fingerprint.json").read_text())["hard"]
    assert here.differences(there) == [expected]


def test_a_copy_of_the_model_is_the_same_reference(
    config: PrecomputeConfig, make_model: Callable[..., Path]
) -> None:
    quiet(config)
    assert quiet(dataclasses.replace(config, model=make_model("copy"))).new == 0


def test_no_cache_says_what_to_run(config: PrecomputeConfig, tmp_path: Path) -> None:
    with pytest.raises(StaleCacheError, match="logratio precompute"):
        open_cache(tmp_path / "nothing", model_fingerprint(config.model))


def test_a_flipped_bit_is_refused(config: PrecomputeConfig) -> None:
    result = quiet(config)
    (shard,) = result.folder.glob("*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    keys = load_dataset(config.model, config.data, config.rules, show_progress=False).store.keys()
    with pytest.raises(CorruptCacheError, match=shard.name):
        reader = CacheReader.open(result.folder, model_fingerprint(config.model).digest)
        reader.read(reader.join(keys))


CHILD = """
import sys
from logratio.training import PrecomputeConfig, precompute
from logratio.training import reference_scorer as module
module.BLOCK_TOKENS = 1
write = module.Block.flush
def flush(block):
    write(block)
    print("ack", block.tokens, flush=True)
module.Block.flush = flush
precompute(PrecomputeConfig(sys.argv[1], [sys.argv[2]], sys.argv[3], token_budget=16),
           show_progress=False)
"""


@pytest.mark.parametrize(
    ("how", "acknowledged"), [(signal.SIGKILL, 1), (signal.SIGKILL, 7), (signal.SIGTERM, 4)]
)
def test_a_killed_pass_continues(
    config: PrecomputeConfig, how: signal.Signals, acknowledged: int
) -> None:
    """Everything acknowledged before the kill is there after it, and is not scored again."""
    arguments = [str(config.model), str(config.data[0]), str(config.cache)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    with child, child.stdout:
        tokens = [int(child.stdout.readline().split()[1]) for _ in range(acknowledged)][-1]
        child.send_signal(how)
        child.wait()
    reader = open_cache(config.cache, model_fingerprint(config.model))
    assert reader.tokens >= tokens
    had = len(reader)
    result = quiet(config)
    assert result.new == 32 - had
    assert len(open_cache(config.cache, model_fingerprint(config.model))) == 32


def test_two_processes_may_fill_one_cache(config: PrecomputeConfig) -> None:
    """Each has a separate journal; completions scored by both are counted once."""
    quiet(config)
    fingerprint = model_fingerprint(config.model)
    reader = open_cache(config.cache, fingerprint)
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    keys = store.keys()[:4]
    offsets, logps = reader.read(reader.join(keys))
    folder = Path(config.cache) / fingerprint.name
    writer = CacheWriter(folder, fingerprint.digest)
    writer.append(keys, offsets, logps)
    writer.close()
    again = open_cache(config.cache, fingerprint)
    assert (len(again), again.distinct()) == (36, 32)


def test_sums_are_those_of_the_tokens(config: PrecomputeConfig, tmp_path: Path) -> None:
    """A sums-only cache has a separate folder, and equals the sums of a token cache."""
    whole = quiet(config)
    result = quiet(dataclasses.replace(config, sums_only=True))
    assert (result.new, result.hits) == (32, 0)
    assert result.folder == whole.folder.with_name(f"{whole.folder.name}.sums")
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    fingerprint = model_fingerprint(config.model)
    reader = CacheReader.open(result.folder, fingerprint.digest, sums=True)
    counts, sums = reader.read_sums(reader.join(store.sum_keys()))
    tokens = open_cache(config.cache, fingerprint)
    offsets, logps = tokens.read(tokens.join(store.keys()))
    expected = [logps[a:b].astype("f8").sum() for a, b in itertools.pairwise(offsets)]
    assert counts.tolist() == store.counted_lengths().tolist()
    assert sums.tolist() == pytest.approx(expected, abs=1e-12)
    again = quiet(dataclasses.replace(config, sums_only=True))
    assert (again.new, again.hits, again.nbytes) == (0, 32, 0)


def test_the_summary_counts_what_was_written(config: PrecomputeConfig) -> None:
    result = quiet(config)
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    assert result.tokens == int(store.completion_lengths().sum())
    assert result.nbytes >= 32 * 36 + 4 * result.tokens
    assert "32 completions scored" in result.to_text()


def test_what_the_cache_was_made_under_is_shown_and_merged(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    quiet(config)
    merged = ReferenceCache(tmp_path / "merged")
    merged.merge([config.cache])
    for cache in (ReferenceCache(config.cache), merged):
        (report,) = cache.inspect()
        assert "layout shared" in report.to_text()
        assert report.is_whole


def test_the_forecast_counts_what_is_missing(config: PrecomputeConfig) -> None:
    from logratio.training.precomputation import prepare

    ready = prepare(config, show_progress=False)
    assert "32 completions to score" in ready.forecast.to_text()
    started = time.monotonic()
    assert ready.forecast.seconds < 60
    assert time.monotonic() - started < 60


def test_a_pass_on_ray_takes_no_stall_timeout(config: PrecomputeConfig) -> None:
    with pytest.raises(ConfigError, match="stall_timeout watches this process"):
        precompute(dataclasses.replace(config, engine="ray", stall_timeout=60))
