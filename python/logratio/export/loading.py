"""The models of an export, with the values of torch that their graph must reproduce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from logratio.bundle import CACHED_REFERENCE, REFERENCE_FREE, REWARD_MODEL
from logratio.export.graph import Scorer
from logratio.export.kinds import RewardKind
from logratio.export.parity import (
    Given,
    GoldenInput,
    ParityReport,
    Values,
    plain_logps,
    plain_scores,
    training_logps,
    training_scores,
)
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import PolicyScorer, RewardScorer, join
from logratio.export.traceable import use_exportable_attention
from logratio.logps.checks import check_head
from logratio.logps.completion import transformer
from logratio.training.models import load_model, merged

Logps = list[list[float]]
"""Log-prob sums in nats, or scores, of each candidate of each group."""
Compute = Callable[[nn.Module, Sequence[GoldenInput]], Logps]


def one_nat_per_token(_prompt_ids: list[int], ids: list[int]) -> float:
    """Return log-probs with which a graph is verified that takes those of a reference."""
    return -float(len(ids))


@dataclass(frozen=True)
class Calibration:
    """Groups on which a smaller precision is compared with float32.

    Attributes:
        source: Where they come from: see `bundle.Agreement`.
        groups: The prompts and candidates.
        given: Log-probs of the reference, if the graph takes them.
    """

    source: str
    groups: list[GoldenInput]
    given: Given = one_nat_per_token


@dataclass(frozen=True)
class Loaded:
    """The module to trace, and torch's values in float32.

    Attributes:
        scorer: The module.
        kind: The kind of the graph, for the manifest.
        expected: Values of each candidate of the groups, from the models' own forward.
        differences: The largest differences of training's code from them.
        calibration: The groups to compare on; None if the precision is float32.
        rewards: Torch's rewards of the groups of `calibration`.
    """

    scorer: Scorer
    kind: str
    expected: list[Values]
    differences: dict[str, float]
    calibration: Calibration | None = None
    rewards: Logps | None = None


class Models:
    """The models of an export.

    Args:
        policy: Folder of the policy or reward model.
        reference: Folder of the reference; None if there is no reference model.
        reward: What the reward is.
    """

    def __init__(self, policy: Path, reference: Path | None, reward: RewardKind) -> None:
        self.policy = _exportable(policy)
        self._reference = None if reference is None else _exportable(reference)
        self._reward = reward
        if self._is_scored:
            check_head(self.policy)

    @property
    def _is_scored(self) -> bool:
        return self._reward.name == REWARD_MODEL

    def load(self, groups: Sequence[GoldenInput], calibration: Calibration | None) -> Loaded:
        """Score the groups with each model, then join the models.

        Args:
            groups: The groups to verify the graph with.
            calibration: The groups to compare a smaller precision on, or None.

        Raises:
            ParityError: Training's code gives other values than the models' own forward.
        """
        plain: Compute = plain_scores if self._is_scored else plain_logps
        trained: Compute = training_scores if self._is_scored else training_logps
        expected = _flat(self._values(plain, groups, one_nat_per_token))
        report = ParityReport(self._reward.beta)
        training = self._values(trained, groups, one_nat_per_token)
        report.compare("training", expected, _flat(training))
        rewards = None
        if calibration is not None:
            found = self._values(_by_group(trained), calibration.groups, calibration.given)
            rewards = [[row[0] for row in rows] for rows in found]
        scorer, kind = self._scorer()
        return Loaded(scorer, kind, expected, report.largest, calibration, rewards)

    def _values(
        self, compute: Compute, groups: Sequence[GoldenInput], given: Given
    ) -> list[list[Values]]:
        """Return the values of each candidate of each group."""
        own = compute(self.policy, groups)
        if self._is_scored:
            return [[(score,) for score in scores] for scores in own]
        if self._reference is not None:
            other = compute(self._reference, groups)
            pairs = zip(own, other, strict=True)
            return [[self._pair(*pair) for pair in zip(*logps, strict=True)] for logps in pairs]
        return [
            [self._alone(value, group.prompt_ids, ids, given) for value, ids in
             zip(logps, group.candidates, strict=True)]
            for group, logps in zip(groups, own, strict=True)
        ]  # fmt: skip

    def _pair(self, policy: float, reference: float) -> Values:
        return self._reward.beta * (policy - reference), policy, reference

    def _alone(self, policy: float, prompt: list[int], ids: list[int], given: Given) -> Values:
        measure = policy
        if self._reward.name == CACHED_REFERENCE:
            measure -= given(prompt, ids)
        elif self._reward.length_normalized:
            measure /= len(ids)
        return self._reward.beta * measure, policy

    def _scorer(self) -> tuple[Scorer, str]:
        reward = self._reward
        if self._is_scored:
            return ScoreScorer(merged(self.policy)), REWARD_MODEL
        if reward.name in (CACHED_REFERENCE, REFERENCE_FREE):
            normalized = reward.length_normalized
            scorer = PolicyScorer(
                merged(self.policy), reward.name, reward.beta, normalized=normalized
            )
            return scorer, reward.name
        assert self._reference is not None
        pair = join(self.policy, self._reference)
        return RewardScorer(pair.policy, pair.reference, reward.beta), pair.kind


def _flat(groups: Sequence[Sequence[Values]]) -> list[Values]:
    return [row for group in groups for row in group]


def _by_group(compute: Compute) -> Compute:
    """Compute group by group, which bounds memory."""
    return lambda model, groups: [compute(model, [group])[0] for group in groups]


def _exportable(folder: Path) -> nn.Module:
    model = load_model(folder).requires_grad_(False)
    use_exportable_attention(transformer(model))
    return model
