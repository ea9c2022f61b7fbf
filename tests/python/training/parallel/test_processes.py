"""What processes tell each other, and how torchrun's environment is read."""

import json
from pathlib import Path

import pytest
from rank_server import RankServer

from logratio.errors import ConfigError
from logratio.training.parallel.processes import processes_of


def test_values_travel_before_and_after_the_group_exists(ranks: RankServer, tmp_path: Path) -> None:
    ranks(4, "rank_workers:exchange", str(tmp_path / "seen"), hosts=2).well()
    for rank in range(4):
        early, first, leader, late, total, highest = json.loads(
            (tmp_path / f"seen.{rank}").read_text()
        )
        assert early == [{"rank": n} for n in range(4)]
        assert first == ["first", 0]
        assert leader == rank // 2 * 2
        assert late == ["é" * n for n in (1, 2, 3, 4)]
        assert total == [4.0, 6.0]
        assert highest == 3


def test_a_process_without_torchrun_is_alone() -> None:
    assert processes_of({}).count == 1
    assert processes_of({"WORLD_SIZE": "1", "RANK": "0"}).count == 1


def test_hosts_are_told_apart() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    found = processes_of(given)
    assert (found.rank, found.host, found.hosts, found.per_host) == (5, 1, 2, 3)
    assert not found.leads_host
    assert not found.is_first


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        processes_of(given)
