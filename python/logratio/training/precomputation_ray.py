"""Run the precompute pass on a Ray cluster, with actors that share only the cache folder.

The groups to score are written to a sealed store in the cache folder, which every worker opens. Ray
sends group numbers to the workers and returns token counts. Each actor writes its log-probs to a
separate journal. Results may arrive in any order, because entries are identified by their keys.
"""

import logging
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logratio._rust import Store
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.progress import say
from logratio.training import memory
from logratio.training.config import PrecomputeConfig
from logratio.training.fingerprint import Fingerprint
from logratio.training.memory import GroupQueue
from logratio.training.models import default_device, precision_of
from logratio.training.reference_scorer import (
    ReferenceScorer,
    Work,
    entries_of,
    first_rows,
    missing_rows,
)
from logratio.training.torch_settings import ask_for_expandable_segments, exact_products

CHUNK_TOKENS = 2**16
"""Positions per chunk. Each chunk is made durable as a whole; if an actor dies, one is repeated."""
CHUNKS_EACH = 4
"""Minimum number of chunks per actor, so that all actors finish at about the same time."""
SMALLEST_SHARE = 0.05
"""Smallest share of a CPU for one actor."""


class RayPassError(LogratioError, RuntimeError):
    """The cluster cannot place the workers, or a worker failed permanently."""


@dataclass(frozen=True)
class Placement:
    """The number of actors, and the resources that Ray reserves for each.

    One CPU, or half of a single CPU, is always left free: if actors hold all CPUs, Ray Data cannot
    run the tasks that feed them and hangs silently.

    Attributes:
        workers: Number of actors.
        cpus: CPUs per actor.
        gpus: GPUs per actor.
    """

    workers: int
    cpus: float
    gpus: int


