"""Layouts in which a row is no record: functions that make rows of them, by name.

`FormatSettings.rows` and ``--rows`` take these names. The formats read what the functions make as
any other row; what of a row they leave out comes as an `InvalidRecordError` in its place, and is
counted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from logratio.data.layouts import annotations, steps, trees
from logratio.data.layouts.ratings import looks_rated
from logratio.data.layouts.values import Part, Row


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of rows.

    Attributes:
        title: What people call it.
        looks: Says whether a row looks like it, from its keys.
        function: Makes rows of one.
        flags: What reads it best, besides ``--rows``.
    """

    title: str
    looks: Callable[[Row], bool]
    function: Callable[[Row], Iterator[Part]]
    flags: str = ""


LAYOUTS: Mapping[str, Layout] = {
    "argilla": Layout("Argilla's records", annotations.looks_argilla, annotations.argilla),
    "label-studio": Layout(
        "Label Studio's export", annotations.looks_label_studio, annotations.label_studio
    ),
    "math-shepherd": Layout(
        "Math-Shepherd", steps.looks_math_shepherd, steps.math_shepherd, "--group-by question"
    ),
    "oasst": Layout("OASST's trees", trees.looks_oasst, trees.oasst),
    "prm800k": Layout("PRM800K", steps.looks_prm800k, steps.prm800k),
}


def advice(row: Row) -> str:
    """Say with which flags a row could be read that no format knows.

    Returns:
        The end of a sentence; empty where it looks like nothing known.
    """
    for name, layout in LAYOUTS.items():
        if layout.looks(row):
            flags = " ".join(filter(None, (f"--rows {name}", layout.flags)))
            return f"; this looks like {layout.title}: {flags}"
    return looks_rated(row)
