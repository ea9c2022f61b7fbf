"""TRL's chat templates: the trained text equals that of transformers, or a code reports it."""

import json
from typing import Any

import pytest
from chats_for_tests import assistant, system, user
from transformers.utils.chat_template_utils import render_jinja_template
from trl_templates import EOS, FOLDER, TEMPLATES, TOKENS, template

from logratio.data import ChatTemplate, Completion, InvalidRecordError, PreferenceRecord, Source
from logratio.data.formats import Decoder
from logratio.data.tokenization.rendering import Script, chat_script

Turn = dict[str, Any]
Chat = tuple[tuple[Turn, ...], tuple[Turn, ...], tuple[Turn, ...], tuple[Turn, ...]]

R1_EOS = "<\uff5cend▁of▁sentence\uff5c>"  # R1's template writes it by name
HERE = Source("data.jsonl", 1)

CALL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "mul", "arguments": {"a": 3, "b": 18}},
}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "mul",
            "description": "multiply",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    },
)
CALLS = assistant("", tool_calls=[CALL])
RESULT = {"role": "tool", "content": "fifty-four", "name": "mul"}
GOOD, BAD = assistant("It is 54."), assistant("About 50.")
THOUGHT, GUESSED = (
    assistant("<think>\n3*18=54\n</think>\n\nIt is 54."),
    assistant("<think>\nI guess.\n</think>\n\nAbout 50."),
)
REASONED, HASTY = (
    assistant("It is 54.", reasoning_content="3*18=54"),
    assistant("About 50.", reasoning_content="I guess."),
)
CHATS: dict[str, Chat] = {
    "plain": ((user("Q?"),), (GOOD,), (BAD,), ()),
    "system": ((system("Be kind."), user("Q?")), (GOOD,), (BAD,), ()),
    "turns": ((user("Q?"), assistant("One."), user("And?")), (GOOD,), (BAD,), ()),
    "empty turn": ((user("Q?"), assistant(""), user("And?")), (GOOD,), (BAD,), ()),
    "call": ((user("Q?"),), (CALLS,), (BAD,), TOOLS),
    "result": ((user("Q?"), CALLS, RESULT), (GOOD,), (BAD,), TOOLS),
    "call, result, answer": ((user("Q?"),), (CALLS, RESULT, GOOD), (BAD,), TOOLS),
    "reasoning": ((user("Q?"),), (REASONED,), (HASTY,), ()),
    "reasoning on one side": ((user("Q?"),), (REASONED,), (BAD,), ()),
    "reasoning before": (
        (user("Q?"), assistant("One.", reasoning_content="r"), user("And?")),
        (REASONED,),
        (HASTY,),
        (),
    ),
    "thinking": ((user("Q?"),), (THOUGHT,), (GUESSED,), ()),
    "thinking on one side": ((user("Q?"),), (THOUGHT,), (BAD,), ()),
    "thinking before": (
        (user("Q?"), assistant("<think>\nr\n</think>\n\nOne."), user("And?")),
        (THOUGHT,),
        (GUESSED,),
        (),
    ),
    "several answers": (
        (user("Q?"),),
        (assistant("One.", reasoning_content="r"), user("And?"), REASONED),
        (assistant("Two."), user("And?"), BAD),
        (),
    ),
}


def theirs(name: str, turns: tuple[Turn, ...], tools: tuple[Turn, ...], ask: bool) -> str | None:
    """Render as transformers does; None if the template refuses.

    Templates that join arguments to strings get JSON, which their models' authors pass them.
    """
    text = rendered(name, turns, tools, ask)
    return rendered(name, tuple(map(with_json, turns)), tools, ask) if text is None else text


def with_json(turn: Turn) -> Turn:
    if turn.get("tool_calls") != [CALL]:
        return turn
    arguments = json.dumps(CALL["function"]["arguments"])
    return turn | {"tool_calls": [CALL | {"function": CALL["function"] | {"arguments": arguments}}]}


def rendered(name: str, turns: tuple[Turn, ...], tools: tuple[Turn, ...], ask: bool) -> str | None:
    try:
        texts = render_jinja_template(
            [list(turns)],
            tools=list(tools) or None,
            chat_template=(FOLDER / f"{name}.jinja").read_text(),
            add_generation_prompt=ask,
            **TOKENS,
        )
    except Exception:
        return None
    return str(texts[0][0])


