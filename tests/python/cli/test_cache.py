"""`logratio cache …`: output, exit codes, and the files left after Ctrl-C."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars
import pytest
from cache_folders import digest, keys, random_records, write, write_sums

from logratio._rust import CacheReader, CacheWriter
from logratio.cache import Change, ReferenceCache
from logratio.cache.merging import Merge
from logratio.cli.app import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command of `logratio cache`; return its exit code, output and standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["cache", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


def test_all_commands_on_precomputed_log_probs(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def logratio(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    logratio("precompute", "--model", tiny_model, "--data", pairs_file, "--cache", "a")
    assert "model      llama, 2 layers" in logratio("cache", "inspect", "a")
    (name,) = [path.name for path in (tmp_path / "a").iterdir()]
    assert f"a/{name}: sound, 32 completions" in logratio("cache", "verify", "a")
    assert f"b/{name}: 32 completions written to 1 shard" in logratio("cache", "merge", "b", "a")
    logratio("cache", "compact", "b")
    logratio("cache", "export", "b", "out.parquet")
    frame = polars.read_parquet(tmp_path / "out.parquet")
    cached = ReferenceCache(tmp_path / "a").open()
    offsets, logps = cached.logps(np.frombuffer(b"".join(frame["key"]), np.uint8).reshape(-1, 32))
    assert len(frame) == len(cached) == 32
    assert np.concatenate(frame["logps"].to_list()).tolist() == logps.tolist()
    assert frame["tokens"].to_list() == np.diff(offsets).tolist()
    again = logratio("precompute", "--model", tiny_model, "--data", pairs_file, "--cache", "b")
    assert again.startswith("0 completions")


def test_inspect_reports_contents_and_writers(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0, -2.0]}, seal=True)
    write_sums(tmp_path, {1: (2, -3.0), 2: (2, -3.0)})
    writer = CacheWriter(folder, digest())
    writer.append(keys(2), np.array([0, 1]), np.array([-1.0], np.float32))
    ended, out, _ = run("inspect", tmp_path)
    assert ended == 0
    assert "holds      2 completions, 3 tokens" in out
    assert "files      1 shard, 1 journal" in out
    assert f"process {os.getpid()}" in out
    assert f"{folder}.sums (sums)" in out
    ended, out, _ = run("inspect", tmp_path, "--json", "--reference", f"{folder.name}.sums")
    summary = json.loads(out)
    assert summary["root"] == str(tmp_path)
    (reference,) = summary["references"]
    assert (reference["kind"], reference["completions"], reference["whole"]) == ("sums", 2, True)
    assert reference["hard"]["config"]["hidden_size"] == 32
    writer.close()


def test_damaged_files_are_named_and_the_exit_code_is_1(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path, random_records(range(50)), seal=True)
    whole = write(tmp_path, {1: [-1.0]}, seed=1)
    (shard,) = folder.glob("*.arrow")
    damaged = bytearray(shard.read_bytes())
    damaged[500] ^= 1
    shard.write_bytes(damaged)
    ended, out, _ = run("verify", tmp_path)
    assert ended == 1
    assert f"{whole}: sound, 1 completion in 1 file" in out
    assert f"{folder}: not sound" in out
    assert str(shard) in out
    assert f"remove {shard.name} and {shard.stem}.manifest.json and run `logratio prec" in out
    assert run("inspect", tmp_path, "--reference", whole.name)[0] == 0
    assert run("inspect", tmp_path)[0] == 1
    ended, _, err = run("export", folder, tmp_path / "out.parquet")
    assert (ended, str(shard) in err) == (2, True)
    assert not (tmp_path / "out.parquet").exists()


def test_merge_prints_a_forecast_and_names_contradictions(run: Run, tmp_path: Path) -> None:
    into, other = tmp_path / "into", tmp_path / "from"
    write(other, {1: [-1.0, -2.0], 2: [-3.0]})
    ended, out, _ = run("merge", into, other, "--dry-run")
    assert (ended, into.exists()) == (0, False)
    assert out.startswith("comparing 2 records with those of ")
    assert "if none is there yet, 84 B will be written (" in out
    assert run("merge", into, other)[0] == 0
    assert "nothing new; 2 repeated records left out" in run("merge", into, other)[1]
    bad = write(tmp_path / "bad", {2: [-3.5]})
    ended, _, err = run("merge", into, tmp_path / "bad")
    (journal,) = bad.glob("*.journal")
    assert (ended, str(journal) in err, "contradicts" in err) == (2, True, True)
    ended, _, err = run("merge", into, into)
    assert (ended, "merged into itself" in err) == (2, True)


def test_compact_needs_a_flag_for_journals_of_other_hosts(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0]})
    (journal,) = folder.glob("*.journal")
    journal.rename(folder / "away-7-00ff.journal")
    ended, out, _ = run("compact", tmp_path)
    assert ended == 0
    assert "left alone because a writer may be using them: away-7-00ff.journal" in out
    ended, out, _ = run("compact", tmp_path, "--other-hosts")
    assert "1 completion written to 1 shard; 1 file removed" in out
    assert len(CacheReader.open(folder, digest())) == 1
    assert not list(folder.glob("*.journal"))


def test_a_wrong_request_lists_the_references(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", {1: [-1.0]})
    write(tmp_path / "cache", {1: [-1.0]}, seed=1)
    ended, _, err = run("export", tmp_path / "cache", tmp_path / "out.parquet")
    assert ended == 2
    assert "2 references match, expected one; name one of" in err
    assert f"\n  {folder.name} (per-token: llama, " in err
    assert run("inspect", tmp_path / "none")[2].endswith("no such folder\n")
    (tmp_path / "empty").mkdir()
    for command in ("inspect", "verify", "compact"):
        ended, _, err = run(command, tmp_path / "empty")
        assert (ended, "no reference cache here" in err) == (2, True)


@pytest.mark.parametrize("command", ["merge", "compact"])
def test_ctrl_c_stops_at_once_and_removes_partial_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    folder = write(tmp_path / "cache", {1: [-1.0]})
    write(tmp_path / "other", {2: [-2.0]})
    partial = folder / f"here-{os.getpid()}-00ff.partial"
    going, calls = threading.Event(), []

    def endless(*given: object, **options: object) -> list[Change]:
        calls.append(threading.current_thread())
        partial.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)
        # Python loses a KeyboardInterrupt that it raises in a destructor: then send another one.
        while not going.wait(5):
            os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr(Merge, "run", endless)
    monkeypatch.setattr(ReferenceCache, "compact", endless)
    others = [tmp_path / "other"] if command == "merge" else []
    ended, _, err = run(command, tmp_path / "cache", *others)
    assert [thread.is_alive() for thread in calls] == [True]  # the command did not wait for it
    going.set()
    assert ended == 130
    assert "stopped: nothing is lost" in err
    assert not partial.exists()
    monkeypatch.undo()
    assert run("verify", tmp_path / "cache")[0] == 0
    assert len(CacheReader.open(folder, digest())) == 1


def test_ctrl_c_in_export_leaves_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cache", random_records(range(10)))

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", interrupted)
    assert run("export", tmp_path / "cache", tmp_path / "out" / "a.parquet")[0] == 130
    assert list((tmp_path / "out").iterdir()) == []
