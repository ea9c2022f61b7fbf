"""The reranker: score and rank the candidates of a prompt by implicit reward."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from logratio._rust import candidate_layout
from logratio.bundle import (
    CACHED_REFERENCE,
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
    tolerance,
    verify_files,
)
from logratio.data.records import InvalidRecordError
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
from logratio.serving.runs import Run, plan_runs
from logratio.serving.scores import Score, Sums, ranked, scores_of
from logratio.serving.session import CPU, LOAD_SECONDS, Stop, open_session, stopped_after, within
from logratio.validation import PATH, check_argument

_GRACE = 2.0
"""Seconds in which the graph may stop by itself after the time limit."""
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
                `logratio precompute` filled with those of the candidates. None: each call gives
                them.

        Raises:
            BundleError: The folder is not a bundle, was altered, or gives other scores than at
                export.
            ConfigError: `expect` is not a digest, `allowed_signers` cannot be used, or the bundle
                needs no `cache`.
            NoReferenceError: The cache has not the reference of the policy's training.
            ProviderError: ONNX Runtime would use another provider than the requested one.
            MissingExtraError: ONNX Runtime is not installed.
            SettingTypeError: `folder` is not a path.
        """
        check_argument("folder", PATH, folder)
        folder = Path(folder)
        content = _expected_manifest(folder, expect, allowed_signers)
        manifest = parse_manifest(content, folder)
        verify_files(folder, manifest.files)
        cached = None if cache is None else CachedReference.open(cache, manifest)
        encoder = _encoder(folder, manifest, truncate_completions)
        session = open_session(
            folder,
            manifest,
            providers=providers,
            allow_fallback=allow_fallback,
            threads=threads,
            seconds=load_seconds,
        )
        reranker = cls(session, manifest, encoder, token_budget, cached)
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

        Example:
            >>> reranker = Reranker.load("bundle")
            >>> values, _ = reranker.token_scores("the cat", [" sits on the mat", " runs"])
        """
        name = self.manifest.graph.token_output
        if name is None:
            raise ConfigError("this bundle has no values per token: export it again")
        group = self._encode(prompt, candidates, READING)
        found: dict[tuple[int, ...], NDArray[np.float32]] = {}
        for run in self.runs([group]):
            layout = self._layout([group], run)
            feed = graph_inputs(layout) | self._given([group], run, of_tokens=True)
            (values,) = self._run([name], feed, run)
            ids = [ids for _, part in run.pieces for ids in part]
            found.update((one, values[layout.token_row == row]) for row, one in enumerate(ids))
        return [found.get(candidate.ids) for candidate in group.candidates]

    def score_many(self, requests: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Score]]:
        """Score the candidates of several prompts, which share runs of the graph.

        Args:
            requests: Pairs of a prompt and its candidates.

        Returns:
            One list of scores per prompt.

        Raises:
            InvalidRecordError: A prompt is invalid; no prompt is scored then.
            SettingTypeError: `requests` is not a list of pairs.
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

    def score_groups(self, groups: Sequence[CandidateGroup]) -> list[list[Score]]:
        """Score the results of `encode`: one list per group, in the candidates' order."""
        return self._score_groups(groups, None)

    @cached_property
    def _verbatim(self) -> CandidateEncoder:
        return self.encoder.verbatim()

    def runs(self, groups: Sequence[CandidateGroup], run_tokens: int | None = None) -> list[Run]:
        """Divide the scoring of results of `encode` into runs of the graph; see `plan_runs`."""
        budget, shared = self._token_budget, self._shared_tokens
        return list(plan_runs(groups, budget, run_tokens, shared))

    def timings(self) -> list[tuple[int, float]]:
        """Score each golden group, and return the tokens and seconds of each run.

        A server uses this to warm up, and to estimate the time of requests.
        """
        found = []
        for known in self.manifest.golden:
            group = self._golden_group(known)
            for run in self.runs([group]):
                start = time.perf_counter()
                self.compute([group], run)
                found.append((run.tokens, time.perf_counter() - start))
        return found

    def _score_groups(
        self, groups: Sequence[CandidateGroup], stop: Stop | None
    ) -> list[list[Score]]:
        sums: list[dict[tuple[int, ...], Sums]] = [{} for _ in groups]
        for run in self.runs(groups):
            rows = iter(self.compute(groups, run, stop))
            for number, candidates in run.pieces:
                sums[number].update((ids, next(rows)) for ids in candidates)
        return [scores_of(group, found) for group, found in zip(groups, sums, strict=True)]

    def compute(
        self, groups: Sequence[CandidateGroup], run: Run, stop: Stop | None = None
    ) -> list[Sums]:
        """Run the graph once, and return reward, policy and reference sums per candidate.

        A reward model has no sums: they are NaN.
        """
        given = self._given(groups, run)
        feed = graph_inputs(self._layout(groups, run)) | given
        names = list(self.manifest.graph.outputs)
        columns = self._run(names, feed, run, stop)
        columns += given.values()
        columns += (3 - len(columns)) * [np.full_like(columns[0], np.nan)]
        if not self.manifest.is_reward_model:
            tokens = np.array([len(ids) for _, part in run.pieces for ids in part])
            self._check_rewards(tokens, *columns)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _run(
        self, names: list[str], feed: dict[str, Any], run: Run, stop: Stop | None = None
    ) -> list[Any]:
        """Run the graph; after a large run, return its memory to the operating system."""
        shrink = self.provider == CPU and run.positions > KEPT_POSITIONS
        options = (stop or Stop()).options(shrink=shrink)
        return list(self._session.run(names, feed, options))

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
        late = f"the golden groups did not finish within {seconds:g} s"
        with stopped_after(seconds) as stop:
            self.largest_difference = within(
                seconds + _GRACE, lambda: self._replay(stop, late), late
            )

    def _replay(self, stop: Stop, late: str) -> float:
        """Score the golden groups; return the largest difference of a reward from the export."""
        golden = self.manifest.golden
        groups = [self._golden_group(group) for group in golden]
        for known, group in zip(golden, groups, strict=True):
            self._check_ids(known, group)
        self._check_cases()
        try:
            scored = self._score_groups(groups, stop)  # several prompts in one run
            alone = [self._score_groups([group], stop)[0] for group in groups]
        except BundleError:
            raise
        except Exception as error:  # the library raises many unrelated types
            reason = late if stop.asked else "the graph fails on a golden group"
            raise BundleError(reason) from error
        known_scores = zip([*golden, *golden], [*scored, *alone], strict=True)
        return max(self._compare(known, scores) for known, scores in known_scores)

    def _golden_group(self, known: GoldenGroup) -> CandidateGroup:
        candidates = tuple(Candidate(tuple(ids)) for ids in known.candidates)
        group = CandidateGroup(tuple(known.prompt_ids), False, candidates)
        is_given = self.manifest.graph.kind == CACHED_REFERENCE
        return with_reference(group, known.reference_logps) if is_given else group

    def _check_ids(self, known: GoldenGroup, group: CandidateGroup) -> None:
        """Check that a golden group's text has the same ids here as at export."""
        prompt = known.prompt if known.messages is None else known.messages
        if prompt is None:
            return
        encoder = self.encoder
        try:
            if known.max_length is not None:
                encoder = encoder.shortened(known.max_length)
            found = encoder.encode(prompt, known.completions or [])
        except (InvalidRecordError, ConfigError) as error:
            raise BundleError(f"a golden group cannot be tokenized here: {error}") from error
        ids = [candidate.ids for candidate in found.candidates]
        if found.prompt_ids != group.prompt_ids or ids != [one.ids for one in group.candidates]:
            raise BundleError("the tokenizer gives other ids here than at export")

    def _check_cases(self) -> None:
        """Check that the golden groups have a text, a truncated text and a chat, if possible."""
        golden, tokenizer = self.manifest.golden, self.encoder.tokenizer
        if self.manifest.format_version == 1:
            return
        texts = [group for group in golden if group.case == "text"]
        is_chat = any(group.messages for group in golden) or (texts and tokenizer.wraps_text)
        if tokenizer.chat_template is not None and not is_chat:
            self._check_missing("chat", [{"role": "user", "content": "a"}])
        if self.manifest.golden_digest is None:
            return  # an older format
        if not texts:
            self._check_missing("text", "a")
        long_enough = any(len(ids) > 1 for group in texts for ids in group.candidates)
        if long_enough and not any(group.case == "truncated" for group in golden):
            raise BundleError("no golden group is truncated, so truncation cannot be verified")

    def _check_missing(self, case: str, prompt: Prompt) -> None:
        """Refuse the bundle unless its tokenizer rejects the prompt, as it did at export."""
        try:
            (candidate,) = self.encoder.encode(prompt, ["a"]).candidates
        except Exception:  # tokenizers raises plain Exception for unknown words
            return
        if candidate.error is None:
            raise BundleError(f"no golden group is a {case}, so its tokenization is not verified")

    def _compare(self, known: GoldenGroup, scores: list[Score]) -> float:
        """Compare scores with those of the export; return the largest difference of rewards."""
        largest = 0.0
        for score, expected in zip(scores, self._expected(known), strict=True):
            reward, *logps = expected
            found = (score.policy_logps, score.reference_logps)
            limits = [tolerance(value, self.manifest.replay) for value in logps]
            slack = self.manifest.beta * sum(limits) if logps else tolerance(reward, REPLAY)
            near = all(
                abs(one - other) <= sum(limits) for one, other in zip(found, logps, strict=False)
            )
            if not (near and abs(score.reward - reward) <= slack):
                self._refuse(score.reward, reward)
            largest = max(largest, abs(score.reward - reward))
        return largest

    def _expected(self, known: GoldenGroup) -> Iterator[list[float]]:
        """Yield the reward and log-prob sums of each golden candidate."""
        if known.graph_outputs is not None:
            columns = [known.graph_outputs[name] for name in self.manifest.graph.outputs]
            yield from map(list, zip(*columns, strict=True))
        elif known.scores is not None:
            yield from ([score] for score in known.scores)
        else:
            graph, beta = self.manifest.graph, self.manifest.beta
            free = graph.kind == REFERENCE_FREE
            for index, (policy, ids) in enumerate(
                zip(known.policy_logps, known.candidates, strict=True)
            ):
                reference = [] if free else [known.reference_logps[index]]
                divisor = len(ids) if graph.length_normalized else 1
                yield [beta * (policy - sum(reference)) / divisor, policy, *reference]

    def _refuse(self, reward: float, expected: float) -> NoReturn:
        source = "torch" if self.manifest.precision.is_exact else "this graph"
        raise BundleError(
            f"{self.provider} gives a golden candidate the reward {reward:.6g}; {source} gave "
            f"{expected:.6g} at export"
        )


def _are_strings(given: object) -> bool:
    return (
        isinstance(given, Iterable)
        and not isinstance(given, str)
        and all(isinstance(text, str) for text in given)
    )


def _expected_manifest(
    folder: Path, expect: str | None, allowed_signers: str | Path | None
) -> bytes:
    """Return the content of ``bundle.json``, after checks of its digest and signature."""
    content = manifest_bytes(folder)
    if expect is not None:
        check_digest(folder, content, expect)
    if allowed_signers is not None:
        check_signature(folder, content, allowed_signers)
    return content


def _encoder(folder: Path, manifest: Manifest, truncate: bool) -> CandidateEncoder:
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


def _array(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
