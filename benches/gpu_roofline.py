"""Count the operations and bytes of a micro-batch on a GPU, and the time that they need.

    python benches/gpu_roofline.py [--models 0.5B 1.5B 8B] [--results benches/results]

No GPU is used. Forward and backward pass of the layers run on tensors without values (the "meta"
device) with the operators of CUDA's attention, and a tile of the head on fake CUDA tensors. A mode
counts the operations of products, and the bytes that every other operation reads and writes. The
batch is 16 pairs with prompts of 256 and completions of 128 tokens: 8,192 tokens, one micro-batch
under `bf16-weights`. The speeds are assumptions (`SPEEDS`), none of them measured, so the result is
a bound: waits of the host, launches and the optimizer come on top.

`compiled` traces the layers as torch.compile does, and lets the operations between two products
read what comes from outside and write what is used outside once: what perfect fusion would move.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from step_flops import forward_flops
from step_models import MODELS
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from logratio.logps import completion
from logratio.logps.attention import fused, shared_prompts
from logratio.logps.attention.kernels import Choice
from logratio.logps.batch import Batch, shape_for
from logratio.logps.completion import batch_of, target_states, transformer
from logratio.logps.head import ON_GPU, Head, Tile, Transform
from logratio.training import LoraSettings, activations
from logratio.training.activations import LayerOptions, layer_options
from logratio.training.bfloat16 import with_bfloat16_adapters
from logratio.training.lora import with_lora

PAIRS, PROMPT, ANSWER = 16, 256, 128
TERA = 1e12
PEAK = 990 * TERA
"""Operations per second of an H200 in bfloat16, by its data sheet."""
SPEEDS = {"0.5B": 450 * TERA, "1.5B": 560 * TERA, "8B": 680 * TERA}
"""Operations per second of products, by the width of the model."""
ATTENTION, MEMORY = 250 * TERA, 4 * TERA
"""Operations per second of FlashAttention-2, and bytes per second of the memory."""
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0}
"""Products, and the place of their left matrix."""
FLASH = ("_varlen_attn", "_flash_attention")
FREE = ("empty", "detach", "alias", "sym_")
FILLING = ("zeros", "ones", "full")
SELECTING = ("index_select", "gather", "embedding")
SCATTERING = ("scatter", "index_copy", "index_add")


@dataclass
class Work:
    """What a part of a micro-batch needs: operations of products, bytes of all other operations."""

    products: float = 0
    moved: float = 0

    def add(self, name: str, given: Any, out: Any) -> None:
        """Count an operation by its name, its arguments and its results."""
        if name in PRODUCTS:
            left, right = given[0][PRODUCTS[name] :][:2]
            self.products += 2.0 * left.numel() * right.shape[-1]
            if name == "aten::addmm" and given[0][0].dim() > 1:  # a sum that is added to
                self.moved += 2.0 * given[0][0].nbytes
        elif not any(kernel in name for kernel in FLASH):
            self.moved += _moved(name, _large(given), _large(out))


def _moved(name: str, read: list[Tensor], wrote: list[Tensor]) -> float:
    """Return the bytes that an operation reads and writes."""
    results = sum(map(_bytes, wrote))
    if any(part in name for part in FREE):
        return 0.0
    if any(part in name for part in FILLING):
        return results
    if any(part in name for part in SCATTERING):  # into the places of the last argument only
        return 3 * _bytes(read[-1])
    if any(part in name for part in SELECTING) and "backward" not in name:
        return 2 * results
    if name == "aten::copy_":
        return _bytes(read[1]) + results
    return sum(map(_bytes, read)) + results


def _large(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.numel() > 1]


def _bytes(tensor: Tensor) -> float:
    """Return the bytes of a tensor; an axis that is expanded is read once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in pairs:
        count *= int(size) if stride else 1
    return float(count * tensor.itemsize)


