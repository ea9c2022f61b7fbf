"""The time of an update on a cluster: products, collectives, and what hides behind what.

A pass is a list of steps, one per layer. The weights of the next step are gathered while a step
computes (a prefetch depth of 1, as in FSDP2), and its gradients are reduced when it has ended.
Gathers and reductions share the links and run one after the other, in the order in which they
become ready. Reductions over replicas run on the network.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from logratio.training.accelerators import Accelerator
from logratio.training.model_shape import ModelShape, Unit
from logratio.training.parallel.division import SHARDED, Mode
from logratio.training.rank_loads import Load, RankLoads, total

SCORES_BACKWARD = 2.5
"""FLOPs of attention scores in the backward pass, relative to the forward pass: five products
instead of two (Dao 2023, arXiv 2307.08691, section 4.1)."""


@dataclass(frozen=True)
class Step:
    """A part of a pass.

    Attributes:
        compute: Seconds of products.
        gather: Seconds to gather its weights, before it computes.
        reduce: Seconds to reduce its gradients within a group of shards, after it has computed.
        replicate: Seconds to add its gradients up over the groups, after that.
    """

    compute: float = 0.0
    gather: float = 0.0
    reduce: float = 0.0
    replicate: float = 0.0


def elapsed(steps: Sequence[Step], *, overlaps: bool = True) -> float:
    """Return the seconds that a pass takes.

    Args:
        steps: The steps, in order.
        overlaps: Whether collectives run while the device computes.
    """
    if not overlaps:
        return sum(s.compute + s.gather + s.reduce + s.replicate for s in steps)
    link = network = begin = end = 0.0
    last = Step()
    for step in [*steps, Step()]:
        ready = end
        if step.gather:
            link = ready = max(link, begin) + step.gather
        begin, before = max(end, ready), end
        # The gather of this step became ready before the gradients of the last one.
        if last.reduce:
            link = max(link, before) + last.reduce
        if last.replicate:
            network = max(network, link if last.reduce else before) + last.replicate
        end, last = begin + step.compute, step
    return max(end, link, network)


@dataclass(frozen=True)
class Topology:
    """Ranks and the links between them.

    Attributes:
        machine: The GPU of each rank.
        world_size: Number of ranks.
        per_host: Number of ranks on each host.
    """

    machine: Accelerator
    world_size: int
    per_host: int

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return -(-self.world_size // self.per_host)

    @property
    def host(self) -> "Topology":
        """One of the hosts."""
        return replace(self, world_size=min(self.world_size, self.per_host))

    @property
    def others(self) -> "Topology":
        """The ranks with the same number on all hosts."""
        return replace(self, world_size=self.hosts, per_host=1)

    def gather(self, count: float) -> float:
        """Return the seconds until each rank has all of `count` bytes, of which it had a share."""
        return self._ring(count)

    def scatter(self, count: float) -> float:
        """Return the seconds to add up `count` bytes of each rank, a share of them on each."""
        return self._ring(count, self.machine.reduction)

    def all_reduce(self, count: float) -> float:
        """Return the seconds to add up `count` bytes of each rank on every rank."""
        return self.scatter(count) + self.gather(count)

    def _ring(self, count: float, cost: float = 1.0) -> float:
        """Return the seconds in which a ring moves `count` bytes, and a share stays on each rank.

        It sends every byte once into each host, over the network adapters of all its ranks.
        """
        if self.world_size == 1 or not count:
            return 0.0
        machine, hosts = self.machine, self.hosts
        inner = min(self.world_size, self.per_host)
        link = machine.link * machine.shares.link
        network = inner * machine.network * machine.shares.network
        inside = count * (self.world_size - 1) / self.world_size / link if inner > 1 else 0.0
        between = count * (hosts - 1) / hosts / network
        return cost * max(inside, between) + machine.launch + (hosts - 1) * machine.hop


@dataclass
class UpdateTime:
    """Seconds of an update by part, and the seconds of all of it.

    Attributes:
        compute: Products, on average over the ranks.
        waiting: Further products of the slowest rank.
        gather: Gathering weights, hidden or not.
        reduce: Adding gradients up, hidden or not.
        exposed: Collectives during which nothing is computed.
        optimizer: Clipping and the optimizer's step.
    """

    compute: float = 0.0
    waiting: float = 0.0
    gather: float = 0.0
    reduce: float = 0.0
    exposed: float = 0.0
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole update."""
        return self.compute + self.waiting + self.exposed + self.optimizer


