"""Micro-batches of a store: planned, prefetched on a thread, in reused buffers, resumable."""

import atexit
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, Generic, TypeVar
from weakref import WeakSet, ref

import numpy as np
from numpy.typing import NDArray

from logratio._rust import PaddedLayout, Plan, SharedLayout, Store, TreeLayout
from logratio.errors import ConfigError, LogratioError
from logratio.synonyms import takes_known_names
from logratio.validation import check_fields

T = TypeVar("T")


class _End:
    """The end of a producer's items, with its error if it failed."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Producer(Thread, Generic[T]):
    """Produces items on a thread while the queue has room."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        super().__init__(name="logratio-prefetch", daemon=True)
        self._items = items
        self._room = Semaphore(depth)
        self._stopping = False
        self.ready: SimpleQueue[T | _End] = SimpleQueue()

    def run(self) -> None:
        end = _End()
        try:
            self._make()
        except BaseException as error:  # raised again in the consumer
            end = _End(error)
        self.ready.put(end)

    def _make(self) -> None:
        items = iter(self._items)
        while self._wanted():
            try:
                self.ready.put(next(items))
            except StopIteration:
                return

    def _wanted(self) -> bool:
        self._room.acquire()
        return not self._stopping

    def take(self) -> T | _End:
        """Wait for the next item; Ctrl-C interrupts the wait."""
        item = self.ready.get()
        self._room.release()
        return item

    def stop(self) -> None:
        """Stop the thread after its current item."""
        self._stopping = True
        self._room.release()
        self.join()


_running: WeakSet[_Producer] = WeakSet()  # type: ignore[type-arg]


@atexit.register
def _stop_all() -> None:
    """Stop all threads before the interpreter ends."""
    for producer in list(_running):
        producer.stop()


