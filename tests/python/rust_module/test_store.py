"""The Python bindings of store, plan and layouts: types, shapes, errors."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rust_stores import f32, ids, make_store, push_pair, u8, u32

from logratio._rust import ROLES, VALUES, StoreWriter, candidate_layout, content_key


def test_a_store_describes_its_contents() -> None:
    store = make_store()
    assert (len(store), store.completions, store.tokens) == (2, 3, 10)
    assert store.metadata == '{"files": ["a.jsonl"]}'
    assert len(bytes.fromhex(store.digest)) == 32
    store.verify()
    columns: dict[str, tuple[NDArray[Any], type, list[int]]] = {
        "shared_lengths": (store.shared_lengths(), np.uint32, [7, 3]),
        "prompt_lengths": (store.prompt_lengths(), np.uint32, [3, 1]),
        "completion_lengths": (store.completion_lengths(), np.uint32, [1, 3, 2]),
        "counted_lengths": (store.counted_lengths(), np.uint32, [1, 2, 2]),
        "completion_offsets": (store.completion_offsets(), np.int64, [0, 2, 3]),
        "roles": (store.roles(), np.uint8, [0, 1, 3]),
        "files": (store.sources()[0], np.uint32, [2, 2]),
        "lines": (store.sources()[1], np.uint64, [9, 10]),
    }
    for name, (found, dtype, expected) in columns.items():
        assert found.dtype == dtype, name
        assert found.tolist() == expected, name


def test_a_group_is_read_back() -> None:
    prompt, completions, masks, roles = make_store().group(0)
    assert prompt.tolist() == [1, 2, 3]
    assert [one.tolist() for one in completions] == [[4], [5, 6, 7]]
    assert [one.tolist() for one in masks] == [[1], [1, 0, 1]]
    assert prompt.dtype == completions[0].dtype == np.int32
    assert masks[0].dtype == roles.dtype == np.uint8
    assert [ROLES[role] for role in roles] == ["chosen", "rejected"]


def test_keys_are_content_keys() -> None:
    keys = make_store().keys()
    assert keys.shape == (3, 32)
    assert keys.dtype == np.uint8
    assert keys[1].tobytes() == content_key(ids(1, 2, 3, 5, 6, 7), 3)
    with pytest.raises(ValueError, match="no completion"):
        content_key(ids(1, 2), 2)


def test_both_layouts_of_one_batch() -> None:
    store = make_store()
    shared = store.shared_layout(np.array([0, 1]))
    padded = store.padded_layout(np.array([0, 1]))
    assert shared.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 90, 80, 81]
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 5, 0, 1, 2]
    assert shared.logit_index.tolist() == [2, 2, 4, 5, 7, 8]
    assert padded.input_ids.tolist() == [
        [1, 2, 3, 4, 0, 0],
        [90, 80, 81, 0, 0, 0],
        [1, 2, 3, 5, 6, 7],
    ]
    assert padded.attention_mask.sum(axis=1).tolist() == [4, 3, 6]
    assert padded.position_ids.max(axis=1).tolist() == [3, 2, 5]
    assert padded.logit_index.tolist() == [2, 14, 15, 16, 6, 7]
    for layout in (shared, padded):
        assert layout.target_ids.tolist() == [4, 5, 6, 7, 80, 81]
        assert layout.completion_mask.tolist() == [True, True, False, True, True, True]
        assert layout.completion_offsets.tolist() == [0, 1, 4, 6]
        assert layout.prompt_lengths.tolist() == [3, 1]
        assert layout.completion_lengths.tolist() == [1, 3, 2]
        assert layout.group_sizes.tolist() == [2, 1]
        assert layout.groups.tolist() == [0, 1]
        assert layout.completions.tolist() == [0, 1, 2]
        assert layout.roles.tolist() == [0, 1, 3]


def test_layouts_are_contiguous_arrays_of_their_type() -> None:
    store = make_store()
    other = {"completion_mask": np.bool_, "roles": np.uint8}
    for layout in (store.shared_layout(np.array([1, 0])), store.padded_layout(np.array([1, 0]))):
        for name in layout.table:
            if not name.startswith("_"):
                array = getattr(layout, name)
                assert array.dtype == other.get(name, np.int64), name
                assert array.flags.c_contiguous, name
                assert array.flags.writeable, name  # torch warns about read-only arrays


def test_a_layout_outlives_its_store() -> None:
    layout = make_store().padded_layout(np.array([1]))
    assert layout.input_ids.tolist() == [[90, 80, 81]]


def test_candidates_for_the_graph() -> None:
    layout = candidate_layout([ids(1, 2), ids(3)], [[ids(4), ids(5, 6)], [ids(7, 8, 9)]], chunk=4)
    assert layout.prompt_ids.tolist() == [[1, 2], [0, 3]]
    assert layout.prompt_mask.tolist() == [[1, 1], [0, 1]]
    assert layout.candidate_ids.tolist() == [[4, 0, 0], [5, 6, 0], [7, 8, 9]]
    assert layout.candidate_mask.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert layout.group.tolist() == [0, 0, 1]
    assert layout.token_index.tolist() == [[0, 3, 4, 6], [7, 8, 0, 0]]
    assert layout.token_row.tolist() == [[0, 1, 1, 2], [2, 2, 3, 3]]
    with pytest.raises(ValueError, match="prompt 1 has no candidate"):
        candidate_layout([ids(1), ids(1)], [[ids(2)], []])


def test_a_plan_covers_the_store() -> None:
    writer = StoreWriter()
    for number in range(50):
        push_pair(writer, number)
    store = writer.finish()
    plan = store.plan(order="shuffled", groups_per_update=8, token_budget=21)
    assert plan.order.dtype == plan.micro_offsets.dtype == plan.update_offsets.dtype == np.int64
    assert sorted(plan.order) == list(range(50))
    assert plan.update_offsets.tolist() == [0, 3, 6, 9, 12, 15, 18, 19]
    assert np.diff(plan.micro_offsets).max() == 3  # 7 tokens a pair


@pytest.mark.parametrize(
    "wrong", [{"order": "random"}, {"layout": "packed"}, {"token_budget": 0}, {"rank": 1}]
)
def test_an_impossible_plan_is_refused(wrong: dict[str, Any]) -> None:
    request: dict[str, Any] = {"order": "sorted", "groups_per_update": 1, "token_budget": 1} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_store().plan(**request)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_ids": ids()}, "the prompt is empty"),
        ({"completion_lengths": u32()}, "no completion"),
        ({"completion_lengths": u32(0, 3)}, "completion 0 is empty"),
        ({"prompt_ids": ids(-1)}, "negative"),
        ({"completion_lengths": u32(1, 1)}, "add up to 2"),
        ({"roles": u8(0, 5)}, "role 5 is unknown"),
        ({"values": f32([[0, 0, 0, 0]])}, "values of 1 completions, but there are 2"),
        ({"values": f32([[0, 0, 0], [0, 0, 0]])}, "values has 3 columns, not 4"),
        ({"values": f32([[0] * 4, [0, np.inf, 0, 0]])}, "the rank of completion 1 is infinite"),
        ({"values": np.asfortranarray(f32([[0] * 4] * 2))}, "ascontiguousarray"),
    ],
)
def test_a_bad_group_is_refused(change: dict[str, NDArray[Any]], reason: str) -> None:
    writer = StoreWriter()
    group: dict[str, NDArray[Any]] = {
        "prompt_ids": ids(1),
        "completion_ids": ids(2, 3, 4),
        "completion_mask": u8(1, 1, 1),
        "completion_lengths": u32(1, 2),
        "roles": u8(0, 1),
    }
    with pytest.raises(ValueError, match=reason):
        writer.push(**(group | change), file=0, line=1)
    assert len(writer.finish()) == 0


def test_values_are_given_back_for_each_completion() -> None:
    writer = StoreWriter()
    values = f32([[1.5, np.nan, 0.5, 2], [1, 4, np.nan, 2]])
    writer.push(ids(1), ids(2, 3), u8(1, 1), u32(1, 1), u8(0, 1), 0, 1, values)
    push_pair(writer)
    writer.push_many(
        *(ids(5), u32(1), ids(2, 3), u8(1, 1), u32(1, 1), u32(2), u8(0, 1), u32(0)),
        np.array([3], np.uint64),
        values=2 * values,
    )
    store = writer.finish()
    found = store.values()
    assert found.dtype == np.float32
    assert found.shape == (6, len(VALUES))
    none = np.full((2, 4), np.nan, np.float32)
    np.testing.assert_array_equal(found, np.concatenate([values, none, 2 * values]))
    selected = store.select(np.array([False, True, True]))
    np.testing.assert_array_equal(selected.values(), found[2:])
    assert VALUES == ("score", "rank", "margin", "weight")


def test_arrays_of_another_type_are_refused() -> None:
    other: Any = ids(1).astype(np.int64)
    with pytest.raises(TypeError):
        StoreWriter().push(other, ids(2), u8(1), u32(1), u8(0), 0, 1)
    other = ids(0)
    with pytest.raises(TypeError):
        make_store().shared_layout(other)
    with pytest.raises(TypeError, match="contiguous"):
        make_store().shared_layout(np.array([0, 1, 0, 1])[::2])


def test_numbers_out_of_range_are_index_errors() -> None:
    store = make_store()
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"group {wrong} is out of range: there are 2"):
            store.group(wrong)
        with pytest.raises(IndexError):
            store.padded_layout(np.array([wrong]))


def test_a_finished_writer_refuses_groups() -> None:
    writer = StoreWriter()
    writer.finish()
    with pytest.raises(ValueError, match="closed"):
        push_pair(writer)
    with pytest.raises(ValueError, match="closed"):
        writer.finish()


def test_a_store_and_its_layouts_show_their_sizes() -> None:
    store = make_store()
    assert repr(store) == "Store(2 groups, 3 completions, 10 tokens, in memory)"
    assert repr(store.shared_layout(np.arange(2))).startswith("SharedLayout(groups [2], ")
    assert "input_ids [2, 6]" in repr(store.padded_layout(np.arange(1)))
