"""A sweep on Ray gives the rows of a sweep on one machine."""

import dataclasses
from pathlib import Path

import pytest
from conftest import write_pairs

from logratio.training import SweepConfig, TrainConfig, sweep
from logratio.training.sweep_results import read_rows


@pytest.mark.slow
def test_ray_and_local_agree(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    base = TrainConfig(tiny_model, [pairs_file], tmp_path / "local", batch_size=8)
    held_out = write_pairs(tmp_path / "held_out.jsonl", 20)
    config = SweepConfig(base, [held_out], lr=(1e-3, 1e30), samples=4, max_new_tokens=8)
    local = sweep(config, show_progress=False)
    base = dataclasses.replace(base, output=tmp_path / "ray", cache=tmp_path / "local" / "cache")
    config = dataclasses.replace(config, base=base, engine="ray", workers=1)
    on_ray = sweep(config, show_progress=False)
    assert [row.evaluation for row in on_ray.rows] == [row.evaluation for row in local.rows]
    assert [bool(row.failed) for row in on_ray.rows] == [False, True]
    assert list(read_rows(tmp_path / "ray" / "sweep.jsonl").values()) == on_ray.rows
    assert not list((tmp_path / "ray").glob(".ray-*"))
