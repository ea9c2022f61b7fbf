"""Checkpoints: killed at every step of a save, damaged in every way, the last valid ones kept."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from logratio.training import checkpoint
from logratio.training.checkpoint import Position, ResumeError
from logratio.training.checkpoint_folder import MANIFEST

FILES = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")


def model(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model whose weights are all `value`, and its optimizer, with a state."""
    made = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.0, weight_decay=0.0)
    made(torch.full((1, 4), value)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made, optimizer


def save(folder: Path, step: int, keep: int = 2, made: Any = None) -> Path:
    """Save a checkpoint whose weights are all `step`, and whose best model is that of `step`."""
    torch.manual_seed(step)
    network, optimizer = made or model(float(step))
    checkpoint.save_best(folder, network, step)
    selection = {"best": 0.0, "best_step": step, "waited": 0, "evaluated": step}
    return checkpoint.save(folder, network, optimizer, Position(step, {"seed": 1}, selection), keep)


def loaded(folder: Path) -> int:
    """Load the newest valid checkpoint; return its step, which its weights must have."""
    restored, optimizer = model(-1.0)
    position, _ = checkpoint.load_newest(folder, restored, optimizer, {"seed": 1})
    assert position is not None
    assert all((p == position.step).all() for p in restored.parameters())
    assert position.selection is not None
    checkpoint.load_best(folder, restored, position.selection["best_step"])
    return position.step


def killed_at(point: int, act: Callable[[], object]) -> bool:
    """Run `act` in a child that is killed at its nth access to the file system.

    Returns:
        Whether it was killed, which it is not if it makes fewer accesses.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _: object) -> None:
            nonlocal seen
            if event in EVENTS:
                seen += 1
                if seen == point:
                    os._exit(9)

        code = 1
        try:
            sys.addaudithook(count)
            act()
            code = 0
        finally:  # never back to pytest, which the child is a second copy of
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 9)
    return ended == 9


EVENTS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "os.scandir"}


def test_a_process_killed_at_any_point_of_a_save_loses_nothing(tmp_path: Path) -> None:
    """The checkpoint before it, or the new one, is valid with its best model, after each kill."""
    start = tmp_path / "start"
    for step in (1, 2):
        save(start, step)
    found, point = set(), 0
    third = model(3.0)  # made here, because a child cannot use autograd after its parent has
    while True:
        point += 1
        folder = tmp_path / f"killed-{point}"
        shutil.copytree(start, folder)
        if not killed_at(point, lambda folder=folder: save(folder, 3, made=third)):  # type: ignore[misc]
            break
        found.add(loaded(folder))
        save(folder, 4)  # leftovers of the killed save are in nobody's way
        assert loaded(folder) == 4
        assert not [*folder.glob(".partial-*3")] or loaded(folder) == 4
        shutil.rmtree(folder)
    assert point > 20, "the kills reach every file"
    assert found == {2, 3}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "of another checkpoint": lambda path: shutil.copyfile(
        path.parent.parent / "checkpoint-00000001" / path.name, path
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_with_a_reason(
    tmp_path: Path, name: str, how: str
) -> None:
    for step in (1, 2):
        newest = save(tmp_path, step)
    DAMAGE[how](newest / name)
    restored, optimizer = model(-1.0)
    position, refused = checkpoint.load_newest(tmp_path, restored, optimizer, {"seed": 1})
    assert position is not None
    assert position.step == 1
    (reason,) = refused
    assert newest.name in reason
    assert name in reason


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": 3}', '{"files": {}}', "\0" * 100])
def test_a_damaged_manifest_is_passed_over(tmp_path: Path, content: str) -> None:
    for step in (1, 2):
        newest = save(tmp_path, step)
    (newest / MANIFEST).write_text(content)
    assert loaded(tmp_path) == 1


def test_without_a_valid_one_nothing_is_restored(tmp_path: Path) -> None:
    for path in (save(tmp_path, 1), save(tmp_path, 2)):
        flip(path / FILES[0])
    restored, optimizer = model(-1.0)
    with pytest.raises(ResumeError, match="no valid checkpoint"):
        checkpoint.load_newest(tmp_path, restored, optimizer, {"seed": 1})
    assert all((p == -1).all() for p in restored.parameters())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept_with_their_best_models(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep)
    steps = [f"{step:08d}" for step in range(6 - keep, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"best-{step}" for step in steps),
        *(f"checkpoint-{step}" for step in steps),
    ]