@dataclass(frozen=True)
class Work:
    """What a rank computes for a load.

    Attributes:
        shape: The policy.
        machine: The GPU.
        twice: Number of layers that are computed again in the backward pass.
        references: Models that score each load without gradients.
    """

    shape: ModelShape
    machine: Accelerator
    twice: int = 0
    references: tuple[ModelShape, ...] = ()

    def seconds(self, load: Load) -> float:
        """Return the seconds of all products for a load."""
        made = _Steps(self.machine, None, None, load)
        heads = [made.head(shape, backward=False) for shape in self.references]
        heads.append(made.head(self.shape, backward=True))
        layers = (made.step(*each).compute * times for each, times in self._distinct.items())
        return sum(layers) + sum(head.compute for head in heads)

    @cached_property
    def _distinct(self) -> Counter[tuple[Unit, float, float]]:
        """How often a unit is computed with the same FLOPs: most layers are alike."""
        shapes = (*self.references, self.shape)
        forward = [(unit, unit.forward, one.attention) for one in shapes for unit in one.layers]
        return Counter([*forward, *self._backward])

    @cached_property
    def _backward(self) -> list[tuple[Unit, float, float]]:
        """The layers of the backward pass, with their FLOPs per token and per pair of tokens."""
        kept = len(self.shape.layers) - self.twice
        return [
            (
                unit,
                unit.backward + (unit.forward if number >= kept else 0.0),
                self.shape.attention * (SCORES_BACKWARD + (number >= kept)),
            )
            for number, unit in reversed([*enumerate(self.shape.layers)])
        ]

    def steps(
        self,
        load: Load,
        topology: Topology | None = None,
        *,
        reduces: bool = True,
        replicates: Topology | None = None,
    ) -> list[Step]:
        """Return the steps of a micro-batch.

        A reference's root is gathered once, and stays whole for the run, as no backward pass frees
        it; that of the policy without its adapters is the policy's.

        Args:
            load: The micro-batch.
            topology: The ranks over which the weights are sharded; None: not sharded.
            reduces: Whether gradients are added up over the shards.
            replicates: The ranks with the same shard, if gradients are added up over them too.
        """
        made = _Steps(self.machine, topology, replicates if reduces else None, load)
        steps = []
        for reference in self.references:
            steps += made.layers(reference)
            steps.append(made.head(reference, backward=False))
        steps += made.forward(self.shape)
        steps.append(made.head(self.shape, backward=True))
        steps += [made.step(*each, reduces=reduces) for each in self._backward]
        return [*steps, made.end(self.shape.root, reduces=reduces)]


@dataclass(frozen=True)
class _Steps:
    """Makes the steps of a micro-batch; see `Work.steps`."""

    machine: Accelerator
    shards: Topology | None
    replicas: Topology | None
    load: Load

    def forward(self, shape: ModelShape) -> list[Step]:
        """Gather the root, then compute the layers. The root stays whole until the end."""
        return [Step(gather=self._gather(shape.root)), *self.layers(shape)]

    def layers(self, shape: ModelShape) -> list[Step]:
        """Compute the layers, with the root in place."""
        return [self.step(unit, unit.forward, shape.attention) for unit in shape.layers]

    def step(self, unit: Unit, flops: float, scores: float, *, reduces: bool = False) -> Step:
        """Compute a layer: `flops` per token, and `scores` per pair of tokens."""
        work = flops * self.load.tokens + scores * self.load.pairs
        bandwidth = self.machine.memory_bandwidth * self.machine.shares.memory
        reading = (unit.gathered + unit.scales) / bandwidth
        found = self.end(unit, reduces=reduces)
        compute = max(work / self.machine.speed, reading)
        return replace(found, compute=compute, gather=self._gather(unit))

    def head(self, shape: ModelShape, *, backward: bool) -> Step:
        """Compute the head where logits are needed, with its gradients in the same pass."""
        root = shape.root
        flops = root.forward + (root.backward if backward else 0.0)
        return Step(compute=flops * self.load.targets / self.machine.speed)

    def end(self, unit: Unit, *, reduces: bool) -> Step:
        """Add up the gradients of a unit."""
        if not reduces:
            return Step()
        reduce = self.shards.scatter(unit.reduced) if self.shards else 0.0
        if self.replicas is None:
            return Step(reduce=reduce)
        shards = self.shards.world_size if self.shards else 1
        return Step(reduce=reduce, replicate=self.replicas.all_reduce(unit.reduced / shards))

    def _gather(self, unit: Unit) -> float:
        return self.shards.gather(unit.gathered) if self.shards else 0.0


