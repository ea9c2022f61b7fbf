"""Policy and reference as one module: ids in, rewards out, the prompt run once.

What the graph that `export` writes computes. `G` prompts, `N` candidates of up to `C` tokens;
every candidate attends to its prompt through keys and values gathered from the prompt's single run.
Only completion positions reach the head, `chunk` at a time in a scan, so logits never exist whole.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from transformers import DynamicCache, PreTrainedModel

from logratio.logps.completion import transformer
from logratio.logps.head import head_logits


class CandidateInputs(NamedTuple):
    """What `_rust.candidate_layout` fills, int64 each.

    Attributes:
        prompt_ids: `[G, P]`, left-padded.
        prompt_mask: `[G, P]`, 1 on tokens.
        candidate_ids: `[N, C]`, right-padded.
        candidate_mask: `[N, C]`, 1 on tokens.
        group: `[N]`, the prompt of each candidate.
        token_index: `[K, chunk]`, place in `N·C` of each token to score, 0 in padding.
        token_row: `[K, chunk]`, its candidate, `N` in padding.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    candidate_ids: Tensor
    candidate_mask: Tensor
    group: Tensor
    token_index: Tensor
    token_row: Tensor


class HalfScorer(nn.Module):
    """Computes ``log π(y|x)`` of candidates under one model."""

    def __init__(self, model: nn.Module, *, adapter_off: bool = False) -> None:
        """Wrap a model.

        Args:
            model: A causal language model, or a peft wrapper around one.
            adapter_off: Score with the wrapped base alone.
        """
        super().__init__()
        self.model, self._adapter_off = model, adapter_off

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        group: Tensor,
        token_index: Tensor,
        token_row: Tensor,
    ) -> Tensor:
        """Score `CandidateInputs`: sums in nats, float32 `[N]`."""
        inputs = CandidateInputs(
            prompt_ids, prompt_mask, candidate_ids, candidate_mask, group, token_index, token_row
        )
        with self._adapter():
            return candidate_logps(transformer(self.model), inputs)

    def _adapter(self) -> AbstractContextManager[Any]:
        if not self._adapter_off:
            return nullcontext()
        assert isinstance(self.model, PeftModel)
        return self.model.disable_adapter()


class RewardScorer(nn.Module):
    """Computes ``beta * (log π(y|x) - log π_ref(y|x))`` for candidates y of prompts x."""

    def __init__(self, policy: nn.Module, reference: nn.Module | None, beta: float) -> None:
        """Join two models.

        Args:
            policy: The trained model.
            reference: The reference; None: the policy is a peft model, and its base with the
                adapter off is the reference, so that the base's weights are stored once.
            beta: Reward per nat.
        """
        super().__init__()
        self.policy = HalfScorer(policy)
        self.reference = (
            HalfScorer(policy, adapter_off=True) if reference is None else HalfScorer(reference)
        )
        self.beta = beta

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score `CandidateInputs`.

        Returns:
            Rewards, and the policy's and the reference's sums in nats: float32 `[N]` each.
        """
        policy_logps, reference_logps = self.policy(*inputs), self.reference(*inputs)
        return self.beta * (policy_logps - reference_logps), policy_logps, reference_logps


def candidate_logps(model: PreTrainedModel, inputs: CandidateInputs) -> Tensor:
    """Sum each candidate's log-probs under one model: float32 `[N]`, in nats."""
    hidden = _predicting_states(model, inputs).flatten(0, 1)
    target_ids = inputs.candidate_ids.flatten()[inputs.token_index]
    per_token_logps = _scan_head(model, hidden[inputs.token_index], target_ids)
    # The last row takes the padding. float64: in float32 each addition rounds to a unit of the sum.
    sums = torch.zeros(inputs.candidate_ids.shape[0] + 1, dtype=torch.float64)
    added = sums.scatter_add(0, inputs.token_row.flatten(), per_token_logps.flatten().double())
    return added[:-1].float()


def _predicting_states(model: PreTrainedModel, inputs: CandidateInputs) -> Tensor:
    """Return `[N, C, H]`: at each candidate token, the hidden state that predicts it."""
    body: Any = model.base_model
    prompt = body(
        input_ids=inputs.prompt_ids,
        attention_mask=inputs.prompt_mask,
        position_ids=(inputs.prompt_mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=DynamicCache(),  # without a config, so that sliding layers keep everything
        use_cache=True,
    )
    candidates = body(
        input_ids=inputs.candidate_ids,
        attention_mask=torch.cat([inputs.prompt_mask[inputs.group], inputs.candidate_mask], -1),
        position_ids=_candidate_positions(inputs),
        past_key_values=_gathered(prompt.past_key_values, inputs.group),
        use_cache=True,
    )
    first = prompt.last_hidden_state[:, -1:][inputs.group]
    return torch.cat([first, candidates.last_hidden_state[:, :-1]], 1)


def _gathered(cache: Any, group: Tensor) -> DynamicCache:
    """Give each candidate its prompt's keys and values."""
    own = DynamicCache()
    for number, layer in enumerate(cache.layers):
        own.update(layer.keys[group], layer.values[group], number)
    return own


def _candidate_positions(inputs: CandidateInputs) -> Tensor:
    """Number a candidate's tokens on from its prompt's.

    Padding gets 0: counting on there would pass the end of a learned position table.
    """
    lengths = inputs.prompt_mask.sum(-1)[inputs.group].unsqueeze(-1)
    places = torch.arange(inputs.candidate_ids.shape[1]).unsqueeze(0)
    return (lengths + places) * inputs.candidate_mask


def _scan_head(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Apply the head chunk by chunk: `[K, chunk, H]` and `[K, chunk]` to log-probs `[K, chunk]`."""

    def score_chunk(number: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        states, targets = chunk
        # log_softmax: ONNX Runtime's ReduceLogSumExp is 20 times less accurate, and slower.
        logps = torch.log_softmax(head_logits(model, states).float(), -1)
        return number + 1, logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    scored: Tensor = scan(score_chunk, torch.zeros((), dtype=torch.int64), (hidden, target_ids))[1]
    return scored
