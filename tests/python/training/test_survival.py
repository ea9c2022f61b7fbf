"""A signal in every phase of `logratio train`: exit code, what is left, resuming from it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_pairs
from safetensors.torch import load_file

PHASES: dict[str, tuple[str, str]] = {
    "reading the data": ("logratio.training.dataset", "build_store"),
    "the precompute pass": ("logratio.training.precomputation", "ReferenceScorer.score"),
    "loading the model": ("logratio.training.trainer", "build_policy"),
    "the start-up checks": ("logratio.training.trainer", "check_start"),
    "an update": ("logratio.training.update", "clip_gradients"),
    "an evaluation": ("logratio.training.held_out", "sums_over"),
    "saving a checkpoint": ("logratio.training.checkpoint", "_optimizer_tensors"),
    "saving the model": ("logratio.training.run_folder", "asdict"),
}
"""Where the signal arrives: just before a call of this function."""


@pytest.fixture(scope="module")
def material(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return (
        tiny_model,
        write_pairs(folder / "pairs.jsonl", 16),
        write_pairs(folder / "held.jsonl", 20),
    )


def arguments(material: tuple[Path, Path, Path], folder: Path, *more: str) -> list[str]:
    model, data, held = map(str, material)
    return [
        *("train", "--model", model, "--data", data, "--output", str(folder / "out")),
        *("--cache", str(folder / "cache"), "--precompute", "--eval-data", held),
        *("--eval-every", "2", "--best-metric", "loss", "--batch-size", "4", "--lr", "1e-3"),
        *("--save-every", "1", "--epochs", "2", *more),
    ]


def ended(given: list[str], patch: Callable[[], None] = lambda: None) -> int:
    """Run a command in a child process, which shares what this one has imported."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            from logratio.cli.app import main

            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            patch()
            main(given)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sends(number: int, module: str, name: str, at: int, note: Path) -> Callable[[], None]:
    """Return a patch that sends a signal before the `at`th call of a function, and makes `note`."""

    def patch() -> None:
        from importlib import import_module

        owner: object = import_module(module)
        *outer, last = name.split(".")
        for one in outer:
            owner = getattr(owner, one)
        real, calls = getattr(owner, last), 0

        def watched(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                note.touch()
                os.kill(os.getpid(), number)
            return real(*args, **options)

        setattr(owner, last, watched)

    return patch


@pytest.fixture(scope="module")
def whole(
    material: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What a run gives that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(arguments(material, folder)) == 0
    return outcome(folder)


def outcome(folder: Path) -> dict[str, object]:
    out = folder / "out"
    weights = load_file(out / "model.safetensors")
    rows = {name: (out / name).read_text() for name in ("metrics.jsonl", "evaluations.jsonl")}
    best = json.loads((out / "training.json").read_text())["best_step"]
    return {"weights": {k: v.numpy().tobytes() for k, v in weights.items()}, "best": best, **rows}


CASES = [
    *((phase, signal.SIGTERM) for phase in PHASES),
    *((phase, signal.SIGINT) for phase in ("reading the data", "the precompute pass", "an update")),
]


@pytest.mark.parametrize(("phase", "number"), CASES)
def test_a_signal_ends_the_run_and_resume_gives_the_same_bits(
    phase: str,
    number: int,
    material: tuple[Path, Path, Path],
    whole: dict[str, object],
    tmp_path: Path,
) -> None:
    at = 3 if phase in ("an update", "an evaluation", "saving a checkpoint") else 1
    code = ended(
        arguments(material, tmp_path), sends(number, *PHASES[phase], at, tmp_path / "sent")
    )
    assert (tmp_path / "sent").exists()
    if phase == "saving the model":
        assert code == 0, "a run that only saves its model is finished"
    elif number == signal.SIGTERM and phase in BEFORE:
        assert code in (-number, 128 + number), "nothing to save yet"
    else:
        assert code == 128 + number
    assert ended(arguments(material, tmp_path, "--resume")) == 0
    assert outcome(tmp_path) == whole
    assert not [*(tmp_path / "out").rglob(".*partial*"), *(tmp_path / "out").glob(".saving")]


BEFORE = ("reading the data", "loading the model", "the start-up checks")
"""Phases before the first update, in which a signal simply ends the process."""


def test_a_second_signal_ends_the_process_at_once(
    material: tuple[Path, Path, Path], whole: dict[str, object], tmp_path: Path
) -> None:
    """And what was saved before is enough to resume."""

    def patch() -> None:
        sends(signal.SIGINT, *PHASES["an update"], 3, tmp_path / "first")()
        sends(signal.SIGINT, *PHASES["saving a checkpoint"], 3, tmp_path / "second")()

    assert ended(arguments(material, tmp_path), patch) in (-signal.SIGINT, 128 + signal.SIGINT)
    assert (tmp_path / "second").exists()
    assert ended(arguments(material, tmp_path, "--resume")) == 0
    assert outcome(tmp_path) == whole
