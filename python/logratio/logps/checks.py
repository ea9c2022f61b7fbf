"""Start-up checks of a model: may it share prompts, is its head known.

Each takes well under a second on a small model and refuses, or falls back with a printed reason,
where a rival would train on wrong numbers.
"""

import numpy as np
import torch
from torch import Tensor, nn

from logratio.errors import LogratioError
from logratio.logps.apart import Group, limits_of
from logratio.logps.apart import batch_of as batch_of
from logratio.logps.attention import SharedPromptError
from logratio.logps.completion import score, transformer
from logratio.logps.head import head_logits

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Nats per token by which two layouts may differ through rounding alone."""


class UnsupportedModelError(LogratioError, ValueError):
    """The model's log-probs cannot be computed rightly."""


def choose_layout(model: nn.Module) -> tuple[str, str]:
    """Return the layout `model` gets, "shared" or "padded", and why.

    The leak check: one completion is perturbed, and the log-probs of the other must not move;
    and both layouts must agree. A model that fails gets the padded layout.
    """
    check_head(model)
    if reason := _sees_padding(model):
        return "padded", reason
    first, second = _probe(model, seed=0), _probe(model, seed=1)
    changed = [(first[0][0], [first[0][1][0], second[0][1][1]]), first[1]]
    try:
        shared, leaked = _scores(model, first, "shared"), _scores(model, changed, "shared")
    except SharedPromptError as error:
        return "padded", f"{_name(model)} cannot share prompts: {error}"
    except TypeError:  # of Python, about a keyword or a mask that the model's code has not
        why = "its attention cannot be replaced by that of shared prompts"
        return "padded", f"{_name(model)} cannot share prompts: {why}"
    kept = slice(0, len(first[0][1][0]))
    if not (moved := _gap(shared[kept], leaked[kept])) <= _tolerance(model):  # NaN too
        return "padded", f"{_name(model)} lets completions see each other ({moved:.2g} nats)"
    if not (gap := _gap(shared, _scores(model, first, "padded"))) <= _tolerance(model):
        return "padded", f"{_name(model)}: shared and padded log-probs differ ({gap:.2g} nats)"
    return "shared", "leak check passed"


def _sees_padding(model: nn.Module) -> str | None:
    """Say which part of a model chooses among all keys of a row, or return None."""
    for limit in limits_of(transformer(model).config):
        if limit.is_padding_seen:
            return (
                f"{_name(model)} has {limit.what}, which chooses among all tokens of a row: longer "
                f"sequences than {limit.tokens} tokens are scored one length at a time, unpadded"
            )
    return None


def check_head(model: nn.Module) -> None:
    """Compare our head with the model's own logits.

    Raises:
        UnsupportedModelError: they differ: the family scales its logits in a way we do not know;
            or they are not finite; or transformers knows no body apart from the head.
    """
    inner = transformer(model)
    if inner.base_model is inner:
        raise UnsupportedModelError(f"{_name(model)}: its body cannot be told from its head")
    prompt, completions = _probe(model, seed=0)[0]
    ids = torch.tensor([prompt + completions[0]], device=inner.device)
    with torch.no_grad():
        own = inner(input_ids=ids, use_cache=False).logits[0].float()
        ours = head_logits(inner, inner.base_model(input_ids=ids, use_cache=False)[0][0]).float()
    if not bool(own.isfinite().all()):
        raise UnsupportedModelError(f"{_name(model)}: its logits are not finite")
    if not (gap := _gap(own, ours)) <= _tolerance(model):
        raise UnsupportedModelError(
            f"{_name(model)}: its head scales logits in an unknown way (they differ by {gap:.2g})"
        )


def _probe(model: nn.Module, seed: int) -> list[Group]:
    """Make two small groups of random tokens, reproducibly."""
    vocabulary = transformer(model).config.get_text_config().vocab_size
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return random.integers(0, vocabulary, length).tolist()  # type: ignore[no-any-return]

    return [(ids(7), [ids(5), ids(9)]), (ids(11), [ids(6), ids(4)])]


@torch.no_grad()
def _scores(model: nn.Module, groups: list[Group], layout: str) -> Tensor:
    return score(model, batch_of(groups, layout, transformer(model).device))


def _gap(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _tolerance(model: nn.Module) -> float:
    if getattr(transformer(model), "is_quantized", False):
        # 8-bit products pick their outliers from all rows, so batch-mates move one another
        # (0.07 nats on the probe of a small model); 4-bit ones have two kernels.
        return TOLERANCE[torch.bfloat16]
    if torch.is_autocast_enabled(transformer(model).device.type):
        return TOLERANCE[torch.bfloat16]
    return TOLERANCE[transformer(model).dtype]


def _name(model: nn.Module) -> str:
    return type(transformer(model)).__name__
