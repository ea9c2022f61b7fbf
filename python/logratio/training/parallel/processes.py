"""The processes of a run, and what they tell each other.

Numbers that every update needs travel through torch's process group. Everything else (settings,
places of files, reasons to stop) is JSON in torch's key-value store, which exists before the group
and so has no timeout while one process of a host tokenizes data for hours.
"""

import atexit
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from logratio.errors import ConfigError
from logratio.training.parallel.lifeline import Lifeline

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""Longest wait for another process; `Lifeline` ends the wait if that process has died."""


class Processes:
    """This process and the others of the run; by default, this one alone.

    All processes must call the same methods in the same order.

    Attributes:
        rank: Index of this process, from 0.
        count: Number of processes.
        local_rank: Index of this process on its host.
        host: Index of its host.
        hosts: Number of hosts.
        per_prompt: Number of processes that have the same data, each with a part of its tokens.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, local_rank: int = 0, host: int = 0, hosts: int = 1
    ) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self.host, self.hosts = host, hosts
        self.per_prompt = 1
        self.lifeline: Lifeline | None = None
        self._store: Any = None
        self._asked = 0

    def __repr__(self) -> str:
        return f"Processes(rank {self.rank} of {self.count}, host {self.host} of {self.hosts})"

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run and prints."""
        return self.rank == 0

    @property
    def leads_host(self) -> bool:
        """Whether this process works for the others of its host."""
        return self.local_rank == 0

    @property
    def per_host(self) -> int:
        """Number of processes of a host."""
        return self.count // self.hosts

    def divide_prompts(self, size: int) -> None:
        """Let `size` processes with neighbouring ranks have the same data.

        Raises:
            ConfigError: The number of processes is not a multiple of `size`.
        """
        if self.count % size:
            remedy = (
                f"start it with torchrun --nproc-per-node {size}"
                if self.count == 1
                else "start a multiple of it"
            )
            raise ConfigError(
                f"--context-parallel-size {size} does not divide the number of processes, which is "
                f"{self.count}: {remedy}"
            )
        self.per_prompt = size

    @property
    def data_rank(self) -> int:
        """Index of this process's share of the data, from 0."""
        return self.rank // self.per_prompt

    @property
    def data_count(self) -> int:
        """Number of shares of the data."""
        return self.count // self.per_prompt

    @property
    def leads_share(self) -> bool:
        """Whether this is the process that counts among those with the same share of the data."""
        return self.rank % self.per_prompt == 0

    def connect(self, store: Any, *, is_guest: bool = False) -> None:
        """Use torch's key-value `store`, and begin to watch the other processes.

        Args:
            store: The store.
            is_guest: Whether the processes belong to another program, for example Ray.
        """
        store.set_timeout(PATIENCE)
        # torchrun keeps one store for all its restarts, with what earlier processes have written.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"logratio/{attempt}", store)
        watched = PrefixStore(f"alive/{attempt}", store.clone())
        self.lifeline = Lifeline(self.rank, self.count, watched, is_guest=is_guest)
        self.lifeline.start()

    def enter(self, phase: str) -> None:
        """Name what this process does now, for the message if it dies."""
        if self.lifeline:
            self.lifeline.phase = phase

    def start_group(
        self,
        device: torch.device,
        *,
        even_alone: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        """Create torch's process group, unless it exists. GPUs use NCCL, the rest gloo.

        Args:
            device: Device of this process.
            even_alone: Create a group of one process too.
            timeout: Longest duration of a collective; None: torch's default.
        """
        if self.count == 1 and not even_alone:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("group", self._store) if self._store else HashStore(),
            rank=self.rank,
            world_size=self.count,
            timeout=timeout,
        )
        atexit.register(_end_group)

    @cached_property
    def group_for_writing(self) -> Any:
        """A separate group for threads that write files, so that no collectives get mixed up."""
        return dist.new_group(backend="gloo")

    @cached_property
    def _host_group(self) -> Any:
        """The group for tensors on the host: gloo's own if somebody else made one for GPUs only."""
        return None if "cpu:" in dist.get_backend_config() else dist.new_group(backend="gloo")

    def _group_of(self, values: Tensor) -> Any:
        return self._host_group if values.device.type == "cpu" else None

    def share(self, value: Any) -> list[Any]:
        """Return the `value` of every process, in the order of their ranks. Values are JSON."""
        if self.count == 1:
            return [value]
        if dist.is_initialized():
            own = json.dumps(value).encode()
            return [json.loads(text) for text in _gathered(own, self.count, self._host_group)]
        self._asked += 1
        key = f"{self._asked}"
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.count)]

    def from_first(self, value: Callable[[], T]) -> T:
        """Return `value()` of the first process, where alone it is called. It is JSON."""
        if self.count == 1:
            return value()
        self._asked += 1
        if self.is_first:
            self._store.set(f"{self._asked}", json.dumps(value()))
        found: T = json.loads(self._store.get(f"{self._asked}"))
        return found

    def from_leader(self, value: Callable[[], T]) -> T:
        """Return `value()` of this host's leader, where alone it is called. It is JSON."""
        if self.count == 1:
            return value()
        self._asked += 1
        key = f"{self._asked}/host/{self.host}"
        if self.leads_host:
            self._store.set(key, json.dumps(value()))
        found: T = json.loads(self._store.get(key))
        return found

    def wait(self) -> None:
        """Wait until all processes have called this, however long it takes."""
        if self.count == 1:
            return
        self._asked += 1
        key = f"{self._asked}/arrived"
        if self._store.add(key, 1) == self.count:
            self._store.set(f"{key}/all", "")
        self._store.get(f"{key}/all")

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes; the same bits in each."""
        if self.count > 1:
            dist.all_reduce(values, group=self._group_of(values))
        return values

    def total_of_data(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all shares of the data; the same bits in each process."""
        return self.total(values if self.leads_share else torch.zeros_like(values))

    def most(self, values: Tensor) -> Tensor:
        """Return the largest of `values` over all processes, element by element."""
        if self.count > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, self._group_of(values))
        return values

    def highest(self, number: int) -> int:
        """Return the highest `number` of any process."""
        return int(self.most(torch.tensor(number))) if self.count > 1 else number


