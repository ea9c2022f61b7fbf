"""Shard a model over processes with FSDP2, without a whole copy in any process but the first.

Every decoder layer is a group whose weights are gathered for its pass and freed after it. The rest
(embedding, last norm, head) belongs to the root. The head's gradients are made by hand from its
whole weight (see `logps.head_loss`), so the pass over body and head must run inside the root's
forward: `completion.inside` does that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from logratio.logps.completion import ENTRANCE, transformer
from logratio.training.activations import decoder_layers
from logratio.training.parallel.processes import Processes


def mesh_of(processes: Processes, device: torch.device, *, hybrid: bool) -> DeviceMesh:
    """Return the mesh: one dimension of shards, or hosts by shards.

    Args:
        processes: The processes.
        device: Device of this process.
        hybrid: Shard within each host, and replicate across hosts (HSDP).
    """
    if not hybrid:
        return init_device_mesh(device.type, (processes.count,), mesh_dim_names=("shard",))
    shape = processes.hosts, processes.per_host
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def load_sharded(
    build: Callable[[str], nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    *,
    first: bool,
    autocast: bool,
) -> nn.Module:
    """Build a model that is sharded over `mesh`.

    Args:
        build: Builds the model on the device that it is given: "cpu", or "meta" without weights.
        mesh: The processes.
        device: Device of the shards.
        first: Whether this process loads the weights, once, into host memory.
        autocast: Whether passes compute under autocast to bfloat16; layers are then gathered in
            bfloat16. Gradients are always summed in float32 or wider.
    """
    whole = dict(_tensors(build("cpu"))) if first else {}
    with parameters_on_meta():
        model = build("meta")
    shard(model, mesh, autocast=autocast)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, whole.pop(name, None), mesh)
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def _fill(parameter: nn.Parameter, whole: torch.Tensor | None, mesh: DeviceMesh) -> None:
    """Copy this process's part of `whole`, which only the first process has."""
    assert isinstance(parameter, DTensor)
    here = parameter.device
    if whole is None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=here)
    spread = distribute_tensor(whole.to(here, parameter.dtype), mesh, parameter.placements)
    parameter.to_local().copy_(spread.to_local())


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are created inside the block have parameters without memory.

    Buffers are real: rotary frequencies, for example, are not stored in checkpoints.
    """
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            wanted = parameter.requires_grad
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), wanted)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def shard(model: nn.Module, mesh: DeviceMesh, *, autocast: bool) -> None:
    """Shard a model in place: every decoder layer, then the rest."""
    low = torch.bfloat16 if autocast else None
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=_policy(layer, low))
    root = transformer(model)
    fully_shard(root, mesh=mesh, mp_policy=_policy(root, None))
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # an update's gradient is a sum
            part.set_force_sum_reduction_for_comms(True)
    setattr(root, ENTRANCE, lambda job, *given: job(*given))
    register_fsdp_forward_method(root, ENTRANCE)


def _policy(module: nn.Module, low: torch.dtype | None) -> MixedPrecisionPolicy:
    dtypes = {p.dtype for p in module.parameters()}
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=widest, cast_forward_inputs=False)
