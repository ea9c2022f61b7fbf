"""What a bundle's reward is: with which reference, or without one, and with which β."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logratio.bundle import CACHED_REFERENCE, REFERENCE_FREE, REWARD_MODEL
from logratio.cache.identity import fingerprint_digest
from logratio.errors import ConfigError
from logratio.training.fingerprint import COMPUTE_DTYPE, COMPUTES_IN, QUANTIZATION
from logratio.training.methods.objective import named_methods
from logratio.training.models import SCHEMES
from logratio.training.reward_model import is_reward_model
from logratio.training.run_folder import reward_beta, settings_of

CACHED, NONE = "cached", "none"
"""Values of ``--reference`` for a graph of the policy alone."""


@dataclass(frozen=True)
class RewardKind:
    """The reward of an export.

    Attributes:
        name: The kind of the graph; None with a reference model, whose weights decide it.
        beta: Reward per nat; 1 for a reward model.
        length_normalized: Whether the reward is β times the mean log-prob per token.
        reference: What identifies the reference whose log-probs are an input, if it is recorded.
    """

    name: str | None
    beta: float
    length_normalized: bool = False
    reference: Mapping[str, Any] = field(default_factory=dict)


def reward_kind(policy: Path, reference: str | None, beta: float | None) -> RewardKind:
    """Decide the reward from the settings and from how the policy was trained.

    Args:
        policy: Folder of the policy or reward model.
        reference: The reference of the settings: a folder, `CACHED`, `NONE`, or None.
        beta: β of the settings, or None.

    Raises:
        ConfigError: The reference or β is missing or superfluous; the message gives the remedy.
    """
    if is_reward_model(policy):
        return _scores(policy, {"reference": reference, "beta": beta})
    if reference == CACHED:
        digest = reference_digest(policy)
        known = {"digest": digest} if digest else {}
        return RewardKind(CACHED_REFERENCE, _positive(reward_beta(policy, beta)), reference=known)
    recorded = free_reward(policy)
    if reference == NONE or (reference is None and recorded is not None and recorded.has_beta):
        if recorded is None:
            return RewardKind(REFERENCE_FREE, _positive(reward_beta(policy, beta)), True)
        used = recorded.beta if beta is None else beta
        return RewardKind(REFERENCE_FREE, _positive(used), recorded.is_mean)
    if reference is None:
        raise ConfigError(
            "--reference is missing: the reward of a policy is β times its log-ratio to the "
            "reference. Give the reference's folder; `cached`, if its log-probs come from a cache; "
            "or `none`, if the reward has no reference"
        )
    return RewardKind(None, _positive(reward_beta(policy, beta)))


def _scores(policy: Path, given: Mapping[str, object]) -> RewardKind:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{policy} is a reward model, whose score is the reward: remove --{name}"
            )
    return RewardKind(REWARD_MODEL, 1.0)


def _positive(beta: float) -> float:
    if not (math.isfinite(beta) and beta > 0):
        raise ConfigError(f"beta is {beta}; it must be above 0, the beta of the training")
    return beta


@dataclass(frozen=True)
class FreeReward:
    """The reward of a run whose loss has no reference, as in its metrics.

    Attributes:
        beta: Reward per nat; 1 if no method of the run has a β.
        is_mean: Whether it multiplies the mean log-prob per token, and not the sum.
        has_beta: Whether a method of the run has a β, so that it compares completions.
    """

    beta: float
    is_mean: bool
    has_beta: bool


def free_reward(policy: Path) -> FreeReward | None:
    """Return the reward of a policy that was trained without a reference.

    Args:
        policy: Folder of the trained model or adapter.

    Returns:
        The reward; None if the run is not recorded or its loss has a reference.
    """
    settings = settings_of(policy) or {}
    try:
        methods = [method for method, _ in named_methods(settings.get("loss", "")).values()]
    except ConfigError:  # nothing is recorded, or a loss of the user's own
        return None
    if any(method.needs_reference for method in methods):
        return None
    scale = next((method for method in methods if method.beta is not None), methods[0])
    beta = settings.get("beta")
    if scale.beta is None or not isinstance(beta, int | float):
        return FreeReward(1.0, scale.rewards == "mean", has_beta=False)
    return FreeReward(float(beta), scale.rewards == "mean", has_beta=True)


def reference_digest(policy: Path) -> str | None:
    """Return the digest of the reference of a policy's training; None if it is not recorded."""
    identity = (settings_of(policy) or {}).get("identity")
    digest = identity.get("reference") if isinstance(identity, dict) else None
    return digest if isinstance(digest, str) else None


def notes_of(
    policy: Path,
    reference: Path | None,
    given: Mapping[str, Any],
    own: Mapping[str, Any],
) -> list[str]:
    """Return warnings if the reward is probably not that of the policy's training.

    Args:
        policy: Folder of the policy.
        reference: Folder of the reference model; None without one.
        given: Fingerprint of the reference, as a dict.
        own: Fingerprint of the policy, as a dict.
    """
    trained = reference_digest(policy)
    if reference is None:
        is_free = not given and not is_reward_model(policy)
        if is_free and trained is not None and free_reward(policy) is None:
            return [f"{policy} was trained with a reference, and this reward has none"]
        return []
    if given["digest"] == own["digest"]:
        return [f"{reference} is the policy itself: every reward is 0"]
    if trained is None or trained in _digests(given["hard"]):
        return []
    return [
        f"{reference} is not the reference of {policy}'s training, so the reward is not the one "
        "that was trained"
    ]


def _digests(hard: Mapping[str, Any]) -> set[str]:
    """Return the digests that a model has in a training, in any precision and quantization."""
    variants = [dict(hard) | {COMPUTE_DTYPE: words} for words in COMPUTES_IN.values()]
    variants += [one | {QUANTIZATION: scheme} for one in variants for scheme in SCHEMES.values()]
    return {fingerprint_digest(one).hex() for one in variants}
