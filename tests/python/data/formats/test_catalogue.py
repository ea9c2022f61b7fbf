"""Every known format: the records that it gives, and each way in which it can be malformed."""

from typing import Any

import pytest
from chats_for_tests import assistant, gpt, hh, human, system, user, without_values

from logratio.data.formats import (
    FORMATS,
    KNOWN_SHAPES,
    Decoded,
    Decoder,
    FormatSettings,
    FormatSettingsError,
    Label,
    detect,
    near_formats,
)
from logratio.data.records import CODES, Completion, InvalidRecordError, PreferenceRecord, Source

SOURCE = Source("data.jsonl", 1)
TOOL = {"type": "function", "function": {"name": "f"}}
PAIRED = "preference: 1=output_1 2=output_2 0=tie"
Row = dict[str, Any]


def decode(row: Row, **settings: Any) -> Decoded:
    return Decoder(FormatSettings(**settings)).decode(row, SOURCE)


def only(row: Row, **settings: Any) -> PreferenceRecord:
    (record,) = decode(row, **settings).records
    return record


def refusal(row: Row, **settings: Any) -> InvalidRecordError:
    with pytest.raises(InvalidRecordError) as caught:
        decode(row, **settings)
    assert caught.value.code in CODES
    return caught.value


def text_pair(prompt: str, chosen: str, rejected: str) -> PreferenceRecord:
    sides = (Completion("chosen", chosen), Completion("rejected", rejected))
    return PreferenceRecord(prompt, sides, SOURCE)


def chat_pair(turns: list[Row], chosen: str, rejected: str, **more: Any) -> PreferenceRecord:
    sides = tuple(
        Completion(role, (assistant(text),), ())
        for role, text in (("chosen", chosen), ("rejected", rejected))
    )
    return PreferenceRecord(tuple(turns), sides, SOURCE, **more)


U, C, R = [user("u")], [assistant("c")], [assistant("r")]
FULL = {"chosen": [*U, *C], "rejected": [*U, *R]}
SIDES = {"chosen": "c", "rejected": "r"}
ALL_TURNS = [system("s"), user("a"), assistant("b"), user("u")]
SHP = {"history": "u", "human_ref_A": "c", "human_ref_B": "r", "labels": 1, "score_A": 3}
AB = {"instruction": "u", "output_1": "r", "output_2": "c", "preference": 2}
OPENAI = {"input": {"messages": U}, "preferred_output": C, "non_preferred_output": R}
STEPS = {"prompt": "u", "chosen": "good", "rejected": "bad", "initial_reason_steps": "1. a"}
PRM = {"prompt": "u", "chosen": ["a", "b", "good", "z"], "rejected": ["a", "b", "bad"]}

