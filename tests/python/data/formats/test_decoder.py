"""Decode rows to records: every known format, its errors, and the end of the prompt."""

from typing import Any

import pytest
from chats_for_tests import assistant, hh, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logratio.data.formats import Decoded, Decoder, FormatSettings
from logratio.data.records import InvalidRecordError, Source

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SOURCE = Source("data.jsonl", 7)


def decode(row: dict[str, Any], *, demonstrations: bool = False) -> Decoded:
    settings = FormatSettings(demonstrations=demonstrations)
    decoded = Decoder(settings).decode(row, SOURCE)
    assert [record.source for record in decoded.records] == [SOURCE]
    return decoded


def code_of(row: dict[str, Any], *, demonstrations: bool = False) -> str:
    with pytest.raises(InvalidRecordError) as caught:
        decode(row, demonstrations=demonstrations)
    assert str(caught.value) == f"[{caught.value.code}] {caught.value.reason}"
    return caught.value.code


def parts(row: dict[str, Any], *, demonstrations: bool = False) -> tuple[Any, ...]:
    """Return the prompt, then role, context and answer of each completion."""
    (record,) = decode(row, demonstrations=demonstrations).records
    own = [(c.role, c.context, c.answer) for c in record.completions]
    return (record.prompt, *own)


def test_strings() -> None:
    row = {"prompt": "p", "chosen": " a", "rejected": " b", "score": float("nan"), "id": 3}
    assert parts(row) == ("p", ("chosen", "", " a"), ("rejected", "", " b"))
    assert decode(row).extra_keys == ("score", "id")


def test_messages() -> None:
    row = {"prompt": [user("u")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    expected = (
        (user("u"),),
        ("chosen", (), (assistant("a"),)),
        ("rejected", (), (assistant("b"),)),
    )
    assert parts(row) == expected


def test_messages_with_an_implicit_prompt() -> None:
    start = [{"role": "system", "content": "s"}, user("u"), assistant("a"), user("v")]
    row = {"chosen": [*start, assistant("c")], "rejected": [*start, assistant("d")]}
    prompt, chosen, rejected = parts(row)
    assert prompt == tuple(start)
    assert chosen == ("chosen", (), (assistant("c"),))
    assert rejected == ("rejected", (), (assistant("d"),))


def test_messages_whose_histories_differ_carry_them_uncounted() -> None:
    row = {
        "chosen": [user("u"), assistant("a"), user("v"), assistant("c")],
        "rejected": [user("u"), assistant("b"), user("v"), assistant("d")],
    }
    prompt, chosen, rejected = parts(row)
    assert prompt == (user("u"),)
    assert chosen == ("chosen", (assistant("a"), user("v")), (assistant("c"),))
    assert rejected == ("rejected", (assistant("b"), user("v")), (assistant("d"),))


def test_messages_that_differ_in_a_user_turn_share_no_answer_before_it() -> None:
    row = {
        "chosen": [user("u"), assistant("a"), user("v"), assistant("c")],
        "rejected": [user("u"), assistant("a"), user("w"), assistant("d")],
    }
    prompt, chosen, _ = parts(row)
    assert prompt == (user("u"),)
    assert chosen == ("chosen", (assistant("a"), user("v")), (assistant("c"),))


def test_chats_of_unequal_length() -> None:
    row = {
        "chosen": [user("u"), assistant("a"), user("v"), assistant("c")],
        "rejected": [user("u"), assistant("a")],
    }
    prompt, chosen, rejected = parts(row)
    assert prompt == (user("u"),)
    assert chosen == ("chosen", (assistant("a"), user("v")), (assistant("c"),))
    assert rejected == ("rejected", (), (assistant("a"),))


def test_prompt_ends_where_the_assistant_begins_in_every_chat() -> None:
    tools = [{"role": "tool", "content": str(number)} for number in range(3)]
    row = {
        "chosen": [user("u"), assistant("a"), tools[0], tools[1], assistant("c")],
        "rejected": [user("u"), assistant("a"), tools[0], tools[2], assistant("d")],
    }
    prompt, chosen, _ = parts(row)
    assert (prompt, chosen[2]) == ((user("u"),), tuple(row["chosen"][1:]))
    row = {
        "chosen": [user("u"), assistant("a"), assistant("c")],
        "rejected": [user("u"), assistant("a"), assistant("d")],
    }
    prompt, chosen, rejected = parts(row)
    assert prompt == (user("u"),)
    assert chosen == ("chosen", (), (assistant("a"), assistant("c")))
    assert rejected == ("rejected", (), (assistant("a"), assistant("d")))


def test_calls_of_tools_are_answers() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": "4"}
    row = {
        "prompt": [user("u")],
        "chosen": [{**call, "content": None}, tool, assistant("a")],
        "rejected": [call, tool, assistant("b")],
    }
    _, chosen, rejected = parts(row)
    read = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert chosen[2] == (read, tool, assistant("a"))
    assert rejected[2] == (read, tool, assistant("b"))


def test_transcripts_split_between_turns() -> None:
    row = {"chosen": hh("a", "b", "c", "The sky"), "rejected": hh("a", "b", "c", "The sky is")}
    assert parts(row) == (
        hh("a", "b", "c") + "\n\nAssistant:",
        ("chosen", "", " The sky"),
        ("rejected", "", " The sky is"),
    )


def test_transcripts_whose_histories_differ() -> None:
    row = {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "x", "c", "e")}
    assert parts(row) == (
        hh("a") + "\n\nAssistant:",
        ("chosen", " b\n\nHuman: c\n\nAssistant:", " d"),
        ("rejected", " x\n\nHuman: c\n\nAssistant:", " e"),
    )


def test_transcripts_that_differ_in_a_human_turn() -> None:
    row = {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "x", "e")}
    prompt, chosen, _ = parts(row)
    assert prompt == hh("a") + "\n\nAssistant:"
    assert chosen == ("chosen", " b\n\nHuman: c\n\nAssistant:", " d")


