"""A sharded model is collected in one process, once."""

from pathlib import Path

from conftest import write_pairs
from rank_server import RankServer
from safetensors.torch import load_file


def test_no_rank_holds_the_model_twice_when_it_is_saved(
    ranks: RankServer, tiny_model: Path, tmp_path: Path
) -> None:
    """The first rank ends with all weights; the others have one whole weight at a time."""
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    settings = {
        **{"model": str(tiny_model), "data": str(data), "output": str(tmp_path / "out")},
        **{"batch_size": 4, "parallel": "fsdp", "report": False},
    }
    ranks(2, "counting_workers:count_gathered", settings, str(tmp_path / "bytes")).well()
    first, second = (int((tmp_path / f"bytes.{rank}").read_text()) for rank in range(2))
    sizes = [one.nbytes for one in load_file(tmp_path / "out" / "model.safetensors").values()]
    assert first == sum(sizes)
    assert second == max(sizes)
