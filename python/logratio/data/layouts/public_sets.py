"""Public datasets in which a row is not one record: PRM800K, Math-Shepherd, OASST."""

from collections.abc import Iterator
from typing import Any

from logratio.data.layouts.values import Part, Row, checked, is_number, take
from logratio.data.records import InvalidRecordError

_TAG = "ки"  # ends every step of Math-Shepherd
_FIRST = "Step 1:"
_WRITTEN = 1  # the rating of a step that a labeler of PRM800K wrote


def looks_prm800k(row: Row) -> bool:
    """Return whether a row has PRM800K's question and label."""
    question, label = row.get("question"), row.get("label")
    is_one = isinstance(question, dict) and isinstance(label, dict)
    return is_one and "problem" in question and "steps" in label  # type: ignore[operator]


def prm800k(row: Row) -> Iterator[Part]:
    """Convert each step with two or more rated completions to a scored list.

    The steps that the labeler continued from come before the list and are not trained. A step that
    the labeler wrote counts as rated 1. A completion without a rating, or flagged as impossible to
    rate, is left out (R317).

    Raises:
        InvalidRecordError: R316 if the problem is broken or no step has two completions; E2xx
            for a malformed row.
    """
    problem = take(take(row, "question", dict), "problem", str, "'question'")
    label = take(row, "label", dict)
    if label.get("finish_reason") == "bad_problem":
        raise InvalidRecordError("R316", "the labeler found the problem broken")
    steps = [checked(step, dict, "a step") for step in take(label, "steps", list, "'label'")]
    before: list[str] = []
    found = False
    for number, step in enumerate(steps, 1):
        completions = [*_completions(step)]
        if len(completions) > 1:
            found = True
            yield from _next_steps(problem, before, completions, number)
        taken = _taken(step, number)
        if taken is None:
            if number < len(steps):
                found = True
                yield _broken(f"step {number} has no chosen completion, and steps follow it")
            break
        before.append(taken)
    if not found:
        raise InvalidRecordError("R316", "no step has two completions")


def _completions(step: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the text of each completion and its rating, or None without a rating."""
    for one in take(step, "completions", list, "a step"):
        completion = checked(one, dict, "a completion")
        rating = None if completion.get("flagged") else completion.get("rating")
        yield take(completion, "text", str, "a completion"), rating
    if written := _written(step):
        yield written, _WRITTEN


def _next_steps(
    problem: str, before: list[str], completions: list[tuple[str, Any]], number: int
) -> Iterator[Part]:
    rated = []
    for place, (text, rating) in enumerate(completions, 1):
        if rating is None:
            reason = f"completion {place} of step {number} has no rating"
            yield InvalidRecordError("R317", reason)
        else:
            rated.append({"text": text, "score": rating})
    if len(rated) > 1:
        steps = "\n".join(before)
        yield {"prompt": problem, "initial_reason_steps": steps, "completions": rated}


def _taken(step: dict[str, Any], number: int) -> str | None:
    """Return the completion that the labeler continued from, or None if the solution ends."""
    place, completions = step.get("chosen_completion"), step["completions"]
    if place is None:
        return _written(step)
    if (
        isinstance(place, float) and place.is_integer()
    ):  # pandas writes a column with nulls as floats
        place = int(place)
    if not isinstance(place, int) or not 0 <= place < len(completions):
        raise _broken(f"step {number} has no completion {place!s:.40}, which was chosen")
    return take(completions[place], "text", str, "a completion")


def _written(step: dict[str, Any]) -> str | None:
    """Return the completion that the labeler wrote, or None."""
    written = step.get("human_completion")
    if isinstance(written, dict):
        written = written.get("text")
    return checked(written, str, "'human_completion'") if written else None


def looks_math_shepherd(row: Row) -> bool:
    """Return whether a row has Math-Shepherd's keys, and steps that end with its tag."""
    tagged, label = row.get("input"), row.get("label")
    return isinstance(tagged, str) and isinstance(label, str) and _TAG in tagged


def math_shepherd(row: Row) -> Iterator[Part]:
    """Convert a row to a solution with a boolean label, true if every step is right.

    ``--group-by question`` merges the solutions of one question, which then become pairs.

    Raises:
        InvalidRecordError: E214 if the steps of ``input`` and ``label`` differ; E2xx
            for a malformed row.
    """
    tagged, label = take(row, "input", str), take(row, "label", str)
    *steps, end = tagged.split(_TAG)
    if not steps or end.strip():
        raise _broken(f"'input' does not end with {_TAG!r}, as each step does")
    verdicts = [*_verdicts(steps, label)]
    at = steps[0].rfind(_FIRST)
    if at <= 0:
        raise _broken(f"'input' has no {_FIRST!r} after its question")
    solution = "\n".join(map(str.strip, (steps[0][at:], *steps[1:])))
    question = steps[0][:at].strip()
    yield {"question": question, "completion": solution, "label": all(verdicts)}


def _verdicts(steps: list[str], label: str) -> Iterator[bool]:
    """Yield for each step whether it is right: the label has + or - in place of the tag."""
    for number, step in enumerate(steps, 1):
        mark = label[len(step) : len(step) + 1]
        if not label.startswith(step) or mark not in ("+", "-"):
            raise _broken(f"step {number} of 'label' is not that of 'input', followed by + or -")
        yield mark == "+"
        label = label[len(step) + 1 :]
    if label.strip():
        raise _broken("'label' continues after the last step of 'input'")


def _broken(reason: str) -> InvalidRecordError:
    return InvalidRecordError("E214", reason)


Turns = tuple[dict[str, str], ...]


def looks_oasst(row: Row) -> bool:
    """Return whether a row is a tree: its prompt is an object with replies."""
    prompt = row.get("prompt")
    return isinstance(prompt, dict) and isinstance(prompt.get("replies"), list)


def oasst(row: Row) -> Iterator[Part]:
    """Convert each user message with two or more ranked replies to a list; rank 0 is the best.

    The prompt is the conversation from the root of the tree. A reply without a rank, or a deleted
    one, is left out (R317) if it has siblings.

    Raises:
        InvalidRecordError: R316 if no message has two replies; E2xx for a malformed tree.
    """
    found = False
    waiting: list[tuple[Turns, dict[str, Any]]] = [((), take(row, "prompt", dict))]
    while waiting:
        before, message = waiting.pop()
        turns, replies = _spoken(before, message), _replies(message)
        if turns[-1]["role"] == "prompter" and len(replies) > 1:
            found = True
            yield from _list(turns, replies)
        waiting += [(turns, reply) for reply in reversed(replies)]
    if not found:
        raise InvalidRecordError("R316", "no message of the tree has two replies")


def _list(turns: Turns, replies: list[dict[str, Any]]) -> Iterator[Part]:
    ranked = []
    for reply in replies:
        if reply.get("deleted") or not is_number(reply.get("rank")):
            why = "was deleted" if reply.get("deleted") else "has no rank"
            yield InvalidRecordError("R317", f"the reply {reply.get('message_id')!s:.40} {why}")
        else:
            text = take(reply, "text", str, "a reply")
            ranked.append({"text": text, "rank": reply["rank"]})
    if len(ranked) > 1:
        yield {"prompt": [*turns], "completions": ranked}


def _spoken(before: Turns, message: dict[str, Any]) -> Turns:
    role, text = (take(message, key, str, "a message") for key in ("role", "text"))
    return (*before, {"role": role, "content": text})


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    replies = checked(message.get("replies") or [], list, "'replies' of a message")
    return [checked(reply, dict, "a reply") for reply in replies]
