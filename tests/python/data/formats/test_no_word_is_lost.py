"""No word is lost between a row and its records, and every layout gives the same records."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from chats_for_tests import assistant, hh, system, user, without_values
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from logratio.data.formats import Decoded, Decoder, Format, FormatSettings, Label
from logratio.data.formats.catalogue import CATALOGUE, KNOWN_NAMES
from logratio.data.messages import WEIGHTS
from logratio.data.records import InvalidRecordError, Source

patient = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
Row = dict[str, Any]
LABEL = Label("preference", {"1": "output_1", "2": "output_2"})


def decode(row: Row, **options: Any) -> Decoded:
    return Decoder(FormatSettings(**options)).decode(row, Source("f", 1))


def words_of(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(re.findall(r"w\d+", value))
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return set()
    return set().union(*map(words_of, value))


def missing_words(row: Row, decoded: Decoded) -> set[str]:
    """Return words under read keys that no record contains."""
    unread = {key for key in decoded.extra_keys if key in row}
    inner = {key.split(".")[-1] for key in decoded.extra_keys if key not in row}
    source = {key: _without(value, inner) for key, value in row.items() if key not in unread}
    sides = [side for record in decoded.records for side in record.completions]
    kept = [(r.prompt, r.tools) for r in decoded.records] + [(s.context, s.answer) for s in sides]
    return words_of(source) - words_of(kept)


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


texts = st.lists(st.integers(0, 60), min_size=1, max_size=4).map(
    lambda numbers: " ".join(f"w{number}" for number in numbers)
)
roles = st.sampled_from(["user", "assistant", "system", "tool"])
messages = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, roles, texts),
    st.builds(
        lambda speaker, value: {"from": speaker, "value": value},
        st.sampled_from(["human", "gpt", "system"]),
        texts,
    ),
    st.builds(
        lambda role, content, key, weight: {"role": role, "content": content, key: weight},
        *(roles, texts, st.sampled_from(WEIGHTS), st.sampled_from([0, 1, 0.5, True, None])),
    ),
    st.builds(
        lambda role, parts: {"role": role, "content": [{"type": "text", "text": p} for p in parts]},
        *(roles, st.lists(texts, max_size=2)),
    ),
)
chats = st.lists(texts, min_size=2, max_size=4).map(
    lambda said: [(user, assistant)[i % 2](text) for i, text in enumerate(said)]
)
items = st.dictionaries(
    st.sampled_from(["completion", "answer", "text", "rank", "score", "model"]),
    texts | st.integers(0, 3),
    max_size=4,
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 3),
    texts,
    st.lists(texts, min_size=2, max_size=4).map(lambda said: hh(*said)),
    messages,
    chats,
    st.lists(messages, max_size=3),
    st.lists(texts, max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
    st.lists(items, max_size=3),
    st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2),
    st.builds(lambda chat: {"messages": chat}, chats),
)
names = st.sampled_from(sorted(KNOWN_NAMES | {"images", "id"}))
options = st.fixed_dictionaries(
    {
        "demonstrations": st.booleans(),
        "lists": st.sampled_from(["pairs", "best_worst", "groups"]),
        "format": st.sampled_from([None, None, None, "kto", "prmbench", "ab", "ranked", "trl"]),
        "label": st.sampled_from([None, None, LABEL, Label("label", {"1": "good", "0": "bad"})]),
    }
)


def of_format(known: Format) -> st.SearchStrategy[Row]:
    """Rows with the keys of a format, values of likely types, and another key."""
    likely: dict[str, st.SearchStrategy[Any]] = {
        "context": chats,
        "messages": chats,
        "conversations": chats,
        "input": texts,
    }
    likely |= dict.fromkeys(("label", "labels", "kto_tag"), st.booleans() | st.integers(0, 1))
    likely |= dict.fromkeys(("score", "scores", "ranks"), st.lists(st.integers(0, 3), max_size=3))
    likely |= dict.fromkeys(("completions", "answers"), st.lists(texts | items, max_size=3))
    keys = st.tuples(*(st.sampled_from(need) for need in known.needs))
    needed = keys.flatmap(
        lambda keys: st.fixed_dictionaries(
            {
                key: likely.get(key, texts | st.lists(messages, min_size=1, max_size=3))
                for key in keys
            }
        )
    )
    return st.builds(
        lambda one, other: other | one, needed, st.dictionaries(names, values, max_size=1)
    )


rows = st.sampled_from(CATALOGUE).flatmap(of_format) | st.dictionaries(names, values, max_size=6)


@settings(patient, max_examples=1500)
@given(rows, options)
def test_any_row_is_records_or_an_invalid_record_error(row: Row, chosen: Row) -> None:
    try:
        decoded = decode(row, **chosen)
    except InvalidRecordError as error:
        event(error.code)
        return
    event(decoded.format)
    assert decoded.records
    for record in decoded.records:
        assert record.completions
        turns = isinstance(record.prompt, tuple)
        answers = {isinstance(side.answer, tuple) for side in record.completions}
        assert answers == {turns and record.ends}
    selects = chosen["demonstrations"] or chosen["lists"] == "best_worst" or decoded.left_out
    if not selects:
        assert not missing_words(row, decoded), decoded


QUESTIONS: list[tuple[str, st.SearchStrategy[Row]]] = [
    ("text", st.fixed_dictionaries({"prompt": texts})),
    ("transcript", st.fixed_dictionaries({"prompt": st.builds(hh, texts, texts, texts)})),
    ("turns", st.fixed_dictionaries({"prompt": st.builds(lambda t: [user(t)], texts)})),
    ("orca", st.fixed_dictionaries({"question": texts}, optional={"system": texts})),
    (
        "alpaca",
        st.fixed_dictionaries(
            {"instruction": texts, "history": st.lists(st.lists(texts, min_size=2, max_size=2))},
            optional={"input": texts, "system": texts},
        ),
    ),
    ("chat", st.fixed_dictionaries({"messages": st.builds(lambda t: [system(t), user(t)], texts)})),
]
NAMES = [
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
]
ANSWERS: list[Callable[[str, str], Row]] = [
    *(lambda good, bad, n=n: {n[0]: good, n[1]: bad} for n in NAMES),
    lambda good, bad: {"output_1": good, "output_2": bad, "preference": 1},
    lambda good, bad: {"completions": [bad, good], "scores": [1, 2]},
    lambda good, bad: {
        "answers": [{"answer": good, "rank": 1}, {"answer": bad, "rank": 2, "model": "w99"}]
    },
    lambda good, bad: {"completion": f"{good} {bad}", "label": True},
    lambda good, bad: {"chosen": good, "rejected": bad, "initial_reason_steps": bad},
]


@patient
@given(
    st.sampled_from(QUESTIONS).flatmap(lambda named: named[1]),
    st.sampled_from(ANSWERS),
    st.lists(texts, min_size=2, max_size=2, unique=True),
)
def test_every_word_of_question_and_answers_is_found(
    question: Row, layout: Callable[[str, str], Row], answers: list[str]
) -> None:
    row = question | layout(f" {answers[0]}", f" {answers[1]}")
    decoded = decode(row, label=LABEL if "preference" in row else None)
    assert not missing_words(row, decoded)
    if "answers" in row:
        assert decoded.extra_keys == ("answers.model",)


def sharegpt(turns: list[Row]) -> list[Row]:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]


def in_parts(turns: list[Row]) -> list[Row]:
    """Write turns as in LLaMA-Factory's newer files: parts, and a weight per turn."""
    return [
        {
            "role": turn["role"],
            "content": [{"type": "text", "value": half} for half in split(turn["content"])],
            "loss_weight": float(turn["role"] == "assistant"),
        }
        for turn in turns
    ]


