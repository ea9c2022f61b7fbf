r"""The load-balancing loss of a mixture of experts, from sums over the tokens of a batch.

Families of transformers with this loss share one formula (Fedus et al. 2021, arXiv 2101.03961,
eq. 4 to 6, for the k best experts of each token), over all layers at once:

.. math:: E \sum_e f_e P_e

:math:`f_e` is the number of times that expert e is among the k best of a token, divided by the
number of tokens and layers; :math:`P_e` is the mean of its probability, a softmax over all E
experts. Some families choose experts by other scores (sigmoids, or with a bias that balances them);
the loss uses the softmax of their logits all the same, as transformers does.

Tokens count as in a padded batch with a row for each completion: prompt and completion tokens
count, padding does not. A token that several completions share is computed once here and counts
once for each of them.

:math:`f` has no gradient, and for a fixed :math:`f` the loss is a sum over tokens. So the loss of a
whole update can be computed one micro-batch at a time, once :math:`f` of the update is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logratio.errors import ConfigError
from logratio.logps.batch import Batch, PaddedBatch, SharedBatch, TreeBatch
from logratio.logps.sequences import onto


@dataclass
class RouterSums:
    """Sums over tokens and layers for the load-balancing loss, all float64.

    Sums of several batches, or of several processes, are added field by field.

    Attributes:
        top_k: Experts that each token is routed to.
        counts: How often each expert is among the best `top_k`, `[E]`; without gradient.
        probabilities: Sum of each expert's probability, `[E]`; differentiable.
        tokens: Number of tokens times number of layers, a scalar.
    """

    top_k: int
    counts: Tensor | float = 0.0
    probabilities: Tensor | float = 0.0
    tokens: Tensor | float = 0.0

    def add(self, batch: Batch, logits: Sequence[Tensor] | None) -> None:
        """Add the tokens of a batch.

        Args:
            batch: A batch of `R` rows and `T` columns, in any layout.
            logits: Logits of each layer's router, `[R * T, E]` or `[R, T, E]`; None or empty: the
                model has no layer with experts.

        Raises:
            ConfigError: There are no logits.
        """
        if not logits:
            raise ConfigError(
                "router_aux_loss_coef: this model has no router whose logits it returns, so there "
                "is no load-balancing loss: set router_aux_loss_coef to 0"
            )
        weights = token_weights(batch)
        for layer in logits:
            self._add_layer(layer.flatten(0, -2), weights)

    def _add_layer(self, logits: Tensor, weights: Tensor) -> None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        shares = torch.softmax(logits, -1, dtype=dtype)
        chosen = shares.detach().topk(self.top_k, dim=-1).indices
        zeros = weights.new_zeros(logits.shape[-1])
        counts = zeros.index_add(0, chosen.flatten(), weights.repeat_interleave(self.top_k))
        self.counts = self.counts + counts
        self.probabilities = self.probabilities + (shares.double() * weights[:, None]).sum(0)
        self.tokens = self.tokens + weights.sum()


def balancing_loss(part: RouterSums, whole: RouterSums) -> Tensor:
    """Return the share of some tokens in the load-balancing loss of all tokens, a float64 scalar.

    The shares of disjoint parts add up to the loss, and their gradients to its gradient.

    Args:
        part: Sums over the part's tokens, whose `probabilities` may have a gradient.
        whole: Sums over all tokens. Its `probabilities` are not used.

    Example:
        >>> sums = RouterSums(top_k=1)
        >>> batch = batch_of([([5], [[6]])], "padded")
        >>> sums.add(batch, [torch.zeros(2, 4)])
        >>> balancing_loss(sums, sums)  # 1 for each expert of a token if all are equally likely
        tensor(1., dtype=torch.float64)
    """
    assert isinstance(whole.counts, Tensor)
    shares = whole.counts / whole.tokens
    return len(shares) * (shares * (part.probabilities / whole.tokens)).sum()


def token_weights(batch: Batch) -> Tensor:
    """Return the number of completions whose prompt or answer contains each token.

    Args:
        batch: A batch of `R` rows and `T` columns, in any layout.

    Returns:
        Weights, float64 `[R * T]`; 0 for padding.
    """
    if isinstance(batch, PaddedBatch):
        return batch.attention_mask.flatten().double()
    counts = _tree_weights(batch) if isinstance(batch, TreeBatch) else _shared_weights(batch)
    return onto(counts, batch.input_ids.device)


def _shared_weights(batch: SharedBatch) -> np.ndarray:
    """Count the completions of each token on the host, float64 `[T]`."""
    lengths, weights = list[int](), list[int]()
    for prompt, completions in zip(batch.prompt_lengths, batch.completion_lengths, strict=True):
        lengths += [prompt, *completions]
        weights += [len(completions), *[1] * len(completions)]
    padding = batch.input_ids.shape[1] - sum(lengths)
    return np.repeat(np.array([*weights, 0], dtype=np.float64), [*lengths, padding])


def _tree_weights(batch: TreeBatch) -> np.ndarray:
    """Count the completions through each token of a tree on the host, float64 `[T]`.

    Each completion counts 1 at its last token. A token's count is the sum of those of the tokens
    that follow it, which are later in the row.
    """
    before, starts = batch.runs.before, batch.runs.starts
    weights = np.bincount(batch.last_tokens, minlength=len(before)).astype(np.float64)
    for start, stop in zip(starts[-2::-1], starts[:0:-1], strict=True):
        weights[start:stop] = weights[start:stop][::-1].cumsum()[::-1]
        if before[start] >= 0:
            weights[before[start]] += weights[start]
    return weights
