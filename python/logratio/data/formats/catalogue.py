"""The known formats: name, description and required keys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logratio.data.formats.prompts import HISTORY, MAINS, SYSTEM, TOOLS

Need = tuple[str, ...]
"""Alternative names, one of which a row must have."""


@dataclass(frozen=True, slots=True)
class Format:
    """A known format.

    Attributes:
        name: Value of ``format=`` and ``--format``.
        title: Description, printed as the reason for a detection.
        needs: Required names; one of each tuple.
        family: Name of the reader in `families`.
        demonstrates: Whether it is read only for demonstrations (SFT).
    """

    name: str
    title: str
    needs: tuple[Need, ...]
    family: str
    demonstrates: bool = False


_QUESTION = ("question", "input", "query", "prompt", "instruction", "messages", "conversations")
_ASKED = ("prompt", "question", "instruction")
_C, _R = ("chosen",), ("rejected",)
COMPLETIONS = ("completion", "output", "response")
ANSWERS = ("output", "answer", "response")
LABELS = ("label", "labels", "preference", "winner", "overall_preference", "choice", "better")
THUMBS = ("label", "kto_tag")
LISTED = ("completions", "answers", "responses")
SINGLY = ("completion", *ANSWERS)
VALUES = ("ranks", "rank", "scores", "score", "rewards", "reward")
MARGIN, WEIGHT = "margin", "weight"
SINGLE_SCORES = ("score", "rating", "reward")
SIDE_SCORES = tuple(
    (name.format("chosen"), name.format("rejected"))
    for word in ("score", "rating", "reward", "avg_rating")
    for name in (f"{word}_{{}}", f"{{}}_{word}", f"{{}}-{word}")
)
"""Names of the scores of a better and a worse answer: ``score_chosen``, ``chosen_score`` …"""
VALUE_NAMES = frozenset(
    (MARGIN, WEIGHT, *SINGLE_SCORES, *(n for names in SIDE_SCORES for n in names))
)
"""Names of numbers that a row may have next to its answers."""


def _marked(stems: str, marks: str) -> Need:
    """List every stem with every mark: ``answer_0``, ``answer_1``, and so on."""
    return tuple(f"{stem}_{mark}" for stem in stems.split() for mark in marks.split())


CATALOGUE = (
    Format(
        "trl",
        "`prompt`, `chosen`, `rejected` are strings: plain text, read unchanged",
        (("prompt",), _C, _R),
        "pairs",
    ),
    Format(
        "trl-chat",
        "`prompt`, `chosen`, `rejected` are lists of messages",
        (("prompt",), _C, _R),
        "pairs",
    ),
    Format(
        "trl-chat-implicit",
        "`chosen` and `rejected` are whole chats, and their common beginning is the prompt",
        (_C, _R),
        "pairs",
    ),
    Format(
        "hh",
        "`chosen` and `rejected` are Anthropic-HH transcripts with '\\n\\nHuman:' and "
        "'\\n\\nAssistant:', and their common turns are the prompt",
        (_C, _R),
        "pairs",
    ),
    Format(
        "ultrafeedback",
        "`chosen` and `rejected` are whole chats, and `prompt` repeats one of their user turns",
        (("prompt",), _C, _R),
        "pairs",
    ),
    Format(
        "orca",
        "a question under `question`, `input` or `query`, or a `prompt` with a `system` prompt "
        "or a `history`: messages",
        (("question", "input", "query", "system"), _C, _R),
        "pairs",
    ),
    Format(
        "alpaca",
        "`instruction` (and `input`, `history`, `system`) is the question: messages",
        (("instruction",), _C, _R),
        "pairs",
    ),
    Format(
        "sharegpt",
        "`conversations` is the chat before the answers",
        (("conversations",), _C, _R),
        "pairs",
    ),
    Format(
        "axolotl", "`messages` is the chat before the answers", (("messages",), _C, _R), "pairs"
    ),
    Format(
        "argilla",
        "two responses, `chosen_response` and `rejected_response`, to a question",
        (("instruction", "question", "messages"), ("chosen_response",), ("rejected_response",)),
        "pairs",
    ),
    Format(
        "nemo-aligner",
        "`chosen_response` and `rejected_response` to a `prompt` that is read unchanged",
        (("prompt",), ("chosen_response",), ("rejected_response",)),
        "pairs",
    ),
    Format(
        "stack-exchange",
        "`response_j` is the better of two answers to a question",
        (_QUESTION, ("response_j",), ("response_k",)),
        "pairs",
    ),
    Format(
        "openai",
        "OpenAI's fine-tuning: `input.messages`, `preferred_output`, `non_preferred_output`",
        (("input",), ("preferred_output",), ("non_preferred_output",)),
        "pairs",
    ),
    Format(
        "llamafactory-v1",
        "`chosen_messages` and `rejected_messages` are whole chats with a weight per turn",
        (("chosen_messages",), ("rejected_messages",)),
        "pairs",
    ),
    Format(
        "ms-swift",
        "`messages` ends with the better answer, and `rejected_response` or `rejected_messages` "
        "is the worse one (or `response` and `rejected_response`)",
        (("messages", "response"), ("rejected_response", "rejected_messages")),
        "swift",
    ),
    Format(
        "shp",
        "`history` is a post, and `labels` is 1 where `human_ref_A` is better than `human_ref_B`",
        (("history",), ("human_ref_A",), ("human_ref_B",), ("labels",)),
        "labelled",
    ),
    Format(
        "helpsteer3",
        "HelpSteer3: a negative `overall_preference` means that `response1` is better",
        (("context",), ("response1",), ("response2",), ("overall_preference",)),
        "labelled",
    ),
    Format(
        "helpsteer2",
        "HelpSteer2's preferences: a negative `preference_strength` means that `response_1` is "
        "better",
        (("prompt",), ("response_1",), ("response_2",), ("preference_strength",)),
        "labelled",
    ),
    Format(
        "ppe",
        "PPE's human preferences: `winner` is `model_a` where `response_1` is better",
        (("prompt",), ("response_1",), ("response_2",), ("model_a",), ("model_b",), ("winner",)),
        "labelled",
    ),
    Format(
        "arena-chat",
        "Chatbot Arena: `winner` is `model_a` where `conversation_a` is better",
        (("conversation_a",), ("conversation_b",), ("model_a",), ("model_b",), ("winner",)),
        "labelled",
    ),
    Format(
        "arena-55k",
        "Chatbot Arena's 55k: `prompt`, `response_a` and `response_b` are lists of turns, as JSON; "
        "of `winner_model_a`, `winner_model_b` and `winner_tie` one is 1",
        (
            ("prompt",),
            ("response_a",),
            ("response_b",),
            ("winner_model_a",),
            ("winner_model_b",),
            ("winner_tie",),
        ),
        "labelled",
    ),
    Format(
        "ab",
        "two outputs, and a label explained by `--label`",
        (
            _QUESTION,
            ("output_1", "response_1", "response_a", "response_A"),
            ("output_2", "response_2", "response_b", "response_B"),
            LABELS,
        ),
        "labelled",
    ),
    Format(
        "ranked",
        "answers with a `rank` each; a lower one is better",
        (("context", *_QUESTION), LISTED, ("rank", "ranks")),
        "lists",
    ),
    Format(
        "scored",
        "answers with a score each; a higher one is better",
        (("context", *_QUESTION), LISTED, ("score", "scores", "rewards")),
        "lists",
    ),
    Format(
        "several",
        "`rejected` is a list of strings, each worse than `chosen` (RewardBench 2 and RM-Bench: "
        "than each of its `chosen`)",
        (_ASKED, _C, _R),
        "several",
    ),
    Format(
        "rated",
        "two answers with a score each, as WebGPT's `answer_0`, `answer_1`, `score_0`, `score_1`",
        (
            _QUESTION,
            _marked("answer response output", "0 1 a A"),
            _marked("answer response output", "1 2 b B"),
            ("score_0", "score_1", "score_a", "score_A"),
            ("score_1", "score_2", "score_b", "score_B"),
        ),
        "rated",
    ),
    Format(
        "best-of-k",
        "PPE's best of k: `response_1`, `response_2` … and `scores`, true for right answers",
        (("prompt",), ("response_1",), ("response_2",), ("scores",)),
        "rated",
    ),
    Format(
        "text-score",
        "`text` is a list of whole transcripts with a `score` each; a higher one is better",
        (("text",), ("score",)),
        "lists",
    ),
    Format(
        "kto",
        "one completion with a boolean label: `label` is true if it is good",
        (_QUESTION, COMPLETIONS, THUMBS),
        "unpaired",
    ),
    Format(
        "kto-chat",
        "a whole chat with a boolean label: `label` is true if its last answer is good",
        (("messages", "conversations"), THUMBS),
        "unpaired",
    ),
    Format(
        "step-dpo",
        "`initial_reason_steps` are right and not trained; one good and one bad step follow",
        (_ASKED, ("initial_reason_steps",), _C, _R),
        "steps",
    ),
    Format(
        "prmbench",
        "`chosen` and `rejected` are lists of steps, equal up to `first_diff`, which is compared",
        (_ASKED, _C, _R, ("first_diff", "error_steps")),
        "steps",
    ),
    Format(
        "step-list",
        "`initial_reason_steps` are right and not trained; `completions` are possible next "
        "steps with a score each",
        (_ASKED, ("initial_reason_steps",), LISTED, ("score", "scores", "rank", "ranks")),
        "steps",
    ),
    Format(
        "ids",
        "token ids, which need no tokenizer",
        (("prompt_ids",), ("chosen_ids",), ("rejected_ids",)),
        "ids",
    ),
    Format(
        "completion",
        "`prompt` and `completion`, to imitate",
        (("prompt",), ("completion",)),
        "demonstrations",
        True,
    ),
    Format(
        "instruction",
        "a question and its answer to imitate: alpaca's `instruction`, `input`, `output`, or a "
        "question with an `answer`, `output` or `response`",
        (("instruction", "question", "query", "input", "prompt"), ANSWERS),
        "demonstrations",
        True,
    ),
    Format(
        "chat",
        "`messages` or `conversations` is a chat whose answers are imitated",
        (("messages", "conversations"),),
        "demonstrations",
        True,
    ),
)

FORMATS = {known.name: known for known in CATALOGUE}
STEPS = frozenset(known.name for known in CATALOGUE if known.family == "steps")
"""Formats whose answers are single steps, without EOS."""
KNOWN_NAMES = frozenset(
    {name for known in CATALOGUE for need in known.needs for name in need}
    | {*MAINS, *SYSTEM, HISTORY, TOOLS, *LABELS, *THUMBS}
    | VALUE_NAMES
)
"""Names that formats read; ``columns`` may map each to a key of the data."""

INSPECT = "`logratio data inspect FILE` shows the format of a file, and the keys that it lacks"
KNOWN_SHAPES = f"known formats: {', '.join(known.name for known in CATALOGUE)}; {INSPECT}"


def names_of_formats() -> list[str]:
    """Return the names of all formats."""
    return list(FORMATS)


_NAMED = 3  # most alternatives that a message lists


def near_formats(names: Sequence[str]) -> Iterator[tuple[Format, tuple[str, ...]]]:
    """Find preference formats of which a row has some of the keys, best match first.

    Args:
        names: The names that the row has.

    Yields:
        A format and its missing names; alternatives are joined by " or ".
    """
    there = set(names)
    near = []
    for known in (known for known in CATALOGUE if not known.demonstrates):
        lacking = tuple(
            " or ".join((*need[:_NAMED], "the like") if len(need) > _NAMED + 1 else need)
            for need in known.needs
            if not there & set(need)
        )
        if lacking and len(lacking) < len(known.needs):
            near.append((known, lacking))
    yield from sorted(near, key=lambda item: (len(item[1]), -len(item[0].needs)))
