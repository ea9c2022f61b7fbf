"""Plain text with a chat template: wrapped as turns of a chat, or unchanged."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import copy_bundle, with_template
from tokenizers_for_tests import CHATML, byte_level, save

from logratio._rust import Store
from logratio.data import (
    DataReport,
    PreferenceTokenizer,
    StoreMismatchError,
    TokenizationRules,
    build_store,
    load_store,
)
from logratio.data.analysis import analyse
from logratio.data.inspection import inspect
from logratio.export import ExportConfig
from logratio.export.plan import make_plan
from logratio.serving import Reranker
from logratio.serving.candidates import CandidateEncoder

ASK, GOOD, BAD = "how are you?", "I am fine.", "bad"
TEXT = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = {
    "prompt": [turn("user", ASK)],
    "chosen": [turn("assistant", GOOD)],
    "rejected": [turn("assistant", BAD)],
}
HH = {
    side: f"\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: {ASK}\n\nAssistant: {words}"
    for side, words in (("chosen", GOOD), ("rejected", BAD))
}
TURNS = {**CHAT, "prompt": [turn("user", "hi"), turn("assistant", "Hello."), turn("user", ASK)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t") / "t", byte_level(), chat_template=CHATML)


def load(folder: Path, **rules: Any) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(folder, TokenizationRules(**rules))


def store_of(
    folder: Path, path: Path, rows: list[dict[str, Any]], **rules: Any
) -> tuple[Store, DataReport]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_store([path], load(folder, **rules), deduplicate=False)


def ids(store: Store, group: int) -> list[list[int]]:
    prompt, completions, *_ = store.group(group)
    return [prompt.tolist(), *(np.asarray(one).tolist() for one in completions)]


@pytest.mark.parametrize(("text", "chat"), [(TEXT, CHAT), (HH, TURNS)], ids=["text", "hh"])
def test_text_as_chat_equals_messages(
    text: dict[str, Any], chat: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    wrapped, report = store_of(folder, path, [text], text_as="chat")
    messages, _ = store_of(folder, path, [chat])
    assert ids(wrapped, 0) == ids(messages, 0)
    assert report.warnings_by_code == Counter()
    assert (report.text_rows, report.chat_rows) == (0, 1)
    plain, _ = store_of(folder, path, [text])
    assert ids(plain, 0) != ids(messages, 0)


def test_a_step_stays_text_after_the_turns(folder: Path, tmp_path: Path) -> None:
    row = {"prompt": ASK, "initial_reason_steps": "1. a\n", "chosen": "2. b", "rejected": "2. c"}
    wrapped, _ = store_of(folder, tmp_path / "a.jsonl", [row], text_as="chat")
    tokenizer = load(folder)
    prompt, chosen, _ = (tokenizer.decode(one) for one in ids(wrapped, 0))
    assert prompt == f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == "1. a\n2. b"


@pytest.mark.parametrize("rows", [3, 3000], ids=["few", "in bulk"])
def test_text_that_passes_by_the_template_is_counted(
    rows: int, folder: Path, tmp_path: Path
) -> None:
    texts = [{**TEXT, "prompt": f"{ASK} {number}"} for number in range(rows)]
    path = tmp_path / "rows.jsonl"
    plain, report = store_of(folder, path, texts)
    assert report.warnings_by_code == Counter(W518=rows)
    assert (report.text_rows, report.chat_rows) == (rows, 0)
    assert report.places["W518"][0].endswith("rows.jsonl:1")
    assert f"[W518] {rows:,} × plain text" in report.to_text()
    meant, report = store_of(folder, path, texts, text_as="text")
    assert report.warnings_by_code == Counter()
    assert ids(meant, rows - 1) == ids(plain, rows - 1)


def test_without_a_template_there_is_no_warning(tmp_path: Path) -> None:
    bare = save(tmp_path / "bare", byte_level())
    _, report = store_of(bare, tmp_path / "rows.jsonl", [TEXT])
    assert report.warnings_by_code == Counter()
    with pytest.raises(ValueError, match="E401"):
        store_of(bare, tmp_path / "rows.jsonl", [TEXT], text_as="chat")


def test_data_that_is_half_templated_is_warned_about(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{**CHAT}, {"question": ASK, "chosen": GOOD, "rejected": BAD}]
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps(TEXT) + "\n")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load(folder, text_as="text")
    store, report = build_store([path, text], tokenizer, deduplicate=False)
    assert (report.text_rows, report.chat_rows) == (1, 2)
    found, _ = analyse(store, report, tokenizer=tokenizer).findings  # and one on white space
    assert found.code == "W519"
    assert "1 row of plain text, unchanged, and 2 rows that the chat template" in found.text
    assert DataReport.from_dict(report.to_dict()).chat_rows == 2


def test_inspect_reports_it(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TEXT) + "\n")
    assert "[W518] 1 × plain text" in inspect([path], tokenizer=load(folder)).to_text()
    assert "W518" not in inspect([path]).to_text()
    assert "W518" not in inspect([path], tokenizer=load(folder, text_as="chat")).to_text()


def test_a_store_records_text_as(folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.store"
    path.write_text(json.dumps(TEXT) + "\n")
    build_store([path], load(folder), out)
    load_store(out, load(folder, text_as="text"))  # the same ids
    with pytest.raises(StoreMismatchError, match="text_as None, but now they are text_as chat"):
        load_store(out, load(folder, text_as="chat"))


@pytest.mark.parametrize("text_as", ["chat", "text", None])
def test_a_bundle_reads_strings_as_training_did(
    text_as: str | None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = copy_bundle(tmp_path_factory, tmp_path / "bundle")
    template = (
        "{% for m in messages %}{{ 'sings ' if m.role == 'user' else 'sits ' }}{{ m.content }}"
    )
    template += "{{ ' loud ' }}{% endfor %}{% if add_generation_prompt %}sits {% endif %}"
    reranker = Reranker.load(with_template(bundle, template, text_as=text_as))
    candidates = ["runs happy", "under a tree"]
    text = [score.reward for score in reranker.rank("the cat", candidates)]
    chat = [score.reward for score in reranker.rank([turn("user", "the cat")], candidates)]
    assert (text == chat) == (text_as == "chat")


SPACED = (f" {GOOD}\n", f"  {BAD}")
"""Answers with white space at both ends."""
SPACED_TEXT = {"prompt": ASK, "chosen": SPACED[0], "rejected": SPACED[1]}
SPACED_CHAT = {
    "prompt": [turn("user", ASK)],
    "chosen": [turn("assistant", SPACED[0])],
    "rejected": [turn("assistant", SPACED[1])],
}


@pytest.mark.parametrize(
    ("row", "text_as"),
    [(SPACED_TEXT, "chat"), (SPACED_TEXT, "text"), (SPACED_CHAT, "chat"), (SPACED_CHAT, "text")],
    ids=["text as chat", "text", "messages, strings as chat", "messages"],
)
def test_white_space_around_an_answer_is_served_as_it_was_trained(
    row: dict[str, Any], text_as: Any, folder: Path, tmp_path: Path
) -> None:
    store, _ = store_of(folder, tmp_path / "rows.jsonl", [row], text_as=text_as)
    served = CandidateEncoder(folder, TokenizationRules(text_as=text_as), truncate=False)
    group = served.encode(row["prompt"], SPACED)
    assert [list(one) for one in group.ids] == ids(store, 0)
    is_stripped = row is SPACED_TEXT and text_as == "chat"
    is_plain = row is SPACED_TEXT and text_as == "text"
    after = "" if is_plain else "\n"  # the template writes a line break after its end of turn
    read = [served.tokenizer.decode(one, skip_special_tokens=True) for one in group.ids[1:]]
    assert read == [(text.strip() if is_stripped else text) + after for text in SPACED]


@pytest.mark.parametrize(
    ("counts", "asked", "expected", "said"),
    [
        ((0, 9), None, "chat", ""),
        ((9, 0), None, "text", ""),
        ((4, 5), None, "text", "4 rows were trained as plain text and 5 with the chat template"),
        (None, None, "chat", "no record of how the policy was trained"),
        ((9, 0), "chat", "chat", ""),
        (None, "text", "text", ""),
    ],
)
def test_an_export_asks_the_training(
    counts: tuple[int, int] | None,
    asked: Any,
    expected: str,
    said: str,
    tiny_model: Path,
    make_model: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = make_model("policy")
    (policy / "chat_template.jinja").write_text(CHATML)
    if counts:
        report = DataReport(text_rows=counts[0], chat_rows=counts[1])
        (policy / "data_report.json").write_text(json.dumps(report.to_dict()))
    config = ExportConfig(policy, tiny_model, tmp_path / "bundle", 0.1, text_as=asked)
    assert make_plan(config).rules.text_as == expected
    assert said in capsys.readouterr().err
