"""Several processes that serve one address: the parent starts them, and again those that end.

The parent binds the socket, and the workers accept connections from it, so a connection that
nobody has accepted is not lost when a worker ends. Signals to the parent reach the workers, too.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, NoReturn

from logratio.errors import ConfigError, LogratioError
from logratio.serving.config import ServeConfig
from logratio.serving.limits import Limits
from logratio.serving.metrics import FOLDER
from logratio.serving.processors import default_threads
from logratio.serving.rank_workers import WorkerError, visible_device
from logratio.serving.session import CUDA

Ready = Callable[[Any], None]
"""Is called with the application once it accepts connections."""
Serve = Callable[[socket.socket, ServeConfig, Limits, Ready], None]

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
"""Seconds before a worker that has ended is started again; doubled each time."""
_STEADY = 60.0
"""Seconds after which a worker's end counts as its first."""
_GRACE = 10.0
"""Seconds beyond the time of a shutdown after which a worker is killed."""
_log = logging.getLogger("logratio.serving")


@dataclass(frozen=True)
class _Task:
    """What a worker does.

    Attributes:
        serve: Serves on a socket until a signal.
        number: Number of the worker, from 0.
        restarts: How often it was started again since that was counted.
        reports: Takes None once the worker is ready, or the error that ends it.
    """

    serve: Serve
    number: int
    listener: socket.socket
    config: ServeConfig
    limits: Limits
    restarts: int
    reports: Connection


@dataclass(eq=False)
class _Worker:
    """A place for a process, and the process in it, if any."""

    number: int
    process: BaseProcess | None = None
    reports: Connection | None = None
    is_ready: bool = False
    started: float = 0.0
    failures: int = 0
    uncounted: int = 0
    starts_at: float = 0.0

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self.process is not None and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def serve_in_processes(
    serve: Serve,
    listener: socket.socket,
    config: ServeConfig,
    limits: Limits,
    announce: Callable[[Any], None],
) -> None:
    """Serve with `config.workers` processes until SIGTERM or Ctrl-C.

    Args:
        serve: Serves on the socket in one process.
        listener: The listening socket, which is closed at the end.
        config: The settings.
        limits: Limits on requests and connections of each process.
        announce: Is called once all processes are ready, with what the last one has reported.

    Raises:
        ConfigError: There is no writable temporary folder, which the shared metrics need.
        WorkerError: A worker ended before it was ready.
        KeyboardInterrupt: It was stopped by Ctrl-C.
    """
    with _metrics_folder() as folder, _received_signals() as (received, wakes):
        group = _Group(serve, listener, config, limits, folder)
        group.run(received, wakes, announce)


