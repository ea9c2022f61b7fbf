"""Policy and reference as one module that computes rewards, with the prompt computed once."""

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

from logratio.bundle import CACHED_REFERENCE
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
"""transformers' `model_type`s whose graph is tested against torch at many shapes."""

_STATEFUL = ("mamba", "rwkv", "jamba", "zamba", "recurrent", "falcon_h1", "bamba", "lfm2", "_next")
_EXPORTABLE_ATTENTION = ("sdpa", "eager")


def check_exportable(config: PreTrainedConfig, max_length: int) -> None:
    """Check that a model can be exported exactly.

    Args:
        config: Config of a causal language model.
        max_length: Maximum tokens of prompt + completion.

    Raises:
        UnsupportedModelError: It cannot; the message gives the reason.
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
    """Return the longest sequence that a model supports, in tokens."""
    return int(config.max_position_embeddings)


def use_exportable_attention(model: PreTrainedModel) -> None:
    """Select SDPA unless the model's attention can be exported; flash and flex cannot."""
    if model.config._attn_implementation not in _EXPORTABLE_ATTENTION:
        model.set_attn_implementation("sdpa")


def _why_not(config: PreTrainedConfig) -> str:
    if any(word in config.model_type for word in _STATEFUL):
        return (
            "it has a recurrent state, so a prompt cannot be computed once for many candidates. "
            "Use torch instead: `logratio evaluate`"
        )
    if any("expert" in key for key in config.to_dict()):
        return "mixtures of experts cannot be exported exactly yet"
    return f"the supported families are {', '.join(sorted(FAMILIES))}"


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
                f"cannot do, and the rules allow {length} tokens"
            )


class CandidateInputs(NamedTuple):
    """The graph's inputs, int64, as filled by `_rust.candidate_layout`.

    `G` prompts of up to `P` tokens and `N` candidates of up to `C`; the head runs on `K` chunks.

    Attributes:
        prompt_ids: `[G, P]`, left-padded.
        prompt_mask: `[G, P]`, 1 on tokens.
        candidate_ids: `[N, C]`, right-padded.
        candidate_mask: `[N, C]`, 1 on tokens.
        group: `[N]`, the index of each candidate's prompt.
        token_index: `[K, chunk]`, flat index in `[N, C]` of each token to score; 0 for padding.
        token_row: `[K, chunk]`, the candidate of each token; `N` for padding.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    candidate_ids: Tensor
    candidate_mask: Tensor
    group: Tensor
    token_index: Tensor
    token_row: Tensor


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


def candidate_states(model: PreTrainedModel, inputs: CandidateInputs) -> tuple[Tensor, Tensor]:
    """Return hidden states: at each candidate's prompt end `[N, 1, H]`, and its own `[N, C, H]`."""
    body: Any = model.base_model
    prompt = body(
        input_ids=inputs.prompt_ids,
        attention_mask=inputs.prompt_mask,
        position_ids=(inputs.prompt_mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=DynamicCache(),  # without a config, so that sliding layers keep all keys
        use_cache=True,
    )
    candidates = body(
        input_ids=inputs.candidate_ids,
        attention_mask=torch.cat([inputs.prompt_mask[inputs.group], inputs.candidate_mask], -1),
        position_ids=_candidate_positions(inputs),
        past_key_values=_gathered(prompt.past_key_values, inputs.group),
        use_cache=True,
    )
    return prompt.last_hidden_state[:, -1:][inputs.group], candidates.last_hidden_state


def _gathered(cache: Any, group: Tensor) -> DynamicCache:
    """Return a cache with each candidate's copy of its prompt's keys and values."""
    gathered = DynamicCache()
    for number, layer in enumerate(cache.layers):
        gathered.update(layer.keys[group], layer.values[group], number)
    return gathered


def _candidate_positions(inputs: CandidateInputs) -> Tensor:
    """Return position ids that continue from the prompt's, `[N, C]`.

    Padding gets 0, because higher numbers could exceed a learned position table.
    """
    lengths = inputs.prompt_mask.sum(-1)[inputs.group].unsqueeze(-1)
    places = torch.arange(inputs.candidate_ids.shape[1]).unsqueeze(0)
    return (lengths + places) * inputs.candidate_mask


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
