"""The chat templates that TRL ships."""

from importlib.resources import files
from typing import Any

from logratio.data import ChatTemplate

FOLDER = files("trl") / "chat_templates"


TEMPLATES = sorted(f.name[:-6] for f in FOLDER.iterdir() if f.name.endswith(".jinja"))


TOKENS: dict[str, Any] = {
    "bos_token": "<BOS>",
    "eos_token": "<EOS>",
    "pad_token": "<PAD>",
    "unk_token": "<UNK>",
}


EOS = TOKENS["eos_token"]


def template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}.jinja").read_text(), TOKENS)
