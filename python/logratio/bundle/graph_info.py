"""What a bundle's graph computes: its kind, inputs, outputs, reward and precision."""

from dataclasses import dataclass

INPUTS = {
    "prompt_ids": 2,
    "prompt_mask": 2,
    "candidate_ids": 2,
    "candidate_mask": 2,
    "group": 1,
    "token_index": 2,
    "token_row": 2,
}
"""Names and ranks of the graph's inputs, all int64, as filled by `_rust.candidate_layout`."""
OUTPUTS = ("reward", "policy_logps", "reference_logps")
"""Names of the graph's outputs, all float32 `[N]`, one value per candidate."""
REWARD_MODEL = "reward_model"
"""The kind of a graph that is a reward model, whose only output is the reward."""
CACHED_REFERENCE = "cached_reference"
"""The kind of a graph of the policy alone, which takes the reference's log-probs as an input."""
REFERENCE_FREE = "reference_free"
"""The kind of a graph of the policy alone, whose reward has no reference."""
SHARED_BASE = "shared_base"
"""The kind of a bundle whose policy is an adapter, and whose graph is in the bundle of its base."""
REFERENCE_INPUT = "reference_logps"
"""The additional input of `CACHED_REFERENCE`: float32 `[N]`, in nats."""
_OUTPUTS_OF = {
    REWARD_MODEL: OUTPUTS[:1],
    CACHED_REFERENCE: OUTPUTS[:2],
    REFERENCE_FREE: OUTPUTS[:2],
}
TOKEN_LOGRATIOS, TOKEN_LOGPS = "token_logratios", "token_logps"
"""Names of the output per token, float32 `[K, chunk]`, in nats: policy minus reference where the
graph has both, else the policy's log-probs."""
SHARED_PROMPT, PADDED = "shared", "padded"
"""Layouts of a graph: each prompt computed once, or again for each of its candidates."""
CHUNK = 128
"""Completion tokens per chunk of the head, which bounds the number of logits in memory."""


@dataclass(frozen=True)
class GraphInfo:
    """Properties of the graph.

    Attributes:
        opset: The ONNX opset of the graph.
        kind: ``two_models``; ``adapter``, one base model with an adapter for the policy;
            ``cached_reference``, the policy, with the reference's log-probs as an input;
            ``reference_free``, the policy, whose reward has no reference; ``shared_base``, an
            adapter for the policy, with a base model in another bundle as the reference; or
            ``reward_model``, whose rewards are its scores.
        chunk: Completion tokens per chunk of the head.
        vocabulary_size: Vocabulary size of the models; token ids are below it.
        max_positions: Longest sequence that the models support; None if not recorded.
        length_normalized: Whether the reward of a ``reference_free`` graph is β times the mean
            log-prob per token, and not times the sum.
        per_token: Whether the graph has the output of `token_output`.
        takes_adapters: Whether the graph has inputs for the adapters of ``shared_base`` bundles.
        layout: ``shared``, a prompt is computed once for its candidates; or ``padded``, it is
            computed again for each. Inputs, outputs and rewards are the same.
    """

    opset: int
    kind: str
    chunk: int
    vocabulary_size: int
    max_positions: int | None = None
    length_normalized: bool = False
    per_token: bool = False
    takes_adapters: bool = False
    layout: str = SHARED_PROMPT

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs per candidate."""
        return _OUTPUTS_OF.get(self.kind, OUTPUTS)

    @property
    def token_output(self) -> str | None:
        """The name of the graph's output per token; None if it has none."""
        if not self.per_token:
            return None
        return TOKEN_LOGPS if self.kind in (CACHED_REFERENCE, REFERENCE_FREE) else TOKEN_LOGRATIOS

    @property
    def reward(self) -> str:
        """The formula of the reward."""
        if self.kind == REWARD_MODEL:
            return "score"
        if self.kind == REFERENCE_FREE:
            return "β·(log π) / tokens" if self.length_normalized else "β·log π"
        return "β·(log π − log π_ref)"


@dataclass(frozen=True)
class Agreement:
    """How close a graph's rewards are to torch's in float32, measured at export.

    Attributes:
        source: Where the candidates come from: ``sampled``, from the policy; or a file's name.
        groups: Number of prompts.
        candidates: Number of candidates.
        reward_error_mean, reward_error_max: Absolute difference of the rewards.
        pairwise: Share of the pairs of candidates of one prompt that are in the same order.
        top1: Share of the prompts whose best candidate is the same.
    """

    source: str
    groups: int
    candidates: int
    reward_error_mean: float
    reward_error_max: float
    pairwise: float
    top1: float


@dataclass(frozen=True)
class Precision:
    """The numbers that a graph stores and computes with.

    Attributes:
        dtype: ``float32``; ``float16``, in which the model also computes; or ``bfloat16``, in
            which weights are stored, while the model computes in float32.
        bits: Bits per weight of the matrices, 8 or 4; None: `dtype`.
        stored_share: Share of all weights that are stored in less than 32 bits.
        agreement: Comparison with float32; None for float32 itself.
        forced: Whether the export was forced although the comparison exceeded its bounds.
    """

    dtype: str = "float32"
    bits: int | None = None
    stored_share: float = 0.0
    agreement: Agreement | None = None
    forced: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the graph differs from torch only by rounding in float32."""
        return self.dtype == "float32" and self.bits is None

    @property
    def name(self) -> str:
        """A short name, such as "float16" or "8 bits"."""
        return self.dtype if self.bits is None else f"{self.bits} bits"


FLOAT32 = Precision()
"""The precision of a graph that differs from torch only by rounding."""
