"""The models of an export, with the values of torch that their graph must reproduce."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from logratio.bundle import REWARD_MODEL, GoldenGroup
from logratio.export.parity import (
    Expected,
    GoldenInput,
    check_parity,
    check_scores,
    plain_logps,
    plain_scores,
    training_logps,
    training_scores,
)
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import ModelPair, RewardScorer, join, use_exportable_attention
from logratio.logps.checks import check_head
from logratio.logps.completion import transformer
from logratio.training.models import load_model, merged


@dataclass(frozen=True)
class LoadedPair:
    """Policy and reference, with the log-probs of the groups to check.

    Attributes:
        pair: The models.
        expected: Log-probs of the models' own forward.
        training: Log-probs of training's code.
    """

    pair: ModelPair
    expected: Expected
    training: Expected

    @property
    def kind(self) -> str:
        """The kind of the graph, for the manifest."""
        return self.pair.kind

    def scorer(self, beta: float) -> RewardScorer:
        """Return the module to trace."""
        return RewardScorer(self.pair.policy, self.pair.reference, beta)

    def check(self, session: Any, beta: float, groups: Sequence[GoldenInput]) -> dict[str, float]:
        """Compare a session on the graph with torch: see `parity.check_parity`."""
        return check_parity(session, beta, groups, self.expected, self.training)

    def golden(self, groups: Sequence[GoldenInput]) -> list[GoldenGroup]:
        """Combine the golden groups with their log-probs, which are the first."""
        known = zip(groups, self.expected.policy, self.expected.reference, strict=False)
        return [
            GoldenGroup(**asdict(group), policy_logps=policy, reference_logps=reference)
            for group, policy, reference in known
        ]


@dataclass(frozen=True)
class LoadedRewardModel:
    """A reward model, with the scores of the groups to check: see `LoadedPair`."""

    model: nn.Module
    expected: list[list[float]]
    training: list[list[float]]
    kind = REWARD_MODEL

    def scorer(self, _beta: float) -> ScoreScorer:
        """Return the module to trace."""
        return ScoreScorer(self.model)

    def check(self, session: Any, _beta: float, groups: Sequence[GoldenInput]) -> dict[str, float]:
        """Compare a session on the graph with torch: see `parity.check_scores`."""
        return check_scores(session, groups, self.expected, self.training)

    def golden(self, groups: Sequence[GoldenInput]) -> list[GoldenGroup]:
        """Combine the golden groups with their scores, which are the first."""
        return [
            GoldenGroup(**asdict(group), policy_logps=[], reference_logps=[], scores=scores)
            for group, scores in zip(groups, self.expected, strict=False)
        ]


def load_pair(policy: Path, reference: Path, groups: Sequence[GoldenInput]) -> LoadedPair:
    """Load both models, and score the groups with each before the models are joined."""
    first, second = _exportable(policy), _exportable(reference)
    expected = Expected(plain_logps(first, groups), plain_logps(second, groups))
    training = Expected(training_logps(first, groups), training_logps(second, groups))
    return LoadedPair(join(first, second), expected, training)


def load_reward_model(folder: Path, groups: Sequence[GoldenInput]) -> LoadedRewardModel:
    """Load a reward model, and score the groups before its adapter, if any, is merged."""
    model = _exportable(folder)
    check_head(model)
    expected, training = plain_scores(model, groups), training_scores(model, groups)
    return LoadedRewardModel(merged(model), expected, training)


def _exportable(folder: Path) -> nn.Module:
    model = load_model(folder).requires_grad_(False)
    use_exportable_attention(transformer(model))
    return model
