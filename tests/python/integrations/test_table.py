"""Tables of groups with reference log-probs, compared with rows built in plain Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from method_groups import weighted_store
from oracle import in_float64, per_token_logps

from logratio._rust import ROLES, CacheReader, CacheWriter, Store, StoreWriter
from logratio.cache.identity import fingerprint_digest
from logratio.data import PreferenceTokenizer, build_store
from logratio.integrations import table as lookup
from logratio.integrations.table import ColumnsError, MissingLogpsError, Shape, reference_table
from logratio.training import PrecomputeConfig, load_model, precompute

HARD = {"compute_dtype": "float32"}
FINGERPRINT = fingerprint_digest(HARD)
IDENTITY = json.dumps({"digest": FINGERPRINT.hex(), "hard": HARD, "soft": {}})
NAME = FINGERPRINT.hex()[:16]


def make_store(
    groups: int, sizes: tuple[int, ...], *, masked: bool = False, path: Path | None = None
) -> Store:
    """Write random groups of the given numbers of completions."""
    random, writer = np.random.default_rng(0), StoreWriter(path)
    for group in range(groups):
        count = sizes[group % len(sizes)]
        lengths = random.integers(1, 9, count).astype(np.uint32)
        total = int(lengths.sum())
        mask = np.ones(total, np.uint8)
        if masked and group % 3 == 0:
            mask[random.random(total) < 0.4] = 0
            mask[np.cumsum(lengths) - lengths] = 1  # every completion has a loss token
        writer.push(
            random.integers(0, 50, random.integers(1, 7)).astype(np.int32),
            random.integers(0, 50, total).astype(np.int32),
            mask,
            lengths,
            np.array([0, 1] if count == 2 else [2] * count, np.uint8),
            group % 2,
            group + 1,
        )
    return writer.finish(json.dumps({"files": ["a.jsonl", "b.jsonl"]}))


def test_turns_with_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ColumnsError, match="in 8 groups, turns have a `weight`"):
        reference_table(weighted_store("pairs", [-1.0, 0.5]), tmp_path)


def make_cache(root: Path, store: Store, name: str = NAME) -> Path:
    """Write random log-probs of every completion, the same for the same completion."""
    keys, lengths = store.keys(), store.completion_lengths()
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    random = [np.random.default_rng(key.view(np.uint64)) for key in keys]
    logps = [own.random(n, np.float32) for own, n in zip(random, lengths, strict=True)]
    folder = root / name
    writer = CacheWriter(folder, FINGERPRINT)
    writer.append(keys, offsets, -np.concatenate(logps) * 9)
    writer.close()
    (folder / "fingerprint.json").write_text(IDENTITY)
    return root


def write_sums(folder: Path, store: Store, sums: np.ndarray) -> None:
    """Convert a folder to one of sums."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = CacheWriter(folder, FINGERPRINT, sums=True)
    writer.append_sums(store.sum_keys(), store.counted_lengths(), sums)
    writer.close()
    (folder / "fingerprint.json").write_text(IDENTITY)


def expected_rows(store: Store, root: Path, shape: Shape, *, masks: bool) -> list[dict[str, Any]]:
    """Build every row in plain Python."""
    reader, keys = CacheReader.open(root / NAME, FINGERPRINT), store.keys()
    rows, number = [], 0
    for index in range(len(store)):
        prompt, ids, counted, roles = store.group(index)
        place = {"file": "ab"[index % 2] + ".jsonl", "line": index + 1}
        row: dict[str, Any] = {"prompt_ids": prompt.tolist(), **place}
        for side, mask, role in zip(ids, counted, roles, strict=True):
            logps = reader.read(reader.join(keys[number : number + 1]))[1].tolist()
            number += 1
            name = "completion" if shape == "completions" else ROLES[role]
            reference = "ref" if shape == "completions" else f"ref_{ROLES[role]}"
            row[f"{name}_ids"] = side.tolist()
            row[f"{reference}_logps"] = sum(
                logp for logp, one in zip(logps, mask, strict=True) if one
            )
            row[f"{reference}_per_token_logps"] = logps
            if masks:
                row[f"{name}_mask"] = mask.tolist()
            if shape == "completions":
                rows.append({**row, "group": index, "role": ROLES[role]})
        if shape == "pairs":
            rows.append(row)
    return rows


def assert_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            close = isinstance(value, float)
            assert row[name] == (pytest.approx(value, abs=1e-9) if close else value), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "sizes"), [("pairs", (2,)), ("completions", (1, 2, 5))])
@pytest.mark.parametrize("tokens", [1, 100, lookup.CHUNK_TOKENS])
def test_every_row_matches_its_group(
    shape: Shape,
    sizes: tuple[int, ...],
    masked: bool,
    tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookup, "CHUNK_TOKENS", tokens)
    store = make_store(60, sizes, masked=masked)
    root = make_cache(tmp_path, store)
    table = reference_table(store, root, shape=shape, per_token=True)
    batches = list(table.batches())
    assert len(batches) in {1: [60], 100: range(5, 40)}.get(tokens, [1])
    expected = expected_rows(store, root, shape, masks=masked)
    assert_rows(pa.Table.from_batches(batches).to_pylist(), expected)


