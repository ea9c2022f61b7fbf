"""Rows of chats and transcripts, written shortly."""

from dataclasses import replace
from typing import Any

from logratio.data.records import Completion, PreferenceRecord


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def human(value: str) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def hh(*turns: str) -> str:
    """Write turns as a transcript, the human's first."""
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


def without_values(record: PreferenceRecord) -> PreferenceRecord:
    """Drop the scores, ranks, margins and weights of a record."""
    completions = tuple(Completion(c.role, c.answer, c.context) for c in record.completions)
    return replace(record, completions=completions)
