"""Inputs of the losses: log-probs of the completions of some groups, under policy and reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from logratio._rust import ROLES
from logratio.logps.sequences import onto

CHOSEN, REJECTED, MISMATCHED = map(ROLES.index, ("chosen", "rejected", "mismatched"))


@dataclass(frozen=True)
class PairLogps:
    """Inputs of a pair loss, one element per pair.

    Attributes:
        policy_chosen_logps, policy_rejected_logps: Summed log-probs under the policy, in nats,
            float64 `[B]`.
        reference_chosen_logps, reference_rejected_logps: The same under the reference; zeros for
            a loss without a reference.
        chosen_lengths, rejected_lengths: Numbers of counted tokens, `[B]`.
        has_reference: Whether the reference's log-probs are meaningful.
        margins: By how much the data prefers the chosen completion, `[B]`; None if the loss does
            not use it.
        statistics: Results of `Method.statistics`: per pair, `[B]`, or of the whole update, `[]`.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    has_reference: bool = True
    margins: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def chosen_logratios(self) -> Tensor:
        """Log-ratio of the chosen completion, policy minus reference: `[B]`, in nats."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Log-ratio of the rejected completion, policy minus reference: `[B]`, in nats."""
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def logratio_margins(self) -> Tensor:
        """Log-ratio of the chosen minus that of the rejected completion: `[B]`, in nats."""
        return self.chosen_logratios - self.rejected_logratios


