"""Scoring for every route of the server: check sizes, tokenize, wait for the scores."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from logratio.data.records import InvalidRecordError
from logratio.serving.candidates import READING, Candidate, CandidateGroup, Prompt, Reading
from logratio.serving.limits import Limits, RefusedError, public_reason
from logratio.serving.request_record import current_record
from logratio.serving.reranker import Reranker
from logratio.serving.scheduler import Scheduler
from logratio.serving.scores import Score, Sums, scores_of
from logratio.serving.session import Stop

_log = logging.getLogger("logratio.serving")


@dataclass
class State:
    """The mutable state of a running server.

    Attributes:
        leaving: Not ready, but still accepting requests: load balancers are about to notice.
        draining: Not accepting requests.
    """

    leaving: bool = False
    draining: bool = False

    def check_ready(self) -> None:
        """Refuse a probe of readiness while the server is stopping.

        Raises:
            RefusedError: 503.
        """
        if self.leaving or self.draining:
            raise RefusedError(503, "draining", "the server is shutting down")


@dataclass(frozen=True)
class Asked:
    """A prompt and its candidates, as in a request."""

    prompt: Prompt
    candidates: Sequence[str]

    @property
    def prompt_characters(self) -> int:
        """Length of the prompt, all messages together."""
        if isinstance(self.prompt, str):
            return len(self.prompt)
        return sum(len(str(turn["content"])) for turn in self.prompt)


@dataclass(frozen=True)
class Answer:
    """The scores of one prompt's candidates.

    Attributes:
        group: The tokenized prompt and candidates.
        scores: One score per candidate, in the candidates' order.
        error: Why the prompt cannot be scored; each score then has an error too. None if it can.
    """

    group: CandidateGroup
    scores: list[Score]
    error: str | None = None


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


@dataclass
class _Reader:
    """Tokenizes the prompts of one request, and records those that cannot be scored."""

    reranker: Reranker
    limits: Limits
    reading: Reading
    errors: dict[int, str] = field(default_factory=dict)

    def scoring(self, asked: Sequence[Asked]) -> Scoring:
        """Tokenize, and plan the graph runs; called in the scheduler's encoding thread."""
        groups = [self._group(number, one) for number, one in enumerate(asked)]
        return Scoring(self.reranker, groups, self.limits.run_tokens)

    def _group(self, number: int, asked: Asked) -> CandidateGroup:
        # Texts over the limit are replaced by an empty one, so that the tokenizer never sees them.
        longest = self.limits.document_characters
        short = [text if len(text) <= longest else "" for text in asked.candidates]
        try:
            group = self.reranker.encode(asked.prompt, short, reading=self._within_limits())
        except InvalidRecordError as error:
            self.errors[number] = public_reason(str(error))
            return CandidateGroup(
                (), False, tuple(Candidate((), error=self.errors[number]) for _ in short)
            )
        pairs = zip(group.candidates, asked.candidates, strict=True)
        return replace(group, candidates=tuple(self._limited(*pair) for pair in pairs))

    def _within_limits(self) -> Reading:
        most = (self.reading.most_tokens, self.reading.truncate and self.limits.document_tokens)
        return replace(self.reading, most_tokens=min(filter(None, most), default=None))

    def _limited(self, candidate: Candidate, text: str) -> Candidate:
        """Set an error on a candidate above a limit."""
        limits = self.limits
        if len(text) > limits.document_characters:
            return Candidate((), error=f"longer than {limits.document_characters:,} characters")
        if limits.document_tokens is not None and len(candidate.ids) > limits.document_tokens:
            return Candidate((), error=f"longer than {limits.document_tokens:,} tokens")
        return candidate


