"""Memory and time of a run on a cluster of GPUs, from the model's config and the tokenized data.

Nothing here was fitted to runs on GPUs: the figures of GPUs are those of their data sheets, times
the shares in `logratio.training.accelerators`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch

from logratio.errors import ConfigError
from logratio.logps.head import BYTES, TILE_ELEMENTS, elements_for
from logratio.training.accelerators import GPUS, Accelerator
from logratio.training.cluster_time import (
    Stepping,
    Topology,
    UpdateTime,
    Work,
    break_even_tokens,
    shards_of,
    update_time,
)
from logratio.training.config import Above0, Count, TrainConfig
from logratio.training.memory import PROCESS_BYTES, kept_bytes
from logratio.training.model_shape import FLOAT32, ModelShape, frozen_shape, policy_shape
from logratio.training.models import precision_of, training_budget, weights_dtype
from logratio.training.optimizers import gradient_bytes, state_bytes
from logratio.training.parallel.division import (
    SHARDED,
    Division,
    Mode,
    keeps_whole_gradients,
    reason_against,
    replica_bytes,
)
from logratio.training.rank_loads import Load, RankLoads, total
from logratio.training.validation import reference_kind
from logratio.validation import Range, check_fields

Fraction = Annotated[float, Range(0, 1, without_low=True)]
EXPOSED = 0.05
"""Share of an update from which exposed collectives are worth advice."""
CUDA = torch.device("cuda")
"""Named only: nothing is allocated on it."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for.

    Attributes:
        world_size: Number of GPUs.
        gpu: Name of the GPU in `GPUS`, or "cpu": the CPU of this machine, which is measured.
        gpus_per_host: GPUs that NVLink or PCIe connects.
        compute_share: Share of the GPU's peak that products reach; None: see `Shares`.
        link_share: Share of the bandwidth that collectives reach, within and between hosts; None:
            see `Shares`.
        network_gbps: Gb/s of the network per GPU in one direction; None: that of the GPU's
            reference design.
    """

    world_size: Count
    gpu: str = "h100"
    gpus_per_host: Count = 8
    compute_share: Fraction | None = None
    link_share: Fraction | None = None
    network_gbps: Above0 | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gpu not in GPUS and self.gpu != "cpu":
            raise ConfigError(f"gpu {self.gpu!r} is unknown; choose from {', '.join(GPUS)}, cpu")
        if self.world_size > self.gpus_per_host and self.world_size % self.gpus_per_host:
            raise ConfigError(
                f"world_size {self.world_size} is no multiple of gpus_per_host "
                f"{self.gpus_per_host}: hosts must be alike"
            )

    def topology(self, measured: Accelerator | None = None) -> Topology:
        """Return the ranks and their links.

        Args:
            measured: The measured machine, if `gpu` is "cpu".
        """
        machine = measured or GPUS[self.gpu]
        shares = machine.shares
        if self.compute_share:
            shares = replace(shares, compute=self.compute_share)
        if self.link_share:
            shares = replace(shares, link=self.link_share, network=self.link_share)
        if self.network_gbps:
            machine = replace(machine, network=self.network_gbps * 1e9 / 8)
        per_host = min(self.gpus_per_host, self.world_size)
        return Topology(replace(machine, shares=shares), self.world_size, per_host)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part.

    Attributes:
        weights: Its share of the weights, and of a frozen reference's. The scales of 4-bit weights
            are whole.
        gradients: Its share of the gradients, in the dtype in which they are added up.
        optimizer: Its share of the optimizer's state.
        gathered: Whole weights of the root and of two layers, with their gradients, and of the root
            of a frozen reference.
        activations: What layers keep for the backward pass.
        logits: The head's tile.
        process: Libraries, and the device's context.
        loading: All of it while a quantized model is loaded, which is whole on each GPU before it
            is sharded; 0 for other models.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    process: float = PROCESS_BYTES
    loading: float = 0.0

    @property
    def training(self) -> float:
        """The sum of all parts while the model is trained."""
        return sum(float(part) for name, part in asdict(self).items() if name != "loading")

    @property
    def bytes(self) -> float:
        """The largest number of bytes at a time."""
        return max(self.training, self.loading)


@dataclass(frozen=True)
class ClusterForecast:
    """What a run takes on a cluster.

    Attributes:
        gpu: Name of the GPU.
        world_size: Number of GPUs.
        hosts: Number of hosts.
        mode: How the model is divided: "one" (one process), "ddp", "fsdp" or "hsdp".
        layers_twice: Number of layers that are computed again in the backward pass.
        parameters: Number of weights of the model.
        memory: Bytes per GPU.
        capacity: Bytes that a GPU has.
        time: Seconds of an update, on average over the updates.
        updates: Number of updates of the run.
        tokens: Tokens of an update, over all GPUs.
        pairs: Pairs, or demonstrations, of an update.
        tokens_per_micro: Mean tokens of a micro-batch.
        mfu: FLOPs per second as a share of the peak; recomputed layers and attention scores do not
            count.
        break_even: Tokens of a micro-batch at which products take as long as the collectives.
        why: Why "auto" shards the model; empty if it does not.
        advice: What would help, in sentences.
    """

    gpu: str
    world_size: int
    hosts: int
    mode: Mode
    layers_twice: int
    parameters: int
    memory: Memory
    capacity: float
    time: UpdateTime
    updates: int
    tokens: float
    pairs: float
    tokens_per_micro: float
    mfu: float
    break_even: float
    why: str = ""
    advice: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU suffices."""
        return self.memory.bytes <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs."""
        return self.tokens / self.time.seconds

    @property
    def pairs_per_second(self) -> float:
        """Pairs per second of all GPUs."""
        return self.pairs / self.time.seconds

    @property
    def pairs_per_gpu_hour(self) -> float:
        """Pairs that one GPU trains on in an hour."""
        return 3600 * self.pairs_per_second / self.world_size

    @property
    def gpu_hours(self) -> float:
        """Hours of the run times GPUs, without loading, evaluation and checkpoints."""
        return self.updates * self.time.seconds * self.world_size / 3600

    @property
    def limit(self) -> str:
        """What limits the run: "memory" if it does not fit, else the largest part of the time."""
        if not self.fits:
            return "memory"
        time = self.time
        parts = {
            "products": time.compute,
            "collectives": time.exposed,
            "the slowest rank": time.waiting,
            "the optimizer": time.optimizer,
        }
        return max(parts, key=lambda name: parts[name])

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, as JSON values."""
        derived = ("fits", "limit", "tokens_per_second", "pairs_per_second")
        more = {name: getattr(self, name) for name in (*derived, "pairs_per_gpu_hour", "gpu_hours")}
        found = asdict(self) | more | {"advice": list(self.advice)}
        found["memory"]["total"] = self.memory.bytes
        found["time"]["total"] = self.time.seconds
        return found


