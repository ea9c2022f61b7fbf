"""Find the real data and models of the benches, and an environment with TRL.

Benches call these functions first; an error names what is missing and the remedy.
"""

import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

RIVAL = "trl==1.16.0"
GPT2 = "models/gpt2-tokenizer/tokenizer.json"
STORIES3M = "models/stories3M/config.json"
STORIES260K = "models/stories260K/config.json"
HH = "data/hh/harmless-base.test.jsonl.gz"
STORIES = "data/story_prefs.jsonl"
LLAMA_FACTORY = "data/llamafactory/dpo_en_demo.json"


def _found() -> Path:
    """Return the folder LOGRATIO_SHARED, or `shared` next to the repository, or in it."""
    if named := os.environ.get("LOGRATIO_SHARED"):
        return Path(named)
    root = Path(__file__).resolve().parents[1]
    outside, inside = root.parent / "shared", root / "shared"
    return inside if inside.is_dir() and not outside.is_dir() else outside


SHARED = _found()


def check_shared(*needed: str) -> None:
    """Exit if a file of the shared folder is missing.

    Args:
        needed: paths in the folder.

    Raises:
        SystemExit: names the first missing file.
    """
    for name in needed:
        if not (SHARED / name).exists():
            sys.exit(
                f"this bench reads {name}, and {SHARED} has no such file: set LOGRATIO_SHARED to "
                "the folder of real data and models"
            )


def rival_python(given: str | None, folder: Path, *, install: bool) -> str | None:
    """Return an interpreter with TRL, or None.

    Args:
        given: an interpreter that the user names.
        folder: where to create a new environment, which also has this one's packages.
        install: whether to download TRL where it is not installed.
    """
    if given:
        return given
    if find_spec("trl") and find_spec("datasets"):
        return sys.executable
    if not install:
        return None
    venv.create(folder, with_pip=True, system_site_packages=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", RIVAL], check=True)
    return python
