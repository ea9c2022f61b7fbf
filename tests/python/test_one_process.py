"""Commands that write one result refuse to run once in each process of torchrun."""

from pathlib import Path

import pytest
from conftest import Run

from logratio.errors import ConfigError
from logratio.one_process import launched, refuse_multiple_processes

COMMANDS = {
    "merge": ("merge", "--model", "adapter", "--output", "out"),
    "rank": ("rank", "--bundle", "bundle", "--input", "rows.jsonl", "--output", "out"),
    "demo": ("demo", "--output", "out"),
    "data build": ("data", "build", "pairs.jsonl", "--tokenizer", "model", "--output", "out"),
    "cache merge": ("cache", "merge", "out", "other"),
    "cache compact": ("cache", "compact", "out"),
    "cache export": ("cache", "export", "cache", "out"),
    "sweep": (
        *("sweep", "--model", "model", "--data", "pairs.jsonl", "--eval-data", "held.jsonl"),
        *("--output", "out", "--beta", "0.1"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_several_processes_are_refused_before_anything_is_written(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, err = run(*COMMANDS[command])
    assert code == 2
    assert f"error: {command} runs in one process, and torchrun started 2" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}])
def test_one_process_is_not_refused(environment: dict[str, str]) -> None:
    assert launched(environment) == (0, 1)
    refuse_multiple_processes("merge", environment)
    with pytest.raises(ConfigError, match="started 3"):
        refuse_multiple_processes("merge", {"RANK": "2", "WORLD_SIZE": "3"})
