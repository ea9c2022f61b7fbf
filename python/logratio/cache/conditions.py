"""The conditions that a folder was filled under: what may move a log-prob by rounding only."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logratio.durable import write_whole
from logratio.errors import LogratioError


class DamagedFingerprintError(LogratioError, ValueError):
    """What a folder says of itself cannot be read, or is not what its digest was made from."""


def record_conditions(folder: Path, soft: Mapping[str, Any]) -> None:
    """Store the soft fields under which a cache's folder is being filled.

    Writers under the same conditions have one file, named after its content, so that no two
    writers write different things to one.
    """
    text = json.dumps(dict(soft), indent=1, sort_keys=True)
    path = folder / f"conditions-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        write_whole(path, text)


def read_conditions(folder: Path) -> list[Mapping[str, Any]]:
    """Return the soft fields that a folder's writers left, one mapping a kind of writer.

    Raises:
        DamagedFingerprintError: a file of conditions cannot be read.
    """
    found: list[Mapping[str, Any]] = []
    for path in sorted(folder.glob("conditions-*.json")):
        try:
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise DamagedFingerprintError(f"{path}: no readable conditions ({error})") from error
    return found
