"""If a rank fails, dies, stops or differs, all ranks end, and one message names it."""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from rank_server import Ended, RankServer
from safetensors.torch import load_file

LONGEST = 60.0
"""Seconds in which all ranks must end."""
MOMENTS = {
    "the start": ("logratio.training.trainer", "build_policy", 1),
    "an update": ("logratio.training.update", "clip_gradients", 3),
    "a checkpoint": ("logratio.training.checkpoint", "_optimizer_tensors", 2),
}
"""Moments of a run: before the call of this function with this number."""

Settings = dict[str, Any]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Settings:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    return {
        **{"model": str(tiny_model), "data": str(data), "output": str(tmp_path / "out")},
        **{"batch_size": 4, "epochs": 2, "lr": 1e-3, "save_every": 1, "report": False},
    }


@pytest.fixture(scope="module")
def undisturbed(
    ranks: RankServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The weights of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = write_pairs(folder / "pairs.jsonl", 12)

    def run(parallel: str) -> dict[str, Any]:
        output = folder / parallel
        if not output.exists():
            ranks(
                2,
                "rank_workers:train",
                {
                    **{"model": str(tiny_model), "data": str(data), "output": str(output)},
                    **{"batch_size": 4, "epochs": 2, "lr": 1e-3, "parallel": parallel},
                    "report": False,
                },
            ).well()
        return load_file(output / "model.safetensors")

    return run


def failed(ended: Ended, started: float) -> str:
    """Check that no rank ended well, in time; return all that was printed."""
    assert all(ended.codes), ended.printed
    assert time.monotonic() - started < LONGEST
    return "\n".join(ended.printed)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("moment", "parallel"),
    [
        ("the start", "fsdp"),  # nothing is divided yet
        *((moment, way) for moment in ("an update", "a checkpoint") for way in ("ddp", "fsdp")),
    ],
)
def test_a_killed_rank_ends_the_run_which_resumes(
    ranks: RankServer,
    settings: Settings,
    undisturbed: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    moment: str,
    parallel: str,
    rank: int,
) -> None:
    settings["parallel"] = parallel
    module, name, call = MOMENTS[moment]
    killed = [rank, signal.SIGKILL, module, name, call, str(tmp_path / "killed")]
    started = time.monotonic()
    ended = ranks(2, "rank_workers:train_impatiently", settings, signals=[killed])
    printed = failed(ended, started)
    assert (tmp_path / "killed").exists()
    assert set(re.findall(r"rank (\d)[ ,].*died or stopped", printed)) == {str(rank)}
    ranks(2, "rank_workers:train", settings | {"resume": True}).well()
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert all(trained[name].equal(value) for name, value in undisturbed(parallel).items())