def shards_of(mode: Mode, topology: Topology) -> tuple[Topology | None, Topology | None]:
    """Return the ranks over which weights are sharded, and those that hold the same shard."""
    if mode not in SHARDED:
        return None, topology if topology.world_size > 1 else None
    if mode == "fsdp":
        return topology, None
    return topology.host, topology.others if topology.hosts > 1 else None


def update_time(
    work: Work,
    loads: RankLoads,
    mode: Mode,
    topology: Topology,
    *,
    reduces_once: bool = False,
) -> UpdateTime:
    """Return the time of one update, without the optimizer.

    Sharded ranks wait for the slowest at every collective, so each round takes as long as its
    slowest micro-batch. Whole copies wait once, at the end of the update.

    Args:
        work: What a rank computes.
        loads: The micro-batches of each rank.
        mode: How the model is divided.
        topology: All ranks.
        reduces_once: Whether sharded ranks add gradients up in the last round only. Copies always
            do.
    """
    shards, replicas = shards_of(mode, topology)
    mean = sum(work.seconds(load) for rank in loads for load in rank) / len(loads)
    rounds = _rounds(work, loads, copies=mode not in SHARDED)
    passes = []
    for number, load in enumerate(rounds, 1):
        reduces = number == len(rounds) or not (reduces_once or mode not in SHARDED)
        passes.append(work.steps(load, shards, reduces=reduces, replicates=replicas))
    steps = [step for each in passes for step in each]
    compute = sum(step.compute for step in steps)
    spent = sum(elapsed(each, overlaps=topology.machine.overlaps) for each in passes)
    gather = sum(step.gather for step in steps)
    reduce = sum(step.reduce + step.replicate for step in steps)
    return UpdateTime(
        compute=mean,
        waiting=max(0.0, compute - mean),  # rounding may make it negative
        gather=gather,
        reduce=reduce,
        exposed=max(0.0, spent - compute) if gather + reduce else 0.0,
    )


def _rounds(work: Work, loads: RankLoads, *, copies: bool) -> list[Load]:
    """Return the micro-batches that the others wait for: of the slowest rank, or in each round."""
    if copies:
        return list(max(loads, key=lambda rank: sum(map(work.seconds, rank))))
    most = max(map(len, loads))
    return [
        max((rank[number] for rank in loads if number < len(rank)), key=work.seconds)
        for number in range(most)
    ]


def break_even_tokens(work: Work, loads: RankLoads, mode: Mode, topology: Topology) -> float:
    """Return the tokens per micro-batch at which products take as long as the collectives.

    Both are those of a micro-batch that adds gradients up within its group of shards.
    """
    shards, _ = shards_of(mode, topology)
    load = total([micro for rank in loads for micro in rank])
    if shards is None or not load.tokens:
        return 0.0
    steps = work.steps(load, shards)
    seconds = sum(step.compute for step in steps) / load.tokens
    return sum(step.gather + step.reduce for step in steps) / seconds


HOST_BANDWIDTH = 300e9
"""Bytes per second of a host's memory, for all its ranks. An assumption: two sockets with eight
channels of DDR5-4800 have 614 GB/s, of which half is reached."""


@dataclass(frozen=True)
class Stepping:
    """What the optimizer reads and writes.

    Attributes:
        state: Bytes of optimizer state per weight, wherever it is.
        gradient: Bytes of gradient per weight.
        weight: Bytes per weight on the GPU.
        on_host: Whether the state is in the host's memory.
    """

    state: float
    gradient: float
    weight: float
    on_host: bool

    def seconds(self, trained: float, topology: Topology) -> float:
        """Return the seconds to clip gradients and update the `trained` weights of each rank."""
        machine = topology.machine
        memory = machine.memory_bandwidth * machine.shares.memory
        clipping = 3 * self.gradient / memory  # the norm reads, the scaling reads and writes
        if not self.on_host:
            touched = 2 * self.state + self.gradient + 2 * self.weight
            return trained * (clipping + touched / memory)
        host = HOST_BANDWIDTH / topology.host.world_size
        bus = machine.host_bus * machine.shares.link
        return trained * (clipping + max(2 * self.state / host, self._moved / bus))

    @property
    def _moved(self) -> float:
        return self.gradient + self.weight
