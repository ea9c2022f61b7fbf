"""What the processes of a run send each other in an update."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import write_pairs
from rank_server import RankServer

Counts = Mapping[int, set[tuple[int, int]]]
"""For each number of micro-batches of an update, its all-reduces and reduce-scatters."""


@pytest.fixture
def counted(ranks: RankServer, tiny_model: Path, tmp_path: Path) -> Callable[..., Counts]:
    """Train two updates in two processes, the first of three micro-batches, the second of one."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    settings = {
        **{"model": str(tiny_model), "data": str(data), "output": str(tmp_path / "out")},
        **{"batch_size": 6, "token_budget": 20, "epochs": 2, "lr": 1e-3, "report": False},
    }

    def run(parallel: str, *, hosts: int = 1, whole_gradients: bool = True) -> Counts:
        call = "counting_workers:train_counting_collectives"
        given = settings | {"parallel": parallel}
        ranks(2, call, given, str(tmp_path / "rank"), whole_gradients, hosts=hosts).well()
        texts = [(tmp_path / f"rank.{rank}").read_text() for rank in range(2)]
        assert texts[0] == texts[1]
        found = dict[int, set[tuple[int, int]]]()
        for row in json.loads(texts[0]):
            sums = row.get("allreduce_", 0), row.get("_reduce_scatter_base_", 0)
            found.setdefault(row["micro-batches"], set()).add(sums)
        assert set(found) == {1, 3}
        return found

    return run


METRICS, NORM, LAYERS = 1, 1, 2
"""All-reduces of an update's metrics, and of the norm of sharded gradients; layers of the model."""


def test_ddp_sums_gradients_once_an_update(counted: Callable[..., Counts]) -> None:
    found = counted("ddp")
    assert found[1] == found[3] == {(METRICS + 1, 0)}


def test_shards_of_gradients_are_summed_once_an_update(counted: Callable[..., Counts]) -> None:
    """Once for each layer, and once for the rest of the model."""
    found = counted("fsdp")
    assert found[1] == found[3] == {(METRICS + NORM, LAYERS + 1)}


def test_without_room_for_whole_gradients_shards_are_summed_after_each_micro_batch(
    counted: Callable[..., Counts],
) -> None:
    found = counted("fsdp", whole_gradients=False)
    assert found[1] == {(METRICS + NORM, LAYERS + 1)}
    assert found[3] == {(METRICS + NORM, 3 * (LAYERS + 1))}


@pytest.mark.parametrize("whole_gradients", [True, False])
def test_hosts_sum_their_shards_once_an_update(
    counted: Callable[..., Counts], whole_gradients: bool
) -> None:
    found = counted("hsdp", hosts=2, whole_gradients=whole_gradients)
    assert found[1] == found[3] == {(METRICS + NORM + LAYERS + 1, 0)}