def test_a_checkpoint_that_is_written_while_the_run_goes_on_is_that_of_its_update(
    ranks: RankServer,
    settings: Settings,
    undisturbed: Callable[[str], dict[str, Any]],
    tmp_path: Path,
) -> None:
    settings |= {"parallel": "fsdp", "async_save": True, "keep_checkpoints": 9}
    killed = [1, signal.SIGKILL, "logratio.training.update", "clip_gradients", 6]
    ranks(
        2, "rank_workers:train_impatiently", settings, signals=[[*killed, str(tmp_path / "killed")]]
    )
    saved = sorted((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert len(saved) >= 2
    for newer in saved[2:]:
        shutil.rmtree(newer)
    ranks(2, "rank_workers:train", settings | {"resume": True}).well()
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert all(trained[name].equal(value) for name, value in undisturbed("fsdp").items())


def test_a_stopped_rank_ends_the_run(ranks: RankServer, settings: Settings, tmp_path: Path) -> None:
    stopped = [1, signal.SIGSTOP, *MOMENTS["an update"], str(tmp_path / "stopped")]
    started = time.monotonic()
    ended = ranks(2, "rank_workers:train_impatiently", settings, signals=[stopped], killed=[1])
    assert "rank 1 (host" in failed(ended, started)


def test_a_stuck_rank_ends_the_run_with_the_stacks_of_those_that_wait_for_it(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    """A stuck process still counts as alive: only its work does not move."""
    stuck = [1, 0, *MOMENTS["an update"], str(tmp_path / "stuck")]
    settings |= {"parallel": "ddp", "stall_timeout": 6}
    started = time.monotonic()
    ended = ranks(2, "rank_workers:train", settings, signals=[stuck])
    printed = failed(ended, started)
    assert (tmp_path / "stuck").exists()
    assert "during update 3, nothing moved for 6 s" in printed
    assert "most recent call first" in printed


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_in_one_rank_saves_all_and_the_run_resumes(
    ranks: RankServer,
    settings: Settings,
    undisturbed: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    parallel: str,
) -> None:
    settings |= {"parallel": parallel, "save_every": 0}
    sent = [1, signal.SIGTERM, *MOMENTS["an update"], str(tmp_path / "sent")]
    started = time.monotonic()
    printed = failed(ranks(2, "rank_workers:train", settings, signals=[sent]), started)
    assert "SIGTERM: saved update 3" in printed
    ranks(2, "rank_workers:train", settings | {"resume": True}).well()
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert all(trained[name].equal(value) for name, value in undisturbed(parallel).items())


def test_a_full_disk_on_one_rank_names_it_and_keeps_the_last_checkpoint(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    settings["parallel"] = "fsdp"
    started = time.monotonic()
    ended = ranks(2, "rank_workers:train_with_small_files", settings, 1, 20_000)
    assert "rank 1: [Errno 27]" in failed(ended, started)
    assert not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    ranks(2, "rank_workers:train", settings | {"resume": True}).well()


def test_different_data_is_refused_by_the_name_of_the_file(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    same, first = write_pairs(tmp_path / "same.jsonl", 5), write_pairs(tmp_path / "own.jsonl", 6)
    other = write_pairs(tmp_path / "other" / "own.jsonl", 7)
    own = [{"data": [str(same), str(one)]} for one in (first, other)]
    started = time.monotonic()
    ended = ranks(2, "rank_workers:train_differently", settings, own, hosts=2)
    printed = failed(ended, started)
    assert "ranks 0 and 1 would train different runs: they differ in data" in printed
    assert "own.jsonl" in printed
    assert "same.jsonl" not in printed.partition("would train")[2].partition("\n")[0]


def test_different_settings_are_refused_by_name(ranks: RankServer, settings: Settings) -> None:
    own: list[Settings] = [{"seed": 0}, {"seed": 1}]
    ended = ranks(2, "rank_workers:train_differently", settings, own)
    assert "they differ in seed (0 at rank 0, 1 at rank 1)" in failed(ended, time.monotonic())


def test_clocks_on_two_sides_of_midnight_give_one_date(
    ranks: RankServer, settings: Settings, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = make_model("dated")
    template = (
        "{{ 'loud ' if strftime_now('%d') == '29' else 'sad ' }}"
        "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
    )
    (model / "chat_template.jinja").write_text(template)
    turn = {"role": "user", "content": "the cat sings"}
    rows = [
        {
            "prompt": [turn],
            "chosen": [{"role": "assistant", "content": f"in the {place}"}],
            "rejected": [{"role": "assistant", "content": f"under a {place} sad"}],
        }
        for place in ("tree", "house", "mat", "bird")
    ]
    Path(settings["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings |= {"model": str(model), "batch_size": 2, "save_every": 0}
    days = ["2026-11-29", "2026-11-30"]
    ranks(2, "rank_workers:train_on_days", settings, days, hosts=2).well()
    used = json.loads((tmp_path / "out" / "training.json").read_text())["rules"]["date"]
    assert used == "2026-11-29"


def test_bad_data_is_reported_once(ranks: RankServer, settings: Settings) -> None:
    Path(settings["data"]).write_text('{"prompt": 1}\n')
    command = ["train", *(f"--{name}={settings[name]}" for name in ("model", "data", "output"))]
    ended = ranks(2, "logratio.cli.app:main", command)
    printed = failed(ended, time.monotonic())
    assert sum(line.startswith("error: ") for line in printed.splitlines()) == 1
    assert printed.count("pairs.jsonl:1") == 1
