"""Pairs that say the opposite of each other: A over B here, B over A there."""

import json
from typing import IO

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store
from logratio.data.codes import CODES
from logratio.data.records import Refusal, Source
from logratio.data.report import BadDataError, DataReport, write_refusal


def losers(
    groups: NDArray[np.int64], votes: NDArray[np.uint32], *, by_majority: bool
) -> NDArray[np.int64]:
    """Say which groups go.

    Args:
        groups: `[C, 2]`, numbers of groups that contradict each other.
        votes: `[C, 2]`, how often each was said.
        by_majority: Keep what was said more often; else both go.

    Returns:
        int64, sorted, each once.
    """
    if not by_majority:
        return np.unique(groups)
    return np.unique(groups[votes <= votes[:, ::-1]])


def settle(
    whole: Store, gone: NDArray[np.int64], report: DataReport, log: IO[str] | None = None
) -> NDArray[np.bool_]:
    """Take losing groups out of the account: R308 where nothing of their row is left.

    Args:
        whole: Every group.
        gone: Those that go.
        report: The account, with their tokens and rows counted as kept.
        log: Where refused rows are listed, if anywhere.

    Returns:
        bool `[G]`, the groups that stay.

    Raises:
        BadDataError: No group stays.
    """
    files, lines = whole.sources()
    names = json.loads(whole.metadata)["files"]
    keep = np.ones(len(whole), bool)
    keep[gone] = False
    begins = np.concatenate(([True], (np.diff(lines) != 0) | (np.diff(files) != 0)))
    if report.kept == len(whole):
        begins[:] = True  # a group a row, even where rows share a line, as in a JSON array
    rows = np.cumsum(begins) - 1  # the groups of a row stand together
    is_left = np.bincount(rows, keep) > 0
    for group in gone.tolist():
        source = Source(names[files[group]], int(lines[group]))
        if is_left[rows[group]]:
            report.warn("W530", source, f" {CODES['R308']}")
        elif begins[group]:
            refusal = Refusal(source, "R308", CODES["R308"])
            report.withdraw(refusal)
            if log:
                write_refusal(log, refusal)
    prompts = int(whole.prompt_lengths()[gone].sum())
    report.prompt_tokens -= prompts
    report.completion_tokens -= int(whole.shared_lengths()[gone].sum()) - prompts
    report.check()
    if not keep.any():
        raise BadDataError(f"no row was kept\n{report.to_text()}")
    return keep
