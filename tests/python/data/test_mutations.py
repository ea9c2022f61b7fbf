"""Ten thousand damaged files: each yields rows and refusals with places, and no other error.

Every mutation is a function of its seed, which a failure names.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from accounts import account, pair
from containers import ENCODE, FILES, PACK, TABLES
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, save, with_bos, word_level

from logratio.data import BadDataError, PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.readers import open_file
from logratio.data.records import CODES, Refusal

ROWS = [pair(i, prompt=f"how {i}é") for i in range(8)]
CHATS = [{"prompt": [{"role": "user", "content": f"how {i}é"}], "n": i} for i in range(8)]
READS = {"jsonl": 1500, "json": 1000, "csv": 800, "parquet": 700, "arrow": 700, "arrows": 700}
"""Mutations per container; half as many per compressed container: 10,100 in all."""

BUILDS = 150


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return the content with one to three mutations."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        match chance.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : min(end, at + 40)]
            case 2:
                data[at:at] = chance.choice(TOKENS)
            case 3:
                pieces = bytes(data).splitlines(keepends=True)
                chance.shuffle(pieces)
                data = bytearray(b"".join(pieces))
            case 4:
                del data[end:]
            case _:
                data[at:at] = data[at : min(end, at + 200)]
    return bytes(data)


TOKENS = [
    b'"', b"\n", b"\r", b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\0", b"\xff", b"\\ud800",
    b"null", b"1e999", b"NaN", b"\xef\xbb\xbf", b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1", b"[" * 2000,
]  # fmt: skip


def check_rows(path: Path) -> None:
    """Read a file; return its rows and refusals in order, each with its place."""
    lines, count = [], 0
    for source, row in open_file(path, max_line_bytes=1 << 16):
        assert source.file == path.as_posix()
        lines.append(source.line)
        count += 1
        assert count < 10_000
        if isinstance(row, Refusal):
            assert row.code in CODES and row.source == source and row.reason
            assert "\n" not in row.reason
        else:
            assert isinstance(row, dict)
    assert lines == sorted(lines)
    assert count > 0, "not even a refusal came"


@pytest.mark.parametrize(("kind", "pack"), FILES)
def test_readers_survive_damage(tmp_path: Path, kind: str, pack: str) -> None:
    content = ENCODE[kind](CHATS if kind in TABLES else ROWS)
    path = tmp_path / f"rows.{kind}{pack}"
    count = READS[kind] // (2 if pack else 1)
    for seed in range(count):
        chance = random.Random(f"{kind}{pack}{seed}")
        is_inside = bool(pack) and seed % 2 == 0
        damaged = PACK[pack](mutated(content, chance)) if is_inside else b""
        path.write_bytes(damaged or mutated(PACK[pack](content), chance))
        try:
            check_rows(path)
        except Exception as error:
            pytest.fail(f"seed {kind}{pack}{seed}: {error!r}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTokenizer:
    folder = save(tmp_path_factory.mktemp("words"), with_bos(word_level()))
    return PreferenceTokenizer.load(folder, TokenizationRules(max_length=16), CHATML)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_stores_account_for_damage(
    tmp_path: Path, tokenizer: PreferenceTokenizer, kind: str, pack: str
) -> None:
    content = ENCODE[kind](ROWS)
    path = tmp_path / f"rows.{kind}{pack}"
    for seed in range(BUILDS):
        chance = random.Random(f"build {kind}{pack}{seed}")
        path.write_bytes(PACK[pack](mutated(content, chance)))
        try:
            store, report = build_store([path], tokenizer, max_bad_fraction=1.0)
        except BadDataError as error:
            assert error.errors or "no row was kept" in error.summary, seed
            assert all(message.startswith(path.as_posix()) for message in error.errors), seed
            continue
        read, kept, refused, deduplicated = account(report)
        assert read == kept + refused + deduplicated, seed
        assert (len(store), report.refused_by_code.total()) == (kept, refused), seed


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Compare values, NaN equal to itself."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.dictionaries(st.text(), VALUES, max_size=5), min_size=1, max_size=4), st.booleans()
)
@example(rows=[{"data": [{"prompt": None}]}], is_escaped=False)
def test_any_json_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], is_escaped: bool
) -> None:
    folder = tmp_path_factory.mktemp("values")
    texts = [json.dumps(row, ensure_ascii=is_escaped) for row in rows]
    (folder / "rows.jsonl").write_bytes("\n".join(texts).encode())
    (folder / "rows.json").write_bytes(f"[{' , '.join(texts)}\n]".encode())
    for name in ("rows.jsonl", "rows.json"):
        read = [row for _, row in open_file(folder / name)]
        assert same(read, rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), VALUES, min_size=1, max_size=4), st.data())
def test_a_repeated_key_is_always_detected(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(row)))
    colon = data.draw(st.sampled_from([":", " : ", "\t:"]))
    inner = json.dumps(row)[:-1] + f", {json.dumps(key)}{colon}1}}"
    path = tmp_path_factory.mktemp("twice") / "rows.jsonl"
    for text in (inner, f'{{"a": {inner}}}', f'{{"a": ["\\":", [{inner}]]}}'):
        path.write_text(text)
        (refusal,) = (row for _, row in open_file(path))
        assert isinstance(refusal, Refusal)
        assert refusal.code == "E205"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=80), st.sampled_from(["rows", "rows.json", "rows.csv", "rows.arrows"]))
def test_any_bytes_are_rows_or_refusals(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    check_rows(path)
