"""The objective of a run: one method, or a weighted sum of several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from logratio.errors import ConfigError
from logratio.logps.batch import TargetTokens
from logratio.synonyms import LOSSES, VALUES
from logratio.training.config import TrainConfig
from logratio.training.methods.columns import (
    Columns,
    answer_columns,
    demonstration_columns,
    list_columns,
    pair_columns,
)
from logratio.training.methods.logps import GroupLogps, PairLogps
from logratio.training.methods.method import DataKind, Method, Option
from logratio.training.methods.statistics import Memory
from logratio.training.methods.table import METHODS, MIXTURES

_COLUMNS: dict[DataKind, Callable[[Tensor, GroupLogps, Tensor], Columns]] = {
    "pairs": pair_columns,
    "labelled answers": answer_columns,
    "lists": list_columns,
    "demonstrations": demonstration_columns,
}


ALONE = ("label_smoothing", "gamma")
"""Options that are settings of their own; all others are in `loss_options`."""


@dataclass(frozen=True)
class Term:
    """A method in a run.

    Attributes:
        name: Its name, or the import path of a loss of one's own.
        method: The method.
        weight: Weight of its loss in the objective.
        beta: β; 1 if the method has none.
        options: Values of all of its options.
    """

    name: str
    method: Method
    weight: float
    beta: float
    options: Mapping[str, float]

    def losses(self, groups: GroupLogps) -> Tensor:
        """Return the loss of each group, `[B]`, without the weight."""
        given = groups.pairs() if self.method.takes is PairLogps else groups
        return self.method.loss(given, **self._arguments)

    @cached_property
    def _arguments(self) -> dict[str, float]:
        """β and the options that the loss itself takes; others belong to the weights of tokens."""
        taken = inspect.signature(self.method.loss).parameters
        every = {"beta": self.beta, **self.options}
        return {name: value for name, value in every.items() if name in taken}

    @property
    def initial_value(self) -> float | None:
        """The loss at policy = reference; None if it depends on the data."""
        return self.method.initial_value(self.beta, self.options)

    def rewards(self, groups: GroupLogps) -> Tensor:
        """Return the reward of each completion, `[N]`."""
        if self.method.rewards == "mean":
            return self.beta * groups.policy_logps / groups.lengths
        return self.beta * groups.logratios


class Objective:
    """The loss of a run and its metrics.

    A loss is computed for each part of a micro-batch while its logits are in memory, and metrics
    once per update for all of its groups. What a loss takes from the whole update is computed
    before, by `statistics`.

    Args:
        terms: The methods; their losses are added.

    Attributes:
        data: What a group holds.
        memory: Running numbers of each method; a checkpoint contains them.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.data = data_of(terms)
        self.memory: dict[str, Memory] = {term.name: {} for term in terms if term.method.statistics}

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """Return the objective of a run.

        Raises:
            ConfigError: A method or an option is unknown or invalid.
        """
        return cls(terms_of(config))

    @property
    def needs_reference(self) -> bool:
        """Whether a method uses the reference's log-probs."""
        return any(term.method.needs_reference for term in self.terms)

    @property
    def beta(self) -> float:
        """β of the rewards in the metrics; 1 if no method has one."""
        return self._scale.beta

    @property
    def options(self) -> dict[str, float]:
        """The options of a run with one method, defaults included; of a mixture, none."""
        return dict(self.terms[0].options) if len(self.terms) == 1 else {}

    def beta_for_all(self, given: float | None) -> float | None:
        """Return the β that repeats a run: of a mixture, the given one, as defaults differ."""
        if len(self.terms) > 1 or not self.has_beta:
            return given
        return self.beta

    @property
    def has_beta(self) -> bool:
        """Whether a method has a β."""
        return self._scale.method.beta is not None

    @property
    def needs_statistics(self) -> bool:
        """Whether all groups of an update must be scored before any gradient is computed."""
        return bool(self.memory)

    @property
    def needs_values(self) -> bool:
        """Whether a method uses scores, ranks or margins of the data."""
        return any(term.method.needs_values for term in self.terms)

    @property
    def needs_mismatches(self) -> bool:
        """Whether each group needs the answer to another prompt."""
        return any(term.method.needs_mismatches for term in self.terms)

    @property
    def needs_confidences(self) -> bool:
        """Whether a method uses how confident the policy is in each token."""
        return any(term.method.needs_confidences for term in self.terms)

    @property
    def scores(self) -> bool:
        """Whether a reward model is trained, whose scores are in place of log-probs."""
        return any(term.method.scores for term in self.terms)

    @property
    def takes_bad_turns(self) -> bool:
        """Whether all methods are defined for turns with a negative weight."""
        return all(term.method.bad_turns for term in self.terms)

    @property
    def needs_divergences(self) -> bool:
        """Whether a method compares whole distributions with a live reference."""
        return any(term.method.needs_divergences for term in self.terms)

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens do not count equally, so that log-probs of tokens are needed."""
        return self._weighing is not None

    def token_weights(self, targets: TargetTokens) -> Tensor | None:
        """Return the weights of tokens in the sums, float64 `[S]`; None: each counts once."""
        term = self._weighing
        if term is None or term.method.token_weights is None:
            return None
        return term.method.token_weights(targets, **term.options)

    @cached_property
    def _weighing(self) -> Term | None:
        return next((term for term in self.terms if term.method.token_weights), None)

    @property
    def initial_value(self) -> float | None:
        """The loss at policy = reference; None if it depends on the data."""
        values = [(term.weight, term.initial_value) for term in self.terms]
        known = [weight * value for weight, value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    def losses(self, groups: GroupLogps) -> Tensor:
        """Return the loss of each group, `[B]`, which an update averages."""
        first, *rest = (term.weight * term.losses(groups) for term in self.terms)
        return sum(rest, first)

    def statistics(self, groups: GroupLogps, *, trains: bool) -> dict[str, Tensor]:
        """Return what the methods take from all groups of an update.

        Args:
            groups: All groups of the update, of all processes, on the host, without a gradient.
            trains: Whether `memory` continues with this update; False: it is left as it is.
        """
        found: dict[str, Tensor] = {}
        for term in self.terms:
            if of := term.method.statistics:
                memory = self.memory[term.name] if trains else dict(self.memory[term.name])
                found |= of(groups, memory, beta=term.beta, trains=trains, **term.options)
        return found

    def metrics(self) -> list[str]:
        """Return the names of the metrics of a group."""
        groups = sample_groups(self.data)
        return [*self.columns(torch.zeros(len(groups), dtype=torch.float64), groups)]

    def columns(self, losses: Tensor, groups: GroupLogps) -> Columns:
        """Return the metrics of each group; the trainer averages them."""
        found = _COLUMNS[self.data](losses, groups, self._scale.rewards(groups))
        if self.scores:  # scores are rewards already
            return {name: one for name, one in found.items() if not name.startswith("logps/")}
        return found

    @cached_property
    def _scale(self) -> Term:
        """The term whose rewards are reported: the first that has rewards."""
        return next((term for term in self.terms if term.method.beta is not None), self.terms[0])


def data_of(terms: Sequence[Term]) -> DataKind:
    """Return what a group must hold for all of the methods.

    Raises:
        ConfigError: They need different data.
    """
    kinds = {term.method.data: term.name for term in terms}
    others = {kind: name for kind, name in kinds.items() if kind != "demonstrations"}
    if len(others) > 1 or ("labelled answers" in kinds and len(kinds) > 1):
        needs = " and ".join(f"{name} needs {kind}" for kind, name in kinds.items())
        raise ConfigError(f"--loss: {needs}, and a run has one kind of data")
    return next(iter(others), "demonstrations")


def terms_of(config: TrainConfig) -> tuple[Term, ...]:
    """Return the methods of a run with their β and options.

    Raises:
        ConfigError: A name, weight or option is unknown or invalid; the message names it.
    """
    named = named_methods(config.loss)
    options = dict(config.loss_options)
    for name in ALONE:
        if (value := getattr(config, name)) is None:
            continue
        if name in options:
            raise ConfigError(
                f"{_shown(name)} is {value:g}, and --loss-option {name} is {options[name]:g}: "
                "give one of them"
            )
        options[name] = value
    _check_known(options, named, config)
    terms = [
        Term(name, method, weight, _beta(method, config.beta), _options_of(name, method, options))
        for name, (method, weight) in named.items()
    ]
    if len(terms) > 1 and any(term.method.token_weights for term in terms):
        raise ConfigError(
            f"--loss {config.loss}: a method that weighs tokens cannot be mixed with others"
        )
    if len(terms) > 1 and any(term.method.scores for term in terms):
        raise ConfigError(
            f"--loss {config.loss}: a reward model has no log-probs, so its loss cannot be mixed "
            "with others"
        )
    data_of(terms)
    return tuple(terms)


def named_methods(text: str) -> dict[str, tuple[Method, float]]:
    """Parse the names and weights of methods, such as "dpo:1.0+sft:0.2", or a mixture's name.

    Raises:
        ConfigError: A name is unknown, occurs twice, or a weight is not above 0.
    """
    found: dict[str, tuple[Method, float]] = {}
    for part in text.split("+"):
        name, weight = _weight_of(part.strip())
        for one, share in MIXTURES.get(name, {name: 1.0}).items():
            if one in found:
                raise ConfigError(f"--loss {text}: {one} occurs twice")
            found[one] = method_named(one), weight * share
    return found


def _weight_of(part: str) -> tuple[str, float]:
    """Split "name:weight"; the weight is 1 if there is none."""
    name, colon, last = part.rpartition(":")
    try:
        weight = float(last) if colon else 1.0
    except ValueError:
        return part, 1.0  # module:function
    if not (0 < weight < float("inf")):
        raise ConfigError(f"--loss {part}: the weight must be a number above 0")
    return (name, weight) if colon else (part, 1.0)


def method_named(name: str) -> Method:
    """Return a method of the table, or one's own by its import path, "module:function".

    Raises:
        ConfigError: It is unknown, cannot be imported, or is no loss.
    """
    if method := METHODS.get(name):
        return method
    if ":" not in name:
        raise ConfigError(
            f"--loss {name!r} is {_instead(name)}; choose from {', '.join((*METHODS, *MIXTURES))}, "
            "or name a function as module:function"
        )
    return _own_method(name)


def _instead(name: str) -> str:
    """Say that a method is unknown, and what to give: TRL's equivalent, or the nearest name."""
    if own := VALUES.get(("--loss-type", name)) or LOSSES.get(name):
        return f"a name of TRL: give {own}"
    near = get_close_matches(name.casefold().replace("_", "-"), (*METHODS, *MIXTURES), 1)
    return f"unknown, did you mean {near[0]}?" if near else "unknown"


