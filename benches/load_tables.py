"""Markdown tables of the rows that bench_load.py measured, with the goal of each."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from load_figures import Row

_KEYS = ("scenario", "shape", "share", "large", "against", "balancer", "number", "crowd", "arm")
"""What distinguishes measurements; of equal ones only the last is shown."""


def latest(path: Path, *, quick: bool) -> list[Row]:
    """Return the last row of each measurement.

    Args:
        path: File of JSON lines.
        quick: Whether to return the rows of quick runs, instead of the others.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = {tuple(row.get(k) for k in _KEYS): row for row in rows if row["quick"] is quick}
    return list(kept.values())


def tables(rows: Sequence[Row]) -> str:
    """Return the tables, and the conditions of each scenario."""
    parts = []
    for scenario, (header, goal, lines) in _TABLES.items():
        found = [row for row in rows if row["scenario"] == scenario]
        if found:
            about, table = found[-1], _markdown(header, lines(found))
            parts.append(
                f"**{scenario}** ({about['date'][:10]}, load average {about['load_average']}, "
                f"`bench_load.py {about['command']}`). Goal: {goal}\n\n{table}"
            )
    return "\n\n".join(parts)


def _markdown(header: str, lines: Sequence[Sequence[object]]) -> str:
    names = header.split("; ")
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _overload(rows: Sequence[Row]) -> list[list[object]]:
    base = {row["shape"]: row["accepted_ms"]["p99"] for row in rows if row["share"] == 0.8}
    return [
        [
            row["shape"],
            row["share"],
            row["rate"],
            row["goodput"],
            row["goodput"] / row["capacity"],
            row["accepted_ms"]["p50"],
            row["accepted_ms"]["p99"],
            _ratio(row["accepted_ms"]["p99"], base.get(row["shape"])),
            row["refused_ms"]["p99"],
            _errors(row),
        ]
        for row in sorted(rows, key=lambda row: (row["shape"], row["share"]))
    ]


def _errors(row: Row) -> int:
    """Count the requests with neither scores nor a refusal for overload."""
    return sum(count for status, count in row["statuses"].items() if status not in _EXPECTED)


_EXPECTED = ("200", "429", "503")


def _mixed(rows: Sequence[Row]) -> list[list[object]]:
    quiet = {row["shape"]: row["accepted_ms"]["p99"] for row in rows if not row["large"]}
    return [
        [
            row["shape"],
            "yes" if row["large"] else "no",
            row["rate"],
            row["accepted_ms"]["p50"],
            row["accepted_ms"]["p99"],
            _ratio(row["accepted_ms"]["p99"], quiet.get(row["shape"])),
            row.get("large_ms", {}).get("p50"),
            _errors(row),
        ]
        for row in rows
    ]


def _same_scores(rows: Sequence[Row]) -> list[list[object]]:
    names = ("shape", "against", "asked", "requests", "largest_difference", "order_changes")
    return [[row[name] for name in names] for row in rows]


def _baseline(rows: Sequence[Row]) -> list[list[object]]:
    ours = {row["shape"]: row["per_second"] for row in rows if row["arm"] == "serve"}
    return [
        [
            row["shape"],
            row["arm"],
            row["requests"],
            row["per_second"],
            row["ms"]["p50"],
            _ratio(ours.get(row["shape"]), row["per_second"]),
        ]
        for row in rows
    ]


def _stop(rows: Sequence[Row]) -> list[list[object]]:
    names = ("signals", "requests", "answered", "not_connected", "unanswered", "lost")
    return [
        [
            "asks /readyz" if row["balancer"] else "none",
            *(row[name] for name in names),
            ", ".join(map(str, row["exit_codes"])),
            row["stop_seconds"]["max"],
        ]
        for row in rows
    ]


def _kill(rows: Sequence[Row]) -> list[list[object]]:
    ready = [row["ready_seconds"] for row in rows]
    same = sum(row["same_scores"] for row in rows)
    return [[len(rows), max(ready), f"{same} of {len(rows)}", sum(r["left_files"] for r in rows)]]


def _connections(rows: Sequence[Row]) -> list[list[object]]:
    return [
        [
            row["crowd"],
            row["connections"],
            row["probe_ms"]["p50"],
            row["probe_ms"]["p99"],
            row["probe_failed"],
            row["accepted_ms"]["p99"],
            _errors(row),
            row["descriptors"],
        ]
        for row in rows
    ]


def _memory(rows: Sequence[Row]) -> list[list[object]]:
    return [
        [
            row["requests"],
            *(round(size / 2**20) for size in row["resident"]),
            f"{row['growth']:.1%}",
        ]
        for row in rows
    ]


def _fuzz(rows: Sequence[Row]) -> list[list[object]]:
    names = ("schemathesis", "cases", "passed", "server_errors", "seconds")
    return [[row[name] for name in names] for row in rows]


def _network(rows: Sequence[Row]) -> list[list[object]]:
    return [
        [row["left_out"], "", ""]
        if "left_out" in row
        else [
            ", ".join(map(str, row["statuses"])),
            "yes" if row["traced"] else "no",
            len(row["connected"]),
        ]
        for row in rows
    ]


def _hostile(rows: Sequence[Row]) -> list[list[object]]:
    return [[row["tests"]] for row in rows]


_Lines = Callable[[Sequence[Row]], list[list[object]]]
_STEPS = "; ".join(f"{number}/10" for number in range(11))
_TABLES: dict[str, tuple[str, str, _Lines]] = {
    "overload": (
        "models; share of capacity; requests/s; answered/s; answered of capacity; p50 ms; p99 ms; "
        "p99 to that at 0.8; p99 ms of refusals; errors",
        "answered ≥ 0.95 of the capacity at 2 and 3, p99 ratio ≤ 2, refusals < 10 ms.",
        _overload,
    ),
    "mixed": (
        "models; with requests of 256 documents; small requests/s; p50 ms; p99 ms; ratio; "
        "p50 ms of the large; errors",
        "ratio ≤ 3.",
        _mixed,
    ),
    "same-scores": (
        "models; alone against; requests; compared; largest difference; other orders",
        "≤ 1e-5, 0.",
        _same_scores,
    ),
    "baseline": (
        "models; server; requests; requests/s; p50 ms; ours to it",
        "≥ 2 to `fastapi padded-whole` and `fastapi padded`.",
        _baseline,
    ),
    "cross-encoder": (
        "models; server; requests; requests/s; p50 ms; ours to it",
        "none.",
        _baseline,
    ),
    "stop": (
        "load balancer; SIGTERMs; requests; answered; without a connection; without an answer; "
        "lost; exit codes; longest stop, ms",
        "0 lost.",
        _stop,
    ),
    "kill": ("kills; slowest start, s; same scores; files left", "same scores, no files.", _kill),
    "connections": (
        "crowd; connections; p50 ms of probes; p99 ms; failed probes; p99 ms of requests; "
        "errors; descriptors",
        "no failed probe.",
        _connections,
    ),
    "memory": (f"requests; {_STEPS}; growth after 1/10", "≤ 5 % (MB).", _memory),
    "fuzz": (
        "tool; cases; passed; answers ≥ 500; seconds",
        "20,000 cases, 0 answers ≥ 500.",
        _fuzz,
    ),
    "network": (
        "answers without a route; traced; connections elsewhere",
        "0 connections.",
        _network,
    ),
    "hostile": ("tests", "all pass.", _hostile),
}
