"""Render chat templates exactly as transformers does, and find what they leave out of a row."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from logratio.data.messages import ASSISTANT, Turns
from logratio.data.records import Completion, InvalidRecordError, Message, Omitted, PreferenceRecord
from logratio.errors import LogratioError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning in transformers; the first one present is used."""
_DATE_STRING = "%d %b %Y"  # the format of Llama's templates
MARK = "\ue000answer\ue001"
"""A marker of private-use characters, which no template or text contains."""


class ChatTemplateError(LogratioError, ValueError):
    """A chat template is malformed, or refuses messages or fails on them."""


class ChatTemplate:
    """A compiled chat template.

    Templates are untrusted programs: they run in jinja2's sandbox and can read only the messages
    and the special tokens.

    Attributes:
        source: The template's text.
        reads_date: Whether it reads ``strftime_now`` or ``date_string``.
        date: The date that it is given, as 2026-11-29. None: it uses a constant date, or none.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], date: str | None = None
    ) -> None:
        """Compile a template.

        Args:
            source: The template's text.
            special_tokens: The text of ``bos_token``, ``eos_token`` and so on.
            date: The date of its clock (``strftime_now``), or else its ``date_string``. None: today
                for a clock, and the template's default for ``date_string``.

        Raises:
            ChatTemplateError: The template is malformed.
        """
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            names = {name.name for name in environment.parse(source).find_all(nodes.Name)}
        except jinja2.TemplateSyntaxError as error:
            reason = f"the chat template is malformed at line {error.lineno}: {error.message}"
            raise ChatTemplateError(reason) from error
        has_clock = "strftime_now" in names
        self.reads_date = has_clock or "date_string" in names
        self.date = (date or (today() if has_clock else None)) if self.reads_date else None
        self._dates: dict[str, Any] = {}
        if self.date is not None:
            at = datetime.fromisoformat(self.date)
            self._dates = (
                {"strftime_now": at.strftime}
                if has_clock
                else {"date_string": at.strftime(_DATE_STRING)}
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """Render messages as the text that a model reads.

        Args:
            messages: All turns of the chat.
            tools: Descriptions of functions (JSON schema) that the assistant may call.
            add_generation_prompt: Whether to append the header of the assistant's next turn.

        Returns:
            The rendered text.

        Raises:
            ChatTemplateError: The template refuses the messages (for example, roles that do not
                alternate) or fails on them.
        """
        shown = [_with_reasoning(message) for message in messages]
        rest = (list(tools) or None, add_generation_prompt)
        calls = [call for message in shown for call in _functions(message)]
        if not calls:
            return self._write(shown, *rest)
        return self._write_calls(shown, calls, rest)

    def _write(self, messages: list[dict[str, Any]], tools: Any, ask: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=ask,
                **self._dates,
                **self._special_tokens,
            )
        except Exception as error:  # a template may raise any exception
            raise ChatTemplateError(f"the chat template fails: {error}") from error

    def closing(self) -> str:
        """Return the text that the template writes after an answer; "" if it refuses the probe."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            return self.render(turns).rpartition(MARK)[2]
        except ChatTemplateError:
            return ""

    def _write_calls(
        self,
        messages: list[dict[str, Any]],
        calls: list[Mapping[str, Any]],
        rest: tuple[Any, bool],
    ) -> str:
        """Render messages with tool calls; their arguments become JSON strings if necessary.

        Such a template fails on an object (it joins strings), or writes its Python `repr`.
        """
        try:
            text = self._write(messages, *rest)
        except ChatTemplateError as error:
            with suppress(ChatTemplateError):
                return self._write([_with_json(message) for message in messages], *rest)
            raise error
        if any(call["arguments"] and repr(call["arguments"]) in text for call in calls):
            with suppress(ChatTemplateError):
                written = self._write([_with_json(message) for message in messages], *rest)
                if all(_tojson(call["arguments"]) in written for call in calls):
                    return written
        return text


def _functions(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the function calls of a message whose arguments are an object."""
    calls = message.get("tool_calls")
    functions = [_function(call) for call in calls] if isinstance(calls, list | tuple) else []
    return [call for call in functions if isinstance(call.get("arguments"), dict)]


def _function(call: Any) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _with_json(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the arguments of its calls as JSON strings."""
    if not _functions(message):
        return message
    return {**message, "tool_calls": [_call_with_json(call) for call in message["tool_calls"]]}


def _call_with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_json(call["function"])}
    if not isinstance(call.get("arguments"), dict):
        return dict(call)
    return {**call, "arguments": _tojson(call["arguments"])}


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Copy the reasoning to every key that templates read, and drop null values."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


class _Generation(Extension):
    """Accept ``{% generation %}``, which marks the assistant's words for other trainers."""

    tags = {"generation"}  # noqa: RUF012 (the base class has a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_pass")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _pass(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    """jinja2's ``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass `self=…`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict`` without its attributes, through which a template could escape the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        reason = f"a chat template cannot store {name!r} in a namespace"
        raise jinja2.exceptions.SecurityError(reason)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON, unlike jinja2's filter, which escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def today() -> str:
    """Return the local date, as 2026-11-29."""
    return datetime.now().date().isoformat()