class _Group:
    """The workers, from the first start to the end."""

    def __init__(
        self,
        serve: Serve,
        listener: socket.socket,
        config: ServeConfig,
        limits: Limits,
        folder: str,
    ) -> None:
        self._serve, self._listener, self._config, self._limits = serve, listener, config, limits
        self._folder = folder
        self._workers = [_Worker(number) for number in range(config.workers)]
        self._has_begun = False
        self._killed_at: float | None = None
        self._interrupted = False

    def run(
        self, received: deque[int], wakes: socket.socket, announce: Callable[[Any], None]
    ) -> None:
        """Start the workers, and look after them until the last one has ended."""
        try:
            for worker in self._workers:
                self._start(worker)
            while self._killed_at is None or any(worker.process for worker in self._workers):
                self._wait(wakes)
                while received:
                    self._forward(received.popleft())
                for worker in self._workers:
                    self._look_after(worker, announce)
        finally:
            for worker in self._workers:
                worker.signal(signal.SIGKILL)
        if self._interrupted:
            raise KeyboardInterrupt

    def _start(self, worker: _Worker) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
        ours, theirs = context.Pipe(duplex=False)
        task = _Task(
            self._serve,
            worker.number,
            self._listener,
            self._config,
            self._limits,
            worker.uncounted,
            theirs,
        )
        process = context.Process(target=_work, args=(task,), name=f"worker {worker.number}")
        # The child inherits the mask: no signal reaches it before it has handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        worker.process, worker.reports = process, ours
        worker.started, worker.is_ready = time.monotonic(), False

    def _wait(self, wakes: socket.socket) -> None:
        """Wait for a signal, a report, the end of a worker, or the time of the next start."""
        things: list[Any] = [wakes]
        times = [self._killed_at] if self._killed_at is not None else []
        for worker in self._workers:
            if worker.process is None:
                times.append(worker.starts_at)
            else:
                things.append(worker.process.sentinel)
                things += [worker.reports] if worker.reports is not None else []
        first = min(times, default=None)
        wait(things, None if first is None else max(0.0, first - time.monotonic()))
        with suppress(BlockingIOError):
            wakes.recv(4096)

    def _forward(self, number: int) -> None:
        """Send a signal on to the workers."""
        if number == signal.SIGHUP:
            if self._killed_at is not None:
                return
        else:
            if self._killed_at is None:
                seconds = self._config.drain_seconds + self._limits.shutdown_seconds + _GRACE
                self._killed_at = time.monotonic() + seconds
            self._interrupted |= number == signal.SIGINT
            self._listener.close()  # the workers have copies, which they close after the drain
        for worker in self._workers:
            # Ctrl-C ends the server without a drain; a worker that is loading ignores it.
            is_early = number == signal.SIGINT and not worker.is_ready
            worker.signal(signal.SIGTERM if is_early else number)

    def _look_after(self, worker: _Worker, announce: Callable[[Any], None]) -> None:
        if worker.process is None:
            if self._killed_at is None and time.monotonic() >= worker.starts_at:
                self._start(worker)
            return
        self._read_report(worker, announce)
        if not worker.process.is_alive():
            self._ended(worker)
        elif self._killed_at is not None and time.monotonic() >= self._killed_at:
            worker.signal(signal.SIGKILL)
            worker.process.join()

    def _read_report(self, worker: _Worker, announce: Callable[[Any], None]) -> None:
        if worker.reports is None or not worker.reports.poll():
            return
        try:
            report = worker.reports.recv()
        except EOFError:  # it ended without a report
            report = None
        else:
            if isinstance(report, Exception):
                self._failed(worker, report)
            else:
                worker.is_ready, worker.uncounted = True, 0
                if not self._has_begun and all(one.is_ready for one in self._workers):
                    self._has_begun = True
                    announce(report)
        worker.reports.close()
        worker.reports = None

    def _failed(self, worker: _Worker, error: Exception) -> None:
        """A worker could not start: at the first start this ends the server."""
        if not self._has_begun and self._killed_at is None:
            raise error
        _log.error("worker %d cannot start: %s", worker.number, " ".join(str(error).split()))

    def _ended(self, worker: _Worker) -> None:
        """Plan the next start of a worker that has ended."""
        process, now = worker.process, time.monotonic()
        assert process is not None
        worker.process, was_ready, worker.is_ready = None, worker.is_ready, False
        self._forget(process.pid)
        if self._killed_at is not None:
            return
        reason = f"worker {worker.number} (process {process.pid}) ended with {process.exitcode}"
        if not self._has_begun:
            raise WorkerError(f"{reason} before it was ready, perhaps because memory ran out")
        steady = was_ready and now - worker.started > _STEADY
        worker.failures = 1 if steady else worker.failures + 1
        worker.uncounted += 1
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (worker.failures - 1))
        worker.starts_at = now + delay
        _log.error("%s; it is started again in %g s", reason, delay)

    def _forget(self, pid: int | None) -> None:
        """Remove the gauges of a process that has ended; what it has counted stays."""
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]


@contextmanager
def _metrics_folder() -> Iterator[str]:
    """A folder in which the workers share their metrics, and its name in the environment."""
    try:
        folder = tempfile.mkdtemp(prefix="logratio-metrics-")
    except OSError:
        raise ConfigError(
            "--workers needs a writable temporary folder: set TMPDIR, or mount one at /tmp"
        ) from None
    before = os.environ.get(FOLDER)
    os.environ[FOLDER] = folder
    try:
        yield folder
    finally:
        os.environ.pop(FOLDER)
        if before is not None:
            os.environ[FOLDER] = before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _received_signals() -> Iterator[tuple[deque[int], socket.socket]]:
    """Collect the numbers of signals; the socket becomes readable when one arrives."""
    received: deque[int] = deque()
    reads, writes = socket.socketpair()
    for end in (reads, writes):
        end.setblocking(False)
    before = {one: signal.signal(one, lambda n, _: received.append(n)) for one in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    try:
        yield received, reads
    finally:
        signal.set_wakeup_fd(wakeup)
        for one, handler in before.items():
            signal.signal(one, handler)
        reads.close()
        writes.close()


def _work(task: _Task) -> None:
    """Serve in this process, and end with the parent."""
    os.setsid()  # a terminal sends Ctrl-C to the parent alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    config, serving = task.config, list[bool]()
    Thread(target=_end_with_parent, args=(task.limits, serving), daemon=True).start()
    if config.provider == CUDA:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(task.number)
    threads = config.threads or max(1, default_threads() // config.workers)

    def ready(app: Any) -> None:
        serving.append(True)
        app.state.metrics.restarted(task.restarts)
        task.reports.send(app.state.bundles.title)

    try:
        task.serve(task.listener, replace(config, threads=threads), task.limits, ready)
    except Exception as error:  # the parent raises it, or logs it
        _report(task.reports, error)
        os._exit(1)


def _report(reports: Connection, error: Exception) -> None:
    is_known = isinstance(error, LogratioError | OSError)
    known = error if is_known else WorkerError(f"{type(error).__name__}: {error}")
    with suppress(OSError):  # the parent has closed its end: this worker was ready
        reports.send(known)


def _end_with_parent(limits: Limits, serving: list[bool]) -> NoReturn:
    """After the parent's end, finish the requests in flight, and remove the parent's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    if serving:
        os.kill(os.getpid(), signal.SIGINT)  # stops without a drain
        time.sleep(limits.shutdown_seconds + _GRACE)
    os._exit(1)
