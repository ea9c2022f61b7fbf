"""The Python bindings of the cache: types, errors, a full disk, the GIL."""

import errno
import fcntl
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from logratio._rust import CacheReader, CacheWriter, CorruptCacheError

FINGERPRINT = bytes(range(32))


def keys(*numbers: int) -> NDArray[np.uint8]:
    return np.array([[number] * 32 for number in numbers], dtype=np.uint8).reshape(-1, 32)


def append(writer: CacheWriter, records: dict[int, list[float]]) -> None:
    """Append one block of `records`, which map the number of a key to its log-probs."""
    offsets = np.cumsum([0, *(len(values) for values in records.values())])
    flat = [value for values in records.values() for value in values]
    writer.append(keys(*records), offsets.astype(np.int64), np.array(flat, dtype=np.float32))


def write(folder: Path, *blocks: dict[int, list[float]]) -> None:
    """Append `blocks` to a new journal."""
    writer = CacheWriter(folder, FINGERPRINT)
    for records in blocks:
        append(writer, records)
    writer.close()


HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parents[1] / "support")])


def journal(folder: Path) -> Path:
    (only,) = folder.glob("*.journal")
    return only


def run_here(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run `script` on `path` in a process that can import this file."""
    return subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_rows_come_back_by_key(tmp_path: Path) -> None:
    write(tmp_path, {5: [-1.0, -2.5], 1: [-0.5]}, {3: [-4.0, -5.0, -6.0]})
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    assert (len(reader), reader.tokens, reader.torn_bytes, reader.distinct()) == (3, 6, 0, 3)
    rows = reader.join(keys(3, 7, 5))
    assert rows.dtype == np.int64
    assert rows[1] == -1
    offsets, logps = reader.read(rows[[2, 0, 2]])
    assert offsets.dtype == np.int64
    assert logps.dtype == np.float32
    assert offsets.tolist() == [0, 2, 5, 7]
    assert logps.tolist() == [-1.0, -2.5, -4.0, -5.0, -6.0, -1.0, -2.5]


def test_reading_a_missing_row_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {5: [-1.0]})
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    for wrong in (-1, 1):
        with pytest.raises(IndexError, match=f"row {wrong} is out of range: there are 1"):
            reader.read(np.array([0, wrong]))


def test_writers_share_a_folder_and_may_repeat_records(tmp_path: Path) -> None:
    write(tmp_path, {1: [-1.0], 2: [-2.0]})
    write(tmp_path, {2: [-2.0], 3: [-3.0]})
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    assert (len(reader), reader.distinct()) == (4, 3)
    write(tmp_path, {3: [-3.01]})
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    with pytest.raises(CorruptCacheError, match=r"contradicts.*\.journal"):
        reader.join(keys(3))
    with pytest.raises(CorruptCacheError, match=r"contradicts.*\.journal"):
        reader.distinct()


def test_a_torn_tail_is_counted_and_damage_refused(tmp_path: Path) -> None:
    write(tmp_path, {1: [-1.0]}, {2: [-2.0]})
    path = journal(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    assert (len(reader), reader.torn_bytes) == (1, 182)  # a block has 192 bytes
    damaged = bytearray(whole)
    damaged[130] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptCacheError, match="block 0 at byte 64 is damaged") as caught:
        CacheReader.open(tmp_path, FINGERPRINT)
    assert str(path) in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (CorruptCacheError, str(caught.value))


def test_another_reference_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {1: [-1.0]})
    with pytest.raises(CorruptCacheError, match=r"belongs to reference 00010203.*not to ffff"):
        CacheReader.open(tmp_path, b"\xff" * 32)
    with pytest.raises(ValueError, match="32"):
        CacheReader.open(tmp_path, b"short")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.01])
def test_values_that_are_not_log_probs_are_refused(tmp_path: Path, value: float) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT)
    with pytest.raises(CorruptCacheError, match="no log-prob"):
        append(writer, {1: [-1.0, value]})
    append(writer, {1: [-1.0, 0.0005]})
    assert len(CacheReader.open(tmp_path, FINGERPRINT)) == 1


def test_inconsistent_arguments_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT)
    logps = np.array([-1.0], dtype=np.float32)
    with pytest.raises(ValueError, match=r"\[n, 32\]"):
        writer.append(keys(1)[:, :31], np.array([0, 1]), logps)
    with pytest.raises(ValueError, match="offsets must run from 0 to the 1 log-probs"):
        writer.append(keys(1), np.array([0, 2]), logps)
    with pytest.raises(TypeError):
        writer.append(keys(1), np.array([0, 1]), logps.astype(np.float64))


def test_a_closed_writer_refuses_appends(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT)
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []  # a journal without blocks is removed
    with pytest.raises(ValueError, match="closed"):
        append(writer, {1: [-1.0]})


def test_a_journal_in_use_is_locked(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT)
    append(writer, {1: [-1.0]})
    with journal(tmp_path).open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        writer.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_system_errors_keep_their_number_and_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        CacheReader.open(tmp_path / "missing", FINGERPRINT)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        CacheWriter(tmp_path / "file", FINGERPRINT)
    assert caught.value.errno in {errno.EEXIST, errno.ENOTDIR}


HITS_A_LIMIT = """
import resource, sys
from pathlib import Path
from test_cache import CacheWriter, FINGERPRINT, append, write
folder = Path(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
writer = CacheWriter(folder, FINGERPRINT)
append(writer, {1: [-1.0]})
for records in ({2: [-2.0] * 100}, {3: [-3.0]}):
    try:
        append(writer, records)
    except (OSError, ValueError) as error:
        print(type(error).__name__, getattr(error, "errno", None))
writer.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
write(folder, {2: [-2.0] * 100})
"""


def test_a_failed_write_poisons_the_writer_and_loses_nothing(tmp_path: Path) -> None:
    """The system's file size limit makes a real write fail, as a full disk does."""
    done = run_here(HITS_A_LIMIT, tmp_path)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG), "ArgumentError", "None"]
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    assert reader.torn_bytes > 0
    assert (reader.join(keys(1, 2, 3)) >= 0).tolist() == [True, True, False]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_and_writing_continues_with_free_space(small_disk: Path) -> None:
    folder, filler = small_disk / "cache", small_disk / "filler"
    filler.write_bytes(bytes(40_000))
    writer = CacheWriter(folder, FINGERPRINT)
    append(writer, {1: [-1.0]})
    with pytest.raises(OSError, match=r"\.journal") as caught:
        append(writer, {2: [-2.0] * 10_000})
    assert caught.value.errno == errno.ENOSPC
    assert len(CacheReader.open(folder, FINGERPRINT)) == 1
    filler.unlink()
    with pytest.raises(ValueError, match="failed"):
        append(writer, {2: [-2.0]})
    write(folder, {2: [-2.0] * 100})
    assert len(CacheReader.open(folder, FINGERPRINT)) == 2


