"""A CPU as a rank of a cluster: its speed, and that of gloo between two processes.

Both processes measure at the same time, as they compute in a run. This module is also the program
of a process: `python -m logratio.training.measured_machine FILE RANK`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.feed import lay_out
from logratio.errors import LogratioError
from logratio.forecast import count
from logratio.logps.attention.interface import shared_prompts
from logratio.logps.batch import Part, to_torch
from logratio.logps.completion import completion_loss, transformer
from logratio.training.accelerators import Accelerator, Shares
from logratio.training.cluster_time import Work
from logratio.training.config import Precision
from logratio.training.memory import PRODUCT, free_bytes
from logratio.training.model_shape import ModelShape
from logratio.training.models import autocast, quietly, weights_dtype
from logratio.training.rank_loads import Lengths, load_of

PROCESSES = 2
SIZES = (2**16, 2**22)
"""Float32 values in the two collectives whose times give latency and bandwidth."""
REPEATS = 4
LAYERS = 4
"""Most layers of the model that is measured; all have the same time."""
TIMEOUT = timedelta(minutes=5)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks: "cpu" adds up the threads of a process, and does not depend on other load."""


class MeasurementError(LogratioError, RuntimeError):
    """The machine could not be measured."""


@dataclass(frozen=True)
class Task:
    """What the processes measure.

    Attributes:
        model: Folder of the config of a model.
        groups: The groups of a micro-batch: tokens of the prompt, then of each completion.
        precision: Precision of the pass.
        threads: Threads of torch in each process.
        clock: Name of the clock in `CLOCKS`.
        meeting: Address where the processes meet.
    """

    model: str
    groups: Lengths
    precision: Precision = "fp32"
    threads: int = 1
    clock: str = "wall"
    meeting: str = ""


@dataclass(frozen=True)
class Figures:
    """What one process measured, in seconds or per second.

    Attributes:
        products: FLOPs per second of a large product.
        passes: Seconds of a forward and backward pass of a micro-batch.
        copies: Bytes per second that a copy reads and writes.
        gathers: Seconds to gather weights, per size in `SIZES`.
        reductions: Seconds to add gradients up and divide the sum, per size in `SIZES`.
    """

    products: float
    passes: float
    copies: float
    gathers: tuple[float, float]
    reductions: tuple[float, float]


def measure_cpu(task: Task, shape: ModelShape) -> Accelerator:
    """Measure this machine as two ranks of a cluster; takes some seconds.

    Args:
        task: What to measure.
        shape: The shape of the model of the task.

    Returns:
        The CPU of one rank. The peak is the speed of a large product; the share of it is that of a
        pass of the model.

    Raises:
        MeasurementError: A process failed; the message has its last line.
    """
    figures = _measured(task)
    launch, gather = _line([one.gathers for one in figures])
    further, reduction = _line([one.reductions for one in figures])
    found = Accelerator(
        name=f"this CPU, {count(task.threads, 'thread')} per rank",
        flops=median(one.products for one in figures),
        memory=free_bytes() / PROCESSES,
        memory_bandwidth=median(one.copies for one in figures),
        link=gather,
        network=gather,
        shares=Shares(1.0, 1.0, 1.0, 1.0),
        launch=(launch + further) / 2,
        hop=0.0,
        reduction=gather / reduction,
        overlaps=False,  # gloo needs the cores that compute
    )
    some = replace(shape, layers=shape.layers[:LAYERS])
    ideal = Work(some, found).seconds(load_of(task.groups))
    seconds = max(one.passes for one in figures)
    return replace(found, shares=replace(found.shares, compute=ideal / seconds))


def _line(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds without data, and the bytes per second, of collectives of two sizes.

    Each of two ranks moves half of the bytes; the slower rank counts.
    """
    short, long = (max(pair[i] for pair in times) for i in (0, 1))
    small, large = (4.0 * size / PROCESSES for size in SIZES)
    slope = max(long - short, 1e-9) / (large - small)
    return max(0.0, short - slope * small), 1 / slope


def _measured(task: Task) -> list[Figures]:
    """Run the processes, and return their figures."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(asdict(replace(task, meeting=(file.parent / "meet").as_uri()))))
        command = [sys.executable, "-m", __name__, str(file)]
        running = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(PROCESSES)
        ]
        errors = [process.communicate()[1] for process in running]
        for process, text in zip(running, errors, strict=True):
            if process.returncode:
                last = (text.strip() or "no message").splitlines()[-1]
                raise MeasurementError(f"this machine could not be measured: {last}")
        found = [json.loads(_result(file, rank).read_text()) for rank in range(PROCESSES)]
    return [
        Figures(**one | {name: tuple(one[name]) for name in ("gathers", "reductions")})
        for one in found
    ]