PAIRS: dict[str, tuple[str, Row, dict[str, Any], PreferenceRecord]] = {
    "trl": ("trl", {"prompt": "u", **SIDES}, {}, text_pair("u", "c", "r")),
    "trl-chat": ("trl-chat", {"prompt": U, "chosen": C, "rejected": R}, {}, chat_pair(U, "c", "r")),
    "trl-chat, a message a side": (
        "trl-chat",
        {"prompt": U, "chosen": C[0], "rejected": R[0]},
        {},
        chat_pair(U, "c", "r"),
    ),
    "trl-chat, strings a side": ("trl-chat", {"prompt": U, **SIDES}, {}, chat_pair(U, "c", "r")),
    "tools": (
        "trl-chat",
        {"prompt": U, "chosen": C, "rejected": R, "tools": [TOOL]},
        {},
        chat_pair(U, "c", "r", tools=(TOOL,)),
    ),
    "tools as JSON": (
        "trl-chat-implicit",
        FULL | {"tools": '[{"name": "f"}]'},
        {},
        chat_pair(U, "c", "r", tools=({"name": "f"},)),
    ),
    "no tools": ("trl-chat-implicit", FULL | {"tools": " "}, {}, chat_pair(U, "c", "r")),
    "trl-chat-implicit": ("trl-chat-implicit", FULL, {}, chat_pair(U, "c", "r")),
    "hh": (
        "hh",
        {"chosen": hh("u", "c"), "rejected": hh("u", "r")},
        {},
        text_pair("\n\nHuman: u\n\nAssistant:", " c", " r"),
    ),
    "ultrafeedback": (
        "ultrafeedback",
        FULL | {"prompt": " u", "messages": FULL["chosen"], "score_chosen": 8.0},
        {},
        chat_pair(U, "c", "r"),
    ),
    "whole chats next to the prompt's messages": (
        "trl-chat",
        FULL | {"prompt": U},
        {},
        chat_pair(U, "c", "r"),
    ),
    "orca": (
        "orca",
        {"system": "s", "question": "u", **SIDES},
        {},
        chat_pair([system("s"), *U], "c", "r"),
    ),
    "orca without a system prompt": (
        "orca",
        {"system": "", "input": "u", **SIDES},
        {},
        chat_pair(U, "c", "r"),
    ),
    "prompt next to a system prompt": (
        "orca",
        {"system_prompt": "s", "prompt": "u", **SIDES},
        {},
        chat_pair([system("s"), *U], "c", "r"),
    ),
    "prompt next to an empty history": (
        "orca",
        {"history": [], "prompt": "u", **SIDES},
        {},
        chat_pair(U, "c", "r"),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "u", "input": "", "history": [["a", "b"]], "system": "s", **SIDES},
        {},
        chat_pair(ALL_TURNS, "c", "r"),
    ),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "u", "input": "v", "history": None, **SIDES},
        {},
        chat_pair([user("u\nv")], "c", "r"),
    ),
    "alpaca with a history of messages": (
        "alpaca",
        {"instruction": "u", "history": [user("a"), assistant("b", weight=1)], **SIDES},
        {},
        chat_pair(ALL_TURNS[1:], "c", "r"),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [human("a"), gpt("b"), human("u")],
            "chosen": gpt("c"),
            "rejected": gpt("r"),
            "system": "s",
        },
        {},
        chat_pair(ALL_TURNS, "c", "r"),
    ),
    "sharegpt with strings": (
        "sharegpt",
        {"conversations": [human("u")], **SIDES},
        {},
        chat_pair(U, "c", "r"),
    ),
    "axolotl": (
        "axolotl",
        {"messages": U, "chosen": C[0], "rejected": R[0]},
        {},
        chat_pair(U, "c", "r"),
    ),
    "argilla": (
        "argilla",
        {"instruction": "u", "chosen_response": "c", "rejected_response": "r"},
        {},
        chat_pair(U, "c", "r"),
    ),
    "nemo-aligner": (
        "nemo-aligner",
        {"prompt": "u", "chosen_response": "c", "rejected_response": "r", "chosen_reward": 2.0},
        {},
        text_pair("u", "c", "r"),
    ),
    "stack-exchange": (
        "stack-exchange",
        {"question": "u", "response_j": "c", "response_k": "r"},
        {},
        chat_pair(U, "c", "r"),
    ),
    "openai": ("openai", OPENAI, {}, chat_pair(U, "c", "r")),
    "openai with tools": (
        "openai",
        OPENAI | {"input": {"messages": U, "tools": [TOOL], "parallel_tool_calls": True}},
        {},
        chat_pair(U, "c", "r", tools=(TOOL,)),
    ),
    "llamafactory-v1": (
        "llamafactory-v1",
        {
            f"{side}_messages": [
                {
                    "role": role,
                    "content": [{"type": "text", "value": text}],
                    "loss_weight": float(role == "assistant"),
                }
                for role, text in (("user", "u"), ("assistant", side[0]))
            ]
            for side in SIDES
        },
        {},
        chat_pair(U, "c", "r"),
    ),
    "ms-swift": (
        "ms-swift",
        {"messages": [*U, *C], "rejected_response": "r"},
        {},
        chat_pair(U, "c", "r"),
    ),
    "ms-swift, another whole chat": (
        "ms-swift",
        {"messages": [*U, *C], "rejected_messages": [*U, *R]},
        {},
        chat_pair(U, "c", "r"),
    ),
    "ms-swift, another answer": (
        "ms-swift",
        {"messages": [*U, *C], "rejected_messages": R, "system": "s", "tools": []},
        {},
        chat_pair([system("s"), *U], "c", "r"),
    ),
    "ms-swift, two responses": (
        "ms-swift",
        {"query": "u", "response": "c", "rejected_response": "r", "history": [["a", "b"]]},
        {},
        chat_pair(ALL_TURNS[1:], "c", "r"),
    ),
    "shp": ("shp", SHP, {}, chat_pair(U, "c", "r")),
    "shp, B": (
        "shp",
        SHP | {"human_ref_A": "r", "human_ref_B": "c", "labels": 0},
        {},
        chat_pair(U, "c", "r"),
    ),
    "ab": ("ab", AB, {"label": PAIRED}, chat_pair(U, "c", "r")),
    "ab, plain text": (
        "ab",
        {"prompt": "u", "left": "c", "right": "r", "vote": "l>r"},
        {"label": "vote: l>r=left r>l=right"},
        text_pair("u", "c", "r"),
    ),
    "ab, a boolean": (
        "ab",
        {"prompt": "u", "a": "c", "b": "r", "a_wins": True},
        {"label": Label("a_wins", {"true": "a", "false": "b"})},
        text_pair("u", "c", "r"),
    ),
    "ranked": (
        "ranked",
        {
            "context": U,
            "completions": [{"rank": 1, "completion": R}, {"rank": 0, "completion": C}],
        },
        {},
        chat_pair(U, "c", "r"),
    ),
    "ranked, Nectar": (
        "ranked",
        {"prompt": "u", "answers": [{"answer": "c", "rank": 1.0}, {"answer": "r", "rank": 2.0}]},
        {},
        text_pair("u", "c", "r"),
    ),
    "scored": (
        "scored",
        {"instruction": "u", "responses": ["r", "c"], "scores": [0.5, 1]},
        {},
        chat_pair(U, "c", "r"),
    ),
    "scored, each with its own": (
        "scored",
        {
            "instruction": "u",
            "completions": [
                {"response": "c", "overall_score": 9},
                {"response": "r", "overall_score": 2},
            ],
        },
        {},
        chat_pair(U, "c", "r"),
    ),
    "text-score": (
        "text-score",
        {"text": [hh("u", "r"), hh("u", "c")], "score": [0.0, 1.0]},
        {},
        text_pair("\n\nHuman: u\n\nAssistant:", " c", " r"),
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_in_every_layout(case: str) -> None:
    name, row, settings, expected = PAIRS[case]
    decoded = decode(row, **settings)
    assert (decoded.format, decoded.left_out) == (name, ())
    assert tuple(map(without_values, decoded.records)) == (expected,)
    assert decode(row, format=name, **settings) == decoded


def test_near_formats_lack_least_first_and_hold_preferences() -> None:
    near = [(known.name, lacking) for known, lacking in near_formats(["prompt", "completion"])]
    assert near[0] == ("kto", ("label or kto_tag",))
    assert {"chat", "completion"}.isdisjoint(name for name, _ in near)
    assert [len(lacking) for _, lacking in near] == sorted(len(lacking) for _, lacking in near)
    assert "or a boolean under `label`" in refusal({"prompt": "u", "completion": "c"}).reason


def test_every_format_has_its_case() -> None:
    tested = {name for name, *_ in PAIRS.values()}
    others = {
        "kto",
        "kto-chat",
        "step-dpo",
        "prmbench",
        "completion",
        "instruction",
        "chat",
        "ids",
        "several",
        "rated",
        "best-of-k",
        "step-list",
    }
    published = {"helpsteer2", "helpsteer3", "ppe", "arena-chat", "arena-55k"}  # in test_labels
    assert tested | others | published == FORMATS.keys()
    assert all(name in KNOWN_SHAPES for name in FORMATS)


THUMBS: dict[str, tuple[str, Row, dict[str, Any], str]] = {
    "text": ("kto", {"prompt": "u", "completion": "c", "label": True}, {}, "chosen"),
    "chat": ("kto", {"prompt": U, "completion": C, "label": False}, {}, "rejected"),
    "alpaca": ("kto", {"instruction": "u", "output": "c", "kto_tag": True}, {}, "chosen"),
    "messages": ("kto-chat", {"messages": [*U, *C], "label": False}, {}, "rejected"),
    "ShareGPT": (
        "kto-chat",
        {"conversations": [human("u"), gpt("c")], "label": True},
        {},
        "chosen",
    ),
    "number": (
        "kto",
        {"prompt": "u", "completion": "c", "label": 0},
        {"label": "label: 1=good 0=bad"},
        "rejected",
    ),
    "word": (
        "kto",
        {"prompt": "u", "completion": "c", "thumb": "up"},
        {"label": "thumb: up=good down=bad"},
        "chosen",
    ),
}


@pytest.mark.parametrize("case", THUMBS)
def test_boolean_labels(case: str) -> None:
    name, row, settings, role = THUMBS[case]
    decoded = decode(row, **settings)
    (record,) = decoded.records
    (completion,) = record.completions
    assert (decoded.format, completion.role, decoded.extra_keys) == (name, role, ())
    if record.is_chat:
        assert (record.prompt, completion.answer) == (tuple(U), tuple(C))
    else:
        assert (record.prompt, completion.answer) == ("u", "c")
    assert refusal(row, demonstrations=True, **settings).code == "E206"


def test_label_of_a_long_chat_rates_its_last_answer() -> None:
    turns = [user("a"), assistant("b"), user("u"), assistant("c")]
    record = only({"messages": turns, "label": True})
    assert (record.prompt, record.completions[0].answer) == (tuple(turns[:3]), (turns[3],))


STEP_SIDES: dict[str, tuple[Row, str, str, str]] = {
    "on lines": (STEPS, "1. a\n", "good", "bad"),
    "at a colon": (STEPS | {"initial_reason_steps": "1. a\n2:"}, "1. a\n2:", "good", "bad"),
    "as the whole shows": (STEPS | {"full_chosen": "1. a  good z"}, "1. a  ", "good", "bad"),
    "as they stand": (STEPS | {"full_chosen": "1. agood z"}, "1. a", "good", "bad"),
    "first": (STEPS | {"initial_reason_steps": ""}, "", "good", "bad"),
    "lists": (PRM | {"first_diff": 2, "error_steps": [3]}, "a\nb\n", "good", "bad"),
    "lists without a place": (PRM | {"error_steps": [3]}, "a\nb\n", "good", "bad"),
    "lists with line ends": (
        {"prompt": "u", "chosen": ["a\n", "c"], "rejected": ["a\n", "d"], "first_diff": 1},
        *("a\n", "c", "d"),
    ),
}


@pytest.mark.parametrize("case", STEP_SIDES)
def test_steps_begin_an_answer_and_do_not_end_it(case: str) -> None:
    row, before, good, bad = STEP_SIDES[case]
    sides = (Completion("chosen", good, before), Completion("rejected", bad, before))
    assert only(row) == PreferenceRecord(tuple(U), sides, SOURCE, ends=False)


def test_lists_of_strings_are_steps_only_if_the_flag_is_given() -> None:
    assert refusal(PRM).code == "E210"
    assert "--format prmbench" in refusal(PRM).reason
    assert only(PRM, format="prmbench").completions[0].answer == "good"
    extra = decode(STEPS | {"full_chosen": "1. a\ngood\nz"}).extra_keys
    assert extra == ("full_chosen",)


RANKED = {
    "prompt": "u",
    "completions": ["worst", "best", "", "middle", "best", "also middle"],
    "scores": [0, 9, 8, 5, 7, 5],
}


def test_list_as_pairs_leaves_out_ties_empty_and_repeated_answers() -> None:
    decoded = decode(RANKED)
    said = [tuple(side.answer for side in record.completions) for record in decoded.records]
    assert said == [
        ("best", "worst"),
        ("middle", "worst"),
        ("best", "worst"),
        ("also middle", "worst"),
        ("best", "middle"),
        ("best", "also middle"),
        ("best", "middle"),
        ("best", "also middle"),
    ]
    assert sorted(decoded.left_out) == ["R301"] * 5 + ["R302", "R310"]
    assert {record.source for record in decoded.records} == {SOURCE}


def test_list_as_its_best_and_worst() -> None:
    sides = only(RANKED, lists="best_worst").completions
    assert [(side.role, side.answer) for side in sides] == [
        ("chosen", "best"),
        ("rejected", "worst"),
    ]


def test_list_as_a_group_best_first() -> None:
    decoded = decode(RANKED, lists="groups")
    (record,) = decoded.records
    assert {side.role for side in record.completions} == {"candidate"}
    assert [side.answer for side in record.completions] == [
        "best",
        "middle",
        "also middle",
        "worst",
    ]
    assert [side.score for side in record.completions] == [9, 5, 5, 0]
    assert sorted(decoded.left_out) == ["R301", "R302"]
    ranked = {"prompt": "u", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}]}
    record = only(ranked, lists="groups")
    assert [(side.answer, side.rank, side.score) for side in record.completions] == [
        ("a", 1, None),
        ("b", 2, None),
    ]


