"""Settings of the commands: one frozen dataclass per command, one field per flag."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from logratio.config_file import YamlSettings
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Inputs
from logratio.data.tokenization.groups import TokenizationRules
from logratio.errors import ConfigError
from logratio.hub import local_folder
from logratio.synonyms import takes_known_names
from logratio.training.trackers import ReportTo
from logratio.validation import Converted, Range, changes, check_fields


def as_loss(given: Any) -> Any:
    """Join a list of methods to one string, as in "dpo:1.0+sft:0.2"."""
    parts = [given] if isinstance(given, str) else given
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(
            f"--loss is a method, such as dpo or dpo:1.0+sft:0.2, a list of methods, or a "
            f"loss of your own as module:function, not {given!r:.60}"
        )
    return "+".join(parts)


Precision = Literal["fp32", "bf16", "bf16-weights"]
OptimizerName = Literal["adamw", "adamw8bit", "adamw-host"]
ActivationCheckpointing = Literal["auto", "off", "all"]
Compile = Literal["off", "on", "auto"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
DecayType = Literal["linear", "cosine", "1-sqrt"]
Quantization = Literal["8bit", "4bit"]
LoraInit = Literal["default", "gaussian", "orthogonal"]
StartAdapter = Literal["merge", "continue"]
Engine = Literal["local", "ray"]
ReadMode = Literal["map", "pread"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]
PathLike = str | Path
Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
Above0 = Annotated[float, Range(0, without_low=True)]
AtLeast0 = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, without_high=True)]
Seed = Annotated[int, Range(0, 2**63 - 1)]


CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Values of peft's `init_lora_weights` that change the base's weights."""
_CHANGES_BASE = (
    "it changes the base's weights, so the base with adapters off is no reference, and the trained "
    "adapter would fit only that changed base, which is not saved with it"
)
REFUSED_INITS: Mapping[Any, str] = {
    **dict.fromkeys(CHANGING_INITS, _CHANGES_BASE),
    "eva": "it computes the adapters from activations on data",
    "mica": "it freezes half of each adapter, which checkpoints would not contain",
    False: "the policy would not start as the reference",
}
"""Values of peft's `init_lora_weights` that are not supported, and why."""


ALL_LINEAR = "all-linear"


