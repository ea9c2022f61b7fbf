"""Patches for the ladder: replace one optimisation by the usual implementation.

Each patch is a function without arguments in `PATCHES`, which replaces a function in the worker
that names it. The function must exist, and the replacement must have been called in the end
(`check_used`), so that a rung always measures what its name says.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from logratio.logps import completion
from logratio.logps.attention.fused import row_of
from logratio.logps.batch import Batch, SharedBatch
from logratio.logps.head import head_logits
from logratio.training import activations, trainer, update, update_loop

# Typed as Any, since patches replace their functions.
TRAINER: Any = trainer
LOOP: Any = update_loop
UPDATE: Any = update

_CALLED: set[str] = set()
Logps = Callable[[nn.Module, Batch], Tensor]


def replace(module: Any, name: str, new: Any) -> None:
    """Replace a function, which must exist.

    Raises:
        AttributeError: it does not: the patch has to be written anew.
    """
    getattr(module, name)
    setattr(module, name, new)


def check_used(names: Sequence[str]) -> None:
    """Refuse a run in which a patch was installed but never called.

    Raises:
        RuntimeError: it names the patch.
    """
    if missing := [name for name in names if name not in _CALLED]:
        raise RuntimeError(f"patches that were never called: {', '.join(missing)}")


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*given: Any) -> Any:
        _CALLED.add(name)
        return function(*given)

    return called


def _with_logps(name: str, logps: Logps) -> None:
    """Compute the loss from these log-probs, and the gradients by autograd."""

    def loss(model: nn.Module, batch: Batch, loss_of: Any) -> Tensor:
        whole: Tensor = loss_of(logps(model, batch), batch.targets.whole)
        return whole

    replace(UPDATE, "completion_loss", _noted(name, loss))


def separate_rows() -> None:
    """Use two padded rows per pair instead of shared prompts."""
    choice = _noted("separate_rows", lambda *_, **__: ("padded", "the bench asks for it"))
    replace(LOOP, "choose_layout", choice)


def own_prompts() -> None:
    """Copy the prompt for each completion, end to end: nothing is shared or padded."""

    def loss(model: nn.Module, batch: Batch, loss_of: Any) -> Tensor:
        whole: Tensor = completion.completion_loss(model, apart(batch), loss_of)
        return whole

    replace(UPDATE, "completion_loss", _noted("own_prompts", loss))


def apart(batch: Batch) -> SharedBatch:
    """Lay out the same targets in a row with a copy of the prompt for each completion."""
    assert isinstance(batch, SharedBatch)
    index, logits, lengths = list[int](), list[int](), list[tuple[int, int]]()
    at = 0
    for prompt, answers in zip(batch.prompt_lengths, batch.completion_lengths, strict=True):
        shared, at = range(at, at + prompt), at + prompt
        for length in answers:
            first = len(index) + prompt - 1
            logits += range(first, first + length)
            index += [*shared, *range(at, at + length)]
            lengths.append((prompt, length))
            at += length
    device = batch.input_ids.device
    place = torch.tensor(index, device=device)
    laid = row_of([(prompt, (length,)) for prompt, length in lengths], device)
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, place],
        position_ids=batch.position_ids[:, place],
        prompt_lengths=[prompt for prompt, _ in lengths],
        completion_lengths=[[length] for _, length in lengths],
        targets=dataclasses.replace(batch.targets, logit_index=torch.tensor(logits, device=device)),
        sequences=laid if batch.sequences else None,
    )


def logps_first() -> None:
    """Compute log-probs, loss and gradients separately: the head's tiles are recomputed."""
    _with_logps("logps_first", completion.completion_logps)


def whole_head() -> None:
    """Full logits at the completions' positions, without tiles or recomputation."""

    def logps(model: nn.Module, batch: Batch) -> Tensor:
        inner, targets = completion.transformer(model), batch.targets
        states = completion._hidden_states(inner, batch).flatten(0, 1)
        states = states.index_select(0, targets.logit_index)
        tokens = head_logits(inner, states).float().log_softmax(-1)
        return tokens.gather(-1, targets.target_ids[:, None])[:, 0]

    _with_logps("whole_head", logps)


def head_everywhere() -> None:
    """Full logits at every position, including prompts, as in a model's forward."""

    def logps(model: nn.Module, batch: Batch) -> Tensor:
        inner, targets = completion.transformer(model), batch.targets
        states = completion._hidden_states(inner, batch).flatten(0, 1)
        tokens = head_logits(inner, states).float().log_softmax(-1)
        return tokens[targets.logit_index, targets.target_ids]

    _with_logps("head_everywhere", logps)


def one_width() -> None:
    """Rows padded to the token budget, and layers compiled for that width only."""
    settings, compiled = LOOP.FeedSettings, partial(torch.compile, dynamic=False)

    def filled(**given: Any) -> Any:
        return settings(**given, width=given["token_budget"])

    replace(LOOP, "FeedSettings", filled)
    replace(activations, "_compiled", _noted("one_width", compiled))


PATCHES: Mapping[str, Callable[[], None]] = {
    "own_prompts": own_prompts,
    "separate_rows": separate_rows,
    "logps_first": logps_first,
    "whole_head": whole_head,
    "head_everywhere": head_everywhere,
    "one_width": one_width,
}
