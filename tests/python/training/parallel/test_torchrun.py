"""`logratio train` under torchrun itself."""

import json
from pathlib import Path

import pytest
from conftest import write_pairs
from launched import launched
from rank_server import RankServer
from safetensors.torch import load_file

FAILS_TWICE = """
import os, signal, sys
from logratio.cli.app import main
from logratio.training import update

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
clip_gradients, updates = update.clip_gradients, 0


def die_in_the_third(*given):
    global updates
    updates += 1
    if updates == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip_gradients(*given)


if (attempt, rank) == ("1", "1"):
    update.clip_gradients = die_in_the_third
bad, *arguments = sys.argv[1:]
main([*arguments, "--data", bad] if attempt == "0" else arguments)
"""
"""`logratio` with bad data in the first attempt, and a rank that is killed in the second."""


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    return [
        *("train", "--model", str(tiny_model), "--data", str(data), "--batch-size", "4"),
        *("--lr", "1e-3", "--epochs", "2", "--output", str(tmp_path / "out")),
    ]


@pytest.mark.slow
def test_a_run_that_is_restarted_twice_trains_the_weights_of_one_process(
    ranks: RankServer, arguments: list[str], tmp_path: Path
) -> None:
    """The first attempt prints one message. All find one store, which torchrun's agent keeps."""
    script, bad = tmp_path / "script.py", tmp_path / "bad.jsonl"
    script.write_text(FAILS_TWICE)
    bad.write_text('{"prompt": 1}\n')
    own = ["--parallel", "fsdp", "--save-every", "1", "--resume"]
    launcher = ["--max-restarts", "2", "--nproc-per-node", "2", str(script), str(bad)]
    done = launched(*launcher, *arguments, *own)
    assert done.returncode == 0, done.stderr
    first, *others = (one for one in done.stderr.splitlines() if one.startswith("error: "))
    assert first.startswith("error: the data is broken")
    assert done.stderr.count(f"{bad}:1") == 1
    assert len(others) <= 1  # torchrun may end rank 0 before it blames the killed one
    assert all("rank 1 " in one for one in others), others
    assert done.stderr.count("resuming after update 2") == 1
    assert done.stdout.count("6 updates; model, metrics and settings") == 1
    assert (done.stdout + done.stderr).count("2 processes on 1 host: fsdp") == 2
    alone = [*arguments[:-1], str(tmp_path / "alone")]
    ranks(1, "logratio.cli.app:main", alone).well()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
    rows = (tmp_path / "out" / "speed.jsonl").read_text().splitlines()
    assert all(json.loads(row)["speed/tokens_per_second"] > 0 for row in rows)


def test_one_process_may_shard(ranks: RankServer, arguments: list[str], tmp_path: Path) -> None:
    ranks(1, "logratio.cli.app:main", [*arguments, "--parallel", "fsdp"]).well()
    ranks(1, "logratio.cli.app:main", [*arguments[:-1], str(tmp_path / "alone")]).well()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