def script(name: str, chat: Chat) -> Script:
    prompt, chosen, rejected, tools = chat
    sides = (Completion("chosen", chosen, ()), Completion("rejected", rejected, ()))
    return chat_script(PreferenceRecord(prompt, sides, HERE, tools), template(name), EOS)


def text_of(found: Script, side: int) -> str:
    return found.prompt + "".join(piece.text for piece in found.completions[side])


def counted(found: Script, side: int) -> str:
    return "".join(piece.text for piece in found.completions[side] if piece.counts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_and_its_answer_equal_transformers_text(name: str) -> None:
    """For each template and chat: the same text, or a refusal with the reason."""
    for kind, chat in CHATS.items():
        prompt, chosen, rejected, tools = chat
        asked = theirs(name, prompt, tools, True)
        whole = [theirs(name, (*prompt, *side), tools, False) for side in (chosen, rejected)]
        try:
            found = script(name, chat)
        except InvalidRecordError as error:
            if error.code == "R311":  # equal to an empty answer
                nothing = (*prompt, assistant(""))
                assert whole[0] == theirs(name, nothing, tools, False), kind
            else:
                assert error.code == "E403", (kind, error)
                assert None in (asked, *whole), kind
            continue
        assert asked is not None
        assert asked.startswith(found.prompt), kind
        assert ("W512" in found.notes) == (found.prompt != asked), kind
        for side, text in enumerate(whole):
            assert text is not None
            ours = text_of(found, side)
            assert text.startswith(ours), kind
            assert not text[len(ours) :].strip(), kind
            assert "Q?" not in counted(found, side), kind
            assert "And?" not in counted(found, side), kind
            # Only if not every answer begins with the generation prompt.
            if found.prompt != asked:
                assert not all(one and one.startswith(asked) for one in whole), kind


@pytest.mark.parametrize(
    ("name", "kind", "end", "chosen"),
    [
        ("deepseek_r1_distill", "plain", "<\uff5cAssistant\uff5c>", "It is 54." + R1_EOS),
        # R1's template removes the reasoning from every answer.
        ("deepseek_r1_distill", "thinking", "<\uff5cAssistant\uff5c>", "\n\nIt is 54." + R1_EOS),
        ("nemotron_3_nano", "plain", "assistant\n<think>", "</think>It is 54.<|im_end|>\n"),
        (
            "nemotron_3_nano",
            "reasoning",
            "assistant\n<think>\n",
            "3*18=54\n</think>\nIt is 54.<|im_end|>\n",
        ),
        (
            "nemotron_3_nano",
            "reasoning on one side",
            "assistant\n<think>",
            "\n3*18=54\n</think>\nIt is 54.<|im_end|>\n",
        ),
        ("qwen3", "plain", "assistant\n", "<think>\n\n</think>\n\nIt is 54.<|im_end|>\n"),
        ("qwen3", "thinking", "assistant\n", "<think>\n3*18=54\n</think>\n\nIt is 54.<|im_end|>\n"),
        ("qwen3_5_think", "plain", "assistant\n<think>\n", "\n</think>\n\nIt is 54.<|im_end|>\n"),
        (
            "qwen3_5_nothink",
            "thinking",
            "assistant\n<think>",
            "\n3*18=54\n</think>\n\nIt is 54.<|im_end|>\n",
        ),
        ("qwen3_5_nothink", "plain", "</think>\n\n", "It is 54.<|im_end|>\n"),
        ("llama3", "plain", "assistant<|end_header_id|>\n\n", "It is 54.<|eot_id|>"),
    ],
)
def test_where_prompts_of_thinking_templates_end(
    name: str, kind: str, end: str, chosen: str
) -> None:
    found = script(name, CHATS[kind])
    assert found.prompt.endswith(end)
    assert counted(found, 0) == chosen


def test_a_prompt_depends_on_no_single_answer() -> None:
    """Answers that begin like the generation prompt do not move the boundary."""
    prompts = set()
    for content in ("fine", "<", "<think", "think>", "<b>fine</b>", "\n", "\n\nfine"):
        side = (assistant(content + " indeed"),)
        found = script("deepseek_r1_distill", ((user("Q?"),), side, (BAD,), ()))
        assert counted(found, 0).strip() == (content + " indeed").strip() + R1_EOS
        prompts.add(found.prompt)
    assert len(prompts) == 1


def notes(name: str, kind: str) -> dict[str, str]:
    """Return each code with its description."""
    return {str(code): getattr(code, "what", "") for code in script(name, CHATS[kind]).notes}


def test_omissions_of_a_template_are_named() -> None:
    assert notes("llama3_1", "call") == {}
    assert notes("qwen2_5", "reasoning") == {"W513": "reasoning"}
    assert notes("qwen2_5", "thinking") == {}
    assert notes("qwen3", "reasoning") == {}
    assert notes("qwen3", "reasoning before") == {"W514": ""}
    assert notes("qwen3", "thinking before") == {"W514": ""}
    assert notes("qwen3", "several answers") == {"W513": "reasoning"}
    assert notes("deepseek_r1_distill", "thinking") == {"W512": "", "W513": "reasoning"}
    assert notes("gemma", "reasoning") == {"W513": "reasoning"}
    assert notes("phi3", "call, result, answer") == {
        "W513": "tools, tool calls, content of a turn of tool"
    }


def test_names_and_turns_of_unknown_roles_are_named() -> None:
    prompt = (user("Q?", name="Ann"), {"role": "critic", "content": "Hm."})
    found = script("phi3", (prompt, (GOOD,), (BAD,), ()))
    assert [getattr(code, "what", code) for code in found.notes] == [
        "a name, content of a turn of critic"
    ]


@pytest.mark.parametrize("name", ["gemma", "phi3", "llama3", "deepseek_r1_distill"])
def test_an_answer_of_which_nothing_is_written_is_refused(name: str) -> None:
    with pytest.raises(InvalidRecordError, match=r"R311.*nothing of the chosen answer") as caught:
        script(name, CHATS["call"])
    assert "which has tool_calls" in caught.value.reason


def test_an_answer_without_content_is_described_so() -> None:
    empty = assistant("", tool_calls=[], reasoning_content=None)
    with pytest.raises(InvalidRecordError, match=r"R311.*which has no content$"):
        script("qwen2_5", ((user("Q?"),), (empty,), (BAD,), ()))


def test_reasoning_alone_is_not_an_answer_if_not_rendered() -> None:
    thought = assistant("", reasoning_content="3*18=54")
    with pytest.raises(InvalidRecordError, match="R311"):
        script("qwen2_5", ((user("Q?"),), (thought,), (BAD,), ()))
    assert "3*18=54" in counted(script("qwen3", ((user("Q?"),), (thought,), (BAD,), ())), 0)


CALL_TEMPLATES = ("llama3_1", "qwen2_5", "qwen3", "deepseekv3", "gemma4", "glm4moe", "qwen3_6")


@pytest.mark.parametrize("name", CALL_TEMPLATES)
def test_calls_in_every_spelling_have_one_text(name: str) -> None:
    """Templates that encode arguments, join them to strings, or list them, with and without."""
    function = {"name": "mul", "arguments": '{"a": 3, "b": 18}'}
    spellings: list[list[Turn]] = [
        [CALLS],
        [assistant("", tool_calls=[{"type": "function", "function": function}])],
        [assistant("", tool_calls=[function])],
        [assistant("", tool_calls=json.dumps([function]))],
        [assistant("", function_call=function)],
        [{"role": "assistant", "content": None, "function_call": function}],
        [{"from": "function_call", "value": json.dumps(function)}],
    ]
    texts = set()
    for spelling in spellings:
        row = {"prompt": [user("Q?")], "chosen": spelling, "rejected": [BAD], "tools": [*TOOLS]}
        (record,) = Decoder().decode(row, HERE).records
        found = chat_script(record, template(name), EOS)
        assert not any("tool calls" in getattr(note, "what", "") for note in found.notes)
        texts.add(counted(found, 0).replace(" \n", "\n"))
    (text,) = texts
    assert "mul" in text and "18" in text and "\\" not in text
    assert ('"{' not in text) and ("{'" not in text)


def test_a_template_that_writes_raw_arguments_gets_json() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %};{% endfor %}"
    )
    for arguments in ({"a": "it's"}, {"a": None, "b": [True]}, {}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        text = ChatTemplate(source, {}).render([user("Q?"), assistant("", tool_calls=[call])])
        assert text == f"user: Q?;assistant: {json.dumps(arguments)};"
    # If it encodes them, words that look like Python change nothing.
    source = source.replace("c.function.arguments", "c.function.arguments | tojson")
    turns = [user("{'a': 1}"), assistant("", tool_calls=[{"name": "f", "arguments": {"a": 1}}])]
    source = source.replace("c.function", "c")
    assert ChatTemplate(source, {}).render(turns).endswith('assistant: {"a": 1};')
