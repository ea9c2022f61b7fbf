"""The gate of every export: the graph gives torch's numbers, whatever stands around a candidate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logratio._rust import candidate_layout
from logratio.bundle import CHUNK, OUTPUTS, PARITY, tolerance
from logratio.errors import LogratioError
from logratio.scoring.golden import GoldenInput
from logratio.scoring.graph import feed

_OTHER_CHUNK = 32


class ParityError(LogratioError, RuntimeError):
    """The graph does not give torch's log-probs."""


@dataclass(frozen=True)
class Expected:
    """Nats of each candidate of each group, from torch."""

    policy: list[list[float]]
    reference: list[list[float]]

    def pairs(self) -> list[tuple[float, float]]:
        """Return (policy, reference) of every candidate, group after group."""
        return [
            pair
            for groups in zip(self.policy, self.reference, strict=True)
            for pair in zip(*groups, strict=True)
        ]


@dataclass
class ParityReport:
    """The largest difference from torch that each check met, in nats per sequence."""

    beta: float
    largest: dict[str, float] = field(default_factory=dict)

    def compare(
        self, check: str, expected: Sequence[tuple[float, float]], rows: Sequence[Sequence[float]]
    ) -> None:
        """Compare a run's (reward, policy, reference) rows with torch.

        Raises:
            ParityError: A row is further off than rounding explains.
        """
        for (policy, reference), (reward, *logps) in zip(expected, rows, strict=True):
            slack = 0.0
            for known, found in zip((policy, reference), logps, strict=True):
                slack += tolerance(known, PARITY)
                self._note(check, known, found, tolerance(known, PARITY))
            known = self.beta * (policy - reference)
            if not abs(reward - known) <= self.beta * slack + 1e-6 * abs(known):
                raise ParityError(f"{check}: a reward is {reward:.6g}, and torch gives {known:.6g}")

    def _note(self, check: str, known: float, found: float, slack: float) -> None:
        gap = abs(found - known)
        if not gap <= slack:  # also where it is not a number
            raise ParityError(
                f"{check}: a candidate has {found:.6f} nats, torch gives {known:.6f} "
                f"(at most {slack:.1e} is rounding)"
            )
        self.largest[check] = max(self.largest.get(check, 0.0), gap)


def check_parity(
    session: Any,
    beta: float,
    groups: Sequence[GoldenInput],
    expected: Expected,
    training: Expected,
) -> dict[str, float]:
    """Compare a session with torch, and with itself in other company.

    Args:
        session: An ONNX Runtime session on the exported graph.
        beta: Reward per nat.
        groups: What to score.
        expected: Their log-probs by the models' own forward.
        training: Their log-probs as training computes them.

    Returns:
        The largest difference from torch that each check met, in nats.

    Raises:
        ParityError: A candidate's log-probs differ by more than `bundle.PARITY`.
    """
    report = ParityReport(beta)
    pairs = expected.pairs()
    as_trained = [(beta * (p - r), p, r) for p, r in training.pairs()]
    report.compare("training", pairs, as_trained)
    for check, rows in _variants(session, groups):
        report.compare(check, pairs, rows)
    return report.largest


def _variants(
    session: Any, groups: Sequence[GoldenInput]
) -> Iterator[tuple[str, list[list[float]]]]:
    """Score all candidates in several ways: name and rows (reward, policy, reference) of each."""
    yield "all groups padded together", _run(session, groups, CHUNK)
    by_group = [_run(session, [group], CHUNK) for group in groups]
    yield "each group alone", [row for rows in by_group for row in rows]
    single = [
        GoldenInput(group.prompt_ids, [candidate])
        for group in groups
        for candidate in group.candidates
    ]
    alone = [_run(session, [group], _OTHER_CHUNK) for group in single]
    yield "each candidate alone, in smaller chunks", [row for rows in alone for row in rows]


def _run(session: Any, groups: Sequence[GoldenInput], chunk: int) -> list[list[float]]:
    layout = candidate_layout(
        [np.array(group.prompt_ids, dtype=np.int32) for group in groups],
        [[np.array(ids, dtype=np.int32) for ids in group.candidates] for group in groups],
        chunk,
    )
    columns = session.run(list(OUTPUTS), feed(layout))
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