def _result(file: Path, rank: int) -> Path:
    return file.with_name(f"rank-{rank}.json")


class _Measurement:
    """What a process measures; both processes call the same methods in the same order."""

    def __init__(self, task: Task) -> None:
        self._task, self._clock = task, CLOCKS[task.clock]

    def figures(self) -> Figures:
        """Measure everything."""
        dist.barrier()
        return Figures(
            products=2 * PRODUCT["cpu"] ** 3 / self._time(self._product()),
            passes=self._time(self._pass()),
            copies=8.0 * SIZES[1] / self._time(self._copy()),
            gathers=(self._time(_gather(SIZES[0])), self._time(_gather(SIZES[1]))),
            reductions=(self._time(_reduce(SIZES[0])), self._time(_reduce(SIZES[1]))),
        )

    def _time(self, run: Callable[[], object]) -> float:
        """Return the median time of some calls, after one that warms up."""
        run()
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            start = self._clock()
            run()
            times.append(self._clock() - start)
        return median(times)

    def _product(self) -> Callable[[], object]:
        size = PRODUCT["cpu"]
        dtype = torch.float32 if self._task.precision == "fp32" else torch.bfloat16
        left = torch.ones(size, size, dtype=dtype)
        return lambda: left @ left

    def _copy(self) -> Callable[[], object]:
        source, target = torch.ones(SIZES[1]), torch.empty(SIZES[1])
        return lambda: target.copy_(source)

    def _pass(self) -> Callable[[], object]:
        """Return a forward and backward pass of the first layers of the model, and of its head."""
        model, store = _model(self._task), _store(self._task.groups)
        micro = lay_out(store, np.arange(len(store)))
        batch = to_torch(micro, torch.device("cpu"))
        weights = list(model.parameters())

        def run() -> None:
            with shared_prompts(transformer(model)):
                with autocast(self._task.precision, torch.device("cpu")):
                    loss = completion_loss(model, batch, _mean)
                loss.backward()
            for weight in weights:
                weight.grad = None

        return run


def _mean(logps: Tensor, _: Part) -> Tensor:
    return logps.mean()


def _gather(size: int) -> Callable[[], object]:
    """Return a gather of `size` values and their copy to where they are used, as in FSDP2."""
    own, everything, used = torch.ones(size // PROCESSES), torch.empty(size), torch.empty(size)

    def run() -> None:
        dist.all_gather_into_tensor(everything, own)
        used.copy_(everything)

    return run


def _reduce(size: int) -> Callable[[], object]:
    """Return a sum over the ranks of which each gets a part, with copies as in FSDP2."""
    gradient, flat = torch.ones(size), torch.empty(size)
    part, added = torch.empty(size // PROCESSES), torch.zeros(size // PROCESSES)

    def run() -> None:
        flat.copy_(gradient)
        dist.reduce_scatter_tensor(part, flat)
        added.add_(part)

    return run


def _model(task: Task) -> nn.Module:
    """Make the first layers of a model, with random weights."""
    with quietly():
        config = AutoConfig.from_pretrained(
            task.model, local_files_only=True, trust_remote_code=False
        )
        text = config.get_text_config()
        text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = kinds[:LAYERS]
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=weights_dtype(task.precision), trust_remote_code=False
        )
    return model.eval()


def _store(groups: Lengths) -> Store:
    """Make groups of these lengths; their ids are 1."""
    writer = StoreWriter()
    for line, (prompt, *completions) in enumerate(groups):
        tokens = sum(completions)
        writer.push(
            np.ones(prompt, np.int32),
            np.full(tokens, line, np.int32),
            np.ones(tokens, np.uint8),
            np.array(completions, np.uint32),
            np.full(len(completions), ROLES.index("candidate"), np.uint8),
            0,
            line,
        )
    return writer.finish()


def main(file: Path, rank: int) -> None:
    """Measure as one of the processes, and write the figures."""
    task = Task(**json.loads(file.read_text()))
    torch.set_num_threads(task.threads)
    dist.init_process_group(
        "gloo", init_method=task.meeting, rank=rank, world_size=PROCESSES, timeout=TIMEOUT
    )
    try:
        figures = _Measurement(task).figures()
    finally:
        dist.destroy_process_group()
    _result(file, rank).write_text(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
