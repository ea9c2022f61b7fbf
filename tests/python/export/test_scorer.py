"""The scorer module against the models' own forward, in torch, without export."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir
import peft
import pytest
import torch
from oracle import in_float64, per_token_logps
from small_configs import small_config
from tiny_models import FAMILIES, GROUPED, SIZES, VOCABULARY, mamba_config, tiny
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SmolLM3Config,
    Starcoder2Config,
)

from logratio._rust import candidate_layout
from logratio.bundle.graph_file import read_graph
from logratio.bundle.operators import OPERATORS
from logratio.export.families import FAMILIES as EXPORTABLE
from logratio.export.families import check_exportable
from logratio.export.graph import OPSETS, same_architecture, trace
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import HalfScorer, RewardScorer, join
from logratio.graph_inputs import graph_inputs
from logratio.logps.checks import UnsupportedModelError, batch_of
from logratio.logps.completion import score
from logratio.training.models import quietly

Group = tuple[list[int], list[list[int]]]
NO_HEAD_DIM = {name: value for name, value in GROUPED.items() if name != "head_dim"}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}


def longrope() -> PreTrainedConfig:
    """A Phi-3 whose rotary factors change above 64 tokens."""
    return Phi3Config(
        **NO_HEAD_DIM, pad_token_id=0, rope_parameters=LONGROPE, original_max_position_embeddings=64
    )


ALL: dict[str, Callable[[], PreTrainedConfig]] = {
    **FAMILIES,
    "gemma": lambda: GemmaConfig(**GROUPED),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=12, query_pre_attn_scalar=8),
    "granite": lambda: GraniteConfig(**NO_HEAD_DIM, logits_scaling=3.0, residual_multiplier=0.5),
    "olmo2": lambda: Olmo2Config(**NO_HEAD_DIM, pad_token_id=0),
    "qwen2": lambda: Qwen2Config(**NO_HEAD_DIM),
    "smollm3": lambda: SmolLM3Config(**NO_HEAD_DIM, pad_token_id=0),
    "starcoder2": lambda: Starcoder2Config(**NO_HEAD_DIM, sliding_window=12),
}


def groups_of(seed: int, prompts: Sequence[int], candidates: int, longest: int) -> list[Group]:
    """Random groups: prompts of these lengths, each with `candidates` of 1 … `longest` tokens."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(number) for number in random.integers(3, VOCABULARY, length)]

    return [
        (ids(length), [ids(int(random.integers(1, longest + 1))) for _ in range(candidates)])
        for length in prompts
    ]


@torch.no_grad()
def run(scorer: RewardScorer, groups: Sequence[Group], chunk: int = 16) -> list[torch.Tensor]:
    layout = candidate_layout(
        [np.array(prompt, np.int32) for prompt, _ in groups],
        [[np.array(ids, np.int32) for ids in candidates] for _, candidates in groups],
        chunk,
    )
    return list(
        scorer.eval()(*(torch.from_numpy(array) for array in graph_inputs(layout).values()))
    )


@torch.no_grad()
def sums(model: PreTrainedModel, groups: list[Group]) -> torch.Tensor:
    per_token = iter(per_token_logps(in_float64(model), groups))
    return torch.stack(
        [sum(next(per_token) for _ in ids) for _, candidates in groups for ids in candidates]
    )


