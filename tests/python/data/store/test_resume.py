"""An interrupted build resumes, and gives the same store as an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers_for_tests import byte_level, save, word_level

from logratio.data import DataReport, PreferenceTokenizer, build_store, load_store
from logratio.data.store import build

WORDS = ["cat", "dog", "mat", "house", "thing", "yes", "no", "good", "bad", "great"]


@pytest.fixture(params=[word_level, byte_level])  # one row at a time, and in bulk
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(tmp_path / "tokenizer", request.param())


def as_table(path: Path) -> Path:
    """Write the valid JSON rows of a file as Parquet."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('{"')]
    rows = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    table = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(rows, table, row_group_size=500)
    return table


def write_rows(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, chosen, rejected = (" ".join(draw.choices(WORDS, k=4)) for _ in range(3))
        weight = {"weight": draw.randrange(5) / 4} if draw.random() < 0.3 else {}
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append(json.dumps(row | weight))
        if draw.random() < 0.02:
            rows.append(draw.choice(["", "{broken", rows[-1]]))
    path.write_text("\n".join(rows) + "\n")
    return path


CHILD = """
    import sys
    from logratio.data import PreferenceTokenizer, build_store
    from logratio.data.store import build, ingest

    build.EVERY, ingest.BATCH_ROWS = 0.0, 64
    *files, tokenizer, path = sys.argv[1:]
    build_store(files, PreferenceTokenizer.load(tokenizer), path, max_bad_fraction=0.5, resume=True,
                refused=path + ".refused", tell=print,
                progress=lambda *call: print(call[0], flush=True))
"""


def start(files: list[Path], folder: Path, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, (*files, folder, path))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_9_at_any_moment_loses_and_repeats_nothing(tmp_path: Path, folder: Path) -> None:
    files = [write_rows(tmp_path / f"{seed}.jsonl", 3000, seed) for seed in (1, 2)]
    files.append(as_table(write_rows(tmp_path / "3.jsonl", 3000, 3)))
    whole, expected = build_store(
        files, PreferenceTokenizer.load(folder), max_bad_fraction=0.5,
        refused=tmp_path / "expected.refused",
    )  # fmt: skip
    path, draw, kills, resumed = tmp_path / "out.store", random.Random(7), 0, 0
    while not path.exists():
        child = start(files, folder, path)
        assert child.stdout
        stop_after = draw.randrange(1, 40)
        for count, line in enumerate(child.stdout):
            resumed += "continues after" in line
            if count == stop_after:
                time.sleep(draw.random() / 100)
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
                break
        child.communicate()
    store, report = load_store(path, PreferenceTokenizer.load(folder))
    assert kills >= 2
    assert resumed >= 2
    assert store.digest == whole.digest
    assert report == expected
    logs = [tmp_path / "out.store.refused", tmp_path / "expected.refused"]
    found, wanted = (sorted(log.read_text().splitlines()) for log in logs)
    assert found == wanted  # in the order of batches, whose size differs
    assert not (tmp_path / "out.store.partial").exists()


def interrupted(
    files: list[Path],
    folder: Path,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Path | None = None,
) -> None:
    """Leave a checkpoint, as a killed process would."""
    monkeypatch.setattr(build, "EVERY", 0.0)

    def fail(rows: int, *_: int) -> None:
        if rows > 2000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(
            files, PreferenceTokenizer.load(folder), path, max_bad_fraction=0.5, resume=True,
            progress=fail, refused=refused,
        )  # fmt: skip


def test_a_kept_traceback_keeps_no_lock(tmp_path: Path, folder: Path) -> None:
    files, path = [write_rows(tmp_path / "rows.jsonl", 5000, 3)], tmp_path / "out.store"
    tokenizer = PreferenceTokenizer.load(folder)

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        build_store(files, tokenizer, path, max_bad_fraction=0.5, progress=fail)
    assert kept.tb
    assert not path.with_name("out.store.partial").exists()
    build_store(files, tokenizer, path, max_bad_fraction=0.5)


def test_other_settings_start_over_with_the_reason(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_rows(tmp_path / "rows.jsonl", 5000, 3)]
    path = tmp_path / "out.store"
    interrupted(files, folder, path, monkeypatch)
    messages: list[str] = []
    _, report = build_store(
        files, PreferenceTokenizer.load(folder), path, max_bad_fraction=0.5, deduplicate=False,
        resume=True, tell=messages.append,
    )  # fmt: skip
    assert "starts from the beginning: the checkpoint was made with deduplicate" in messages[0]
    assert report.deduplicated == 0


def test_a_changed_file_starts_over(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_rows(tmp_path / "rows.jsonl", 5000, 3)]
    interrupted(files, folder, tmp_path / "out.store", monkeypatch)
    write_rows(files[0], 100, 4)
    messages: list[str] = []
    _, report = build_store(
        files, PreferenceTokenizer.load(folder), tmp_path / "out.store", max_bad_fraction=0.5,
        resume=True, tell=messages.append,
    )  # fmt: skip
    assert "had other inputs" in messages[0]
    assert report.read < 200


@pytest.mark.parametrize(
    ("now", "reason"),
    [("gone.jsonl", "no longer lists the rows refused before"), ("other.jsonl", "had other list")],
)
def test_another_list_of_refused_rows_starts_over(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, now: str, reason: str
) -> None:
    files = [write_rows(tmp_path / "rows.jsonl", 5000, 3)]
    path, log = tmp_path / "out.store", tmp_path / now
    (tmp_path / "other.jsonl").write_text("kept by somebody else\n" * 500)
    interrupted(files, folder, path, monkeypatch, tmp_path / "gone.jsonl")
    (tmp_path / "gone.jsonl").unlink()
    messages: list[str] = []
    _, report = build_store(
        files, PreferenceTokenizer.load(folder), path, max_bad_fraction=0.5, resume=True,
        refused=log, tell=messages.append,
    )  # fmt: skip
    assert len(messages) == 1
    assert reason in messages[0]
    assert len(log.read_text().splitlines()) == report.refused


def test_without_a_path_there_is_nothing_to_resume(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="resume needs a path"):
        build_store([tmp_path], PreferenceTokenizer.load(folder), resume=True)


def test_a_report_comes_back_from_json(tmp_path: Path, folder: Path) -> None:
    files = [write_rows(tmp_path / "rows.jsonl", 300, 3)]
    _, report = build_store(files, PreferenceTokenizer.load(folder), max_bad_fraction=0.5)
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
