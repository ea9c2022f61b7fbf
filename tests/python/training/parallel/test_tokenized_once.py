"""The processes of a host share the tokenized data: one of them tokenizes."""

from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from rank_server import RankServer

ROWS, HELD_OUT = 12, 5

LOSSES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "pairs taken apart, with answers to other prompts": {"loss": "kto"},
}


def tokenized(folder: Path, ranks: int) -> list[int]:
    """Return how many rows each rank tokenized."""
    return [int((folder / f"rows.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_leader_of_each_host_tokenizes_the_data_of_a_run(
    ranks: RankServer, tiny_model: Path, tmp_path: Path, loss: str
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    settings = {
        **{"model": str(tiny_model), "data": str(data), "output": str(tmp_path / "out")},
        **{"eval_data": str(write_pairs(tmp_path / "held_out.jsonl", HELD_OUT))},
        **{"batch_size": 8, "max_steps": 1, "report": False, **LOSSES[loss]},
    }
    rows = str(tmp_path / "rows")
    ranks(4, "counting_workers:count_tokenized", settings, rows, hosts=2).well()
    assert tokenized(tmp_path, 4) == [ROWS + HELD_OUT, 0, ROWS + HELD_OUT, 0]


def test_one_process_tokenizes_the_pairs_that_evaluate_shares(
    ranks: RankServer, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    arguments = ["evaluate", "--policy", str(tiny_model), "--reference", str(tiny_model)]
    arguments += ["--data", str(data), "--beta", "0.1"]
    rows = str(tmp_path / "rows")
    ranks(2, "counting_workers:count_tokenized_by", arguments, rows).well()
    assert tokenized(tmp_path, 2) == [ROWS, 0]
