"""The reranker: score and rank the candidates of a prompt by implicit reward."""

import math
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import candidate_layout
from logratio.adapted_graph import Adapter
from logratio.bundle import (
    CACHED_REFERENCE,
    PADDED,
    REFERENCE_FREE,
    REFERENCE_INPUT,
    REPLAY,
    BundleError,
    GoldenGroup,
    Manifest,
    check_digest,
    check_signature,
    digest_of,
    manifest_bytes,
    parse_manifest,
    verify_files,
)
from logratio.data.tokenization.groups import TokenizationRules
from logratio.errors import ConfigError, LogratioError, SettingTypeError
from logratio.graph_inputs import graph_inputs
from logratio.serving.candidates import (
    READING,
    Candidate,
    CandidateEncoder,
    CandidateGroup,
    Prompt,
    Reading,
)
from logratio.serving.reference import CachedReference, with_reference
from logratio.serving.replay import Replay
from logratio.serving.runs import Run, plan_runs
from logratio.serving.scores import Score, Sums, ranked, scores_of
from logratio.serving.session import CPU, LOAD_SECONDS, Stop
from logratio.serving.shared_base import SharedBase, check_base, open_graph
from logratio.validation import PATH, check_argument

TOKEN_BUDGET = 16384
"""Positions in one run of the graph, which bounds its memory; see `plan_runs`."""
KEPT_POSITIONS = TOKEN_BUDGET
"""On a CPU, runs above this number of positions return their memory, which ONNX Runtime otherwise
keeps for ever. Such a run has one long candidate, or a larger token budget. Smaller runs keep it,
because it is bounded and takes time to allocate again: with models of 6 layers × 384, 16 candidates
of 64 tokens after a prompt of 512 (9,728 positions) kept 0.19 GB, and took 14% more CPU time when
they returned it."""
SHARED_TOKENS = 512
"""Most tokens of a run with several prompts on a CPU. Measured with a model of 3 million parameters
on one core: without this limit, 64 prompts of 20 to 200 tokens with four candidates each took 1.3
times as long, because the padding of shared runs costs more than a run; without shared runs, 64
prompts of 10 tokens with two candidates of 5 took 3.4 times as long."""


class NoCandidateError(LogratioError, ValueError):
    """None of the candidates can be scored."""


class GraphRunError(LogratioError, RuntimeError):
    """ONNX Runtime failed in a run of the graph, for example because memory ran out."""

    @classmethod
    def of(cls, error: Exception) -> "GraphRunError":
        """Describe an error of the library: its type, and the first line of its message."""
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        return cls(f"the graph failed: {type(error).__name__}{reason and f': {reason}'}")