class Planner:
    """Forecasts one run on one cluster.

    Args:
        config: Settings of the run, with the precision and the token budget that it will have.
        topology: The ranks.
        loads: Micro-batches of each rank, for some updates.
        updates: Number of updates of the run.
    """

    def __init__(
        self, config: TrainConfig, topology: Topology, loads: Sequence[RankLoads], updates: int
    ) -> None:
        self.config, self.topology = config, topology
        self._loads, self._updates = loads, updates
        self.policy = policy_shape(config)
        self._kind = reference_kind(config)
        self._frozen = self._reference()

    def _reference(self) -> ModelShape | None:
        """Return the model that scores each micro-batch without gradients, if there is one."""
        if self._kind not in ("adapter", "frozen"):
            return None
        given = self.config.reference if self._kind == "frozen" else None
        model = given or self.policy.folder
        return frozen_shape(model, precision_of(self.config), self.config.quantization)

    @property
    def division(self) -> Division:
        """What decides how the model is divided, as in the run itself."""
        topology = self.topology
        second = self._frozen if self._kind == "frozen" else None
        return Division(
            self.config,
            needed=replica_bytes(self.config, self.policy, second, self._device),
            free=topology.machine.memory - PROCESS_BYTES,
            processes=topology.world_size,
            hosts=topology.hosts,
        )

    def choose(self) -> ClusterForecast:
        """Return the forecast for the model divided as the run will divide it.

        Raises:
            ConfigError: The settings do not allow it.
        """
        division = self.division
        return replace(self.forecast(division.mode), why=division.why)

    def forecast(self, mode: Mode) -> ClusterForecast:
        """Return the forecast for a way of dividing the model, with advice."""
        found = self._forecast(mode)
        return replace(found, advice=tuple(self._advice(found)))

    def _forecast(self, mode: Mode) -> ClusterForecast:
        memory, twice = self._memory(mode)
        time, loads = self._time(mode, twice), self._per_update
        flops = self.policy.flops(loads.tokens, loads.targets)
        peak = self.topology.world_size * self.topology.machine.flops
        micros = [micro for update in self._loads for rank in update for micro in rank]
        return ClusterForecast(
            gpu=self.topology.machine.name,
            world_size=self.topology.world_size,
            hosts=self.topology.hosts,
            mode=mode,
            layers_twice=twice,
            parameters=self.policy.parameters,
            memory=memory,
            capacity=self.topology.machine.memory,
            time=time,
            updates=self._updates,
            tokens=loads.tokens,
            pairs=float(loads.groups),
            tokens_per_micro=total(micros).tokens / len(micros),
            mfu=flops / time.seconds / peak,
            break_even=break_even_tokens(self._work(twice), self._loads[0], mode, self.topology),
        )

    def _work(self, twice: int) -> Work:
        references = (self._frozen,) if self._frozen else ()
        return Work(self.policy, self.topology.machine, twice, references)

    @property
    def _per_update(self) -> Load:
        """The work of an update, over all ranks, on average."""
        micros = [micro for update in self._loads for rank in update for micro in rank]
        found, updates = total(micros), len(self._loads)
        return Load(
            found.tokens / updates,
            found.targets / updates,
            found.pairs / updates,
            round(found.groups / updates),
        )

    def _time(self, mode: Mode, twice: int) -> UpdateTime:
        """Return the mean time of the updates."""
        work = self._work(twice)
        once = self._whole_gradients(mode) > 0
        times = [
            update_time(work, one, mode, self.topology, reduces_once=once) for one in self._loads
        ]
        names = ("compute", "waiting", "gather", "reduce", "exposed")
        means = {name: sum(getattr(one, name) for one in times) / len(times) for name in names}
        trained = self.policy.trained / self._shards(mode)
        optimizer = self._stepping(mode).seconds(trained, self.topology)
        return UpdateTime(**means, optimizer=optimizer)

    @property
    def _dtype(self) -> torch.dtype:
        adapter = self.config.trains_adapter
        return torch.float32 if adapter else weights_dtype(precision_of(self.config))

    @property
    def _device(self) -> torch.device:
        """The kind of device; a measured machine is a CPU."""
        return CUDA if self.topology.machine.overlaps else torch.device("cpu")

    def _stepping(self, mode: Mode) -> Stepping:
        name, dtype = self.config.optimizer, self._dtype
        return Stepping(
            state=state_bytes(name, dtype, torch.device("cpu")),
            gradient=self._gradient(mode),
            weight=float(dtype.itemsize),
            on_host=name == "adamw-host" and self.topology.machine.overlaps,
        )

    def _gradient(self, mode: Mode) -> float:
        """Bytes of gradient per weight: float32 if those of micro-batches are added up.

        Shards of gradients have the dtype of their weights, although they are summed in float32.
        """
        added_up = self._rounds > 1 and not self._whole_gradients(mode)
        return gradient_bytes(self._dtype, added_up=added_up)

    @property
    def _rounds(self) -> int:
        """The largest number of micro-batches of a rank in an update."""
        return max(len(rank) for update in self._loads for rank in update)

    def _whole_gradients(self, mode: Mode) -> float:
        """Bytes of whole gradients that sharded ranks keep until the last micro-batch.

        They are kept if they are small, and save a reduction in each of the other micro-batches.
        """
        if mode not in SHARDED or self._rounds == 1:
            return 0.0
        free = self.topology.machine.memory - PROCESS_BYTES - self._weights(self._shards(mode))
        trained = self.policy.trained
        return FLOAT32 * trained if keeps_whole_gradients(trained, free) else 0.0

    def _shards(self, mode: Mode) -> int:
        shards, _ = shards_of(mode, self.topology)
        return shards.world_size if shards else 1

    def _second(self, shards: int) -> float:
        """Return the bytes of a frozen reference's weights in each of `shards` processes."""
        return self._frozen.held(shards) if self._frozen and self._kind == "frozen" else 0.0

    def _weights(self, shards: int) -> float:
        return self.policy.held(shards) + self._second(shards)

    def _gathered(self, shards: int) -> float:
        """Return the bytes of whole weights and gradients at once, if weights are sharded.

        The root is whole during a micro-batch. Of the layers, one computes and one is prefetched.
        Gradients are whole until they are reduced: those of a layer while the one before computes,
        and those of the root at the end.
        """
        if shards == 1:
            return 0.0
        root, layer = self.policy.root, self.policy.largest
        second = self._frozen.root.gathered if self._frozen and self._kind == "frozen" else 0.0
        return second + root.gathered + root.reduced + 2 * (layer.gathered + layer.reduced)

    def _loading(self, shards: int) -> float:
        """Return the most bytes while quantized models are loaded: whole, one after the other."""
        if shards == 1 or not self.config.quantization:
            return 0.0
        second = self.policy.held(shards) + self._second(1) if self._second(1) else 0.0
        return PROCESS_BYTES + max(self.policy.stored, second)

    def _memory(self, mode: Mode) -> tuple[Memory, int]:
        """Return the memory of a GPU, and the number of layers that are computed twice."""
        shards, policy = self._shards(mode), self.policy
        state = state_bytes(self.config.optimizer, self._dtype, self._device)
        parts = Memory(
            weights=self._weights(shards),
            gradients=self._gradient(mode) * policy.trained / shards + self._whole_gradients(mode),
            optimizer=state * policy.trained / shards,
            gathered=self._gathered(shards),
            activations=0.0,
            logits=0.0,
            loading=self._loading(shards),
        )
        free = self.topology.machine.memory - parts.training
        parts = replace(parts, logits=self._tile(max(0.0, free)))
        layers = len(policy.layers)
        fewest = {"off": 0, "all": layers}.get(self.config.activation_checkpointing)
        choices = range(layers + 1) if fewest is None else [fewest]
        for twice in choices:
            found = replace(parts, activations=self._activations(twice))
            if found.training <= self.topology.machine.memory:
                break
        return found, twice

    def _tile(self, free: float) -> float:
        """Return the bytes of the head's tile, which has no more positions than a micro-batch."""
        on_gpu = self._device.type == "cuda"
        most = elements_for(free) if on_gpu else TILE_ELEMENTS
        micros = (micro for update in self._loads for rank in update for micro in rank)
        positions = max(micro.targets for micro in micros)
        return BYTES * min(float(most), positions * self.policy.vocabulary)

    def _activations(self, twice: int) -> float:
        """Return the bytes that the largest micro-batch keeps, if some layers are computed twice.

        Each keeps its input only, and one of them at a time what its backward pass needs.
        """
        micros = (micro for update in self._loads for rank in update for micro in rank)
        tokens = max(micro.tokens for micro in micros)
        folder, precision = self.policy.folder, precision_of(self.config)
        layers = len(self.policy.layers)
        once = kept_bytes(folder, precision) / layers
        if not twice:
            return tokens * once * layers
        inputs = (kept_bytes(folder, precision, twice=True) - once) / layers
        # With all layers twice, this is what `kept_bytes` gives for that.
        return tokens * (once * (layers - twice) + inputs * twice + once)

    def _advice(self, found: ClusterForecast) -> list[str]:
        """Return what would help, in sentences."""
        if not found.fits:
            return [self._memory_advice(found)]
        advice = []
        if found.time.exposed > EXPOSED * found.time.seconds:
            advice.append(self._traffic_advice(found))
        if found.time.waiting > EXPOSED * found.time.seconds:
            share = found.time.waiting / found.time.seconds
            advice.append(
                f"{share:.0%} of the time is spent waiting for the slowest rank: a larger "
                "batch_size balances the ranks better"
            )
        return advice

    def _memory_advice(self, found: ClusterForecast) -> str:
        short = (found.memory.bytes - found.capacity) / 1e9
        if found.memory.loading > found.capacity:
            return (
                f"a GPU lacks {short:.1f} GB while the quantized model is loaded, which is whole "
                "on each GPU before it is sharded: try GPUs with more memory, or no --quantization"
            )
        remedies = []
        if found.mode != "fsdp" and "fsdp" in self._possible:
            remedies.append("--parallel fsdp")
        if found.layers_twice < len(self.policy.layers):
            remedies.append("--activation-checkpointing all")
        if found.memory.activations > 0.2 * found.capacity:
            remedies.append("a smaller --token-budget")
        if not self.config.trains_adapter:
            remedies.append("--lora")
        remedies.append("more GPUs")
        return f"a GPU lacks {short:.1f} GB: try {', or '.join(remedies)}"

    @property
    def _possible(self) -> list[Mode]:
        """The ways to divide the model over several GPUs."""
        if self.topology.world_size == 1:
            return []
        modes: tuple[Mode, ...] = ("ddp", "fsdp", "hsdp")
        if self.topology.hosts == 1:  # hsdp would be fsdp
            modes = modes[:2]
        return [mode for mode in modes if not reason_against(self.config, mode)]

    def _traffic_advice(self, found: ClusterForecast) -> str:
        share = found.time.exposed / found.time.seconds
        text = f"collectives are exposed for {share:.0%} of the time"
        if found.mode not in SHARDED:
            text += ": with a larger batch_size they are needed less often"
        elif found.tokens_per_micro < found.break_even:
            text += (
                f": micro-batches have {found.tokens_per_micro:,.0f} tokens, and products take as "
                f"long as the collectives at {found.break_even:,.0f}: {self._filling(found)}"
            )
        others = (self._forecast(mode) for mode in self._possible if mode != found.mode)
        faster = [one for one in others if one.fits and one.time.seconds < found.time.seconds]
        if not faster:
            return text
        best = min(faster, key=lambda one: one.time.seconds)
        return f"{text}; --parallel {best.mode} takes {best.time.seconds:.2f} s per update"

    def _filling(self, found: ClusterForecast) -> str:
        """Return the settings with which micro-batches have enough tokens."""
        per_rank = found.tokens / found.world_size
        settings = []
        if per_rank < found.break_even:
            enough = math.ceil(self.config.batch_size * found.break_even / per_rank)
            settings.append(f"--batch-size {enough:,}")
        if training_budget(self.config) < found.break_even:
            settings.append(f"--token-budget {math.ceil(found.break_even):,}")
        return f"try {' and '.join(settings)}" if settings else "try a larger --token-budget"
