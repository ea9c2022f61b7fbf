"""Policy and reference as one module: ids in, rewards out, the prompt run once."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from logratio.logps.checks import UnsupportedModelError
from logratio.logps.completion import ropes, transformer
from logratio.logps.head import head_logits
from logratio.training.models import merged

FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
"""transformers' `model_type`s whose graph was compared with torch at many shapes."""

_STATEFUL = ("mamba", "rwkv", "jamba", "zamba", "recurrent", "falcon_h1", "bamba", "lfm2", "_next")
_EXPORTABLE_ATTENTION = ("sdpa", "eager")


def check_exportable(config: PreTrainedConfig, max_length: int) -> None:
    """Refuse a model whose exported graph would be wrong, or could not be made.

    Args:
        config: Of a causal language model.
        max_length: Most tokens of a prompt and a completion together.

    Raises:
        UnsupportedModelError: With the reason.
    """
    name = f"a {config.model_type} model"
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"{name} cannot be exported: {_why_not(config)}")
    if max_length > max_positions(config):
        raise UnsupportedModelError(
            f"{name} with {max_positions(config)} positions cannot score {max_length} tokens"
        )
    for rope in ropes(config):
        _check_rope(rope, name, config, max_length)


def max_positions(config: PreTrainedConfig) -> int:
    """Return the longest sequence that a model was made for."""
    return int(config.max_position_embeddings)


def use_exportable_attention(model: PreTrainedModel) -> None:
    """Choose an attention that can be exported, which flash and flex attention cannot."""
    if model.config._attn_implementation not in _EXPORTABLE_ATTENTION:
        model.set_attn_implementation("sdpa")


def _why_not(config: PreTrainedConfig) -> str:
    if any(word in config.model_type for word in _STATEFUL):
        return (
            "its state runs through the tokens, so a prompt cannot be run once for many "
            "candidates. Its rewards can still be computed with torch: `logratio evaluate`"
        )
    if any("expert" in key for key in config.to_dict()):
        return "mixtures of experts have no exact ONNX form yet"
    return f"the families that were checked are {', '.join(sorted(FAMILIES))}"


def _check_rope(rope: dict[str, Any], name: str, config: PreTrainedConfig, length: int) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        raise UnsupportedModelError(
            f"{name} cannot be exported: its dynamic RoPE depends on the longest sequence so far"
        )
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or max_positions(config)
        if length > original:
            raise UnsupportedModelError(
                f"{name}: LongRoPE changes its factors above {original} tokens, which a graph "
                f"cannot, and the rules allow {length}"
            )


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


TWO_MODELS, ADAPTER = "two_models", "adapter"


@dataclass(frozen=True)
class ModelPair:
    """What the scorer is made of.

    Attributes:
        policy: A model, or a peft model whose base is the reference.
        reference: The other model; None where the policy's base with the adapter off is it.
    """

    policy: nn.Module
    reference: nn.Module | None

    @property
    def kind(self) -> str:
        """``adapter`` or ``two_models``, for the manifest."""
        return ADAPTER if self.reference is None else TWO_MODELS


def join(policy: nn.Module, reference: nn.Module) -> ModelPair:
    """Choose how two loaded models go into one graph; adapters may be merged in place.

    A LoRA policy keeps its base once, with the adapter on for one pass and off for the other, if
    that base is the reference. Every other adapter is merged into its own copy of the weights:
    DoRA, adapters of the embeddings or the head, modules that were trained whole.
    """
    if is_plain_lora(policy) and has_weights_of(policy, reference):
        return ModelPair(policy, None)
    return ModelPair(merged(policy), merged(reference))


def is_plain_lora(model: nn.Module) -> bool:
    """Tell whether switching a model's adapter off is exact and the adapter all that was trained.

    Only low-rank updates of linear layers of the body are: what else peft can train either
    changes weights that switching off does not restore, or bypasses the layers it is added to.
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
    """Tell whether a peft model's base equals a plain model, bit for bit."""
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
