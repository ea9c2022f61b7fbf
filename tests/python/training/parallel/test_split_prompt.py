"""The attention call of the design of context parallelism in `prompt_over_gpus.md`."""

from pathlib import Path

import pytest
import torch
from rank_server import RankServer
from safetensors.torch import load_file
from split_prompt import dense

PROMPT, COMPLETIONS = 36, [1, 30, 7, 12]
EXACT = 1e-14


@pytest.mark.parametrize(
    ("count", "completions"), [(1, COMPLETIONS), (2, COMPLETIONS), (3, COMPLETIONS), (2, [30])]
)
def test_attention_divided_over_ranks_equals_one_dense_call(
    ranks: RankServer, tmp_path: Path, count: int, completions: list[int]
) -> None:
    """The last case has a rank without completions."""
    expected = dense(PROMPT, completions)
    ranks(count, "split_prompt:attend_split", PROMPT, completions, str(tmp_path / "rank")).well()
    parts = [load_file(tmp_path / f"rank.{rank}") for rank in range(count)]
    tokens = torch.cat([part["tokens"] for part in parts])
    assert sorted(tokens.tolist()) == [*range(PROMPT + sum(completions))]
    for name, whole in zip("oqkv", expected, strict=True):
        found = torch.cat([part[name] for part in parts])
        assert float((found - whole[tokens]).abs().max()) < EXACT, name
