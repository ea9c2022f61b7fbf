"""One item ahead, on a thread: what comes next is made while this one is used."""

import atexit
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, TypeVar
from weakref import WeakSet

from logratio.errors import ConfigError

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
