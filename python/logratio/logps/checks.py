"""Start-up checks of a model: whether it can share prompts, is causal, and has a known head.

Each check takes well under a second on a small model. A model that fails is refused or gets a
slower layout, with a reason, instead of wrong log-probs.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedConfig

from logratio.errors import LogratioError
from logratio.logps.attention.interface import SharedPromptError
from logratio.logps.batch import Batch, TreeBatch
from logratio.logps.completion import (
    Group,
    attention_for,
    inside,
    limits_of,
    score,
    transformer,
)
from logratio.logps.completion import batch_of as batch_of
from logratio.logps.context_parallel import ContextRanks, split_over
from logratio.logps.head import Head, head_logits
from logratio.logps.scores import (
    HEAD,
    completion_scores,
    end_states,
    has_scalar_head,
    scored_places,
)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference between two layouts that rounding explains, in nats per token."""
SAME_CALLS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Largest difference that rounding explains between two calls with equal shapes, in nats per token,
where a token's rounding may depend on the others: see `_leak_limit`."""
_STATEFUL = re.compile("linear|conv|hybrid|mamba|ssm|recurrent|rwkv")
"""Matches names of layer types that carry a state from token to token."""
_STATE_MODULES = re.compile("mamba|delta|rwkv|lightning|recurrent|linearattention", re.I)


class UnsupportedModelError(LogratioError, ValueError):
    """The model's log-probs cannot be computed correctly."""


LAYOUTS = ("padded", "shared", "tree")
"""Layouts in order of speed. Every model supports "padded"; "tree" computes the fewest tokens."""


def choose_layout(*models: nn.Module, share_beginnings: bool = False) -> tuple[str, str]:
    """Choose the fastest layout that gives correct log-probs for all `models`.

    The leak check perturbs one completion: the log-probs of the other must not change, and must
    have a zero gradient with respect to its tokens; and both layouts must agree. A model that fails
    gets the padded layout. "tree" must also pass a second leak check.

    Args:
        models: The models, each on its device.
        share_beginnings: Whether to try "tree", which shares beginnings across groups.

    Returns:
        One of `LAYOUTS`, and the reason for the choice.

    Raises:
        UnsupportedModelError: The model is not causal, or its head is not supported.
    """
    found = [_layout_of(model, share_beginnings=share_beginnings) for model in models]
    return min(found, key=lambda one: LAYOUTS.index(one[0]))


def _layout_of(model: nn.Module, *, share_beginnings: bool) -> tuple[str, str]:
    layout, reason = _shared_or_padded(model)
    if layout == "shared" and share_beginnings:
        refusal = check_tree(model)
        return ("shared", refusal) if refusal else ("tree", reason)
    return layout, reason


def layout_note(layout: str, reason: str, *, share_beginnings: bool) -> str | None:
    """Return a note if a model got a slower layout than requested, else None."""
    if layout == "padded":
        unshared = "; it shares no beginnings" if share_beginnings else ""
        return f"using the padded layout, which is slower: {reason}{unshared}"
    if share_beginnings and layout != "tree":
        return f"beginnings are shared within groups, not across them: {reason}"
    return None


def _shared_or_padded(model: nn.Module) -> tuple[str, str]:
    check_head(model)
    check_causality(model)
    if reason := _sees_padding(model) or _has_state(model):
        return "padded", reason
    first = _probe(model, seed=0)
    try:
        shared = _scores(model, first, "shared")
        moved = max(_leak(model, first, shared, changed) for changed in (0, 1))
        crosstalk = _crosstalk(model, first)
    except SharedPromptError as error:
        return "padded", f"{_name(model)} cannot share prompts: {error}"
    except TypeError:  # the model's code does not accept a keyword argument or mask
        why = "its attention cannot be replaced by shared-prompt attention"
        return "padded", f"{_name(model)} cannot share prompts: {why}"
    if not moved <= _leak_limit(model):  # NaN too
        return "padded", f"{_name(model)} lets completions see each other ({moved:.2g} nats)"
    if crosstalk != 0:  # NaN too
        return "padded", f"{_name(model)} lets completions see each other (by their gradients)"
    if not (gap := _gap(shared, _scores(model, first, "padded"))) <= _tolerance(model):
        return "padded", f"{_name(model)}: shared and padded log-probs differ ({gap:.2g} nats)"
    return "shared", "leak check passed"


