"""Chat templates, rendered exactly as transformers does, and what they leave out of a row."""

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
"""Names of a message's reasoning, as transformers knows them; the first that is given counts."""
_DATE_STRING = "%d %b %Y"  # as Llama's templates write their own
MARK = "\ue000answer\ue001"
"""Of private use: no template and no text holds it."""


class ChatTemplateError(LogratioError, ValueError):
    """A chat template is malformed, or refuses or fails on these messages."""


class ChatTemplate:
    """A compiled chat template.

    Templates are programs from strangers: they run in jinja2's sandbox and can read the messages
    and the special tokens only.

    Attributes:
        source: The template's text.
        reads_date: Whether it has a clock or a ``date_string``.
        date: What it writes as the date, as 2026-11-29; None where it has its own, or none.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], date: str | None = None
    ) -> None:
        """Compile a template.

        Args:
            source: The template's text.
            special_tokens: What the template reads as ``bos_token``, ``eos_token`` and so on.
            date: What its clock (``strftime_now``) reads, or, where it has none, its
                ``date_string``. None: the clock stays at today, ``date_string`` is the template's.

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
        """Write messages as the text that a model reads.

        Args:
            messages: The turns, from the first.
            tools: Descriptions of functions (JSON schema) that the assistant may call.
            add_generation_prompt: End with what asks the assistant to speak.

        Raises:
            ChatTemplateError: The template refuses the messages (roles that do not alternate, say)
                or fails on them.
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
        except Exception as error:  # a template is a program: whatever it raises, it is at fault
            raise ChatTemplateError(f"the chat template fails: {error}") from error

    def closing(self) -> str:
        """Return what the template writes after an answer: "" where it refuses a plain chat."""
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
        """Write messages with tool calls; their arguments as JSON if the template wants strings.

        Such a template fails on an object (it joins strings), or writes Python's `repr` of it.
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
    """Return what a message calls with arguments that are an object."""
    calls = message.get("tool_calls")
    functions = [_function(call) for call in calls] if isinstance(calls, list | tuple) else []
    return [call for call in functions if isinstance(call.get("arguments"), dict)]


def _function(call: Any) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _with_json(message: dict[str, Any]) -> dict[str, Any]:
    """Write the arguments of a message's calls as JSON."""
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
    """Offer a message's reasoning under every name that templates read; leave out null values."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


class _Generation(Extension):
    """Let ``{% generation %}`` pass: it marks the assistant's words for other trainers."""

    tags = {"generation"}  # noqa: RUF012 (the base class has a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_pass")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _pass(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    """jinja2's ``namespace``, closed to names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self=…` is an attribute too
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict`` without its attributes, through which a template could leave the sandbox."""

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
    """Write JSON plainly, where jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def today() -> str:
    """Read the clock: the date here, as 2026-11-29."""
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
"""Keys of a message, besides role, content and reasoning, that say something to a model."""

_END_OF_THOUGHT = "</think>"


class RenderedChat(Protocol):
    """A whole chat, and what its template writes."""

    completion: Completion
    turns: Turns
    text: str
    answers: list[int]


def check_written(chat: RenderedChat, template: ChatTemplate, tools: Sequence[Message]) -> None:
    """Refuse a completion of which the template writes nothing.

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
        held = ", ".join(sorted({key for turn in spoken for key in turn if key != "role"}))
        reason = f"the chat template writes nothing of the {chat.completion.role} answer"
        raise InvalidRecordError("R311", f"{reason}, which holds: {held}")


def omissions(
    record: PreferenceRecord, asked: str, chats: Sequence[RenderedChat], template: ChatTemplate
) -> list[str]:
    """Name what the template leaves out of a record.

    Args:
        record: The record.
        asked: Its prompt, as the template asks for an answer.
        chats: Its completions behind the prompt.
        template: What rendered them.

    Returns:
        At most one W513, which names all that is missing, and one W514.
    """
    missing: dict[str, None] = {}
    is_thought_gone = False
    prompt: Turns = record.prompt if isinstance(record.prompt, tuple) else ()
    if record.tools and _is_same(asked, template, prompt, (), ask=True):
        missing["tools"] = None
    for number, chat in enumerate(chats):
        # The turns of the prompt are the same in each: one look is enough.
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
    """Name what is missing of one turn."""
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
    """Yield the keys of a turn that say the same, and what that is."""
    if len(turn) == 2:
        return
    if any(turn.get(key) for key in REASONING):
        yield REASONING, "reasoning"
    for key, what in _KEYS.items():
        # A tool's name is that of the call, which its turn follows.
        if turn.get(key) and not (key == "name" and turn["role"] == "tool"):
            yield (key,), what


def _left_out_of_content(turn: Message, text: str, is_same: Any) -> Iterator[str]:
    """Look for lines that are missing, and make sure that what is in them makes no difference."""
    content = turn["content"]
    thought, end, said = content.rpartition(_END_OF_THOUGHT)
    for part, what in ((thought, "reasoning"), (said, f"content of a turn of {turn['role']}")):
        lines = filter(None, map(str.strip, part.replace("<think>", "\n").splitlines()))
        line = min(lines, key=lambda line: line in text, default=None)  # the first that is missing
        if line is None:
            continue
        marked = part.replace(line, line + MARK, 1)
        whole = marked + end + said if part is thought else thought + end + marked
        if is_same({**turn, "content": whole}):
            yield what


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
    """Say whether a template writes the same text of other turns; it may refuse them."""
    try:
        return template.render(turns, tools=tools, add_generation_prompt=ask) == text
    except ChatTemplateError:
        return False