class Reranker:
    """Score candidates of a prompt by the implicit reward of a bundle, or by a reward model.

    Safe to share between threads.

    Attributes:
        manifest: The bundle's manifest.
        provider: The execution provider in use.
        encoder: Tokenizes prompts and candidates.
        largest_difference: Largest difference of a golden reward from that at export.
        digest: The bundle's digest, as `logratio export` prints it; None if not loaded from files.
        cached: The reference's log-probs in a cache, if it was loaded with one.

    Example:
        >>> reranker = Reranker.load("bundle")
        >>> reranker.best_of("What is DPO?", ["A method.", "No idea."]).index
    """

    def __init__(
        self,
        session: Any,
        manifest: Manifest,
        encoder: CandidateEncoder,
        token_budget: int,
        cached: CachedReference | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.manifest = manifest
        self.provider = str(session.get_providers()[0])
        self._session = session
        self.encoder = encoder
        self._token_budget = token_budget
        self._shared_tokens = SHARED_TOKENS if self.provider == CPU else None
        self.largest_difference = math.nan
        self.digest: str | None = None
        self.cached = cached
        self._adapter = adapter

    @property
    def truncates(self) -> bool:
        """Whether completions that are too long are truncated, instead of getting an error."""
        return self.encoder.truncates

    def __repr__(self) -> str:
        manifest = self.manifest
        notes = ["reward model" if manifest.is_reward_model else f"β={manifest.beta:g}"]
        if manifest.graph.kind in (CACHED_REFERENCE, REFERENCE_FREE):
            notes.append(f"{manifest.graph.kind}, reward {manifest.graph.reward}")
        if not manifest.precision.is_exact:
            notes.append(manifest.precision.name)
        return f"Reranker({manifest.name!r}, {', '.join(notes)}, {self.provider})"

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        providers: Sequence[str] | None = None,
        allow_fallback: bool = False,
        threads: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        truncate_completions: bool = False,
        expect: str | None = None,
        allowed_signers: str | Path | None = None,
        load_seconds: float = LOAD_SECONDS,
        cache: str | Path | None = None,
        base: str | Path | SharedBase | None = None,
    ) -> "Reranker":
        """Load a bundle, check every file, and verify the scores of its golden groups.

        Args:
            folder: Folder written by `logratio export`.
            providers: ONNX Runtime execution providers, the preferred one first; None for the CPU.
            allow_fallback: Use another provider if the first is not available.
            threads: Threads per run; None: ``OMP_NUM_THREADS``, or the CPUs of this process.
            token_budget: Positions per run of the graph: bounds memory, does not change results.
            truncate_completions: Truncate and mark candidates that are too long, instead of
                setting an error. The reward is then that of the truncated text.
            expect: The bundle's digest, as printed by `logratio export`; a bundle with another
                digest is refused. None: any bundle.
            allowed_signers: File of trusted keys in the format of ``ssh-keygen``; a bundle without
                a signature by one of them is refused. None: signatures are not read.
            load_seconds: Time limit in seconds for opening the graph, and for its golden groups.
            cache: For a bundle that takes the reference's log-probs as an input: the folder that
                `logratio precompute` filled with them. None: each call gives them.
            base: For a bundle that is an adapter: the bundle of its base, or a loaded one.

        Raises:
            BundleError: The folder is not a bundle, was altered, or gives other scores than at
                export.
            ConfigError: `expect` is not a digest, `allowed_signers` cannot be used, the bundle
                needs no `cache`, or `base` is missing or superfluous.
            NoReferenceError: The cache has not the reference of the policy's training.
            ProviderError: ONNX Runtime would use another provider than the requested one.
            MissingExtraError: ONNX Runtime is not installed.
            SettingTypeError: `folder` is not a path.
        """
        check_argument("folder", PATH, folder)
        folder = Path(folder)
        content = expected_manifest(folder, expect, allowed_signers)
        manifest = parse_manifest(content, folder)
        verify_files(folder, manifest.files)
        check_base(folder, manifest, base)
        cached = None if cache is None else CachedReference.open(cache, manifest)
        encoder = load_encoder(folder, manifest, truncate_completions)
        opening: dict[str, Any] = {"providers": providers, "allow_fallback": allow_fallback}
        opening |= {"threads": threads, "load_seconds": load_seconds}
        session, adapter = open_graph(folder, manifest, base, opening)
        reranker = cls(session, manifest, encoder, token_budget, cached, adapter)
        reranker.digest = digest_of(content)
        reranker.replay(load_seconds)
        return reranker

    def score(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
    ) -> list[Score]:
        """Score the candidates of one prompt; equal candidates get equal scores.

        Args:
            prompt: Text, or chat messages for the bundle's chat template.
            candidates: The completions to score.
            reference_logps: For a ``cached_reference`` bundle without a cache: the reference's
                log-prob sum of each candidate, in nats.

        Returns:
            One score per candidate, in the candidates' order.

        Raises:
            InvalidRecordError: The prompt is invalid, for example too long for the bundle's rules.
            ConfigError: The bundle needs `reference_logps` or a cache, or does not take them.
            GraphRunError: ONNX Runtime failed, for example because memory ran out.
        """
        return self.score_groups([self.encode(prompt, candidates, reference_logps)])[0]

    def token_scores(
        self, prompt: Prompt, candidates: Sequence[str]
    ) -> list[NDArray[np.float32] | None]:
        """Return the log-ratio of each token of the candidates, in nats, without β.

        Without a reference model in the graph, it is the policy's log-prob of each token.

        Args:
            prompt: Text, or chat messages for the bundle's chat template.
            candidates: The completions to score.

        Returns:
            One array per candidate, float32 `[tokens]`; None for a candidate with an error.

        Raises:
            InvalidRecordError: The prompt is invalid.
            ConfigError: The graph has no output per token: it is a reward model, or was exported
                by an earlier version.
            GraphRunError: ONNX Runtime failed.

        Example:
            >>> reranker = Reranker.load("bundle")
            >>> values, _ = reranker.token_scores("the cat", [" sits on the mat", " runs"])
        """
        name = self._token_output()
        group = self._encode(prompt, candidates, READING)
        found: dict[tuple[int, ...], NDArray[np.float32]] = {}
        for run in self.runs([group]):
            layout = self._layout([group], run)
            feed = graph_inputs(layout) | self._given([group], run, of_tokens=True)
            (values,) = self._run([name], feed, run)
            ids = [ids for _, part in run.pieces for ids in part]
            found.update(zip(ids, _by_row(values, layout.token_row, len(ids)), strict=True))
        return [found.get(candidate.ids) for candidate in group.candidates]

    def _token_output(self) -> str:
        if (name := self.manifest.graph.token_output) is None:
            raise ConfigError("this bundle has no values per token: export it again")
        return name

    def score_many(self, requests: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Score]]:
        """Score the candidates of several prompts, which share runs of the graph.

        Args:
            requests: Pairs of a prompt and its candidates.

        Returns:
            One list of scores per prompt.

        Raises:
            InvalidRecordError: A prompt is invalid; no prompt is scored then.
            SettingTypeError: `requests` is not a list of pairs.
            GraphRunError: ONNX Runtime failed; no prompt is scored then.
        """
        check_argument("requests", Sequence[tuple[Any, Any]], requests)
        return self.score_groups([self.encode(*request) for request in requests])

    def rank(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
    ) -> list[Score]:
        """Score candidates and sort them by reward, best first; ties by index, errors last.

        The arguments and errors are those of `score`.
        """
        return ranked(self.score(prompt, candidates, reference_logps))

    def best_of(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
    ) -> Score:
        """Return the best candidate; the arguments are those of `score`.

        Raises:
            NoCandidateError: No candidate can be scored.
        """
        order = self.rank(prompt, candidates, reference_logps)
        if not order or order[0].error is not None:
            reason = order[0].error if order else "the list is empty"
            raise NoCandidateError(f"no candidate can be scored: {reason}")
        return order[0]

    def encode(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
        reading: Reading = READING,
    ) -> CandidateGroup:
        """Tokenize a prompt and its candidates, to inspect lengths and errors before scoring.

        Args:
            prompt: Text, or chat messages for the bundle's chat template.
            candidates: The completions.
            reference_logps: As in `score`.
            reading: How the texts are tokenized.

        Raises:
            SettingTypeError: The prompt is neither text nor a list, or the candidates are not a
                list of strings, for example one string.
            InvalidRecordError: The prompt is invalid.
            ConfigError: The bundle needs `reference_logps` or a cache, or does not take them.
        """
        group = self._encode(prompt, candidates, reading)
        if self.manifest.graph.kind != CACHED_REFERENCE:
            if reference_logps is not None:
                raise ConfigError(f"{self!r} takes no reference_logps: its graph has no such input")
            return group
        if reference_logps is not None:
            return with_reference(group, reference_logps)
        if self.cached is None:
            raise ConfigError(
                "the rewards of this bundle need the reference's log-probs: give reference_logps "
                "for each candidate, or load it with the cache of `logratio precompute`"
            )
        return self.cached.fill(group)

    def _encode(
        self, prompt: Prompt, candidates: Sequence[str], reading: Reading
    ) -> CandidateGroup:
        """Tokenize, without the reference's log-probs."""
        if not isinstance(prompt, str | Sequence):
            raise SettingTypeError(f"prompt must be a string or a list of messages, not {prompt!r}")
        if not _are_strings(candidates):
            raise SettingTypeError(f"candidates must be a list of strings, not {candidates!r:.60}")
        encoder = self._verbatim if reading.verbatim else self.encoder
        return encoder.encode(prompt, candidates, reading)

    def score_groups(
        self, groups: Sequence[CandidateGroup], stop: Stop | None = None
    ) -> list[list[Score]]:
        """Score the results of `encode`.

        Args:
            groups: The results.
            stop: Aborts the runs of the graph from another thread.

        Returns:
            One list per group, in the candidates' order.

        Raises:
            GraphRunError: ONNX Runtime failed in a run; other groups may have shared it.
        """
        sums: list[dict[tuple[int, ...], Sums]] = [{} for _ in groups]
        for run in self.runs(groups):
            rows = iter(self.compute(groups, run, stop))
            for number, candidates in run.pieces:
                sums[number].update((ids, next(rows)) for ids in candidates)
        return [scores_of(group, found) for group, found in zip(groups, sums, strict=True)]

    @cached_property
    def _verbatim(self) -> CandidateEncoder:
        return self.encoder.verbatim()

    def runs(self, groups: Sequence[CandidateGroup], run_tokens: int | None = None) -> list[Run]:
        """Divide the scoring of results of `encode` into runs of the graph; see `plan_runs`."""
        budget, shared = self._token_budget, self._shared_tokens
        is_padded = self.manifest.graph.layout == PADDED
        return list(plan_runs(groups, budget, run_tokens, shared, repeats_prompts=is_padded))

    def timings(self) -> list[tuple[int, float]]:
        """Score each golden group, and return the tokens and seconds of each run.

        A server uses this to warm up, and to estimate the time of requests.
        """
        found = []
        for known in self.manifest.golden:
            group = self.golden_group(known)
            for run in self.runs([group]):
                start = time.perf_counter()
                self.compute([group], run)
                found.append((run.tokens, time.perf_counter() - start))
        return found

    def compute(
        self, groups: Sequence[CandidateGroup], run: Run, stop: Stop | None = None
    ) -> list[Sums]:
        """Run the graph once, and return reward, policy and reference sums per candidate.

        A reward model has no sums: they are NaN.
        """
        return self._compute(groups, run, stop, [])[0]

    def compute_with_tokens(
        self, groups: Sequence[CandidateGroup], run: Run, stop: Stop | None = None
    ) -> tuple[list[Sums], list[NDArray[np.float32]]]:
        """Do as `compute`, and also return the values of `token_scores` of each candidate."""
        return self._compute(groups, run, stop, [self._token_output()])

    def _compute(
        self, groups: Sequence[CandidateGroup], run: Run, stop: Stop | None, per_token: list[str]
    ) -> tuple[list[Sums], list[NDArray[np.float32]]]:
        """Run the graph once; also fetch the outputs per token that are named: none or one."""
        given, layout = self._given(groups, run), self._layout(groups, run)
        names = self.manifest.graph.outputs
        found = self._run([*names, *per_token], graph_inputs(layout) | given, run, stop)
        columns = [*found[: len(names)], *given.values()]
        columns += (3 - len(columns)) * [np.full_like(columns[0], np.nan)]
        if not self.manifest.is_reward_model:
            tokens = np.array([len(ids) for _, part in run.pieces for ids in part])
            self._check_rewards(tokens, *columns)
        rows = len(columns[0])
        values = [
            row for one in found[len(names) :] for row in _by_row(one, layout.token_row, rows)
        ]
        return list(zip(*(column.tolist() for column in columns), strict=True)), values

    def _run(
        self, names: list[str], feed: dict[str, Any], run: Run, stop: Stop | None = None
    ) -> list[Any]:
        """Run the graph; after a large run, return its memory to the operating system.

        Raises:
            GraphRunError: The library failed, or the run was aborted.
        """
        stop, shrink = stop or Stop(), self.provider == CPU and run.positions > KEPT_POSITIONS
        try:
            if self._adapter is None:
                return list(self._session.run(names, feed, stop.options(shrink=shrink)))
            return self._adapter.run(
                self._session, names, feed, lambda one: stop.options(shrink=shrink, adapter=one)
            )
        except Exception as error:  # the library raises many unrelated types
            raise GraphRunError.of(error) from error

    def _layout(self, groups: Sequence[CandidateGroup], run: Run) -> Any:
        return candidate_layout(
            [_array(groups[number].prompt_ids) for number, _ in run.pieces],
            [[_array(ids) for ids in candidates] for _, candidates in run.pieces],
            self.manifest.graph.chunk,
        )

    def _given(
        self, groups: Sequence[CandidateGroup], run: Run, *, of_tokens: bool = False
    ) -> dict[str, NDArray[np.float32]]:
        """Return the input with the reference's log-probs; empty if the graph has none.

        The output per token does not depend on it: then it is 0.
        """
        if self.manifest.graph.kind != CACHED_REFERENCE:
            return {}
        known: list[float] = []
        for number, part in run.pieces:
            logps = {} if of_tokens else groups[number].known_logps()
            known += [0.0 if of_tokens else logps[ids] for ids in part]
        return {REFERENCE_INPUT: np.array(known, dtype=np.float32)}

    def _check_rewards(self, tokens: NDArray[np.int64], *columns: NDArray[np.float32]) -> None:
        """Check that each reward is that of the manifest's formula, from the other outputs."""
        reward, policy, reference = (column.astype(np.float64) for column in columns)
        graph, beta = self.manifest.graph, self.manifest.beta
        if graph.kind == REFERENCE_FREE:
            reference = np.zeros_like(policy)
        slack = REPLAY[0] + REPLAY[1] * (abs(policy) + abs(reference))
        divisor = tokens if graph.length_normalized else np.ones_like(tokens)
        apart = abs(reward - beta * (policy - reference) / divisor) > beta * slack
        if apart.any():  # NaN compares as False: that candidate gets an error later
            raise BundleError(f"the graph's rewards are not {graph.reward}")

    def replay(self, seconds: float = LOAD_SECONDS) -> None:
        """Check that the golden groups have the same ids and rewards here as at export.

        Args:
            seconds: Time limit.

        Raises:
            BundleError: Ids or rewards differ, a group is missing, or this takes longer.
        """
        self.largest_difference = Replay(self).run(seconds)

    def golden_group(self, known: GoldenGroup) -> CandidateGroup:
        """Return a golden group of the manifest as `score_groups` takes it."""
        candidates = tuple(Candidate(tuple(ids)) for ids in known.candidates)
        group = CandidateGroup(tuple(known.prompt_ids), False, candidates)
        is_given = self.manifest.graph.kind == CACHED_REFERENCE
        return with_reference(group, known.reference_logps) if is_given else group