def test_transcripts_of_unequal_length() -> None:
    row = {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b")}
    assert parts(row) == (
        hh("a") + "\n\nAssistant:",
        ("chosen", " b\n\nHuman: c\n\nAssistant:", " d"),
        ("rejected", "", " b"),
    )


def test_transcripts_without_a_shared_turn_and_with_a_preamble() -> None:
    prompt, chosen, _ = parts({"chosen": hh("a", "b"), "rejected": hh("x", "y")})
    assert (prompt, chosen) == ("", ("chosen", hh("a") + "\n\nAssistant:", " b"))
    row = {"chosen": "Rules." + hh("a", "b"), "rejected": "Rules." + hh("a", "c")}
    assert parts(row)[0] == "Rules." + hh("a") + "\n\nAssistant:"
    row = {"chosen": "Rules." + hh("a", "b"), "rejected": "None." + hh("a", "c")}
    assert parts(row)[0] == ""


words = st.text("ab :\n", max_size=6).filter(lambda text: "\n\n" not in text and text.strip())
chats = st.lists(words, min_size=2, max_size=8).filter(lambda turns: len(turns) % 2 == 0)


@patient
@given(chats, chats)
def test_no_character_of_a_transcript_is_lost(left: list[str], right: list[str]) -> None:
    row = {"chosen": hh(*left), "rejected": hh(*right)}
    if left == right:
        assert code_of(row) == "R302"
        return
    prompt, *completions = parts(row)
    assert prompt == "" or prompt.endswith("\n\nAssistant:")
    for (_, context, answer), turns in zip(completions, (left, right), strict=True):
        assert prompt + context + answer == hh(*turns)
        assert answer == " " + turns[-1]


def test_demonstrations() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "chosen": "c", "rejected": ""},
    ]
    for row in rows:
        assert parts(row, demonstrations=True) == ("p", ("demonstration", "", "c"))
    chat = {"prompt": [user("u")], "completion": [assistant("a")]}
    expected = ((user("u"),), ("demonstration", (), (assistant("a"),)))
    assert parts(chat, demonstrations=True) == expected


def test_demonstration_of_many_turns_teaches_every_answer() -> None:
    turns = [user("u"), assistant("a"), user("v"), assistant("b")]
    prompt, demonstration = parts({"messages": turns}, demonstrations=True)
    assert prompt == (user("u"),)
    assert demonstration == ("demonstration", (), tuple(turns[1:]))


