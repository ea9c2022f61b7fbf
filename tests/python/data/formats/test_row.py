"""Strings in a row: text, or a list or chat that was written as text."""

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers_for_tests import byte_level, save

from logratio.data import BadDataError, PreferenceTokenizer, build_store
from logratio.data.formats import Decoder, FormatSettings
from logratio.data.formats.row import MAX_REPR, opens, parsed
from logratio.data.records import InvalidRecordError, Source
from logratio.data.store.ingest import opens_brackets

HERE = Source("rows", 1)
ASK = [{"role": "user", "content": 'it\'s "1"\n[2]'}]
GOOD = [{"role": "assistant", "content": "Hello, {you}!"}]
BAD = [{"role": "assistant", "content": "No."}]
NATIVE = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}

SPELL: dict[str, Callable[[Any], str]] = {
    "json": json.dumps,
    "repr": repr,
    "numpy": lambda value: str(np.array(value, dtype=object)),
    "indented": lambda value: "\n " + json.dumps(value, indent=1),
}


def decode(row: dict[str, Any], **settings: Any) -> Any:
    return Decoder(FormatSettings(**settings)).decode(row, HERE)


def refused(row: dict[str, Any], **settings: Any) -> InvalidRecordError:
    with pytest.raises(InvalidRecordError) as error:
        decode(row, **settings)
    return error.value


@pytest.mark.parametrize("spell", SPELL)
def test_chats_that_are_written_as_text_are_chats(spell: str) -> None:
    row = {name: SPELL[spell](value) for name, value in NATIVE.items()}
    read = decode(row)
    assert read.records == decode(NATIVE).records
    assert read.warnings == ("W522",)
    assert decode(row, strings="messages").records == read.records
    text = decode(row, strings="text")
    assert text.records[0].prompt == row["prompt"]
    assert text.warnings == ()


def test_several_turns_in_numpys_spelling() -> None:
    chat = [*ASK, {"role": "assistant", "content": "a}\n {b"}, {"role": "user", "content": "c"}]
    text = str(np.array(chat, dtype=object))
    assert "\n" in text
    assert parsed(text) == chat


def test_native_and_spelled_messages_are_one_chat() -> None:
    row = NATIVE | {"chosen": json.dumps(GOOD), "rejected": repr(BAD)}
    assert decode(row).records == decode(NATIVE).records
    row = NATIVE | {"prompt": repr(ASK)}
    assert decode(row).records == decode(NATIVE).records


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "List a chat", "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        {"prompt": "List a chat", "chosen": json.dumps(GOOD), "rejected": "[]["},
        {"prompt": json.dumps(ASK), "chosen": "Hello", "rejected": "No"},
        {"prompt": ASK, "chosen": json.dumps(GOOD), "rejected": "No"},
        {"question": "q", "chosen": json.dumps(GOOD), "rejected": repr(BAD)},
        {"prompt": "q", "completion": json.dumps(GOOD), "label": True},
        {"context": ASK, "completions": ["a", json.dumps(GOOD)], "scores": [1, 2]},
    ],
)
def test_ambiguous_strings_name_the_flag(row: dict[str, Any]) -> None:
    error = refused(row)
    assert error.code == "E215"
    assert "--strings messages" in error.reason
    assert "--strings text" in error.reason
    assert decode(row, strings="text").records


def test_the_flag_settles_it() -> None:
    row = {"prompt": "List a chat", "chosen": json.dumps(GOOD), "rejected": repr(BAD)}
    text = decode(row, strings="text").records[0]
    assert (text.prompt, text.completions[0].answer) == ("List a chat", row["chosen"])
    chat = decode(row, strings="messages").records[0]
    assert chat.prompt == ({"role": "user", "content": "List a chat"},)
    assert chat.completions[0].answer == tuple(GOOD)


@pytest.mark.parametrize(
    "answer",
    [
        '{"intent": "greeting"}',
        "[2, 3, 5]",
        '["a", "b"]',
        "[]",
        "[INST] hi [/INST]",
        "{'a': 1}",
        '[{"city": "Oslo"}]',
        '{"role": "admin"}',
        '{"messages": "none"}',
        "[" * 100_000,
        '[{"role": 1',
        '{"k": 1, "k": 2}',
    ],
)
def test_json_that_is_not_a_chat_is_text(answer: str) -> None:
    if answer.startswith('[{"role"'):
        assert refused({"prompt": "q", "chosen": answer, "rejected": "b"}).code == "E215"
        return
    read = decode({"prompt": "q", "chosen": answer, "rejected": "b"})
    assert read.records[0].completions[0].answer == answer
    assert read.warnings == ()


