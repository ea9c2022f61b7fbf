"""Best-of-N by the exported reward, judged by the hidden rule."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logratio.demo import task
from logratio.demo.candidates import Candidates

SIZES = (1, 4, 16)


@dataclass(frozen=True)
class BestOf:
    """The rule's mean score of the chosen story among the first `n`.

    Attributes:
        n: candidates to choose from.
        reward: chosen by the exported implicit reward.
        random: the mean of the candidates, which is what a random choice gets.
        oracle: chosen by the rule itself.
        standard_error: of `reward`, over prompts.
    """

    n: int
    reward: float
    random: float
    oracle: float
    standard_error: float


def best_of(bundle: Path, candidates: Candidates) -> list[BestOf]:
    """Let the bundle in `bundle` choose among each prompt's candidates."""
    from logratio.serving import Reranker

    reranker = Reranker.load(bundle)
    truth = np.array([[task.rule(p, text) for text in texts] for p, texts in candidates])
    rewards = np.array(
        [[score.reward for score in reranker.score(p, texts)] for p, texts in candidates]
    )
    return [_best_of(n, rewards[:, :n], truth[:, :n]) for n in SIZES]


def _best_of(n: int, rewards: np.ndarray, truth: np.ndarray) -> BestOf:
    picked = np.take_along_axis(truth, rewards.argmax(axis=1)[:, None], axis=1)[:, 0]
    return BestOf(
        n=n,
        reward=float(picked.mean()),
        random=float(truth.mean()),
        oracle=float(truth.max(axis=1).mean()),
        standard_error=float(picked.std(ddof=1) / np.sqrt(len(picked))),
    )