def _own_method(path: str) -> Method:
    """Import a loss of one's own: a `Method`, or a function of `PairLogps` or `GroupLogps`."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # the module's own code may raise anything
        raise ConfigError(
            f"--loss {path}: cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if isinstance(found, Method):
        return found
    if not callable(found):
        raise ConfigError(f"--loss {path}: neither a function nor a Method")
    given = inspect.signature(found).parameters
    first = next(iter(given.values()), None)
    takes = GroupLogps if first and "GroupLogps" in str(first.annotation) else PairLogps
    numbers = {
        name: one.default
        for name, one in given.items()
        if one.kind is one.KEYWORD_ONLY and isinstance(one.default, int | float)
    }
    beta = numbers.pop("beta", 0.1 if "beta" in given else None)
    options = {name: Option(value, "", -np.inf) for name, value in numbers.items()}
    return Method(path, found, "", "", takes=takes, beta=beta, options=options, bad_turns=False)


def _check_known(
    options: Mapping[str, float], named: Mapping[str, tuple[Method, float]], config: TrainConfig
) -> None:
    """Refuse options and a β that no method of the run has."""
    known = {name for method, _ in named.values() for name in method.options}
    for name in options:
        if name not in known:
            has = f"its options are {', '.join(sorted(known))}" if known else "it has no options"
            raise ConfigError(f"--loss {config.loss} has no {_shown(name)}; {has}")
    if config.beta is not None and all(method.beta is None for method, _ in named.values()):
        raise ConfigError(f"--loss {config.loss} has no --beta")


def _shown(option: str) -> str:
    return f"--{option.replace('_', '-')}" if option in ALONE else f"option {option!r}"


def _options_of(name: str, method: Method, given: Mapping[str, float]) -> dict[str, float]:
    """Return the value of every option of a method, checked."""
    options = {key: given.get(key, option.default) for key, option in method.options.items()}
    for key, value in options.items():
        if not method.options[key].allows(value):
            raise ConfigError(
                f"--loss {name}: {key} must be {method.options[key].range}, not {value:g}"
            )
    return options


def _beta(method: Method, given: float | None) -> float:
    """Return β: that of the run, or the method's default; 1 if the method has none."""
    if method.beta is None:
        return 1.0
    return method.beta if given is None else given


