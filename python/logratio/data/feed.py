"""A store to micro-batches, one ahead: plan, arrays in reused buffers, and a position."""

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
from logratio.validation import check_fields

T = TypeVar("T")


class _End:
    """The last thing a maker says: there is no more, or why not."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Maker(Thread, Generic[T]):
    """Makes items as long as there is room for them."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        super().__init__(name="logratio-ahead", daemon=True)
        self._items = items
        self._room = Semaphore(depth)
        self._stopping = False
        self.ready: SimpleQueue[T | _End] = SimpleQueue()

    def run(self) -> None:
        end = _End()
        try:
            self._make()
        except BaseException as error:  # raised again by whoever reads
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
        """Wait for the next item; Ctrl-C gets through."""
        item = self.ready.get()
        self._room.release()
        return item

    def stop(self) -> None:
        """End the thread after the item it is at."""
        self._stopping = True
        self._room.release()
        self.join()


_running: WeakSet[_Maker] = WeakSet()  # type: ignore[type-arg]  # of whatever items


@atexit.register
def _stop_all() -> None:
    """Let no thread run into the end of the interpreter."""
    for maker in list(_running):
        maker.stop()


def ahead(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """Yield `items`, made up to `depth` ahead on a thread; 0 makes them here.

    The thread ends when the generator does: after the last item, when it is closed, or when nothing
    refers to it.

    Raises:
        ValueError: depth is below 0.
        BaseException: what making an item raised, at its place in the order.
    """
    if depth < 0:
        raise ConfigError(f"depth must be at least 0, not {depth}")
    return _read(items, depth) if depth else _make_here(items)


def _make_here(items: Iterable[T]) -> Generator[T, None, None]:
    yield from items


def _read(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    maker = _Maker(items, depth)
    _running.add(maker)
    maker.start()
    try:
        while not isinstance(item := maker.take(), _End):
            yield item
            del item  # or its buffer would wait here for the next one
        if item.error is not None:
            raise item.error
    finally:
        maker.stop()
        _running.discard(maker)


class _Loan(ref[NDArray[np.uint8]]):
    """Knows which memory an array was lent, to the array's end and a moment longer."""

    __slots__ = ("storage",)
    __hash__ = object.__hash__
    storage: NDArray[np.uint8]


class Arenas:
    """Buffers that come back by themselves when nothing refers to what is in them any more.

    A batch that is kept (in a list, in an autograd graph) keeps its buffer, and another is made:
    no batch is ever overwritten while someone can still read it. A reader who drops each batch
    before the next but one needs three buffers in all.
    """

    def __init__(self) -> None:
        self._loans: set[_Loan] = set()
        # Loans that ended. Their callback is `append` itself: one written in Python could be where
        # Ctrl-C strikes, and what a callback raises is lost.
        self._ended: deque[ref[NDArray[np.uint8]]] = deque()

    def __call__(self, nbytes: int) -> NDArray[np.uint8]:
        """Lend a buffer of `nbytes` bytes, uint8 `[nbytes]`, with whatever was in it."""
        storage = self._take(nbytes)
        # Views of an array are views of its owner, but not through a memoryview: every view of
        # `lent` keeps `lent` itself alive, and its end is the end of them all.
        lent = np.frombuffer(storage.data, np.uint8, nbytes)
        loan = _Loan(lent, self._ended.append)
        loan.storage = storage
        self._loans.add(loan)
        return lent

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        while self._ended:
            loan = self._ended.popleft()
            assert isinstance(loan, _Loan)
            self._loans.discard(loan)
            if len(loan.storage) >= nbytes:
                return loan.storage
        return np.empty(nbytes + nbytes // 4, np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process begins with no buffers."""
        return Arenas, ()


Buffer = NDArray[np.uint8] | Callable[[int], NDArray[np.uint8]]
"""A buffer to fill, uint8, or what makes one of the bytes it is called with."""


def micro_batches(plan: Plan, update: int | None = None) -> list[NDArray[np.int64]]:
    """Return the group numbers of each micro-batch, as views into the plan.

    Args:
        plan: This rank's share of an epoch.
        update: Of which optimizer step, from 0; None: of all.
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
    """Lay out `groups`, all arrays in one buffer.

    Args:
        store: where the groups are.
        groups: int64 `[G]`, their numbers.
        layout: "shared" (one row of `T` tokens, each prompt once), "tree" (likewise, what groups
            begin with alike once) or "padded" (`[N, T]`).
        arena: the buffer to fill, or what makes it; None: a fresh one.
        fields: the arrays to lay out; None: those that training reads. See `rust/layout/field.rs`.
        side: where the padding of the padded layout is, "left" or "right".
        multiple_of: `T` is rounded up to a multiple of this.
        width: `T` is this (rounded up likewise) whatever the groups need.
        pad_id: the token id in padding.

    Raises:
        ValueError: an argument is none of these, or the groups do not fit in `width` or `arena`.
        IndexError: there is no such group.
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
    """A saved position belongs to another order of the data."""


@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """Which groups come together, in which order, in which shape.

    Attributes:
        groups_per_update: groups of one optimizer step, over all ranks.
        token_budget: the most tokens of a micro-batch (padded: rows × longest row).
        layout: "shared", "tree" or "padded", as `lay_out` takes it.
        order: "length_grouped", "shuffled" or "sorted".
        seed: of every random choice.
        weights, datasets: the weight of each dataset, and the dataset of each file of the store: an
            epoch then mixes datasets by weight.
        attention_cost: work of a token pair that attends, in tokens; balances ranks. With hidden
            size h, 1/(6·h) estimates operations.
        side, multiple_of, width, pad_id, fields: as `lay_out` takes them.
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
        if self.groups_per_update < 1:  # the rest is for the planner and the layouts to say
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
        """Return what decides which groups a position stands for; plain values, for JSON."""
        shape = {"side", "multiple_of", "width", "pad_id", "fields"}
        fields = {name: value for name, value in asdict(self).items() if name not in shape}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        layout: the arrays, views of one buffer.
        epoch, update, number: its place: pass over the data, optimizer step of the pass,
            micro-batch of this rank's share of the step, each from 0.
        count: this rank's micro-batches of the step.
        groups: groups in this rank's share of the step.
        update_groups: groups of the step over all ranks.
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
    """The next micro-batch: pass over the data, optimizer step of it, micro-batch of it."""

    epoch: int = 0
    update: int = 0
    micro_batch: int = 0


class Feed:
    """Micro-batches of a rank's share of a store, each made while the one before is used.

    Iterating goes on from the position, and the position moves with every batch handed over; one
    iteration at a time. Updates do not depend on `rank` and `world_size`, so a position between two
    updates holds for any number of ranks.
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
        """Prepare a feed; nothing is planned and no thread runs before it is iterated.

        Args:
            store: the groups.
            settings: their order and shape.
            epochs: passes over the data.
            rank: which share of every update.
            world_size: how many shares there are.
            depth: batches to make ahead, on a thread; 0: none (for a DataLoader's worker, which is
                ahead itself).
            allocate: makes a buffer of the bytes it is called with; None: reused memory.
        """
        self.store, self.settings, self.epochs = store, settings, epochs
        self.rank, self.world_size, self.depth = rank, world_size, depth
        self.position = Position()
        self._allocate = allocate or Arenas()

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

        For the workers of a DataLoader: their parts together are the share, each group once.

        Raises:
            FeedStateError: the position is inside an update, which stands for these ranks only.
        """
        if self.position.micro_batch:
            raise FeedStateError(
                f"a feed can be shared between updates only, not at {self.position}"
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
        """Yield from the position on.

        Raises:
            ValueError: the settings are impossible; names the one.
            CorruptStoreError: the store is damaged.
        """
        with closing(ahead(self._made(self.position), self.depth)) as batches:
            for batch in batches:
                self.position = self._after(batch)
                yield batch
                del batch  # or its buffer would wait here for the next one

    def _made(self, start: Position) -> Iterator[MicroBatch]:
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
        """Set the position to after the first `updates` updates of the run."""
        self.position = Position(*divmod(updates, max(1, self.updates_per_epoch)))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {"store": self.store.digest, **self.settings.order_of_updates()}

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it belongs to, plain values for JSON.

        What was handed over counts as done. Where a rank has no group of an update, its position is
        before it: save rank 0's, which always has one.
        """
        ranks = {"rank": self.rank, "world_size": self.world_size}
        return {"position": asdict(self.position), "ranks": ranks, "of": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            FeedStateError: it was saved with another store or another order (names what differs),
                or inside an update with other ranks.
        """
        for name, own in self._identity.items():
            if (saved := state["of"].get(name)) != own:
                raise FeedStateError(
                    f"the position was saved with {name} {saved!r}, and here it is {own!r}: "
                    "it stands for other groups"
                )
        position = Position(**state["position"])
        ranks = {"rank": self.rank, "world_size": self.world_size}
        if position.micro_batch and state["ranks"] != ranks:
            raise FeedStateError(
                f"the position was saved inside update {position.update} with {state['ranks']}, "
                f"and here it is {ranks}: only a position between updates holds for other ranks"
            )
        self.position = position
