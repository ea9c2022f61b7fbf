"""Regression cases: small inputs that once failed, now read correctly or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tokenizers_for_tests import byte_level, save
from trl_templates import template

from logratio.data import BadDataError, DataReport, PreferenceTokenizer, build_store
from logratio.data.formats import Decoder
from logratio.data.readers import open_inputs
from logratio.data.records import PreferenceRecord, Refusal
from logratio.forecast import count

Build = Callable[[str, str], tuple[Any, DataReport]]

FORMATS = {
    "chat24.jsonl": ("trl-chat", 24),
    "json_answers.csv": ("trl", 2),
    "json_string_columns.jsonl": ("trl-chat", 2),
    "no_think.jsonl": ("trl-chat", 1),
    "object_of_rows.json": ("trl", 1),
    "openai_tool_args_string.jsonl": ("openai", 1),
    "orca_rendered_input.jsonl": ("orca", 1),
    "pandas_repr.csv": ("trl-chat", 2),
    "roles_human_assistant.jsonl": ("trl-chat-implicit", 1),
    "think_in_content.jsonl": ("trl-chat", 1),
    "tools_two_schemas.jsonl": ("trl-chat", 2),
    "tools_two_schemas.parquet": ("trl-chat", 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bytes"), byte_level())


@pytest.fixture
def cases(shared: Path) -> Path:
    return shared / "cases"


@pytest.fixture
def build(cases: Path, folder: Path) -> Build:
    """Read a case with one of TRL's templates."""

    def build(name: str, of: str) -> tuple[Any, DataReport]:
        tokenizer = PreferenceTokenizer.load(folder, chat_template=template(of).source)
        return build_store(cases / name, tokenizer)

    return build


def records(path: Path) -> list[PreferenceRecord]:
    decoder = Decoder()
    found: list[PreferenceRecord] = []
    for opened in open_inputs(path):
        for source, row in opened:
            assert not isinstance(row, Refusal), row
            found += decoder.decode(row, source).records
    return found


def test_every_case_has_a_reading(cases: Path) -> None:
    assert {path.name for path in cases.iterdir()} - {"numbers.md"} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_reads_it(cases: Path, run: Run, name: str) -> None:
    code, out, err = run("data", "inspect", cases / name)
    known, rows = FORMATS[name]
    assert (code, err) == (0, "")
    assert f"  format     {known}\n" in out and f" {count(rows, 'row')} inspected" in out
    assert f"reads {rows} of {count(rows, 'row')}" in out
    assert ("[W522]" in out) == (name in ("json_string_columns.jsonl", "pandas_repr.csv"))


def test_chats_in_strings_are_those_that_they_spell(cases: Path) -> None:
    for name in ("json_string_columns.jsonl", "pandas_repr.csv"):
        first = records(cases / name)[0]
        assert first.prompt == ({"role": "user", "content": "hi 0"},)
    (one, other) = records(cases / "json_answers.csv")
    assert one.completions[0].answer == '{"intent": "greeting"}'
    assert other.completions[0].answer == "[2, 3, 5]"


def test_roles_in_other_words(cases: Path) -> None:
    (record,) = records(cases / "roles_human_assistant.jsonl")
    assert record.prompt == ({"role": "user", "content": "hi"},)


def test_rendered_text_is_not_rendered_again(
    cases: Path, build: Build, folder: Path, run: Run
) -> None:
    with pytest.raises(BadDataError, match=r"orca_rendered_input.jsonl:1 \[E405\]"):
        build("orca_rendered_input.jsonl", "llama3")


def test_reasoning_that_a_template_removes_is_named(build: Build) -> None:
    store, report = build("think_in_content.jsonl", "deepseek_r1_distill")
    assert (len(store), *map(report.warnings_by_code.get, ("W512", "W513"))) == (1, 1, 1)
    store, report = build("think_in_content.jsonl", "qwen3")
    assert len(store) == 1 and "W513" not in report.warnings_by_code


def test_calls_reach_the_template_as_objects(build: Build) -> None:
    for name in ("openai_tool_args_string.jsonl", "tools_two_schemas.jsonl"):
        store, report = build(name, "qwen3")
        assert len(store) == report.read == FORMATS[name][1]
    with pytest.raises(BadDataError, match="R311"):
        build("openai_tool_args_string.jsonl", "gemma")


def test_a_table_gives_the_ids_of_the_lines_it_was_made_of(build: Build) -> None:
    digests = {
        build(f"tools_two_schemas.{kind}", "qwen3")[0].digest for kind in ("jsonl", "parquet")
    }
    assert len(digests) == 1
