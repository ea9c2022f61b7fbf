"""The date that a chat template writes: a command that is given none takes the recorded one.

A template with a clock writes today's date into every prompt, so that all ids differ tomorrow: a
cache would miss, and a run could not be resumed. So a command continues under the date that was
recorded when the work began (`TokenizationRules.date`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logratio._rust import Store
from logratio.cache.identity import read_conditions, record_conditions
from logratio.training import checkpoint
from logratio.training.config import PathLike, TrainConfig
from logratio.training.run_folder import CHECKPOINTS, settings_of

_FIELD = "date"


def of_run(config: TrainConfig) -> str | None:
    """Return the date of the run in the output folder that this one goes on with or repeats."""
    if config.overwrite:
        return None
    newest = checkpoint.newest(Path(config.output) / CHECKPOINTS)
    if newest is None:
        return of_policy(config.output)
    try:
        state = json.loads((newest / "state.json").read_text("utf-8"))
        return _text(state["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged checkpoint, which whoever loads it names


def of_policy(folder: PathLike) -> str | None:
    """Return the date of the run that trained a model."""
    rules = (settings_of(folder) or {}).get("rules")
    return _text(rules) if isinstance(rules, Mapping) else None


def of_store(store: Store) -> str | None:
    """Return the date in the prompts of a store."""
    rules = json.loads(store.metadata or "{}").get("rules")
    return _text(rules) if isinstance(rules, Mapping) else None


def of_cache(folder: Path) -> str | None:
    """Return the date under which a cache's folder was filled; the latest of several."""
    return max(dates_of_cache(folder), default=None)


def dates_of_cache(folder: Path) -> list[str]:
    """Return every date under which a cache's folder was filled."""
    return sorted({date for fields in read_conditions(folder) if (date := _text(fields))})


def record(folder: Path, date: str | None) -> None:
    """Record the date under which a cache's folder is being filled, if the prompts hold one."""
    if date:
        record_conditions(folder, {_FIELD: date})


def miss(folder: Path, date: str | None) -> str:
    """Name the dates where a cache lacks completions and was filled under another; else ""."""
    others = [other for other in dates_of_cache(folder) if other != date]
    if not date or not others:
        return ""
    return (
        f". The chat template writes the date into its prompts, here {date}, and the cache was "
        f"filled under {', '.join(others)}: give --date {others[-1]} to read it"
    )


def _text(fields: Mapping[str, Any]) -> str | None:
    found = fields.get(_FIELD)
    return found if isinstance(found, str) else None
