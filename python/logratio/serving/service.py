"""Scoring for every route of the server: check sizes, tokenize, wait for the scores."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from numpy import float32
from numpy.typing import NDArray

from logratio.data.records import InvalidRecordError
from logratio.serving.candidates import READING, Candidate, CandidateGroup, Prompt, Reading
from logratio.serving.limits import Limits, RefusedError, public_reason, stopping
from logratio.serving.request_record import current_record
from logratio.serving.reranker import GraphRunError, Reranker
from logratio.serving.response_cache import ResponseCache, without
from logratio.serving.scheduler import Scheduler, Speed
from logratio.serving.scores import Score, Sums, TokenValues, scores_of
from logratio.serving.session import Stop
from logratio.serving.token_texts import TokenTexts

UNNAMED = "default"
"""What metrics and messages call the only bundle, if it has no name."""
_log = logging.getLogger("logratio.serving")


@dataclass
class State:
    """The mutable state of a running server.

    Attributes:
        closes_at: Time on the monotonic clock at which it stops accepting requests; None: not set.
            Until then it is not ready, so that load balancers notice.
        draining: Not accepting requests.
    """

    closes_at: float | None = None
    draining: bool = False

    def check_ready(self) -> None:
        """Refuse a probe of readiness while the server is stopping.

        Raises:
            RefusedError: 503.
        """
        if self.closes_at is not None or self.draining:
            raise stopping()


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
        tokens: The tokens of the scored candidates by index, if they were requested.
    """

    group: CandidateGroup
    scores: list[Score]
    error: str | None = None
    tokens: Mapping[int, TokenValues] = field(default_factory=dict)


class Scoring:
    """The scoring of prompts' candidates, in short runs of the graph.

    Attributes:
        groups: The prompts and their candidates.
        costs: Tokens of each run, in the order of `step`.
        hits: Number of distinct candidates whose scores are in the cache.
        misses: Number of those whose scores are computed.
    """

    def __init__(
        self,
        reranker: Reranker,
        groups: Sequence[CandidateGroup],
        run_tokens: int,
        cache: ResponseCache | None = None,
        *,
        with_tokens: bool = False,
    ) -> None:
        """Plan the runs.

        Args:
            reranker: The loaded bundle.
            groups: Results of `Reranker.encode`.
            run_tokens: Maximum tokens per run; see `runs.plan_runs`.
            cache: Scores of earlier requests; None: everything is computed.
            with_tokens: Keep the values per token; the same runs compute them.
        """
        self.groups = groups
        self._cache, self._digest = cache, reranker.digest or ""
        if not self._digest:  # a reranker that was not loaded from files
            self._cache = None
        self._sums: list[dict[tuple[int, ...], Sums]] = [self._known(group) for group in groups]
        pairs = zip(groups, self._sums, strict=True)
        self._unknown = [replace(group, candidates=without(group, its)) for group, its in pairs]
        self.hits = sum(map(len, self._sums))
        self.misses = sum(len(group.different()) for group in self._unknown)
        runs = reranker.runs(self._unknown, run_tokens)
        self.costs = [run.tokens for run in runs]
        self._reranker, self._runs, self._stop = reranker, deque(runs), Stop()
        self._with_tokens = with_tokens
        self._values: list[dict[tuple[int, ...], NDArray[float32]]] = [{} for _ in groups]
        self._texts: dict[tuple[int, ...], list[str]] = {}

    def _known(self, group: CandidateGroup) -> dict[tuple[int, ...], Sums]:
        return {} if self._cache is None else self._cache.find(self._digest, group)

    def step(self) -> int:
        """Compute the next run, and return its tokens without padding."""
        run = self._runs.popleft()
        values: list[NDArray[float32]] = []
        if self._with_tokens:
            sums, values = self._reranker.compute_with_tokens(self._unknown, run, self._stop)
        else:
            sums = self._reranker.compute(self._unknown, run, self._stop)
        rows, its_values = iter(sums), iter(values)
        for number, candidates in run.pieces:
            found = {ids: next(rows) for ids in candidates}
            self._sums[number] |= found
            if self._cache is not None:
                self._cache.add(self._digest, self._unknown[number], found)
            if self._with_tokens:
                self._values[number].update((ids, next(its_values)) for ids in candidates)
        return run.real_tokens

    def decode(self) -> None:
        """Find the texts of the tokens of all candidates."""
        texts = TokenTexts(self._reranker.encoder.tokenizer)
        for group in self.groups:
            self._texts |= {ids: texts.of(ids) for ids in group.different().keys() - self._texts}

    def stop(self) -> None:
        """Abort the run in another thread; `step` raises there."""
        self._stop.now()

    def scores(self) -> list[list[Score]]:
        """Return each group's scores in the candidates' order, after every run."""
        return [scores_of(*pair) for pair in zip(self.groups, self._sums, strict=True)]

    def tokens(self) -> list[dict[int, TokenValues]]:
        """Return the tokens of each group's candidates by index, after every run and `decode`.

        Empty if the scoring is without tokens.
        """
        return [
            {
                index: TokenValues(self._texts[ids], ids, found[ids].tolist())
                for ids, places in group.different().items()
                if ids in found
                for index in places
            }
            for group, found in zip(self.groups, self._values, strict=True)
        ]


