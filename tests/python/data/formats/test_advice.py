"""The advice in errors works when followed, and the counts of a report agree."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import save, word_level

from logratio.data import FormatSettings, PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.analysis import analyse
from logratio.data.formats import Decoder
from logratio.data.inspection import inspect
from logratio.data.records import InvalidRecordError, Source

HERE = Source("rows.jsonl", 1)
ANSWERS = {"chosen": "good", "rejected": "bad"}


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(InvalidRecordError) as error:
        Decoder().decode(row, HERE)
    return str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"Prompt": "q", "Chosen": "good", "Rejected": "bad"},
        {"prompt": "q", "Chosen": "good", "rejected": "bad"},
        {"prompt": "q", "choosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejeted": "bad"},
        {"Question": "q", "chosen-response": "good", "rejected-response": "bad"},
        {"prompt": "q", "my chosen": "x", "CHOSEN": "good", "rejected": "bad"},
        {"instruction": "q", "good": "good", "bad": "bad"},
        {"prompt": "q", "preferred": "good", "dispreferred": "bad"},
    ],
    ids=lambda row: ",".join(row),
)
def test_a_key_of_another_case_or_with_a_slip_is_named(row: dict[str, Any]) -> None:
    found = re.search(r"did you mean --columns '?([^'?]+)'?\?", refusal(row))
    assert found
    columns = dict(word.split("=") for word in found[1].split(","))
    (record,) = Decoder(FormatSettings(columns=columns)).decode(row, HERE).records
    assert [c.role for c in record.completions] == ["chosen", "rejected"]
    assert "good" in str(record.completions[0].answer)
    assert "bad" in str(record.completions[1].answer)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "first": "a", "second": "b"},
        {"prompt": "q", "Chosen": 1, "rejected": "b"},  # would still be refused
        {"prompt": "q", "chosen": "a", "id": 7},
    ],
    ids=lambda row: ",".join(row),
)
def test_a_key_that_would_not_help_is_not_named(row: dict[str, Any]) -> None:
    assert "did you mean" not in refusal(row)


@pytest.mark.parametrize(
    ("names", "flag"),
    [
        (("response_a", "response_b", "rating_a", "rating_b"), "score_a=rating_a"),
        (("response_1", "response_2", "rating_1", "rating_2"), "score_1=rating_1"),
        (("response_1", "response_2"), None),
        (("response_A", "response_B"), None),
        (("responsea", "responseb", "kind"), None),
    ],
)
def test_advice_never_guesses_the_better_answer(names: tuple[str, ...], flag: str | None) -> None:
    """`response_j` is the better one in StackExchange's pairs; `response_b` is unrelated to it."""
    values = ("good", "bad", 5, 2)
    reason = refusal({"prompt": "q", **dict(zip(names, values, strict=False))})
    assert "response_j" not in reason and "response_k" not in reason
    assert (flag or "did you mean") in reason if flag else "did you mean" not in reason


def test_ratings_are_scores() -> None:
    assert "=ratings" in refusal({"prompt": "q", "responses": ["a", "b"], "ratings": [5, 2]})


def test_a_label_is_explained_once_for_all_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "output_1": "a", "output_2": "b", "preference": n} for n in (1, 2)]
    path = tmp_path / "ab.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = inspect([path]).to_text()
    assert "1=output_1 2=output_2" in shown and "0=output_1" not in shown
    assert "(and 1 more)" in shown


def test_inspect_refuses_what_the_tokenizer_does(tmp_path: Path) -> None:
    path, folder = tmp_path / "chat.jsonl", save(tmp_path / "model", word_level())
    chat = [{"role": "user", "content": "the cat"}]
    row = {"prompt": chat, **{k: [{"role": "assistant", "content": v}] for k, v in ANSWERS.items()}}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    found = inspect([path], None, PreferenceTokenizer.load(folder))
    assert not found.is_known
    assert "[E401]" in found.to_text() and "(and 1 more)" in found.to_text()


def test_a_report_warns_that_training_would_stop(tmp_path: Path) -> None:
    rows = [text("the cat", "sat", "ran"), text("the dog", "ran", 3), text("a", "the", "mat")]
    assert "--max-bad-fraction 0.334" in report(tmp_path, rows, max_bad_fraction=1.0)


@pytest.mark.parametrize("key", ["images", "image", "videos", "audio"])
def test_pictures_are_not_to_be_moved_into_a_text(key: str) -> None:
    reason = refusal({"prompt": "q", **ANSWERS, key: ["a.png"]})
    assert "move it into the prompt" not in reason
    assert "only text is supported" in reason


def test_tools_need_messages() -> None:
    reason = refusal({"prompt": "q", **ANSWERS, "tools": [{"name": "f"}]})
    assert "as lists of messages" in reason


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def report(tmp_path: Path, rows: list[Any], limit: int = 64, **settings: Any) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save(tmp_path / "model", word_level())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = PreferenceTokenizer.load(folder, TokenizationRules(max_length=limit))
    store, account = build_store([path], tokenizer, **settings)
    return analyse(store, account).to_text()


def scored(scores: list[int], *answers: str) -> dict[str, Any]:
    return {"question": "the cat", "answers": answers, "scores": scores}


def text(prompt: str, chosen: str, rejected: str | int) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_of_a_format_are_all_rows_that_were_read_as_it(tmp_path: Path) -> None:
    """A row of a format counts for it, whether it is refused before or after tokenization."""
    rows = [
        text("the cat", " ran", " sat"),
        text("the cat", "", " sat"),  # R301
        text("the cat", " ran", " ran"),  # R302
        text("the cat", " ran on the mat", " ran on the house"),  # R303
        text("the cat and the dog ran", " ran", " sat"),  # R304
        text("the cat", " ran", " sat"),  # a duplicate
        text("the dog", " ran", 1),  # E203
    ]
    printed = report(tmp_path, rows, 5, max_bad_fraction=0.5)
    assert "7 rows read: 1 kept, 5 refused, 1 duplicate" in printed
    assert "6 rows of trl" in printed


def test_rows_and_their_groups_are_both_reported(tmp_path: Path) -> None:
    rows = [scored([3, 2, 1], "sat", "ran", "the"), scored([2, 1], "sat", "ran")]
    printed = report(tmp_path, rows)
    assert "2 rows read: 1 kept" in printed
    assert "3 groups from 1 row" in printed
    assert "label noise: cannot be estimated: a row holds several pairs" in printed
    assert "rows make" not in report(tmp_path, [text("the cat", " ran", " sat")])


def test_listed_places_are_not_overcounted(tmp_path: Path) -> None:
    """Both sides of one row were truncated: the report lists one place."""
    row = text("the cat", " ran on the mat", " sat on the mat")
    printed = report(tmp_path, [row, text("the dog", " ran", " sat")], 5)
    assert "[W503] 2 × a completion was truncated" in printed
    assert "more" not in printed.split("[W503]")[1].split("\n\n")[0]


def test_rows_that_no_container_could_read_were_looked_at_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(text("q", "a", "b")) + "\n{broken\n")
    assert "2 rows inspected" in inspect([path]).to_text()
