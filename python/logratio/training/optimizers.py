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


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose moments, and a copy of the weights, are float32 in a place of their own.

    The weights are that copy rounded to their dtype, so no update is lost to rounding. A float32
    weight that lies in that place is its own copy. Where the place is the host and the weights are
    on a GPU, a step moves each gradient down, one ahead of the step, and each weight up: twice the
    weights' bytes over the bus an update, and the step itself takes as long as the host's memory
    needs to read and write 28 bytes a weight.

    Attributes:
        home: where moments and copies are; None: beside each weight.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, home: torch.device | None = None
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.home = home

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
            for parameter, gradient in _one_ahead(trained, self.home_of):
                self._update(parameter, gradient, group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        state = self._state(parameter)
        master = state.get("master", parameter)
        adamw(
            [master],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=master.device.type in FUSED,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )
        if master is not parameter:
            _round_into(parameter, master)

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


def _one_ahead(
    parameters: Sequence[Tensor], home_of: Callable[[Tensor], torch.device]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each weight with its gradient in float32 at home; the next one is on its way."""
    waiting: tuple[Tensor, Callable[[], Tensor]] | None = None
    for parameter in parameters:
        assert parameter.grad is not None
        started = parameter, _fetch(parameter.grad, home_of(parameter))
        if waiting:
            yield waiting[0], waiting[1]()
        waiting = started
    if waiting:
        yield waiting[0], waiting[1]()


def _fetch(gradient: Tensor, home: torch.device) -> Callable[[], Tensor]:
    """Start to copy a gradient home; return what waits for it."""
    if gradient.device.type != "cuda" or home.type != "cpu":
        return lambda: gradient.to(home, torch.float32)
    host = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
    host.copy_(gradient, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(gradient.device))

    def arrived() -> Tensor:
        done.synchronize()
        return host.float()

    return arrived


def _round_into(parameter: Tensor, master: Tensor) -> None:
    """Copy the float32 weights into the model's, rounded to the nearest, without waiting."""
    if parameter.device.type != "cuda" or master.device.type != "cpu":
        parameter.copy_(master)
        return
    # torch keeps pinned memory until the copies out of it are done.
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
    parameter.copy_(host.copy_(master), non_blocking=True)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients down to the norm `most` together; return their norm, float32.

    As `torch.nn.utils.clip_grad_norm_`, with the norm of bfloat16 gradients added up in float32. On
    a CPU, where the norm is at hand, gradients that are short enough are not touched; elsewhere a
    list of gradients is one operation, and nothing waits for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    lists = _by_place(gradients)
    norms: list[Tensor] = []
    for each in lists:
        norms += torch._foreach_norm(each, 2, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    if scale.device.type == "cpu" and float(scale) == 1.0:
        return norm
    for each in lists:
        torch._foreach_mul_(each, scale)
    return norm


def _by_place(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Part tensors into lists of one device and dtype, as operations on lists want them."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())
