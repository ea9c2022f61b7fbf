"""The Python bindings of the store writer: batches, duplicates, kills and resuming."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter

HERE = Path(__file__).parent
GROUPS = 300
BATCHES = 60


def pairs(prompts: list[int], answers: list[tuple[int, int]]) -> dict[str, NDArray[Any]]:
    """Columns of pairs whose prompt and answers have one token each."""
    count = len(prompts)
    return {
        "prompt_ids": np.array(prompts, np.int32),
        "prompt_lengths": np.ones(count, np.uint32),
        "completion_ids": np.array(answers, np.int32).reshape(-1),
        "completion_mask": np.ones(2 * count, np.uint8),
        "completion_lengths": np.ones(2 * count, np.uint32),
        "group_sizes": np.full(count, 2, np.uint32),
        "roles": np.array([0, 1] * count, np.uint8),
        "files": np.full(count, 3, np.uint32),
        "lines": np.arange(1, count + 1, dtype=np.uint64),
    }


def test_duplicates_and_opposites_are_reported_by_number() -> None:
    writer = StoreWriter(deduplicate=True)
    answers = [(5, 6), (6, 5), (5, 6), (6, 5), (7, 8)]
    outcome, first = writer.push_many(**pairs([1, 1, 1, 1, 2], answers))
    assert outcome.dtype == np.uint8
    assert first.dtype == np.int64
    assert outcome.tolist() == [0, 2, 1, 1, 0]
    assert first.tolist() == [-1, 0, 0, 1, -1]
    groups, votes = writer.conflicts()
    assert groups.dtype == np.int64
    assert votes.dtype == np.uint32
    assert (groups.tolist(), votes.tolist()) == ([[0, 1]], [[2, 2]])
    assert (len(writer), writer.place(2)) == (3, (3, 5))
    with pytest.raises(IndexError, match="group 3 is out of range: there are 3"):
        writer.place(3)
    assert len(writer.finish()) == 3


def test_a_writer_keeps_duplicates_by_default() -> None:
    writer = StoreWriter()
    outcome, first = writer.push_many(**pairs([1, 1], [(5, 6), (5, 6)]))
    assert (outcome.tolist(), first.tolist()) == ([0, 0], [-1, -1])
    assert writer.conflicts()[0].shape == (0, 2)
    assert len(writer) == 2


def test_one_bad_group_refuses_all_and_is_named() -> None:
    writer = StoreWriter()
    columns = pairs([1, -2], [(5, 6), (5, 6)])
    with pytest.raises(ValueError, match="group 1: token id -2 is negative"):
        writer.push_many(**columns)
    with pytest.raises(ValueError, match="files has 1 values, but the other columns say 2"):
        writer.push_many(**(columns | {"files": np.zeros(1, np.uint32)}))
    assert len(writer) == 0


def test_a_selection_is_a_store() -> None:
    writer = StoreWriter()
    writer.push_many(**pairs([1, 2, 3], [(5, 6)] * 3))
    store = writer.finish()
    selected = store.select(np.array([True, False, True]), metadata="some")
    assert (len(selected), selected.metadata) == (2, "some")
    assert [selected.group(index)[0].tolist() for index in range(2)] == [[1], [3]]
    assert selected.sources()[1].tolist() == [1, 3]
    with pytest.raises(ValueError, match="keep has 1 values for 3 groups"):
        store.select(np.array([True]))


def test_checkpoints_need_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it a path"):
        StoreWriter().checkpoint("")
    assert StoreWriter.resume(tmp_path / "a.store") is None
    StoreWriter(tmp_path / "a.store").checkpoint("note")
    resumed = StoreWriter.resume(tmp_path / "a.store")
    assert resumed is not None
    assert (len(resumed[0]), resumed[1]) == (0, "note")
    with pytest.raises(ValueError, match="deduplicate = false"):
        del resumed
        StoreWriter.resume(tmp_path / "a.store", deduplicate=True)


def batch(number: int) -> dict[str, NDArray[Any]]:
    """Three hundred pairs with many duplicates, the same in every run."""
    random = np.random.default_rng(number)
    prompts = random.integers(0, 4000, GROUPS).tolist()
    return pairs(prompts, [((5, 6), (6, 5))[one] for one in random.integers(0, 2, GROUPS)])


def write_all(writer: StoreWriter, start: int = 0, every: int = 0) -> Store:
    """Push the batches from `start`, print the progress, and sometimes save a checkpoint."""
    for number in range(start, BATCHES):
        writer.push_many(**batch(number))
        print(number, flush=True)
        if every and number % every == 0:
            writer.checkpoint(str(number + 1))
    groups, votes = writer.conflicts()
    return writer.finish(f"{groups.tolist()} {votes.tolist()}")


GOES_ON = """
import sys
from test_store_writer import StoreWriter, write_all
resumed = StoreWriter.resume(sys.argv[1], deduplicate=True)
writer, note = resumed or (StoreWriter(sys.argv[1], deduplicate=True), "0")
print("from", note, flush=True)
write_all(writer, int(note), every=3)
"""


def start(code: str, path: Path) -> subprocess.Popen[str]:
    paths = [str(HERE), str(HERE.parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_resumes_with_the_same_result(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.store"
    chance = random.Random(seed)
    began = []
    for life in range(6):
        with start(GOES_ON, path) as process:
            assert process.stdout
            began.append(int(process.stdout.readline().split()[1]))
            lines = chance.randrange(25) if life < 5 else BATCHES
            for _ in zip(range(lines), process.stdout, strict=False):
                pass
            if life < 5:
                time.sleep(chance.random() * 0.003)
                process.send_signal(signal.SIGKILL)
    assert began == sorted(began)
    assert began[-1] > 0
    expected = write_all(StoreWriter(deduplicate=True))
    found = Store.open(path)
    found.verify()
    assert (found.digest, found.metadata) == (expected.digest, expected.metadata)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.store"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def unlike(number: int) -> dict[str, NDArray[Any]]:
    """A batch without pairs of other batches."""
    columns = batch(number)
    columns["prompt_ids"] += 4000 * number
    return columns


def test_a_full_disk_is_an_error_and_the_last_checkpoint_is_kept(small_disk: Path) -> None:
    path, filler = small_disk / "a.store", small_disk / "filler"
    filler.write_bytes(bytes(500_000))
    writer, saved = StoreWriter(path, deduplicate=True), 0
    with pytest.raises(OSError, match=r"a\.store\.partial") as caught:
        for number in range(BATCHES):
            writer.push_many(**unlike(number))
            if number % 5 == 0:
                writer.checkpoint(str(number + 1))
                saved = number + 1
    assert caught.value.errno == errno.ENOSPC
    assert saved > 5
    with pytest.raises(ValueError, match="failed before"):
        writer.checkpoint("too late")
    with pytest.raises(ValueError, match="failed before"):
        writer.finish()
    resumed = StoreWriter.resume(path, deduplicate=True)
    assert resumed is not None
    assert resumed[1] == str(saved)
    filler.unlink()
    expected = StoreWriter(deduplicate=True)
    for number in range(saved + 2):
        expected.push_many(**unlike(number))
        if number >= saved:
            resumed[0].push_many(**unlike(number))
    assert resumed[0].finish().digest == expected.finish().digest


def test_a_disk_too_full_to_seal_loses_nothing(small_disk: Path) -> None:
    path, filler = small_disk / "a.store", small_disk / "filler"
    writer, expected = StoreWriter(path), StoreWriter()
    for number in range(10):
        writer.push_many(**batch(number))
        expected.push_many(**batch(number))
    writer.checkpoint("all")
    with pytest.raises(OSError, match="space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match=r"a\.store\.partial") as caught:
        writer.finish()
    assert caught.value.errno == errno.ENOSPC
    filler.unlink()
    resumed = StoreWriter.resume(path)
    assert resumed is not None
    assert resumed[0].finish().digest == expected.finish().digest
    assert [entry.name for entry in small_disk.iterdir()] == ["a.store"]


FORKS = """
import os, sys
from test_store_writer import StoreWriter, batch
writer = StoreWriter(sys.argv[1])
writer.push_many(**batch(0))
if os.fork() == 0:
    try:
        writer.checkpoint("child")
    except ValueError as error:
        print(error, flush=True)
    del writer
    os._exit(0)
os.wait()
print(len(writer.finish()))
"""


def test_a_forked_child_does_not_touch_its_parents_writer(tmp_path: Path) -> None:
    with start(FORKS, tmp_path / "a.store") as process:
        output = process.communicate()[0]
    assert output.splitlines() == [
        "the store writer is closed, failed before, or belongs to another process",
        str(GROUPS),
    ]
