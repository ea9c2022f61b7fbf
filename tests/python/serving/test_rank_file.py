"""`rank_file`: rows, streams, continued runs, workers, Parquet, Ray Data."""

import gzip
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from failing_session import failing
from tiny_bundle import tiny_bundle
from typer.testing import CliRunner

from logratio.bundle import BundleError
from logratio.cli.app import app
from logratio.data import BadDataError
from logratio.durable import lock
from logratio.errors import ConfigError
from logratio.forecast import OutputError
from logratio.serving import (
    GraphRunError,
    RankBatch,
    RankSummary,
    Reranker,
    Workers,
    rank_file,
    rank_output,
)
from logratio.serving.rank_file import ROWS as BATCH
from logratio.serving.rank_file import Progress
from logratio.serving.rank_output import FileOutput
from logratio.serving.rank_rows import MOST_FAILED
from logratio.serving.rank_workers import WorkerError
from logratio.serving.scores import ranked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder / "bundle")


ROWS: list[dict[str, Any]] = [
    {"prompt": "the cat", "candidates": ["sits", "sad", ""], "id": 7, "note": "café"},
    {"prompt": "the dog runs", "candidates": ["on the mat"]},
    {"prompt": "loud " * 600, "candidates": ["sad"]},
]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_file_is_ranked_row_by_row(reranker: Reranker, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    seen: list[tuple[int, int, int]] = []

    def on_batch(so_far: RankSummary, position: int, size: int) -> None:
        seen.append((so_far.rows, position, size))

    summary = rank_file(reranker, source, output, progress=on_batch)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    scores = reranker.score("the cat", ["sits", "sad"])
    assert rows[0] == ROWS[0] | {
        "rewards": [pytest.approx(score.reward, abs=1e-5) for score in scores] + [None],
        "order": [score.index for score in ranked(scores)],
        "policy_logps": [pytest.approx(score.policy_logps, abs=1e-4) for score in scores] + [None],
        "reference_logps": [pytest.approx(s.reference_logps, abs=1e-4) for s in scores] + [None],
        "tokens": [2, 2, 0],
        "errors": {"2": "[R301] a completion is empty"},
    }
    assert "café" in output.read_text()
    assert rows[1]["order"] == [0] and "errors" not in rows[1]
    assert rows[2]["error"].startswith("[R304]") and "rewards" not in rows[2]
    assert (summary.rows, summary.candidates, summary.failed_candidates) == (3, 3, 1)
    assert summary.failed_rows == {"R304": 1}
    assert summary.to_text() == (
        "2 prompts ranked, 3 candidates with a reward, 1 without (see `errors`); "
        "[R304] 1 row refused (see `error`)"
    )
    assert seen == [(3, source.stat().st_size, source.stat().st_size)]


def test_rows_go_to_stdout_without_an_output(
    reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    for output in (None, "-"):
        rank_file(reranker, source, output)
        assert json.loads(capsys.readouterr().out)["order"] == [0]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "E101"),
        ('{"prompt": "a"}', "E201"),
        ('{"candidates": ["a"]}', "E201"),
        ('{"prompt": "a", "completions": ["b"]}', "E201"),
        ('{"prompt": null, "candidates": ["a"]}', "E202"),
        ('{"prompt": 3, "candidates": ["a"]}', "E203"),
        ('{"prompt": "a", "candidates": "b"}', "E203"),
        ('{"prompt": "a", "candidates": []}', "R318"),
        ('{"prompt": "a", "candidates": ["b", 3]}', "E203"),
        ('{"prompt": [{"role": "user"}], "candidates": ["b"]}', "E201"),
        ('{"prompt": "a", "candidates": ["\\ud800"]}', "E104"),
    ],
)
def test_a_malformed_row_gets_an_error_and_the_others_are_ranked(
    reranker: Reranker, tmp_path: Path, line: str, code: str
) -> None:
    good = json.dumps(ROWS[1]) + "\n"
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(good + line + "\n" + good)
    summary = rank_file(reranker, source, output)
    first, second, third = map(json.loads, output.read_text().splitlines())
    assert first["order"] == third["order"] == [0]
    assert "rewards" not in second
    assert second["error"].startswith(f"[{code}] ")
    assert "in.jsonl:2: " in second["error"]
    assert (summary.rows, summary.failed_rows) == (3, {code: 1})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_a_file_without_rows_is_refused_and_leaves_no_output(
    reranker: Reranker, tmp_path: Path, content: bytes
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    with pytest.raises(BadDataError, match=r"nothing can be ranked:\n.*in\.jsonl"):
        rank_file(reranker, source, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


LONG: dict[str, Any] = {"prompt": "the cat", "candidates": ["sad", "sits " * 300]}
"""A row for which the graph of `failing` fails."""


def test_a_row_for_which_the_graph_fails_gets_an_error_and_the_others_are_ranked(
    reranker: Reranker, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [*many(5), LONG, ROWS[1], LONG])
    output, sound = tmp_path / "out.jsonl", tmp_path / "sound.jsonl"
    summary = rank_file(failing(reranker)[0], source, output)
    rank_file(reranker, source, sound)
    rows, expected = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (output, sound)
    )
    error = "[E605] the graph failed: RuntimeException: Failed to allocate memory"
    for number, (row, whole) in enumerate(zip(rows, expected, strict=True)):
        if number in (5, 7):
            assert row == LONG | {"error": error}
        else:
            assert row.keys() == whole.keys() and row["order"] == whole["order"]
            assert row["rewards"] == pytest.approx(whole["rewards"], abs=1e-5)
    assert (summary.rows, summary.failed_rows, summary.unranked) == (8, {"E605": 2}, 2)
    assert "[E605] 2 rows refused (see `error`)" in summary.to_text()


def test_the_command_writes_such_rows_and_exits_with_1(
    reranker: Reranker, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [LONG, ROWS[1]])
    other = failing(reranker)[0]
    monkeypatch.setattr(Reranker, "load", lambda *_, **__: other)
    flags = ["--bundle", folder / "bundle", "--input", source, "--output", tmp_path / "out.jsonl"]
    result = CliRunner().invoke(app, ["rank", *map(str, flags)])
    assert result.exit_code == 1
    assert "1 prompt ranked" in result.stderr and "[E605] 1 row refused" in result.stderr
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["error"].startswith("[E605]") and second["order"] == [0]


def test_a_run_ends_when_the_graph_fails_for_every_row_and_continues_when_it_is_sound(
    reranker: Reranker, tmp_path: Path
) -> None:
    rows = [*many(BATCH), *[LONG] * MOST_FAILED]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    broken, session = failing(reranker)
    with pytest.raises(GraphRunError, match="Failed to allocate memory"):
        rank_file(broken, source, output)
    assert not output.exists()
    before = session.calls
    with pytest.raises(GraphRunError):  # continued: the rows of the first batch are kept
        rank_file(broken, source, output)
    assert session.calls - before == 1 + MOST_FAILED
    summary = rank_file(reranker, source, output)
    assert (summary.rows, summary.unranked) == (len(rows), 0)


def test_fewer_failed_rows_than_that_do_not_end_a_run(reranker: Reranker, tmp_path: Path) -> None:
    rows = [LONG] * (MOST_FAILED - 1)
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert rank_file(failing(reranker)[0], source, output).failed_rows == {"E605": len(rows)}
    written = write_rows(tmp_path / "more.jsonl", [ROWS[1], *[LONG] * 2 * MOST_FAILED])
    summary = rank_file(failing(reranker)[0], written, output)
    assert summary.failed_rows == {"E605": 2 * MOST_FAILED}


def test_unusable_files_are_plain_errors(reranker: Reranker, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(FileNotFoundError):
        rank_file(reranker, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(IsADirectoryError):
        rank_file(reranker, source, tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        rank_file(reranker, source, source / "out")
    for name in ("out.csv", "out.jsonl.gz", "out.arrow"):
        with pytest.raises(ConfigError, match=r"JSON lines, or Parquet if it ends in \.parquet"):
            rank_file(reranker, source, tmp_path / name)
    assert list(tmp_path.iterdir()) == [source]


def test_many_rows_are_streamed(reranker: Reranker, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the {'cat ' * (i % 7)}", "candidates": ["sad", "happy"]} for i in range(150)
    ]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    done: list[int] = []
    rank_file(reranker, source, output, progress=lambda so_far, *_: done.append(so_far.rows))
    assert done == [64, 128, 150]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]


def many(count: int = 200) -> list[dict[str, Any]]:
    return [
        {"prompt": f"the {'cat ' * (i % 7)}", "candidates": ["sad", "happy"], "id": i}
        for i in range(count)
    ]


class InterruptedRunError(Exception):
    """Ends a run in its middle."""


def after(rows: int) -> Progress:
    """Return a callback that ends the run after some rows."""

    def stop(so_far: RankSummary, *_: int) -> None:
        if so_far.rows >= rows:
            raise InterruptedRunError

    return stop


def interrupted(reranker: Reranker, source: Path, output: Path, rows: int = 128) -> None:
    with pytest.raises(InterruptedRunError):
        rank_file(reranker, source, output, progress=after(rows))
    assert not output.exists()


def scored_from(
    reranker: Reranker, source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> int:
    """Rank a file; return the row at which this call began, after checking the whole output."""
    capsys.readouterr()
    summary = rank_file(reranker, source, output)
    note = capsys.readouterr().err
    again = output.with_name("again.jsonl")
    assert rank_file(reranker, source, again) == summary
    assert output.read_bytes() == again.read_bytes()
    again.unlink()
    assert sorted(output.parent.iterdir()) == sorted([source, output])
    continued = re.search(r"continues after ([\d,]+) rows", note)
    assert continued or "begins again" in note
    return int(continued[1]) if continued else 0


@pytest.mark.parametrize("rows", [64, 128])
def test_an_interrupted_run_is_continued(
    reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many()), tmp_path / "out.jsonl"
    interrupted(reranker, source, output, rows)
    assert scored_from(reranker, source, output, capsys) == rows


def test_a_compressed_file_and_a_table_are_continued(
    reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("in.jsonl.gz", "in.parquet"):
        (tmp_path / name).mkdir()
        source = tmp_path / name / name
        if name.endswith("gz"):
            lines = "".join(json.dumps(row) + "\n" for row in many())
            source.write_bytes(gzip.compress(lines.encode()))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many()), source)
        output = source.with_name("out.jsonl")
        interrupted(reranker, source, output)
        assert scored_from(reranker, source, output, capsys) == 128


def test_a_run_is_not_continued_with_other_rows_or_another_bundle(
    reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many()), tmp_path / "out.jsonl"
    interrupted(reranker, source, output)
    write_rows(source, many()[::-1])
    assert scored_from(reranker, source, output, capsys) == 0
    output.unlink()
    interrupted(reranker, source, output)
    progress = output.with_name(".out.jsonl.progress")
    recorded = json.loads(progress.read_text())
    recorded["identity"]["bundle"] = "0" * 64
    progress.write_text(json.dumps(recorded))
    assert scored_from(reranker, source, output, capsys) == 0


def test_a_run_is_not_continued_with_truncation_if_it_began_without(
    folder: Path, reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many()), tmp_path / "out.jsonl"
    interrupted(reranker, source, output)
    truncating = Reranker.load(folder / "bundle", truncate_completions=True)
    assert scored_from(truncating, source, output, capsys) == 0
    assert Workers(folder / "bundle", 2, {"truncate_completions": True}).truncates


@pytest.mark.parametrize("damage", ["{", '{"mark": {}}', "[]"])
def test_damaged_progress_starts_from_the_first_row(
    reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many()), tmp_path / "out.jsonl"
    interrupted(reranker, source, output)
    output.with_name(".out.jsonl.progress").write_text(damage)
    assert scored_from(reranker, source, output, capsys) == 0


@contextmanager
def running(
    reranker: str, folder: Path, source: Path, output: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ranks a file and has recorded a position; `reranker` is its code."""
    code = (
        "import sys\nfrom logratio.serving import Reranker, Workers, rank_file, rank_output\n"
        f"rank_output.EVERY = 0.0\nrank_file({reranker}, sys.argv[2], sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(folder / "bundle"), str(source), str(output)]
    with subprocess.Popen(command) as process:
        while not output.with_name(f".{output.name}.progress").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process


def test_a_killed_run_is_continued_after_its_last_recorded_row(
    folder: Path, reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(5_000)), tmp_path / "out.jsonl"
    with running("Reranker.load(sys.argv[1])", folder, source, output) as process:
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    recorded = json.loads(output.with_name(".out.jsonl.progress").read_text())["summary"]["rows"]
    summary = rank_file(reranker, source, output)
    assert f"continues after {recorded:,} rows" in capsys.readouterr().err
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids == list(range(5_000))
    assert summary.rows == 5_000


def test_two_runs_cannot_write_one_output(reranker: Reranker, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many()), tmp_path / "out.jsonl"

    def start_another(*_: object) -> None:
        with pytest.raises(ConfigError, match="another process is ranking"):
            rank_file(reranker, source, output)
        raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        rank_file(reranker, source, output, progress=start_another)


def test_an_old_position_never_names_the_rows_of_another_run(tmp_path: Path) -> None:
    path, summary = tmp_path / "out.jsonl", RankSummary(rows=1)
    first = FileOutput(path, {"input": "first"})
    first.write("1\n", {"row": 1}, summary)
    first.stop()
    first.close()
    killed = FileOutput(path, {"input": "second"})
    killed.write("from the second input\n", {"row": 1}, summary)
    killed.close()  # without `stop`: the position is not recorded
    again = FileOutput(path, {"input": "first"})
    assert again.begins is None
    again.close()


def test_a_file_that_was_finished_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends between the opening of the partial file and its lock."""
    path = tmp_path / "out.jsonl"
    other = FileOutput(path, {})
    other.write("1\n", {}, RankSummary(rows=1))

    def finish_then_lock(descriptor: int) -> None:
        monkeypatch.undo()
        other.finish()
        other.close()
        lock(descriptor)

    monkeypatch.setattr(rank_output, "lock", finish_then_lock)
    with pytest.raises(ConfigError, match="another process is ranking"):
        FileOutput(path, {})
    assert path.read_text() == "1\n"


def test_workers_give_the_rows_of_one_process_in_order(
    folder: Path, reranker: Reranker, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [*many(150), *ROWS])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    workers = Workers(folder / "bundle", 2, {})
    assert rank_file(workers, source, two) == rank_file(reranker, source, one)
    rows = [list(map(json.loads, path.read_text().splitlines())) for path in (one, two)]
    for alone, shared in zip(*rows, strict=True):
        assert alone.keys() == shared.keys()
        assert alone.get("order") == shared.get("order")
        assert alone.get("rewards") == pytest.approx(shared.get("rewards"), abs=1e-5)


def test_workers_report_why_they_cannot_load_a_bundle(folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    workers = Workers(folder / "bundle", 2, {"expect": "sha256:" + "0" * 64})
    with pytest.raises(BundleError, match="digest"):
        rank_file(workers, source, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


def test_a_worker_that_ends_is_an_error_and_the_call_can_be_continued(
    folder: Path, reranker: Reranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(1_000)), tmp_path / "out.jsonl"

    def end_workers(*_: object) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()

    with pytest.raises(WorkerError, match="a worker ended"):
        rank_file(Workers(folder / "bundle", 2, {}), source, output, progress=end_workers)
    assert scored_from(reranker, source, output, capsys) >= 64


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # a zombie has ended


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the /proc of Linux")
def test_workers_end_with_a_parent_that_is_killed(folder: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(20_000)), tmp_path / "out.jsonl"
    with running("Workers(sys.argv[1], 2, {})", folder, source, output) as process:
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        assert sum(map(is_running, children)) >= 2
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_parquet_in_and_out(reranker: Reranker, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [*ROWS, *many(70)])
    lines, table = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    rank_file(reranker, source, lines)
    rank_file(reranker, source, table)
    read = pyarrow.parquet.read_table(table).to_pylist()
    for row, line in zip(read, lines.read_text().splitlines(), strict=True):
        expected = json.loads(line)
        if "errors" in expected:
            expected["errors"] = [
                {"index": int(at), "error": reason} for at, reason in expected["errors"].items()
            ]
        assert {name: value for name, value in row.items() if value is not None} == expected
    back = tmp_path / "back.jsonl"
    summary = rank_file(reranker, table, back)
    assert (summary.rows, len(back.read_text().splitlines())) == (73, 73)
    assert not list(tmp_path.glob(".*"))


def test_rows_that_fit_no_table_are_kept_as_lines(reranker: Reranker, tmp_path: Path) -> None:
    rows = [{**ROWS[1], "id": 7}, {**ROWS[1], "id": {"a": 1}}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(ConfigError, match="do not fit a Parquet table"):
        rank_file(reranker, source, tmp_path / "out.parquet")
    assert len((tmp_path / ".out.parquet.partial").read_text().splitlines()) == 2


def test_batches_of_ray_data_are_ranked(folder: Path, reranker: Reranker, tmp_path: Path) -> None:
    """Called as `map_batches` calls it: a class that is made once, with tables."""
    columns = [{"prompt": row["prompt"], "candidates": row["candidates"]} for row in ROWS]
    ranker = RankBatch(folder / "bundle")
    found = ranker(pyarrow.Table.from_pylist(columns)).to_pylist()
    source = write_rows(tmp_path / "in.jsonl", columns)
    rank_file(reranker, source, tmp_path / "out.parquet")
    for row, expected in zip(
        found, pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist(), strict=True
    ):
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in expected.items() if value is not None
        }
    assert ranker(ranker(pyarrow.Table.from_pylist(columns))).column_names.count("rewards") == 1
