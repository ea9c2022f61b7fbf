"""The documentation as tests read it: its pages, their code blocks and their commands."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

from repository import ROOT, tracked

PAGES = sorted(name for name in tracked() if name.endswith(".md"))


def blocks(language: str, pages: Sequence[str] = PAGES) -> list[str]:
    """Fenced blocks in `language`, README's first, then the guides' in their order."""
    texts = [(ROOT / name).read_text() for name in pages]
    found = (re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) for text in texts)
    return [block for blocks in found for block in blocks]


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of `program`, also under torchrun, in all shell blocks."""
    lines = "".join(blocks("sh") + blocks("bash")).replace("\\\n", " ").splitlines()
    calls = (shlex.split(line, comments=True) for line in lines)
    return [call for words in calls if (call := arguments(words, program))]


def arguments(words: list[str], program: str) -> list[str]:
    """Return the arguments of `program`, or of a launcher's `-m program`; empty for other words."""
    if words[:1] == [program]:
        return words[1:]
    at = next((n for n in range(len(words)) if words[n : n + 2] == ["-m", program]), len(words))
    return words[at + 2 :]


@cache
def help_of(*words: str) -> str:
    """Return what `logratio WORDS --help` prints."""
    return subprocess.run(
        [sys.executable, "-m", "logratio", *words, "--help"],
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
