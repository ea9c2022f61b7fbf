"""What a method is: its loss, data, options, default β, initial value and paper."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from logratio.training.methods.logps import GroupLogps, PairLogps
from logratio.training.methods.statistics import Statistics

DataKind = Literal["pairs", "labelled answers", "lists", "demonstrations"]
"""What a group holds: chosen and rejected; one answer with a thumb; ranked answers; one answer."""

NAME_OF_GROUP: Mapping[DataKind, str] = {
    "pairs": "pair",
    "labelled answers": "labelled answer",
    "lists": "list",
    "demonstrations": "demonstration",
}
"""The name of one group."""

Rewards = Literal["implicit", "mean"]
"""Rewards of the metrics: β·(log π − log π_ref), or β·log π per token."""


@dataclass(frozen=True)
class Option:
    """A number that a method takes in addition to β.

    Attributes:
        default: Its default.
        meaning: What it is, for the table.
        low, high: Its range.
        is_open: Whether `low` and `high` themselves are excluded.
    """

    default: float
    meaning: str
    low: float = 0.0
    high: float = math.inf
    is_open: bool = False

    def allows(self, value: float) -> bool:
        """Return whether a value is finite and in the range."""
        if not math.isfinite(value):
            return False
        return self.low < value < self.high if self.is_open else self.low <= value <= self.high

    @property
    def range(self) -> str:
        """The range, after "must be": "above 0", "0 to 0.5"."""
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.low == -math.inf:  # an option of a loss by import path
            return "finite"
        if self.high == math.inf:
            return f"{'above' if self.is_open else 'at least'} {low}"
        return f"above {low} and below {high}" if self.is_open else f"{low} to {high}"


@dataclass(frozen=True)
class Method:
    """A method of preference optimization.

    Attributes:
        title: Its name in the literature.
        loss: Returns the loss of each group, `[B]`, from `PairLogps` or `GroupLogps` and, as
            keywords, β and the options.
        takes: `PairLogps` or `GroupLogps`.
        paper: Where the loss is defined.
        formula: The loss of one group; symbols as in the documentation.
        data: What its groups are.
        beta: Default β; β is not comparable across methods. None: the loss has no β.
        options: Its other numbers.
        needs_reference: False for a loss without reference log-probs.
        initial: Value at policy = reference, from β and the options; None: it depends on the data.
        rewards: The rewards whose margin the loss increases, in the metrics.
        statistics: Computes numbers of the whole update, in a pass before that for the gradients.
        token_weights: Weights of tokens in the sums of log-probs; None: each counts once.
        needs_confidences: Whether the loss uses how confident the policy is in each token.
        needs_divergences: Whether the loss compares whole distributions with a live reference.
        needs_margins: Whether the data must have a margin for each pair.
        needs_mismatches: Whether each group needs the answer to another prompt.
        bad_turns: Whether turns may have negative weights: the loss takes nothing but weighted sums
            of log-ratios, whose sign can change.
        scores: Whether it trains a reward model: a completion's score, the output of a scalar head,
            is then in place of its summed log-prob.
        note: A remark for the table.
    """

    title: str
    loss: Callable[..., Tensor]
    paper: str
    formula: str
    takes: type[PairLogps] | type[GroupLogps] = PairLogps
    data: DataKind = "pairs"
    beta: float | None = 0.1
    options: Mapping[str, Option] = field(default_factory=dict)
    needs_reference: bool = True
    initial: Callable[..., float | None] | None = None
    rewards: Rewards = "implicit"
    statistics: Statistics | None = None
    token_weights: Callable[..., Tensor] | None = None
    needs_confidences: bool = False
    needs_divergences: bool = False
    needs_margins: bool = False
    needs_mismatches: bool = False
    bad_turns: bool = True
    scores: bool = False
    note: str = ""

    @property
    def needs_values(self) -> bool:
        """Whether the loss uses scores, ranks or margins of the data."""
        return self.needs_margins or self.data == "lists"

    @property
    def default_initial_value(self) -> float | None:
        """The loss at policy = reference with the default β and options; None: it depends."""
        defaults = {name: option.default for name, option in self.options.items()}
        return self.initial_value(1.0 if self.beta is None else self.beta, defaults)

    def initial_value(self, beta: float, options: Mapping[str, float]) -> float | None:
        """Return the loss at policy = reference; None if it depends on the data."""
        return self.initial(beta=beta, **options) if self.initial else None
