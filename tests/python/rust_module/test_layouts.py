"""Every array of both layouts equals the oracle's, also in a reused buffer."""

import gc
import pickle

import layout_oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_oracle import Group, Options, store_of
from random_groups import random_groups
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from logratio.data.feed import BufferPool, lay_out
from logratio.logps.attention import SharedPrompt
from logratio.logps.attention.interface import shared_prompt_attention
from logratio.logps.batch import SharedBatch, _Tensors, to_torch
from logratio.logps.completion import score

tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=7)
completions = st.builds(
    lambda ids, seed, role: (ids, [seed >> at & 1 for at in range(len(ids))], role),
    tokens,
    st.integers(0, 127),
    st.integers(0, 4),
)
groups_of_ids = st.tuples(tokens, st.lists(completions, min_size=1, max_size=4))
batches = st.lists(groups_of_ids, min_size=1, max_size=6).flatmap(
    lambda groups: st.tuples(
        st.just(groups), st.lists(st.integers(0, len(groups) - 1), min_size=0, max_size=5)
    )
)
options = st.builds(
    Options,
    st.sampled_from(["left", "right"]),
    st.integers(1, 9),
    st.sampled_from([None, 300]),
    st.integers(0, 5),
)


@settings(deadline=None, max_examples=200)
@given(batches, options, st.sampled_from(["shared", "padded"]))
def test_every_array_equals_the_oracles(
    batch: tuple[list[Group], list[int]], chosen: Options, layout: str
) -> None:
    groups, numbers = batch
    expected = getattr(layout_oracle, layout)(groups, numbers, chosen)
    dirty = np.full(1 << 19, 0xA5, np.uint8)
    found = lay_out(
        store_of(groups),
        np.array(numbers, np.int64),
        layout,
        arena=dirty,
        fields=tuple(expected),
        side=chosen.side,
        multiple_of=chosen.multiple_of,
        width=chosen.width,
        pad_id=chosen.pad_id,
    )
    assert set(found.table) == set(expected)
    for name, array in expected.items():
        own = getattr(found, name)
        assert own.dtype == array.dtype, name
        assert own.shape == array.shape, name
        assert np.array_equal(own, array), name
        assert np.shares_memory(own, dirty) or not own.size
    assert (dirty[found.nbytes :] == 0xA5).all()


def test_the_table_has_the_offset_of_each_array() -> None:
    layout = lay_out(store_of(random_groups(0)), np.array([2, 0]), "padded")
    end = 0
    for name, (dtype, start, shape) in layout.table.items():
        array = np.ndarray(shape, dtype, layout.arena, start)
        assert np.array_equal(array, getattr(layout, name))
        assert start % 64 == 0
        assert start >= end
        end = start + array.nbytes
    assert end <= layout.nbytes == len(layout.arena)