def _leak(model: nn.Module, groups: list[Group], logps: Tensor, changed: int) -> float:
    """Return the change of a completion's log-probs when the other completion is changed."""
    prompt, completions = groups[0]
    others = [*completions]
    others[changed] = _probe(model, seed=1)[0][1][changed]
    leaked = _scores(model, [(prompt, others), *groups[1:]], "shared")
    first, second = _counts(model, completions)
    kept = slice(0, first) if changed else slice(first, first + second)
    return _gap(logps[kept], leaked[kept])


def _crosstalk(model: nn.Module, groups: list[Group]) -> float:
    """Return the largest gradient of log-probs with respect to tokens they must not depend on.

    Without a dependency the gradient is exactly 0 in every precision. With one it is not 0, even if
    the effect is too small to show in a bfloat16 log-prob.
    """
    (prompt, (first, _)), device = groups[0], transformer(model).device
    start, stop = len(prompt), len(prompt) + len(first)
    counts = _counts(model, [ids for _, answers in groups for ids in answers])
    cuts = [0, counts[0], sum(counts)]
    if not (found := _token_gradients(model, batch_of(groups, "shared", device), cuts)):
        return 0.0
    of_first, of_others = found
    return max(float(of_first[stop:].abs().max()), float(of_others[start:stop].abs().max()))


def _token_gradients(model: nn.Module, batch: Batch, cuts: Sequence[int]) -> list[Tensor]:
    """Return gradients with respect to the row's token embeddings, `[T, H]` each.

    One gradient for each pair of consecutive `cuts`: that of the sum of the log-probs between them.
    Empty if the model has no backward pass, or does not use its input embeddings.
    """
    inner = transformer(model)
    if _is_quantized(model):  # quantized products may have no backward pass
        return []
    embedded = list[Tensor]()

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # the model may modify it in place

    handle = inner.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logps = _values(model, batch)
            parts = [logps[start:stop].sum() for start, stop in pairwise(cuts)]
    finally:
        handle.remove()
    if not embedded:
        return []
    return [
        torch.autograd.grad(part, embedded[0], retain_graph=True, materialize_grads=True)[0][0]
        for part in parts
    ]


def check_tree(model: nn.Module) -> str | None:
    """Run the leak check in the tree layout, for a model that supports the "shared" layout.

    The probe has groups that share a system prompt, and one whose prompt continues another group's
    answer. Their log-probs must equal those in the padded layout, and must not change with tokens
    of other branches, nor have a gradient with respect to them.

    Returns:
        The reason why beginnings must not be shared across groups, or None.
    """
    groups = _probe_tree(model)
    try:
        tree = _scores(model, groups, "tree")
        moved = max(_tree_leak(model, groups, tree, group) for group in range(len(groups)))
        crosstalk = _tree_crosstalk(model, groups)
    except SharedPromptError as error:
        return f"{_name(model)} cannot share beginnings: {error}"
    if not moved <= _leak_limit(model):
        return f"{_name(model)} lets branches see each other ({moved:.2g} nats)"
    if crosstalk != 0:
        return f"{_name(model)} lets branches see each other (by their gradients)"
    if not (gap := _gap(tree, _scores(model, groups, "padded"))) <= _tolerance(model):
        return f"{_name(model)}: tree and padded log-probs differ ({gap:.2g} nats)"
    return None


def unsplit_by_config(config: PreTrainedConfig) -> str | None:
    """Return what a model has that does not allow to split its prompts, or None.

    Args:
        config: The model's config.
    """
    text = config.get_text_config()
    if limits := limits_of(config):
        return f"{limits[0].what}, which depends on the length of the whole sequence"
    layers = getattr(text, "layer_types", None)
    has_window = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    if "sliding_attention" in layers if layers else has_window:
        return "a sliding window"
    return "soft-capped scores" if getattr(text, "attn_logit_softcapping", None) else None


