"""Rows of results: what a load was answered, and the conditions of the measurement."""

import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from load_client import Outcome

RESULTS = Path(__file__).resolve().parent / "results" / "load.jsonl"
Row = dict[str, Any]
_VERSIONS = ("logratio", "onnxruntime", "uvicorn", "fastapi", "tokenizers", "numpy")
_FINENESS = 1.05
"""Ratio of neighbouring bounds of the histogram."""


@dataclass
class Record:
    """Writes rows with the conditions under which they were measured.

    Attributes:
        path: File of JSON lines.
        is_quick: Whether this is a short run, whose rows no table shows.
        rows: Those of this run.
    """

    path: Path
    is_quick: bool
    rows: list[Row] = field(default_factory=list)

    def add(self, scenario: str, row: Row) -> None:
        """Append a row to the file, and print it without its long lists."""
        whole = {"scenario": scenario} | row | conditions() | {"quick": self.is_quick}
        self.rows.append(whole)
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        print(scenario, json.dumps(shown), flush=True)


def conditions() -> Row:
    """Return time, machine, load average, versions and command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.platform()}",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "command": " ".join(sys.argv[1:]),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def percentiles(seconds: Sequence[float]) -> Row:
    """Return the number, and the 50th, 90th, 99th percentile and the largest in milliseconds."""
    if not seconds:
        return {"count": 0, "p50": None, "p90": None, "p99": None, "max": None}
    values = np.percentile(np.array(seconds) * 1e3, (50, 90, 99, 100))
    named = zip(("p50", "p90", "p99", "max"), values, strict=True)
    return {"count": len(seconds)} | {name: round(float(value), 2) for name, value in named}


def answered(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return those with scores."""
    return [one for one in outcomes if one.status == 200]


def refused(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return those that the server was too busy for."""
    return [one for one in outcomes if one.status in (429, 503)]


def figures(outcomes: Sequence[Outcome], seconds: float, from_second: float = 0.0) -> Row:
    """Return what requests were answered; goodput counts answers within the load's time.

    Args:
        outcomes: All outcomes of a load.
        seconds: Length of the load.
        from_second: Requests planned before this time are left out of the figures, but not of the
            lists per second.
    """
    counted = [one for one in outcomes if one.planned >= from_second]
    good = [one for one in answered(outcomes) if from_second <= one.ended < seconds]
    latencies = [one.latency for one in answered(counted)]
    return {
        "statuses": {str(key): n for key, n in sorted(Counter(o.status for o in counted).items())},
        "goodput": round(len(good) / (seconds - from_second), 3),
        "accepted_ms": percentiles(latencies),
        "refused_ms": percentiles([one.latency for one in refused(counted)]),
        "lag_ms": percentiles([one.sent - one.planned for one in counted]),
        "histogram": _histogram(latencies),
        "per_second": _per_second(outcomes, seconds),
    }


def _histogram(seconds: Sequence[float]) -> list[tuple[float, int]]:
    """Return upper bounds in milliseconds, each 5 % above the one before, and counts."""
    steps = Counter(math.ceil(math.log(max(one * 1e3, 0.01), _FINENESS)) for one in seconds)
    return [(round(_FINENESS**step, 3), count) for step, count in sorted(steps.items())]


def _per_second(outcomes: Sequence[Outcome], seconds: float) -> list[tuple[int, int, int]]:
    """Return for each second the requests that arrived, and the answers and refusals that ended."""
    last = math.ceil(max([seconds, *(one.ended for one in outcomes)]))
    table = np.zeros((last + 1, 3), int)
    for one in outcomes:
        table[int(one.planned), 0] += 1
        table[int(one.ended), 1 if one.status == 200 else 2] += 1
    return [tuple(row) for row in table.tolist()]