class Counting(TorchDispatchMode):
    """Adds up the work of every operation in the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.work.add(func._schema.name, (args, {}), out)
        return out


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let the meta device take the ways of CUDA, as tests/python/logps/test_host_waits.py does."""
    changes = (
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
        patch.object(completion, "shape_for", lambda *_: shape_for("shared", "cuda")),
        patch.object(fused, "choose", lambda *_: Choice("varlen", ())),
        patch.object(fused, "_dtype", lambda states: states.dtype),
    )
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def layers_work(config: PreTrainedConfig, *, adapters: bool, pairs: int = PAIRS) -> Work:
    """Count the work of the layers and the embedding, forward and backward."""
    model = _made(config, adapters=adapters)
    with _as_on_a_gpu(), shared_prompts(transformer(model)):
        batch, counting = _batch(pairs), Counting()
        with counting:
            target_states(transformer(model), batch).sum().backward()
    return counting.work


def compiled_work(config: PreTrainedConfig, *, pairs: int = PAIRS) -> Work:
    """Count the work of the decoder layers alone, traced and perfectly fused."""
    found, model = list[Work](), _made(config, adapters=False)

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        work = fused_work(graph.graph)

        def run(*given: Any) -> object:
            found.append(work)
            return graph(*given)

        boxed: Callable[..., object] = make_boxed_func(run)
        return boxed

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compiler.reset()
    with (
        _as_on_a_gpu(),
        patch.object(activations, "_compiled", partial(torch.compile, backend=backend)),
        shared_prompts(transformer(model)),
        layer_options(model, LayerOptions(compiled=True)),
    ):
        target_states(transformer(model), _batch(pairs)).sum().backward()
    torch.compiler.reset()
    return Work(sum(one.products for one in found), sum(one.moved for one in found))


def fused_work(graph: torch.fx.Graph) -> Work:
    """Count a graph in which the operations between products are fused.

    Regions are connected operations that are neither products nor attention. A region reads each
    tensor that it did not make once, and writes each of its tensors that is used outside once.
    """
    regions, work = Regions(), Work()
    for node in graph.nodes:
        name = _name(node)
        if name in PRODUCTS:
            values = [x.meta["val"] for x in node.all_input_nodes]
            work.add(name, (values, {}), None)
        regions.take(node, is_fused=name is not None and not _is_barrier(name))
    work.moved += regions.moved()
    return work


def _name(node: torch.fx.Node) -> str | None:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema and node.op == "call_function" else None


def _is_barrier(name: str) -> bool:
    return name in PRODUCTS or any(kernel in name for kernel in FLASH)


class Regions:
    """Connected operations of a graph, and the tensors that enter and leave them."""

    def __init__(self) -> None:
        self._region: dict[torch.fx.Node, int] = {}
        self._base: dict[torch.fx.Node, torch.fx.Node] = {}
        self._uses: list[tuple[torch.fx.Node, torch.fx.Node]] = []

    def take(self, node: torch.fx.Node, *, is_fused: bool) -> None:
        """Add the next node; a view stands for the tensor that it shows."""
        inputs = [self._base[x] for x in node.all_input_nodes]
        is_view = node.target is getitem or getattr(node.target, "is_view", False)
        self._base[node] = inputs[0] if is_view and node.target is not getitem else node
        if is_view and node.target is not getitem:
            return
        if is_fused:
            self._region[node] = len(self._region)
            for other in {self._region[x] for x in inputs if x in self._region}:
                own = self._region[node]
                for member, region in self._region.items():
                    if region == own:
                        self._region[member] = other
        self._uses += [(x, node) for x in inputs if node.target is not getitem]

    def moved(self) -> float:
        """Return the bytes that enter and leave the regions."""
        reads, writes = set[tuple[torch.fx.Node, int]](), set[torch.fx.Node]()
        for made, used in self._uses:
            inside, outside = self._region.get(used), self._region.get(made)
            if inside is not None and inside != outside:
                reads.add((made, inside))
            if outside is not None and inside != outside:
                writes.add(made)
        tensors = [made for made, _ in reads] + list(writes)
        return sum(_bytes(x) for node in tensors for x in _large(node.meta.get("val")))


