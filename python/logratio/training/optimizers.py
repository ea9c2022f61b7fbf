"""AdamW with its numbers where there is room for them: on the device, in 8 bits, on the host.

Loshchilov and Hutter 2019, arXiv 1711.05101, with β1 0.9, β2 0.999, ε 1e-8 and no weight decay.
Bytes a weight beside the weight and its gradient: 8 (adamw), 2 (adamw8bit), 0 on the GPU and 12 on
the host (adamw-host); weights in bfloat16 add 4 to adamw for their float32 copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from logratio.extras import require
from logratio.training.config import OptimizerName

FUSED = ("cpu", "cuda")
"""Where one kernel does a whole step: on a CPU 4 times as fast as one by one, and as exact."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
AT_ONCE = 2**26
"""Numbers in one list of weights: float32 copies of their gradients take 256 MiB."""


def make_optimizer(
    name: OptimizerName, parameters: Sequence[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """Return the optimizer called `name` over the weights that train.

    "adamw" is torch's; bfloat16 weights get an exact float32 copy beside their moments, because an
    update of a learning rate of 1e-6 is far below what bfloat16 can hold. "adamw8bit" keeps the
    moments in 8 bits by blocks (arXiv 2110.02861, bitsandbytes): updates are inexact by a few
    percent. "adamw-host" is exact, and steps on the host.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == "adamw8bit":
        library = require("bitsandbytes", "quantized")
        made = library.optim.AdamW8bit(
            parameters, lr=lr, betas=BETAS, eps=EPSILON, weight_decay=0.0
        )
        assert isinstance(made, torch.optim.Optimizer)
        return made
    if name == "adamw-host":
        return MasterAdamW(parameters, lr, torch.device("cpu"))
    if any(p.dtype != torch.float32 for p in parameters):
        return MasterAdamW(parameters, lr)
    return torch.optim.AdamW(
        parameters,
        lr=lr,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=0.0,
        fused=all(p.device.type in FUSED for p in parameters),
    )


def state_bytes(name: OptimizerName, dtype: torch.dtype, device: torch.device) -> float:
    """Return what the optimizer holds on `device` of one weight of `dtype` there, in bytes."""
    if name == "adamw-host" and device.type != "cpu":
        return 0.0
    if name == "adamw8bit":
        return 2.0
    return 8.0 if dtype == torch.float32 else 12.0


def gradient_bytes(dtype: torch.dtype, *, added_up: bool) -> float:
    """Return what the gradient of one weight of `dtype` takes in an update, in bytes.

    Args:
        dtype: of the weight.
        added_up: whether the update has several micro-batches: see `widen_gradients`.
    """
    return float(max(dtype.itemsize, 4) if added_up else dtype.itemsize)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose moments, and a copy of the weights, are float32, on a device that may differ.

    The weights are that copy rounded to their dtype, so no update is lost to rounding. A float32
    weight on that device needs no copy. Weights are updated in lists of `AT_ONCE`. Where
    that device is the host and the weights are on a GPU, a step moves the gradients of a list down,
    one list ahead of the step, and its weights up: gradients and weights cross the bus once an
    update, and the step itself takes as long as the host's memory needs to read and write 28 bytes
    a weight.

    Attributes:
        home: device of moments and copies; None: that of each weight.
        factor: what the gradients are multiplied by in the next step, in float32; None: nothing.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, home: torch.device | None = None
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.home = home
        self.factor: Tensor | None = None

    def home_of(self, parameter: Tensor) -> torch.device:
        """Return where the state of `parameter` is."""
        return self.home or parameter.device

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do one update with the gradients that there are.

        Raises:
            ValueError: a closure is given; the loop computes its gradients itself.
        """
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for parameters, gradients in _one_ahead(_lists(trained), self.home_of):
                self._update(parameters, gradients, group["lr"])
        self.factor = None

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        states = [self._state(parameter) for parameter in parameters]
        masters = [state.get("master", p) for state, p in zip(states, parameters, strict=True)]
        if self.factor is not None:
            torch._foreach_mul_(gradients, self.factor.to(gradients[0].device))
        adamw(
            masters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=masters[0].device.type in FUSED,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )
        pairs = zip(parameters, masters, strict=True)
        _round_into([pair for pair in pairs if pair[0] is not pair[1]])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        home = self.home_of(parameter)
        if not state:
            if parameter.dtype != torch.float32 or parameter.device != home:
                state["master"] = parameter.detach().to(home, torch.float32, copy=True)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=home)
            on = home.type in FUSED
            state["step"] = torch.zeros((), dtype=torch.float32, device=home if on else "cpu")
        return state


def _lists(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Part weights into lists of one device and at most `AT_ONCE` numbers, a larger one alone."""
    for each in _by_place(parameters):
        taken, size = list[Tensor](), 0
        for parameter in each:
            if taken and size + parameter.numel() > AT_ONCE:
                yield taken
                taken, size = [], 0
            taken.append(parameter)
            size += parameter.numel()
        yield taken


def _one_ahead(
    lists: Iterable[list[Tensor]], home_of: Callable[[Tensor], torch.device]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield each list of weights with its gradients in float32 at home; the next is on its way."""
    waiting: tuple[list[Tensor], Callable[[], list[Tensor]]] | None = None
    for parameters in lists:
        gradients = [p.grad for p in parameters if p.grad is not None]
        started = parameters, _fetch(gradients, home_of(parameters[0]))
        if waiting:
            yield waiting[0], waiting[1]()
        waiting = started
    if waiting:
        yield waiting[0], waiting[1]()


def _fetch(gradients: list[Tensor], home: torch.device) -> Callable[[], list[Tensor]]:
    """Start to copy gradients home; return what waits for them."""
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
    """Return tensors in float32, those that are so already as they are."""
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
    """Copy float32 weights (second) into the model's, rounded to the nearest, without waiting."""
    if not pairs:
        return
    parameters, masters = map(list, zip(*pairs, strict=True))
    if parameters[0].device.type != "cuda" or masters[0].device.type != "cpu":
        torch._foreach_copy_(parameters, masters)
        return
    for parameter, master in pairs:
        # torch keeps pinned memory until the copies out of it are done.
        host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
        parameter.copy_(host.copy_(master), non_blocking=True)


def widen_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make gradients of lower dtypes float32, before another micro-batch is added to them.

    bfloat16 has 8 bits: a sum of many micro-batches in it loses those that are 256 times smaller. A
    gradient of one micro-batch is left as it was computed and takes no more memory than that.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.dtype.itemsize < 4:
            parameter.grad_dtype = None  # any: autograd then adds to what is there
            parameter.grad = parameter.grad.float()


def clip_gradients(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Scale all gradients down to the norm `most` together; return their norm, float32.

    As `torch.nn.utils.clip_grad_norm_`, with the norm of bfloat16 gradients added up in float32. On
    a CPU, where the norm is at hand, gradients that are short enough are not touched; elsewhere a
    list of gradients is one operation, and nothing waits for the device. `MasterAdamW` scales them
    itself when it has them in float32, so that bfloat16 ones are not rounded again.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    lists = _by_place(p.grad for p in parameters if p.grad is not None)
    norms: list[Tensor] = []
    for each in lists:
        norms += torch._foreach_norm(each, 2, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    if scale.device.type == "cpu" and float(scale) == 1.0:
        return norm
    if isinstance(optimizer, MasterAdamW):
        optimizer.factor = scale
        return norm
    for each in lists:
        torch._foreach_mul_(each, scale)
    return norm


def _by_place(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Part tensors into lists of one device and dtype, as operations on lists want them."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())