CHAT: dict[str, Any] = {
    "prompt": [user("u")],
    "chosen": [assistant("a")],
    "rejected": [assistant("b")],
}
TEXT: dict[str, Any] = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no rejected": ("E201", {"prompt": "p", "chosen": "a"}),
    "no chosen": ("E201", {"prompt": "p", "rejected": "a"}),
    "no prompt": ("E201", {"chosen": "a", "rejected": "b"}),
    "no role": ("E201", CHAT | {"prompt": [{"content": "u"}]}),
    "no content": ("E201", CHAT | {"prompt": [{"role": "user"}]}),
    "null prompt": ("E202", TEXT | {"prompt": None}),
    "null chosen": ("E202", TEXT | {"chosen": None}),
    "null role": ("E202", CHAT | {"prompt": [{"role": None, "content": "u"}]}),
    "null content": ("E202", CHAT | {"prompt": [{"role": "user", "content": None}]}),
    "number": ("E203", TEXT | {"chosen": 3}),
    "boolean": ("E203", TEXT | {"rejected": True}),
    "object": ("E206", TEXT | {"chosen": {"from": "gpt", "value": "a"}}),
    "boolean in a list": ("E203", TEXT | {"chosen": [True]}),
    "strings in a list": ("E203", CHAT | {"chosen": ["a", "b"]}),
    "content in parts": ("E203", CHAT | {"chosen": [{"role": "assistant", "content": ["a"]}]}),
    "role is a number": ("E203", CHAT | {"prompt": [{"role": 1, "content": "u"}]}),
    "mixed": ("E206", TEXT | {"chosen": [assistant("a")]}),
    "mixed without prompt": ("E206", {"chosen": hh("a", "b"), "rejected": [assistant("a")]}),
    "unknown keys": ("E206", {"instruction": "i", "output_1": "a", "output_2": "b"}),
    "no label's meaning": ("E209", {"prompt": "p", "output_1": "a", "output_2": "b", "label": 1}),
    "no keys": ("E206", {}),
    "demonstration": ("E206", {"prompt": "p", "completion": "c"}),
    "messages": ("E206", {"messages": [user("u"), assistant("a")]}),
    "tools next to plain text": ("E206", TEXT | {"tools": [{"name": "f"}]}),
    "a picture next to the prompt": ("E206", TEXT | {"images": ["a.png"]}),
    "system next to a transcript": (
        "E206",
        {"chosen": hh("a", "b"), "rejected": hh("a", "c"), "system": "Be kind."},
    ),
    "no user": ("E403", CHAT | {"prompt": [{"role": "system", "content": "s"}]}),
    "empty prompt": ("E403", CHAT | {"prompt": []}),
    "prompt ends with an answer": ("E403", CHAT | {"prompt": [user("u"), assistant("a")]}),
    "user answers": ("E403", CHAT | {"chosen": [user("a")]}),
    "answer begins with a user": ("E403", CHAT | {"chosen": [user("u"), assistant("a")]}),
    "answer begins with a tool": (
        "E403",
        CHAT | {"chosen": [{"role": "tool", "content": "4"}, assistant("a")]},
    ),
    "prompt ends with the assistant": ("E403", CHAT | {"prompt": [user("u"), assistant("S")]}),
    "unknown role": ("E403", CHAT | {"chosen": [{"role": "asistant", "content": "a"}]}),
    "answers that differ in what follows": (
        "R302",
        CHAT | {"chosen": [assistant("b"), user("u")], "rejected": [assistant("b"), user("v")]},
    ),
    "chat ends with a user": ("E403", {"chosen": [user("u")], "rejected": [assistant("a")]}),
    "nothing shared": (
        "E403",
        {"chosen": [user("u"), assistant("a")], "rejected": [user("v"), assistant("b")]},
    ),
    "transcript ends with a human": (
        "E403",
        {"chosen": hh("a", "b", "c"), "rejected": hh("a", "d")},
    ),
    "half a transcript": ("E403", {"chosen": hh("a", "b"), "rejected": "x"}),
    "empty chosen": ("R301", TEXT | {"chosen": ""}),
    "blank rejected": ("R301", TEXT | {"rejected": " \n"}),
    "both empty": ("R301", TEXT | {"chosen": "", "rejected": ""}),
    "empty messages": ("R301", CHAT | {"chosen": []}),
    "empty content": ("R301", CHAT | {"chosen": [assistant(" ")]}),
    "empty last turn": ("R301", {"chosen": hh("a", "b"), "rejected": hh("a", "")}),
    "identical": ("R302", TEXT | {"chosen": "b"}),
    "identical messages": ("R302", CHAT | {"chosen": [assistant("b")]}),
    "identical transcripts": ("R302", {"chosen": hh("a", "b"), "rejected": hh("a", "b")}),
    "identical chats": ("R302", {"chosen": (c := [user("u"), assistant("a")]), "rejected": c}),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_rows(fault: str) -> None:
    code, row = BAD[fault]
    assert code_of(row) == code


BAD_DEMONSTRATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "unpaired feedback": ("E206", {"prompt": "p", "completion": "c", "label": False}),
    "labelled messages": ("E206", {"messages": [user("u"), assistant("a")], "label": True}),
    "mixed": ("E203", {"prompt": [user("u")], "completion": ["a"]}),
    "no prompt": ("E201", {"completion": "c"}),
    "null": ("E202", {"messages": None}),
    "string": ("E203", {"messages": "u"}),
    "no answer": ("R301", {"messages": [user("u")]}),
    "no question": ("E403", {"messages": [assistant("a")]}),
    "empty": ("R301", {"prompt": "p", "completion": ""}),
    "nothing": ("E206", {"text": "t"}),
}


@pytest.mark.parametrize("fault", BAD_DEMONSTRATIONS)
def test_bad_demonstrations(fault: str) -> None:
    code, row = BAD_DEMONSTRATIONS[fault]
    assert code_of(row, demonstrations=True) == code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab ", max_size=3) | st.just(hh("a", "b")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["prompt", "chosen", "rejected", "completion", "messages", "label", "x"]


@patient
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5), st.booleans())
def test_any_row_is_a_record_or_an_invalid_record_error(
    row: dict[str, Any], demonstrations: bool
) -> None:
    try:
        (record,) = decode(row, demonstrations=demonstrations).records
    except InvalidRecordError:
        return
    assert len(record.completions) == (1 if demonstrations else 2)
