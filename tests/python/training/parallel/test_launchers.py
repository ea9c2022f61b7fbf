"""What launchers put into the environment is understood: torchrun, accelerate, Ray, others."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from rank_server import RankServer
from safetensors.torch import load_file

from logratio import DPOTrainer
from logratio.errors import ConfigError
from logratio.training.parallel.processes import processes_of

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun_names_the_host() -> None:
    found = processes_of(TORCHRUN | {"GROUP_RANK": "1"})
    assert (found.rank, found.count, found.local_rank, found.host, found.hosts) == (5, 8, 1, 1, 2)
    assert found.per_host == 4
    assert not found.is_first
    assert not found.leads_host


def test_ray_does_not_name_the_host() -> None:
    found = processes_of(TORCHRUN | {"NODE_RANK": "1"})
    assert (found.host, found.hosts) == (1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},  # accelerate launch --cpu
        {"WORLD_SIZE": "4"},  # a variable of the cluster's, without a launcher
    ],
)
def test_without_a_launcher_there_is_one_process(environment: Mapping[str, str]) -> None:
    found = processes_of(environment)
    assert (found.rank, found.count, found.hosts) == (0, 1, 1)


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_ranks_without_their_host_are_refused(missing: str) -> None:
    """A pod of a PyTorchJob has RANK and WORLD_SIZE alone, if nothing starts torchrun in it."""
    given = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ConfigError, match=f"start the processes with torchrun.*{missing} unset"):
        processes_of(given)


@pytest.mark.parametrize(
    "wrong", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"WORLD_SIZE": "6"}, {"RANK": "-1"}]
)
def test_contradictions_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="every host must run the same number of processes"):
        processes_of(TORCHRUN | wrong)


def test_restarts_by_the_agents_of_several_hosts_are_refused() -> None:
    restarts = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(ConfigError, match="torchrun restarts processes on one host only"):
        processes_of(TORCHRUN | restarts)
    assert processes_of(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"} | restarts).hosts == 1


def without_ranks() -> dict[str, str]:
    """Return the environment without what another launcher may have set."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"], ["0 of 2", "1 of 2"]),
        (["--cpu", "--num_processes", "2"], ["0 of 1"]),
    ],
)
def test_accelerate_launch_is_understood(
    flags: list[str], expected: list[str], tmp_path: Path
) -> None:
    """`--cpu` starts one process, whatever `--num_processes` is."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "with open(f'{sys.argv[1]}/{os.getpid()}.json', 'w') as file:\n"
        "    json.dump(dict(os.environ), file)\n"
    )
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    subprocess.run([*accelerate, str(script), str(tmp_path)], env=without_ranks(), check=True)
    found = [processes_of(json.loads(path.read_text())) for path in tmp_path.glob("*.json")]
    assert sorted(map(repr, found)) == [f"Processes(rank {rank}, host 0 of 1)" for rank in expected]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    data = write_pairs(tmp_path / "pairs.jsonl", 10)
    return {
        **{"model": str(tiny_model), "data": str(data), "output": str(tmp_path / "out")},
        **{"batch_size": 4, "epochs": 2, "lr": 1e-3, "report": False},
    }


def test_a_group_of_gpus_that_exists_gets_a_backend_for_the_host(
    ranks: RankServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    ranks(2, "guest_workers:train_in_a_group_of_gpus", settings).well()
    DPOTrainer(**settings | {"output": tmp_path / "alone"}, show_progress=False).train()
    alone, both = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert max(float((alone[name] - both[name]).abs().max()) for name in alone) < 1e-5


def test_a_process_of_another_program_survives_its_error_but_trains_no_more(
    ranks: RankServer, settings: dict[str, Any]
) -> None:
    ended = ranks(2, "guest_workers:fail_and_go_on", settings).well()
    for printed in ended.printed:
        assert "ranks 0 and 1 would train different runs: they differ in seed" in printed
        assert "an earlier run of these processes has failed: start new processes" in printed
