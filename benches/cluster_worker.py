"""One rank of bench_cluster.py: real updates of a small Llama by DDP or FSDP2 over gloo.

    python benches/cluster_worker.py SPEC.json RANK

FSDP2 wraps each decoder layer, and a root whose forward is the loss: it holds embedding and head.
Gradients are sums over the ranks: see `Passes`. DDP wraps the same root.
"""

import json
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from logratio._rust import Store, StoreWriter
from logratio.data.feed import FeedSettings, lay_out, micro_batches
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Part, to_torch
from logratio.logps.completion import completion_loss, transformer
from logratio.training.activations import decoder_layers


class Passes(nn.Module):
    """A module whose forward is the loss of a micro-batch, so that its hooks see every weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, share: float) -> Tensor:
        """Return the share of a micro-batch in the loss of its update."""

        def loss_of(logps: Tensor, part: Part) -> Tensor:
            margins = part.targets.sums(logps).view(-1, 2)
            return -logsigmoid(0.1 * (margins[:, 0] - margins[:, 1])).sum() * share

        return completion_loss(self.model, batch, loss_of)


def store_of(lengths: list[list[int]]) -> Store:
    """Make the groups of a bench, with random ids: prompt, chosen, rejected."""
    drawn, writer = np.random.default_rng(0), StoreWriter()
    for line, (prompt, *completions) in enumerate(lengths):
        total = sum(completions)
        ids = drawn.integers(1, 1000, prompt + total, dtype=np.int32)
        sizes = np.array(completions, np.uint32)
        roles = np.arange(len(completions), dtype=np.uint8)
        mask = np.ones(total, np.uint8)
        writer.push(ids[:prompt].copy(), ids[prompt:].copy(), mask, sizes, roles, 0, line)
    return writer.finish()


def sharded(model: nn.Module, ranks: int) -> nn.Module:
    """Shard each layer, and the rest as the root."""
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    root = Passes(model)
    fully_shard(root, mesh=mesh)  # in place
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return root


def main(spec: dict[str, Any], rank: int) -> dict[str, list[float]]:
    """Run the updates, and return the seconds of each by two clocks."""
    ranks, mode = spec["ranks"], spec["mode"]
    torch.set_num_threads(spec["threads"])
    if ranks > 1:
        dist.init_process_group("gloo", init_method=spec["meeting"], rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["model"]))
    store = store_of(spec["lengths"])
    settings = FeedSettings(groups_per_update=spec["batch"], token_budget=spec["tokens"])
    plans = [settings.plan(store, 0, one, ranks) for one in range(ranks)]
    root: Any = Passes(model)
    if mode == "ddp" and ranks > 1:
        root = DistributedDataParallel(root)
    elif mode == "fsdp":
        root = sharded(model, ranks)
    parameters = list(root.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    seconds: dict[str, list[float]] = {"wall": [], "cpu": []}
    with shared_prompts(transformer(model)):
        for update in range(spec["updates"]):
            if ranks > 1:
                dist.barrier()
            start, busy = perf_counter(), process_time()
            micros = [micro_batches(plan, update) for plan in plans]
            rounds = max(map(len, micros))
            for number in range(rounds):
                if mode == "ddp" and ranks > 1:
                    root.require_backward_grad_sync = number + 1 == rounds
                elif mode == "fsdp":  # so small gradients stay whole, as in a run
                    root.set_requires_gradient_sync(number + 1 == rounds)
                # A rank that has nothing left takes part with a batch that does not count.
                has_more = number < len(micros[rank])
                groups = micros[rank][number] if has_more else micros[rank][0][:1]
                batch = to_torch(lay_out(store, groups), torch.device("cpu"))
                root(batch, has_more / spec["batch"]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds["wall"].append(perf_counter() - start)
            seconds["cpu"].append(process_time() - busy)
    if ranks > 1:
        dist.destroy_process_group()
    return seconds


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    done = main(given, int(sys.argv[2]))
    Path(f"{sys.argv[1]}.{sys.argv[2]}").write_text(json.dumps(done))