@torch.no_grad()
def split_refusal(model: nn.Module, ranks: ContextRanks) -> str | None:
    """Check that a row that `ranks` compute together has the log-probs of a whole one.

    Args:
        model: A model that supports the "shared" layout; the same in all of these processes.
        ranks: The processes, which call this together.

    Returns:
        The reason why rows of the model must not be split, or None.
    """
    inner = transformer(model)
    if reason := unsplit_by_config(inner.config):
        return f"{_name(model)} has {reason}"
    if Head.of(inner) is None:
        return f"the head of {_name(model)} is more than a matrix"
    groups = [group for seed in range(3) for group in _probe(model, seed)]
    whole = _scores(model, groups, "shared")
    try:
        with split_over(ranks, inner):
            shares = _scores(model, groups, "shared")
    except SharedPromptError as error:
        return f"{_name(model)}: {error}"
    if not (gap := _gap(whole, shares)) <= _tolerance(model):
        return f"log-probs of {_name(model)} differ in a split row ({gap:.2g} nats)"
    return None


def _tree_leak(model: nn.Module, groups: list[Group], logps: Tensor, changed: int) -> float:
    """Return the change of other log-probs when the end of a group's last completion changes."""
    vocabulary = transformer(model).config.get_text_config().vocab_size
    prompt, (*others, last) = groups[changed]
    last = [last[0], *((token + 1) % vocabulary for token in last[1:])]
    altered = [*groups[:changed], (prompt, [*others, last]), *groups[changed + 1 :]]
    leaked = _scores(model, altered, "tree")
    before = [ids for _, answers in groups[:changed] for ids in answers]
    start = sum(_counts(model, before + others))
    gaps = (logps - leaked).abs()
    same = 0 if has_scalar_head(model) else 1  # the first token of the completion is unchanged
    after = start + sum(_counts(model, [last]))
    return float(torch.cat([gaps[: start + same], gaps[after:]]).max())


def _tree_crosstalk(model: nn.Module, groups: list[Group]) -> float:
    """Return the largest gradient of a completion with respect to a token not on its path."""
    batch = batch_of(groups, "tree", transformer(model).device)
    assert isinstance(batch, TreeBatch)
    offsets = batch.targets.completion_offsets
    is_scored = has_scalar_head(model)
    cuts = list(range(len(offsets))) if is_scored else offsets.tolist()
    last = batch.targets.logit_index[offsets[1:] - 1]
    ends = (scored_places(batch, None) if is_scored else last).tolist()
    worst = [torch.zeros(())]
    for gradient, end in zip(_token_gradients(model, batch, cuts), ends, strict=False):
        outside = torch.ones(len(gradient), dtype=torch.bool)
        outside[torch.from_numpy(batch.runs.path_to(end))] = False
        worst.append(gradient.cpu()[outside].abs().max())
    return float(torch.stack(worst).max())  # NaN too


def _probe_tree(model: nn.Module) -> list[Group]:
    """Create groups with a common beginning, one of which is a later turn of another."""
    (start, (first, second)), (later, answers) = _probe(model, seed=0)
    _, ((own, others), (end, last)) = zip(*_probe(model, seed=1), strict=True)
    system = later  # 11 tokens, more than the minimum for sharing
    turn = system + start
    return [
        (turn, [first, second]),
        (turn + first + end, [last, own]),
        (system + others, [answers[0], answers[1]]),
        (start, [own, others]),
    ]


def _has_state(model: nn.Module) -> str | None:
    """Describe the layers of a model that pass a state from token to token, or return None.

    They are detected by name, because in low precision their leak may be too small to measure.
    """
    inner = transformer(model)
    types = {*(getattr(inner.config.get_text_config(), "layer_types", None) or ())}
    found = sorted(name for name in types if _STATEFUL.search(name))
    parts = [module for module in inner.base_model.modules() if module is not inner.base_model]
    found = found or sorted({type(module).__name__ for module in parts if _keeps_state(module)})[:1]
    if not found:
        return None
    return f"{_name(model)} has layers that carry a state across tokens ({', '.join(found)})"


