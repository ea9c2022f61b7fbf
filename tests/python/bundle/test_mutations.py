"""Mutated bundles are refused, or give the scores of the original: no crash, hang or other file."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import IO, Any

import mutated_bundles
import pytest
from file_watch import FileWatch
from mutated_bundles import LOAD_SECONDS, SECRET, Mutant
from tiny_bundle import tiny_bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and watches are Linux's")

PATIENCE = 3 * LOAD_SECONDS
KINDS = {name.removeprefix("change_") for name in dir(Mutant) if name.startswith("change_")}


class Loader:
    """The process that loads mutants, read line by line with a time limit."""

    def __init__(self, arguments: list[str], errors: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, mutated_bundles.__file__, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def next(self) -> dict[str, Any] | None:
        """Return the next line; None if the process ended or does not answer."""
        try:
            line = self._lines.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        return dict(json.loads(line)) if line else None

    def end(self) -> int:
        self._process.kill()
        return self._process.wait()


def load_mutants(bundle: Path, work: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Load the mutants of some seeds in another process; fail if it crashes or hangs."""
    secret = work / "outside" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(SECRET)
    (work / "mutants").mkdir()
    found = []
    with FileWatch(secret) as watch, (work / "errors").open("wb") as errors:
        secret.read_bytes()
        assert watch.events() > 0, "the watch sees nothing"
        places = [bundle, secret, work / "mutants"]
        loader = Loader([*map(str, places), str(first), str(last)], errors)
        try:
            while mutation := loader.next():
                outcome = loader.next()
                assert outcome, (mutation, (work / "errors").read_text()[-2000:])
                found.append(mutation | outcome)
        finally:
            loader.end()
        assert len(found) == last - first, (work / "errors").read_text()[-2000:]
        assert watch.events() == 0, "a file outside a bundle was opened"
    return found


def check(found: list[dict[str, Any]]) -> None:
    """Check the outcomes, and print their number."""
    loaded = [one for one in found if "refused" not in one]
    assert not [one for one in loaded if not one["gap"] <= 1], "another score"
    assert not [one for one in loaded if not one["is_detected_by_digest"]]
    assert max(one["seconds"] for one in found) < LOAD_SECONDS + 5
    assert not [one for one in found if not one.get("refused", "reason")]
    counts = Counter(one["what"].partition(":")[0] for one in found)
    assert counts.keys() == KINDS
    slowest = max(one["seconds"] for one in found)
    numbers = f"{len(found) - len(loaded)} refused, {len(loaded)} with the same scores"
    print(f"{len(found)} mutants: {numbers}, slowest {slowest:.1f} s")
    assert len(loaded) < len(found) / 4


@pytest.mark.slow
def test_mutated_bundles_are_refused_or_harmless(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(load_mutants(tiny_bundle(tmp_path_factory) / "bundle", tmp_path, 0, 150))


@pytest.mark.long
def test_a_thousand_mutated_bundles_are_refused_or_harmless(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count = int(os.environ.get("LOGRATIO_MUTANTS", "1000"))
    check(load_mutants(tiny_bundle(tmp_path_factory) / "bundle", tmp_path, 1000, 1000 + count))