def prefetch(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """Yield `items`, up to `depth` of them prefetched on a thread.

    The thread ends with the generator: after the last item, when it is closed, or when it is
    garbage-collected.

    Args:
        items: The items, in order.
        depth: Items to prefetch; 0 uses no thread.

    Raises:
        ValueError: `depth` is negative.
        BaseException: The error of an item, in its place in the order.
    """
    if depth < 0:
        raise ConfigError(f"depth must be at least 0, not {depth}")
    return _read(items, depth) if depth else _iterate(items)


def _iterate(items: Iterable[T]) -> Generator[T, None, None]:
    yield from items


def _read(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    producer = _Producer(items, depth)
    _running.add(producer)
    producer.start()
    try:
        while not isinstance(item := producer.take(), _End):
            yield item
            del item  # frees its buffer before waiting for the next item
        if item.error is not None:
            raise item.error
    finally:
        producer.stop()
        _running.discard(producer)


class _Lease(ref[NDArray[np.uint8]]):
    """A weak reference to a leased array that keeps the storage behind it."""

    __slots__ = ("storage",)
    __hash__ = object.__hash__
    storage: NDArray[np.uint8]


class BufferPool:
    """A pool of buffers, each reused once nothing refers to its contents.

    A batch that is kept (in a list, in an autograd graph) keeps its buffer, and a new one is
    allocated: no batch is overwritten while it can still be read. With a prefetch depth of 1, a
    loop that keeps at most two batches needs three buffers.
    """

    def __init__(self) -> None:
        self._leases: set[_Lease] = set()
        # Leases that ended. The callback is `deque.append` itself: Ctrl-C could interrupt one in
        # Python, and exceptions in callbacks are lost.
        self._ended: deque[ref[NDArray[np.uint8]]] = deque()

    def __call__(self, nbytes: int) -> NDArray[np.uint8]:
        """Return a buffer of `nbytes` bytes, uint8 `[nbytes]`, with arbitrary contents."""
        storage = self._take(nbytes)
        # A view of an array refers to the array's owner, except through a memoryview: every view of
        # `leased` keeps `leased` itself alive, so its end is the end of all views.
        leased = np.frombuffer(storage.data, np.uint8, nbytes)
        lease = _Lease(leased, self._ended.append)
        lease.storage = storage
        self._leases.add(lease)
        return leased

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        while self._ended:
            lease = self._ended.popleft()
            assert isinstance(lease, _Lease)
            self._leases.discard(lease)
            if len(lease.storage) >= nbytes:
                return lease.storage
        return np.empty(nbytes + nbytes // 4, np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without buffers: another process starts with an empty pool."""
        return BufferPool, ()


Buffer = NDArray[np.uint8] | Callable[[int], NDArray[np.uint8]]
"""A uint8 buffer to fill, or a function that returns one of the requested number of bytes."""


def micro_batches(plan: Plan, update: int | None = None) -> list[NDArray[np.int64]]:
    """Return the group numbers of each micro-batch, int64, as views into the plan.

    Args:
        plan: This rank's share of an epoch.
        update: The optimizer step, from 0. None: all steps.
    """
    offsets = plan.micro_offsets
    if update is not None:
        first, last = plan.update_offsets[update : update + 2]
        offsets = offsets[first : last + 1]
    return [plan.order[start:stop] for start, stop in pairwise(offsets.tolist())]


def lay_out(
    store: Store,
    groups: NDArray[np.int64],
    layout: str = "shared",
    *,
    arena: Buffer | None = None,
    fields: Sequence[str] | None = None,
    side: str = "right",
    multiple_of: int = 1,
    width: int | None = None,
    pad_id: int = 0,
) -> SharedLayout | TreeLayout | PaddedLayout:
    """Build the arrays of a micro-batch, all in one buffer.

    Args:
        store: The store.
        groups: int64 `[G]`, the numbers of the groups.
        layout: "shared" (one row of `T` tokens, each prompt once), "tree" (the same, with common
            prefixes of the groups once) or "padded" (`[N, T]`).
        arena: The buffer to fill, or a function that allocates it. None: a new buffer.
        fields: The arrays to build. None: those that training reads. See `rust/layout/field.rs`.
        side: The padding side of the padded layout, "left" or "right".
        multiple_of: `T` is rounded up to a multiple of this.
        width: A fixed `T` (rounded up as well). None: as long as needed.
        pad_id: The token id in padding.

    Returns:
        The arrays, as views of the buffer.

    Raises:
        ValueError: An argument is invalid, or the groups do not fit in `width` or `arena`.
        IndexError: A group does not exist.
    """
    if layout in ("shared", "tree"):
        lay = store.shared_layout if layout == "shared" else store.tree_layout
        return lay(
            groups,
            arena=arena,
            fields=fields,
            multiple_of=multiple_of,
            width=width,
            pad_id=pad_id,
        )
    if layout != "padded":
        raise ConfigError(f"layout must be shared, tree or padded, not {layout!r}")
    return store.padded_layout(
        groups,
        arena=arena,
        fields=fields,
        side=side,
        multiple_of=multiple_of,
        width=width,
        pad_id=pad_id,
    )


class FeedStateError(LogratioError, ValueError):
    """A saved position does not match the data or its order."""


@takes_known_names()
@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """The order, batching and layout of a feed.

    Attributes:
        groups_per_update: Groups per optimizer step, over all ranks.
        token_budget: Most tokens of a micro-batch (padded: rows × longest row).
        layout: "shared", "tree" or "padded"; see `lay_out`.
        order: "length_grouped", "shuffled" or "sorted".
        seed: Seed of every random choice.
        weights: Weight of each dataset, to mix datasets by weight. None: no mixing.
        datasets: The dataset of each file of the store; required with `weights`.
        attention_cost: Cost of one attended token pair, in tokens, to balance the ranks. With
            hidden size h, 1/(6·h) estimates the operations.
        side: See `lay_out`.
        multiple_of: See `lay_out`.
        width: See `lay_out`.
        pad_id: See `lay_out`.
        fields: See `lay_out`.
    """

    groups_per_update: int
    token_budget: int
    layout: str = "shared"
    order: str = "length_grouped"
    seed: int = 0
    weights: tuple[float, ...] | None = None
    datasets: tuple[int, ...] | None = None
    attention_cost: float = 0.0
    side: str = "right"
    multiple_of: int = 1
    width: int | None = None
    pad_id: int = 0
    fields: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.groups_per_update < 1:  # the planner and the layouts check the rest
            raise ConfigError(f"groups_per_update must be at least 1, not {self.groups_per_update}")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed must be in 0 … 2^64 - 1, not {self.seed}")

    def plan(self, store: Store, epoch: int, rank: int = 0, world_size: int = 1) -> Plan:
        """Plan one rank's share of an epoch."""
        weights = None if self.weights is None else np.array(self.weights, np.float64)
        datasets = None if self.datasets is None else np.array(self.datasets, np.uint32)
        return store.plan(
            order=self.order,
            seed=self.seed,
            epoch=epoch,
            groups_per_update=self.groups_per_update,
            token_budget=self.token_budget,
            layout=self.layout,
            rank=rank,
            world_size=world_size,
            weights=weights,
            datasets=datasets,
            attention_cost=self.attention_cost,
        )

    def order_of_updates(self) -> dict[str, Any]:
        """Return the settings that determine the groups at a position, as JSON values."""
        shape = {"side", "multiple_of", "width", "pad_id", "fields"}
        fields = {name: value for name, value in asdict(self).items() if name not in shape}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch.

    Attributes:
        layout: The arrays, views of one buffer.
        epoch: Pass over the data, from 0.
        update: Optimizer step of the pass, from 0.
        number: Micro-batch of this rank's share of the step, from 0.
        count: This rank's number of micro-batches in the step.
        groups: Groups in this rank's share of the step.
        update_groups: Groups of the step over all ranks.
    """

    layout: SharedLayout | TreeLayout | PaddedLayout
    epoch: int
    update: int
    number: int
    count: int
    groups: int
    update_groups: int


@dataclass(frozen=True)
class Position:
    """The next micro-batch: pass over the data, optimizer step in it, micro-batch in that."""

    epoch: int = 0
    update: int = 0
    micro_batch: int = 0


class Feed:
    """Iterates over the micro-batches of a rank's share of a store, with prefetch.

    Iteration starts at the position, which advances with every yielded batch. Only one iteration
    may run at a time. The groups of an update do not depend on `rank` and `world_size`, so a
    position between two updates is valid for any number of ranks.

    Example:
        >>> feed = Feed(store, FeedSettings(groups_per_update=4, token_budget=1024), epochs=2)
        >>> for batch in feed:
        ...     ids = batch.layout.input_ids  # numpy, no copy
        >>> state = feed.state_dict()
    """

    def __init__(
        self,
        store: Store,
        settings: FeedSettings,
        *,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 1,
        allocate: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        """Prepare a feed; planning and the thread start with the first iteration.

        Args:
            store: The store.
            settings: Order, batching and layout.
            epochs: Passes over the data.
            rank: Index of this rank's share of every update.
            world_size: Number of ranks.
            depth: Batches to prefetch on a thread; 0 for none (a DataLoader's worker already
                prefetches).
            allocate: Returns a buffer of the requested number of bytes. None: a `BufferPool`.
        """
        self.store, self.settings, self.epochs = store, settings, epochs
        self.rank, self.world_size, self.depth = rank, world_size, depth
        self.position = Position()
        self._allocate = allocate or BufferPool()

    def __repr__(self) -> str:
        return (
            f"Feed({len(self.store):,} groups, {self.epochs} epochs, rank {self.rank} of "
            f"{self.world_size}, at epoch {self.position.epoch}, update {self.position.update})"
        )

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return -(-len(self.store) // self.settings.groups_per_update)

    def share(self, part: int, parts: int) -> "Feed":
        """Return a feed of one of `parts` parts of this rank's share, from the position on.

        For the workers of a DataLoader: together they yield each group of the share once.

        Args:
            part: Index of the part, from 0.
            parts: Number of parts.

        Raises:
            FeedStateError: The position is inside an update, which is valid for these ranks only.
        """
        if self.position.micro_batch:
            raise FeedStateError(
                f"a feed can be shared only between updates, not at {self.position}"
            )
        feed = Feed(
            self.store,
            self.settings,
            epochs=self.epochs,
            rank=self.rank * parts + part,
            world_size=self.world_size * parts,
            depth=0,
        )
        feed.position = self.position
        return feed

    def __iter__(self) -> Generator[MicroBatch, None, None]:
        """Yield micro-batches from the position on.

        Raises:
            ValueError: A setting is invalid; the message names it.
            CorruptStoreError: The store is damaged.
        """
        with closing(prefetch(self._batches(self.position), self.depth)) as batches:
            for batch in batches:
                self.position = self._after(batch)
                yield batch
                del batch  # frees its buffer before waiting for the next batch

    def _batches(self, start: Position) -> Iterator[MicroBatch]:
        for epoch in range(start.epoch, self.epochs):
            plan = self.settings.plan(self.store, epoch, self.rank, self.world_size)
            first = start.update if epoch == start.epoch else 0
            for update in range(first, self.updates_per_epoch):
                done = start.micro_batch if (epoch, update) == (start.epoch, start.update) else 0
                yield from self._update(plan, epoch, update, done)

    def _update(self, plan: Plan, epoch: int, update: int, done: int) -> Iterator[MicroBatch]:
        parts = micro_batches(plan, update)
        size = self.settings.groups_per_update
        groups, whole = sum(map(len, parts)), min(size, len(self.store) - update * size)
        for number in range(done, len(parts)):
            layout = self._lay_out(parts[number])
            yield MicroBatch(layout, epoch, update, number, len(parts), groups, whole)
            del layout

    def _lay_out(self, groups: NDArray[np.int64]) -> SharedLayout | TreeLayout | PaddedLayout:
        settings = self.settings
        return lay_out(
            self.store,
            groups,
            settings.layout,
            arena=self._allocate,
            fields=settings.fields,
            side=settings.side,
            multiple_of=settings.multiple_of,
            width=settings.width,
            pad_id=settings.pad_id,
        )

    def _after(self, batch: MicroBatch) -> Position:
        if batch.number + 1 < batch.count:
            return Position(batch.epoch, batch.update, batch.number + 1)
        if batch.update + 1 < self.updates_per_epoch:
            return Position(batch.epoch, batch.update + 1)
        return Position(batch.epoch + 1)

    def start_after(self, updates: int) -> None:
        """Move the position to the end of the first `updates` updates of the run."""
        self.position = Position(*divmod(updates, max(1, self.updates_per_epoch)))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {"store": self.store.digest, **self.settings.order_of_updates()}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the ranks and the identity of the data, as JSON values.

        Yielded batches count as done. A rank without a group in an update remains at the position
        before it: save the state of rank 0, which always has one.
        """
        ranks = {"rank": self.rank, "world_size": self.world_size}
        return {"position": asdict(self.position), "ranks": ranks, "of": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved position.

        Args:
            state: A result of `state_dict`.

        Raises:
            FeedStateError: The position was saved with another store or another order (the message
                names the difference), or inside an update with other ranks.
        """
        for name, own in self._identity.items():
            if (saved := state["of"].get(name)) != own:
                raise FeedStateError(
                    f"the position was saved with {name} {saved!r}, but here it is {own!r}: "
                    "it refers to other groups"
                )
        position = Position(**state["position"])
        ranks = {"rank": self.rank, "world_size": self.world_size}
        if position.micro_batch and state["ranks"] != ranks:
            raise FeedStateError(
                f"the position was saved inside update {position.update} with {state['ranks']}, "
                f"but here they are {ranks}: only positions between updates are valid for others"
            )
        self.position = position
