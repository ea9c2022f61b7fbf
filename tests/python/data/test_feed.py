"""The feed: planned batches, prefetch, reused buffers, positions, workers, and its end."""

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from worker_dataset import FedDataset

from logratio._rust import Store, StoreWriter
from logratio.data import Feed, FeedSettings, FeedStateError, MicroBatch
from logratio.data.feed import lay_out, prefetch

SETTINGS = FeedSettings(groups_per_update=8, token_budget=60, seed=3)


def make_store(count: int, path: Path | None = None, same: bool = False) -> Store:
    """Store pairs of different lengths from two files."""
    writer = StoreWriter(path)
    for number in range(count):
        chosen, rejected = (4, 4) if same else (1 + number % 7, 1 + number * 5 % 11)
        writer.push(
            np.arange(3 if same else 1 + number % 5, dtype=np.int32),
            np.arange(chosen + rejected, dtype=np.int32) + number,
            np.ones(chosen + rejected, np.uint8),
            np.array([chosen, rejected], np.uint32),
            np.array([0, 1], np.uint8),
            number % 2,
            number,
        )
    return writer.finish()


def places(batches: Iterator[MicroBatch]) -> list[tuple[int, int, list[int]]]:
    return [(b.epoch, b.update, b.layout.groups.tolist()) for b in batches]


def test_the_repr_of_a_feed_has_its_position() -> None:
    feed = Feed(make_store(43), SETTINGS, epochs=2, rank=1, world_size=2)
    assert repr(feed) == "Feed(43 groups, 2 epochs, rank 1 of 2, at epoch 0, update 0)"


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_feed_is_the_plan_laid_out(layout: str, depth: int) -> None:
    store, settings = make_store(43), replace(SETTINGS, layout=layout)
    batches = list(Feed(store, settings, epochs=2, depth=depth))  # kept: none is overwritten
    at = 0
    for epoch in range(2):
        plan = settings.plan(store, epoch)
        for start, stop in zip(plan.micro_offsets, plan.micro_offsets[1:], strict=False):
            batch, expected = batches[at], lay_out(store, plan.order[start:stop], layout)
            at += 1
            assert batch.epoch == epoch
            for name in expected.table:
                assert np.array_equal(getattr(batch.layout, name), getattr(expected, name)), name
    assert at == len(batches)
    by_update: dict[tuple[int, int], list[MicroBatch]] = {}
    for batch in batches:
        by_update.setdefault((batch.epoch, batch.update), []).append(batch)
    for (_, update), parts in by_update.items():
        assert [part.number for part in parts] == list(range(parts[0].count))
        groups = sum(len(part.layout.groups) for part in parts)
        assert {part.groups for part in parts} == {groups} == {8 if update < 5 else 3}
        assert {part.update_groups for part in parts} == {groups}


def test_batches_that_are_dropped_lend_their_buffers_to_the_next() -> None:
    used = set()
    for batch in Feed(make_store(400, same=True), SETTINGS, epochs=2):
        used.add(batch.layout.arena.ctypes.data)
    assert len(used) <= 3


def test_ranks_share_every_update() -> None:
    store = make_store(61)
    alone = places(iter(Feed(store, SETTINGS)))
    for world_size in (2, 3, 7):
        feeds = [Feed(store, SETTINGS, rank=r, world_size=world_size) for r in range(world_size)]
        ranks = [places(iter(feed)) for feed in feeds]
        for update in range(8):
            together = sorted(g for rank in ranks for _, u, gs in rank if u == update for g in gs)
            assert together == sorted(g for _, u, gs in alone if u == update for g in gs)


def test_a_mixture_is_fed_by_weight() -> None:
    settings = replace(SETTINGS, weights=(3.0, 1.0), datasets=(0, 1))
    fed = places(iter(Feed(make_store(40), settings, epochs=6)))
    counts = np.bincount([group for _, _, groups in fed for group in groups], minlength=40)
    assert counts[::2].sum() == 6 * 30
    assert set(counts[::2].tolist()) == {9}
    assert set(counts[1::2].tolist()) == {3}


def test_every_position_gives_the_same_rest() -> None:
    store = make_store(43)
    whole = places(iter(Feed(store, SETTINGS, epochs=2)))
    for stop in range(len(whole) + 1):
        feed = Feed(store, SETTINGS, epochs=2)
        batches = iter(feed)
        before = [next(batches) for _ in range(stop)]
        batches.close()
        state = json.loads(json.dumps(feed.state_dict()))
        other = Feed(make_store(43), SETTINGS, epochs=2)
        other.load_state_dict(state)
        assert places(iter(before)) + places(iter(other)) == whole
        assert places(iter(other)) == []


def test_a_position_between_updates_holds_for_other_ranks() -> None:
    store, reached = make_store(61), 5
    feed = Feed(store, SETTINGS, world_size=3)
    for batch in feed:
        if batch.update + 1 == reached and batch.number + 1 == batch.count:
            break
    rest: list[int] = []
    for rank in range(2):
        other = Feed(store, SETTINGS, rank=rank, world_size=2)
        other.load_state_dict(feed.state_dict())
        rest += [group for _, _, groups in places(iter(other)) for group in groups]
    alone = places(iter(Feed(store, SETTINGS)))
    assert sorted(rest) == sorted(g for _, u, groups in alone if u >= reached for g in groups)
    after = Feed(store, SETTINGS)
    after.start_after(reached)
    assert places(iter(after)) == [place for place in alone if place[1] >= reached]


