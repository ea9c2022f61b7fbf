"""The reference's pass on a Ray cluster: actors that share nothing but the cache's folder.

What to score is written to a sealed store beside the cache, which every worker opens; Ray moves
numbers of groups to the workers and counts of tokens back. Log-probs go from an actor's memory to
its own journal. Ray returns results in any order, and it does not matter: keys carry the identity.
"""

import logging
import os
import secrets
import shutil
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
"""Positions that an actor makes durable together, and the most that are scored again if it dies."""
CHUNKS_EACH = 4
"""At least so many chunks for each actor: the last ones end at about the same time."""
SMALLEST_SHARE = 0.05
"""Of a CPU, for one actor."""


class RayPassError(LogratioError, RuntimeError):
    """The cluster cannot do the pass, or a worker failed for good."""


@dataclass(frozen=True)
class Placement:
    """How many actors, and what Ray sets aside for each.

    Actors that hold every CPU leave none for the tasks that feed them, and Ray Data then waits
    without a word: one CPU always stays free, or half of a single one.
    """

    workers: int
    cpus: float
    gpus: int


def place(
    wanted: int | None, cpus: float, gpus: float, free_memory: float, needed_memory: float
) -> Placement:
    """Fit the actors into what the cluster has free.

    Args:
        wanted: actors; None: one a GPU, or one a CPU if the memory is enough.
        cpus: that are free.
        gpus: that are free; 0 where none is to be used.
        free_memory: bytes that are free.
        needed_memory: bytes that one actor needs.

    Raises:
        RayPassError: they do not fit.
    """
    share = cpus - 1 if cpus >= 2 else cpus / 2
    on_gpu = gpus >= 1
    fits = gpus if on_gpu else min(max(cpus, 1), free_memory // needed_memory)
    workers = wanted or max(1, int(fits))
    each = min(1.0, int(100 * share / workers) / 100)
    if each < SMALLEST_SHARE or (on_gpu and workers > gpus):
        what = f"{gpus:g} GPUs and {cpus:g} CPUs" if on_gpu else f"{cpus:g} CPUs"
        raise RayPassError(
            f"Ray cannot place {workers} workers: {what} are free, and a CPU must stay free for "
            "the tasks that feed them; wait for other jobs, give fewer --workers, or add machines"
        )
    return Placement(workers, each, 1 if on_gpu else 0)


class Worker:
    """An actor: the reference in memory, a journal of its own, and the groups to choose from."""

    @exact_products()
    def __init__(
        self, config: PrecomputeConfig, store: Path, folder: Path, fingerprint: Fingerprint
    ) -> None:
        groups, entries = Store.open(store), entries_of(config.sums_only)
        keys = entries.keys(groups)
        # One that takes a dead one's place does not score again what that one made durable.
        rows = missing_rows(
            entries, keys, first_rows(keys), folder, fingerprint, pread=config.read_mode == "pread"
        )
        self._notes: list[str] = []
        self._work = Work(groups, keys, rows, folder, fingerprint)
        ask_for_expandable_segments(config.device)
        device = default_device(config.device)
        self._scorer = ReferenceScorer(config, self._work, device, tell=self._notes.append)

    @exact_products()
    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Score the groups of each row, make them durable, and return what that came to."""
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
    """Score `work` on the cluster; yield tokens scored and bytes written, as they come in.

    Raises:
        RayPassError: the workers cannot be placed, or one failed; what was scored is durable.
    """
    with _cluster() as ray, _groups_on_disk(config, work) as path:
        places = _places(config, ray)
        told = replace(
            config,
            model=Path(config.model).absolute(),
            data=(),
            precision=precision_of(config),
            device=config.device or (None if places.gpus else "cpu"),
        )
        results = _dataset(told, path, work, places).iter_batches(batch_size=None)
        try:
            for batch in results:
                for note in filter(None, "\n".join(batch["notes"]).splitlines()):
                    say(f"a worker: {note}")
                yield int(batch["tokens"].sum()), int(batch["nbytes"].sum())
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise RayPassError(
                f"a worker of Ray failed: {reason}; what was scored is in the cache"
            ) from error


def chunks(store: Store, budget: int | None, workers: int) -> Iterator[list[np.ndarray]]:
    """Yield what an actor is handed at a time: micro-batches, int64 group numbers each.

    With a given budget they are those of a pass in one process, so that the numbers are its
    numbers, bit for bit; without one, each worker cuts them to what it finds that fits.
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
    """Return the results as a dataset that is yet to run: one block a chunk."""
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
def _cluster() -> Iterator[Any]:
    """Join the cluster that there is (RAY_ADDRESS, or on this machine), or start a local one."""
    # Read when Ray is imported. Actors without a GPU are told so by their device.
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
def _groups_on_disk(config: PrecomputeConfig, work: Work) -> Iterator[Path]:
    """Write the groups with something to score where all workers see them, for as long as it takes.

    A folder that a killed driver left may be deleted.
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