def _keeps_state(module: nn.Module) -> bool:
    is_convolution = isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
    return is_convolution or bool(_STATE_MODULES.search(type(module).__name__))


def _sees_padding(model: nn.Module) -> str | None:
    """Describe the part of a model that selects among all keys of a row, or return None."""
    for limit in limits_of(transformer(model).config):
        if limit.is_padding_seen:
            return (
                f"{_name(model)} has {limit.what}, which selects among all tokens of a row: "
                f"sequences longer than {limit.tokens} tokens are batched by equal length"
            )
    return None


def check_head(model: nn.Module) -> None:
    """Compare the logits of `head_logits` with those of the model's forward.

    Raises:
        UnsupportedModelError: The logits differ because the family computes them in an unknown way;
            or they are not finite; or the model has no separate body; or the model's code fails
            under autocast.
    """
    inner = transformer(model)
    if inner.base_model is inner:
        raise UnsupportedModelError(f"{_name(model)}: its body and its head are not separate")
    if has_scalar_head(model):
        _check_scalar_head(model)
        return
    prompt, completions = _probe(model, seed=0)[0]
    ids = torch.tensor([prompt + completions[0]], device=inner.device)
    with torch.no_grad():
        own = _own_logits(model, ids)
    if not bool(own.isfinite().all()):
        raise UnsupportedModelError(f"{_name(model)}: its logits are not finite")
    if not (gap := inside(model, _head_gap, ids, own)) <= _tolerance(model):
        raise UnsupportedModelError(
            f"{_name(model)}: its head is not supported: it must be a matrix with optional bias, "
            f"scale and cap (logits differ by {gap:.2g})"
        )


def _check_scalar_head(model: nn.Module) -> None:
    """Compare the score of a sequence with the output of the model's forward: see `check_head`."""
    inner, (prompt, completions) = transformer(model), _probe(model, seed=0)[0]
    head = getattr(inner, HEAD, None)
    if head is None or inner.config.num_labels != 1:
        raise UnsupportedModelError(
            f"{_name(model)}: a reward model has a layer {HEAD!r} with one output"
        )
    ids = torch.tensor([prompt + completions[0]], device=inner.device)
    with torch.no_grad():
        own = _own_logits(model, ids).flatten()
        batch = batch_of([(prompt, completions[:1])], "padded", inner.device)
        found = completion_scores(model, batch).float()
    if not bool(own.isfinite().all()):
        raise UnsupportedModelError(f"{_name(model)}: its score is not finite")
    scale = max(1.0, float(own.abs().max()))
    if not (gap := _gap(own, found)) <= _tolerance(model) * scale:
        raise UnsupportedModelError(
            f"{_name(model)}: its scores are computed in an unknown way (they differ by {gap:.2g})"
        )


def _own_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the first sequence's logits of the wrapped model for ids `[1, T]`, in float32."""
    try:
        logits: Tensor = transformer(model)(input_ids=ids, use_cache=False).logits[0].float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not torch.is_autocast_enabled(ids.device.type):
            raise
        reason = str(error).partition("\n")[0]
        raise UnsupportedModelError(
            f"{_name(model)}: the model's code fails under --precision bf16 ({reason}): use "
            "bf16-weights or fp32"
        ) from error
    return logits


@torch.no_grad()
def _head_gap(model: nn.Module, ids: Tensor, own: Tensor) -> float:
    """Return the largest difference between `head_logits` and the model's logits `[n, V]`."""
    inner = transformer(model)
    hidden = inner.base_model(input_ids=ids, use_cache=False)[0][0]
    try:
        return _gap(own, head_logits(inner, hidden).float())
    except RuntimeError:  # shapes differ: the head has layers before or after the matrix
        return float("inf")


