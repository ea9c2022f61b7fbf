"""A row that several ranks compute together has the values of one that a single rank computes."""

import json
from pathlib import Path

import pytest
import torch
from rank_server import RankServer
from safetensors.torch import load_file
from split_rows import Lengths, dense

from logratio.logps.context_parallel import Division

PAIR: Lengths = [(36, [5, 30])]
SEVERAL: Lengths = [(23, [1, 30, 7]), (3, [4, 4]), (1, [2]), (50, [9, 11])]
"""Prompts that the number of chunks does not divide, and that have fewer tokens than chunks."""
SMALL: Lengths = [(1, [2])]
"""Fewer tokens than ranks."""


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, PAIR), (2, PAIR), (3, PAIR), (3, SEVERAL), (2, SMALL), (4, SMALL)]
)
def test_attention_split_over_ranks_equals_one_dense_call(
    ranks: RankServer, tmp_path: Path, count: int, lengths: Lengths
) -> None:
    ranks(count, "split_rows:attend", lengths, str(tmp_path / "rank")).well()
    parts = [load_file(tmp_path / f"rank.{rank}") for rank in range(count)]
    tokens = torch.cat([part["tokens"] for part in parts])
    assert sorted(tokens.tolist()) == [*range(sum(p + sum(own) for p, own in lengths))]
    for name, whole in zip("oqkv", dense(lengths), strict=True):
        found = torch.cat([part[name] for part in parts])
        assert float((found - whole[tokens]).abs().max()) < 1e-14, name


@pytest.mark.parametrize(
    ("count", "lengths", "tile"),
    [(2, PAIR, 1000), (3, SEVERAL, 1000), (3, SEVERAL, 7), (2, SMALL, 1000), (4, SMALL, 1)],
)
def test_log_probs_loss_and_gradients_equal_those_of_one_rank(
    ranks: RankServer, tmp_path: Path, count: int, lengths: Lengths, tile: int
) -> None:
    """Tiles of 7 positions make several parts of a batch, and groups larger than a tile."""
    ranks(count, "split_rows:score", lengths, tile, str(tmp_path / "rank")).well()
    for rank in range(count):
        gaps = json.loads((tmp_path / f"rank.{rank}").read_text())
        assert len(gaps) > 10
        assert max(gaps) < 1e-11


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("lengths", [PAIR, SEVERAL, SMALL])
def test_each_token_is_on_one_rank_and_the_work_of_prompts_is_equal(
    lengths: Lengths, ranks: int
) -> None:
    prompts, completions = zip(*lengths, strict=True)
    division = Division(prompts, completions, ranks)
    tokens, pairs = list[int](), list[int]()
    for rank in range(ranks):
        chunks = division.chunks(rank)
        runs = chunks + division.own_completions(rank)
        tokens += [int(token) for run in runs for token in run.tokens]
        pairs.append(sum(run.length * (run.seen + run.length) for run in chunks))
    assert sorted(tokens) == [*range(sum(p + sum(own) for p, own in lengths))]
    assert max(pairs) - min(pairs) <= 2 * sum(prompts) + 4 * ranks
