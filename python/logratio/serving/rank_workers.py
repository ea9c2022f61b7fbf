"""Processes that each load a bundle and score batches of rows."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

from logratio.bundle import Manifest, read_manifest
from logratio.errors import LogratioError
from logratio.serving.processors import default_threads
from logratio.serving.rank_rows import Item, RankSummary, score_rows
from logratio.serving.reference import CachedReference
from logratio.serving.reranker import Reranker
from logratio.serving.session import CUDA

Scored = tuple[str, RankSummary]
_AHEAD = 2
"""Batches in flight for each worker."""


class WorkerError(LogratioError, RuntimeError):
    """A worker ended before it had scored its rows."""


@dataclass(frozen=True)
class Workers:
    """A bundle that several processes load.

    Attributes:
        bundle: The bundle's folder.
        count: Number of processes. With CUDA, each has the GPU of its number.
        settings: Arguments of `Reranker.load`, without `threads`: the CPUs are shared out.
    """

    bundle: Path
    count: int
    settings: dict[str, Any]

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return read_manifest(self.bundle)

    @property
    def cached(self) -> CachedReference | None:
        """The reference's log-probs in the cache of the settings, if they name one.

        Raises:
            ConfigError, NoReferenceError: As `Reranker.load`.
        """
        cache = self.settings.get("cache")
        return None if cache is None else CachedReference.open(cache, self.manifest)

    @property
    def truncates(self) -> bool:
        """As `Reranker.truncates`."""
        return bool(self.settings.get("truncate_completions"))

    def score(self, batches: Iterator[list[Item]]) -> Iterator[Scored]:
        """Score batches in parallel; yield their results in order.

        Raises:
            BundleError, ProviderError: A worker cannot load the bundle.
            WorkerError: A worker ended, for example because memory ran out.
        """
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
        numbers = context.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        pool = ProcessPoolExecutor(
            self.count, context, _begin, (numbers, self.bundle, self.count, self.settings)
        )
        try:
            running: deque[Future[Scored]] = deque()
            for batch in batches:
                running.append(pool.submit(_score, batch))
                if len(running) >= _AHEAD * self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise WorkerError(
                "a worker ended, perhaps because memory ran out: the same command with fewer "
                "--workers continues"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_reranker: list[Reranker | Exception] = []
"""The reranker of this worker, or why it has none."""


def _begin(numbers: Any, bundle: Path, count: int, settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    number = numbers.get()
    if settings.get("providers") == [CUDA]:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(number)
    threads = max(1, default_threads() // count)
    try:
        _reranker.append(Reranker.load(bundle, threads=threads, **settings))
    except Exception as error:  # an initializer that raises would hide the reason
        _reranker.append(error)


def visible_device(number: int) -> str:
    """Return the name of the GPU of a worker, among those that this job may use."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number % len(visible)] if visible else str(number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _score(batch: list[Item]) -> Scored:
    (reranker,) = _reranker
    if isinstance(reranker, Exception):
        raise reranker
    return score_rows(reranker, batch)
