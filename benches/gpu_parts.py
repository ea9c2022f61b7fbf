"""Parts of a training step for `gpu.py`; each result is printed as a JSON line immediately.

    python benches/gpu_parts.py layers|attention|tiles [--device cpu] [--tiny]
    python benches/gpu_parts.py layers --count 32 --arms lora
    python benches/gpu_parts.py layers --count 32 --arms plain --checkpointed 32

`layers`: one update of 8 layers with the sizes of Llama 3 8B, weights made on the device: plain,
compiled, with adapters. 32 layers are the whole model. `attention`: each kernel, forward and
backward, on pairs, on long prompts and on many completions, at 8k and 16k tokens. `tiles`: time of
the head per position, by the size of a tile of logits, with three vocabularies. `mfu` is the
required work relative to the speed of a matrix product measured in the same run.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gpu_steps import say
from step_flops import forward_flops, measured_peak
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, LlamaConfig

from logratio.logps.attention import SharedPrompt, SharedPromptError, shared_prompts, use_kernel
from logratio.logps.attention.interface import shared_prompt_attention
from logratio.logps.attention.kernels import KERNELS, Kernel
from logratio.logps.batch import Part, SharedBatch
from logratio.logps.completion import Group, batch_of, completion_loss, transformer
from logratio.logps.head import Head, Tile, Transform
from logratio.training import LoraSettings
from logratio.training.activations import LayerOptions, layer_options
from logratio.training.config import Precision
from logratio.training.lora import with_lora
from logratio.training.models import autocast
from logratio.training.optimizers import AdamSettings, make_optimizer

PRECISION: Precision = "bf16-weights"
PAIRS = 16
BETA = 0.1


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of each completion, and how many such groups 8,192 tokens hold."""

    prompt: int
    completions: tuple[int, ...]
    groups: int


ROWS = {
    "pairs": Lengths(256, (128, 128), 16),
    "long prompts": Lengths(1_536, (256, 256), 4),
    "eight completions": Lengths(512, (192,) * 8, 4),
}
HEADS = {"llama 3 8B": (32, 8, 128), "qwen2 0.5B": (14, 2, 64)}
VOCABULARIES = {
    "llama 3 8B": (128_256, 4_096),
    "qwen2 0.5B": (151_936, 896),
    "gemma 2 2B": (256_000, 2_304),
}
TILES = (27, 28, 29, 30)
"""Logits of a tile, as powers of two."""
POSITIONS = 8_192


def seconds(run: Callable[[], object], device: str, times: int = 5) -> float:
    """Return the median time of a run, after two warm-up runs."""
    taken = []
    for number in range(times + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            taken.append(perf_counter() - start)
    return median(taken)


def groups_of(lengths: Lengths, times: int, vocabulary: int) -> list[Group]:
    """Draw groups of these lengths, `times` as many as fill 8,192 tokens."""
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return random.integers(0, vocabulary, count).tolist()  # type: ignore[no-any-return]

    count = lengths.groups * times
    return [(ids(lengths.prompt), [ids(n) for n in lengths.completions]) for _ in range(count)]


def batch_on(device: str, groups: list[Group]) -> SharedBatch:
    """Lay out groups in one row, with the arrays that the device's kernels need."""
    batch = batch_of(groups, "shared", device)
    assert isinstance(batch, SharedBatch)
    return batch


def layers(options: argparse.Namespace) -> None:
    """Train some layers of an 8B model."""
    sizes: dict[str, Any] = {"hidden_size": 4_096, "intermediate_size": 14_336, "head_dim": 128}
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8}
    vocabulary, lengths, count = 128_256, ROWS["pairs"], options.count or 8
    if options.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        vocabulary, lengths, count = 512, Lengths(8, (4, 4), 2), options.count or 2
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=count, **sizes, **heads)
    groups = groups_of(lengths, 1, vocabulary)
    peak = 1e12 if options.tiny else measured_peak(options.device, PRECISION)
    say(what="matrix product", tflops=peak / 1e12)
    about = {"what": "layers", "count": count, "checkpointed": options.checkpointed}
    for name in options.arms:
        kept = LayerOptions(options.checkpointed, compiled=name == "compiled")
        try:
            model = _made(config, options.device, adapters=name == "lora")
            found = _update(model, groups, options.device, kept)
        except Exception as error:  # continue with the others
            say(**about, arm=name, failure=f"{type(error).__name__}: {error}"[:300])
            continue
        flops = sum(forward_flops(config, len(p), map(len, c), shared=True) for p, c in groups)
        flops *= 2 if name == "lora" else 3  # frozen weights have no gradients
        say(**about, arm=name, mfu=flops / found["seconds"] / peak, **found)
        del model


def _made(config: LlamaConfig, device: str, *, adapters: bool) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    return with_lora(model, LoraSettings(), Path(tempfile.gettempdir())) if adapters else model


