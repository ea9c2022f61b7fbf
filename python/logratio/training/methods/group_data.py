"""What the data and the whole update add to log-probs: values, weights, statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logratio._rust import Store
from logratio.errors import ConfigError
from logratio.logps.batch import TargetTokens
from logratio.logps.sequences import onto
from logratio.training.methods.logps import CHOSEN, RANK, REJECTED, SCORE, WEIGHT, GroupLogps
from logratio.training.methods.objective import Objective
from logratio.training.methods.token_weights import WeightedTurns
from logratio.training.parallel.processes import ALONE, Processes


@dataclass(frozen=True)
class GroupData:
    """What the data says about its groups, besides their tokens.

    Attributes:
        values: Score, rank, margin and weight of every completion, float32 `[N, 4]`; None: unused.
        weights: Weight of every group, float64 `[G]`, with mean 1; None: all are 1.
        has_reference: Whether the objective uses the reference's log-probs.
        flipped: Whether the labels of each group are exchanged, bool `[G]`; None: of none.
        has_pairs: Whether groups are pairs, whose labels are their positions.
        turns: The weights of turns; None: all are 0 or 1.
    """

    values: np.ndarray | None
    weights: np.ndarray | None
    has_reference: bool
    flipped: np.ndarray | None = None
    has_pairs: bool = True
    turns: WeightedTurns | None = None

    @classmethod
    def of(
        cls, store: Store, objective: Objective, flipped: float = 0.0, seed: int = 0
    ) -> "GroupData":
        """Return the data of a store that an objective uses.

        Args:
            store: The groups.
            objective: The objective.
            flipped: Share of the groups whose labels are exchanged, for study.
            seed: Seed of their choice.

        Raises:
            ConfigError: The weights of the data sum to 0.
        """
        values = store.values()
        weights = group_weights(values, store.completion_offsets())
        used = _used(store, values, objective) if objective.needs_values else None
        chosen = np.random.default_rng(seed).random(len(store)) < flipped if flipped else None
        is_pairs, turns = objective.data == "pairs", WeightedTurns.of(store)
        return cls(used, weights, objective.needs_reference, chosen, is_pairs, turns)

    def groups(
        self,
        targets: TargetTokens,
        policy: Tensor,
        reference: Tensor,
        confidences: Tensor | None = None,
        divergences: Tensor | None = None,
    ) -> GroupLogps:
        """Return the inputs of a loss for some groups, from values of completions, `[N]` each."""
        groups = GroupLogps(
            policy,
            reference,
            self._lengths(targets),
            targets.roles,
            targets.group_offsets,
            None if self.values is None else self.values[targets.rows],
            has_reference=self.has_reference,
            confidences=confidences,
            divergences=divergences,
        )
        if self.flipped is None:
            return groups
        flip = _with_flipped_pairs if self.has_pairs else _with_flipped_roles
        return flip(groups, self.flipped[targets.groups])

    def token_weights(self, objective: Objective, targets: TargetTokens) -> Tensor | None:
        """Return the weights of tokens, float64 `[S]`: those of the method times those of turns.

        Returns:
            None: each counted token counts once.
        """
        own, turns = objective.token_weights(targets), self._of_turns(targets)
        return turns if own is None else own if turns is None else own * turns

    def _of_turns(self, targets: TargetTokens) -> Tensor | None:
        """Return the weights of turns for each token, float64 `[S]`; None: all are 0 or 1."""
        return None if self.turns is None else self.turns.of_tokens(targets)

    def _lengths(self, targets: TargetTokens) -> Tensor:
        """Return the numbers of counted tokens, each times the size of its weight: `[N]`."""
        turns = self._of_turns(targets)
        return targets.lengths if turns is None else targets.sums(turns.abs())

    def lengths_of(self, store: Store) -> Tensor:
        """Return the lengths of all completions of a store, float64 `[N]`, on the host."""
        if self.turns is None:
            return torch.from_numpy(store.counted_lengths().astype(np.float64))
        return self.turns.lengths()

    def weighted(self, losses: Tensor, targets: TargetTokens) -> Tensor:
        """Multiply the losses of groups, `[B]`, by their weights."""
        if self.weights is None:
            return losses
        return losses * onto(self.weights[targets.groups], losses.device)


def _used(store: Store, values: np.ndarray, objective: Objective) -> np.ndarray:
    """Return the values that an objective uses; in lists, labels of pairs override scores."""
    if objective.data != "lists":
        return values
    labelled = np.isin(store.roles(), (CHOSEN, REJECTED))
    used = values.copy()
    used[labelled, SCORE : RANK + 1] = np.nan
    return used


def _with_flipped_pairs(groups: GroupLogps, flipped: np.ndarray) -> GroupLogps:
    """Exchange the sides of the pairs that are `flipped`, bool `[B]`."""
    places = np.arange(len(groups.lengths)).reshape(-1, 2)
    exchanged = np.where(flipped[:, None], places[:, ::-1], places).ravel()
    order = onto(exchanged, groups.lengths.device)
    names = "policy_logps", "reference_logps", "lengths", "confidences", "divergences"
    given = {name: getattr(groups, name) for name in names}
    exchanged_columns = {n: column[order] for n, column in given.items() if column is not None}
    return replace(groups, **exchanged_columns)


def _with_flipped_roles(groups: GroupLogps, flipped: np.ndarray) -> GroupLogps:
    """Exchange good and bad in the groups that are `flipped`, bool `[B]`."""
    exchanged = onto(np.repeat(flipped, groups.sizes), groups.lengths.device)
    is_label = groups.is_mismatched == 0
    return replace(groups, roles=torch.where(exchanged & is_label, 1 - groups.roles, groups.roles))


def group_weights(values: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """Return the weight of each group of the data, with mean 1; None if no group has one.

    Args:
        values: Values of the data's completions, float32 `[N, 4]`.
        offsets: Start of each group's completions, and `N`, int64 `[B + 1]`.

    Raises:
        ConfigError: The weights sum to 0.
    """
    own = values[offsets[:-1], WEIGHT].astype(np.float64)
    if np.isnan(own).all():
        return None
    weights: np.ndarray = np.where(np.isnan(own), 1.0, own)
    if not weights.sum() > 0:
        raise ConfigError("the weights of the data sum to 0: there is nothing to train on")
    weights /= weights.mean()
    return weights


class FirstPass(NamedTuple):
    """A micro-batch that was scored before the gradients of its update.

    Attributes:
        groups: Its groups, without a gradient.
        rows: Rows of their completions in the store, int64 numpy `[N]`.
        reference: Sums of the reference, float64 `[N]`, in the order of `rows`.
    """

    groups: GroupLogps
    rows: np.ndarray
    reference: Tensor


@dataclass(frozen=True)
class UpdateStatistics:
    """Results of `Objective.statistics` for an update, and the reference's sums.

    Attributes:
        found: One number for the update, `[]`, or one for each completion, `[N]`, on the host.
        places: Place in `found` of each row in the store.
        own: The micro-batches of this process.
    """

    found: Mapping[str, Tensor]
    places: "Places"
    own: Sequence[FirstPass]

    @classmethod
    def of(
        cls, objective: Objective, own: Sequence[FirstPass], processes: Processes = ALONE
    ) -> "UpdateStatistics":
        """Compute the statistics of an update, and let the memory of the objective continue.

        Args:
            objective: The objective.
            own: The micro-batches of this process.
            processes: The processes of the run; all call this together.
        """
        shared = processes.share([_plain(own)] if own and processes.leads_share else [])
        every = [part for theirs in shared for part in theirs]
        groups, rows = _in_order(every, has_reference=objective.needs_reference)
        return cls(objective.statistics(groups, trains=True), Places.of(rows), own)

    def of_rows(self, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Return the statistics for completions by their rows in the store, `[n]`, on a device."""
        places = self.places.at(rows)
        return {
            name: onto(value if value.ndim == 0 else value[places], device)
            for name, value in self._arrays.items()
        }

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.found.items()}

    def references(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Return the reference's sums of this process's completions, float64 `[n]`, on a device."""
        if not self.own:
            return torch.zeros(len(rows), dtype=torch.float64, device=device)
        places = onto(self._own_places.at(rows), device)
        return self._own_references[places]

    @cached_property
    def _own_places(self) -> "Places":
        return Places.of(np.concatenate([one.rows for one in self.own]))

    @cached_property
    def _own_references(self) -> Tensor:
        return torch.cat([one.reference for one in self.own])


@dataclass(frozen=True)
class Places:
    """Where the values of rows are.

    Attributes:
        rows: The rows, int64 `[M]`, ascending, each once.
        first: Place of the first value of each, int64 `[M]`.
    """

    rows: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Places":
        """Return the places of rows in their array, int64 `[N]`; a row may be there twice."""
        return cls(*np.unique(rows, return_index=True))

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Return the place of each of `rows`; that of another one for a row that is not there.

        A process without groups takes part in a pass with a group whose loss counts nothing.
        """
        found: np.ndarray = self.first[
            np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        ]
        return found


_COLUMNS = ("policy_logps", "reference_logps", "lengths", "roles")


def _plain(own: Sequence[FirstPass]) -> dict[str, Any]:
    """Return the groups of micro-batches as JSON values; float64 keeps all of its digits."""
    groups = GroupLogps.concatenated([one.groups for one in own]).on_host()
    rows = np.concatenate([one.rows for one in own])
    columns: dict[str, Any] = {name: getattr(groups, name).tolist() for name in _COLUMNS}
    values = None if groups.values is None else groups.values.tolist()
    return columns | {"sizes": groups.sizes.tolist(), "rows": rows.tolist(), "values": values}


def _in_order(
    parts: Sequence[Mapping[str, Any]], *, has_reference: bool
) -> tuple[GroupLogps, np.ndarray]:
    """Join the groups of all processes, in the order of the store; return their rows too."""
    columns = {
        name: np.concatenate([np.asarray(part[name]) for part in parts])
        for name in (*_COLUMNS, "sizes", "rows")
    }
    sizes, rows = columns["sizes"].astype(np.int64), columns["rows"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = np.argsort(rows[starts[:-1]], kind="stable")
    at = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in order])
    found = [part["values"] for part in parts if part["values"] is not None]
    policy, reference, lengths = (torch.from_numpy(columns[name][at]) for name in _COLUMNS[:3])
    groups = GroupLogps(
        policy,
        reference,
        lengths,
        torch.from_numpy(columns["roles"][at].astype(np.uint8)),
        np.concatenate([[0], np.cumsum(sizes[order])]),
        np.concatenate([np.asarray(one, np.float32) for one in found])[at] if found else None,
        has_reference=has_reference,
    )
    return groups, rows[at]
