"""The golden groups of a bundle: do they have the ids and rewards here that they had at export?"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from logratio.bundle import REFERENCE_FREE, REPLAY, BundleError, GoldenGroup, tolerance
from logratio.data.records import InvalidRecordError
from logratio.errors import ConfigError
from logratio.serving.candidates import CandidateGroup, Prompt
from logratio.serving.scores import Score
from logratio.serving.session import Stop, stopped_after, within

if TYPE_CHECKING:
    from logratio.serving.reranker import Reranker

_GRACE = 2.0
"""Seconds in which the graph may stop by itself after the time limit."""


class Replay:
    """Score the golden groups of a reranker, and compare them with the export.

    Args:
        reranker: A reranker with a manifest.
    """

    def __init__(self, reranker: "Reranker") -> None:
        self._reranker, self._manifest = reranker, reranker.manifest

    def run(self, seconds: float) -> float:
        """Score all groups, and return the largest difference of a reward from the export.

        Args:
            seconds: Time limit.

        Raises:
            BundleError: Ids or rewards differ, a group is missing, or this takes longer.
        """
        late = f"the golden groups did not finish within {seconds:g} s"
        with stopped_after(seconds) as stop:
            return within(seconds + _GRACE, lambda: self._all(stop, late), late)

    def _all(self, stop: Stop, late: str) -> float:
        """Score the golden groups; return the largest difference of a reward from the export."""
        golden = self._manifest.golden
        groups = [self._reranker.golden_group(group) for group in golden]
        for known, group in zip(golden, groups, strict=True):
            self._check_ids(known, group)
        self._check_cases()
        try:
            scored = self._reranker.score_groups(groups, stop)  # several prompts in one run
            alone = [self._reranker.score_groups([group], stop)[0] for group in groups]
        except BundleError:
            raise
        except Exception as error:  # the library raises many unrelated types
            reason = late if stop.asked else "the graph fails on a golden group"
            raise BundleError(reason) from error
        known_scores = zip([*golden, *golden], [*scored, *alone], strict=True)
        return max(self._compare(known, scores) for known, scores in known_scores)

    def _check_ids(self, known: GoldenGroup, group: CandidateGroup) -> None:
        """Check that a golden group's text has the same ids here as at export."""
        prompt = known.prompt if known.messages is None else known.messages
        if prompt is None:
            return
        encoder = self._reranker.encoder
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
        golden, tokenizer = self._manifest.golden, self._reranker.encoder.tokenizer
        if self._manifest.format_version == 1:
            return
        texts = [group for group in golden if group.case == "text"]
        is_chat = any(group.messages for group in golden) or (texts and tokenizer.wraps_text)
        if tokenizer.chat_template is not None and not is_chat:
            self._check_missing("chat", [{"role": "user", "content": "a"}])
        if self._manifest.golden_digest is None:
            return  # an older format
        if not texts:
            self._check_missing("text", "a")
        long_enough = any(len(ids) > 1 for group in texts for ids in group.candidates)
        if long_enough and not any(group.case == "truncated" for group in golden):
            raise BundleError("no golden group is truncated, so truncation cannot be verified")

    def _check_missing(self, case: str, prompt: Prompt) -> None:
        """Refuse the bundle unless its tokenizer rejects the prompt, as it did at export."""
        try:
            (candidate,) = self._reranker.encoder.encode(prompt, ["a"]).candidates
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
            limits = [tolerance(value, self._manifest.replay) for value in logps]
            slack = self._manifest.beta * sum(limits) if logps else tolerance(reward, REPLAY)
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
            columns = [known.graph_outputs[name] for name in self._manifest.graph.outputs]
            yield from map(list, zip(*columns, strict=True))
        elif known.scores is not None:
            yield from ([score] for score in known.scores)
        else:
            graph, beta = self._manifest.graph, self._manifest.beta
            free = graph.kind == REFERENCE_FREE
            for index, (policy, ids) in enumerate(
                zip(known.policy_logps, known.candidates, strict=True)
            ):
                reference = [] if free else [known.reference_logps[index]]
                divisor = len(ids) if graph.length_normalized else 1
                yield [beta * (policy - sum(reference)) / divisor, policy, *reference]

    def _refuse(self, reward: float, expected: float) -> NoReturn:
        source = "torch" if self._manifest.precision.is_exact else "this graph"
        raise BundleError(
            f"{self._reranker.provider} gives a golden candidate the reward {reward:.6g}; {source} "
            f"gave {expected:.6g} at export"
        )