@takes_known_names(
    r="rank",
    lora_r="rank",
    lora_alpha="alpha",
    target_modules="targets",
    lora_dropout="dropout",
    init_lora_weights="init",
)
@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on every linear layer of the body (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: Rank of the adapter matrices.
        alpha: The adapter's output is scaled by alpha / rank.
        targets: Names of the modules to adapt; if empty, or peft's "all-linear", all linear layers
            except the head.
        dropout: Probability that an input of an adapter is set to 0 in a training pass. The
            reference, the start-up checks and every evaluation run without dropout. Masks are
            drawn per micro-batch, so `token_budget` then changes the result.
        use_rslora: Scale by alpha / √rank instead (rank-stabilized LoRA, arXiv 2312.03732).
        use_dora: Train the norm of each row of a weight apart from its direction (DoRA, arXiv
            2402.09353).
        modules_to_save: Names of further layers that are trained whole and saved with the adapter,
            for example "lm_head", "embed_tokens" or "norm". As in peft, a name matches every
            module whose path ends with it.
        init: How new adapters start: "default", Kaiming-uniform A and zero B; "gaussian", normal A
            and zero B; or "orthogonal", both not zero, with product zero. peft's True means
            "default". The policy always starts as its base.

    Raises:
        ConfigError: A value of `init` is not supported; the message has the reason.
    """

    rank: Count = 16
    alpha: Above0 = 32.0
    targets: tuple[str, ...] = ()
    dropout: ShareBelow1 = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    init: LoraInit | bool = "default"

    __repr__ = changes

    def __post_init__(self) -> None:
        given = self.init.partition("_niter")[0] if isinstance(self.init, str) else self.init
        if isinstance(given, Hashable) and given in REFUSED_INITS:
            raise ConfigError(
                f"init {self.init!r} is not supported: {REFUSED_INITS[given]}; choose default, "
                "gaussian or orthogonal"
            )
        if self.targets in (ALL_LINEAR, (ALL_LINEAR,), [ALL_LINEAR]):
            object.__setattr__(self, "targets", ())
        check_fields(self)
        if self.init is True:
            object.__setattr__(self, "init", "default")


@takes_known_names(train_dataset="data", ref_model="reference", eval_dataset="eval_data")
@dataclass(frozen=True)
class TrainConfig(YamlSettings):
    """Settings of one training run.

    Attributes:
        model: Folder of the model to start from (safetensors, tokenizer.json), or an id of the
            Hugging Face hub, as "organisation/name" or "organisation/name@revision".
        revision: Branch, tag or commit of `model` on the hub; None: "main".
        data: Preference data: files, folders, "-" for standard input, tables, or one sealed store
            created by `logratio data build`.
        mix: Sampling weight of each entry of `data`. An epoch still has as many groups as the
            data, drawn from each input in proportion to its weight. None: every group once.
        output: Folder for the trained model, metrics and checkpoints.
        cache: Root folder of a reference cache filled by `precompute`. With a cache, no reference
            model is kept in memory.
        precompute: Score completions that the cache lacks before training, in this process.
        read_mode: How sealed shards of the cache are read. "map" (mmap) is the fastest. "pread" is
            for network file systems: a truncated shard then raises an error instead of crashing.
        reference: Folder or id of the reference model; None: `model`.
        sync_reference: Let the reference follow the policy (TR-DPO, arXiv 2404.09656): every
            `reference_sync_steps` updates it becomes the mixture of the policy, with the weight
            `reference_mixup_alpha`, and itself. 1 replaces it; a small weight after every update is
            a moving average. Needs a second model in memory, and all weights trained.
        reference_mixup_alpha: Weight of the policy in the new reference.
        reference_sync_steps: Updates between two changes of the reference.
        study_flipped_labels: For study: share of the groups, chosen by `seed`, whose labels are
            exchanged in training, but not in evaluations.
        study_uniform_reference: For study: a reference that gives every token the same probability.
        loss: A method of `logratio methods`; the import path of a loss, "module:function"; or
            several with weights, whose losses are added: "dpo:1.0+sft:0.2", or a list of such.
        beta: Weight of the KL term; None: the default of the method.
        label_smoothing: Assumed share of pairs whose labels are flipped; None: the method's
            default, which is 0 for most.
        gamma: Target margin of simpo and alpha-po; None: 1.
        loss_options: Other numbers of the method, by name: see `logratio methods`.
        router_aux_loss_coef: Weight of the router's load-balancing loss of a mixture of experts,
            which is added to the loss of each update: see `router_loss`. 0: none. None: that of the
            model's config if the config sets `output_router_logits`, else 0.
        lr: Peak learning rate.
        warmup: Updates with a rising learning rate: below 1 a share of all, else their number;
            `lr_scheduler` decays it after.
        lr_scheduler: Decay of the learning rate: "cosine"; "linear"; "constant", none; or "wsd",
            constant, then falling over the last `decay` of the updates (arXiv 2404.06395).
        min_lr_rate: The learning rate at the end, as a share of `lr`.
        decay: Updates in which "wsd" falls: below 1 a share of those after the warmup, else their
            number.
        decay_type: How "wsd" falls: "linear", "cosine" or "1-sqrt", as in transformers.
        weight_decay: Decoupled weight decay (AdamW) of matrices; norms and biases have none.
        adam_beta1: Decay rate of the first moments.
        adam_beta2: Decay rate of the second moments.
        adam_epsilon: Added to the root of the second moments.
        max_grad_norm: Gradients are clipped to this norm.
        batch_size: Groups (pairs, demonstrations) per update, regardless of micro-batches.
        epochs: Passes over the data.
        max_steps: Number of updates, in place of `epochs`: data is repeated or cut.
        token_budget: Tokens per micro-batch. A lower value saves memory and leaves the result
            unchanged. None: 2,048 on a CPU, 8,192 on a GPU.
        activation_checkpointing: Decoder layers that keep only their input and are recomputed in
            the backward pass: "auto", as many as do not fit in memory; "off", none; "all". Leaves
            the result unchanged.
        offload_activations: Keep activations in host memory until the backward pass. Costs two
            transfers per micro-batch, which the GPU waits for. Leaves the result unchanged.
        share_beginnings: Compute a beginning that several groups of an update share only once, for
            example a system prompt or earlier turns of a conversation. Changes results only by
            rounding; `logratio data report` estimates the savings.
        compile_layers: "on" compiles the decoder layers (torch.compile) for any width; this takes
            up to a minute at the start and changes results by rounding. "auto" times the first
            micro-batches both ways, and compiles if that is faster and the run is long enough.
            True and False mean "on" and "off".
        precision: "fp32"; "bf16", autocast over fp32 weights; or "bf16-weights", weights and
            activations in bf16. In all three, adapters keep fp32 weights, and log-probs and
            gradients are accumulated in fp32. None: bf16 on a GPU, fp32 on a CPU; see
            `precision_of`.
        optimizer: "adamw"; "adamw8bit", with moments in 8 bits; or "adamw-host", with state in
            host memory. For bf16 weights the optimizer keeps an exact fp32 copy: see `optimizers`.
        seed: Seed of the data order, of new adapters and of their dropout. The model's own dropout
            is off.
        deterministic: On a GPU, use kernels that add in a fixed order, so that the same settings
            give the same bits on the same GPU and library versions. Runs on a CPU always do.
        save_every: Updates between checkpoints; 0: a checkpoint only when interrupted.
        keep_checkpoints: Number of checkpoints to keep during the run, the newest. A finished run
            removes them.
        eval_data: Held-out data, in the same forms as `data`; None: see `eval_share`.
        eval_share: Share of `data` to hold out, chosen by prompt, so that no prompt is both trained
            on and evaluated.
        eval_every: Updates between evaluations; None: one at the end of each epoch. The last update
            is always followed by one.
        eval_samples: Completions sampled from the policy at each evaluation, to estimate its KL
            divergence from the reference and to write `samples.jsonl`.
        max_new_tokens: Maximum length of a sampled completion.
        best_metric: Save the model of the evaluation that was best in this metric, for example
            "rewards/accuracies" or "loss", instead of the last one.
        early_stop: Stop after this many evaluations in a row that were not better than the best in
            `best_metric`.
        report_to: Where metrics go in addition to the output folder's files: "tensorboard",
            "wandb", "mlflow", "trackio", or several; "none"; or "all" that are installed. None:
            "tensorboard".
        run_name: Name of the run in trackers; None: the name of the output folder.
        project: Project (wandb, trackio) or experiment (mlflow) of the run; None: the tracker's
            own setting, else "logratio".
        report: Write `report.html`, in another process, during the run and at its end.
        resume: Continue from the newest valid checkpoint in `output`.
        overwrite: Replace a finished or unfinished run in `output`. If False, a finished run with
            the same settings is returned without training, and any other run is an error. The
            earlier model is kept until the new one is saved.
        parallel: How several processes (torchrun) hold the model: "ddp", each a whole one; "fsdp",
            each a shard of every weight (FSDP2); "hsdp", sharded within each host and replicated
            across hosts; "auto", "ddp" if weights, gradients and optimizer state fit. Leaves the
            result unchanged but for rounding.
        context_parallel_size: Number of processes that compute each micro-batch together, each
            with a part of every prompt, for prompts that do not fit on one GPU. It divides the
            number of processes. Leaves the result unchanged but for rounding.
        async_save: Write the checkpoints of a sharded model while the run goes on, from a copy in
            host memory. None: on GPUs.
        stall_timeout: End the process, with the stacks of its threads, if it has finished no
            micro-batch for this many seconds, in an update or in the precompute pass; a batch of an
            evaluation, or a save, may take ten times as long. 0: never. None: 1,800 on a GPU,
            never on a CPU.
        device: Device to train on; None: a GPU if available, else the CPU.
        lora: Train these adapters instead of all weights.
        adapter: How to start if `model` is the folder of an adapter: "merge" it into its base and
            train all weights; or "continue", train the adapter further. The reference is then the
            policy at its start, kept as a second, frozen adapter.
        quantization: Load the base of the trained adapters, and the reference, in 8 or 4 bits
            (QLoRA, arXiv 2305.14314; bitsandbytes). Needs `lora`, or `adapter="continue"`.
        rules: How records are tokenized.
        formats: How rows are read as records; detected by default.
        max_bad_fraction: Share of malformed rows above which the run is refused.
    """

    model: PathLike
    data: Inputs
    output: PathLike
    cache: PathLike | None = None
    precompute: bool = False
    read_mode: ReadMode = "map"
    reference: PathLike | None = None
    sync_reference: bool = False
    reference_mixup_alpha: Annotated[float, Range(0, 1, without_low=True)] = 0.6
    reference_sync_steps: Count = 512
    study_flipped_labels: ShareBelow1 = 0.0
    study_uniform_reference: bool = False
    loss: Annotated[str, Converted(as_loss)] = "dpo"
    beta: Above0 | None = None
    label_smoothing: Annotated[float, Range(0, 0.5, without_high=True)] | None = None
    gamma: AtLeast0 | None = None
    loss_options: Mapping[str, float] = field(default_factory=dict)
    router_aux_loss_coef: AtLeast0 | None = None
    lr: Above0 = 1e-6
    warmup: AtLeast0 = 0.1
    lr_scheduler: Schedule = "cosine"
    min_lr_rate: Share = 0.0
    decay: Above0 = 0.2
    decay_type: DecayType = "linear"
    weight_decay: AtLeast0 = 0.0
    adam_beta1: ShareBelow1 = 0.9
    adam_beta2: ShareBelow1 = 0.999
    adam_epsilon: Share = 1e-8
    max_grad_norm: Above0 = 1.0
    batch_size: Count = 32
    epochs: Count = 1
    max_steps: Count | None = None
    mix: tuple[Above0, ...] | None = None
    token_budget: Count | None = None
    activation_checkpointing: ActivationCheckpointing = "auto"
    offload_activations: bool = False
    share_beginnings: bool = False
    compile_layers: Compile | bool = "off"
    precision: Precision | None = None
    optimizer: OptimizerName = "adamw"
    seed: Seed = 0
    deterministic: bool = False
    save_every: CountOrNone = 200
    keep_checkpoints: Count = 2
    eval_data: Inputs | None = None
    eval_share: ShareBelow1 = 0.0
    eval_every: Count | None = None
    eval_samples: CountOrNone = 0
    max_new_tokens: Count = 128
    best_metric: str | None = None
    early_stop: Count | None = None
    report_to: ReportTo = None
    run_name: str | None = None
    project: str | None = None
    report: bool = True
    resume: bool = False
    overwrite: bool = False
    parallel: Parallel = "auto"
    context_parallel_size: Count = 1
    async_save: bool | None = None
    stall_timeout: AtLeast0 | None = None
    device: str | None = None
    lora: LoraSettings | None = None
    adapter: StartAdapter = "merge"
    quantization: Quantization | None = None
    rules: TokenizationRules = field(default_factory=TokenizationRules)
    formats: FormatSettings = field(default_factory=FormatSettings)
    max_bad_fraction: Share = 0.0
    revision: str | None = None

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.compile_layers, bool):
            object.__setattr__(self, "compile_layers", "on" if self.compile_layers else "off")

    @property
    def trains_adapter(self) -> bool:
        """Whether the run trains an adapter over a frozen base, new or continued."""
        return self.lora is not None or self.adapter == "continue"


UNRECORDED: Mapping[str, Any] = {
    name: getattr(TrainConfig, name)
    for name in (
        *("lr_scheduler", "min_lr_rate", "decay", "decay_type", "weight_decay"),
        "max_steps",
        *("adam_beta1", "adam_beta2", "adam_epsilon"),
        *("eval_data", "eval_share", "eval_every", "eval_samples", "max_new_tokens"),
        *("best_metric", "early_stop"),
        *("adapter", "quantization"),
        *("study_flipped_labels", "study_uniform_reference"),
        *("sync_reference", "reference_mixup_alpha", "reference_sync_steps"),
    )
} | {"router_aux_loss_coef": 0.0}
"""Settings that runs of the first version did not record, with the values that they ran with."""


@takes_known_names(train_dataset="data", eval_dataset="eval_data")
@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """`TrainConfig` with `loss="sft"`: training on demonstrations, without a reference.

    Example:
        >>> train(SFTConfig("base-model", "demonstrations.jsonl", "sft-model", lr=1e-5))
    """

    loss: str = "sft"

    __repr__ = changes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "sft":
            raise ConfigError(f"SFTConfig has the loss sft: use TrainConfig for {self.loss}")
        if self.beta is not None:
            raise ConfigError("SFTConfig has no beta: sft has no reference to stay close to")


@takes_known_names()
@dataclass(frozen=True)
class PrecomputeConfig(YamlSettings):
    """Settings of one pass of the reference over data: see `TrainConfig` for the other fields.

    Attributes:
        model: Folder of the reference model or adapter, or an id of the Hugging Face hub.
        revision: As in `TrainConfig`.
        data: As in `TrainConfig`; any mixture of inputs.
        cache: Root folder of the cache, with one subfolder per reference.
        token_budget: Tokens computed at a time; None: the largest number that fits and is useful.
        share_beginnings: As in `TrainConfig`, over all groups of this process.
        sums_only: Store one sum per completion, over its counted tokens, instead of every token.
        mismatched: Score the answers to other prompts that `loss="kto"` adds to the data, too.
        share: Part of the groups to score, for example "2/4" for the second of four parts, split
            by content hash. None: all groups, or this process's part under torchrun.
        engine: "local", this process; or "ray", actors on a Ray cluster.
        workers: Number of Ray actors; None: as many as fit.
        stall_timeout: As in `TrainConfig`; loading the model and sealing the cache may take ten
            times as long. Not with Ray.
        precision: As in `TrainConfig`. With Ray, the default is that of the driver's machine.
        quantization: Load the weights in 8 or 4 bits (bitsandbytes).
    """

    model: PathLike
    data: Inputs
    cache: PathLike
    token_budget: Count | None = None
    share_beginnings: bool = False
    sums_only: bool = False
    mismatched: bool = False
    share: str | None = None
    engine: Engine = "local"
    workers: Count | None = None
    precision: Precision | None = None
    quantization: Quantization | None = None
    read_mode: ReadMode = "map"
    stall_timeout: AtLeast0 | None = None
    device: str | None = None
    rules: TokenizationRules = field(default_factory=TokenizationRules)
    formats: FormatSettings = field(default_factory=FormatSettings)
    max_bad_fraction: Share = 0.0
    revision: str | None = None

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)


@takes_known_names()
@dataclass(frozen=True)
class EvaluateConfig(YamlSettings):
    """Settings of one evaluation.

    Attributes:
        policy: Folder of the trained model or adapter, or an id of the Hugging Face hub, as
            "organisation/name" or "organisation/name@revision".
        reference: Folder or id of the reference model; None if the policy is a reward model.
        data: Held-out preference files.
        beta: Reward per nat of log-ratio; None: the β that the policy was trained with.
        samples: Completions sampled from the policy to estimate its KL divergence from the
            reference; 0: no estimate.
        samples_file: File for the prompts and the samples of policy and reference, as JSON lines.
        max_new_tokens: Maximum length of a sampled completion.
        seed: Seed of the sampling.
        token_budget, precision, device, rules, formats, max_bad_fraction: As in `TrainConfig`.
        share_beginnings: As in `TrainConfig`, over all pairs of this process.
    """

    policy: PathLike
    reference: PathLike | None
    data: Inputs
    beta: Above0 | None = None
    samples: CountOrNone = 0
    samples_file: PathLike | None = None
    max_new_tokens: Count = 128
    seed: Seed = 0
    token_budget: Count = 16384
    share_beginnings: bool = False
    precision: Precision | None = None
    device: str | None = None
    rules: TokenizationRules = field(default_factory=TokenizationRules)
    formats: FormatSettings = field(default_factory=FormatSettings)
    max_bad_fraction: Share = 0.0

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def models(self) -> tuple[PathLike, ...]:
        """The models that score the pairs: the policy and, if there is one, the reference."""
        return (self.policy,) if self.reference is None else (self.policy, self.reference)


@takes_known_names(train_dataset="data", ref_model="reference", eval_dataset="eval_data")
@dataclass(frozen=True)
class SweepConfig(YamlSettings):
    """Settings of a sweep: one run for each combination of loss, β, learning rate and seed.

    Attributes:
        base: Settings that all runs share. Its `output` is the folder of the sweep, with one
            subfolder per run, and its `cache` is filled before the first run (default: a folder in
            `output`). Runs are always resumed; `overwrite` trains them all again.
        eval_data: Held-out preference files; every run is evaluated on them.
        loss: The losses to combine; each list may be empty: then it has the one value of `base`.
        beta: Weights of the KL term.
        lr: Peak learning rates.
        seed: Seeds of the data order and of new adapters.
        samples: Completions sampled from each policy to estimate its KL divergence from the
            reference; 0: no estimate.
        max_new_tokens: Maximum length of a sampled completion.
        kl_budget: The best run is chosen among those with at most this KL divergence, in nats per
            completion. None: among all.
        engine: "local", one run after the other in this process; or "ray", several at a time on a
            Ray cluster, each with one GPU, or one CPU if there are no GPUs.
        workers: Number of runs at a time on Ray; None: as many as fit.
    """

    base: TrainConfig
    eval_data: Inputs
    loss: tuple[str, ...] = ()
    beta: tuple[Above0, ...] = ()
    lr: tuple[Above0, ...] = ()
    seed: tuple[Seed, ...] = ()
    samples: CountOrNone = 100
    max_new_tokens: Count = 128
    kl_budget: Above0 | None = None
    engine: Engine = "local"
    workers: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)


Config = TypeVar("Config", TrainConfig, PrecomputeConfig, EvaluateConfig)


def with_local_models(config: Config) -> Config:
    """Return a command's settings with folders in place of ids of the Hugging Face hub.

    A model that is not in the cache is downloaded: see `local_folder`.

    Raises:
        HubError: A model is not available.
        ConfigError: A revision is given for a folder.
    """
    given = {name: getattr(config, name, None) for name in ("model", "reference", "policy")}
    revision = getattr(config, "revision", None)
    found: dict[str, Any] = {
        name: local_folder(model, revision if name == "model" else None)
        for name, model in given.items()
        if model is not None
    }
    return replace(config, **found | ({"revision": None} if revision else {}))