def test_demonstration_of_a_list_is_its_best() -> None:
    (completion,) = only(RANKED, demonstrations=True).completions
    assert (completion.role, completion.answer) == ("demonstration", "best")
    (completion,) = only(AB, demonstrations=True, label=PAIRED).completions
    assert completion.answer == (assistant("c"),)


CHAT = {"prompt": U, "chosen": C, "rejected": R}
LIST = {"prompt": "u", "completions": ["a", "b"], "scores": [1, 2]}
CALL = {"from": "function_call", "value": "no JSON"}
BROKEN: dict[str, tuple[str, Row, dict[str, Any]]] = {
    "openai without messages": ("E201", OPENAI | {"input": {}}, {}),
    "openai with a string": ("E203", OPENAI | {"input": {"messages": "u"}}, {}),
    "openai, one side": ("E201", {"input": {"messages": U}, "preferred_output": C}, {}),
    "tools are no list": ("E203", CHAT | {"tools": {"name": "f"}}, {}),
    "tools are no JSON": ("E203", CHAT | {"tools": "f"}, {}),
    "tools are no objects": ("E203", CHAT | {"tools": ["f"]}, {}),
    "history is no list": ("E203", {"instruction": "u", "history": "a", **SIDES}, {}),
    "history of three": ("E203", {"instruction": "u", "history": [["a", "b", "c"]], **SIDES}, {}),
    "history of numbers": ("E203", {"instruction": "u", "history": [[1, 2]], **SIDES}, {}),
    "history next to messages": ("E206", CHAT | {"history": [["a", "b"]]}, {}),
    "two system prompts": ("E206", CHAT | {"prompt": [system("s"), *U], "system": "t"}, {}),
    "system is a number": ("E203", {"question": "u", "system": 3, **SIDES}, {}),
    "question is a number": ("E203", {"question": 3, **SIDES}, {}),
    "question is null": ("E201", {"question": None, **SIDES}, {}),
    "two questions": ("E210", {"question": "u", "prompt": "v", **SIDES}, {}),
    "two sorts of sides": ("E210", {**SIDES, "response_j": "a", "response_k": "b"}, {}),
    "a pair and a thumb": ("E210", {"prompt": "u", **SIDES, "completion": "c", "label": True}, {}),
    "sides repeat the prompt": (
        "E211",
        {"prompt": "once upon", "chosen": "once upon a", "rejected": "once upon b"},
        {},
    ),
    "prompt is no turn of the chats": ("E211", FULL | {"prompt": "v"}, {}),
    "prompt is a turn of one chat": (
        "E211",
        {"prompt": "v", "chosen": [*U, *C, user("v"), *C], "rejected": [*U, *R]},
        {},
    ),
    "prompt's messages do not begin the chats": ("E403", FULL | {"prompt": [user("v")]}, {}),
    "prompt is an object": ("E203", FULL | {"prompt": {"a": 1}}, {}),
    "messages are not those of the chats": ("E211", FULL | {"messages": [user("v")]}, {}),
    "system is not the chats' own": (
        "E206",
        {name: [system("t"), *chat] for name, chat in FULL.items()} | {"system": "s"},
        {},
    ),
    "system next to a transcript": (
        "E206",
        {"chosen": hh("u", "c"), "rejected": hh("u", "r"), "system": "s"},
        {},
    ),
    "sides of two kinds": ("E206", {"prompt": U, "chosen": C, "rejected": "r"}, {}),
    "conversation ends with an answer": (
        "E403",
        {"conversations": [human("u"), gpt("a")], "chosen": gpt("c"), "rejected": gpt("r")},
        {},
    ),
    "unknown speaker": ("E403", {"conversations": [{"from": "x", "value": "u"}], **SIDES}, {}),
    "speaker is a number": ("E203", {"conversations": [{"from": 1, "value": "u"}], **SIDES}, {}),
    "call is no JSON": ("E203", {"conversations": [human("u"), CALL, human("v")], **SIDES}, {}),
    "ms-swift has no answer": ("E403", {"messages": U, "rejected_response": "r"}, {}),
    "ms-swift ends with a user": (
        "E403",
        {"messages": [*U, *C, *U], "rejected_response": "r"},
        {},
    ),
    "ms-swift, a number": ("E203", {"messages": [*U, *C], "rejected_response": 3}, {}),
    "ms-swift, messages are text": ("E203", {"messages": "u", "rejected_response": "r"}, {}),
    "ms-swift, worse are text": ("E203", {"messages": [*U, *C], "rejected_messages": "r"}, {}),
    "ms-swift, identical": ("R302", {"messages": [*U, *C], "rejected_response": "c"}, {}),
    "shp, no label": ("E201", {k: v for k, v in SHP.items() if k != "labels"}, {}),
    "shp, another label": ("E212", SHP | {"labels": 2}, {}),
    "ab, not given": ("E209", AB, {}),
    "ab, a value not given": ("E212", AB | {"preference": 3}, {"label": PAIRED}),
    "ab, a tie": ("R310", AB | {"preference": 0}, {"label": PAIRED}),
    "ab, one answer": ("E212", AB, {"label": "preference: 1=output_1 0=tie"}),
    "ab, empty": ("R301", AB | {"output_1": ""}, {"label": PAIRED}),
    "ab, by name and not given": ("E209", {"prompt": "u", "x": "a", "y": "b"}, {"format": "ab"}),
    "thumb not given": ("E209", {"prompt": "u", "completion": "c", "label": 1}, {}),
    "thumb's value not given": (
        "E212",
        {"prompt": "u", "completion": "c", "label": 2},
        {"label": "label: 1=good 0=bad"},
    ),
    "thumb of nothing": ("R301", {"prompt": "u", "completion": "", "label": True}, {}),
    "thumb of an open chat": ("E403", {"messages": U, "label": True}, {}),
    "thumb of a text": ("E203", {"messages": "u", "label": True}, {}),
    "no thumb": ("E201", {"prompt": "u", "completion": "c"}, {"format": "kto"}),
    "scores too few": ("E212", LIST | {"scores": [1]}, {}),
    "score is NaN": ("E212", LIST | {"scores": [1, float("nan")]}, {}),
    "score is a boolean": ("E212", LIST | {"scores": [1, True]}, {}),
    "score is huge": ("E212", LIST | {"scores": [1, 10**400]}, {}),
    "score is text": ("E212", LIST | {"scores": [1, "2"]}, {}),
    "one answer has no rank": (
        "E212",
        {"prompt": "u", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        {},
    ),
    "no answer": ("E201", {"prompt": "u", "answers": [{"rank": 1}, {"rank": 2}]}, {}),
    "answer is a number": ("E203", LIST | {"completions": [1, 2]}, {}),
    "list without a question": ("E201", {"completions": ["a", "b"], "scores": [1, 2]}, {}),
    "list by name": ("E201", {"prompt": "u"}, {"format": "ranked"}),
    "list by the wrong name": ("E213", LIST, {"format": "ranked"}),
    "too many for pairs": (
        "E212",
        {"prompt": "u", "completions": ["a"] * 257, "scores": [*range(257)]},
        {},
    ),
    "all tied": ("R310", LIST | {"scores": [1, 1]}, {}),
    "all tied in a group": ("R310", LIST | {"scores": [1, 1]}, {"lists": "groups"}),
    "one answer": ("R310", LIST | {"completions": ["a"], "scores": [1]}, {}),
    "all empty": ("R301", LIST | {"completions": ["", " "]}, {}),
    "all the same": ("R302", LIST | {"completions": ["a", "a"]}, {"lists": "groups"}),
    "texts of no transcript": ("E201", {"text": ["a", "b"], "score": [1, 2]}, {}),
    "steps without a question": ("E201", {k: v for k, v in STEPS.items() if k != "prompt"}, {}),
    "steps are a number": ("E203", STEPS | {"initial_reason_steps": 3}, {}),
    "steps differ too soon": ("E214", PRM | {"first_diff": 3}, {}),
    "steps' place is no number": ("E214", PRM | {"first_diff": "2"}, {}),
    "steps' place is negative": ("E214", PRM | {"first_diff": -1}, {}),
    "steps are the same": ("R302", PRM | {"first_diff": 0}, {}),
    "no step differs": ("R301", PRM | {"chosen": ["a", "b"], "first_diff": 2}, {}),
    "steps are strings": ("E203", {"prompt": "u", **SIDES}, {"format": "prmbench"}),
    "labelled steps": ("E206", {"prompt": "u", "completions": ["a"], "labels": [True]}, {}),
    "token ids": ("E206", {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, {}),
    "another format": ("E213", CHAT, {"format": "trl"}),
    "not wanted": ("E206", {"prompt": "u", "completion": "c", "label": True}, {"kinds": ("pair",)}),
    "column is missing": ("E201", CHAT, {"columns": {"prompt": "question"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_each_way_to_be_broken(case: str) -> None:
    code, row, settings = BROKEN[case]
    assert refusal(row, **settings).code == code


SUGGESTED: dict[str, tuple[tuple[str, str], list[Any], str]] = {
    "numbers": (("output_1", "output_2"), [2, 1], "label: 1=output_1 2=output_2"),
    "letters": (("response_A", "response_B"), ["A"], "label: A=response_A B=response_B"),
    "signs": (
        ("response_A", "response_B"),
        ["A>B", "tie"],
        "label: A>B=response_A B>A=response_B tie=tie",
    ),
    "models": (
        ("response_a", "response_b"),
        ["model_b", "tie (both bad)"],
        'label: model_a=response_a model_b=response_b "tie (both bad)"=tie',
    ),
    "blanks": (("response 1", "response 2"), [1, 2], 'label: 1="response 1" 2="response 2"'),
    "from zero": (("answer_0", "answer_1"), [0, 1], "label: 0=answer_0 1=answer_1"),
    "other case": (("output_a", "output_b"), ["A", "B"], "label: A=output_a B=output_b"),
    "names": (
        ("response_a", "response_b"),
        ["Response_A", "Tie"],
        "label: Response_A=response_a Response_B=response_b Tie=tie",
    ),
    "sides": (("a_left", "a_right"), ["right", "left"], "label: left=a_left right=a_right"),
    "one-hot": (("answer_a", "answer_b"), [[1, 0], [0, 1]], "label: [1,0]=answer_a [0,1]=answer_b"),
    "one vote": (("answer_a", "answer_b"), [["a"], ["b"]], "label: a=answer_a b=answer_b"),
}  # fmt: skip


@pytest.mark.parametrize("case", SUGGESTED)
def test_the_flag_that_is_suggested_can_be_followed(case: str) -> None:
    names, values, flag = SUGGESTED[case]
    rows = [{"prompt": "u", names[0]: "a", names[1]: "b", "label": value} for value in values]
    assert refusal(rows[0]).code == "E209"
    assert f"--label '{flag}'" in detect(rows).reason
    assert Label.parse(flag).answers() == names
    known = detect(rows, FormatSettings(label=flag))
    assert all(reason.startswith("[R310]") for reason in known.refused)


def test_token_ids_are_known_by_their_names() -> None:
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "id": 4}
    known = detect([row, row])
    assert (known.format, dict(known.counts), dict(known.refused)) == ("ids", {"ids": 2}, {})


def test_columns_give_names_to_keys() -> None:
    row = {"q": "u", "best": "c", "worst": "r", "prompt": "another"}
    columns = {"question": "q", "chosen": "best", "rejected": "worst"}
    decoded = decode(row, columns=columns)
    assert decoded.records == (chat_pair(U, "c", "r"),)
    assert decoded.extra_keys == ("prompt",)
    decoded = decode(row, columns={"prompt": "q", "chosen": "best", "rejected": "worst"})
    assert decoded.records == (text_pair("u", "c", "r"),)
    with pytest.raises(InvalidRecordError, match="'q' is missing"):
        decode({"best": "c", "worst": "r"}, columns=columns | {"prompt": "q"})


@pytest.mark.parametrize("label", [PAIRED, "thumb: up=good down=bad"])
def test_a_given_label_does_not_affect_other_files(label: str) -> None:
    assert only(SHP, label=label) == chat_pair(U, "c", "r")
    assert decode({"prompt": "u", "completion": "c", "label": True}, label=label).format == "kto"
    assert decode(CHAT, label=label).format == "trl-chat"


def test_null_is_as_good_as_absent_where_a_key_is_not_needed() -> None:
    table = dict.fromkeys(("messages", "completion", "label", "tools", "conversations", "history"))
    assert only(table | {"prompt": U, "chosen": C, "rejected": R}) == chat_pair(U, "c", "r")
    assert decode(table | {"completion": "c", "prompt": "u", "label": True, "chosen": None,
                           "rejected": None}).format == "kto"  # fmt: skip


def test_one_file_holds_one_kind_of_record() -> None:
    decoder = Decoder()
    decoder.decode({"prompt": "u", **SIDES}, Source("f", 1))
    decoder.decode(CHAT, Source("f", 2))
    decoder.decode(LIST, Source("f", 3))
    thumb = {"prompt": "u", "completion": "c", "label": True}
    with pytest.raises(InvalidRecordError, match=r"E204.*unpaired feedback.*f:1 is a preference"):
        decoder.decode(thumb, Source("f", 4))
    decoder.decode(thumb, Source("g", 1))


@pytest.mark.parametrize("first", [0, 1])
def test_prompts_of_one_file_are_text_or_turns_and_not_both(first: int) -> None:
    rows: list[Row] = [{"prompt": "u", **SIDES}, {"prompt": "u", "system": None, **SIDES}]
    decoder = Decoder()
    decoder.decode(rows[first], Source("f", 1))
    with pytest.raises(InvalidRecordError, match=r"E204.*f:1 is (plain|messages).*the same keys"):
        decoder.decode(rows[1 - first], Source("f", 2))
    decoder.decode(rows[first], Source("f", 3))
    decoder.decode(CHAT, Source("f", 4))
    decoder.decode(rows[1 - first], Source("g", 1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "x"}, "'x' is not one of trl"),
        ({"lists": "x"}, "not one of pairs"),
        ({"columns": {"x": "y"}}, "no format reads 'x'"),
        ({"label": "preference"}, "write it as"),
        ({"label": "preference: 1"}, "write it as"),
        ({"label": "preference: =output_1"}, "write it as"),
        ({"label": ": 1=a"}, "write it as"),
        ({"label": "a: 'b"}, "No closing quotation"),
    ],
)
def test_settings_that_cannot_be_followed(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatSettingsError, match=words):
        FormatSettings(**settings)
