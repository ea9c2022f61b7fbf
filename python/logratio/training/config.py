"""What each command is told: one frozen dataclass per command, one field per flag."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Inputs
from logratio.data.tokenization.groups import TokenizationRules
from logratio.synonyms import takes_known_names
from logratio.validation import check_fields

Precision = Literal["fp32", "bf16", "bf16-weights"]
OptimizerName = Literal["adamw", "adamw8bit", "adamw-host"]
ActivationCheckpointing = Literal["auto", "off", "all"]
Compile = Literal["off", "on", "auto"]
Quantization = Literal["8bit", "4bit"]
Engine = Literal["local", "ray"]
ReadMode = Literal["map", "pread"]
PathLike = str | Path


@takes_known_names(r="rank", lora_alpha="alpha", target_modules="targets")
@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on every linear layer of the body (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: columns of the adapter matrices.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: names of the modules to adapt; all linear layers but the head where empty.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@takes_known_names(train_dataset="data", ref_model="reference")
@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        model: folder of the model to start from (safetensors, tokenizer.json).
        data: preference data: files, folders, "-" for standard input, tables, or one sealed store
            that `logratio data build` made.
        mix: the weight of each of `data`: an epoch then has as many groups as the data, and each
            input its share of them; None: every group once.
        output: folder for the trained model, metrics and checkpoints.
        cache: root of a reference cache made by `precompute`; then no reference model is held.
        precompute: score what the cache lacks first, in this process, and then train.
        read_mode: how sealed shards of the cache are read: "map" is the fastest; "pread" is for
            network file systems, where a shard that somebody cuts is then an error, not a crash.
        reference: folder of the reference model; `model` itself where none is given.
        loss: one of `losses.LOSSES`.
        beta: weight of the KL term; the loss's own default where None.
        label_smoothing: share of pairs thought flipped (dpo and simpo).
        gamma: the margin that simpo asks for.
        lr: peak learning rate.
        warmup: share of the updates in which the rate rises; it then falls along a cosine to 0.
        max_grad_norm: gradients are scaled down to this norm.
        batch_size: groups (pairs, demonstrations) per update, whatever the micro-batches.
        epochs: passes over the data.
        token_budget: tokens in a micro-batch; a lower one saves memory and changes no result.
            None: 2,048 on a CPU, 8,192 on a GPU.
        activation_checkpointing: which decoder layers keep their input only and are computed twice:
            "auto", the share of them that would not fit; "off", none; "all". Changes no result.
        offload_activations: keep activations in host memory until the backward pass: two copies
            over the bus a micro-batch, which the GPU waits for. Changes no result.
        share_beginnings: compute what groups of an update begin with alike once, not once a group:
            for system prompts, and conversations with several rated turns. Changes no result beyond
            rounding; `logratio data report` says what it saves.
        compile_layers: "on" compiles the decoder layers (torch.compile), for any width: up to a
            minute at the start; results move by rounding. "auto" times the first micro-batches both
            ways, and compiles where that is faster and the run is long enough. True and False are
            "on" and "off".
        precision: "fp32"; "bf16", autocast over fp32 weights; or "bf16-weights": weights and
            activations in bf16. Adapters keep fp32 weights, and log-probs and gradients are added
            up in fp32, in all three. None: bf16 on a GPU, fp32 on a CPU; see `precision_of`.
        optimizer: "adamw"; "adamw8bit", its moments in 8 bits; or "adamw-host", its state in host
            memory. bf16 weights have an exact fp32 copy in the optimizer: see `optimizers`.
        seed: of the order of the data and the adapters; dropout is off.
        deterministic: on a GPU, use kernels that add in a fixed order, so that the same settings
            give the same bits on the same GPU and versions. Runs on a CPU do so in any case.
        save_every: updates between checkpoints; 0 for none but the one at an interrupt.
        resume: go on from the newest valid checkpoint in `output`.
        overwrite: replace a run in `output`, finished or not, by this one. Without it, a finished
            run with the same settings is returned as it is, and any other is an error. The earlier
            model stays until the new one is saved.
        device: where to train; a GPU when there is one, where None.
        lora: adapters to train instead of all weights.
        rules: how records become token ids.
        formats: how rows become records; detected where nothing is said.
        max_bad_fraction: share of the rows that may be malformed before the run is refused.
    """

    model: PathLike
    data: Inputs
    output: PathLike
    cache: PathLike | None = None
    precompute: bool = False
    read_mode: ReadMode = "map"
    reference: PathLike | None = None
    loss: str = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float = 1.0
    lr: float = 1e-6
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    batch_size: int = 32
    epochs: int = 1
    mix: tuple[float, ...] | None = None
    token_budget: int | None = None
    activation_checkpointing: ActivationCheckpointing = "auto"
    offload_activations: bool = False
    share_beginnings: bool = False
    compile_layers: Compile | bool = "off"
    precision: Precision | None = None
    optimizer: OptimizerName = "adamw"
    seed: int = 0
    deterministic: bool = False
    save_every: int = 200
    resume: bool = False
    overwrite: bool = False
    device: str | None = None
    lora: LoraSettings | None = None
    rules: TokenizationRules = field(default_factory=TokenizationRules)
    formats: FormatSettings = field(default_factory=FormatSettings)
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.compile_layers, bool):
            object.__setattr__(self, "compile_layers", "on" if self.compile_layers else "off")


