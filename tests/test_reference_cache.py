"""`ReferenceCache`: what a cache holds, damage, merging, Parquet that others read."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow
import pyarrow.parquet
import pytest
from cache_folders import (
    Records,
    digest,
    fingerprint,
    folder_of,
    keys,
    random_records,
    write,
    write_sums,
)

from logratio._rust import CacheReader, CacheWriter
from logratio.cache import (
    CorruptCacheError,
    DamagedFingerprintError,
    MissingCompletionsError,
    NoReferenceError,
    ReferenceCache,
    parquet,
)
from logratio.cache.merging import MergeError
from logratio.training import PrecomputeConfig, precompute
from logratio.training.fingerprint import Fingerprint, model_fingerprint


def contents(folder: Path, seed: int = 0) -> Records:
    """Everything in a folder of log-probs, by the numbers of the keys, read by the core alone."""
    found, tokens, logps, _ = CacheReader.open(folder, digest(seed)).slice(None, 10**6)
    ends = np.cumsum(tokens)
    parts = [part.tolist() for part in np.split(logps, ends[:-1])]
    numbers = [int.from_bytes(key.tobytes()) for key in found]
    return dict(zip(numbers, parts, strict=True)) if numbers else {}


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_references_are_found_and_told(tmp_path: Path) -> None:
    first, second = write(tmp_path, {1: [-1.0]}), write(tmp_path, {1: [-2.0]}, seed=1)
    sums = write_sums(tmp_path, {1: (3, -4.5)})
    (tmp_path / "notes").mkdir()
    found = ReferenceCache(tmp_path).references()
    assert {(r.path, r.kind, r.digest) for r in found} == {
        (first, "per-token", digest(0)),
        (second, "per-token", digest(1)),
        (sums, "sums", digest(0)),
    }
    assert found[0].describe() == (
        "llama, 2 layers, hidden size 32, vocabulary 1,200, weights 00000000, compute dtype float32"
    )
    assert all(reference.proper_name == reference.name for reference in found)
    assert [r.path for r in ReferenceCache(sums).references()] == [sums]


def test_the_digest_is_that_of_training(tiny_model: Path) -> None:
    told = fingerprint(3)
    assert Fingerprint(told["hard"], {}).digest.hex() == told["digest"]
    from logratio.cache.identity import fingerprint_digest

    real = model_fingerprint(tiny_model)
    assert fingerprint_digest(real.hard) == real.digest


def test_a_name_chooses_and_a_wrong_one_says_which_there_are(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache")
    with pytest.raises(NoReferenceError, match="there is no such folder"):
        cache.references()
    (tmp_path / "cache").mkdir()
    with pytest.raises(NoReferenceError, match="no reference cache here; `logratio precompute"):
        cache.references()
    folder = write(tmp_path / "cache", {1: [-1.0]})
    write_sums(tmp_path / "cache", {1: (3, -4.5)})
    assert len(cache.references(folder.name[:5])) == 2
    assert [r.path for r in cache.references(folder.name)] == [folder]
    with pytest.raises(
        NoReferenceError, match=rf"named nothing; name one of\n  {folder.name} \(per-t"
    ):
        cache.references("nothing")
    with pytest.raises(NoReferenceError, match="2 references fit, and one is wanted"):
        cache.reference()
    with pytest.raises(NoReferenceError, match="nothing of reference 0000"):
        cache.open(bytes(32))


def test_precomputed_log_probs_are_read_by_key(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    done = precompute(
        PrecomputeConfig(tiny_model, [pairs_file], tmp_path / "cache"), show_progress=False
    )
    cache = ReferenceCache(tmp_path / "cache")
    (report,) = cache.verify()
    assert (report.is_whole, report.completions, report.tokens) == (True, done.new, done.tokens)
    logps = cache.open(model_fingerprint(tiny_model).digest)
    assert logps.reference.path == done.folder
    assert (len(logps), logps.tokens) == (done.new, done.tokens)
    assert "llama" in logps.reference.describe()


def test_reading_gives_what_was_written_and_never_a_number_for_what_is_not_there(
    tmp_path: Path,
) -> None:
    write(tmp_path, {5: [-1.0, -2.5], 1: [-0.5]}, seal=True)
    write(tmp_path, {3: [-4.0]})
    for pread in (False, True):
        cached = ReferenceCache(tmp_path).open(pread=pread)
        offsets, logps = cached.logps(keys(3, 5))
        assert (offsets.tolist(), logps.tolist()) == ([0, 1, 3], [-4.0, -1.0, -2.5])
        tokens, sums = cached.sums(keys(5, 1))
        assert (tokens.tolist(), sums.tolist()) == ([2, 1], [-3.5, -0.5])
        assert cached.join(keys(2)).tolist() == [-1]
        with pytest.raises(MissingCompletionsError, match="1 of 2 completions are not in the cac"):
            cached.logps(keys(3, 2))
    write_sums(tmp_path, {7: (4, -9.0)})
    tokens, sums = ReferenceCache(tmp_path).open(sums=True).sums(keys(7))
    assert (tokens.tolist(), sums.tolist()) == ([4], [-9.0])


def test_inspecting_counts_shards_journals_torn_bytes_and_leftovers(tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0, -2.0]}, seal=True)
    torn = write(tmp_path, {2: [-1.0]}, {3: [-2.0]})
    (journal,) = torn.glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-10])
    (folder / "host-1-ab.partial").write_bytes(b"x")
    living = CacheWriter(folder, digest())
    living.append(keys(1, 4), np.array([0, 2, 3]), np.array([-1.0, -2.0, -3.0], np.float32))
    (report,) = ReferenceCache(tmp_path).inspect()
    assert report.is_whole
    assert (report.completions, report.tokens, report.torn_bytes) == (3, 6, 182)
    assert [file.is_sealed for file in report.files] == [True, False, False]
    (used,) = [file for file in report.files if file.is_in_use]
    assert used.completions == 2
    assert f"process {subprocess.os.getpid()}" in str(used.writer)
    assert report.leftovers == ("host-1-ab.partial",)
    assert report.bytes == sum(
        path.stat().st_size for path in folder.iterdir() if path.suffix in {".arrow", ".journal"}
    )
    text = report.to_text()
    for part in ("1 shard, 2 journals", "3 completions", "182 bytes", "host-1-ab.partial"):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["files"][0]["completions"] == 1
    living.close()


@pytest.mark.parametrize("what", ["arrow", "manifest.json", "journal"])
def test_verifying_names_the_damaged_file_and_what_to_do(tmp_path: Path, what: str) -> None:
    folder = write(tmp_path, random_records(range(200)), seal=True)
    write(tmp_path, random_records(range(200, 220)), random_records(range(220, 240)))
    other = write(tmp_path, {1: [-1.0]}, seed=1)
    (path,) = folder.glob(f"*.{what}")
    flip(path, 150)
    damaged, whole = sorted(
        ReferenceCache(tmp_path).verify(), key=lambda report: report.reference.path == other
    )
    assert whole.is_whole
    (file,) = damaged.damaged
    assert file.name.split(".")[0] == path.name.split(".")[0]
    assert file.remedy.startswith("remove ")
    assert path.name in file.remedy
    assert "run `logratio precompute` again" in damaged.to_text()
    assert damaged.completions == (40 if what != "journal" else 200)
    # What is said to be done is enough.
    for name in file.remedy.removeprefix("remove ").split(" and run")[0].split(" and "):
        (folder / name).unlink()
    assert all(report.is_whole for report in ReferenceCache(tmp_path).verify())


def test_a_flipped_bit_in_a_value_is_seen_by_verify(tmp_path: Path) -> None:
    folder = write(tmp_path, random_records(range(2000)), seal=True)
    (shard,) = folder.glob("*.arrow")
    for at in range(500, shard.stat().st_size, shard.stat().st_size // 20):
        flip(shard, at)
        (report,) = ReferenceCache(tmp_path).verify()
        assert not report.is_whole
        flip(shard, at)
    assert ReferenceCache(tmp_path).verify()[0].is_whole


def test_a_file_of_another_reference_is_to_be_moved_not_removed(tmp_path: Path) -> None:
    folder, other = write(tmp_path, {1: [-1.0]}), write(tmp_path, {2: [-1.0]}, seed=1)
    (journal,) = other.glob("*.journal")
    journal.rename(folder / journal.name)
    report = ReferenceCache(folder).verify()[0]
    (file,) = report.damaged
    assert file.remedy == f"move {journal.name} to the folder where it belongs"


def test_records_that_contradict_each_other_are_a_problem(tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0]})
    write(tmp_path, {1: [-1.5]})
    (report,) = ReferenceCache(tmp_path).inspect()
    assert (report.is_whole, report.completions) == (False, None)
    assert all(journal.name in report.problems[0] for journal in folder.glob("*.journal"))
    assert "? completions" in report.to_text()


def test_a_forged_fingerprint_is_named_and_its_log_probs_are_not_given_away(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", {1: [-1.0]})
    told = fingerprint()
    told["hard"]["config"]["hidden_size"] = 64
    (folder / "fingerprint.json").write_text(json.dumps(told))
    cache = ReferenceCache(tmp_path / "cache")
    (report,) = cache.verify()
    assert not report.is_whole
    assert str(folder / "fingerprint.json") in report.problems[0]
    assert report.completions == 1
    for act in (
        cache.open,
        cache.compact,
        lambda: cache.export(tmp_path / "out.parquet"),
        lambda: ReferenceCache(tmp_path / "new").merge([tmp_path / "cache"]),
    ):
        with pytest.raises(DamagedFingerprintError, match=r"fingerprint\.json: its fields are no"):
            act()
    (folder / "fingerprint.json").write_text("{")
    assert "no readable fingerprint" in cache.verify()[0].problems[0]
    (folder / "fingerprint.json").unlink()
    (report,) = cache.verify()
    assert report.is_whole
    assert report.reference.describe() == "no fingerprint.json says which model it is"
    assert cache.open().logps(keys(1))[1].tolist() == [-1.0]


def test_a_renamed_folder_is_a_problem_that_says_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0]})
    moved = folder.rename(tmp_path / "worker3")
    (report,) = ReferenceCache(moved).inspect()
    assert report.problems == (
        f"training looks for {folder.name}, and this folder is named worker3: rename it",
    )


def test_merging_gives_the_exact_union(tmp_path: Path) -> None:
    records = random_records(range(300))
    parts = [dict(list(records.items())[at : at + 150]) for at in (0, 75, 150)]
    into = ReferenceCache(tmp_path / "into")
    write(tmp_path / "into", parts[0], seal=True)
    write(tmp_path / "a", parts[1])
    write(tmp_path / "b", parts[2], seal=True)
    write(tmp_path / "b", {1: [-7.0]}, seed=1)
    write_sums(tmp_path / "b", {1: (2, -3.0)})
    sources = [tmp_path / "a", tmp_path / "b"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("[ab]/*/*")}
    plan = into.plan_merge(sources)
    assert sum(merge.completions for merge in plan) == 302
    changes = {change.reference.name: change for change in into.merge(sources)}
    assert len(changes) == 3
    folder = folder_of(tmp_path / "into")
    assert changes[folder.name].completions == 150
    assert contents(folder) == records
    assert contents(folder_of(tmp_path / "into", 1), 1) == {1: [-7.0]}
    assert into.open(sums=True).sums(keys(1))[1].tolist() == [-3.0]
    assert {path: path.read_bytes() for path in before} == before
    assert all(report.is_whole for report in into.verify())
    assert sum(change.completions for change in into.merge(sources)) == 0
    assert sum(r.completions or 0 for r in into.inspect()) == 302


def test_merging_takes_over_the_fingerprints_of_all_conditions(tmp_path: Path) -> None:
    write(tmp_path / "a", {1: [-1.0]})
    other = write(tmp_path / "b", {2: [-1.0]})
    told = fingerprint(torch="9.9", device="H100")
    (other / "fingerprint.json").write_text(json.dumps(told))
    ReferenceCache(tmp_path / "new").merge([tmp_path / "a", tmp_path / "b"])
    (found,) = ReferenceCache(tmp_path / "new").references()
    assert found.name == other.name
    assert found.hard == told["hard"]
    assert list(found.soft) == [{"torch": "2.11.0"}, told["soft"]]
    ReferenceCache(tmp_path / "new").merge([tmp_path / "b"])
    assert len(list(found.path.glob("fingerprint*.json"))) == 2


def test_merging_what_contradicts_adds_nothing_and_names_both_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "into", {1: [-1.0], 2: [-2.0]})
    other = write(tmp_path / "from", {2: [-2.5], 3: [-3.0]})
    with pytest.raises(CorruptCacheError, match="contradicts") as caught:
        ReferenceCache(tmp_path / "into").merge([tmp_path / "from"])
    for place in (folder, other):
        (journal,) = place.glob("*.journal")
        assert str(journal) in str(caught.value)
    assert contents(folder) == {1: [-1.0], 2: [-2.0]}


def test_a_merge_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "into", {1: [-1.0]})
    write(tmp_path / "from", {1: [-1.0]}, seed=1)
    (tmp_path / "empty").mkdir()
    for into, other, reason in (
        (tmp_path / "into", tmp_path / "into", "would be merged into itself"),
        (tmp_path / "into", folder, "would be merged into itself"),
        (tmp_path / "into", tmp_path / "empty", "no reference cache here"),
        (folder, tmp_path / "from", "is the folder of one reference"),
    ):
        with pytest.raises(MergeError, match=reason):
            ReferenceCache(into).merge([other])
    with pytest.raises(FileNotFoundError):
        ReferenceCache(tmp_path / "into").merge([tmp_path / "missing"])
    assert contents(folder) == {1: [-1.0]}


def test_compacting_keeps_every_completion_once(tmp_path: Path) -> None:
    records = random_records(range(100))
    folder = write(tmp_path, records, seal=True)
    write(tmp_path, dict(list(records.items())[50:]))
    (folder / "away-1-ab.partial").write_bytes(b"x")
    living = CacheWriter(folder, digest())
    living.append(keys(500), np.array([0, 1]), np.array([-1.0], np.float32))
    (change,) = ReferenceCache(tmp_path).compact()
    assert (change.completions, change.repeats, len(change.shards)) == (100, 50, 1)
    assert len(change.in_use) == 1
    assert change.in_use[0] in change.to_text()
    assert (folder / "away-1-ab.partial").exists()  # another host's
    living.close()
    (change,) = ReferenceCache(tmp_path).compact(other_hosts=True)
    assert "away-1-ab.partial" in change.removed
    assert contents(folder) == records | {500: [-1.0]}
    (report,) = ReferenceCache(tmp_path).verify()
    assert [file.is_sealed for file in report.files] == [True]


def test_parquet_is_what_was_written_for_whoever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 64)
    records = random_records(range(500))
    folder = write(tmp_path / "cache", dict(list(records.items())[::2]), seal=True)
    write(tmp_path / "cache", dict(list(records.items())[1::2]))
    path = tmp_path / "out" / "logps.parquet"
    pieces = []
    done = ReferenceCache(tmp_path / "cache").export(path, advance=lambda *n: pieces.append(n))
    assert (done.rows, done.tokens) == (500, sum(map(len, records.values())))
    assert done.bytes == path.stat().st_size
    assert [rows for rows, _ in pieces] == [64] * 7 + [52]
    wanted = [
        (number.to_bytes(32), len(logps), sum(map(float, logps)), logps)
        for number, logps in records.items()
    ]
    table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
    assert [str(field.type) for field in table.schema] == [
        *("fixed_size_binary[32]", "uint32", "double", "list<element: float not null>"),
    ]
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert same(rows, wanted)
    assert same(polars.read_parquet(path).rows(), wanted)
    assert same(duckdb.sql(f"select * from '{path}'").fetchall(), wanted)
    told = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert told["logratio.fingerprint"] == digest().hex()
    assert told["logratio.kind"] == "per-token"
    assert json.loads(told["logratio.reference"])["hard"] == fingerprint()["hard"]
    assert [p.name for p in path.parent.iterdir()] == ["logps.parquet"]
    assert contents(folder) == records


def same(
    rows: list[tuple[object, ...]], wanted: list[tuple[bytes, int, float, list[float]]]
) -> bool:
    """Compare rows: everything exactly but the sum, whose order of addition is free."""
    found = [(bytes(key), tokens, list(logps)) for key, tokens, _, logps in rows]  # type: ignore[call-overload]
    assert found == [(key, tokens, logps) for key, tokens, _, logps in wanted]
    return np.allclose([row[2] for row in rows], [row[2] for row in wanted], rtol=1e-14, atol=0)  # type: ignore[arg-type]


def test_sums_are_exported_without_log_probs_of_tokens(tmp_path: Path) -> None:
    write_sums(tmp_path / "cache", {2: (3, -4.5), 1: (1, -0.25)})
    ReferenceCache(tmp_path / "cache").export(tmp_path / "sums.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "sums.parquet").to_pylist() == [
        {"key": (1).to_bytes(32), "tokens": 1, "sum": -0.25},
        {"key": (2).to_bytes(32), "tokens": 3, "sum": -4.5},
    ]


def test_pages_of_parquet_carry_checksums(tmp_path: Path) -> None:
    write(tmp_path / "cache", random_records(range(100)))
    path = tmp_path / "out.parquet"
    ReferenceCache(tmp_path / "cache").export(path)
    sound = path.read_bytes()
    table = pyarrow.parquet.read_table(path)
    silent = 0
    for at in range(4, len(sound) // 2, 7):
        flip(path, at)
        try:
            found = pyarrow.parquet.read_table(path, page_checksum_verification=True)
            silent += found != table
        except (OSError, pyarrow.ArrowException):
            pass
        path.write_bytes(sound)
    assert silent == 0


def test_the_file_is_read_without_our_library(tmp_path: Path) -> None:
    write(tmp_path / "cache", {1: [-1.0, -2.0], 2: [-4.0]}, seal=True)
    ReferenceCache(tmp_path / "cache").export(tmp_path / "out.parquet")
    script = (
        "import sys, duckdb\n"
        "sys.modules['logratio'] = None\n"
        "query = 'select sum(tokens), sum(sum), sum(list_sum(logps)) from read_parquet(?)'\n"
        "print(*duckdb.execute(query, [sys.argv[1]]).fetchone())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out.parquet")]
    assert subprocess.check_output(command, text=True).split() == ["3", "-7.0", "-7.0"]


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "cache", random_records(range(100)), seal=True)
    cache, path = ReferenceCache(tmp_path / "cache"), tmp_path / "out" / "a.parquet"
    cache.export(path)
    before = path.read_bytes()

    def interrupted(rows: int, total: int) -> None:
        assert (rows, total) == (100, 100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.export(path, advance=interrupted)
    (shard,) = folder.glob("*.arrow")
    flip(shard, 400)
    with pytest.raises(CorruptCacheError, match=shard.name):
        cache.export(path)
    assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]
    assert path.read_bytes() == before
    with pytest.raises(IsADirectoryError, match="name a file"):
        cache.export(path.parent)


def test_a_full_disk_loses_nothing(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "big", {n: [-float(n + 1)] * 2000 for n in range(30)})
    cache = ReferenceCache(small_disk / "cache")
    folder = write(small_disk / "cache", {1000: [-1.0]})
    with pytest.raises(OSError, match=r"No space|free") as caught:
        cache.merge([tmp_path / "big"])
    assert caught.value.errno == 28
    assert contents(folder) == {1000: [-1.0]}
    assert not list(folder.glob("*.partial"))
    with pytest.raises(OSError, match="are free"):
        ReferenceCache(tmp_path / "big").export(small_disk / "out.parquet")
    monkeypatch.setattr(parquet, "check_writable", lambda folder, needed: None)
    noise = {n: random_records(range(1), n)[0] * 500 for n in range(30)}
    write(tmp_path / "noise", {n: (np.array(v) - n / 7).tolist() for n, v in noise.items()})
    draw = np.random.default_rng(0)
    write(tmp_path / "noise", {n + 50: (-draw.random(5000)).tolist() for n in range(20)})
    with pytest.raises(OSError, match="No space") as caught:
        ReferenceCache(tmp_path / "noise").export(small_disk / "out.parquet")
    assert caught.value.errno == 28
    assert [p.name for p in small_disk.iterdir()] == ["cache"]
    assert all(report.is_whole for report in cache.verify())


def test_a_cache_that_cannot_be_written_can_be_looked_at_checked_and_exported(
    tmp_path: Path, small_disk: Path
) -> None:
    folder = write(small_disk, {1: [-1.0]}, seal=True)
    write(small_disk, {2: [-2.0]})
    write(tmp_path / "other", {3: [-3.0]})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    cache = ReferenceCache(small_disk)
    assert cache.inspect()[0].completions == 2
    assert cache.verify()[0].is_whole
    assert cache.export(tmp_path / "out.parquet").rows == 2
    for act in (cache.compact, lambda: cache.merge([tmp_path / "other"])):
        with pytest.raises(OSError, match="Read-only") as caught:
            act()
        assert str(folder) in str(caught.value)
    assert contents(folder) == {1: [-1.0], 2: [-2.0]}