def split(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


LAYOUTS: dict[str, Callable[[list[Row], list[Row], list[Row]], Row]] = {
    "trl-chat": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "trl-chat-implicit": lambda p, c, r: {"chosen": p + c, "rejected": p + r},
    "ultrafeedback": lambda p, c, r: {
        "prompt": p[-1]["content"],
        "chosen": p + c,
        "rejected": p + r,
    },
    "sharegpt": lambda p, c, r: {
        "conversations": sharegpt(p),
        "chosen": sharegpt(c)[0],
        "rejected": sharegpt(r)[0],
    },
    "axolotl": lambda p, c, r: {"messages": p, "chosen": c[0], "rejected": r[0]},
    "openai": lambda p, c, r: {
        "input": {"messages": p},
        "preferred_output": c,
        "non_preferred_output": r,
    },
    "llamafactory-v1": lambda p, c, r: {
        "chosen_messages": in_parts(p + c),
        "rejected_messages": in_parts(p + r),
    },
    "ms-swift": lambda p, c, r: {"messages": p + c, "rejected_response": r[0]["content"]},
    "ranked": lambda p, c, r: {
        "context": p,
        "completions": [{"rank": 1, "completion": r}, {"rank": 0, "completion": c}],
    },
    "alpaca": lambda p, c, r: {
        "instruction": p[-1]["content"],
        "history": [[p[i]["content"], p[i + 1]["content"]] for i in range(0, len(p) - 1, 2)],
        "chosen": c[0]["content"],
        "rejected": r[0]["content"],
    },
}


@patient
@given(
    st.lists(texts, min_size=1, max_size=5).filter(lambda said: len(said) % 2 == 1), texts, texts
)
def test_one_pair_in_ten_layouts_is_one_record(said: list[str], good: str, bad: str) -> None:
    if good == bad:
        return
    prompt = [(user, assistant)[i % 2](text) for i, text in enumerate(said)]
    found = {}
    for name, layout in LAYOUTS.items():
        decoded = decode(layout(prompt, [assistant(good)], [assistant(bad)]))
        assert decoded.format == name
        (found[name],) = decoded.records
    first = found["trl-chat"]
    assert all(without_values(record) == first for record in found.values())
    assert first.prompt == tuple(prompt)


@pytest.mark.parametrize("name", sorted(KNOWN_NAMES))
def test_a_key_alone_is_refused(name: str) -> None:
    for value in ("w1", ["w1"], [user("w1")], {"role": "user", "content": "w1"}, 1, None):
        with pytest.raises(InvalidRecordError):
            decode({name: value})
