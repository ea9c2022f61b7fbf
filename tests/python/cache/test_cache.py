"""`ReferenceCache`: inspect, verify, compact and read a cache."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_folders import (
    contents,
    digest,
    disk_of_128_kib,
    fingerprint,
    flip,
    keys,
    random_records,
    write,
    write_sums,
)

from logratio._rust import CacheWriter
from logratio.cache import (
    DamagedFingerprintError,
    MissingCompletionsError,
    NoReferenceError,
    ReferenceCache,
)
from logratio.training import PrecomputeConfig, precompute
from logratio.training.fingerprint import Fingerprint, model_fingerprint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    with disk_of_128_kib(tmp_path) as place:
        yield place


def test_references_are_found_and_described(tmp_path: Path) -> None:
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


def test_the_digest_equals_that_of_training(tiny_model: Path) -> None:
    recorded = fingerprint(3)
    assert Fingerprint(recorded["hard"], {}).digest.hex() == recorded["digest"]
    from logratio.cache.identity import fingerprint_digest

    real = model_fingerprint(tiny_model)
    assert fingerprint_digest(real.hard) == real.digest


def test_a_name_selects_and_a_wrong_one_lists_the_references(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache")
    with pytest.raises(NoReferenceError, match="no such folder"):
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
    with pytest.raises(NoReferenceError, match="2 references match, expected one"):
        cache.reference()
    with pytest.raises(NoReferenceError, match="no reference 0000"):
        cache.open(bytes(32))


def test_precomputed_log_probs_are_read_by_key(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    done = precompute(
        PrecomputeConfig(tiny_model, [pairs_file], tmp_path / "cache"), show_progress=False
    )
    cache = ReferenceCache(tmp_path / "cache")
    (report,) = cache.verify()
    assert repr(report).startswith(f"ReferenceReport({str(report.reference.path)!r}, sound, ")
    assert "\\x" not in repr(report) and "\\x" not in repr(report.reference)
    assert (report.is_whole, report.completions, report.tokens) == (True, done.new, done.tokens)
    logps = cache.open(model_fingerprint(tiny_model).digest)
    assert logps.reference.path == done.folder
    assert (len(logps), logps.tokens) == (done.new, done.tokens)
    assert "llama" in logps.reference.describe()


def test_reading_returns_what_was_written_and_refuses_missing_keys(
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


def test_repr_names_the_folder_and_its_contents(tmp_path: Path) -> None:
    folder = write(tmp_path, {5: [-1.0, -2.5], 1: [-0.5]})
    cache = ReferenceCache(tmp_path)
    assert repr(cache) == f"ReferenceCache({str(tmp_path)!r})"
    described = f"ReferenceLogps({folder.name!r}, per-token, 2 records, 3 tokens)"
    assert repr(cache.open()) == described


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
    assert f"process {os.getpid()}" in str(used.writer)
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
def test_verify_names_the_damaged_file_and_its_remedy(tmp_path: Path, what: str) -> None:
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
    # The suggested remedy repairs the cache.
    for name in file.remedy.removeprefix("remove ").split(" and run")[0].split(" and "):
        (folder / name).unlink()
    assert all(report.is_whole for report in ReferenceCache(tmp_path).verify())


def test_verify_detects_a_flipped_bit(tmp_path: Path) -> None:
    folder = write(tmp_path, random_records(range(2000)), seal=True)
    (shard,) = folder.glob("*.arrow")
    flip(shard, 500)  # in a key: inspect reads only the shard's metadata, which is intact
    (report,) = ReferenceCache(tmp_path).inspect()
    assert "what to do: `logratio cache verify` names each damaged file" in report.to_text()
    flip(shard, 500)
    for at in range(500, shard.stat().st_size, shard.stat().st_size // 20):
        flip(shard, at)
        (report,) = ReferenceCache(tmp_path).verify()
        assert not report.is_whole
        flip(shard, at)
    assert ReferenceCache(tmp_path).verify()[0].is_whole


def test_the_remedy_for_a_file_of_another_reference_is_to_move_it(tmp_path: Path) -> None:
    folder, other = write(tmp_path, {1: [-1.0]}), write(tmp_path, {2: [-1.0]}, seed=1)
    (journal,) = other.glob("*.journal")
    journal.rename(folder / journal.name)
    report = ReferenceCache(folder).verify()[0]
    (file,) = report.damaged
    assert file.remedy == f"move {journal.name} to the folder of its reference"


def test_records_that_contradict_each_other_are_a_problem(tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0]})
    write(tmp_path, {1: [-1.5]})
    (report,) = ReferenceCache(tmp_path).inspect()
    assert (report.is_whole, report.completions) == (False, None)
    assert all(journal.name in report.problems[0] for journal in folder.glob("*.journal"))
    assert "? completions" in report.to_text()
    assert "what to do: remove the one of the two files" in report.to_text()


def test_a_forged_fingerprint_is_named_and_its_log_probs_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", {1: [-1.0]})
    recorded = fingerprint()
    recorded["hard"]["config"]["hidden_size"] = 64
    (folder / "fingerprint.json").write_text(json.dumps(recorded))
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
        with pytest.raises(DamagedFingerprintError, match=r"fingerprint\.json: its fields do not"):
            act()
    (folder / "fingerprint.json").write_text("{")
    assert "cannot read the fingerprint" in cache.verify()[0].problems[0]
    (folder / "fingerprint.json").unlink()
    (report,) = cache.verify()
    assert report.is_whole
    assert report.reference.describe() == "unknown model (no fingerprint.json)"
    assert cache.open().logps(keys(1))[1].tolist() == [-1.0]


def test_a_renamed_folder_is_reported_with_its_expected_name(tmp_path: Path) -> None:
    folder = write(tmp_path, {1: [-1.0]})
    moved = folder.rename(tmp_path / "worker3")
    (report,) = ReferenceCache(moved).inspect()
    assert report.problems == (
        f"this folder is named worker3, but training looks for {folder.name}: rename it",
    )


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
    assert (folder / "away-1-ab.partial").exists()  # of another host
    living.close()
    (change,) = ReferenceCache(tmp_path).compact(other_hosts=True)
    assert "away-1-ab.partial" in change.removed
    assert contents(folder) == records | {500: [-1.0]}
    (report,) = ReferenceCache(tmp_path).verify()
    assert [file.is_sealed for file in report.files] == [True]


def test_a_read_only_cache_can_be_inspected_verified_and_exported(
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
    with pytest.raises(OSError, match="Read-only") as compacted:
        cache.compact()
    with pytest.raises(OSError, match="Read-only") as merged:
        cache.merge([tmp_path / "other"])
    for caught in (compacted, merged):
        assert str(folder) in str(caught.value)
    assert contents(folder) == {1: [-1.0], 2: [-2.0]}
