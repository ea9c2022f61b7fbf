"""Best-of-N by implicit reward: a bundle, loaded and proved, that scores candidates of a prompt.

Needs numpy, tokenizers, jinja2 and ONNX Runtime; never torch, never transformers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import candidate_layout
from logratio.bundle import (
    INPUTS,
    OUTPUTS,
    REPLAY,
    BundleError,
    GoldenGroup,
    Manifest,
    read_manifest,
    tolerance,
    verify_files,
)
from logratio.data import TokenizationRules
from logratio.errors import LogratioError, SettingTypeError
from logratio.serving.candidates import (
    Candidate,
    CandidateEncoder,
    CandidateGroup,
    Piece,
    Prompt,
    plan_runs,
)
from logratio.serving.session import open_session

TOKEN_BUDGET = 16384
"""Positions in one run of the graph, which bounds its memory; see `candidates.plan_runs`."""

Sums = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Score:
    """What a candidate got.

    Attributes:
        index: Where the candidate stood in the request.
        reward: beta times the log-ratio, beta in the bundle. It is defined up to a constant of
            the prompt: it compares candidates of one prompt, never those of two. NaN with an error.
        policy_logps: Nats, summed over the candidate's tokens, under the policy.
        reference_logps: The same under the reference.
        tokens: Tokens scored, EOS included where the bundle's rules append it.
        truncated: Whether the prompt (by the bundle's rules) or the candidate (if asked for at
            load) was cut.
        error: Why there is no reward; None where there is one.
    """

    index: int
    reward: float
    policy_logps: float
    reference_logps: float
    tokens: int
    truncated: bool = False
    error: str | None = None


class NoCandidateError(LogratioError, ValueError):
    """Of several candidates none can be scored."""


class Reranker:
    """Scores candidates of a prompt by the implicit reward of a bundle.

    Safe to share between threads.

    Attributes:
        manifest: What the bundle says of itself.
        provider: The execution provider in use.
    """

    def __init__(
        self, session: Any, manifest: Manifest, encoder: CandidateEncoder, token_budget: int
    ) -> None:
        self.manifest = manifest
        self.provider = str(session.get_providers()[0])
        self._session = session
        self._encoder = encoder
        self._token_budget = token_budget

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
    ) -> "Reranker":
        """Load a bundle: every file's hash is checked, and its golden groups are scored again.

        Args:
            folder: What `logratio export` wrote.
            providers: ONNX Runtime's execution providers, the wanted one first; None: the CPU.
            allow_fallback: Go on with another provider where the first cannot be used.
            threads: Within one run; None: ``OMP_NUM_THREADS``, or the CPUs of this process.
            token_budget: Positions in one run of the graph: bounds memory, changes no result.
            truncate_completions: Cut candidates that are too long and mark them, instead of an
                error for each. A cut candidate's reward is that of its beginning.

        Raises:
            BundleError: The folder is no bundle, was altered, or does not score as it should.
            ProviderError: ONNX Runtime would compute elsewhere than asked.
            MissingExtraError: ONNX Runtime is not installed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        encoder = _encoder(folder, manifest, truncate_completions)
        session = open_session(
            folder, manifest, providers=providers, allow_fallback=allow_fallback, threads=threads
        )
        reranker = cls(session, manifest, encoder, token_budget)
        reranker.replay()
        return reranker

    def score(self, prompt: Prompt, candidates: Sequence[str]) -> list[Score]:
        """Score candidates of one prompt, in their order; equal candidates get equal scores.

        Raises:
            InvalidRecordError: The prompt cannot be taken (too long for the bundle's rules, say).
        """
        return self.score_groups([self.encode(prompt, candidates)])[0]

    def score_many(self, requests: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Score]]:
        """Score several prompts' candidates, sharing runs of the graph: one list per prompt.

        Raises:
            InvalidRecordError: A prompt cannot be taken; none is scored then.
        """
        return self.score_groups([self.encode(*request) for request in requests])

    def rank(self, prompt: Prompt, candidates: Sequence[str]) -> list[Score]:
        """Order candidates by reward, the best first; ties by index, errors last."""
        return ranked(self.score(prompt, candidates))

    def best_of(self, prompt: Prompt, candidates: Sequence[str]) -> Score:
        """Return the best candidate.

        Raises:
            NoCandidateError: No candidate can be scored.
        """
        order = self.rank(prompt, candidates)
        if not order or order[0].error is not None:
            reason = order[0].error if order else "there is none"
            raise NoCandidateError(f"no candidate can be scored: {reason}")
        return order[0]

    def encode(self, prompt: Prompt, candidates: Sequence[str]) -> CandidateGroup:
        """Turn text into ids, to look at lengths and errors before scoring.

        Raises:
            SettingTypeError: The candidates are no list of strings, but one string, say.
            InvalidRecordError: The prompt cannot be taken.
        """
        if isinstance(candidates, str) or not all(isinstance(text, str) for text in candidates):
            raise SettingTypeError(f"candidates must be a list of strings, not {candidates!r:.60}")
        return self._encoder.encode(prompt, candidates)

    def score_groups(self, groups: Sequence[CandidateGroup]) -> list[list[Score]]:
        """Score what `encode` returned: one list per group, in the candidates' order."""
        sums: list[dict[tuple[int, ...], Sums]] = [{} for _ in groups]
        for run in plan_runs(groups, self._token_budget):
            rows = iter(self._run(groups, run))
            for number, candidates in run:
                sums[number].update((ids, next(rows)) for ids in candidates)
        return [
            [_score(group, index, found) for index in range(len(group.candidates))]
            for group, found in zip(groups, sums, strict=True)
        ]

    def _run(self, groups: Sequence[CandidateGroup], run: list[Piece]) -> list[Sums]:
        """Run the graph once: reward, policy and reference sums, candidate after candidate."""
        layout = candidate_layout(
            [_array(groups[number].prompt_ids) for number, _ in run],
            [[_array(ids) for ids in candidates] for _, candidates in run],
            self.manifest.graph.chunk,
        )
        feed = {name: getattr(layout, name) for name in INPUTS}
        columns = self._session.run(list(OUTPUTS), feed)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def replay(self) -> None:
        """Score the bundle's golden groups: the same text, ids and rewards as at the export.

        Raises:
            BundleError: Something on this machine gives other ids or rewards.
        """
        golden = self.manifest.golden
        groups = [_golden_group(group) for group in golden]
        try:
            scored = self.score_groups(groups)
        except Exception as error:  # the library raises a dozen unrelated kinds
            raise BundleError("the graph fails on a golden group") from error
        for known, group, scores in zip(golden, groups, scored, strict=True):
            if (
                known.prompt is not None
                and self._encoder.encode(known.prompt, known.completions or []) != group
            ):
                raise BundleError("the tokenizer gives other ids here than at the export")
            self._compare(known, scores)

    def _compare(self, known: GoldenGroup, scores: list[Score]) -> None:
        pairs = zip(known.policy_logps, known.reference_logps, strict=True)
        for score, (policy, reference) in zip(scores, pairs, strict=True):
            slack = tolerance(policy, REPLAY) + tolerance(reference, REPLAY)
            reward = self.manifest.beta * (policy - reference)
            near = (
                abs(score.policy_logps - policy) <= slack
                and abs(score.reference_logps - reference) <= slack
                and abs(score.reward - reward) <= self.manifest.beta * slack
            )
            if not near:
                raise BundleError(
                    f"{self.provider} gives a golden candidate the reward {score.reward:.6g}, "
                    f"and torch gave {reward:.6g} at the export"
                )


