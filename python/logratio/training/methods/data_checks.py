"""Which data a method trains on: how rows are read for it, and whether groups fit."""

from dataclasses import replace

import numpy as np
import torch

from logratio._rust import ROLES, Store
from logratio.data.formats.settings import FormatSettings, Kind
from logratio.data.store.load import source_names
from logratio.data.store.turn_weights import extremes, with_weights
from logratio.data.store.unpaired import are_pairs
from logratio.errors import ConfigError
from logratio.training.methods.group_data import GroupData, group_weights
from logratio.training.methods.logps import CHOSEN, MARGIN, MISMATCHED, REJECTED, GroupLogps
from logratio.training.methods.method import DataKind
from logratio.training.methods.objective import Objective

CANDIDATE, DEMONSTRATION = map(ROLES.index, ("candidate", "demonstration"))
_KINDS: dict[DataKind, tuple[Kind, ...] | None] = {
    "pairs": ("pair",),
    "labelled answers": ("unpaired", "pair"),
    "lists": ("group", "pair"),
    "demonstrations": None,
}
_WANTED: dict[DataKind, str] = {
    "pairs": "groups of chosen and rejected",
    "labelled answers": "groups of one answer that is chosen or rejected",
    "lists": "groups of at least two ranked answers",
    "demonstrations": "groups of demonstration",
}
_ADVICE: dict[DataKind, str] = {
    "pairs": "a method for pairs, such as --loss dpo",
    "labelled answers": "a method for labelled answers, such as --loss kto",
    "lists": "a method for lists, such as --loss plackett-luce (with --lists groups)",
    "demonstrations": "--loss sft",
}

_REBUILT: dict[DataKind, str] = {
    "demonstrations": "; `logratio data build --demonstrations` makes a store for it, of pairs and "
    "lists too"
}
"""How a store is built whose groups are read from the same rows in another way."""


def formats_for(data: DataKind, formats: FormatSettings) -> FormatSettings:
    """Return how rows are read for a method that trains on `data`.

    Raises:
        ConfigError: The settings turn lists into pairs, and the method trains on whole lists.
    """
    if data == "lists" and formats.lists == "best_worst":
        raise ConfigError(
            "--lists best_worst makes one pair of each list, and the loss trains on whole lists: "
            "remove --lists, or give --loss best-worst or dpo"
        )
    lists = "groups" if data == "lists" else formats.lists
    is_sft = data == "demonstrations"
    return replace(formats, demonstrations=is_sft, kinds=_KINDS[data], lists=lists)


def check_data(store: Store, objective: Objective, what: str) -> None:
    """Check that groups are what an objective trains on, before models are loaded.

    Args:
        store: The tokenized groups.
        objective: The objective.
        what: Its name, for messages.

    Raises:
        ConfigError: Some groups do not fit, a margin is missing, all answers of a list are equally
            good, or turns have weights for which the objective is not defined; the message counts
            them and locates the first. Or the weights sum to 0.
    """
    check_groups(store, objective.data, what)
    if any(term.method.needs_margins for term in objective.terms):
        margins = store.values()[store.completion_offsets()[:-1], MARGIN]
        _refuse(
            store,
            ~(margins > 0),
            f"{what} needs a margin above 0 for each pair (a column margin, or scores of both "
            "answers), and {count} none",
            ("pair has", "pairs have"),
        )
    group_weights(store.values(), store.completion_offsets())
    if store.is_weighted:
        _check_turns(store, objective, what)
    if objective.data == "lists":
        _refuse(
            store,
            _tied(store, objective),
            f"{what} compares answers, and all answers of {{count}} are tied",
            ("list", "lists"),
        )


def check_groups(store: Store, data: DataKind, what: str) -> None:
    """Check that every group holds `data`.

    Raises:
        ConfigError: Some do not; the message counts them, locates the first, and names a method
            that trains on them.
    """
    found = kinds_of(store)
    wrong = ~found[data]
    if not wrong.any():
        return
    others = (kind for kind in _ADVICE if kind != data and found[kind][wrong.argmax()])
    advice = next((f"; {_ADVICE[kind]}, trains on them" for kind in others), "")
    advice = _REBUILT.get(data, "") + advice
    _refuse(
        store,
        wrong,
        f"{what} needs {_WANTED[data]}, and {{count}} different",
        ("group is", "groups are"),
        advice,
    )


def kinds_of(store: Store) -> dict[DataKind, np.ndarray]:
    """Return for each kind of data whether each group is of this kind, bool `[G]`."""
    offsets, roles = store.completion_offsets(), store.roles()
    sizes, first, is_pair = np.diff(offsets), roles[offsets[:-1]], are_pairs(store)
    second = roles[np.minimum(offsets[:-1] + 1, len(roles) - 1)]
    is_labelled = np.isin(first, (CHOSEN, REJECTED))
    alone = (sizes == 1) | ((sizes == 2) & (second == MISMATCHED))
    candidates = np.add.reduceat(roles == CANDIDATE, offsets[:-1]) == sizes
    return {
        "pairs": is_pair,
        "labelled answers": is_labelled & alone,
        "lists": is_pair | (candidates & (sizes >= 2)),
        "demonstrations": (sizes == 1) & (first == DEMONSTRATION),
    }


def _check_turns(store: Store, objective: Objective, what: str) -> None:
    """Check that an objective is defined for the weights of turns.

    Raises:
        ConfigError: It is not.
    """
    if objective.scores:
        check_whole_answers(store, what, "remove them, or give --loss dpo")
    if not objective.takes_bad_turns:
        _refuse(
            store,
            extremes(store)[0] < 0,
            f"{what} is not defined for turns with a `weight` below 0, and {{count}}",
            ("group has one", "groups have one"),
            ": give the weight 0, or a method of log-ratios, such as --loss dpo",
        )


def check_whole_answers(store: Store, what: str, advice: str) -> None:
    """Check that no turn has another weight than 0 and 1, for what scores whole answers.

    Args:
        store: The groups.
        what: What scores them, for the message.
        advice: What to change.

    Raises:
        ConfigError: A turn has one.
    """
    _refuse(
        store,
        with_weights(store),
        f"{what} scores whole answers, so their turns have no `weight`, and {{count}}",
        ("group has one", "groups have one"),
        f": {advice}",
    )


def _tied(store: Store, objective: Objective) -> np.ndarray:
    """Return whether all answers of each list are equally good, bool `[G]`."""
    offsets, data = store.completion_offsets(), GroupData.of(store, objective)
    nothing = torch.zeros(store.completions, dtype=torch.float64)
    roles = torch.from_numpy(store.roles())
    grades = GroupLogps(nothing, nothing, nothing, roles, offsets, data.values).grades
    starts = offsets[:-1]
    tied: np.ndarray = np.minimum.reduceat(grades, starts) == np.maximum.reduceat(grades, starts)
    return tied


def _refuse(
    store: Store, wrong: np.ndarray, what: str, noun: tuple[str, str], advice: str = ""
) -> None:
    """Raise an error for the groups that are `wrong`, bool `[G]`, if there are any.

    Args:
        store: The groups.
        wrong: Which of them are wrong.
        what: The message; "{count}" in it becomes their number and `noun`.
        noun: The noun, and its verb, for one group and for several.
        advice: The end of the message.
    """
    if not wrong.any():
        return
    (place,) = source_names(store, np.flatnonzero(wrong)[:1].tolist())
    number = int(wrong.sum())
    count = f"{number:,} {noun[number != 1]}"
    raise ConfigError(f"{what.replace('{count}', count)} (first: {place}){advice}")