_KEYS = {
    "tool_calls": "tool calls",
    "name": "a name",
    "documents": "documents",
    "refusal": "a refusal",
    **dict.fromkeys(("image", "images"), "images"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios"), "audio"),
}
"""Other keys of a message with content for the model, and their names in warnings."""

_END_OF_THOUGHT = "</think>"


class RenderedChat(Protocol):
    """A whole chat and its rendered text."""

    completion: Completion
    turns: Turns
    text: str
    answers: list[int]


def check_written(chat: RenderedChat, template: ChatTemplate, tools: Sequence[Message]) -> None:
    """Refuse a completion that the template omits entirely.

    Raises:
        InvalidRecordError: R311.
    """
    spoken = [chat.turns[index] for index in chat.answers]
    if any(content and content in chat.text for content in map(_content, spoken)):
        return
    turns = list(chat.turns)
    for index in chat.answers:
        turns[index] = {"role": ASSISTANT, "content": ""}
    if _is_same(chat.text, template, turns, tools):
        held = ", ".join(sorted({key for turn in spoken for key in _filled(turn)}))
        reason = f"the chat template writes nothing of the {chat.completion.role} answer"
        raise InvalidRecordError("R311", f"{reason}, which has {held or 'no content'}")


def omissions(
    record: PreferenceRecord, asked: str, chats: Sequence[RenderedChat], template: ChatTemplate
) -> list[str]:
    """Return warnings about the parts of a record that the template leaves out.

    Args:
        record: The record.
        asked: Its rendered prompt, with the generation prompt.
        chats: Its rendered chats, one per completion.
        template: The template.

    Returns:
        At most one W513, which names all missing parts, and one W514.
    """
    missing: dict[str, None] = {}
    is_thought_gone = False
    prompt: Turns = record.prompt if isinstance(record.prompt, tuple) else ()
    if record.tools and _is_same(asked, template, prompt, (), ask=True):
        missing["tools"] = None
    for number, chat in enumerate(chats):
        # The turns of the prompt are the same in each chat: check them once.
        for index in range(len(prompt) if number else 0, len(chat.turns)):
            for what in _left_out(chat, index, template, record.tools):
                if what == "reasoning" and index not in chat.answers:
                    is_thought_gone = True
                else:
                    missing[what] = None
    return [*[Omitted("W513", ", ".join(missing))] * bool(missing), *["W514"] * is_thought_gone]


def _left_out(
    chat: RenderedChat, index: int, template: ChatTemplate, tools: Sequence[Message]
) -> Iterator[str]:
    """Yield the names of the missing parts of one turn."""
    turn = chat.turns[index]

    def is_same(changed: Message) -> bool:
        turns = (*chat.turns[:index], changed, *chat.turns[index + 1 :])
        return _is_same(chat.text, template, turns, tools)

    content = _content(turn)
    if content and content not in chat.text:
        yield from _left_out_of_content(turn, chat.text, is_same)
    for keys, what in _groups_of_keys(turn):
        if is_same({key: value for key, value in turn.items() if key not in keys}):
            yield what


def _groups_of_keys(turn: Message) -> Iterator[tuple[Sequence[str], str]]:
    """Yield keys of a turn that are synonyms, and their name in warnings."""
    if len(turn) == 2:
        return
    if any(turn.get(key) for key in REASONING):
        yield REASONING, "reasoning"
    for key, what in _KEYS.items():
        # The name of a tool repeats that of the call before it.
        if turn.get(key) and not (key == "name" and turn["role"] == "tool"):
            yield (key,), what


def _left_out_of_content(turn: Message, text: str, is_same: Any) -> Iterator[str]:
    """Yield content with a missing line, if changing that line does not change the text."""
    content = turn["content"]
    thought, end, answer = content.rpartition(_END_OF_THOUGHT)
    for part, what in ((thought, "reasoning"), (answer, f"content of a turn of {turn['role']}")):
        lines = filter(None, map(str.strip, part.replace("<think>", "\n").splitlines()))
        line = min(lines, key=lambda line: line in text, default=None)  # the first missing line
        if line is None:
            continue
        marked = part.replace(line, line + MARK, 1)
        whole = marked + end + answer if part is thought else thought + end + marked
        if is_same({**turn, "content": whole}):
            yield what


def _filled(turn: Mapping[str, Any]) -> list[str]:
    return [key for key, value in turn.items() if key != "role" and value not in (None, "", [], {})]


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    return content.strip() if isinstance(content, str) else ""


def _is_same(
    text: str,
    template: ChatTemplate,
    turns: Sequence[Message],
    tools: Sequence[Message],
    *,
    ask: bool = False,
) -> bool:
    """Return whether a template renders other turns to the same text; False if it refuses them."""
    try:
        return template.render(turns, tools=tools, add_generation_prompt=ask) == text
    except ChatTemplateError:
        return False