def ranked(scores: Sequence[Score]) -> list[Score]:
    """Order scores of one prompt: the best first, ties by index, errors last."""
    return sorted(
        scores,
        key=lambda score: (score.error is not None, -score.reward if not score.error else 0.0,
                           score.index),
    )  # fmt: skip


def _encoder(folder: Path, manifest: Manifest, truncate: bool) -> CandidateEncoder:
    try:
        rules = TokenizationRules.from_dict(manifest.tokenization)
        encoder = CandidateEncoder(folder, rules, truncate)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{folder}: its tokenizer or rules cannot be used: {error}") from error
    tokenizer = encoder.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    if ids != manifest.special_ids:
        raise BundleError(f"{folder}: its special tokens have other ids than at the export")
    if tokenizer.vocabulary_size > manifest.graph.vocabulary_size:
        raise BundleError(f"{folder}: its tokenizer knows more ids than its model")
    return encoder


def _golden_group(known: GoldenGroup) -> CandidateGroup:
    candidates = tuple(Candidate(tuple(ids)) for ids in known.candidates)
    return CandidateGroup(tuple(known.prompt_ids), False, candidates)


def _array(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)


def _score(group: CandidateGroup, index: int, sums: dict[tuple[int, ...], Sums]) -> Score:
    candidate = group.candidates[index]
    truncated = candidate.truncated or group.prompt_truncated
    if candidate.error is not None:
        return Score(index, math.nan, math.nan, math.nan, 0, truncated, candidate.error)
    reward, policy, reference = sums[candidate.ids]
    tokens = len(candidate.ids)
    if not (math.isfinite(policy) and math.isfinite(reference)):
        error = "the model gives no finite log-prob"
        return Score(index, math.nan, math.nan, math.nan, tokens, truncated, error)
    return Score(index, reward, policy, reference, tokens, truncated)
