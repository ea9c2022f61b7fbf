"""The measured CPU: figures of two processes, and the figures of a rank that follow from them."""

from pathlib import Path

import pytest

from logratio.training import Cluster, TrainConfig, measured_machine
from logratio.training.cluster_plan import plan_cluster
from logratio.training.cluster_time import Topology, Work
from logratio.training.measured_machine import Figures, MeasurementError, Task, measure_cpu
from logratio.training.model_shape import policy_shape
from logratio.training.rank_loads import load_of

GROUPS = [[9, 5, 6], [4, 8, 3]]


@pytest.mark.slow
def test_a_forecast_for_this_cpu(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Two processes measure; no file stays."""
    run = TrainConfig(tiny_model, [pairs_file], tmp_path / "out", batch_size=4, parallel="fsdp")
    found = plan_cluster(run, Cluster(2, "cpu"), show_progress=False)
    assert found.gpu == "this CPU, 1 thread per rank"
    assert found.time.compute > 0
    assert found.time.gather > 0
    assert found.time.exposed == pytest.approx(found.time.gather + found.time.reduce)
    assert 0 < found.mfu < 1.5
    assert found.memory.bytes < found.capacity
    assert not (tmp_path / "out").exists()


def test_figures_of_a_rank_give_back_what_was_measured(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pass takes the measured seconds, and so do collectives of the measured sizes."""
    small, large = measured_machine.SIZES
    gathers, reductions = (1e-3 + small * 1e-9, 1e-3 + large * 1e-9), (1e-3, 1e-3 + large * 3e-9)
    reductions = (1e-3 + small * 3e-9, reductions[1])
    slow = Figures(1e11, 0.5, 1e10, gathers, reductions)
    fast = Figures(2e11, 0.4, 3e10, (1e-4, 2e-4), (1e-4, 2e-4))
    monkeypatch.setattr(measured_machine, "_measured", lambda _: [slow, fast])
    shape = policy_shape(TrainConfig(tiny_model, "data", tmp_path, precision="fp32"))
    machine = measure_cpu(Task(str(tiny_model), GROUPS), shape)
    topology = Topology(machine, 2, 2)
    assert Work(shape, machine).seconds(load_of(GROUPS)) == pytest.approx(0.5, rel=0.01)
    assert topology.gather(4 * large) == pytest.approx(gathers[1])
    assert topology.scatter(4 * large) == pytest.approx(reductions[1])
    assert topology.gather(4 * small) == pytest.approx(gathers[0])
    assert machine.flops == 1.5e11
    assert not machine.overlaps


def test_a_process_that_fails_is_reported(tiny_model: Path, tmp_path: Path) -> None:
    shape = policy_shape(TrainConfig(tiny_model, "data", tmp_path, precision="fp32"))
    with pytest.raises(MeasurementError, match=r"could not be measured: .*threads"):
        measure_cpu(Task(str(tiny_model), GROUPS, threads=0), shape)
