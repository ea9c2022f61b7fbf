"""The scoring of a request, run by run, for the scheduler."""

from collections import deque
from collections.abc import Sequence

from logratio.serving.candidates import CandidateGroup
from logratio.serving.reranker import Reranker, Score, Sums, scores_of
from logratio.serving.session import Stop


class Scoring:
    """The scoring of prompts' candidates, in short runs of the graph.

    Attributes:
        groups: The prompts and their candidates.
        costs: Tokens of each run, in the order of `step`.
    """

    def __init__(
        self, reranker: Reranker, groups: Sequence[CandidateGroup], run_tokens: int
    ) -> None:
        """Plan the runs.

        Args:
            reranker: The loaded bundle.
            groups: Results of `Reranker.encode`.
            run_tokens: Maximum tokens per run; see `runs.plan_runs`.
        """
        self.groups = groups
        runs = reranker.runs(groups, run_tokens)
        self.costs = [run.tokens for run in runs]
        self._reranker, self._runs, self._stop = reranker, deque(runs), Stop()
        self._sums: list[dict[tuple[int, ...], Sums]] = [{} for _ in groups]

    def step(self) -> None:
        """Compute the next run."""
        run = self._runs.popleft()
        rows = iter(self._reranker.compute(self.groups, run, self._stop))
        for number, candidates in run.pieces:
            self._sums[number].update((ids, next(rows)) for ids in candidates)

    def stop(self) -> None:
        """Abort the run in another thread; `step` raises there."""
        self._stop.now()

    def scores(self) -> list[list[Score]]:
        """Return each group's scores in the candidates' order, after every run."""
        return [scores_of(*pair) for pair in zip(self.groups, self._sums, strict=True)]