FORKS = """
import os, sys
from pathlib import Path
from test_cache import CacheWriter, FINGERPRINT, append
writer = CacheWriter(Path(sys.argv[1]), FINGERPRINT)
if os.fork() == 0:
    try:
        append(writer, {1: [-1.0]})
    except ValueError as error:
        print(error, flush=True)
    del writer
    os._exit(0)
os.wait()
append(writer, {2: [-2.0]})
"""


def test_a_forked_child_neither_writes_nor_removes_the_journal(tmp_path: Path) -> None:
    done = run_here(FORKS, tmp_path)
    assert "belongs to another process" in done.stdout
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    assert reader.join(keys(1, 2)).tolist() == [-1, 0]


WAITS_FOR_A_PIPE = """
import os, sys, threading, time
from pathlib import Path
from test_cache import CacheReader, FINGERPRINT
pipe = Path(sys.argv[1])
opening = threading.Thread(target=CacheReader.open, args=(pipe.parent, FINGERPRINT))
opening.start()
while True:
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        break
    except OSError:  # no reader yet
        time.sleep(0.01)
opening.join()
"""


def test_opening_releases_the_gil(tmp_path: Path) -> None:
    """Opening a pipe waits for its writer, a second thread; with the GIL held, forever."""
    os.mkfifo(tmp_path / "pipe.journal")
    done = run_here(WAITS_FOR_A_PIPE, tmp_path / "pipe.journal")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_shows_how_much_it_holds(tmp_path: Path) -> None:
    write(tmp_path, {1: [-0.5, -1.0], 2: [-2.0]})
    assert repr(CacheReader.open(tmp_path, FINGERPRINT)) == "CacheReader(2 records, 3 tokens)"
