"""The roofline counts what an update computes and moves."""

import pytest
import torch
from gpu_roofline import ANSWER, PROMPT, Counting, fused_work, head_work, layers_work, roofline
from step_flops import body_parameters
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PAIRS = 2
TOKENS = PAIRS * (PROMPT + 2 * ANSWER)


def test_products_are_those_of_the_formula() -> None:
    work = layers_work(CONFIG, adapters=False, pairs=PAIRS)
    assert work.products == 3 * 2 * body_parameters(CONFIG) * TOKENS
    head = head_work(CONFIG, frozen=False, pairs=PAIRS)
    assert head.products == pytest.approx(3 * 2 * 512 * 64 * 2 * PAIRS * ANSWER)


def test_a_frozen_base_has_no_gradients_of_weights() -> None:
    full, adapted = (layers_work(CONFIG, adapters=on, pairs=PAIRS) for on in (False, True))
    ends = 64 + 64, 64 + 32, 64 + 32, 64 + 64, *[64 + 96] * 3  # of q, k, v, o and the MLP
    adapters = 2 * 16 * sum(ends)  # layers, rank
    assert adapted.products == (2 * 2 * body_parameters(CONFIG) + 3 * 2 * adapters) * TOKENS
    assert adapted.moved > full.moved
    frozen = head_work(CONFIG, frozen=True, pairs=PAIRS)
    assert frozen.products == pytest.approx(2 * 2 * 512 * 64 * 2 * PAIRS * ANSWER)


def test_bytes_of_operations_are_read_and_written() -> None:
    values, other = (torch.empty(8, 4, device="meta") for _ in range(2))
    rows = torch.empty(2, dtype=torch.int64, device="meta")
    with Counting() as counting:
        values.add(other)  # 3 of 128 bytes
        values.view(4, 8).t()  # nothing
        values.index_select(0, rows)  # 32 bytes, read and written
        values.new_zeros(8, 4)  # 128 bytes
        values.copy_(other)  # 2 of 128 bytes
    assert counting.work.moved == 3 * 128 + 2 * 32 + 128 + 2 * 128


def test_fused_operations_move_what_crosses_between_products() -> None:
    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (x * 2).sigmoid() + x  # reads x once, writes its result once
        return (y @ w).relu()  # reads the product, writes its result

    given = [torch.empty(4, 4, device="meta") for _ in range(2)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(*given).graph
    work = fused_work(graph)
    assert work.products == 2 * 4 * 4 * 4
    assert work.moved == 4 * 64


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_fused_layers_move_less() -> None:
    full, compiled = (roofline(CONFIG, 1e14, arm, PAIRS) for arm in ("full", "compiled"))
    assert compiled["element-wise"] < full["element-wise"]
    assert compiled["products"] == full["products"]
    assert 0 < full["mfu"] < compiled["mfu"] < 1
