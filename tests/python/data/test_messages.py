"""Messages in every spelling, weights of turns, and the rendering of chats."""

from typing import Any

import pytest
from chats_for_tests import assistant, gpt, human, user
from tokenizers_for_tests import CHATML

from logratio.data import conversations
from logratio.data.formats import Decoder
from logratio.data.messages import read_messages
from logratio.data.records import Completion, InvalidRecordError, PreferenceRecord, Source
from logratio.data.tokenization.chat_template import ChatTemplate
from logratio.data.tokenization.rendering import Script, chat_script

HERE = Source("f", 1)
Row = dict[str, Any]
CALL = {"name": "f", "arguments": {"a": 1}}
TOOLS = (
    "{% if tools %}<tools>{{ tools | map(attribute='name') | join(' ') }}</tools>{% endif %}"
    + CHATML
)


def read(*messages: Row) -> list[Row]:
    return [dict(message) for message in read_messages(messages, "chat")]


SPELLINGS: dict[str, tuple[Row, Row]] = {
    "role and content": (user("u"), user("u")),
    "ShareGPT": (human("u"), user("u")),
    "ShareGPT's assistant": (gpt("a"), assistant("a")),
    "ShareGPT's tool": ({"from": "observation", "value": "4"}, {"role": "tool", "content": "4"}),
    "capitals": ({"from": "Human", "value": "u"}, user("u")),
    "capitals of a role": ({"role": "Assistant", "content": "a"}, assistant("a")),
    "OASST's user": ({"role": "prompter", "content": "u"}, user("u")),
    "Gemma's assistant": ({"role": "model", "content": "a"}, assistant("a")),
    "LangChain's assistant": ({"role": "ai", "content": "a"}, assistant("a")),
    "OpenAI's older tool": (
        {"role": "function", "name": "f", "content": "4"},
        {"role": "tool", "name": "f", "content": "4"},
    ),
    "a developer": ({"role": "Developer", "content": "d"}, {"role": "developer", "content": "d"}),
    "ms-swift's call": (
        {"role": "tool_call", "content": '{"name": "f", "arguments": "{\\"a\\": 1}"}'},
        assistant("", tool_calls=[{"type": "function", "function": CALL}]),
    ),
    "parts": (
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}],
        },
        user("ab"),
    ),
    "parts with nulls": (
        {"role": "user", "content": [{"type": "text", "text": "a", "value": None, "image": None}]},
        user("a"),
    ),
    "null keys": (user("u", name=None, tool_calls=None), user("u")),
    "other keys": (
        assistant("a", name="n", reasoning="r"),
        assistant("a", name="n", reasoning="r"),
    ),
    "a call without words": (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        assistant("", tool_calls=[{"type": "function", "function": CALL}]),
    ),
    "an empty list of calls": (assistant("a", tool_calls=[], function_call=None), assistant("a")),
    "a call that keeps its id": (
        {"role": "assistant", "tool_calls": [{"id": "c", "name": "f", "arguments": "{}"}]},
        assistant(
            "",
            tool_calls=[
                {"type": "function", "id": "c", "function": {"name": "f", "arguments": {}}}
            ],
        ),
    ),
    "blank arguments": (
        {"role": "assistant", "function_call": {"name": "f", "arguments": " \n"}},
        assistant(
            "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]
        ),
    ),
    "a null inside arguments": (
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": null}'}},
        assistant(
            "",
            tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"a": None}}}],
        ),
    ),
    "one call under two names": (
        assistant("a", tool_calls=[CALL], function_call=CALL),
        assistant("a", tool_calls=[{"type": "function", "function": CALL}]),
    ),
    "ShareGPT's call": (
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        assistant("", tool_calls=[{"type": "function", "function": CALL}]),
    ),
    "ShareGPT's calls": (
        {"from": "function_call", "value": [CALL, CALL]},
        assistant("", tool_calls=[{"type": "function", "function": CALL}] * 2),
    ),
    "weight": (assistant("a", weight=0), assistant("a", weight=0)),
    "loss_weight": (assistant("a", loss_weight=1.0), assistant("a", weight=1)),
    "train": (assistant("a", train=False), assistant("a", weight=0)),
    "weight of null": (assistant("a", weight=None), assistant("a")),
    "a user's weight": (user("u", loss_weight=0.0, train=False), user("u")),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case: str) -> None:
    given, expected = SPELLINGS[case]
    assert read(given) == [expected]


