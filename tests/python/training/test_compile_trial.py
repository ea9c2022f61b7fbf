"""The trial decides by time, reports its decision, and changes nothing else in the run."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_graphs import graphs as graphs
from conftest import write_pairs
from safetensors.torch import load_file
from torch import nn

from logratio.training import TrainConfig, checkpoint, compile_trial, train
from logratio.training.activations import LayerOptions
from logratio.training.compile_trial import Verdict, compare, try_compiling
from logratio.training.models import load_model
from logratio.training.run_folder import identity
from logratio.training.trainer import DPOTrainer

pytestmark = [pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")]
LONG = 1_000


def timed(plain: float, *compiled: float) -> tuple[Callable[[bool], float], list[bool]]:
    """A clock that shows these seconds, and the list of what was run."""
    ran: list[bool] = []
    times = iter(compiled)

    def seconds_of(is_compiled: bool) -> float:
        ran.append(is_compiled)
        return next(times) if is_compiled else plain

    return seconds_of, ran


@pytest.mark.parametrize(
    ("compiled", "chosen"),
    [
        ((60.0, 0.8, 0.8, 0.8), True),
        ((60.0, 0.99, 0.99, 0.99), False),
        ((60.0, 1.2, 1.2, 0.1), False),
    ],
)
def test_compiled_layers_are_kept_if_they_are_clearly_faster(
    compiled: tuple[float, ...], chosen: bool
) -> None:
    seconds_of, ran = timed(1.0, *compiled)
    verdict = compare(seconds_of, LONG)
    assert verdict.compiled is chosen
    assert ran == [False, False, True, *[False, True] * 3], "warmed up, then in turns"
    assert verdict.reason.endswith(f"{sorted(compiled[1:])[1]:.3f} s compiled, 1.000 s plain")


def test_a_short_run_compiles_nothing() -> None:
    seconds_of, ran = timed(1.0)
    verdict = compare(seconds_of, 100)
    assert not verdict.compiled
    assert verdict.reason == "layers are not compiled for a run of about 100 s"
    assert True not in ran


def test_a_failing_compiler_is_reported_and_not_used() -> None:
    def seconds_of(is_compiled: bool) -> float:
        if is_compiled:
            raise RuntimeError("no C compiler\nand a hundred lines more")
        return 1.0

    verdict = compare(seconds_of, LONG)
    assert not verdict.compiled
    assert verdict.reason == "layers are not compiled: RuntimeError: no C compiler"


def run_in(folder: Path, model: Path) -> TrainConfig:
    data = write_pairs(folder / "pairs.jsonl", 16)
    return TrainConfig(model, [data], folder / "out", lr=1e-3, batch_size=4, save_every=0)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    return run_in(tmp_path, tiny_model)


History = list[dict[str, float]]
Weights = dict[str, torch.Tensor]


def trained(config: TrainConfig) -> tuple[History, Weights]:
    history = train(config, show_progress=False).history
    return history, load_file(Path(config.output) / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Weights]:
    """What a run without a trial gives."""
    return trained(run_in(tmp_path_factory.mktemp("plain"), tiny_model))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Of each trial, whether torch's generator was as before, and the gradients that were left."""
    seen: list[tuple[Any, ...]] = []

    def watched(
        policy: nn.Module, kept: LayerOptions, rehearse: Callable[[], None], rounds: float
    ) -> Verdict:
        def drawing() -> None:
            torch.rand(1)  # as dropout does, which this model has not
            rehearse()

        torch.rand(1)  # what the policy's making left may not be what a seed would give
        before = torch.get_rng_state()
        verdict = try_compiling(policy, kept, drawing, rounds)
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        seen.append((torch.equal(torch.get_rng_state(), before), gradients))
        return verdict

    monkeypatch.setattr("logratio.training.update_loop.try_compiling", watched)
    return seen


@pytest.mark.parametrize("chosen", [True, False])
def test_the_trial_changes_nothing_of_the_run(
    chosen: bool,
    graphs: list[int],
    seen: list[tuple[Any, ...]],
    config: TrainConfig,
    plain: tuple[History, Weights],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit: these graphs compute what plain layers compute."""
    history, weights = plain
    monkeypatch.setattr(compile_trial, "SHORT", 0.0)
    monkeypatch.setattr(compile_trial, "GAIN", -1e6 if chosen else 1.0)
    found, others = trained(replace(config, compile_layers="auto"))
    assert 0 < len(graphs) <= 4, "the run finds the graphs of the trial"
    assert seen == [(True, [])], "the generator is as before, and there are no gradients"
    assert found == history
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert f"auto: layers are {'' if chosen else 'not '}compiled: " in capsys.readouterr().err


def test_a_resumed_run_keeps_its_decision(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled or not: the other would round differently."""

    def refuse(*_: object) -> None:
        raise AssertionError("a trial, where the choice is on record")

    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    position = checkpoint.Position(1, {"compiled": True})
    checkpoint.save(Path(config.output) / "checkpoints", model, optimizer, position)
    monkeypatch.setattr("logratio.training.update_loop.try_compiling", refuse)
    resumed = replace(config, compile_layers="auto", resume=True)
    trainer = DPOTrainer(config=resumed, show_progress=False)
    trainer.begin(load_model(config.model), None, "padded")
    trainer.identity = {}
    assert trainer._try_compiling(LayerOptions(2)) == LayerOptions(2, compiled=True)
    assert trainer.identity == {"compiled": True}, "every later checkpoint records it"


def test_true_and_false_are_on_and_off(config: TrainConfig) -> None:
    on, off = (replace(config, compile_layers=given) for given in (True, False))
    assert (on.compile_layers, off.compile_layers) == ("on", "off")
    found = [identity(replace(config, compile_layers=name)) for name in ("on", "off", "auto")]
    assert [one["compile_layers"] for one in found] == [True, False, "auto"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU")
@pytest.mark.usefixtures("fresh_compiler")
def test_real_kernels_are_timed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_trial, "SHORT", 0.0)
    train(replace(config, compile_layers="auto"), show_progress=False)
    message = capsys.readouterr().err
    assert "s plain" in message
    assert "fails" not in message
