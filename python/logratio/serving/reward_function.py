"""A bundle as the reward function of trainers that sample: TRL and verl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logratio.errors import ConfigError
from logratio.serving.candidates import Prompt, Reading
from logratio.serving.reranker import NoCandidateError, Reranker
from logratio.serving.scores import Score
from logratio.validation import PATH, check_argument

Completion = str | Sequence[Mapping[str, Any]]
"""Text, or a list with the assistant's message, as TRL passes it."""


class RewardFunction:
    """Compute rewards of sampled completions with a bundle, without torch.

    A call has the signature of TRL's ``reward_funcs``; `compute_score` and `compute_scores` have
    those of verl. A reward is defined up to a constant per prompt. Methods that compare the samples
    of one prompt, such as GRPO and RLOO, do not depend on that constant.

    Example:
        >>> reward = RewardFunction("bundle", missing=-10.0)
        >>> rewards = reward(prompts=["the cat"] * 2, completions=[" sits", " runs"])
    """

    __name__ = "logratio_reward"
    """TRL names the reward's metric by it."""

    def __init__(
        self,
        bundle: str | Path | Reranker,
        *,
        missing: float | None = None,
        truncate: bool = True,
        prompt_key: str = "prompt",
    ) -> None:
        """Load a bundle.

        Args:
            bundle: Folder written by `logratio export`, or a loaded bundle.
            missing: Reward of a completion that has none, such as an empty one. Choose a low one:
                0 may be above the other rewards, and then the policy learns to answer nothing.
                None: such a completion raises an error, which ends the training.
            truncate: Truncate completions that are too long. Otherwise they have no reward.
            prompt_key: Key of ``extra_info`` with the prompt: verl does not pass prompts otherwise.

        Raises:
            BundleError, ProviderError, MissingExtraError: As `Reranker.load`.
            SettingTypeError: An argument has the wrong type.
        """
        check_argument("bundle", PATH | Reranker, bundle)
        check_argument("missing", float | None, missing)
        check_argument("prompt_key", str, prompt_key)
        self._reranker = bundle if isinstance(bundle, Reranker) else Reranker.load(bundle)
        self._missing, self._prompt_key = missing, prompt_key
        self._reading = Reading(truncate)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], **_: Any
    ) -> list[float]:
        """Return one reward per completion; equal prompts are computed once.

        Args:
            prompts: One prompt per completion: text or chat messages.
            completions: The completions: text, or a list of one assistant message.
            **_: The other arguments of TRL, such as columns of its dataset; ignored.

        Raises:
            InvalidRecordError: A prompt is invalid.
            NoCandidateError: A completion has no reward, and `missing` is None.
        """
        groups: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(repr(prompt), []).append(index)
        texts = [_text(completion) for completion in completions]
        encoded = [
            self._reranker.encode(
                prompts[its[0]], [texts[index] for index in its], reading=self._reading
            )
            for its in groups.values()
        ]
        rewards = [0.0] * len(texts)
        scored = self._reranker.score_groups(encoded)
        for its, scores in zip(groups.values(), scored, strict=True):
            for index, score in zip(its, scores, strict=True):
                rewards[index] = self._reward(index, score)
        return rewards

    def _reward(self, index: int, score: Score) -> float:
        if score.error is None:
            return score.reward
        if self._missing is None:
            raise NoCandidateError(
                f"completion {index} has no reward: {score.error}; RewardFunction(..., missing=…) "
                "gives such completions a reward"
            )
        return self._missing

    def compute_score(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> float:
        """Return the reward of one completion, as verl's ``custom_reward_function``.

        Args:
            data_source: Ignored.
            solution_str: The completion.
            ground_truth: Ignored.
            extra_info: Contains the prompt under `prompt_key`.

        Raises:
            ConfigError: `extra_info` has no prompt.
            InvalidRecordError, NoCandidateError: As a call.
        """
        del data_source, ground_truth
        (reward,) = self([self._prompt(extra_info)], [solution_str])
        return reward

    def compute_scores(
        self,
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Mapping[str, Any] | None],
        **_: Any,
    ) -> list[float]:
        """Return the rewards of many completions, for verl's batch reward manager.

        Args:
            data_sources: Ignored.
            solution_strs: The completions.
            ground_truths: Ignored.
            extra_infos: Each contains the prompt under `prompt_key`.

        Raises:
            ConfigError, InvalidRecordError, NoCandidateError: As `compute_score`.
        """
        del data_sources, ground_truths
        return self([self._prompt(info) for info in extra_infos], solution_strs)

    def _prompt(self, extra_info: Mapping[str, Any] | None) -> Prompt:
        prompt = (extra_info or {}).get(self._prompt_key)
        if prompt is None:
            raise ConfigError(
                f"extra_info has no {self._prompt_key!r}: write the prompt there when preparing "
                "the data, or name its key by prompt_key"
            )
        return prompt if isinstance(prompt, str) else list(prompt)


def _text(completion: Completion) -> str:
    """Return the text of a completion."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise NoCandidateError("a completion must be text or one assistant message, without tools")
    return str(completion[0]["content"])
