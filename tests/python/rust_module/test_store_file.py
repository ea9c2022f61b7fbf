"""Stores in files: opening, damage, pickling, several processes, and system errors."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from rust_stores import make_store, push_pair

from logratio._rust import CorruptStoreError, Store, StoreWriter


def test_a_store_on_disk_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "pairs.store"
    written = make_store(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.store"]
    for opened in (Store.open(path), Store.open(str(path))):
        assert opened.digest == written.digest == make_store().digest
        assert opened.metadata == written.metadata


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.store"
    make_store(path)
    data = bytearray(path.read_bytes())
    data[130] ^= 1  # an id
    path.write_bytes(data)
    store = Store.open(path)
    for read in (store.keys, store.verify, store.roles, store.sources, lambda: store.group(1)):
        with pytest.raises(CorruptStoreError, match=r"pairs\.store.*tokens") as caught:
            read()
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (CorruptStoreError, str(caught.value))
    path.with_name("cut.store").write_bytes(data[:-1])
    with pytest.raises(CorruptStoreError, match="bytes"):
        Store.open(path.with_name("cut.store"))


def test_a_store_is_pickled_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(Path("pairs.store"))
    assert store.path == tmp_path / "pairs.store"
    pickled = pickle.dumps(store)
    monkeypatch.chdir("/")
    again = pickle.loads(pickled)
    assert (again.digest, again.path) == (store.digest, store.path)
    StoreWriter(tmp_path / "pairs.store").finish()
    with pytest.raises(CorruptStoreError, match=f"its digest is .*, not {store.digest}"):
        pickle.loads(pickled)


READS_IN_OTHER_PROCESSES = """
import multiprocessing, sys
from logratio._rust import Store
store = Store.open(sys.argv[1])
store.keys()
def read(_):
    return store.shared_lengths().tolist()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(read, range(2)))
for method in ("fork", "spawn"):
    with multiprocessing.get_context(method).Pool(2) as pool:
        print([one.tolist() for one in pool.map(Store.shared_lengths, [store] * 2)])
"""


def test_a_store_is_read_by_forked_and_spawned_processes(tmp_path: Path) -> None:
    make_store(tmp_path / "pairs.store")
    command = [sys.executable, "-c", READS_IN_OTHER_PROCESSES, str(tmp_path / "pairs.store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[[7, 3], [7, 3]]"] * 3


def test_a_store_in_memory_cannot_be_pickled() -> None:
    assert make_store().path is None
    with pytest.raises(ValueError, match="give its writer a path"):
        pickle.dumps(make_store())


def test_a_store_is_opened_by_its_digest(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pairs.store")
    assert len(Store.open(tmp_path / "pairs.store", digest=store.digest)) == 2
    with pytest.raises(CorruptStoreError, match=f"{store.digest}, not 00"):
        Store.open(tmp_path / "pairs.store", digest="00")


def test_system_errors_keep_their_number_and_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "pairs.store"
    with pytest.raises(FileNotFoundError) as caught:
        Store.open(missing)
    assert caught.value.filename == str(missing)
    with pytest.raises(FileNotFoundError, match=r"pairs\.store\.partial"):
        StoreWriter(missing)
    with pytest.raises(IsADirectoryError):
        StoreWriter(tmp_path).finish()


def test_an_unfinished_writer_leaves_no_file(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "pairs.store")
    push_pair(writer)
    with pytest.raises(OSError, match="another writer"):
        StoreWriter(tmp_path / "pairs.store")
    del writer
    assert list(tmp_path.iterdir()) == []


HITS_A_LIMIT = """
import resource, sys
import numpy as np
from logratio._rust import StoreWriter
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
writer = StoreWriter(sys.argv[1])
ids = np.arange(100_000, dtype=np.int32)
one = np.ones(100_000, dtype=np.uint8)
for _ in range(2):
    try:
        writer.push(ids, ids, one, np.array([100_000], np.uint32), one[:1], 0, 1)
    except (OSError, ValueError) as error:
        print(type(error).__name__, getattr(error, "errno", None))
"""


def test_a_failed_write_keeps_the_old_store(tmp_path: Path) -> None:
    """The system's file size limit makes a real write fail, as a full disk does."""
    path = tmp_path / "pairs.store"
    make_store(path)
    command = [sys.executable, "-c", HITS_A_LIMIT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG), "ArgumentError", "None"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.store"]
    Store.open(path).verify()


WAITS_FOR_A_PIPE = """
import os, sys, threading, time
from logratio._rust import Store
opening = threading.Thread(target=lambda: Store.open(sys.argv[1]), daemon=True)
threading.excepthook = lambda error: print(error.exc_type.__name__)
opening.start()
while True:
    try:
        os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK))
        break
    except OSError:  # no reader yet
        time.sleep(0.01)
opening.join()
"""


def test_opening_releases_the_gil(tmp_path: Path) -> None:
    """Opening a pipe waits for its writer, a second thread; with the GIL held, forever."""
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", WAITS_FOR_A_PIPE, str(tmp_path / "pipe")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() in {"OSError", "CorruptStoreError"}
