"""Answers whose names tell the better from the worse: one against one, or against several."""

from logratio.data import conversations
from logratio.data.formats.lists import candidates
from logratio.data.formats.responses import Answered, ParsedRow, combine, pair, read_answers
from logratio.data.formats.row import RowView
from logratio.data.formats.settings import FormatSettings
from logratio.data.messages import ASSISTANT, read_messages
from logratio.data.records import InvalidRecordError

SIDES = {
    ("chosen", "rejected"): "",
    ("chosen_response", "rejected_response"): "argilla",
    ("response_j", "response_k"): "stack-exchange",
    ("preferred_output", "non_preferred_output"): "openai",
    ("chosen_messages", "rejected_messages"): "llamafactory-v1",
}
"""Names of a better and a worse answer, with their format, or "" if several formats use them."""

SIGNS = frozenset(name for names in SIDES for name in names)
SIGNS_SWIFT = frozenset(("rejected_response", "rejected_messages"))

_BY_QUESTION = {
    "conversations": "sharegpt",
    "messages": "axolotl",
    "context": "axolotl",
    "instruction": "alpaca",
    "question": "orca",
    "input": "orca",
    "query": "orca",
    "history": "orca",
}


def claims(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has both names of a pair."""
    return bool(_both(view))


def read(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse a pair.

    Raises:
        InvalidRecordError: E210 if the row has two pairs, and every other error in the row.
    """
    found = _both(view) or [partial_pair(view) or ("chosen", "rejected")]
    if len(found) > 1:
        names = " and ".join(f"`{view.key(names[0])}`" for names in found)
        raise InvalidRecordError("E210", f"{names} could each be the better answer: drop one")
    if any(isinstance(view.peek(name), list) for name in found[0]) and all(
        view.shape(name) == "strings" for name in found[0]
    ):
        names = " and ".join(f"`{view.key(name)}`" for name in found[0])
        raise InvalidRecordError(
            "E210",
            f"{names} are lists of strings, which could be steps or different answers: if they "
            "are the steps of two solutions, add --format prmbench; if each is an answer, add "
            "--format several",
        )
    answered = read_answers(view, found[0])
    return pair(_name(view, found[0], answered), answered)


def partial_pair(view: RowView) -> tuple[str, str] | None:
    """Return the names of a pair of which the row has at least one key."""
    started = (names for names in SIDES if names[0] in view or names[1] in view)
    return next(started, None)


def claims_swift(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has a worse answer and a chat that ends with the better one."""
    if view.has("rejected_messages"):
        return view.has("messages") and not view.has("chosen_messages")
    is_alone = view.has("rejected_response") and not view.has("chosen_response")
    return is_alone and (view.has("messages") or view.has("response"))


def read_swift(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse a chat and a worse ending of it, or two responses.

    Raises:
        InvalidRecordError: Every error in the row.
    """
    if not view.has("messages") and not view.has("rejected_messages"):
        return pair("ms-swift", read_answers(view, ("response", "rejected_response")))
    chosen = view.take("messages")
    if view.shape("messages") != "messages":
        raise view.wrong("messages", "a list of messages")
    if not view.has("rejected_messages"):
        if view.shape("rejected_response") not in ("text", "message", "messages"):
            raise view.wrong("rejected_response", "a string or messages")
        key = view.key("rejected_response")
        worse = view.chats({key: view.take("rejected_response")}, "messages")[key]
        return pair("ms-swift", _against(view, chosen, worse))
    rejected = view.take("rejected_messages")
    if view.shape("rejected_messages") != "messages":
        raise view.wrong("rejected_messages", "a list of messages")
    if read_messages(rejected[:1], "rejected_messages")[0]["role"] == ASSISTANT:
        return pair("ms-swift", _against(view, chosen, rejected))
    return pair("ms-swift", _whole(view, chosen, rejected))


def _both(view: RowView) -> list[tuple[str, str]]:
    both = [names for names in SIDES if names[0] in view and names[1] in view]
    return [names for names in both if view.has(names[0]) or view.has(names[1])]


def _name(view: RowView, names: tuple[str, str], answered: Answered) -> str:
    """Return the format: from the names of the sides, or of the question if these are ambiguous."""
    if name := SIDES[names]:
        return "nemo-aligner" if name == "argilla" and answered.main == "prompt" else name
    is_text = isinstance(answered.prompt, str)
    if answered.main is None:
        return "hh" if is_text else "trl-chat-implicit"
    if answered.main != "prompt":
        return _BY_QUESTION[answered.main]
    if is_text:
        return "trl"
    if view.shape("prompt") == "text":
        return "ultrafeedback" if answered.is_whole else "orca"
    return "trl-chat"


def _against(view: RowView, chat: list[object], worse: object) -> Answered:
    """Replace the last answer of a chat by a worse one."""
    key = view.key("messages")
    prompt, answer = conversations.split_last(chat, key)
    if answer[-1]["role"] != ASSISTANT:  # unclear what the worse answer replaces
        raise InvalidRecordError("E403", f"{key!r} does not end with an assistant turn")
    if isinstance(worse, str):
        worse = [{"role": ASSISTANT, "content": worse}]
    ends = worse if isinstance(worse, list) else [worse]
    whole: list[object] = [*prompt, *read_messages(ends, view.key("rejected_response"))]
    return _whole(view, chat, whole)


def _whole(view: RowView, chosen: list[object], rejected: list[object]) -> Answered:
    values = {view.key("messages"): chosen, "the worse chat": rejected}
    return combine(view, values, ["messages", "messages"])


_ONE_AGAINST_MANY = ("chosen", "rejected")
SIGNS_SEVERAL = frozenset(("rejected",))
_COUNTED = "num_correct"  # a key of RewardBench 2; lists of steps do not have it
_STYLES = 3  # RM-Bench writes each answer in three styles


def claims_several(view: RowView, settings: FormatSettings) -> bool:
    """Return whether `rejected` is a list of answers.

    Two lists could also be steps, unless the row has the keys of RewardBench 2 or RM-Bench.
    """
    if not _is_strings(view.peek("rejected")) or view.has("first_diff") or view.has("error_steps"):
        return False
    chosen = view.peek("chosen")
    if not _is_strings(chosen):
        return isinstance(chosen, str)
    return view.has(_COUNTED) or _is_rm_bench(view)


def _is_rm_bench(view: RowView) -> bool:
    """Return whether a row has RM-Bench's keys and three answers per side, none on both sides."""
    sides = [view.peek(name) for name in _ONE_AGAINST_MANY]
    is_three = all(len(side) == _STYLES for side in sides)
    return is_three and isinstance(view.peek("domain"), str) and set(sides[0]).isdisjoint(sides[1])


def read_several(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse the answers: each of `chosen` is better than each of `rejected`.

    Raises:
        InvalidRecordError: E203 if a side does not hold strings, and every other error in the row.
    """
    answers: dict[str, str] = {}
    values: list[float] = []
    for name, value in zip(_ONE_AGAINST_MANY, (1.0, 0.0), strict=True):
        side = view.take(name)
        side = [side] if isinstance(side, str) else side
        if not _is_strings(side):
            raise view.wrong(name, "a string or a list of strings")
        for place, text in enumerate(side, 1):
            answers[f"answer {place} of {view.key(name)!r}"] = text
            values.append(value)
    answered = combine(view, answers, ["text"] * len(answers))
    if answered.main is None:
        raise InvalidRecordError("E201", f"the key {view.key('prompt')!r} is missing")
    return ParsedRow(
        "several",
        "group",
        answered.prompt,
        candidates(answered.parts, values),
        answered.tools,
        values=tuple(values),
        is_binary=True,
    )


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