ALONE = Processes()
"""A process that trains by itself."""


def processes_of(environment: Mapping[str, str] = os.environ) -> Processes:
    """Describe the processes that torchrun started, from its environment variables.

    Raises:
        ConfigError: A variable is missing, or they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return Processes()
    try:
        rank, count, local, per_host = (int(environment.get(name, "")) for name in names)
    except ValueError as error:
        raise ConfigError(
            f"start the processes with torchrun, which sets {', '.join(names)} to numbers "
            f"(found {_shown(environment, names)}); for one process, unset RANK"
        ) from error
    if not (0 <= rank < count and 0 <= local < per_host and count % per_host == 0):
        raise ConfigError(
            f"the environment variables contradict each other "
            f"({_shown(environment, names)}): every host must run the same number of processes"
        )
    if count > per_host and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ConfigError(
            "torchrun restarts processes on one host only (max_restarts): the agents of several "
            "hosts count restarts differently. Leave it at 0, and let the scheduler start the job "
            "again, with --resume"
        )
    host = int(environment.get("GROUP_RANK", rank // per_host))
    return Processes(rank, count, local, host, count // per_host)


def _shown(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {environment.get(name, 'unset')}" for name in names)


_joined: Processes | None = None


def join_processes() -> Processes:
    """Return the processes of this run, connected; the same object at every call.

    Raises:
        ConfigError: The environment variables are wrong, the other processes are not reached, or
            an earlier run of the processes has failed.
    """
    global _joined
    if _joined is None:
        found = processes_of()
        if found.count > 1:
            is_guest = dist.is_initialized() and not dist.is_torchelastic_launched()
            store = _own_store(found) if dist.is_initialized() else _rendezvous(found)
            found.connect(store, is_guest=is_guest)
        _joined = found
    if _joined.lifeline and _joined.lifeline.has_ended:
        raise ConfigError("an earlier run of these processes has failed: start new processes")
    return _joined


def _rendezvous(processes: Processes) -> Any:
    from torch.distributed.rendezvous import rendezvous

    try:
        return next(iter(rendezvous("env://", processes.rank, processes.count)))[0]
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"the {processes.count} processes cannot reach each other at MASTER_ADDR "
            f"{os.environ.get('MASTER_ADDR')}, MASTER_PORT {os.environ.get('MASTER_PORT')}: {error}"
        ) from error


def _own_store(processes: Processes) -> Any:
    """Create a store for processes whose group somebody else has created, for example Ray."""
    place: list[Any] = [None]
    store = None
    if processes.is_first:
        # Other hosts may not know this host's name: pods of Kubernetes do not.
        name = os.environ.get("MASTER_ADDR") or socket.gethostname()
        store = TCPStore(name, 0, None, is_master=True, wait_for_workers=False)
        place = [(store.host, store.port)]
    dist.broadcast_object_list(place)
    if store is None:
        host, port = place[0]
        store = TCPStore(host, port, None, is_master=False, wait_for_workers=False)
    return store


def _gathered(own: bytes, count: int, group: Any) -> list[bytes]:
    """Return the bytes of every process."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    dist.all_gather(lengths, torch.tensor([len(own)]), group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(count)]
    dist.all_gather(texts, padded, group)
    found = zip(texts, lengths, strict=True)
    return [bytes(text[: int(length)].tolist()) for text, length in found]


def _end_group() -> None:
    with suppress(Exception):
        dist.destroy_process_group()
