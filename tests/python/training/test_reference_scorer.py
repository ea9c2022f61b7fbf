"""The scorer: running out of memory during a pass only makes batches smaller."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from logratio._rust import CacheReader
from logratio.logps import completion
from logratio.logps.batch import Batch
from logratio.training import PrecomputeConfig, precompute
from logratio.training import reference_scorer as module
from logratio.training.fingerprint import model_fingerprint
from logratio.training.memory import MemoryShortageError
from logratio.training.precomputation import PrecomputeResult, prepare


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> PrecomputeConfig:
    return PrecomputeConfig(tiny_model, [pairs_file], tmp_path / "cache", token_budget=64)


def values(config: PrecomputeConfig, result: PrecomputeResult) -> list[float]:
    ready = prepare(config, show_progress=False)
    reader = CacheReader.open(result.folder, model_fingerprint(config.model).digest)
    found: list[float] = reader.read(reader.join(ready.keys))[1].tolist()
    return found


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[int, int], bool], error: Exception
) -> list[int]:
    """Let a batch fail where `fits(number, tokens)` says no; return the sizes that were scored."""
    scored: list[int] = []
    number = 0

    def score(model: torch.nn.Module, batch: Batch) -> Tensor:
        nonlocal number
        number += 1
        if not fits(number, batch.input_ids.numel()):
            raise error
        scored.append(batch.input_ids.numel())
        return completion.score(model, batch)

    monkeypatch.setattr(module, "score", score)
    return scored


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    config: PrecomputeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    whole = values(config, precompute(config, show_progress=False))
    other = PrecomputeConfig(config.model, config.data, tmp_path / "other", token_budget=64)
    scored = short_of_memory(monkeypatch, lambda number, tokens: tokens <= 40, error)
    result = precompute(other, show_progress=False)
    assert max(scored) <= 40
    assert "retrying with" in capsys.readouterr().err
    assert (result.new, result.hits) == (32, 0)
    assert np.allclose(values(other, result), whole, atol=1e-5)
    lengths = prepare(other, show_progress=False).store.shared_lengths()
    assert sum(scored) == lengths.sum(), "a group was scored twice or not at all"


def test_running_out_of_memory_during_a_pass_loses_nothing(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the GPU's memory after three batches: half from there on."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    scored = short_of_memory(monkeypatch, lambda n, tokens: n <= 3 or tokens <= 30, error)
    assert precompute(config, show_progress=False).new == 32
    assert max(scored[:3]) > 30 >= max(scored[3:])


def test_one_group_that_does_not_fit_is_named_and_the_rest_kept(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    short_of_memory(monkeypatch, lambda number, tokens: number <= 2, error)
    with pytest.raises(MemoryShortageError, match=r"a single group \(.*pairs.jsonl:\d+, \d+ tok"):
        precompute(config, show_progress=False)
    monkeypatch.undo()
    again = precompute(config, show_progress=False)
    assert again.hits > 0
    assert again.new + again.hits == 32


def test_other_errors_are_not_taken_for_it(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, lambda *_: False, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        precompute(config, show_progress=False)


def test_a_budget_below_every_group_still_scores_them_all(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = short_of_memory(monkeypatch, lambda *_: True, MemoryError())
    one = PrecomputeConfig(config.model, config.data, config.cache, token_budget=1)
    assert precompute(one, show_progress=False).new == 32
    lengths = prepare(config, show_progress=False).store.shared_lengths()
    assert scored == sorted(lengths.tolist(), reverse=True), "the longest first, one at a time"


def test_scoring_leaves_the_random_state_alone(config: PrecomputeConfig) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    precompute(config, show_progress=False)
    assert torch.equal(torch.get_rng_state(), before)