@pytest.mark.parametrize("family", ALL)
def test_scorer_gives_each_familys_own_log_probs(family: str) -> None:
    policy, reference = tiny(ALL[family](), 0, 2.0), tiny(ALL[family](), 1, 2.0)
    assert policy.config.model_type in EXPORTABLE
    # One token, several groups, a prompt and a candidate past the sliding window of 12.
    for groups in (
        groups_of(1, [1], 1, 1),
        groups_of(2, [5, 3, 19], 3, 6),
        groups_of(3, [40], 4, 30),
    ):
        reward, policy_logps, reference_logps = run(RewardScorer(policy, reference, 0.3), groups)
        expected, other = sums(policy, groups), sums(reference, groups)
        torch.testing.assert_close(policy_logps.double(), expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(reference_logps.double(), other, atol=2e-4, rtol=0)
        torch.testing.assert_close(reward.double(), 0.3 * (expected - other), atol=1e-4, rtol=0)


def test_scorer_agrees_with_what_training_computes() -> None:
    policy, reference = tiny(FAMILIES["llama"](), 0, 2.0), tiny(FAMILIES["llama"](), 1, 2.0)
    groups = groups_of(4, [9, 2], 3, 8)
    batch = batch_of(groups, "shared")
    with torch.no_grad():
        trained = batch.targets.sums(score(policy, batch))
    _, policy_logps, _ = run(RewardScorer(policy, reference, 0.1), groups)
    torch.testing.assert_close(policy_logps, trained.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_padding_and_batch_do_not_change_a_reward(family: str) -> None:
    scorer = RewardScorer(tiny(FAMILIES[family](), 0, 2.0), tiny(FAMILIES[family](), 1, 2.0), 1.0)
    groups = groups_of(5, [4, 21], 2, 9)
    together = run(scorer, groups)[0]
    alone = [run(scorer, [(p, [c])], chunk=3)[0] for p, cs in groups for c in cs]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_padding_never_counts_past_a_learned_position_table() -> None:
    # GPT-2 has 512 positions: after a prompt of 510 tokens, a padded row of 30 exceeds them.
    policy, reference = tiny(FAMILIES["gpt2"](), 0, 2.0), tiny(FAMILIES["gpt2"](), 1, 2.0)
    long, short = groups_of(6, [510, 3], 1, 1)
    groups = [long, (short[0], [list(range(3, 33))])]
    policy_logps = run(RewardScorer(policy, reference, 0.1), groups)[1]
    torch.testing.assert_close(policy_logps.double(), sums(policy, groups), atol=5e-4, rtol=0)


def adapted(seed: int = 3, **settings: Any) -> peft.PeftModel:
    """A tiny Llama with an adapter that has an effect."""
    base = tiny(FAMILIES["llama"](), 0, 2.0)
    chosen = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    with quietly():
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return model.eval()


def own_sums(model: peft.PeftModel, groups: Sequence[Group]) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for prompt, candidates in groups:
            for candidate in candidates:
                logits = model(torch.tensor([prompt + candidate])).logits[0, len(prompt) - 1 : -1]
                logps = torch.log_softmax(logits.double(), -1)
                found.append(logps.gather(-1, torch.tensor(candidate)[:, None]).sum())
    return torch.stack(found)


def test_plain_adapter_shares_its_base() -> None:
    policy, reference = adapted(), tiny(FAMILIES["llama"](), 0, 2.0)
    groups = groups_of(7, [6, 3], 2, 7)
    expected, other = own_sums(policy, groups), sums(reference, groups)
    pair = join(policy, reference)
    assert pair.kind == "adapter"
    _, policy_logps, reference_logps = run(RewardScorer(pair.policy, None, 0.1), groups)
    assert (expected - other).abs().min() > 0.01  # the adapter has an effect
    torch.testing.assert_close(policy_logps.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference_logps.double(), other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_other_adapters_are_merged_and_exact(settings: dict[str, Any]) -> None:
    policy, reference = adapted(**settings), tiny(FAMILIES["llama"](), 0, 2.0)
    groups = groups_of(8, [6], 3, 7)
    expected = own_sums(policy, groups)
    pair = join(policy, reference)
    assert pair.kind == "two_models"
    _, policy_logps, reference_logps = run(RewardScorer(pair.policy, pair.reference, 0.1), groups)
    torch.testing.assert_close(policy_logps.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference_logps.double(), sums(reference, groups), atol=1e-4, rtol=0)


def test_merging_an_adapted_head_keeps_tied_embeddings() -> None:
    # peft would merge into the weight shared by head and embeddings, which changes the inputs.
    config = LlamaConfig(**GROUPED, tie_word_embeddings=True)
    model = tiny(config, 0, 2.0)
    with quietly(), pytest.warns(UserWarning, match="tie_word_embeddings"):
        policy = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data = 0.3 * torch.randn(parameter.shape)
    groups = groups_of(9, [5], 3, 6)
    expected = own_sums(policy.eval(), groups)
    pair = join(policy, tiny(config, 0, 2.0))
    assert pair.reference is not None
    policy_logps = run(RewardScorer(pair.policy, pair.reference, 0.1), groups)[1]
    torch.testing.assert_close(policy_logps.double(), expected, atol=1e-4, rtol=0)


def test_two_adapters_on_one_base_are_merged() -> None:
    policy, reference = adapted(seed=3), adapted(seed=4)  # DPO on top of SFT, both with LoRA
    groups = groups_of(10, [6], 3, 7)
    expected, other = own_sums(policy, groups), own_sums(reference, groups)
    pair = join(policy, reference)
    assert pair.kind == "two_models"
    _, policy_logps, reference_logps = run(RewardScorer(pair.policy, pair.reference, 0.1), groups)
    torch.testing.assert_close(policy_logps.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference_logps.double(), other, atol=1e-4, rtol=0)


def test_models_that_differ_only_in_weights_are_traced_once() -> None:
    def half(seed: int, **settings: Any) -> HalfScorer:
        return HalfScorer(tiny(LlamaConfig(**{**GROUPED, **settings}), seed, 2.0))

    assert same_architecture(half(0), half(1))
    assert not same_architecture(half(0), half(0, rms_norm_eps=1e-3))
    assert not same_architecture(half(0), half(0, num_hidden_layers=1))
    policy = adapted()
    assert not same_architecture(HalfScorer(policy), HalfScorer(policy, adapter_off=True))


def test_adapter_on_another_base_is_merged() -> None:
    assert join(adapted(), tiny(FAMILIES["llama"](), 1, 2.0)).kind == "two_models"


@pytest.mark.parametrize(
    ("config", "length", "reason"),
    [
        (mamba_config(), 16, "cannot be exported: .*state"),
        (
            Qwen2Config(**NO_HEAD_DIM, layer_types=["conv", "full_attention"]),
            16,
            "across tokens .conv",
        ),
        (FAMILIES["gpt2"](), 513, "512 positions"),
        (longrope(), 65, "LongRoPE"),
        (
            LlamaConfig(
                **GROUPED,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            ),
            513,
            "512 positions",
        ),
        (PreTrainedConfig(**SIZES), 16, "no test compares"),
    ],
    ids=["state", "layers", "positions", "longrope", "dynamic", "unknown"],
)
def test_models_without_an_exact_graph_are_refused(
    config: PreTrainedConfig, length: int, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_exportable(config, length)


def test_longrope_is_exported_where_its_factors_are_constant() -> None:
    check_exportable(longrope(), 64)


def operators_of(scorer: RewardScorer | ScoreScorer, opset: int) -> set[str]:
    """The operators of a scorer's graph, which a reranker would load."""
    model = trace(scorer, opset)
    content: bytes = onnx_ir.to_proto(model).SerializeToString()
    return set(read_graph(content, None).operators)


MORE_OPERATORS: list[Callable[[], PreTrainedConfig]] = [
    partial(small_config, kind)
    for kind in (
        "mixtral",
        "lfm2",
        "deepseek_v3",
        "phimoe",
        "opt",
        "gpt_neo",
        "mamba2",
    )
]
"""Families with experts, convolutions and other code of their own."""


@pytest.mark.long
def test_bundles_may_contain_exactly_the_operators_that_exports_write() -> None:
    found = set()
    for opset in OPSETS:
        for config in (*ALL.values(), *MORE_OPERATORS):
            found |= operators_of(RewardScorer(tiny(config()), tiny(config(), 1), 0.3), opset)
        found |= operators_of(RewardScorer(adapted(), None, 0.3), opset)
        scored = ALL["llama"]()
        scored.num_labels, scored.pad_token_id = 1, 0
        model = AutoModelForSequenceClassification.from_config(scored)
        found |= operators_of(ScoreScorer(model.eval()), opset)
    assert found == OPERATORS[""]
