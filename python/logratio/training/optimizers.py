"""AdamW with state on the device, in 8 bits, or on the host.

Loshchilov and Hutter 2019, arXiv 1711.05101. Weight decay is decoupled, and not applied to norms
and biases.
Bytes of state per weight: 8 (adamw), 2 (adamw8bit), 0 on the GPU and 12 on the host (adamw-host).
With weights in bfloat16, adamw takes 4 more for their float32 copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from logratio.extras import require
from logratio.training.config import OptimizerName, TrainConfig

FUSED = ("cpu", "cuda")
"""Devices with a fused AdamW kernel; on a CPU it is 4 times as fast, and equally exact."""
AT_ONCE = 2**26
"""Maximum number of values updated together; float32 copies of their gradients take 256 MiB."""


@dataclass(frozen=True)
class AdamSettings:
    """The numbers of AdamW.

    Attributes:
        lr: Initial learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moments.
        weight_decay: Of matrices; norms and biases have none.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> "AdamSettings":
        """Return the settings that a run has."""
        betas = config.adam_beta1, config.adam_beta2
        return cls(config.lr, betas, config.adam_epsilon, config.weight_decay)

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Return parameter groups of torch's optimizers: matrices, and what does not decay."""
        common = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        if not self.weight_decay:
            return [{"params": list(parameters), "weight_decay": 0.0, **common}]
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        decays = ((matrices, self.weight_decay), (vectors, 0.0))
        return [{"params": some, "weight_decay": decay, **common} for some, decay in decays if some]


def make_optimizer(
    name: OptimizerName, parameters: Sequence[nn.Parameter], settings: AdamSettings
) -> torch.optim.Optimizer:
    """Create the optimizer called `name`.

    "adamw" is torch's. bfloat16 weights get an exact float32 copy in the optimizer state, because
    bfloat16 cannot represent updates at a learning rate of 1e-6. "adamw8bit" keeps the moments in
    8 bits by blocks (arXiv 2110.02861, bitsandbytes): updates are inexact by a few percent.
    "adamw-host" is exact, and keeps its state and runs its step on the host.

    Args:
        name: Name of the optimizer.
        parameters: Parameters to train.
        settings: The numbers of AdamW.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == "adamw8bit":
        library = require("bitsandbytes", "quantized")
        made = library.optim.AdamW8bit(settings.groups(parameters))
        assert isinstance(made, torch.optim.Optimizer)
        return made
    if name == "adamw-host":
        return MasterAdamW(settings.groups(parameters), torch.device("cpu"))
    if any(p.dtype != torch.float32 for p in parameters):
        return MasterAdamW(settings.groups(parameters))
    fused = all(p.device.type in FUSED for p in parameters)
    return torch.optim.AdamW(settings.groups(parameters), fused=fused)


def state_bytes(name: OptimizerName, dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes of optimizer state on `device` per weight of `dtype` there."""
    if name == "adamw-host" and device.type != "cpu":
        return 0.0
    if name == "adamw8bit":
        return 2.0
    return 8.0 if dtype == torch.float32 else 12.0