@dataclass
class _Reader:
    """Tokenizes the prompts of one request, and records those that cannot be scored."""

    reranker: Reranker
    limits: Limits
    reading: Reading
    cache: ResponseCache | None
    with_tokens: bool = False
    errors: dict[int, str] = field(default_factory=dict)

    def scoring(self, asked: Sequence[Asked]) -> Scoring:
        """Tokenize, and plan the graph runs; called in the scheduler's encoding thread."""
        groups = [self._group(number, one) for number, one in enumerate(asked)]
        cache = None if self.with_tokens else self.cache  # it has no values per token
        scoring = Scoring(
            self.reranker, groups, self.limits.run_tokens, cache, with_tokens=self.with_tokens
        )
        # A larger request will be refused.
        if self.with_tokens and sum(scoring.costs) <= self.limits.request_tokens:
            scoring.decode()
        return scoring

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


class Counts(Protocol):
    """Counts for the metrics."""

    def cache_used(self, bundle: str, hits: int, misses: int) -> None:
        """The response cache had the scores of `hits` candidates of a bundle's request."""


@dataclass(frozen=True)
class Shared:
    """What all bundles of a server have in common."""

    limits: Limits
    scheduler: Scheduler
    state: State
    counts: Counts
    cache: ResponseCache | None = None


class ScoringService:
    """Score the prompts of requests with one bundle, in the order that the scheduler chooses.

    A request uses one service from its start to its end, also if the bundle is replaced meanwhile.

    Attributes:
        name: The bundle's name in the settings; empty for one alone that has none.
        bundle: The same for metrics and messages.
        reranker: The loaded bundle.
    """

    def __init__(self, name: str, reranker: Reranker, shared: Shared) -> None:
        self.name, self.reranker = name, reranker
        self.bundle = name or UNNAMED
        self._speed, self._shared = Speed(self.bundle), shared

    @property
    def model(self) -> str:
        """The bundle's name in requests and answers."""
        return self.name or self.reranker.manifest.name

    def warm_up(self) -> None:
        """Score the golden groups, which are short and long, and learn how long they take."""
        for tokens, seconds in self.reranker.timings():
            self._speed.pace.learn(tokens, seconds)

    async def score(
        self, asked: Sequence[Asked], reading: Reading = READING, *, with_tokens: bool = False
    ) -> list[Answer]:
        """Check a request and wait for its scores.

        Args:
            asked: The prompts and candidates.
            reading: How candidates are tokenized.
            with_tokens: Return the tokens and their values, too; the scores are the same.

        Returns:
            One answer per prompt.

        Raises:
            RefusedError: The request is too large, too late, or failed.
        """
        shared, record = self._shared, current_record()
        if shared.state.draining:
            raise stopping()
        if with_tokens and self.reranker.manifest.graph.token_output is None:
            raise RefusedError(
                422, "no_token_values",
                "this bundle has no values per token, because it is a reward model's or was "
                "exported by an earlier version: leave out return_tokens",
            )  # fmt: skip
        record.bundle, record.digest = self.bundle, self.reranker.digest
        characters = check_size(asked, shared.limits)
        reader = _Reader(self.reranker, shared.limits, reading, shared.cache, with_tokens)
        try:
            scoring = await shared.scheduler.run(
                characters, lambda: reader.scoring(asked), self._speed
            )
        except RefusedError:
            raise
        except Exception as error:
            raise _failure(error) from None
        if shared.cache is not None:
            shared.counts.cache_used(self.bundle, scoring.hits, scoring.misses)
        for group in scoring.groups:
            candidates = sum(len(candidate.ids) for candidate in group.candidates)
            record.add_tokens(len(group.prompt_ids), candidates)
        rows = zip(scoring.groups, scoring.scores(), scoring.tokens(), strict=True)
        return [
            Answer(group, scores, reader.errors.get(index), its)
            for index, (group, scores, its) in enumerate(rows)
        ]

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


def _failure(error: Exception) -> RefusedError:
    """Log the type of an error, and return what the client is answered.

    No traceback and no message: either could hold the request's text.
    """
    is_graph, record = isinstance(error, GraphRunError), current_record()
    record.error = type(error.__cause__ if is_graph else error).__name__
    _log.error("request %s failed: %s", record.id, record.error)
    if is_graph:
        return RefusedError(500, "graph_failed", "the model could not be run for this request")
    return RefusedError(500, "internal", "the request could not be scored")


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
