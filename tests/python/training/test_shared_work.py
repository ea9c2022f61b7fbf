"""Several processes on one cache: under torchrun, with --share, and with one of them lost."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pairs

from logratio._rust import CacheReader
from logratio.errors import ConfigError
from logratio.training import PrecomputeConfig, precompute
from logratio.training.fingerprint import model_fingerprint
from logratio.training.precomputation import prepare

PAIRS = 27


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> PrecomputeConfig:
    pairs = write_pairs(tmp_path / "many.jsonl", PAIRS)
    return PrecomputeConfig(tiny_model, [pairs], tmp_path / "cache", token_budget=64)


def shared(config: PrecomputeConfig, share: str) -> PrecomputeConfig:
    return PrecomputeConfig(
        config.model, config.data, config.cache, token_budget=config.token_budget, share=share
    )


def reader_of(config: PrecomputeConfig) -> CacheReader:
    fingerprint = model_fingerprint(config.model)
    return CacheReader.open(Path(config.cache) / fingerprint.name, fingerprint.digest)


def test_shares_add_up_and_none_is_scored_twice(config: PrecomputeConfig) -> None:
    results = [precompute(shared(config, f"{n}/3"), show_progress=False) for n in (3, 1, 2)]
    assert [result.share for result in results] == ["3/3", "1/3", "2/3"]
    assert sum(result.new for result in results) == 2 * PAIRS
    assert results[0].others == 2 * PAIRS - results[0].new
    assert [result.hits for result in results] == [
        0,
        results[0].new,
        results[0].new + results[1].new,
    ]
    for result in results:
        assert result.new + result.hits + result.duplicates + result.others == 2 * PAIRS
        assert result.new > 0
    reader = reader_of(config)
    assert len(reader) == reader.distinct() == 2 * PAIRS
    assert precompute(config, show_progress=False).new == 0


def test_a_share_is_the_same_whatever_was_done_before(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    """A process that starts later must not score what another one is working on."""
    before = prepare(shared(config, "2/3"), show_progress=False)
    mine = before.keys[before.work.rows]
    precompute(shared(config, "1/3"), show_progress=False)
    after = prepare(shared(config, "2/3"), show_progress=False)
    assert np.array_equal(after.keys[after.work.rows], mine)


def test_order_of_the_data_does_not_move_a_group_to_another_share(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    lines = Path(str(config.data[0])).read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)))
    turned = PrecomputeConfig(config.model, [tmp_path / "turned.jsonl"], config.cache, share="2/3")
    found = []
    for one in (shared(config, "2/3"), turned):
        ready = prepare(one, show_progress=False)
        found.append({key.tobytes() for key in ready.keys[ready.work.rows]})
    assert found[0] == found[1]


def test_repeated_completions_are_counted_apart(config: PrecomputeConfig, tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    lines = Path(str(config.data[0])).read_text().splitlines(keepends=True)
    # One more rejected answer to a prompt with a chosen answer that is there already.
    again.write_text(lines[0] + lines[0].replace(" sad", " sad loud"))
    result = precompute(PrecomputeConfig(config.model, [again], config.cache), show_progress=False)
    assert (result.new, result.duplicates, result.hits) == (3, 1, 0)
    assert "3 completions scored" in result.to_text()
    assert "1 duplicate" in result.to_text()


def test_standard_input_is_refused_where_several_would_read_it(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="only one process"):
        prepare(PrecomputeConfig(config.model, ["-"], config.cache), show_progress=False)


KILLED = """
import os, signal, sys
from logratio.cli import main
from logratio.training import reference_scorer as module
module.BLOCK_TOKENS = 1
flush = module.Block.flush
def dying(block):
    flush(block)
    if os.environ.get("RANK") == os.environ["DIES"] and block.tokens:
        os.kill(os.getpid(), signal.SIGKILL)
module.Block.flush = dying
main()
"""


def torchrun(
    config: PrecomputeConfig, script: Path, processes: int, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command under torchrun."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    count = ("--nproc_per_node", str(processes))
    paths = ("--model", config.model, "--data", config.data[0], "--cache", config.cache)
    command = [*launcher, *count, script, "precompute", *paths, "--token-budget", 64]
    return subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DIES": "none"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_shares_the_work_and_a_lost_worker_is_made_up_for(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    script = tmp_path / "command.py"
    script.write_text(KILLED)
    lost = torchrun(config, script, 2, DIES="1")
    assert lost.returncode != 0
    # A worker that died while it sealed its journal leaves its rows in two files.
    had = reader_of(config).distinct()
    assert 0 < had < 2 * PAIRS
    done = torchrun(config, script, 3)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("share "))
    assert [line.split(":")[0] for line in lines] == ["share 1/3", "share 2/3", "share 3/3"]
    assert sum(int(line.split()[2]) for line in lines) == 2 * PAIRS - had
    assert done.stderr.count("rows read:") == 1, "one of them reports on the data"
    reader = reader_of(config)
    assert len(reader) == reader.distinct() == 2 * PAIRS
    ready = prepare(config, show_progress=False)
    assert (reader.join(ready.keys) >= 0).all()
