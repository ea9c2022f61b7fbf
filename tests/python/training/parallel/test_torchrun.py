"""`logratio train` under torchrun itself."""

import json
from pathlib import Path

import pytest
from conftest import write_pairs
from launched import launched
from rank_server import RankServer
from safetensors.torch import load_file


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    return [
        *("train", "--model", str(tiny_model), "--data", str(data), "--batch-size", "4"),
        *("--lr", "1e-3", "--output", str(tmp_path / "out")),
    ]


@pytest.mark.slow
def test_two_processes_train_one_model(
    ranks: RankServer, arguments: list[str], tmp_path: Path
) -> None:
    done = launched(2, *arguments, "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 updates; model, metrics and settings") == 1
    assert (done.stdout + done.stderr).count("2 processes on 1 host: fsdp") == 1
    alone = [*arguments[:-1], str(tmp_path / "alone")]
    ranks(1, "logratio.cli.app:main", alone).well()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
    rows = (tmp_path / "out" / "speed.jsonl").read_text().splitlines()
    assert all(json.loads(row)["speed/tokens_per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_a_message_is_printed_once(arguments: list[str], tmp_path: Path) -> None:
    """Here torchrun's agent keeps the store; in `test_faults.py` the first process does."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": 1}\n')
    done = launched(2, *arguments)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr


def test_one_process_may_shard(ranks: RankServer, arguments: list[str], tmp_path: Path) -> None:
    ranks(1, "logratio.cli.app:main", [*arguments, "--parallel", "fsdp"]).well()
    ranks(1, "logratio.cli.app:main", [*arguments[:-1], str(tmp_path / "alone")]).well()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
