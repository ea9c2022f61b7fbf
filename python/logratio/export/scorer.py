"""Policy and reference as one module that computes rewards, with the prompt computed once."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from transformers import PreTrainedModel

from logratio.bundle import CACHED_REFERENCE
from logratio.export.states import CandidateInputs, candidate_states
from logratio.logps.completion import transformer
from logratio.logps.head import head_logits
from logratio.training.models import merged


class HalfScorer(nn.Module):
    """Compute ``log π(y|x)`` of candidates under one model."""

    def __init__(self, model: nn.Module, *, adapter_off: bool = False) -> None:
        """Wrap a model.

        Args:
            model: A causal language model, or a peft wrapper around one.
            adapter_off: Score with the base model, without its adapter.
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
    ) -> tuple[Tensor, Tensor]:
        """Score candidates; the inputs are those of `CandidateInputs`.

        Returns:
            Sums of log-probs, float32 `[N]`, and log-probs per token, float32 `[K, chunk]`, in the
            order of `token_index`; both in nats.
        """
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
    """Compute ``beta * (log π(y|x) - log π_ref(y|x))`` for candidates y of prompts x."""

    def __init__(self, policy: nn.Module, reference: nn.Module | None, beta: float) -> None:
        """Combine two models.

        Args:
            policy: The trained model.
            reference: The reference. None: the policy is a peft model whose base, without the
                adapter, is the reference, so that the base's weights are stored once.
            beta: Reward per nat.
        """
        super().__init__()
        self.policy = HalfScorer(policy)
        self.reference = (
            HalfScorer(policy, adapter_off=True) if reference is None else HalfScorer(reference)
        )
        self.beta = beta

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score candidates; the inputs are those of `CandidateInputs`.

        Returns:
            Rewards, policy sums and reference sums (in nats), each float32 `[N]`.
        """
        policy_logps, reference_logps = self.policy(*inputs)[0], self.reference(*inputs)[0]
        return self.beta * (policy_logps - reference_logps), policy_logps, reference_logps


class PolicyScorer(nn.Module):
    """Compute a reward from the policy alone.

    The reward is ``beta * (log π(y|x) - reference_logps)`` with given reference log-probs, or has
    no reference: ``beta * log π(y|x)``, or that divided by the number of tokens.
    """

    def __init__(self, policy: nn.Module, kind: str, beta: float, *, normalized: bool) -> None:
        """Wrap a policy.

        Args:
            policy: The trained model, without a peft wrapper.
            kind: `bundle.CACHED_REFERENCE` or `bundle.REFERENCE_FREE`.
            beta: Reward per nat.
            normalized: Divide by the number of tokens; only for `bundle.REFERENCE_FREE`.
        """
        super().__init__()
        self.policy = HalfScorer(policy)
        self.kind, self.beta, self.normalized = kind, beta, normalized

    def forward(
        self, *inputs: Tensor, reference_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return rewards and policy sums, each float32 `[N]`; see `CandidateInputs`."""
        sums, _ = self.policy(*inputs)
        if self.kind == CACHED_REFERENCE:
            assert reference_logps is not None
            return self.beta * (sums - reference_logps), sums
        tokens = CandidateInputs(*inputs).candidate_mask.sum(1)
        return self.beta * (sums / tokens if self.normalized else sums), sums


def candidate_logps(model: PreTrainedModel, inputs: CandidateInputs) -> tuple[Tensor, Tensor]:
    """Return each candidate's log-probs under one model: sums `[N]` and per token `[K, chunk]`."""
    hidden = _predicting_states(model, inputs).flatten(0, 1)
    target_ids = inputs.candidate_ids.flatten()[inputs.token_index]
    per_token_logps = _scan_head(model, hidden[inputs.token_index], target_ids)
    # Padding is added to the extra last row. float64 avoids rounding each addition in float32.
    sums = torch.zeros(inputs.candidate_ids.shape[0] + 1, dtype=torch.float64)
    added = sums.scatter_add(0, inputs.token_row.flatten(), per_token_logps.flatten().double())
    return added[:-1].float(), per_token_logps


def _predicting_states(model: PreTrainedModel, inputs: CandidateInputs) -> Tensor:
    """Return the hidden state that predicts each candidate token, `[N, C, H]`."""
    first, own = candidate_states(model, inputs)
    return torch.cat([first, own[:, :-1]], 1)


def _scan_head(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Return log-probs `[K, chunk]` of targets `[K, chunk]` given states `[K, chunk, H]`."""

    def score_chunk(number: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        states, targets = chunk
        # log_softmax: ONNX Runtime's ReduceLogSumExp is 20 times less accurate, and slower.
        logps = torch.log_softmax(head_logits(model, states).float(), -1)
        return number + 1, logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    scored: Tensor = scan(score_chunk, torch.zeros((), dtype=torch.int64), (hidden, target_ids))[1]
    return scored


TWO_MODELS, ONE_BASE = "two_models", "adapter"


@dataclass(frozen=True)
class ModelPair:
    """The models of a scorer.

    Attributes:
        policy: A model, or a peft model whose base is the reference.
        reference: The reference model; None if it is the policy's base without the adapter.
    """

    policy: nn.Module
    reference: nn.Module | None

    @property
    def kind(self) -> str:
        """``adapter`` or ``two_models``, for the manifest."""
        return ONE_BASE if self.reference is None else TWO_MODELS


def join(policy: nn.Module, reference: nn.Module) -> ModelPair:
    """Choose how to combine two loaded models in one graph; adapters may be merged in place.

    If the base of a LoRA policy is the reference, it is stored once, and the graph computes it with
    and without the adapter. All other adapters (DoRA, adapters of embeddings or head, fully trained
    modules) are merged into a copy of the weights.
    """
    if is_plain_lora(policy) and has_weights_of(policy, reference):
        return ModelPair(policy, None)
    return ModelPair(merged(policy), merged(reference))


def is_plain_lora(model: nn.Module) -> bool:
    """Return whether disabling the adapter restores the base model exactly.

    This holds only for low-rank updates of the body's linear layers. Other peft methods change
    weights that disabling does not restore, or bypass the layers they are added to.
    """
    if not isinstance(model, PeftModel) or len(model.peft_config) != 1:
        return False
    config = next(iter(model.peft_config.values()))
    plain = (
        isinstance(config, LoraConfig)
        and config.bias == "none"
        and not config.use_dora
        and not config.modules_to_save
        and not config.trainable_token_indices
        and not getattr(config, "target_parameters", None)
    )
    return plain and all(map(_is_linear, _lora_layers(model))) and not _adapts_ends(model)


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _is_linear(layer: LoraLayer) -> bool:
    return isinstance(layer, LoraLinear) and not getattr(layer, "lora_variant", None)


def _adapts_ends(model: nn.Module) -> bool:
    inner = transformer(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return any(isinstance(end, LoraLayer) for end in ends)


def has_weights_of(policy: nn.Module, reference: nn.Module) -> bool:
    """Return whether a peft model's base is bitwise equal to a plain model."""
    if isinstance(reference, PeftModel):
        return False
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in transformer(policy).state_dict().items()
        if ".lora_" not in name
    }
    weights: dict[str, Tensor] = reference.state_dict()
    return base.keys() == weights.keys() and all(
        tensor.shape == weights[name].shape and torch.equal(tensor, weights[name])
        for name, tensor in base.items()
    )
