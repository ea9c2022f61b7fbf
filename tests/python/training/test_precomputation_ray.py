"""The pass on Ray gives the log-probs of a pass in one process, even if actors die."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pairs
from stores import store_of

from logratio._rust import CacheReader
from logratio.errors import ConfigError
from logratio.training import PrecomputeConfig, precompute
from logratio.training.fingerprint import model_fingerprint
from logratio.training.precomputation import PrecomputeResult, prepare
from logratio.training.precomputation_ray import RayPassError, chunks, place

PAIRS = 27


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "memory", "expected"),
    [
        (None, 2, 0, 100, (2, 0.5, 0)),
        (None, 1, 0, 100, (1, 0.5, 0)),
        (None, 16, 0, 900, (16, 0.93, 0)),
        (None, 16, 0, 30, (3, 1.0, 0)),  # memory for three models
        (2, 2, 0, 100, (2, 0.5, 0)),
        (None, 32, 4, 5, (4, 1.0, 1)),
        (2, 32, 4, 5, (2, 1.0, 1)),
        (None, 3, 4, 5, (4, 0.5, 1)),
    ],
)
def test_a_cpu_always_stays_free(
    wanted: int | None, cpus: float, gpus: float, memory: float, expected: tuple[int, float, int]
) -> None:
    placed = place(wanted, cpus, gpus, memory, needed_memory=10)
    assert (placed.workers, placed.cpus, placed.gpus) == expected
    assert placed.workers * placed.cpus <= (cpus - 1 if cpus >= 2 else cpus / 2)


@pytest.mark.parametrize(("wanted", "cpus", "gpus"), [(None, 0, 0), (40, 2, 0), (5, 32, 4)])
def test_what_cannot_be_placed_is_refused(wanted: int | None, cpus: float, gpus: float) -> None:
    """Ray Data would hang silently."""
    with pytest.raises(RayPassError, match="Ray cannot place"):
        place(wanted, cpus, gpus, 100, 10)


@pytest.mark.parametrize(("budget", "workers"), [(12, 1), (25, 2), (None, 1), (None, 3)])
def test_chunks_hold_every_group_once(budget: int | None, workers: int) -> None:
    store = store_of(*[(3, [4, 1 + n % 5]) for n in range(50)])
    found = [batch for chunk in chunks(store, budget, workers) for batch in chunk]
    assert sorted(np.concatenate(found).tolist()) == list(range(50))
    if budget:
        lengths = store.shared_lengths()
        assert all(lengths[batch].sum() <= budget for batch in found)
    assert len(list(chunks(store, budget, workers))) >= 4 * workers


def test_workers_are_rays(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    config = PrecomputeConfig(tiny_model, [pairs_file], tmp_path / "cache", workers=2)
    with pytest.raises(ConfigError, match="engine ray"):
        prepare(config)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A local Ray of two CPUs."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> PrecomputeConfig:
    pairs = write_pairs(tmp_path / "many.jsonl", PAIRS)
    return PrecomputeConfig(tiny_model, [pairs], tmp_path / "cache", token_budget=64)


def on_ray(config: PrecomputeConfig, **changes: Any) -> PrecomputeConfig:
    return replace(config, engine="ray", workers=2, **changes)


def values(config: PrecomputeConfig, result: PrecomputeResult) -> np.ndarray:
    ready = prepare(config, show_progress=False)
    reader = CacheReader.open(result.folder, model_fingerprint(config.model).digest)
    assert len(reader) == reader.distinct() == 2 * PAIRS
    return reader.read(reader.join(ready.keys))[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray's own
def test_the_same_numbers_as_in_one_process(
    cluster: Any, config: PrecomputeConfig, tmp_path: Path
) -> None:
    """Bit for bit: the batches are the same."""
    here = values(config, precompute(config, show_progress=False))
    same = on_ray(config, cache=tmp_path / "same")
    result = precompute(same, show_progress=False)
    assert (result.new, result.hits) == (2 * PAIRS, 0)
    assert result.nbytes > 4 * result.tokens
    assert np.array_equal(values(same, result), here)
    assert not list((tmp_path / "same").glob(".ray-*")), "the groups are left behind"
    assert precompute(same, show_progress=False).new == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_actor_that_dies_is_replaced(
    cluster: Any, config: PrecomputeConfig, tmp_path: Path
) -> None:
    """Its replacement scores only completions that are not durable yet.

    Each worker makes its own batches here, so that the values agree within rounding.
    """
    cache, killed, over = Path(config.cache), [], threading.Event()

    def kill_the_first() -> None:
        while not over.wait(0.01):
            for journal in cache.glob("*/*.journal"):
                # `<host>-<pid>-<random>.journal`, with a block behind the header.
                if journal.stat().st_size > 200:
                    killed.append(int(journal.stem.rsplit("-", 2)[1]))
                    os.kill(killed[0], signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    result = precompute(on_ray(config, token_budget=None), show_progress=False)
    over.set()
    killer.join()
    assert killed
    reader = CacheReader.open(result.folder, model_fingerprint(config.model).digest)
    assert reader.distinct() == 2 * PAIRS
    ready = prepare(config, show_progress=False)
    offsets, logps = reader.read(reader.join(ready.keys))
    alone = replace(config, cache=tmp_path / "alone")
    expected = values(alone, precompute(alone, show_progress=False))
    assert np.abs(logps - expected).max() < 1e-5
    assert [b - a for a, b in itertools.pairwise(offsets.tolist())] == (
        ready.store.completion_lengths().tolist()
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_worker_that_fails_says_why(cluster: Any, config: PrecomputeConfig) -> None:
    with pytest.raises(RayPassError, match=r"a Ray worker failed: .*cuda:7.* cannot be used"):
        precompute(on_ray(config, device="cuda:7"), show_progress=False)