def _update(
    model: nn.Module, groups: list[Group], device: str, kept: LayerOptions
) -> dict[str, Any]:
    """Time an update's two halves; the peak is above the weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, batch = (
        make_optimizer("adamw", weights, AdamSettings(1e-6)),
        batch_on(device, groups),
    )

    def loss_of(logps: Tensor, part: Part) -> Tensor:
        better, worse = part.targets.sums(logps).view(-1, 2).unbind(1)
        return -logsigmoid(BETA * (better - worse)).sum() / len(groups)

    def backward() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(PRECISION, torch.device(device)):
            loss = completion_loss(model, batch, loss_of)
        loss.backward()

    counters.clear()
    start = perf_counter()
    with shared_prompts(transformer(model)), layer_options(model, kept):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        backward()
        first = perf_counter() - start
        taken = seconds(backward, device)
    stepped = seconds(optimizer.step, device, times=2)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    breaks = sum(counters["graph_break"].values())  # 0 if the attention is inside the graphs
    found = {"seconds": taken, "first": first, "optimizer": stepped, "peak": peak}
    return found | {"graph_breaks": breaks} if kept.compiled else found


def attention(options: argparse.Namespace) -> None:
    """Time every kernel on rows of several kinds."""
    rows = {"pairs": Lengths(5, (3, 2), 2)} if options.tiny else ROWS
    cases = {"tiny": (4, 2, 16)} if options.tiny else HEADS
    for case, heads in cases.items():
        for times in (1, 2):
            for row, lengths in rows.items():
                batch = batch_on(options.device, groups_of(lengths, times, 500))
                for kernel in KERNELS[: None if options.tiny else -1]:
                    found = _timed(kernel, heads, batch, options.device)
                    tokens = batch.input_ids.numel()
                    say(
                        what="attention", heads=case, row=row, tokens=tokens, kernel=kernel, **found
                    )


def _timed(
    kernel: Kernel, heads: tuple[int, int, int], batch: SharedBatch, device: str
) -> dict[str, Any]:
    """Time one layer's attention, forward alone and with its backward pass."""
    many, kv, size = heads
    tokens, dtype = batch.input_ids.shape[1], torch.bfloat16
    query, key, value = states = [
        torch.randn(1, tokens, n, size, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (many, kv, kv)
    ]

    def forward() -> Tensor:
        with use_kernel(kernel):
            shared = SharedPrompt(batch)
        attend = partial(shared_prompt_attention, nn.Identity(), query, key, value, None)
        return attend(shared_prompt=shared)[0]

    try:
        upstream = torch.randn_like(forward())
        both = seconds(lambda: torch.autograd.grad(forward(), states, upstream), device)
        with torch.no_grad():
            return {"forward": seconds(forward, device), "both": both}
    except SharedPromptError as error:
        return {"refused": str(error)[:300]}
    except Exception as error:  # a kernel that fails here is a result
        return {"failure": f"{type(error).__name__}: {error}"[:300]}


def tiles(options: argparse.Namespace) -> None:
    """Time tiles of logits, with both gradients of the head."""
    shapes = {"tiny": (300, 16)} if options.tiny else VOCABULARIES
    powers, positions = ((10, 11), 16) if options.tiny else (TILES, POSITIONS)
    for name, (vocabulary, width) in shapes.items():
        for power in powers:
            rows = min(positions, 2**power // vocabulary)
            try:
                taken = _tile_seconds(vocabulary, width, rows, options.device)
            except torch.OutOfMemoryError:
                say(what="tile", head=name, elements=power, failure="out of memory")
                continue
            products = 6 * vocabulary * width * rows  # logits, and the gradients of both
            say(
                what="tile",
                head=name,
                elements=power,
                rows=rows,
                microseconds_a_row=taken / rows * 1e6,
                tflops=products / taken / 1e12,
            )


def _tile_seconds(vocabulary: int, width: int, rows: int, device: str) -> float:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight, hidden = (torch.randn(n, width, device=device, dtype=dtype) for n in (vocabulary, rows))
    targets = torch.randint(vocabulary, (rows,), device=device)
    factors = torch.rand(rows, device=device)
    total = torch.zeros(vocabulary, width, device=device)
    head = Head(weight, None, Transform())

    def run() -> None:
        with torch.no_grad(), Tile(head, hidden, targets) as tile:
            tile.hidden_gradient(factors)
            tile.add_head_gradient(factors, total, None)

    return seconds(run, device)


ARMS = ("plain", "compiled", "lora")
PARTS = {"layers": layers, "attention": attention, "tiles": tiles}


def main(given: Iterable[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--count", type=int, help="layers; default 8, or 2 with --tiny")
    parser.add_argument("--checkpointed", type=int, default=0, help="layers computed twice")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="of layers")
    options = parser.parse_args(None if given is None else list(given))
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