def test_parquet_dataset_and_stream_have_the_same_rows(tmp_path: Path) -> None:
    store = make_store(30, (2,))
    table = reference_table(store, make_cache(tmp_path, store))
    assert "CachedLogps(Store(" in repr(table) and " at 0x" not in repr(table)
    expected = pa.Table.from_batches(table.batches()).to_pylist()
    assert not [name for name in expected[0] if "per_token" in name or "mask" in name]
    table.to_parquet(tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == expected
    assert table.to_dataset().to_list() == expected
    mapped = table.to_dataset(tmp_path / "pairs.arrow")
    assert mapped.to_list() == expected
    assert mapped.cache_files == [{"filename": str(tmp_path / "pairs.arrow")}]
    assert polars.DataFrame(table).to_dicts() == expected
    assert not [*tmp_path.glob(".*")]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(30, (2,))
    table = reference_table(store, make_cache(tmp_path, store))
    (tmp_path / "pairs.parquet").write_text("the old one")
    monkeypatch.setattr(lookup.CachedLogps, "sums", None)
    with pytest.raises(TypeError):
        table.to_parquet(tmp_path / "pairs.parquet")
    assert (tmp_path / "pairs.parquet").read_text() == "the old one"
    assert not [*tmp_path.glob(".*")]


def test_data_may_be_a_store_or_files(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    tokenizer = PreferenceTokenizer.load(tiny_model)
    store, _ = build_store([pairs_file], tokenizer, tmp_path / "pairs.store")
    root = make_cache(tmp_path / "cache", store)
    expected = polars.DataFrame(reference_table(store, root)).to_dicts()
    assert (expected[3]["file"], expected[3]["line"]) == (pairs_file.as_posix(), 4)
    sealed = reference_table(tmp_path / "pairs.store", root)
    assert polars.DataFrame(sealed).to_dicts() == expected
    files = reference_table([pairs_file], root, tokenizer=tokenizer)
    assert polars.DataFrame(files).to_dicts() == expected
    with pytest.raises(ColumnsError, match="needs a tokenizer"):
        reference_table(pairs_file, root)


def test_precomputed_log_probs_are_found_and_equal_the_references(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    precompute(PrecomputeConfig(tiny_model, [pairs_file], cache), show_progress=False)
    tokenizer = PreferenceTokenizer.load(tiny_model)
    reference_table([pairs_file], cache, tokenizer=tokenizer).to_parquet(tmp_path / "p.parquet")
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert len(rows) == 16
    model = in_float64(load_model(tiny_model))
    for row in rows:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                logps = per_token_logps(model, [(row["prompt_ids"], [row[f"{side}_ids"]])])
            assert row[f"ref_{side}_logps"] == pytest.approx(float(logps.sum()), abs=1e-4)


def test_missing_completions_are_counted(tmp_path: Path) -> None:
    make_cache(tmp_path, make_store(20, (2,)))
    with pytest.raises(MissingLogpsError, match=r"20 of 60 completions are not in the cache"):
        reference_table(make_store(30, (2,)), tmp_path)


@pytest.mark.parametrize(
    ("names", "asked", "reason"),
    [
        ([], None, "no reference cache here; `logratio precompute --cache` makes one"),
        (["aa", "ab"], None, r"(?s)2 references .* match, expected one.*\n  aa .*\n  ab "),
        (["aa", "ab"], "a", "2 references .* match, expected one"),
        (["aa", "ab"], "b", r"(?s)no reference is named b;.*\n  aa .*\n  ab "),
        (["aa.sums"], None, "0 references with per-token log-probs match"),
    ],
)
def test_an_ambiguous_or_missing_reference_is_refused(
    names: list[str], asked: str | None, reason: str, tmp_path: Path
) -> None:
    store = make_store(2, (2,))
    for name in names:
        make_cache(tmp_path, store, name)
        if name.endswith(".sums"):
            write_sums(tmp_path / name, store, np.full(store.completions, -1.0))
    with pytest.raises(MissingLogpsError, match=reason):
        reference_table(store, tmp_path, reference=asked)


def test_a_reference_is_found_by_prefix(tmp_path: Path) -> None:
    store = make_store(2, (2,))
    for name in ("aa", "ab"):
        make_cache(tmp_path, store, name)
    assert len(polars.DataFrame(reference_table(store, tmp_path, reference="ab"))) == 2


@pytest.mark.parametrize(
    ("options", "sizes", "reason"),
    [
        ({}, (2, 3), "some groups are not a pair"),
        ({}, (1,), "some groups are not a pair"),
        ({"shape": "rows"}, (2,), "shape is 'rows', not one of pairs, completions"),
        ({"sums": True, "per_token": True}, (2,), "leave per_token out"),
    ],
)
def test_impossible_tables_are_refused(
    options: dict[str, Any], sizes: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    store = make_store(6, sizes)
    with pytest.raises(ColumnsError, match=reason):
        reference_table(store, make_cache(tmp_path, store), **options)


def test_a_cache_of_sums_gives_the_same_sums(tmp_path: Path) -> None:
    store = make_store(40, (1, 2, 5), masked=True)
    root = make_cache(tmp_path, store)
    expected = polars.DataFrame(reference_table(store, root, shape="completions"))
    write_sums(root / f"{NAME}.sums", store, expected["ref_logps"].to_numpy())
    found = polars.DataFrame(reference_table(store, root, shape="completions", sums=True))
    assert found.equals(expected)
    with pytest.raises(MissingLogpsError, match="contains only sums"):
        logps = lookup.CachedLogps(store, lookup.open_reference(root, sums=True), sums=True)
        logps.per_token(next(logps.chunks()))


def test_loss_tokens_are_numbered_per_completion() -> None:
    store = make_store(50, (1, 2, 5), masked=True)
    layout = store.shared_layout(np.arange(50), fields=lookup.FIELDS)
    expected: list[int] = []
    for index in range(50):
        for mask in store.group(index)[2]:
            expected += [int(mask[: place + 1].sum()) for place in range(len(mask))]
    assert lookup.loss_token_numbers(layout).tolist() == expected
