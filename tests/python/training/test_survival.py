"""A signal in every phase of `logratio train`: exit code, what is left, resuming from it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import write_pairs
from repository import ROOT
from safetensors.torch import load_file

from logratio.training import stall_guard

PHASES: dict[str, tuple[str, str]] = {
    "reading the data": ("logratio.training.dataset", "build_store"),
    "the precompute pass": ("logratio.training.precomputation", "ReferenceScorer.score"),
    "loading the model": ("logratio.training.trainer", "build_policy"),
    "the start-up checks": ("logratio.training.update_loop", "check_start"),
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


Ended = Callable[..., int]


@pytest.fixture(scope="module")
def ended() -> Iterator[Ended]:
    """Run a command with signals in it; return its exit code."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "signalled_commands.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        answers = server.stdout
        assert server.stdin
        assert answers

        def run(
            given: list[str], *signals: tuple[object, ...], errors: Path | str = os.devnull
        ) -> int:
            call = {"arguments": given, "signals": signals, "errors": str(errors)}
            print(json.dumps(call), file=server.stdin, flush=True)
            return int(answers.readline())

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def whole(
    ended: Ended, material: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_the_run_and_resume_gives_the_same_bits(
    ended: Ended,
    phase: str,
    number: int,
    material: tuple[Path, Path, Path],
    whole: dict[str, object],
    tmp_path: Path,
) -> None:
    at = 3 if phase in ("an update", "an evaluation", "saving a checkpoint") else 1
    code = ended(
        arguments(material, tmp_path), (number, *PHASES[phase], at, str(tmp_path / "sent"))
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
    ended: Ended,
    material: tuple[Path, Path, Path],
    whole: dict[str, object],
    tmp_path: Path,
) -> None:
    """And what was saved before is enough to resume."""
    first = (signal.SIGINT, *PHASES["an update"], 3, str(tmp_path / "first"))
    second = (signal.SIGINT, *PHASES["saving a checkpoint"], 3, str(tmp_path / "second"))
    code = ended(arguments(material, tmp_path), first, second)
    assert code in (-signal.SIGINT, 128 + signal.SIGINT)
    assert (tmp_path / "second").exists()
    assert ended(arguments(material, tmp_path, "--resume")) == 0
    assert outcome(tmp_path) == whole


STUCK: dict[str, tuple[object, ...]] = {
    "during update 3": (*PHASES["an update"], 3),
    "during the precompute pass": (
        "logratio.training.reference_scorer",
        "ReferenceScorer.flush",
        1,
    ),
}


@pytest.mark.parametrize("phase", STUCK)
def test_a_stuck_run_ends_with_its_stacks_and_resume_gives_the_same_bits(
    ended: Ended,
    phase: str,
    material: tuple[Path, Path, Path],
    whole: dict[str, object],
    tmp_path: Path,
) -> None:
    stuck = (0, *STUCK[phase], str(tmp_path / "stuck"))
    command = arguments(material, tmp_path, "--stall-timeout", "5")
    assert ended(command, stuck, errors=tmp_path / "errors") == stall_guard.EXIT_CODE
    errors = (tmp_path / "errors").read_text()
    assert f"{phase}, nothing moved for 5 s" in errors
    assert "signalled_commands.py" in errors, "the stack of the call that is stuck"
    assert ended(arguments(material, tmp_path, "--resume")) == 0
    assert outcome(tmp_path) == whole
