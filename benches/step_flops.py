"""Count the required work of a step, and measure the peak speed of the machine.

    python step_flops.py DEVICE PRECISION THREADS

prints the floating-point operations per second of a large matrix product. Useful work counts each
prompt once, no padding, the head only at completion positions, and no recomputation, so that the
share of the peak (MFU) can be compared between arms.
"""

import json
import sys
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch

TRAINING = 3  # a forward pass, and the gradients of inputs and weights
SIZE = {"cpu": 2_048, "cuda": 8_192}
REPEATS = 10


def body_parameters(config: Any) -> int:
    """Count the weights that multiply each token: projections and MLP of a gated decoder."""
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = width * (2 * queries + 2 * keys) + 3 * width * inner
    return int(config.num_hidden_layers * layer)


def forward_flops(config: Any, prompt: int, completions: Iterable[int], *, shared: bool) -> float:
    """Count the operations of one forward pass over a group.

    Args:
        config: of a Llama or Qwen2.
        prompt: its tokens.
        completions: the tokens of each.
        shared: whether the prompt runs once, or with each completion.
    """
    lengths = list(completions)
    times = 1 if shared else len(lengths)
    tokens = times * prompt + sum(lengths)
    attended = times * prompt**2 / 2 + sum(prompt * c + c**2 / 2 for c in lengths)
    width = (getattr(config, "head_dim", None) or 0) * config.num_attention_heads
    attention = 4 * (width or config.hidden_size) * config.num_hidden_layers * attended
    head = 2 * config.vocab_size * config.hidden_size * sum(lengths)
    return float(2 * body_parameters(config) * tokens + attention + head)


def useful_flops(config: Any, pairs: Iterable[tuple[int, int, int]]) -> float:
    """Count the operations of training on pairs of (prompt, chosen, rejected) tokens."""
    return TRAINING * sum(
        forward_flops(config, prompt, sides, shared=True) for prompt, *sides in pairs
    )


def measured_peak(device: str, precision: str) -> float:
    """Return the operations per second of a square matrix product, the best of several runs."""
    size, kind = SIZE[device], torch.float32 if precision == "fp32" else torch.bfloat16
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        start = perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best


def main() -> None:
    """Print the peak."""
    device, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measured_peak(device, precision)))


if __name__ == "__main__":
    main()