def gradient_bytes(dtype: torch.dtype, *, added_up: bool) -> float:
    """Return the bytes of gradient per weight of `dtype` during an update.

    Args:
        dtype: Dtype of the weight.
        added_up: Whether the update accumulates several micro-batches: see `widen_gradients`.
    """
    return float(max(dtype.itemsize, 4) if added_up else dtype.itemsize)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments and master weights, optionally on another device.

    The model's weights are the master weights rounded to their dtype, so no update is lost to
    rounding. A float32 weight on the state's device needs no master copy.

    Weights are updated in lists of at most `AT_ONCE` values. If the state is on the host and the
    weights on a GPU, each list's gradients are copied to the host while the previous list is
    updated, and its weights are copied back. So gradients and weights cross the bus once per
    update, and the step takes as long as the host needs to read and write 28 bytes per weight.

    Attributes:
        home: Device of moments and master weights; None: that of each parameter.
        factor: Scale applied to the gradients in the next step, float32; None: no scaling.
    """

    def __init__(self, groups: list[dict[str, Any]], home: torch.device | None = None) -> None:
        super().__init__(groups, {})
        self.home = home
        self.factor: Tensor | None = None

    def state_device(self, parameter: Tensor) -> torch.device:
        """Return the device of the state of `parameter`."""
        return self.home or parameter.device

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Raises:
            ValueError: A closure is given; closures are not supported.
        """
        if closure is not None:
            raise ValueError("closures are not supported by this optimizer")
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for parameters, gradients in _prefetch_gradients(_lists(trained), self.state_device):
                self._update(parameters, gradients, group)
        self.factor = None

    def _update(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        states = [self._state(parameter) for parameter in parameters]
        masters = [state.get("master", p) for state, p in zip(states, parameters, strict=True)]
        # The step is the same for every value, so a sharded weight is updated shard by shard.
        masters = [*map(local, masters)]
        if self.factor is not None:
            torch._foreach_mul_(gradients, self.factor.to(gradients[0].device))
        adamw(
            masters,
            gradients,
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=masters[0].device.type in FUSED,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        pairs = zip(map(local, parameters), masters, strict=True)
        if "master" in states[0]:  # or in none: weights of a list have one dtype and device
            _round_into([*pairs])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a weight, created if it has none; sharded like the weight."""
        state: dict[str, Tensor] = self.state[parameter]
        home = self.state_device(parameter)
        if not state:
            if parameter.dtype != torch.float32 or parameter.device != home:
                state["master"] = parameter.detach().to(home, torch.float32, copy=True)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32, device=home)
            on = home.type in FUSED
            state["step"] = torch.zeros((), dtype=torch.float32, device=home if on else "cpu")
        return state


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that the first step of "adamw" would create, to be filled from a file."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(optimizer, MasterAdamW):
            optimizer._state(parameter)
        elif not optimizer.state[parameter]:
            on = parameter.device if parameter.device.type in FUSED else "cpu"
            optimizer.state[parameter].update(
                step=torch.zeros((), dtype=torch.float32, device=on),
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
            )


def _lists(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Split weights into lists of one device and dtype with at most `AT_ONCE` values.

    A larger weight forms a list alone.
    """
    for each in _by_device_and_dtype(parameters):
        taken, size = list[Tensor](), 0
        for parameter in each:
            if taken and size + parameter.numel() > AT_ONCE:
                yield taken
                taken, size = [], 0
            taken.append(parameter)
            size += parameter.numel()
        yield taken


def _prefetch_gradients(
    lists: Iterable[list[Tensor]], state_device: Callable[[Tensor], torch.device]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield each list of weights and its float32 gradients on the state's device.

    The copy of the next list's gradients has already been started.
    """
    waiting: tuple[list[Tensor], Callable[[], list[Tensor]]] | None = None
    for parameters in lists:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        started = parameters, _start_copy(gradients, state_device(parameters[0]))
        if waiting:
            yield waiting[0], waiting[1]()
        waiting = started
    if waiting:
        yield waiting[0], waiting[1]()


def _start_copy(gradients: list[Tensor], home: torch.device) -> Callable[[], list[Tensor]]:
    """Start copying gradients to `home`; return a function that waits for the copies."""
    if gradients[0].device.type != "cuda" or home.type != "cpu":
        return lambda: _in_float32(gradients)
    hosts = [torch.empty(g.shape, dtype=g.dtype, pin_memory=True) for g in gradients]
    for host, gradient in zip(hosts, gradients, strict=True):
        host.copy_(gradient, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(gradients[0].device))

    def arrived() -> list[Tensor]:
        done.synchronize()
        return _in_float32(hosts)

    return arrived


def _in_float32(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors in float32; those that already are float32 are not copied."""
    low = [tensor for tensor in tensors if tensor.dtype != torch.float32]
    if not low:
        return tensors
    exact = [torch.empty_like(tensor, dtype=torch.float32) for tensor in low]
    torch._foreach_copy_(exact, low)
    if len(low) == len(tensors):
        return exact
    made = iter(exact)
    return [tensor if tensor.dtype == torch.float32 else next(made) for tensor in tensors]


def _round_into(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Round master weights (second of each pair) to nearest into the model's weights (first)."""
    if not pairs:
        return
    parameters, masters = map(list, zip(*pairs, strict=True))
    if parameters[0].device.type != "cuda" or masters[0].device.type != "cpu":
        torch._foreach_copy_(parameters, masters)
        return
    for parameter, master in pairs:
        # torch does not reuse pinned memory before the copies from it have completed.
        host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
        parameter.copy_(host.copy_(master), non_blocking=True)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, in the same memory; others unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def widen_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Convert gradients to float32 before another micro-batch is accumulated into them.

    bfloat16 has 8 significant bits, so a sum in it loses terms that are 256 times smaller. If an
    update has a single micro-batch, its gradients keep their dtype, which saves memory.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.dtype.itemsize < 4:
            parameter.grad_dtype = None  # allows a gradient of another dtype than the weight
            parameter.grad = parameter.grad.float()


def clip_gradients(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Clip the total norm of all gradients to `most`; return the norm before clipping, float32.

    Like `torch.nn.utils.clip_grad_norm_`, but with norms of bfloat16 gradients accumulated in
    float32. On a CPU, gradients within the norm are not touched. On other devices the host does not
    wait for the norm. `MasterAdamW` scales the gradients during its step, in float32, so that
    bfloat16 gradients are not rounded again.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    lists = _by_device_and_dtype(map(local, gradients))
    norms: list[Tensor] = []
    for each in lists:
        norms += torch._foreach_norm(each, 2, torch.promote_types(each[0].dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(gradients[0], DTensor):
        norm = _over_shards(norm, gradients[0].device_mesh)
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    if scale.device.type == "cpu" and float(scale) == 1.0:
        return norm
    if isinstance(optimizer, MasterAdamW):
        optimizer.factor = scale
        return norm
    for each in lists:
        torch._foreach_mul_(each, scale)
    return norm


def _over_shards(norm: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the norm of whole gradients from those of this process's shards."""
    squares = norm.square()
    all_reduce(squares, group=mesh.get_group("shard"))
    return squares.sqrt()


def _by_device_and_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device and dtype, as torch's foreach operations require."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())
