"""Recurrent layers as a scan over chunks of tokens, which a graph can repeat at every length.

transformers computes them with a number of chunks that a trace turns into a constant. A chunk here
has its own size: smaller ones cost less within a chunk, and the values do not depend on it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn.functional import softplus
from transformers import PreTrainedModel

MAMBA_CHUNK = 64
"""Tokens that `mamba2_scan` computes at once."""
DELTA_CHUNK = 32
"""Tokens that `gated_delta_rule` computes at once."""
_L2_EPS = 1e-6


def _chunks(values: Tensor, size: int) -> Tensor:
    """Cut `[B, T, H, ...]` into `[n, B, H, size, ...]`; zeros fill the last chunk."""
    missing = (size - values.shape[1] % size) % size
    tail = values.new_zeros(values.shape[0], 1, *values.shape[2:])
    values = torch.cat([values, tail.expand(-1, missing, *values.shape[2:])], 1)
    values = values.reshape(values.shape[0], -1, size, *values.shape[2:])
    return values.movedim(3, 1).movedim(2, 0).contiguous()


def _tokens(chunks: Tensor, length: int) -> Tensor:
    """Join chunks `[n, B, H, size, V]` to `[B, T, H, V]` and remove the filling."""
    joined = chunks.movedim(0, 2).flatten(2, 3)
    return joined[:, :, :length].transpose(1, 2).contiguous()


def _decays(logs: Tensor) -> Tensor:
    """Return the decay from each token to each later one, `[..., Q, Q]`, of log-decays `[..., Q]`.

    The sums start at the first of the two tokens: differences of sums from the start of the chunk
    would lose digits.
    """
    size = logs.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool)
    terms = torch.where(ones.tril(-1), logs.unsqueeze(-1), 0.0)
    return torch.where(ones.tril(), terms.cumsum(-2).exp(), 0.0)


def mamba2_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - transformers passes it by this name
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """Compute the state-space layer of Mamba 2 (arXiv:2405.21060) from an empty state.

    Args:
        hidden_states: `[batch, T, heads, head_dim]`.
        dt: Time steps, `[batch, T, heads]`.
        A: Decay of each head, negative, `[heads]`.
        B: Input projections, `[batch, T, groups, state]`.
        C: Output projections, `[batch, T, groups, state]`.
        chunk_size: transformers' chunk, unused.
        D: Share of the input that is added to the output, `[heads]`.
        dt_bias: Added to `dt`, `[heads]`.
        dt_softplus: Apply softplus to `dt`.
        dt_limit: Bounds of `dt`.

    Returns:
        `[batch, T, heads, head_dim]`, float32.
    """
    length, heads = hidden_states.shape[1:3]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    inputs = hidden_states.float()
    B, C = (part.float().repeat_interleave(heads // part.shape[2], 2) for part in (B, C))  # noqa: N806
    parts = (inputs * dt.unsqueeze(-1), A.float() * dt, B, C)

    def one(state: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        values, logs, into, out_of = chunk
        passed = logs.cumsum(-1).unsqueeze(-1)
        left = passed[..., -1:, :] - passed
        within = (out_of @ into.transpose(-1, -2) * _decays(logs)) @ values
        outputs = within + (out_of * passed.exp()) @ state
        added = (into * left.exp()).transpose(-1, -2) @ values
        return state * passed[..., -1:, :].exp() + added, outputs

    empty = inputs.new_zeros(inputs.shape[0], heads, B.shape[3], inputs.shape[3])
    outputs = scan(one, empty, tuple(_chunks(part, MAMBA_CHUNK) for part in parts))[1]
    found = _tokens(outputs, length)
    return found if D is None else found + D.unsqueeze(-1) * inputs


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the gated delta rule (arXiv:2412.06464) from an empty state.

    Args:
        query: `[batch, T, key heads, key_dim]`.
        key: `[batch, T, key heads, key_dim]`.
        value: `[batch, T, value heads, value_dim]`.
        g: Log-decays, at most 0, `[batch, T, value heads]`.
        beta: Share of a key's old value that the new one replaces, `[batch, T, value heads]`.
        use_qk_l2norm_in_kernel: Scale queries and keys to length 1 first.

    Returns:
        `[batch, T, value heads, value_dim]` in the query's dtype, and no state.
    """
    length, heads = value.shape[1:3]
    query, key = (
        part.repeat_interleave(heads // part.shape[2], 2).float() for part in (query, key)
    )
    if use_qk_l2norm_in_kernel:
        query, key = (_of_length_one(part) for part in (query, key))
    parts = (query * query.shape[-1] ** -0.5, key, value.float(), g.float(), beta.float())

    def one(state: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        queries, keys, values, logs, shares = chunk
        passed = logs.cumsum(-1).unsqueeze(-1)
        left = passed[..., -1:, :] - passed
        decays, shares = _decays(logs), shares.unsqueeze(-1)
        solved = inverse_of_unit_lower((keys * shares) @ keys.transpose(-1, -2) * decays)
        known = solved @ (keys * shares * passed.exp()) @ state
        new = solved @ (values * shares) - known
        within = (queries @ keys.transpose(-1, -2) * decays) @ new
        outputs = within + (queries * passed.exp()) @ state
        added = (keys * left.exp()).transpose(-1, -2) @ new
        return state * passed[..., -1:, :].exp() + added, outputs

    empty = value.new_zeros(value.shape[0], heads, key.shape[3], value.shape[3]).float()
    outputs = scan(one, empty, tuple(_chunks(part, DELTA_CHUNK) for part in parts))[1]
    return _tokens(outputs, length).to(value.dtype), None


def _of_length_one(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + _L2_EPS)


def inverse_of_unit_lower(matrix: Tensor) -> Tensor:
    """Invert triangular matrices: what is below the diagonal of `matrix`, and ones on it.

    The blocks of each size follow from those of half the size: if A and C are inverted, the block
    below A is -C⁻¹ B A⁻¹. Like forward substitution it does not cancel large numbers, which a
    product of powers does where keys repeat.

    Args:
        matrix: `[..., Q, Q]`; Q is a power of 2.
    """
    size = matrix.shape[-1]
    places = torch.arange(size)
    inverse = torch.eye(size, dtype=matrix.dtype)
    half = 1
    while half < size:
        row, column = (places // half).unsqueeze(1), (places // half).unsqueeze(0)
        between = (row % 2 == 1) & (column == row - 1)
        inverse = inverse - inverse @ torch.where(between, matrix, 0.0) @ inverse
        half *= 2
    return inverse


_SCANS: Mapping[str, Callable[..., Any]] = {
    "mamba2_chunk_scan": mamba2_scan,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
}
"""transformers' functions of a recurrent layer, and what computes the same here."""


@contextmanager
def chunked(model: PreTrainedModel) -> Iterator[None]:
    """Compute a model's recurrent layers with the functions of this module."""
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    own = [
        (file, name, getattr(file, name))
        for file in sources
        for name in _SCANS
        if name in vars(file)
    ]
    try:
        for file, name, _ in own:
            setattr(file, name, _SCANS[name])
        yield
    finally:
        for file, name, function in own:
            setattr(file, name, function)