def test_a_repr_that_was_cut_or_is_too_long_is_never_text_in_silence() -> None:
    cut = repr(GOOD)[:-3] + "..."
    error = refused({"prompt": repr(ASK), "chosen": cut, "rejected": repr(BAD)})
    assert error.code == "E215"
    assert "cannot be parsed" in error.reason
    long = repr([{"role": "assistant", "content": "é" * MAX_REPR}])
    start = time.perf_counter()
    assert refused({"prompt": repr(ASK), "chosen": long, "rejected": repr(BAD)}).code == "E215"
    assert time.perf_counter() - start < 1


def test_a_whole_chat_that_holds_the_question_is_not_ambiguous() -> None:
    row = {"prompt": ASK[0]["content"], "chosen": ASK + GOOD, "rejected": ASK + BAD}
    spelled = row | {"chosen": repr(row["chosen"]), "rejected": json.dumps(row["rejected"])}
    assert decode(spelled).records == decode(row).records
    assert decode(spelled).format == "ultrafeedback"


def test_rows_of_a_file_are_of_one_kind() -> None:
    decoder = Decoder()
    decoder.decode({"prompt": "p", "chosen": "a", "rejected": "b"}, HERE)
    row = {name: repr(value) for name, value in NATIVE.items()}
    with pytest.raises(InvalidRecordError, match=r"rows:1 are text: add --strings") as error:
        decoder.decode(row, Source("rows", 2))
    assert error.value.code == "E215"
    again = Decoder()
    again.restore(json.loads(json.dumps(decoder.state())))
    with pytest.raises(InvalidRecordError):
        again.decode(row, Source("rows", 2))
    assert decoder.decode(row, Source("other", 2)).warnings == ("W522",)


@pytest.mark.parametrize("spell", ["json", "repr"])
def test_every_real_format_reads_the_same_out_of_strings(shared: Path, spell: str) -> None:
    for path in sorted((shared / "data/formats").iterdir()):
        rows = [json.loads(line) for line in path.read_text().splitlines()[:4]]
        settings = FormatSettings(label=LABELS.get(path.stem))
        for number, row in enumerate(rows, 1):
            native = Decoder(settings).decode(row, Source(path.name, number))
            spelled = {
                key: SPELL[spell](value) if isinstance(value, list | dict) else value
                for key, value in row.items()
            }
            read = Decoder(settings).decode(spelled, Source(path.name, number))
            assert read.records == native.records, path.name
            assert read.format == native.format


LABELS = {"ranked_ab": "preference: 1=output_1 2=output_2"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(save(tmp_path_factory.mktemp("tokenizer"), byte_level()))


def test_lists_and_tools_in_csv(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["prompt", "completions", "scores"])
    writer.writerow(["q", json.dumps(["a", "b"]), "[1, 2]"])
    writer.writerow(["r", repr(["it's", 'a "b"']), "[2.5, 2]"])
    (tmp_path / "lists.csv").write_text(text.getvalue())
    store, report = build_store([tmp_path / "lists.csv"], tokenizer)
    assert (len(store), report.kept) == (2, 2)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for spelled in (json.dumps(tools), repr(tools)):
        assert decode(NATIVE | {"tools": spelled}).records[0].tools == tuple(tools)


PLAIN = [{"prompt": f"p{i}", "chosen": f" a{i}", "rejected": f"b{i}"} for i in range(50)]
ODD = {"prompt": repr(ASK), "chosen": repr(GOOD), "rejected": repr(BAD)}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("place", [0, 1, 30, 49])
def test_the_bulk_path_does_not_pass_a_chat_by(
    tmp_path: Path, tokenizer: PreferenceTokenizer, kind: str, place: int
) -> None:
    rows = [*PLAIN[:place], ODD, *PLAIN[place:]]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(BadDataError, match="E215" if place else "E401"):  # no template
        build_store([path], tokenizer)
    store, report = build_store([path], tokenizer, formats=FormatSettings(strings="text"))
    assert (len(store), report.kept) == (51, 51)


def test_text_in_brackets_keeps_its_ids_and_order_in_bulk(
    tmp_path: Path, tokenizer: PreferenceTokenizer
) -> None:
    rows = [row | {"chosen": f"[{i}]"} if i % 7 == 3 else row for i, row in enumerate(PLAIN)]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stores = [
        build_store([given], tokenizer, formats=FormatSettings(strings=strings))[0]
        for given in (table, tmp_path / "rows.jsonl")
        for strings in (None, "text")
    ]
    assert len({store.digest for store in stores}) <= 2  # other files are independent
    for store in stores:
        assert store.sources()[1].tolist() == list(range(1, 51))


def test_brackets_are_found_after_white_space() -> None:
    texts = ["", " ", "\n[", "[", " {", "a[", "  ", "é[", "\t\r\n {x"]
    expected = [opens(text) for text in texts]
    assert expected == [False, False, True, True, True, False, False, False, True]
    ends = np.cumsum([0, *(len(text.encode()) for text in texts)])
    column = np.frombuffer("".join(texts).encode(), np.uint8), ends.astype(np.int64)
    assert opens_brackets(column).tolist() == expected
    assert opens_brackets(texts).tolist() == expected
