"""Scores of the candidates of a prompt, and their order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from logratio.serving.candidates import CandidateGroup

Sums = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one candidate.

    Attributes:
        index: Index of the candidate in the request.
        reward: β·(log π − log π_ref), with β from the bundle, or what `GraphInfo.reward` gives:
            a reward model's score, or a reward without a reference. Compare only candidates of the
            same prompt. NaN if there is an error.
        policy_logps: Sum of the policy's log-probs over the candidate's tokens, in nats; NaN for a
            reward model.
        reference_logps: The same for the reference; NaN if the reward has none.
        tokens: Number of tokens scored, including EOS if the bundle's rules append it.
        truncated: Whether the prompt (by the bundle's rules) or the candidate (if requested at
            load) was truncated.
        error: Why the candidate has no reward; None if it has one.
    """

    index: int
    reward: float
    policy_logps: float
    reference_logps: float
    tokens: int
    truncated: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TokenValues:
    """The tokens of one candidate as scored, and the value of each.

    Attributes:
        texts: The text of each token; joined, the text that the model read. Where several tokens
            are one character, the last of them has it and the others are empty.
        ids: Their ids.
        values: Those of `Reranker.token_scores`, in nats, without β.
    """

    texts: list[str]
    ids: tuple[int, ...]
    values: list[float]


def ranked(scores: Sequence[Score]) -> list[Score]:
    """Sort the scores of one prompt: best first, ties by index, errors last."""
    return sorted(
        scores,
        key=lambda score: (score.error is not None, -score.reward if not score.error else 0.0,
                           score.index),
    )  # fmt: skip


def scores_of(group: CandidateGroup, sums: dict[tuple[int, ...], Sums]) -> list[Score]:
    """Return one score per candidate: the sums of its ids, or its error."""
    return [_score(group, index, sums) for index in range(len(group.candidates))]


def _score(group: CandidateGroup, index: int, sums: dict[tuple[int, ...], Sums]) -> Score:
    candidate = group.candidates[index]
    truncated = candidate.truncated or group.prompt_truncated
    if candidate.error is not None:
        return Score(index, math.nan, math.nan, math.nan, 0, truncated, candidate.error)
    reward, policy, reference = sums[candidate.ids]
    tokens = len(candidate.ids)
    if not math.isfinite(reward):
        error = "the model's reward is not finite"
        return Score(index, math.nan, math.nan, math.nan, tokens, truncated, error)
    return Score(index, reward, policy, reference, tokens, truncated)
