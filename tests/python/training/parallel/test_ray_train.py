"""The recipe for Ray Train in the guide: it trains, restarts after a death, and reports errors."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from documented import blocks
from safetensors.torch import load_file

from logratio import Callback, DPOTrainer

(RECIPE,) = blocks("python", ["python/docs/cluster.md"])
UPDATES: Mapping[str, Any] = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "report": False}
SAME = 1e-5
"""Adam magnifies the rounding of float32; the tests in float64 are in test_same_numbers.py."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of Ray's own
]


class DieOnce(Callback):
    """Kills rank 1 after an update, unless a file shows that this has been done."""

    def __init__(self, step: int, done: Path) -> None:
        self.step, self.done = step, done

    def on_update(self, state: Any, _metrics: Mapping[str, float]) -> None:
        """Kill this process if it is time."""
        if os.environ["RANK"] == "1" and state.step == self.step and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Fail(Callback):
    """Raises an exception in rank 1."""

    def on_update(self, state: Any, _metrics: Mapping[str, float]) -> None:
        """Raise it after the second update."""
        if os.environ["RANK"] == "1" and state.step == 2:
            raise ValueError("out of patience")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A local Ray of two CPUs."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def _own_handler() -> Iterator[None]:
    """Restore the handler of SIGINT, which Ray Train replaces and keeps after a run."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A shared folder with a model and data, and the policy that one process trains."""
    model, data = make_model("model"), write_pairs(tmp_path / "pairs.jsonl", 14)
    DPOTrainer(model, data, output=tmp_path / "alone", **UPDATES, show_progress=False).train()
    return tmp_path


def gap(one: Path, other: Path) -> float:
    """Return the largest difference of two policies' weights."""
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_the_recipe_survives_a_death_and_a_later_error_reaches_the_driver(
    cluster: Any, folder: Path
) -> None:
    """The workers that take over train the weights of one process, then train again and fail."""
    from ray.train import TrainingFailedError

    died = folder / "died"
    settings = {**UPDATES, "save_every": 1, "callbacks": [DieOnce(3, died)]}
    again = {**UPDATES, "output": str(folder / "again"), "resume": False, "callbacks": [Fail()]}
    trains = "    DPOTrainer(**settings).train()\n"
    changes = {
        '"/shared': f'"{folder}',
        '"resume": True': '"resume": True, **more',
        trains: trains + "    DPOTrainer(**{**settings, **again}).train()\n",
        "max_failures=3": "max_failures=1",
    }
    block = RECIPE
    for old, new in changes.items():
        assert old in block
        block = block.replace(old, new)
    names = {"__name__": "__main__", "more": settings, "again": again}
    with pytest.raises(TrainingFailedError, match=r"Fail\.on_update raised ValueError"):
        exec(compile(block, "cluster.md", "exec"), names)
    assert died.exists()
    assert gap(folder / "alone", folder / "policy") < SAME
