"""Merging caches adds exactly the missing records, or nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_folders import (
    BF16,
    contents,
    disk_of_128_kib,
    fingerprint,
    folder_of,
    keys,
    random_records,
    write,
    write_sums,
)

from logratio.cache import CorruptCacheError, ReferenceCache, record_tolerance
from logratio.cache.identity import record_conditions
from logratio.cache.merging import MergeError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    with disk_of_128_kib(tmp_path) as place:
        yield place


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


def test_merging_copies_the_fingerprint_and_all_conditions(tmp_path: Path) -> None:
    write(tmp_path / "a", {1: [-1.0]})
    other = write(tmp_path / "b", {2: [-1.0]})
    recorded = fingerprint(torch="9.9", device="H100")
    (other / "fingerprint.json").write_text(json.dumps(recorded))
    record_conditions(other, {"layout": "padded"})
    ReferenceCache(tmp_path / "new").merge([tmp_path / "a", tmp_path / "b"])
    (found,) = ReferenceCache(tmp_path / "new").references()
    assert found.name == other.name
    assert found.hard == recorded["hard"]
    assert found.soft[0] == {"torch": "2.11.0"}
    assert all(soft in found.soft for soft in (recorded["soft"], {"layout": "padded"}))
    ReferenceCache(tmp_path / "new").merge([tmp_path / "b"])
    assert len(list(found.path.glob("fingerprint*.json"))) == 1
    assert len(list(found.path.glob("conditions-*.json"))) == 2


def test_merging_contradictory_records_adds_nothing_and_names_both_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "into", {1: [-1.0], 2: [-2.0]})
    other = write(tmp_path / "from", {2: [-2.5], 3: [-3.0]})
    with pytest.raises(CorruptCacheError, match="contradicts") as caught:
        ReferenceCache(tmp_path / "into").merge([tmp_path / "from"])
    for place in (folder, other):
        (journal,) = place.glob("*.journal")
        assert str(journal) in str(caught.value)
    assert contents(folder) == {1: [-1.0], 2: [-2.0]}


def test_two_batches_of_a_coarse_reference_agree(tmp_path: Path) -> None:
    for place, logp in (("into", -1.0), ("near", -1.5), ("far", -2.0)):
        write(tmp_path / place, {1: [logp]}, seed=BF16)
    into = ReferenceCache(tmp_path / "into")
    (change,) = into.merge([tmp_path / "near"])
    assert (change.completions, change.repeats) == (
        1,
        1,
    )  # it was only in a journal, not in a shard
    with pytest.raises(CorruptCacheError, match="contradicts"):
        into.merge([tmp_path / "far"])
    write(tmp_path / "into", {1: [-1.5]}, seed=BF16)
    assert into.verify()[0].is_whole
    assert into.open().logps(keys(1))[1].tolist() in ([-1.0], [-1.5])
    assert into.export(tmp_path / "out.parquet").rows == 1
    assert into.compact()[0].repeats == 2


@pytest.mark.parametrize(
    ("hard", "is_exact"),
    [
        ({"compute_dtype": "float32", "config": {}}, True),
        ({}, True),
        ({"compute_dtype": "bfloat16 autocast over float32", "config": {}}, False),
        ({"compute_dtype": "float32", "quantization": "8 bits"}, False),
        ({"compute_dtype": "float32", "config": {"quantization_config": {"bits": 4}}}, False),
    ],
)
def test_low_precision_has_a_larger_tolerance(hard: dict[str, object], is_exact: bool) -> None:
    assert record_tolerance(hard) == (1e-3 if is_exact else 0.75)


def test_an_invalid_merge_is_refused(tmp_path: Path) -> None:
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


def test_a_full_disk_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    write(tmp_path / "big", {n: [-float(n + 1)] * 2000 for n in range(30)})
    cache = ReferenceCache(small_disk / "cache")
    folder = write(small_disk / "cache", {1000: [-1.0]})
    with pytest.raises(OSError, match="No space") as caught:
        cache.merge([tmp_path / "big"])
    assert caught.value.errno == 28
    assert contents(folder) == {1000: [-1.0]}
    assert not list(folder.glob("*.partial"))
    assert cache.verify()[0].is_whole