def head_work(config: PreTrainedConfig, *, frozen: bool, pairs: int = PAIRS) -> Work:
    """Count the work of all tiles of the head, with their gradients, on fake CUDA tensors."""
    positions, vocabulary = 2 * pairs * ANSWER, config.vocab_size
    rows = ON_GPU[1] // vocabulary
    with FakeTensorMode(), torch.no_grad():
        weight, hidden = (
            torch.empty(n, config.hidden_size, device="cuda", dtype=torch.bfloat16)
            for n in (vocabulary, rows)
        )
        targets = torch.empty(rows, dtype=torch.int64, device="cuda")
        factors = torch.empty(rows, device="cuda")
        total = torch.empty(weight.shape, device="cuda")
        counting = Counting()
        with counting, Tile(Head(weight, None, Transform()), hidden, targets) as tile:
            tile.hidden_gradient(factors)
            if not frozen:
                tile.add_head_gradient(factors, total, None)
    times = positions / rows
    return Work(times * counting.work.products, times * counting.work.moved)


def _made(config: PreTrainedConfig, *, adapters: bool) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        if adapters:
            model = with_lora(model, LoraSettings(), Path(tempfile.gettempdir()))
            with_bfloat16_adapters(model)
            transformer(model).enable_input_require_grads()
    return model


def _batch(pairs: int) -> Batch:
    group = ([3] * PROMPT, [[4] * ANSWER, [5] * ANSWER])
    return batch_of([group] * pairs, "shared", "meta")


def attention_seconds(config: PreTrainedConfig, pairs: int = PAIRS) -> float:
    """Return the time of attention: a backward pass has 2.5 times the operations of a forward."""
    width = (getattr(config, "head_dim", None) or 0) * config.num_attention_heads
    width = width or config.hidden_size
    attended = PROMPT**2 / 2 + 2 * (PROMPT * ANSWER + ANSWER**2 / 2)
    done = 4 * width * config.num_hidden_layers * attended * pairs
    return float(3.5 * done / ATTENTION)


def sized(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config with another number of layers."""
    values = config.to_dict() | {"num_hidden_layers": layers}
    if kinds := values.get("layer_types"):
        values["layer_types"] = kinds[:1] * layers
    return type(config).from_dict(values)


def roofline(
    config: PreTrainedConfig, speed: float, arm: str, pairs: int = PAIRS
) -> dict[str, float]:
    """Return the milliseconds of each part, and MFU.

    Args:
        config: sizes of the model.
        speed: operations per second of products.
        arm: "full", "compiled" or "lora".
        pairs: pairs of the micro-batch.
    """
    is_lora, count = arm == "lora", config.num_hidden_layers
    rest = layers_work(sized(config, 0), adapters=False, pairs=pairs)
    one = layers_work(sized(config, 1), adapters=is_lora, pairs=pairs)
    layer = Work(one.products - rest.products, one.moved - rest.moved)
    if arm == "compiled":
        layer = compiled_work(sized(config, 1), pairs=pairs)
    head = head_work(config, frozen=is_lora, pairs=pairs)
    if is_lora:
        rest = Work()  # a frozen embedding has no gradient
    parts = {
        "products": count * layer.products / speed,
        "attention": attention_seconds(config, pairs),
        "element-wise": (rest.moved + count * layer.moved) / MEMORY,
        "head": head.products / speed + head.moved / MEMORY,
    }
    total = sum(parts.values())
    flops = forward_flops(config, PROMPT, (ANSWER, ANSWER), shared=True) * pairs
    flops *= 2 if is_lora else 3
    return {name: 1e3 * value for name, value in parts.items()} | {
        "total": 1e3 * total,
        "mfu": flops / total / PEAK,
    }


def llama_8b() -> LlamaConfig:
    """Return the sizes of Llama 3 8B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4_096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )


def main(given: Iterable[str] | None = None) -> None:
    """Print a row for each model and arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=SPEEDS, default=list(SPEEDS))
    parser.add_argument("--results", type=Path, help="folder of roofline.jsonl")
    options = parser.parse_args(None if given is None else list(given))
    rows = []
    for name in options.models:
        config = llama_8b() if name == "8B" else MODELS[name]()
        for arm in ("full", "compiled", "lora"):
            found = roofline(config, SPEEDS[name], arm)
            rows.append({"model": name, "arm": arm} | {k: round(v, 3) for k, v in found.items()})
            print(json.dumps(rows[-1]), flush=True)
    if options.results:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.results / "roofline.jsonl").write_text(text)


if __name__ == "__main__":
    main()