def check_own_losses(objective: Objective) -> None:
    """Try the losses of the user's own on two groups, before expensive work.

    Raises:
        ConfigError: A loss fails, has the wrong shape, or a value or gradient is not finite.
    """
    for term in objective.terms:
        if ":" in term.name:
            _try(term, objective.data)


def sample_groups(data: DataKind) -> GroupLogps:
    """Return the log-probs of two groups, to try a loss on."""
    size = 1 if data == "demonstrations" else 2
    return GroupLogps(
        torch.linspace(-9.0, -6.0, 2 * size, dtype=torch.float64).requires_grad_(),
        torch.linspace(-8.0, -7.0, 2 * size, dtype=torch.float64),
        torch.linspace(4.0, 5.0, 2 * size, dtype=torch.float64),
        (torch.arange(2 * size) % 2).to(torch.uint8),
        np.arange(0, 2 * size + 1, size),
    )


def _try(term: Term, data: DataKind) -> None:
    groups = sample_groups(data)
    if of := term.method.statistics:
        found = of(groups.detached(), {}, beta=term.beta, trains=True, **term.options)
        groups = replace(groups, statistics=found)
    what = f"--loss {term.name}"
    try:
        losses = term.losses(groups)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{what} failed on a sample: {type(error).__name__}: {error}") from error
    if not isinstance(losses, Tensor) or losses.shape != (2,):
        shape = [*losses.shape] if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(f"{what} must return one loss per group, [2] for a sample, not {shape}")
    if not losses.requires_grad:
        raise ConfigError(f"{what} has no gradient with respect to the policy's log-probs")
    (slopes,) = torch.autograd.grad(losses.sum(), groups.policy_logps)
    if not bool(torch.isfinite(losses).all() and torch.isfinite(slopes).all()):
        raise ConfigError(f"{what} is not finite on a sample: {losses.tolist()}")