def test_an_array_that_was_not_laid_out_is_named() -> None:
    layout = lay_out(store_of(random_groups(0)), np.array([0]))
    with pytest.raises(AttributeError, match="key_index was not laid out: name it in `fields`"):
        layout.key_index  # type: ignore[union-attr]  # noqa: B018


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"layout": "packed"}, "shared, tree or padded"),
        ({"layout": "padded", "side": "middle"}, "left or right"),
        ({"width": 3}, "does not fit in a width of 3"),
        ({"multiple_of": 0}, "multiple_of must be at least 1"),
        ({"fields": ["logits"]}, "no layout has an array"),
        ({"layout": "padded", "fields": ["key_index"]}, "the padded layout has no key_index"),
        ({"arena": np.zeros(8, np.uint8)}, "the buffer has 8"),
        ({"arena": np.frombuffer(bytes(9999), np.uint8)}, "read-only"),
        ({"arena": np.zeros(9999, np.uint8)[1:]}, "a multiple of 8 bytes"),
    ],
)
def test_impossible_layouts_are_refused(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lay_out(store_of(random_groups(0)), np.array([0, 1]), **wrong)  # type: ignore[arg-type]


def bottom_right_causal(queries: int, keys: int) -> Tensor:
    """The mask of variable-length kernels: the last query sees every key."""
    return torch.ones(queries, keys).tril(keys - queries).bool()


@pytest.mark.parametrize("width", [None, 400])
@pytest.mark.parametrize("seed", range(5))
def test_variable_length_attention_equals_attention_per_group(seed: int, width: int | None) -> None:
    groups, numbers = random_groups(seed), np.array([3, 0, 4, 1])
    store = store_of(groups)
    torch.manual_seed(seed)
    batch = to_torch(lay_out(store, numbers))
    assert isinstance(batch, SharedBatch)
    length = batch.input_ids.shape[1]
    query, key, value = torch.randn(3, 1, 2, width or length, 8)
    q, k, v = (part[:, :, :length] for part in (query, key, value))
    expected, _ = shared_prompt_attention(
        torch.nn.Identity(), q, k, v, None, shared_prompt=SharedPrompt(batch)
    )
    names = ("cu_seqlens_q", "cu_seqlens_k", "key_index", "max_seqlens")
    index = lay_out(store, numbers, fields=names, width=width)
    starts, key_starts = index.cu_seqlens_q.tolist(), index.cu_seqlens_k.tolist()  # type: ignore[union-attr]
    order = torch.from_numpy(index.key_index)  # type: ignore[union-attr]
    found = torch.full((1, 2, width or length, 8), torch.nan)
    for at in range(len(starts) - 1):
        own = slice(starts[at], starts[at + 1])
        seen = order[key_starts[at] : key_starts[at + 1]]
        mask = bottom_right_causal(own.stop - own.start, len(seen))
        k, v = key[:, :, seen], value[:, :, seen]
        found[:, :, own] = scaled_dot_product_attention(query[:, :, own], k, v, mask)
    assert not found.isnan().any()
    gap = (found.transpose(1, 2)[:, :length] - expected).abs().max()
    assert float(gap) <= 1e-6


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_fixed_width_changes_no_log_prob(layout: str) -> None:
    model, store = tiny(FAMILIES["llama"]()), store_of(random_groups(1))
    with torch.no_grad():
        numbers = np.array([2, 0, 4])
        narrow, wide, more = (
            score(model, to_torch(lay_out(store, numbers, layout, width=width, pad_id=pad_id)))
            for width, pad_id in ((None, 0), (170, 0), (192, 7))
        )
    assert torch.allclose(narrow, wide, atol=1e-6)
    assert torch.allclose(narrow, more, atol=1e-6)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_one_copy_of_the_buffer_contains_every_array(layout: str) -> None:
    arrays = lay_out(store_of(random_groups(2)), np.array([1, 3]), layout)
    tensors = _Tensors(arrays, torch.device("meta"))
    tensors._bytes = torch.from_numpy(arrays.arena.copy())  # as on a device
    for name in arrays.table:
        own = getattr(arrays, name)
        assert str(tensors[name].dtype) == f"torch.{own.dtype}", name
        assert np.array_equal(tensors[name].numpy(), own), name


def test_a_buffer_is_reused_after_its_last_view_is_freed() -> None:
    arenas, store, numbers = BufferPool(), store_of(random_groups(0)), np.array([0, 1])
    layout = lay_out(store, numbers, arena=arenas)
    ids = torch.from_numpy(layout.input_ids)[2:]
    before, place = ids.clone(), layout.arena.ctypes.data
    del layout
    gc.collect()
    other = lay_out(store, np.array([2, 3]), arena=arenas)
    assert other.arena.ctypes.data != place
    assert torch.equal(ids, before)
    del ids
    gc.collect()
    assert lay_out(store, np.array([0]), arena=arenas).arena.ctypes.data == place


def test_a_buffer_that_is_too_small_is_replaced() -> None:
    arenas = BufferPool()
    arenas(64)[:] = 1
    assert len(arenas(1 << 20)) == 1 << 20
    assert len(pickle.loads(pickle.dumps(arenas))(8)) == 8