BAD: dict[str, tuple[str, Row | str]] = {
    "string": ("E203", "u"),
    "image": ("E207", {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
    "part is a string": ("E203", {"role": "user", "content": ["u"]}),
    "part without text": ("E203", {"role": "user", "content": [{"type": "text"}]}),
    "part with two texts": ("E203", {"role": "user", "content": [{"text": "a", "value": "b"}]}),
    "part of a number": ("E203", {"role": "user", "content": [{"text": 1}]}),
    "speaker": ("E403", {"from": "narrator", "value": "u"}),
    "unknown role": ("E403", {"role": "asistant", "content": "a"}),
    "blank role": ("E403", {"role": "", "content": "a"}),
    "role of a number": ("E203", {"role": 1, "content": "a"}),
    "null role": ("E202", {"role": None, "content": "a"}),
    "value of a number": ("E203", {"from": "human", "value": 1}),
    "value of null": ("E202", {"from": "human", "value": None}),
    "call without a name": ("E203", {"from": "function_call", "value": "{}"}),
    "call that is no JSON": ("E203", {"from": "function_call", "value": "f()"}),
    "no call": ("E203", {"from": "function_call", "value": "[]"}),
    "calls that are no objects": ("E203", assistant("a", tool_calls=["f"])),
    "a call that has no name": ("E203", assistant("a", tool_calls=[{"function": {}}])),
    "two calls": ("E210", assistant("a", tool_calls=[CALL], function_call={"name": "g"})),
    **{
        f"arguments {arguments!r}": (
            "R312",
            assistant("a", tool_calls=[{"function": {"name": "f", "arguments": arguments}}]),
        )
        for arguments in ("{", "[1]", "3", "null", [1], 3, '{"a": 1, "a": 2}', "a=1")
    },
    "no number": ("E208", assistant("a", weight=float("nan"))),
    "an infinite weight": ("E208", assistant("a", weight=float("-inf"))),
    "a huge weight": ("E208", assistant("a", weight=1e5)),
    "weight of text": ("E208", assistant("a", weight="1")),
    "weights that differ": ("E208", assistant("a", weight=1, train=False)),
    "a user that counts": ("E208", user("u", weight=1)),
    "a bad user": ("E208", user("u", weight=-1)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_messages(case: str) -> None:
    code, message = BAD[case]
    with pytest.raises(InvalidRecordError) as caught:
        read_messages([user("before"), message], "chat")
    assert caught.value.code == code
    assert "message 2 of 'chat'" in caught.value.reason


def sides(chosen: list[Row], rejected: list[Row]) -> PreferenceRecord:
    row = {"chosen": chosen, "rejected": rejected}
    (record,) = Decoder().decode(row, HERE).records
    return record


def test_weights_choose_the_turns_that_count() -> None:
    record = sides(
        [user("u"), assistant("a", weight=1), user("v"), assistant("b", weight=0)],
        [user("u"), assistant("c", weight=0), user("v"), assistant("d")],
    )
    chosen, rejected = record.completions
    assert record.prompt == (user("u"),)
    later = (assistant("a"), user("v"), assistant("b", weight=0))
    assert (chosen.context, chosen.answer) == ((), later)
    assert (rejected.context, rejected.answer) == (
        (assistant("c"), user("v")),
        (assistant("d"),),
    )


def test_every_turn_of_a_weighted_chat_may_count() -> None:
    record = sides(
        [user("u"), assistant("a", train=True), user("v"), assistant("b", train=True)],
        [user("u"), assistant("c", train=True), user("v"), assistant("d", train=True)],
    )
    assert [side.context for side in record.completions] == [(), ()]
    assert record.completions[0].answer == (assistant("a"), user("v"), assistant("b"))


def test_weights_of_shared_turns_change_nothing() -> None:
    plain = sides(
        [user("u"), assistant("a"), user("v"), assistant("b")],
        [user("u"), assistant("a"), user("v"), assistant("c")],
    )
    weighted = sides(
        [user("u", weight=0), assistant("a", weight=1), user("v"), assistant("b", weight=1)],
        [user("u", weight=0), assistant("a", weight=0), user("v"), assistant("c", weight=1)],
    )
    assert weighted == plain


def test_any_weight_is_kept_but_1() -> None:
    turns = read_messages([assistant("a", loss_weight=-0.5), assistant("b", weight=1)], "chat")
    assert [turn["weight"] for turn in turns] == [-0.5, 1]
    given = [assistant("a", weight=w) for w in (-0.5, 1, 0, 2)]
    assert conversations.answer(given, "chosen") == (
        assistant("a", weight=-0.5),
        assistant("a"),
        assistant("a", weight=0),
        assistant("a", weight=2),
    )


def test_a_turn_that_is_good_on_one_side_and_bad_on_the_other_is_not_shared() -> None:
    start = [user("u"), assistant("a"), user("v")]
    record = sides(
        [user("u"), assistant("a", weight=-1), user("v"), assistant("b")],
        [*start, assistant("c")],
    )
    assert record.prompt == (user("u"),)
    chosen, rejected = record.completions
    assert chosen.answer == (assistant("a", weight=-1), user("v"), assistant("b"))
    assert (rejected.context, rejected.answer) == (tuple(start[1:]), (assistant("c"),))
    same = sides(
        [user("u"), assistant("a", weight=-1), user("v"), assistant("b")],
        [user("u"), assistant("a", weight=-1), user("v"), assistant("c")],
    )
    assert same == sides([*start, assistant("b")], [*start, assistant("c")])


def test_weights_by_which_nothing_counts_are_refused() -> None:
    with pytest.raises(InvalidRecordError, match="E208"):
        sides([user("u"), assistant("a", weight=0)], [user("u"), assistant("b")])
    with pytest.raises(InvalidRecordError, match="E208"):
        conversations.answer([assistant("a", weight=0)], "chosen")


def script(prompt: list[Row], *completions: Completion, **more: Any) -> Script:
    template = ChatTemplate(TOOLS, {})
    record = PreferenceRecord(tuple(prompt), completions, HERE, **more)
    return chat_script(record, template, None)


def marked(found: Script, index: int = 0) -> str:
    return "".join(f"[{p.text}]" if p.counts else p.text for p in found.completions[index])


def test_turns_of_weight_0_are_rendered_but_not_trained() -> None:
    answer = (assistant("a"), user("v"), assistant("b", weight=0), user("w"), assistant("c"))
    found = script([user("u")], Completion("chosen", answer, ()))
    assert marked(found) == (
        "[a<|im_end|>\n]<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nw<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>\n]"
    )


def test_no_template_sees_a_weight() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{% endfor %}", {})
    answer = (assistant("a"), user("v"), assistant("b", weight=0))
    record = PreferenceRecord((user("u"),), (Completion("chosen", answer, ()),), HERE)
    text = list(chat_script(record, template, None).running_texts())[-1]
    assert "weight" not in text and '"content": "a"' in text


def test_a_step_follows_its_question_and_has_no_eos() -> None:
    found = script([user("u")], Completion("chosen", "2. b", "1. a\n"), ends=False)
    assert found.prompt.endswith("<|im_start|>assistant\n")
    assert marked(found) == "1. a\n[2. b]"
    assert found.notes == ()
    assert marked(script([user("u")], Completion("chosen", "1. a"), ends=False)) == "[1. a]"


def test_tools_reach_the_template_with_and_without_the_answer() -> None:
    answer = (assistant("a"),)
    found = script([user("u")], Completion("chosen", answer, ()), tools=({"name": "f"},))
    assert found.prompt.startswith("<tools>f</tools>")
    assert marked(found) == "[a<|im_end|>\n]"
    assert found.notes == ()
    assert script([user("u")], Completion("chosen", answer, ())).prompt.startswith("<|im_start|>")


def test_a_refused_call_is_named() -> None:
    with pytest.raises(InvalidRecordError) as caught:
        read(
            user("u"), {"from": "function_call", "value": [CALL, {"name": "g", "arguments": "{a"}]}
        )
    assert caught.value.reason.startswith(
        "the arguments of the call of 'g' in message 2 of 'chat' are not a JSON object: {a ("
    )


def test_an_unknown_role_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        InvalidRecordError, match=r"message 2 of 'chat' has .* role 'critic'.* user,"
    ):
        read(user("u"), {"role": "critic", "content": "Hm."})


def pair(chosen: list[Row], rejected: list[Row]) -> Script:
    (record,) = Decoder().decode({"chosen": chosen, "rejected": rejected}, HERE).records
    return chat_script(record, ChatTemplate(CHATML, {}), None)


def test_turns_after_the_last_answer_are_dropped_with_a_warning() -> None:
    tool = {"role": "tool", "content": "4"}
    chosen, rejected = [user("u"), assistant("a")], [user("u"), assistant("b")]
    plain = pair(chosen, rejected)
    assert plain.notes == ()
    for more in ([user("v")], [tool], [tool, user("v")]):
        for sides in ((chosen + more, rejected + more), (chosen + more, rejected)):
            found = pair(*sides)
            assert (found.prompt, found.completions) == (plain.prompt, plain.completions)
            assert found.notes == ("W515",)


def test_a_tool_may_speak_inside_an_answer() -> None:
    call = {"role": "function_call", "content": '{"name": "f", "arguments": {}}'}
    answer = [call, {"role": "ipython", "content": "4"}, {"role": "gpt", "content": "It is 4."}]
    found = pair([user("u"), *answer], [user("u"), assistant("b")])
    text = "".join(piece.text for piece in found.completions[0] if piece.counts)
    assert "It is 4." in text and "ipython" not in text and "tool" not in text


def test_roles_in_other_words_are_read() -> None:
    row = {
        side: [{"role": "Human", "content": "hi"}, {"role": "Assistant", "content": text}]
        for side, text in (("chosen", "Hello!"), ("rejected", "No."))
    }
    found = pair(row["chosen"], row["rejected"])
    assert found.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert marked(found) == "[Hello!<|im_end|>\n]"