@torch.no_grad()
def check_causality(model: nn.Module) -> None:
    """Check that a token's log-probs do not depend on later tokens.

    Raises:
        UnsupportedModelError: They do.
    """
    inner, (prompt, completions) = transformer(model), _probe(model, seed=0)[0]
    ids = torch.tensor([prompt + completions[0]], device=inner.device)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % inner.config.get_text_config().vocab_size
    first, second = (_before_last(inner, row) for row in (ids, changed))
    if not (moved := _gap(first, second)) <= _tolerance(model, SAME_CALLS):
        raise UnsupportedModelError(
            f"{_name(model)} is not causal: a token changes earlier log-probs by {moved:.2g} nats"
        )


def _before_last(model: nn.Module, ids: Tensor) -> Tensor:
    """Return what a model computes at all positions of `[1, T]` but the last.

    That is log-probs `[T - 1, V]`, or for a reward model states `[T - 1, H]` at the same scale.
    """
    if has_scalar_head(model):
        states = transformer(model).base_model(input_ids=ids, use_cache=False)[0][0, :-1].float()
        return rms_norm(states, states.shape[1:])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)


def _probe(model: nn.Module, seed: int) -> list[Group]:
    """Create two small groups of random tokens, reproducibly."""
    vocabulary = transformer(model).config.get_text_config().vocab_size
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return random.integers(0, vocabulary, length).tolist()  # type: ignore[no-any-return]

    return [(ids(7), [ids(5), ids(9)]), (ids(11), [ids(6), ids(4)])]


@torch.no_grad()
def _scores(model: nn.Module, groups: list[Group], layout: str) -> Tensor:
    return _values(model, batch_of(groups, layout, transformer(model).device))


def _values(model: nn.Module, batch: Batch) -> Tensor:
    """Return what the checks compare: log-probs of tokens `[S]`; or `[N]` of a reward model.

    A new head's scores may be too small to show a leak, so the states that it reads are compared
    instead: at the same scale, in a random direction.
    """
    if not has_scalar_head(model):
        return score(model, batch)
    with attention_for(model, batch):
        states = inside(model, lambda model: end_states(transformer(model), batch)).float()
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(states.shape[1], generator=random).to(states.device)
    found: Tensor = rms_norm(states, states.shape[1:]) @ direction / len(direction) ** 0.5
    return found


def _counts(model: nn.Module, completions: Sequence[Sequence[int]]) -> list[int]:
    """Return how many of `_values` each completion has."""
    return [1 if has_scalar_head(model) else len(ids) for ids in completions]


def _gap(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _tolerance(model: nn.Module, limits: dict[torch.dtype, float] = TOLERANCE) -> float:
    if _is_quantized(model) or (_is_low(model) and _has_experts(model)):
        # 8-bit products select outliers over all rows, so rows of a batch affect each other (0.07
        # nats on the probe of a small model). 4-bit products have two kernels. The number of rows
        # that an expert multiplies depends on the batch.
        return TOLERANCE[torch.bfloat16]
    if torch.is_autocast_enabled(transformer(model).device.type):
        return limits[torch.bfloat16]
    return limits[transformer(model).dtype]


def _leak_limit(model: nn.Module) -> float:
    """Return the largest change of a token's log-prob that is no leak, in nats.

    It is 0, because the token keeps its place in calls with equal shapes: the same kernels compute
    the same bits. Only in products of quantized models and of experts do other tokens change them.
    """
    if _is_quantized(model) or _has_experts(model):
        return _tolerance(model, SAME_CALLS)
    return 0.0


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(transformer(model), "is_quantized", False))


def _is_low(model: nn.Module) -> bool:
    """Return whether the model computes in less than float32."""
    inner = transformer(model)
    return inner.dtype != torch.float32 or torch.is_autocast_enabled(inner.device.type)


def _has_experts(model: nn.Module) -> bool:
    return any("expert" in key for key in transformer(model).config.get_text_config().to_dict())


def _name(model: nn.Module) -> str:
    return type(transformer(model)).__name__
