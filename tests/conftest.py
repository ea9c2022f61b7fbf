"""Fixtures that many test files share: the real material, a small tokenizer, tiny seeded models."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from rank_server import RankServer
from tiny_models import WORDS, save_tiny_model

# Two threads on a crowded machine made small models 200 times slower; children inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Tests of the report draw it; the runs of others need not, each for seconds.
os.environ["LOGRATIO_NO_REPORT"] = "1"
# A background job of a script ignores Ctrl-C; tests that send it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no defect of the code.
hypothesis.settings.register_profile("logratio", deadline=None)
hypothesis.settings.load_profile("logratio")

Run = Callable[..., tuple[int, str, str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _unchanged_signal_handlers() -> Iterator[None]:
    """Fail a test that leaves a signal handler, which would end later tests of the same worker."""
    before = _signal_handlers()
    yield
    after = _signal_handlers()
    _set_signal_handlers(before)
    assert after == before


@pytest.fixture(autouse=True, scope="module")
def _signal_handlers_of_a_module() -> Iterator[None]:
    """Restore the handlers that fixtures of a module replace: Ray's `init` does."""
    before = _signal_handlers()
    yield
    _set_signal_handlers(before)


def _signal_handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _set_signal_handlers(wanted: dict[int, Any]) -> None:
    for number, handler in wanted.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models, or a skip that says so."""
    folder = Path(os.environ.get("LOGRATIO_SHARED", Path(__file__).parent.parent / "../shared"))
    if not (folder / "data").is_dir():
        pytest.skip("LOGRATIO_SHARED (default ../shared) holds no real data and models here")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a word-level tokenizer; never changed by a test."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """Runs functions in several ranks, which train together."""
    with RankServer(tmp_path_factory.mktemp("ranks")) as server:
        yield server


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Make further tiny models: `make_model("name", seed=1)`."""
    return lambda name, seed=0: save_tiny_model(tmp_path / name, seed)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Sixteen preference pairs in the tiny tokenizer's words."""
    return write_pairs(tmp_path / "pairs.jsonl", 16)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its exit code, standard output and standard error."""
    from logratio.cli.app import main

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


def write_pairs(path: Path, count: int) -> Path:
    """Write `count` different pairs: chosen completions end happy, rejected ones sad."""
    rows = []
    for i in range(count):
        subject, verb, place = WORDS[5 + i % 3], WORDS[8 + i // 3 % 3], WORDS[14 + i // 9 % 3]
        prompt = f"the {subject} {verb}" + " loud" * (i % 4)
        rows.append(
            {
                "prompt": prompt,
                "chosen": f" in the {place} happy" + " happy" * (i % 3),
                "rejected": f" under a {place} sad",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