class ScoringService:
    """Score the prompts of requests, in the order that the scheduler chooses."""

    def __init__(
        self, reranker: Reranker, limits: Limits, scheduler: Scheduler, state: State
    ) -> None:
        self.reranker = reranker
        self._limits, self._scheduler, self._state = limits, scheduler, state

    async def score(self, asked: Sequence[Asked], reading: Reading = READING) -> list[Answer]:
        """Check a request and wait for its scores.

        Args:
            asked: The prompts and candidates.
            reading: How candidates are tokenized.

        Returns:
            One answer per prompt.

        Raises:
            RefusedError: The request is too large, too late, or failed.
        """
        if self._state.draining:
            raise RefusedError(503, "draining", "the server is shutting down")
        characters = check_size(asked, self._limits)
        reader, record = _Reader(self.reranker, self._limits, reading), current_record()
        record.digest = self.reranker.digest
        try:
            scoring = await self._scheduler.run(characters, lambda: reader.scoring(asked))
        except RefusedError:
            raise
        except Exception as error:
            # No traceback and no message: either could hold the request's text.
            record.error = type(error).__name__
            _log.error("request %s failed: %s", record.id, record.error)
            raise RefusedError(500, "internal", "the request could not be scored") from None
        for group in scoring.groups:
            candidates = sum(len(candidate.ids) for candidate in group.candidates)
            record.add_tokens(len(group.prompt_ids), candidates)
        pairs = zip(scoring.groups, scoring.scores(), strict=True)
        return [Answer(*pair, reader.errors.get(index)) for index, pair in enumerate(pairs)]

    async def score_pairs(
        self, pairs: Sequence[tuple[str, str]], reading: Reading = READING
    ) -> list[Answer]:
        """Score pairs of a prompt and a completion; each prompt is computed once.

        Returns:
            One answer with one score per pair.

        Raises:
            RefusedError: As `score`; or a pair cannot be scored, because the formats of pairs have
                no place for its error.
        """
        groups: dict[str, list[int]] = {}
        for index, (prompt, _) in enumerate(pairs):
            groups.setdefault(prompt, []).append(index)
        asked = [Asked(prompt, [pairs[i][1] for i in its]) for prompt, its in groups.items()]
        found: dict[int, Answer] = {}
        for its, answer in zip(groups.values(), await self.score(asked, reading), strict=True):
            found |= {
                index: Answer(answer.group, [score], answer.error)
                for index, score in zip(its, answer.scores, strict=True)
            }
        for index in range(len(pairs)):
            refuse_unscored(found[index].scores[0], f"pair {index}")
        return [found[index] for index in range(len(pairs))]


def refuse_unscored(score: Score, name: str) -> None:
    """Refuse a request whose answer has no place for the error of a candidate.

    Raises:
        RefusedError: 422 if the candidate cannot be scored, 500 if the model's score is not finite.
    """
    if score.error is None:
        return
    if score.tokens:
        raise RefusedError(500, "not_finite", f"{name}: the model gives no finite score")
    raise RefusedError(422, "document", f"{name}: {public_reason(score.error)}")


def check_size(asked: Sequence[Asked], limits: Limits) -> int:
    """Check a request's size before tokenization.

    Returns:
        Number of characters to tokenize.

    Raises:
        RefusedError: 422, a limit is exceeded.
    """
    if not asked:
        raise RefusedError(422, "no_prompts", "the request has no prompts")
    if len(asked) > limits.prompts:
        raise RefusedError(422, "too_many_prompts", f"at most {limits.prompts} prompts a request")
    for one in asked:
        _check_group(one, limits)
    longest = limits.document_characters
    texts = [text for one in asked for text in one.candidates]
    prompts = sum(one.prompt_characters for one in asked)
    return prompts + sum(len(text) for text in texts if len(text) <= longest)


def _check_group(asked: Asked, limits: Limits) -> None:
    if not asked.candidates:
        raise RefusedError(422, "no_documents", "the request has no documents")
    if len(asked.candidates) > limits.documents:
        raise RefusedError(
            422, "too_many_documents", f"at most {limits.documents} documents a query"
        )
    if asked.prompt_characters > limits.query_characters:
        raise RefusedError(
            422, "query", f"the query is longer than {limits.query_characters:,} characters"
        )