def test_a_position_of_another_order_is_refused() -> None:
    state = Feed(make_store(20), SETTINGS).state_dict()
    for store, settings, name in (
        (make_store(21), SETTINGS, "store"),
        (make_store(20), replace(SETTINGS, seed=4), "seed 3, but here it is 4"),
        (make_store(20), replace(SETTINGS, token_budget=61), "token_budget"),
        (make_store(20), replace(SETTINGS, weights=(1.0,), datasets=(0, 0)), "weights"),
    ):
        with pytest.raises(FeedStateError, match=name):
            Feed(store, settings).load_state_dict(state)
    Feed(make_store(20), replace(SETTINGS, multiple_of=8)).load_state_dict(state)


def test_a_position_inside_an_update_belongs_to_one_rank() -> None:
    settings = replace(SETTINGS, token_budget=30)
    feed = Feed(make_store(43), settings)
    batches = iter(feed)
    next(batches)
    batches.close()
    assert feed.position.micro_batch == 1
    with pytest.raises(FeedStateError, match="inside update 0"):
        Feed(make_store(43), settings, world_size=2).load_state_dict(feed.state_dict())
    with pytest.raises(FeedStateError, match="between updates"):
        feed.share(0, 2)


def feeding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "logratio-prefetch"]


def test_errors_on_the_thread_are_raised_in_the_reader() -> None:
    calls: list[int] = []

    def allocate(nbytes: int) -> NDArray[np.uint8]:
        calls.append(nbytes)
        if len(calls) == 3:
            raise MemoryError("no room for a third")
        return np.empty(nbytes, np.uint8)

    batches = iter(Feed(make_store(43), SETTINGS, allocate=allocate))
    assert [next(batches).update for _ in range(2)] == [0, 1]
    with pytest.raises(MemoryError, match="no room for a third"):
        next(batches)
    assert not feeding_threads()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="groups_per_update"):
        replace(SETTINGS, groups_per_update=0)
    with pytest.raises(ValueError, match="order must be"):
        list(Feed(make_store(3), replace(SETTINGS, order="random")))
    with pytest.raises(ValueError, match="depth"):
        list(Feed(make_store(3), SETTINGS, depth=-1))


def test_no_groups_give_no_batch() -> None:
    feed = Feed(make_store(0), SETTINGS)
    assert list(feed) == []


@pytest.mark.parametrize("end", ["close", "break", "forget"])
def test_the_thread_ends_with_its_reader(end: str) -> None:
    batches = iter(Feed(make_store(400), SETTINGS))
    next(batches)
    assert len(feeding_threads()) == 1
    if end == "close":
        batches.close()
    elif end == "break":
        for _ in batches:
            break
        del batches, _
    else:
        del batches
    assert not feeding_threads()


def test_no_more_than_the_depth_is_made_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    items = prefetch(numbers(), depth=2)
    for taken in range(9):
        assert next(items) == taken
        deadline = time.monotonic() + 5
        while len(made) < min(9, taken + 3) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.002)
        assert len(made) == min(9, taken + 3)
    assert list(items) == []


@pytest.mark.parametrize(
    ("method", "workers"), [("fork", 0), ("fork", 1), ("fork", 3), ("spawn", 2)]
)
def test_workers_of_a_data_loader_share_the_store(
    tmp_path: Path, method: str, workers: int
) -> None:
    path = tmp_path / "pairs.store"
    store = make_store(43, path)
    for _ in Feed(store, SETTINGS):  # a feed runs in the parent when the workers start
        break
    seen: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more workers than cores, and of every fork since 3.12
        loader = DataLoader(
            FedDataset(path, SETTINGS),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=method if workers else None,
        )
        for batch in loader:
            seen += batch["groups"].tolist()
            expected = lay_out(store, batch["groups"].numpy())
            assert np.array_equal(batch["input_ids"].numpy(), expected.input_ids)
            assert np.array_equal(batch["target_ids"].numpy(), expected.target_ids)
    assert sorted(seen) == list(range(43))


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from planned_stores import make_store
from logratio.data import Feed, FeedSettings
settings = FeedSettings(groups_per_update=8, token_budget=60)
batches = iter(Feed(make_store([2 + n % 50 for n in range(4000)]), settings, epochs=1000))
next(batches)
print("running", flush=True)
{then}
"""


def run_script(then: str) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(Path(__file__).parents[2] / "support"), then=then)
    command = [sys.executable, "-c", script]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "running\n"
    return running


def test_an_interpreter_that_ends_takes_the_thread_along() -> None:
    running = run_script("")
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (0, "")


def test_ctrl_c_ends_a_feed_at_once() -> None:
    running = run_script("for batch in batches: pass")
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode in (-signal.SIGINT, 130, 1)
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_feed_is_pickled_with_its_position(tmp_path: Path) -> None:
    feed = Feed(make_store(43, tmp_path / "pairs.store"), SETTINGS)
    batches = iter(feed)
    next(batches)
    batches.close()
    other = pickle.loads(pickle.dumps(feed))
    assert places(iter(other)) == places(iter(feed))


def test_settings_are_plain_values() -> None:
    settings = replace(SETTINGS, weights=(0.5, 1.0), datasets=(0, 1))
    plain: dict[str, Any] = settings.order_of_updates()
    assert json.loads(json.dumps(plain)) == plain
