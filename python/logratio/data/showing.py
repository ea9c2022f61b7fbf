"""A record as a person reads it: who speaks, what counts, which tokens it is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from logratio.data.codes import CODES
from logratio.data.conversations import counts
from logratio.data.groups import TokenizedGroup
from logratio.data.messages import Turns
from logratio.data.records import Completion, PreferenceRecord, Text

Style = Literal["", "title", "counts", "fault", "dim"]

CHARACTERS = 600
"""Most characters of a text that are shown: its beginning and its end."""
TOKENS = 120
"""Most tokens of a prompt or a completion that are shown."""

_BETWEEN = "│"  # two tokens
_CONTROLS = {chr(code): f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)}


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text in one style; ``counts`` is what training looks at."""

    text: str
    style: Style = ""


def plain(segments: Iterable[Segment]) -> str:
    """Write segments without colours: what counts stands between ‹ and ›."""
    return "".join(f"‹{one.text}›" if one.style == "counts" else one.text for one in segments)


def show_record(record: PreferenceRecord) -> Iterator[Segment]:
    """Show a record before any tokenizer saw it."""
    yield Segment("  prompt\n", "title")
    if record.tools:
        yield Segment(f"[{len(record.tools)} tools]\n", "dim")
    yield from _text(record.prompt)
    for number, completion in enumerate(record.completions):
        score = f" (score {record.scores[number]:g})" if record.scores else ""
        yield Segment(f"  {completion.role}{score}\n", "title")
        yield from _completion(completion)


def show_tokens(group: TokenizedGroup, decode: Callable[[Sequence[int]], str]) -> Iterator[Segment]:
    """Show a record as tokens, each beside the next; special ones are spelled out.

    Args:
        group: The record's ids.
        decode: Ids to text, special tokens included.
    """
    yield Segment(f"  prompt, {len(group.prompt_ids):,} tokens\n", "title")
    yield from _tokens(group.prompt_ids, [0] * len(group.prompt_ids), [], decode)
    for completion in group.completions:
        counted = f"{sum(completion.mask):,} of {len(completion.ids):,} tokens count"
        yield Segment(f"  {completion.role}, {counted}\n", "title")
        yield from _tokens(completion.ids, completion.mask, group.prompt_ids[-1:], decode)
    if group.notes:
        warnings = "; ".join(f"[{code}] {CODES[code]}" for code in dict.fromkeys(group.notes))
        yield Segment(f"  warnings   {warnings}\n", "fault")


def _completion(completion: Completion) -> Iterator[Segment]:
    answer = completion.answer
    if not isinstance(answer, str):
        yield from _text(completion.context)
        yield from _turns(answer, is_answer=True)
        return
    if isinstance(completion.context, str) and completion.context:
        yield Segment(_visible(completion.context), "dim")
    yield Segment(_visible(answer), "counts")
    yield Segment("\n")


def _text(text: Text) -> Iterator[Segment]:
    if isinstance(text, str):
        yield Segment(_visible(text), "dim")
        yield Segment("\n")
    else:
        yield from _turns(text, is_answer=False)


def _turns(turns: Turns, *, is_answer: bool) -> Iterator[Segment]:
    for turn in turns:
        yield Segment(f"[{turn['role']}] ", "dim")
        said = str(turn.get("content") or "")
        calls = str(turn.get("tool_calls") or "")
        words = _visible(" ".join(filter(None, (said, calls))))
        yield Segment(words, "counts" if is_answer and counts(turn) else "dim")
        yield Segment("\n")


def _tokens(
    ids: Sequence[int],
    mask: Sequence[int],
    behind: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Segment]:
    """Show tokens, the middle of many left out; neighbours that count alike are one segment."""
    half = TOKENS // 2
    places = list(range(len(ids)))
    if len(ids) > TOKENS:
        places = [*places[:half], *places[-half:]]
    stretch: list[str] = []
    before = -1
    for place in places:
        is_gap = before >= 0 and place != before + 1
        if stretch and (is_gap or mask[place] != mask[before]):
            yield Segment(_BETWEEN.join(stretch), "counts" if mask[before] else "dim")
            stretch = []
            gap = f" … {place - before - 1:,} tokens … " if is_gap else _BETWEEN
            yield Segment(gap)
        previous = ids[place - 1 : place] if place else behind
        stretch.append(_controls(_token(previous, ids[place], decode)))
        before = place
    if stretch:
        yield Segment(_BETWEEN.join(stretch), "counts" if mask[before] else "dim")
    yield Segment("\n")


def _token(previous: Sequence[int], token: int, decode: Callable[[Sequence[int]], str]) -> str:
    """Decode a token behind the one before it, which shows the space that it begins with."""
    before, both = decode(previous), decode([*previous, token])
    return both[len(before) :] if both.startswith(before) else decode([token])


def _visible(text: str) -> str:
    if len(text) > CHARACTERS:
        half = CHARACTERS // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} … {left_out:,} characters … {text[-half:]}"
    return _controls(text)


def _controls(text: str) -> str:
    """Spell control characters, which would move a terminal's cursor."""
    return "".join(_CONTROLS.get(character, character) for character in text)