def _are_strings(given: object) -> bool:
    return (
        isinstance(given, Iterable)
        and not isinstance(given, str)
        and all(isinstance(text, str) for text in given)
    )


def expected_manifest(
    folder: Path, expect: str | None, allowed_signers: str | Path | None
) -> bytes:
    """Return the content of ``bundle.json``, after checks of its digest and signature."""
    content = manifest_bytes(folder)
    if expect is not None:
        check_digest(folder, content, expect)
    if allowed_signers is not None:
        check_signature(folder, content, allowed_signers)
    return content


def load_encoder(folder: Path, manifest: Manifest, truncate: bool) -> CandidateEncoder:
    """Return the tokenizer of a bundle, after checks against its manifest."""
    try:
        rules = TokenizationRules.from_dict(manifest.tokenization)
        encoder = CandidateEncoder(folder, rules, truncate)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{folder}: its tokenizer or rules cannot be used: {error}") from error
    tokenizer = encoder.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    if ids != manifest.special_ids:
        raise BundleError(f"{folder}: its special tokens have other ids than at export")
    if tokenizer.vocabulary_size > manifest.graph.vocabulary_size:
        raise BundleError(f"{folder}: its tokenizer has more ids than its model")
    return encoder


def _by_row(
    values: NDArray[np.float32], token_row: NDArray[np.int64], rows: int
) -> list[NDArray[np.float32]]:
    """Divide the values of tokens by their candidate, the row of the graph's other outputs."""
    return [values[token_row == row] for row in range(rows)]


def _array(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
