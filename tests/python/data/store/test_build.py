"""Build stores from files: what is written, what is refused, and that no row is lost."""

import gzip
import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, byte_level, save, with_bos, word_level

from logratio._rust import ROLES, Store
from logratio.data import (
    BadDataError,
    DataReport,
    FormatSettings,
    PreferenceTokenizer,
    TokenizationRules,
    build_store,
)
from logratio.data.feed import micro_batches
from logratio.data.records import CODES, stops
from logratio.data.store import ingest
from logratio.setting_names import with_fields

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("words"), with_bos(word_level()))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(folder, TokenizationRules(max_length=16), CHATML)


@pytest.fixture(params=["plain", "gz"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Write rows (or raw lines) to a file, plain or compressed."""

    def write(rows: Sequence[Row | bytes], name: str = "data.jsonl") -> Path:
        content = lines(rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if request.param == "gz" else content)
        return path

    return write


def lines(rows: Sequence[Row | bytes]) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def pair(number: int) -> Row:
    """Return one of many different valid rows."""
    return {"prompt": "the cat sat", "chosen": " good" * (number + 1), "rejected": " bad"}


def turns(*contents: str) -> list[Row]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


LONG = " the cat sat on the mat and the dog ran to the house and you?"
FAULTS: dict[str, tuple[bytes | Row, str]] = {
    "malformed": (b'{"prompt" 1}', "E101"),
    "not UTF-8": (b'{"prompt": "\xff"}', "E103"),
    "lone surrogate": (rb'{"prompt": "\udead"}', "E104"),
    "missing key": ({"prompt": "p", "chosen": "a"}, "E201"),
    "null": (pair(0) | {"chosen": None}, "E202"),
    "wrong type": (pair(0) | {"chosen": 4}, "E203"),
    "key twice": (b'{"prompt": "p", "prompt": "q"}', "E205"),
    "unknown shape": ({"question": "q"}, "E206"),
    "two EOS": (pair(0) | {"chosen": " good </s> </s>"}, "E402"),
    "roles": ({"prompt": turns("u", "a"), "chosen": turns("u"), "rejected": turns("u")}, "E403"),
    "empty chosen": (pair(0) | {"chosen": ""}, "R301"),
    "identical": (pair(0) | {"chosen": " bad"}, "R302"),
    "identical once cut": (pair(0) | {"chosen": LONG + " yes", "rejected": LONG + " no"}, "R303"),
    "long prompt": (pair(0) | {"prompt": LONG + LONG}, "R304"),
    "no room": (
        {
            "chosen": f"\n\nHuman: why\n\nAssistant:{LONG}\n\nHuman: it\n\nAssistant: a",
            "rejected": "\n\nHuman: why\n\nAssistant: a",
        },
        "R306",
    ),
}


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_counted_and_named_at_every_position(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, fault: str, place: int
) -> None:
    row, code = FAULTS[fault]
    rows: list[Row | bytes] = [pair(0), pair(1)]
    rows.insert(place - 1, row)
    path = write(rows)
    if stops(code):
        with pytest.raises(BadDataError) as caught:
            build_store([path], tokenizer)
        (error,) = caught.value.errors
        assert error.startswith(f"{path.as_posix()}:{place}")
        assert f" [{code}] " in error
        assert with_fields(error) in str(caught.value)
    log = path.with_name("refused.jsonl")
    store, report = build_store([path], tokenizer, max_bad_fraction=0.4, refused=log)
    assert (len(store), report.read, report.kept, report.refused) == (2, 3, 2, 1)
    assert report.refused_by_code == Counter({code: 1})
    (refused,) = map(json.loads, log.read_text().splitlines())
    assert (refused["file"], refused["line"], refused["code"]) == (path.as_posix(), place, code)
    assert f"[{code}] 1 × {CODES[code]}" in report.to_text()
    assert f"{path.as_posix()}:{place}" in report.to_text()
    assert store.sources()[1].tolist() == [line for line in (1, 2, 3) if line != place]


def test_faults_of_whole_files_stop_at_any_bad_fraction(
    tmp_path: Path, tokenizer: PreferenceTokenizer
) -> None:
    sound = tmp_path / "sound.jsonl"
    sound.write_bytes(lines([pair(0)]))
    damaged = bytearray(gzip.compress(lines([pair(0), pair(1)])))
    damaged[-6] ^= 1
    for content, code in ((b"", "E106"), (b"[{}}]", "E109"), (bytes(damaged), "E108")):
        path = tmp_path / "broken.jsonl"
        path.write_bytes(content)
        with pytest.raises(BadDataError, match=code):
            build_store([sound, path], tokenizer, max_bad_fraction=0.99)


def test_truncated_file_stops_with_its_code(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(lines([pair(0), pair(1)])[:-20])
    with pytest.raises(BadDataError, match=r"cut\.jsonl:2:\d+ \[E102\] the file ends inside"):
        build_store([path], tokenizer)


def test_messages_without_a_template_stop_before_tokenizing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = PreferenceTokenizer.load(folder)
    monkeypatch.setattr(tokenizer, "encode_records", lambda records: pytest.fail("tokenized"))
    chat = {"prompt": turns("u"), "chosen": turns("u", "a")[1:], "rejected": turns("u", "b")[1:]}
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines([chat, pair(0)]))
    with pytest.raises(BadDataError, match=r"chat\.jsonl:1 \[E401\].*chat_template\.jinja"):
        build_store([path], tokenizer, max_bad_fraction=0.9)


def test_twenty_errors_are_collected_and_known_formats_are_named_once(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer
) -> None:
    path = write([pair(0), *[{"question": i} for i in range(500)]])
    with pytest.raises(BadDataError) as caught:
        build_store([path], tokenizer)
    assert len(caught.value.errors) == 20
    assert [f"{path.as_posix()}:{i + 2} [E206]" in e for i, e in enumerate(caught.value.errors)]
    assert str(caught.value).count("known formats") == 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.errors, str(again)) == (caught.value.errors, str(caught.value))


def test_allowed_share_of_broken_rows(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer
) -> None:
    path = write([*map(pair, range(8)), b"broken", b"broken"])
    _, report = build_store([path], tokenizer, max_bad_fraction=0.2)
    assert (report.kept, report.broken) == (8, 2)
    with pytest.raises(BadDataError, match="2 of the 10 rows"):
        build_store([path], tokenizer, max_bad_fraction=0.19)


def test_nothing_is_tokenized_once_the_run_is_lost(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def encode_records(records: Sequence[object]) -> list[object]:
        batches.append(len(records))
        return []

    monkeypatch.setattr(tokenizer, "encode_records", encode_records)
    with pytest.raises(BadDataError, match="1 of the 6 rows"):
        build_store([write([b"broken", *map(pair, range(5))])], tokenizer)
    assert not any(batches)


def test_a_failed_build_leaves_no_file(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, tmp_path: Path
) -> None:
    path = write([pair(0), b"broken"])
    try:
        build_store([path], tokenizer, tmp_path / "out.store")
    except BadDataError:
        pass
    else:
        pytest.fail("built")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("output", ["store", "refused", "both"])
def test_no_output_is_written_over_data_or_another_output(
    tmp_path: Path, tokenizer: PreferenceTokenizer, output: str
) -> None:
    data, other = tmp_path / "data.jsonl", tmp_path / "other"
    data.write_bytes(lines([pair(1)]))
    path, refused = {"store": (data, None), "refused": (None, data), "both": (other, other)}[output]
    with pytest.raises(OSError, match=r"Is data to read|Cannot hold both"):
        build_store([data], tokenizer, path, refused=refused)
    assert data.read_bytes() == lines([pair(1)])
    assert not other.exists()


def test_nothing_kept_is_an_error_with_reasons(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer
) -> None:
    path = write([pair(0) | {"chosen": ""}])
    with pytest.raises(BadDataError, match=r"no row was kept(.|\n)*\[R301\] 1 ×"):
        build_store([path], tokenizer)


def test_missing_file_is_found_before_anything_is_read(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        build_store([write([b"broken"]), tmp_path / "absent.jsonl"], tokenizer)


# What is kept


def test_store_equals_the_tokenizers_output(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, tmp_path: Path
) -> None:
    texts, chat = pair(0), {"prompt": turns("how"), "chosen": turns("", "a")[1:]}
    chat["rejected"] = turns("", "because.")[1:]
    files = [write([texts], "a.jsonl"), write([chat], "b.jsonl")]
    path = tmp_path / "out.store"
    _, report = build_store(files, tokenizer, path)
    store = Store.open(path)
    store.verify()
    prompt, completions, masks, roles = store.group(0)
    assert prompt.tolist() == tokenizer.encode_prompt("the cat sat")
    assert [ids.tolist() for ids in completions] == [
        tokenizer.encode_completion("the cat sat", text) for text in (" good", " bad")
    ]
    assert all(mask.all() for mask in masks)
    assert [ROLES[role] for role in roles] == ["chosen", "rejected"]
    prompt, completions, _, _ = store.group(1)
    assert prompt.tolist() == tokenizer.encode_prompt(turns("how"))
    assert completions[1].tolist() == tokenizer.encode_completion(turns("how"), "because.")
    assert store.sources()[0].tolist() == [0, 1]
    metadata = json.loads(store.metadata)
    assert metadata["files"] == [file.as_posix() for file in files]
    assert TokenizationRules.from_dict(metadata["rules"]) == tokenizer.rules
    assert metadata["tokenizer"] == tokenizer.digest
    assert metadata["report"] == json.loads(json.dumps(report.to_dict()))
    assert store.tokens == report.prompt_tokens + report.completion_tokens


def test_history_that_differs_is_stored_uncounted(write: Callable[..., Path], folder: Path) -> None:
    row = {
        "chosen": "\n\nHuman: what\n\nAssistant: a\n\nHuman: why?\n\nAssistant: because.",
        "rejected": "\n\nHuman: what\n\nAssistant: thing.",
    }
    rules = TokenizationRules(append_eos=False)
    store, _ = build_store([write([row])], PreferenceTokenizer.load(folder, rules))
    _, completions, masks, _ = store.group(0)
    assert [len(ids) for ids in completions] == [5, 1]  # a, Human:, why?, Assistant:, because.
    assert [mask.tolist() for mask in masks] == [[0, 0, 0, 0, 1], [1]]


def test_demonstrations(write: Callable[..., Path], tokenizer: PreferenceTokenizer) -> None:
    rows = [
        pair(0),
        pair(1) | {"rejected": ""},
        {"prompt": "the dog", "completion": " ran"},
        {"messages": turns("how", "a", "why?", "because.")},
    ]
    store, report = build_store(
        [write(rows)], tokenizer, formats=FormatSettings(demonstrations=True)
    )
    assert report.kept == len(store) == store.completions == 4
    assert {ROLES[role] for role in store.roles()} == {"demonstration"}
    assert report.warnings_by_code == Counter(W518=report.text_rows)
    assert (report.text_rows, report.chat_rows) == (3, 1)
    assert store.counted_lengths()[3] < store.completion_lengths()[3]
    assert sum(report.formats.values()) == 4
    with pytest.raises(BadDataError, match="E206"):
        build_store([write(rows)], tokenizer)


def test_rows_on_one_line_are_separate_rows(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    path = tmp_path / "array.json"
    path.write_text(json.dumps([pair(0), pair(1), pair(1), pair(2), pair(0)]))
    store, report = build_store([path], tokenizer)
    assert len(store) == report.kept == 3
    assert report.deduplicated == 2


def test_duplicates_are_kept_once_and_name_the_first(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [pair(0), pair(1), pair(0) | {"id": 7}, pair(0)]
    files = [write(rows, "a.jsonl"), write([pair(1)], "b.jsonl")]
    for batch in (1, 2, 100):
        monkeypatch.setattr(ingest, "BATCH_ROWS", batch)
        store, report = build_store(files, tokenizer)
        assert (len(store), report.read, report.deduplicated) == (2, 5, 3)
        first, second = (file.as_posix() for file in files)
        assert report.places["duplicate"] == [
            f"{first}:3 repeats {first}:1",
            f"{first}:4 repeats {first}:1",
            f"{second}:1 repeats {first}:2",
        ]
        assert "3 duplicates" in report.to_text()


def test_pairs_that_contradict_each_other_are_kept_and_named(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer
) -> None:
    swapped = {"prompt": "the cat sat", "chosen": " bad", "rejected": " good"}
    path = write([pair(0), swapped])
    store, report = build_store([path], tokenizer)
    assert (len(store), report.warnings_by_code["W507"]) == (2, 1)
    name = path.as_posix()
    assert report.places["W507"] == [f"{name}:2 against {name}:1"]


def test_warnings_blanks_formats_and_extra_keys_are_counted(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer
) -> None:
    rows = [
        pair(0) | {"prompt": "", "id": 1},
        b"",
        pair(1) | {"chosen": LONG, "id": 2, "score": 0.5},
        pair(2) | {"chosen": " </s> good\0"},
        b"  ",
    ]
    _, report = build_store([write(rows)], tokenizer)
    assert (report.read, report.kept, report.blank_lines) == (3, 3, 2)
    assert report.warnings_by_code == Counter(W501=1, W503=1, W504=1, W505=1, W518=3)
    assert report.extra_keys == Counter(id=2, score=1)
    assert report.formats == Counter({"trl": 3})
    shown = report.to_text()
    assert shown.startswith("3 rows read: 3 kept, 0 refused, 0 duplicates left out")
    for words in ("2 blank lines", "keys that were not read: id, score", "[W503] 1 ×"):
        assert words in shown


def test_the_repr_of_a_report_is_one_line() -> None:
    report = DataReport(read=2001, kept=1998, deduplicated=1, refused_by_code=Counter(R301=2))
    assert repr(report) == "DataReport(2,001 rows read: 1,998 kept, 2 refused, 1 duplicate)"


def test_report_that_does_not_add_up_is_a_fault() -> None:
    report = DataReport(read=2, kept=1)
    with pytest.raises(RuntimeError, match="rows were lost"):
        report.check()


def test_progress_ends_at_the_end(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "BATCH_ROWS", 10)
    files = [write([*map(pair, range(35))], "a.jsonl"), write([pair(40)], "b.jsonl")]
    calls: list[tuple[int, int, int]] = []
    build_store(files, tokenizer, progress=lambda *call: calls.append(call))
    size = sum(file.stat().st_size for file in files)
    assert [rows for rows, _, _ in calls] == [10, 20, 30, 36]
    assert calls[-1] == (36, size, size)
    assert all(total == size for _, _, total in calls)
    done = [done for _, done, _ in calls]
    assert done == sorted(done)


def test_batches_do_not_change_the_store(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write([pair(i % 40) for i in range(60)])
    stores = []
    for rows, characters in ((1, 10**9), (7, 10**9), (1000, 100), (1000, 10**9)):
        monkeypatch.setattr(ingest, "BATCH_ROWS", rows)
        monkeypatch.setattr(ingest, "BATCH_CHARACTERS", characters)
        stores.append(build_store([path], tokenizer)[0])
    assert len({store.digest for store in stores}) == 1


def test_micro_batches_cover_a_plan(
    write: Callable[..., Path], tokenizer: PreferenceTokenizer
) -> None:
    store, _ = build_store([write([*map(pair, range(9))])], tokenizer)
    plan = store.plan(order="shuffled", groups_per_update=4, token_budget=40)
    whole = micro_batches(plan)
    updates = len(plan.update_offsets) - 1
    by_update = [batch for update in range(updates) for batch in micro_batches(plan, update)]
    assert updates == 3
    assert len(whole) > updates
    assert sorted(np.concatenate(whole).tolist()) == list(range(9))
    assert [groups.tolist() for groups in whole] == [groups.tolist() for groups in by_update]


# Anything can happen to a file

SOUND = lines(
    [
        pair(0),
        {"prompt": turns("how"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]},
        {
            "chosen": "\n\nHuman: why\n\nAssistant: good",
            "rejected": "\n\nHuman: why\n\nAssistant: bad",
        },
        {"chosen": turns("u", "a"), "rejected": turns("u", "é漢")},
        pair(3),
    ]
)
DRIFTWOOD = [b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"null", b"\\ud800", b"\xff", b"\0", b'"":""']


def test_files_are_valid_before_mutation(tokenizer: PreferenceTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "sound.jsonl"
    path.write_bytes(SOUND)
    assert build_store([path], tokenizer)[1].kept == SOUND.count(b"\n") == 5


def mutate(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for position, length, driftwood in changes:
        at = position % (len(content) + 1)
        content = content[:at] + driftwood + content[at + length :]
    return content


changes = st.lists(
    st.tuples(
        st.integers(0, 2000),
        st.sampled_from([0, 0, 1, 2, 9, 80]),
        st.sampled_from([*DRIFTWOOD, b""]) | st.binary(max_size=2),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes, st.booleans(), st.booleans())
@example([(0, 0, b"\xfe\xff")], False, False)
def test_mutated_files_are_accounted_for_or_bad_data(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreferenceTokenizer,
    changes: list[tuple[int, int, bytes]],
    compressed: bool,
    tolerant: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    content = mutate(SOUND, changes)
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    try:
        store, report = build_store([path], tokenizer, max_bad_fraction=1.0 if tolerant else 0.0)
    except BadDataError as error:
        for line in error.errors:
            place, code = line.split(" [")[0], line.split(" [")[1][:4]
            of_the_file = code in {"E106", "E112"}  # empty, or of an unsupported type
            assert place == path.as_posix() if of_the_file else place.startswith(f"{path}:")
        assert error.errors or "no row was kept" in str(error)
        return
    assert report.read == report.kept + report.refused + report.deduplicated
    assert len(store) == report.kept
    assert tolerant or not report.broken


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes)
def test_mutated_gzip_files_are_accounted_for_or_bad_data(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreferenceTokenizer,
    changes: list[tuple[int, int, bytes]],
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl.gz"
    path.write_bytes(mutate(gzip.compress(SOUND, 1), changes))
    try:
        store, report = build_store([path], tokenizer, max_bad_fraction=1.0)
    except BadDataError as error:
        assert path.as_posix() in str(error)
        return
    assert len(store) == report.kept


def test_importing_data_loads_no_framework() -> None:
    code = "import sys, logratio.data; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "tokenizers" in loaded
    assert not loaded & {"torch", "transformers", "onnxruntime", "datasets"}


# Real data


@pytest.mark.shared
def test_all_of_harmless_base(shared: Path) -> None:
    """2,312 real pairs: 4 empty answers, 5 histories that differ."""
    tokenizer = PreferenceTokenizer.load(shared / "models/gpt2-tokenizer")
    path = shared / "data/hh/harmless-base.test.jsonl.gz"
    store, report = build_store([path], tokenizer)
    assert (report.read, report.kept, report.refused, report.deduplicated) == (2312, 2308, 4, 0)
    assert report.refused_by_code == Counter(R301=4)
    empty = [int(place.split(":")[-1].split()[0]) for place in report.places["R301"]]
    assert empty == [87, 517, 926, 1104]
    assert not report.warnings_by_code
    lengths, counted = store.completion_lengths(), store.counted_lengths()
    groups = np.unique(np.nonzero(lengths != counted)[0] // 2)
    assert store.sources()[1][groups].tolist() == [1255, 1689, 1951, 1953, 2037]
    prompts = np.repeat(store.prompt_lengths(), 2)
    assert (prompts + lengths).max() == 1020 + 1  # the longest text, and its EOS


@pytest.mark.shared
def test_story_preferences(shared: Path) -> None:
    rules = TokenizationRules(max_length=512, append_eos=False)
    tokenizer = PreferenceTokenizer.load(shared / "models/stories3M", rules)
    store, report = build_store([shared / "data/story_prefs.jsonl"], tokenizer)
    assert (report.read, report.kept) == (863, 863)
    assert not report.warnings_by_code
    assert not report.extra_keys
    assert (report.values["score"].count, report.values["margin"].count) == (2 * 863, 863)
    scores, margins = store.values()[:, 0].reshape(-1, 2), store.values()[::2, 2]
    np.testing.assert_array_equal(scores[:, 0] - scores[:, 1], margins)
    prompt, completions, _, _ = store.group(0)
    assert (prompt[0], tokenizer.decode(prompt.tolist(), skip_special_tokens=True)[:16]) == (
        1,
        "Once upon a time",
    )
    assert all(tokenizer.eos_id not in ids for ids in completions)
    assert store.completion_lengths().max() <= 60


@pytest.mark.shared
def test_four_layouts_of_the_same_pairs(shared: Path) -> None:
    tokenizer = PreferenceTokenizer.load(shared / "models/gpt2-tokenizer", chat_template=CHATML)
    names = ("trl_standard", "trl_conversational", "trl_conversational_implicit", "anthropic_hh")
    stores = {}
    for name in names:
        stores[name], report = build_store([shared / f"data/formats/{name}.jsonl"], tokenizer)
        assert (report.read, report.kept) == (48, 48)
    assert stores["trl_conversational"].digest == stores["trl_conversational_implicit"].digest
    standard, transcripts = stores["trl_standard"], stores["anthropic_hh"]
    for index in range(48):
        for ours, theirs in zip(standard.group(index)[1], transcripts.group(index)[1], strict=True):
            assert tokenizer.decode(ours.tolist()) == tokenizer.decode(theirs.tolist())


OTHERS = {
    **dict.fromkeys(("llamafactory_alpaca", "llamafactory_sharegpt", "ms_swift_messages"), 48),
    **dict.fromkeys(("nemo_aligner", "nemo_rl_ranked", "openai_dpo", "shp", "step_dpo"), 48),
    **dict.fromkeys(("stack_exchange_paired", "text_score", "ultrafeedback_binarized"), 48),
    "orca_pairs": 12,
}


@pytest.mark.shared
@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_of_pairs(shared: Path, name: str) -> None:
    tokenizer = PreferenceTokenizer.load(shared / "models/gpt2-tokenizer", chat_template=CHATML)
    store, report = build_store([shared / f"data/formats/{name}.jsonl"], tokenizer)
    assert (report.read, report.kept, len(store)) == (OTHERS[name],) * 3


@pytest.mark.shared
@pytest.mark.parametrize("name", ["kto_unpaired", "llamafactory_kto", "ranked_ab"])
def test_layouts_that_hold_no_pairs_are_refused_whole(shared: Path, name: str) -> None:
    tokenizer = PreferenceTokenizer.load(shared / "models/gpt2-tokenizer", chat_template=CHATML)
    pairs_only = FormatSettings(kinds=("pair",))
    with pytest.raises(BadDataError, match=r"of the 20 rows read(.|\n)*E20[69]"):
        build_store([shared / f"data/formats/{name}.jsonl"], tokenizer, formats=pairs_only)


@pytest.mark.shared
def test_byte_level_fixture_is_like_the_real_one(shared: Path, tmp_path: Path) -> None:
    """The small tokenizer behaves like GPT-2's: the boundary moves in both."""
    row = {"prompt": "how are ", "chosen": "you", "rejected": "\nno"}
    path = tmp_path / "row.jsonl"
    path.write_bytes(lines([row]))
    for folder in (shared / "models/gpt2-tokenizer", save(tmp_path / "small", byte_level())):
        _, report = build_store([path], PreferenceTokenizer.load(folder))
        assert report.warnings_by_code == Counter(W502=1)
