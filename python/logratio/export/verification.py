"""Verify an exported graph: against torch, and in a smaller precision against itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logratio.bundle import (
    CACHED_REFERENCE,
    FLOAT16_REPLAY,
    OUTPUTS,
    REPLAY,
    REWARD_MODEL,
    Agreement,
    GoldenGroup,
)
from logratio.export.agreement import agreement, check_agreement
from logratio.export.loading import Loaded, one_nat_per_token
from logratio.export.parity import GoldenInput, Graph, Values, check_parity
from logratio.export.plan import ExportPlan


@dataclass(frozen=True)
class Checked:
    """The result of a verification.

    Attributes:
        parity: The largest differences by check: from torch, or in a smaller precision between
            batchings, in nats or scores.
        own: The graph's values of each candidate, if they are not torch's; else None.
        agreement: Comparison with float32 in a smaller precision.
        forced: Whether it exceeds the bounds, which was accepted.
    """

    parity: dict[str, float]
    own: list[Values] | None = None
    agreement: Agreement | None = None
    forced: bool = False


def check_graph(
    session: Any, plan: ExportPlan, loaded: Loaded, groups: Sequence[GoldenInput], *, force: bool
) -> Checked:
    """Verify a session on an exported graph.

    In float32, its values must be torch's. In a smaller precision, they must be independent of the
    batch, and its rewards must agree with torch's on the groups of the calibration.

    Args:
        session: The ONNX Runtime session.
        plan: The export.
        loaded: The models, with torch's values.
        groups: The groups to verify.
        force: Accept rewards that differ too much.

    Raises:
        ParityError: A check fails.
    """
    beta, takes_reference = plan.reward.beta, loaded.kind == CACHED_REFERENCE
    graph = Graph(session, one_nat_per_token if takes_reference else None)
    if plan.precision.is_exact:
        parity = check_parity(graph, beta, groups, loaded.expected)
        return Checked(loaded.differences | parity)
    own = graph.values(groups)
    limits = FLOAT16_REPLAY if plan.precision.dtype == "float16" else REPLAY
    parity = check_parity(graph, beta, groups, own, limits)
    assert loaded.calibration is not None and loaded.rewards is not None
    calibration = loaded.calibration
    tested = Graph(session, calibration.given if takes_reference else None)
    found = [[row[0] for row in tested.values([group])] for group in calibration.groups]
    measured = agreement(calibration.source, loaded.rewards, found)
    forced = check_agreement(plan.precision, measured, force=force)
    return Checked(parity, own, measured, forced)


def golden_groups(
    kind: str,
    groups: Sequence[GoldenInput],
    expected: Sequence[Values],
    own: Sequence[Values] | None,
) -> list[GoldenGroup]:
    """Combine the golden groups with their values.

    Args:
        kind: The kind of the graph.
        groups: The groups.
        expected: Torch's values of the groups' candidates, and perhaps of more.
        own: The graph's values, if they are not torch's.
    """
    start, found = 0, []
    for group in groups:
        end = start + len(group.candidates)
        known = _columns(kind, group, expected[start:end])
        outputs = None if own is None else _outputs(own[start:end])
        found.append(GoldenGroup(**asdict(group), **known, graph_outputs=outputs))
        start = end
    return found


def _columns(kind: str, group: GoldenInput, rows: Sequence[Values]) -> dict[str, Any]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    if kind == REWARD_MODEL:
        return {"policy_logps": [], "reference_logps": [], "scores": columns[0]}
    if kind == CACHED_REFERENCE:
        given = [one_nat_per_token(group.prompt_ids, ids) for ids in group.candidates]
        return {"policy_logps": columns[1], "reference_logps": given}
    return {"policy_logps": columns[1], "reference_logps": columns[2] if len(columns) > 2 else []}


def _outputs(rows: Sequence[Values]) -> dict[str, list[float]]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return dict(zip(OUTPUTS, columns, strict=False))