@dataclass(frozen=True)
class GroupLogps:
    """Inputs of a loss for `B` groups with `N` completions, flat and group by group.

    Attributes:
        policy_logps: Summed log-probs under the policy, in nats, float64 `[N]`.
        reference_logps: The same under the reference; zeros for a loss without a reference.
        lengths: Numbers of counted tokens, float64 `[N]`.
        roles: Indices into `logratio._rust.ROLES`, uint8 `[N]`.
        offsets: Start of each group's completions, and `N`, int64 numpy `[B + 1]`, on the host.
        values: Score, rank, margin and weight in the data, float32 numpy `[N, 4]`, on the host, NaN
            where there is none; None if the loss does not use them.
        statistics: Results of `Method.statistics`: per completion, `[N]`, or of the whole update,
            `[]`.
        has_reference: Whether the reference's log-probs are meaningful.
        confidences: Mean of log π(token) − log Σ π² over the counted tokens of each completion,
            float64 `[N]`, without a gradient; None if the loss does not use it.
        divergences: KL divergence of the reference's next-token distributions from the policy's,
            summed over the counted tokens, float64 `[N]`; None if the loss does not use it.
    """

    policy_logps: Tensor
    reference_logps: Tensor
    lengths: Tensor
    roles: Tensor
    offsets: np.ndarray
    values: np.ndarray | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    has_reference: bool = True
    confidences: Tensor | None = None
    divergences: Tensor | None = None

    @classmethod
    def concatenated(cls, parts: "Sequence[GroupLogps]") -> "GroupLogps":
        """Concatenate the groups of several parts; statistics are left out."""
        sizes = np.concatenate([part.sizes for part in parts])
        found = [part.values for part in parts if part.values is not None]
        return cls(
            torch.cat([part.policy_logps for part in parts]),
            torch.cat([part.reference_logps for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.roles for part in parts]),
            offsets=_running(sizes),
            values=np.concatenate(found) if found else None,
            has_reference=parts[0].has_reference,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def empty(self) -> "GroupLogps":
        """The same without any groups."""
        columns = {
            column.name: getattr(self, column.name)[:0]
            for column in fields(self)
            if isinstance(getattr(self, column.name), Tensor)
        }
        values = None if self.values is None else self.values[:0]
        return replace(self, **columns, offsets=self.offsets[:1], values=values, statistics={})

    def detached(self) -> "GroupLogps":
        """The same without a gradient."""
        return replace(self, policy_logps=self.policy_logps.detach(), divergences=None)

    def on_host(self) -> "GroupLogps":
        """The same without a gradient, in the host's memory, without statistics.

        All columns are one copy, since the host waits for each copy from a GPU. They keep their
        bits: float64 holds the numbers of every other type.
        """
        names = ("policy_logps", "reference_logps", "lengths", "roles")
        columns = [getattr(self, name).detach() for name in names]
        copied = torch.stack([column.double() for column in columns]).cpu()
        given = {
            name: values.to(column.dtype)
            for name, values, column in zip(names, copied, columns, strict=True)
        }
        return replace(self, **given, statistics={})

    @property
    def logratios(self) -> Tensor:
        """Policy minus reference, `[N]`, in nats."""
        return self.policy_logps - self.reference_logps

    @property
    def is_chosen(self) -> Tensor:
        """1 for completions with the role "chosen", else 0: float64 `[N]`."""
        return (self.roles == CHOSEN).double()

    @property
    def is_rejected(self) -> Tensor:
        """1 for completions with the role "rejected", else 0: float64 `[N]`."""
        return (self.roles == REJECTED).double()

    @property
    def is_mismatched(self) -> Tensor:
        """1 for completions of another prompt, else 0: float64 `[N]`."""
        return (self.roles == MISMATCHED).double()

    @cached_property
    def group_of(self) -> Tensor:
        """The group of each completion, int64 `[N]`."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return onto(owners, self.lengths.device)

    def per_group(self, values: Tensor) -> Tensor:
        """Sum values of completions, `[N]`, over each group: `[B]`."""
        return values.new_zeros(len(self)).index_add(0, self.group_of, values)

    def pairs(self) -> PairLogps:
        """Return the groups as pairs: two completions each, the chosen one first.

        Sides are found by their position; a mask would make the host wait for its size.
        """
        policy, reference, lengths = (
            _sides(column) for column in (self.policy_logps, self.reference_logps, self.lengths)
        )
        return PairLogps(
            *policy,
            *reference,
            *lengths,
            has_reference=self.has_reference,
            margins=self._margins,
            statistics={
                name: value if value.ndim == 0 else _sides(value)[0]
                for name, value in self.statistics.items()
            },
        )

    @property
    def _margins(self) -> Tensor | None:
        if self.values is None:
            return None
        margins = self.values[:, MARGIN].reshape(-1, 2)[:, 0].astype(np.float64)
        return onto(margins, self.lengths.device)

    @cached_property
    def grades(self) -> np.ndarray:
        """How good the data calls each completion, float64 numpy `[N]`; larger is better.

        The score if all completions of a list have one; else minus the rank if all have one; else
        minus the position: lists are stored from best to worst. A pair is such a list.
        """
        places: np.ndarray = np.repeat(self.offsets[:-1], self.sizes) - np.arange(len(self.lengths))
        if self.values is None:
            return places.astype(np.float64)
        scores, ranks = self.values[:, SCORE], self.values[:, RANK]
        ranked = np.where(self._are_complete(ranks), -ranks, places)
        return np.where(self._are_complete(scores), scores, ranked).astype(np.float64)

    def _are_complete(self, column: np.ndarray) -> np.ndarray:
        """Return for each completion whether all of its list have a value, bool numpy `[N]`."""
        missing = np.logical_or.reduceat(np.isnan(column), self.offsets[:-1])
        return np.repeat(~missing, self.sizes)

    @property
    def sizes(self) -> np.ndarray:
        """Number of completions of each group, int64 numpy `[B]`."""
        return np.diff(self.offsets)

    def table(self, values: Tensor, fill: float) -> Tensor:
        """Return values of completions, `[N]`, as a row per group, `[B, K]`, filled up at the end.

        Args:
            values: The values; differentiable.
            fill: Value of the places after the last completion of a group.
        """
        padded = torch.cat([values, values.new_full((1,), fill)])
        return padded[self._places]

    @cached_property
    def _places(self) -> Tensor:
        """Index of the completion at each place of `table`; `N` where there is none."""
        sizes = self.sizes
        column = np.arange(int(sizes.max(initial=1)))
        places = np.where(
            column < sizes[:, None], self.offsets[:-1, None] + column, self.offsets[-1]
        )
        return onto(places, self.lengths.device)

    def grade_table(self) -> Tensor:
        """Return `grades` as a row per group, float64 `[B, K]`, -inf where there is none."""
        return self.table(onto(self.grades, self.lengths.device), -torch.inf)


SCORE, RANK, MARGIN, WEIGHT = range(4)
"""Columns of `GroupLogps.values`."""


def _running(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _sides(column: Tensor) -> tuple[Tensor, Tensor]:
    """Split a column `[N]` into its chosen and its rejected completions, `[B]` each."""
    chosen, rejected = column.view(-1, 2).unbind(1)
    return chosen, rejected