def place(
    wanted: int | None, cpus: float, gpus: float, free_memory: float, needed_memory: float
) -> Placement:
    """Fit the actors into the free resources of the cluster.

    Args:
        wanted: Number of actors; None: one per GPU, or one per CPU as far as memory suffices.
        cpus: Free CPUs.
        gpus: Free GPUs; 0 to use none.
        free_memory: Free memory, in bytes.
        needed_memory: Memory of one actor, in bytes.

    Raises:
        RayPassError: The actors do not fit.
    """
    share = cpus - 1 if cpus >= 2 else cpus / 2
    on_gpu = gpus >= 1
    fits = gpus if on_gpu else min(max(cpus, 1), free_memory // needed_memory)
    workers = wanted or max(1, int(fits))
    each = min(1.0, int(100 * share / workers) / 100)
    if each < SMALLEST_SHARE or (on_gpu and workers > gpus):
        what = f"{gpus:g} GPUs and {cpus:g} CPUs" if on_gpu else f"{cpus:g} CPUs"
        raise RayPassError(
            f"Ray cannot place {workers} workers: {what} are free, and one CPU is needed for the "
            "tasks that feed them; wait for other jobs, give fewer --workers, or add machines"
        )
    return Placement(workers, each, 1 if on_gpu else 0)


class Worker:
    """A Ray actor that holds the reference, the store of groups, and a journal."""

    @exact_products()
    def __init__(
        self, config: PrecomputeConfig, store: Path, folder: Path, fingerprint: Fingerprint
    ) -> None:
        groups, entries = Store.open(store), entries_of(config.sums_only)
        keys = entries.keys(groups)
        # An actor that replaces a dead one must not repeat the scores that are already durable.
        rows = missing_rows(
            entries, keys, first_rows(keys), folder, fingerprint, pread=config.read_mode == "pread"
        )
        self._notes: list[str] = []
        self._work = Work(groups, keys, rows, folder, fingerprint)
        ask_for_expandable_segments(config.device)
        device = default_device(config.device)
        self._scorer = ReferenceScorer(config, self._work, device, report=self._notes.append)

    @exact_products()
    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Score the groups of each row, make them durable, and return counts and notes."""
        tokens, before = 0, self._scorer.nbytes
        for groups in table["groups"]:
            numbers = np.array(groups.values)
            tokens += sum(self._scorer.score(numbers[np.isin(numbers, self._work.groups)]))
        self._scorer.flush()
        notes, self._notes[:] = "\n".join(self._notes), []
        return {
            "tokens": np.array([tokens]),
            "nbytes": np.array([self._scorer.nbytes - before]),
            "notes": np.array([notes], dtype=object),
        }


def score_on_ray(config: PrecomputeConfig, work: Work) -> Generator[tuple[int, int], None, None]:
    """Score `work` on the cluster; yield (tokens scored, bytes written) increments.

    Raises:
        RayPassError: The workers cannot be placed, or one failed; completed scores are durable.
    """
    with cluster() as ray, _groups_on_disk(config, work) as path:
        places = _places(config, ray)
        worker_config = replace(
            config,
            model=Path(config.model).absolute(),
            data=(),
            precision=precision_of(config),
            device=config.device or (None if places.gpus else "cpu"),
        )
        results = _dataset(worker_config, path, work, places).iter_batches(batch_size=None)
        try:
            for batch in results:
                for note in filter(None, "\n".join(batch["notes"]).splitlines()):
                    say(f"worker: {note}")
                yield int(batch["tokens"].sum()), int(batch["nbytes"].sum())
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise RayPassError(
                f"a Ray worker failed: {reason}; completed scores are in the cache"
            ) from error


def chunks(store: Store, budget: int | None, workers: int) -> Iterator[list[np.ndarray]]:
    """Yield chunks of work for the actors: lists of micro-batches, int64 group numbers each.

    With a fixed `budget`, micro-batches equal those of a pass in one process, so that log-probs are
    bit-identical. Without one, each worker splits them into batches that fit its memory.
    """
    queue = GroupQueue(store, np.arange(len(store)), "shared")
    lengths = store.shared_lengths()
    most = max(1, min(CHUNK_TOKENS, int(lengths.sum()) // (CHUNKS_EACH * workers)))
    taken: list[np.ndarray] = []
    pending = 0
    while len(queue):
        taken.append(queue.take(budget or most))
        pending += int(lengths[taken[-1]].sum())
        if budget is None or pending >= most or not len(queue):
            yield taken
            taken, pending = [], 0


def _dataset(config: PrecomputeConfig, path: Path, work: Work, places: Placement) -> Any:
    """Return the results as a lazy Ray dataset with one block per chunk."""
    data = require("ray.data", "ray")
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    store = Store.open(path)
    blocks = [
        pa.table({"groups": pa.array(chunk, pa.large_list(pa.int64()))})
        for chunk in chunks(store, config.token_budget, places.workers)
    ]
    return data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=(config, path, work.folder.absolute(), work.fingerprint),
        compute=data.ActorPoolStrategy(size=min(places.workers, len(blocks))),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=places.cpus,
        num_gpus=places.gpus,
    )


def _places(config: PrecomputeConfig, ray: Any) -> Placement:
    free = ray.available_resources()
    gpus = 0.0 if (config.device or "cuda").startswith("cpu") else free.get("GPU", 0.0)
    needed = memory.scoring_bytes(
        [config.model], config.token_budget or 0, config.quantization, precision_of(config)
    )
    return place(config.workers, free.get("CPU", 0.0), gpus, free.get("memory", 0.0), needed)


@contextmanager
def cluster() -> Iterator[Any]:
    """Connect to a running cluster (RAY_ADDRESS, or on this machine), or start a local one."""
    with _own_signal_handlers(), _connected() as ray:
        yield ray


@contextmanager
def _connected() -> Iterator[Any]:
    """Yield Ray, connected; shut it down if it was not."""
    # Ray reads these on import. The second keeps CUDA_VISIBLE_DEVICES: actors are given a device.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = require("ray", "ray")
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the handlers of signals after the block: Ray and its libraries keep theirs.

    Ray Tune's would ignore the first Ctrl-C of whatever follows.
    """
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _groups_on_disk(config: PrecomputeConfig, work: Work) -> Iterator[Path]:
    """Write the groups to score to a temporary store in the cache folder, visible to all workers.

    If the driver is killed, its folder remains and may be deleted.
    """
    folder = Path(config.cache).absolute() / f".ray-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        wanted = np.zeros(len(work.store), dtype=bool)
        wanted[work.groups] = True
        path = folder / "groups.store"
        work.store.select(wanted, path, work.store.metadata)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)
