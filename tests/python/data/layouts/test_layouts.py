"""Layouts in which a row is not one record: `--rows prm800k` and the others."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from chats_for_tests import assistant, user
from conftest import Run

from logratio.data.formats import Decoded, Decoder, FormatSettings
from logratio.data.layouts import LAYOUTS, advice
from logratio.data.readers.derived_rows import RowFunction, as_row_function
from logratio.data.records import InvalidRecordError, Source
from logratio.errors import ConfigError

HERE = Source("rows.jsonl", 1)
Row = dict[str, Any]


def made(name: str, row: Row) -> list[Any]:
    """Return the rows that a layout derives from one; codes for the parts it leaves out."""
    function = as_row_function(name)
    assert isinstance(function, RowFunction)
    try:
        return [
            part.code if isinstance(part, InvalidRecordError) else part for part in function(row)
        ]
    except InvalidRecordError as error:
        return [error.code]


def decoded(name: str, row: Row, **settings: Any) -> list[Decoded]:
    decoder = Decoder(FormatSettings(**settings))
    return [decoder.decode(one, HERE) for one in made(name, row) if isinstance(one, dict)]


def answers(name: str, row: Row, **settings: Any) -> list[tuple[Any, ...]]:
    """Return both sides of every pair; for chats, the text of the last turn."""
    return [
        tuple(
            one.answer if isinstance(one.answer, str) else one.answer[-1]["content"]
            for one in record.completions
        )
        for found in decoded(name, row, **settings)
        for record in found.records
    ]


# PRM800K


def completion(text: str, rating: Any, flagged: bool | None = None) -> Row:
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*completions: Row, chosen: int | None = 0, human: Any = None) -> Row:
    return {"completions": [*completions], "human_completion": human, "chosen_completion": chosen}


def prm800k(*steps: Row, finish: str = "found_error") -> Row:
    return {
        "labeler": "340d89bc",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": 9,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "2 + 2?", "ground_truth_answer": "4", "pre_generated_steps": ["x"]},
        "label": {"steps": [*steps], "total_time": 278270, "finish_reason": finish},
    }


LAST = step(completion("5", -1), completion("4", 1), completion("four", 1), completion("?", 0))


def test_prm800k_compares_the_completions_of_a_step() -> None:
    row = prm800k(
        step(completion("Add.", 0)), step(completion("So", 1)), LAST | {"chosen_completion": None}
    )
    (found,) = decoded("prm800k", row)
    assert found.format == "step-list" and found.left_out == ("R310",)
    pairs = answers("prm800k", row)
    assert pairs == [("4", "5"), ("four", "5"), ("?", "5"), ("4", "?"), ("four", "?")]
    record = found.records[0]
    assert record.prompt == (user("2 + 2?"),) and not record.ends
    assert {one.context for one in record.completions} == {"Add.\nSo\n"}
    assert answers("prm800k", row, lists="best_worst") == [("4", "5")]
    (group,) = decoded("prm800k", row, lists="groups")[0].records
    assert [one.score for one in group.completions] == [1, 1, 0, -1] and not group.ends


@pytest.mark.parametrize("chosen", [2, 2.0])
def test_prm800k_continues_from_the_chosen_completion(chosen: float) -> None:
    row = prm800k(
        LAST | {"chosen_completion": chosen}, step(completion("a", 1), completion("b", 0))
    )
    assert [one["initial_reason_steps"] for one in made("prm800k", row)] == ["", "four"]


@pytest.mark.parametrize("human", ["mine", {"text": "mine", "rating": None, "source": "human"}])
def test_prm800k_a_step_written_by_a_labeler_is_good(human: Any) -> None:
    first = step(completion("bad", -1), completion("worse", -1), chosen=None, human=human)
    row = prm800k(first, step(completion("a", 1), completion("b", 0)))
    assert answers("prm800k", row) == [("mine", "bad"), ("mine", "worse"), ("a", "b")]
    assert made("prm800k", row)[1]["initial_reason_steps"] == "mine"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (prm800k(step(completion("a", 1))), ["R316"]),
        (prm800k(), ["R316"]),
        (prm800k(LAST, finish="bad_problem"), ["R316"]),
        (prm800k(step(completion("a", 1), completion("b", None))), ["R317"]),
        (prm800k(step(completion("a", 1), completion("b", 1, flagged=True))), ["R317"]),
        (prm800k(step(completion("a", 1), chosen=None), LAST), ["E214"]),
        (prm800k(step(completion("a", 1), chosen=1), LAST), ["E214"]),
        (prm800k(step(completion("a", 1)) | {"completions": "a"}), ["E203"]),
        (prm800k(step({"rating": 1}, completion("a", 1))), ["E201"]),
        (prm800k(LAST) | {"label": []}, ["E203"]),
        ({"question": {}}, ["E201"]),
    ],
)
def test_prm800k_names_what_it_leaves_out(row: Row, expected: list[str]) -> None:
    assert made("prm800k", row) == expected


def test_prm800k_a_rating_that_is_not_a_number() -> None:
    row = prm800k(step(completion("a", "good"), completion("b", 1)))
    with pytest.raises(InvalidRecordError, match="E212"):
        decoded("prm800k", row)


# Math-Shepherd


def shepherd(
    marks: str, text: str = "How many? Step 1: a = <<1+1=2>>2. @\nStep 2: The answer is: 2 @"
) -> Row:
    label = text
    for mark in marks:
        label = label.replace("@", mark, 1)
    return {"input": text.replace("@", "ки"), "label": label, "task": "GSM8K"}


@pytest.mark.parametrize(("marks", "is_good"), [("++", True), ("+-", False), ("-+", False)])
def test_math_shepherd_is_a_solution_with_a_label(marks: str, is_good: bool) -> None:
    (found,) = decoded("math-shepherd", shepherd(marks))
    (record,) = found.records
    assert record.prompt == (user("How many?"),)
    (one,) = record.completions
    assert one.role == ("chosen" if is_good else "rejected")
    assert one.answer == (assistant("Step 1: a = <<1+1=2>>2.\nStep 2: The answer is: 2"),)


@pytest.mark.parametrize(
    "row",
    [
        shepherd("+"),  # the second mark is missing
        shepherd("+?"),
        shepherd("++") | {"input": "How many? Step 1: other ки\nStep 2: ки"},
        shepherd("++") | {"label": shepherd("++")["label"] + " and more"},
        shepherd("++", "How many? a @\nb @"),
        shepherd("++", "Step 1: a @\nStep 2: b @"),
        shepherd("++", "How many? Step 1: a @\nStep 2: b @ Step 3: c"),
        {"input": "no tag", "label": "no tag"},
    ],
)
def test_math_shepherd_with_mismatched_steps(row: Row) -> None:
    assert made("math-shepherd", row) == ["E214"]


def test_math_shepherd_solutions_of_one_question_are_paired(tmp_path: Path, run: Run) -> None:
    rows = [shepherd("+-"), shepherd("++", "How many? Step 1: b @\nStep 2: c @")]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--rows", "math-shepherd", "--group-by", "question")
    code, out, _ = run("data", "inspect", path, *flags)
    assert code == 0 and "‹Step 1: b\nStep 2: c›\n  rejected\n" in out


# OASST


def said(text: str, role: str, *replies: Row, **more: Any) -> Row:
    known = {"message_id": text, "parent_id": None, "text": text, "role": role, "lang": "en"}
    return known | {"replies": [*replies], "deleted": False} | more


def oasst(prompt: Row) -> Row:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": prompt}


def test_oasst_each_message_with_two_ranked_replies_is_a_list() -> None:
    inner = said(
        "more?",
        "prompter",
        said("x", "assistant", rank=2),
        said("y", "assistant", rank=0),
        said("z", "assistant", rank=1),
    )
    tree = said(
        "why?",
        "prompter",
        said("bad", "assistant", rank=1),
        said("good", "assistant", inner, rank=0),
    )
    found = decoded("oasst", oasst(tree))
    assert [one.format for one in found] == ["ranked", "ranked"]
    assert answers("oasst", oasst(tree)) == [("good", "bad"), ("y", "x"), ("z", "x"), ("y", "z")]
    assert [one.records[0].prompt for one in found] == [
        (user("why?"),),
        (user("why?"), assistant("good"), user("more?")),
    ]


def test_oasst_equal_ranks_tie() -> None:
    replies = [said(text, "assistant", rank=rank) for text, rank in (("a", 0), ("b", 0), ("c", 1))]
    (found,) = decoded("oasst", oasst(said("why?", "prompter", *replies)))
    assert (len(found.records), found.left_out) == (2, ("R310",))


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([], ["R316"]),
        ([said("a", "assistant", rank=0)], ["R316"]),
        ([said("a", "assistant", rank=0), said("b", "assistant", rank=None)], ["R317"]),
        ([said("a", "assistant", rank=0), said("b", "assistant", rank=1, deleted=True)], ["R317"]),
        ([said("a", "assistant"), said("b", "assistant")], ["R317", "R317"]),
        ([said("a", "assistant", rank=0), said("b", "assistant", rank=1) | {"text": 3}], ["E203"]),
        ([said("a", "assistant", rank=0), "b"], ["E203"]),
    ],
)
def test_oasst_names_what_it_leaves_out(replies: list[Any], expected: list[str]) -> None:
    assert made("oasst", oasst(said("why?", "prompter", *replies))) == expected


def test_oasst_deep_trees_need_no_deep_stack() -> None:
    tree = said("a", "assistant", rank=0)
    for number in range(5000):
        role = ("prompter", "assistant")[number % 2]
        tree = said("t", role, tree, rank=0)
    assert made("oasst", oasst(tree)) == ["R316"]


# Argilla


def argilla(responses: Any = None, suggestions: Any = None, **fields: Any) -> Row:
    fields = fields or {"instruction": "q", "response_a": "A", "response_b": "B"}
    return {
        "id": "1",
        "fields": fields,
        "metadata": {"source": "shop"},
        "suggestions": suggestions or {},
        "responses": responses or {},
        "vectors": {},
        "_server_id": "3f",
    }


def voted(*values: Any, status: str | None = None) -> Row:
    more = {} if status is None else {"status": status}
    return {"preference": [{"value": value, "user_id": "u"} | more for value in values]}


SUGGESTED = {"preference": {"value": "response_a", "score": 0.9, "agent": "model"}}
PREFERENCE = "preference: response_a=response_a response_b=response_b tie=tie"


@pytest.mark.parametrize(
    ("row", "better"),
    [
        (argilla(voted("response_b")), "B"),
        (argilla(voted("response_b"), SUGGESTED), "B"),
        (argilla(None, SUGGESTED), "A"),
        (argilla(voted("response_b", "response_a", "response_b")), "B"),
        (argilla(voted("response_b", status="discarded"), SUGGESTED), "A"),
        (
            argilla(
                [
                    {
                        "user_id": "u",
                        "status": "submitted",
                        "values": {"preference": {"value": "response_b"}},
                    }
                ],
                [{"question_name": "preference", "value": "response_a", "agent": "m"}],
            ),
            "B",
        ),
    ],
)
def test_argilla_responses_override_suggestions(row: Row, better: str) -> None:
    ((chosen, _),) = answers("argilla", row, label=PREFERENCE)
    assert chosen == better


REPLIES = {"instruction": "q", "reply-1": "A", "reply-2": "B", "reply-3": "C"}


@pytest.mark.parametrize(
    "value",
    [
        ["reply-2", "reply-3", "reply-1"],
        [
            {"value": "reply-1", "rank": 3},
            {"value": "reply-2", "rank": 1},
            {"value": "reply-3", "rank": 2},
        ],
    ],
)
def test_argilla_a_ranking_is_a_list(value: Any) -> None:
    row = argilla({"ranking": [{"value": value, "user_id": "u"}] * 2}, **REPLIES)
    first, second = decoded("argilla", row)
    assert first.format == "ranked" and first.records == second.records
    assert sorted(answers("argilla", row)[:3]) == [("B", "A"), ("B", "C"), ("C", "A")]


def test_argilla_equal_ranks_tie() -> None:
    value = [{"value": f"reply-{number}", "rank": 1 + (number > 2)} for number in (1, 2, 3)]
    (found,) = decoded("argilla", argilla({"ranking": [{"value": value}]}, **REPLIES))
    assert (len(found.records), found.left_out) == (2, ("R310",))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (argilla(), ["R317"]),
        (argilla(voted(None)), ["R317"]),
        (argilla(voted("a", status="draft")), ["R317"]),
        (argilla(voted("a")) | {"fields": None}, ["E203"]),
        (argilla({"preference": "a"}), ["E203"]),
        (argilla(voted("a"), preference="a field"), ["E210"]),
        (
            argilla({n: [{"value": ["reply-1", "reply-2", "reply-3"]}] for n in "ab"}, **REPLIES),
            ["E210"],
        ),
    ],
)
def test_argilla_names_what_it_leaves_out(row: Row, expected: list[str]) -> None:
    assert made("argilla", row) == expected


def test_argilla_a_multiple_choice_is_not_a_ranking() -> None:
    (row,) = made("argilla", argilla({"good": [{"value": ["reply-1", "reply-2"]}]}, **REPLIES))
    assert row == REPLIES | {"good": ["reply-1", "reply-2"]}


# Label Studio


def result(kind: str, value: Row, name: str = "pw") -> Row:
    return {
        "id": "iG",
        "type": kind,
        "from_name": name,
        "to_name": "a,b",
        "value": value,
        "origin": "manual",
    }


def task(*annotations: list[Row], skipped: bool = False, **data: Any) -> Row:
    return {
        "id": 1,
        "annotations": [
            {"id": number, "result": results, "was_cancelled": skipped, "ground_truth": False}
            for number, results in enumerate(annotations)
        ],
        "file_upload": "tasks.json",
        "drafts": [],
        "predictions": [],
        "data": data or {"prompt": "q", "answer1": "A", "answer2": "B"},
        "meta": {},
        "project": 83,
    }


def compared(side: str, name: str = "pw") -> Row:
    return result("pairwise", {"selected": side}, name)


SIDES = "pairwise: left=answer1 right=answer2"


def test_label_studio_a_comparison_is_a_vote() -> None:
    assert answers("label-studio", task([compared("right")]), label=SIDES) == [("B", "A")]
    row = task([compared("left")], [compared("right")], [compared("left")])
    assert answers("label-studio", row, label=SIDES) == [("A", "B")]
    with pytest.raises(InvalidRecordError, match="R310"):
        decoded("label-studio", task([compared("left")], [compared("right")]), label=SIDES)


def test_label_studio_names_the_flag_that_maps_sides() -> None:
    with pytest.raises(InvalidRecordError, match=f"E209.*--label '{SIDES}'"):
        decoded("label-studio", task([compared("left")]))


def test_label_studio_several_comparisons_keep_their_names() -> None:
    row = task([compared("left", "helpful"), compared("right", "harmless")])
    (found,) = made("label-studio", row)
    assert (found["helpful"], found["harmless"]) == ("left", "right")
    label = "harmless: left=answer1 right=answer2"
    assert answers("label-studio", row, label=label) == [("B", "A")]


def test_label_studio_choices() -> None:
    row = task([result("choices", {"choices": ["answer2"]}, "preference")])
    label = "preference: answer1=answer1 answer2=answer2"
    assert answers("label-studio", row, label=label) == [("B", "A")]


ITEMS = [{"id": id, "title": f"model {id}", "body": id.upper()} for id in "abc"]


def ranked(order: Any, items: Any = ITEMS) -> Row:
    return task([result("ranker", {"ranker": order}, "rank")], prompt="q", items=items)


@pytest.mark.parametrize("order", [["b", "c", "a"], {"rank": ["b", "c", "a"]}])
def test_label_studio_an_order_is_a_list(order: Any) -> None:
    (found,) = decoded("label-studio", ranked(order))
    assert found.format == "ranked"
    assert sorted(answers("label-studio", ranked(order))) == [("B", "A"), ("B", "C"), ("C", "A")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (task(), ["R317"]),
        (task([]), ["R317"]),
        (task([compared("left")], skipped=True), ["R317"]),
        (task([result("textarea", {"text": ["why"]})]), ["R317"]),
        (task([compared("left")]) | {"data": "text"}, ["E203"]),
        (task([compared("left")]) | {"annotations": None}, ["E203"]),
        (task([compared("left")], prompt="q", pairwise="x"), ["E210"]),
        (ranked({"good": ["a"], "bad": ["b"], "_": ["c"]}), ["E212"]),
        (ranked(["a", "x"]), ["E212"]),
        (ranked(["a", "b"], "text"), ["E201"]),
    ],
)
def test_label_studio_names_what_it_leaves_out(row: Row, expected: list[str]) -> None:
    assert made("label-studio", row) == expected


def test_label_studio_an_item_without_a_rank_is_counted() -> None:
    assert made("label-studio", ranked(["b", "a"])) == [
        "R317",
        {"prompt": "q", "completions": [{"text": "B", "rank": 1}, {"text": "A", "rank": 2}]},
    ]


# Rows for `logratio rank`

CANDIDATES = {"prompt": "q", "candidates": ["a", "b", "a"], "id": 7}


def test_candidates_are_the_answers_to_their_prompt() -> None:
    assert made("candidates", CANDIDATES) == [
        {"prompt": "q", "completion": text, "label": True} for text in "aba"
    ]
    chat = {"prompt": [user("q")], "candidates": ["a"]}
    (record,) = [one for found in decoded("candidates", chat) for one in found.records]
    assert record.prompt == (user("q"),)


@pytest.mark.parametrize(
    ("row", "code"),
    [({"prompt": "q"}, "E201"), ({"prompt": "q", "candidates": "a"}, "E203")],
)
def test_candidates_that_are_no_list(row: Row, code: str) -> None:
    assert made("candidates", row) == [code]


# All of them

ROWS = {
    "argilla": argilla(voted("response_b")),
    "candidates": CANDIDATES,
    "label-studio": task([compared("left")]),
    "math-shepherd": shepherd("++"),
    "oasst": oasst(said("why?", "prompter")),
    "prm800k": prm800k(LAST),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_refusal_names_the_layout(name: str, tmp_path: Path, run: Run) -> None:
    with pytest.raises(InvalidRecordError, match=f"E206.*this looks like .*: --rows {name}"):
        Decoder().decode(ROWS[name], HERE)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[name]]))
    code, out, _ = run("data", "inspect", path)
    assert code == 1 and f"--rows {name}" in out and "lacks" not in out


@pytest.mark.parametrize("text", ["post", "article"])
def test_flags_for_summarize_from_feedback_are_named_and_read_it(
    text: str, tmp_path: Path, run: Run
) -> None:
    info = {"id": "t", "post": None, "article": None, text: "long text"}
    summaries = [{"text": " short"}, {"text": " shorter"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"info": info, "summaries": summaries, "choice": 1}) + "\n")
    code, out, _ = run("data", "inspect", path)
    assert code == 1
    flags = re.search(r"this looks like summarize_from_feedback: (.*)", out)
    assert flags is not None
    code, out, _ = run("data", "inspect", path, *shlex.split(flags[1]))
    assert code == 0
    read = re.search(r"prompt\n(.*)\n +chosen\n(.*)\n +rejected\n(.*)\n", out)
    assert read is not None and read.groups() == ("long text", "‹ shorter›", "‹ short›")


def test_rows_inside_an_object_with_other_keys_are_found() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(InvalidRecordError, match=r"E206.*list `rows`.*jq -c '\.rows\[\]'"):
        Decoder().decode({"rows": [row], "meta": 1}, HERE)
    others: list[dict[str, Any]] = [{"rows": [1]}, {"rows": []}, {"rows": [row], "data": [row]}]
    for other in others:
        with pytest.raises(InvalidRecordError, match="E206") as caught:
            Decoder().decode(other, HERE)
        assert "jq" not in caught.value.reason


def test_rows_of_known_formats_match_no_layout() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "label": {}, "data": [], "fields": {}}
    assert not advice(pair) and not advice({"input": "q", "label": "+"})


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path, run: Run) -> None:
    with pytest.raises(
        ConfigError, match="argilla, candidates, label-studio, math-shepherd, oasst, prm800k"
    ):
        as_row_function("prm")
    (tmp_path / "rows.jsonl").write_text(json.dumps(prm800k(LAST)) + "\n")
    code, out, _ = run("data", "inspect", tmp_path / "rows.jsonl", "--rows", "prm800k")
    assert code == 0 and "through prm800k" in out and "step-list" in out