@takes_known_names(train_dataset="data")
@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """`TrainConfig` with `loss="sft"`: learn from demonstrations, without a reference.

    Example:
        >>> train(SFTConfig("base-model", "demonstrations.jsonl", "sft-model", lr=1e-5))
    """

    loss: str = "sft"


@takes_known_names()
@dataclass(frozen=True)
class PrecomputeConfig:
    """Settings of one pass of the reference over data: see `TrainConfig` for the other fields.

    Attributes:
        model: folder of the reference model or adapter.
        data: as in `TrainConfig`; any mixture of inputs.
        cache: root of the cache; every reference has a folder of its own in it.
        token_budget: tokens computed at a time; the largest that fits and pays where None.
        share_beginnings: as in `TrainConfig`, over all groups of this process.
        sums_only: store one sum a completion, over the tokens that count, instead of all tokens.
        share: "2/4": score the second quarter of the groups, by content; all of them, or what
            torchrun gives this process, where None.
        engine: "local", this process; or "ray", actors on a Ray cluster.
        workers: actors of Ray; as many as fit where None.
        precision: as in `TrainConfig`; the default on Ray is that of the machine that starts it.
        quantization: load the weights in 8 or 4 bits (bitsandbytes).
    """

    model: PathLike
    data: Inputs
    cache: PathLike
    token_budget: int | None = None
    share_beginnings: bool = False
    sums_only: bool = False
    share: str | None = None
    engine: Engine = "local"
    workers: int | None = None
    precision: Precision | None = None
    quantization: Quantization | None = None
    read_mode: ReadMode = "map"
    device: str | None = None
    rules: TokenizationRules = field(default_factory=TokenizationRules)
    formats: FormatSettings = field(default_factory=FormatSettings)
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@takes_known_names()
@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation.

    Attributes:
        policy: folder of the trained model or adapter.
        reference: folder of the reference model.
        data: held-out preference files.
        beta: reward per nat of log-ratio; that of the policy's training where None.
        samples: completions to draw from the policy for the KL to the reference; 0 for none.
        max_new_tokens: longest drawn completion.
        seed: of the drawing.
        token_budget, precision, device, rules, formats, max_bad_fraction: as in `TrainConfig`.
    """

    policy: PathLike
    reference: PathLike
    data: Inputs
    beta: float | None = None
    samples: int = 0
    max_new_tokens: int = 128
    seed: int = 0
    token_budget: int = 16384
    precision: Precision | None = None
    device: str | None = None
    rules: TokenizationRules = field(default_factory=TokenizationRules)
    formats: FormatSettings = field(default_factory=FormatSettings)
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
