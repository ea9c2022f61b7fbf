"""`--data` of every command: stdin, folders, compressed files and tables."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from chats_for_tests import assistant, user
from piped import piped
from tokenizers_for_tests import CHATML, byte_level, save

from logratio.cli.app import main, spread
from logratio.data.store import build, ingest
from logratio.data.store.ingest import Intake

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its exit code and standard error."""

    def command(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), capsys.readouterr().err

    return command


def test_a_dash_is_a_value_of_data() -> None:
    assert spread(["train", "--data", "a", "-", "--lr", "1", "-"], {"--data": False}) == (
        ["train", "--data", "a", "--data", "-", "--lr", "1", "-"]
    )


def test_commands_read_stdin_folders_and_tables(
    run: Run,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    folder = tmp_path / "data"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:8]), folder / "a.parquet")
    packed = pyarrow.Codec("zstd").compress(json.dumps(rows[8:]).encode(), asbytes=True)
    (folder / "b.json.zst").write_bytes(packed)
    cache = ("--cache", tmp_path / "cache")
    code, err = run("precompute", "--model", tiny_model, "--data", folder, *cache)
    assert code == 0, err
    assert "16 rows read: 16 kept" in err
    monkeypatch.setattr(sys, "stdin", piped(pairs_file.read_bytes()))
    output = ("--output", tmp_path / "out", "--batch-size", "8")
    code, err = run("train", "--model", tiny_model, "--data", "-", *cache, *output)
    assert code == 0, err
    assert "16 rows read: 16 kept" in err
    monkeypatch.setattr(sys, "stdin", piped(packed))
    models = ("--policy", tmp_path / "out", "--reference", tiny_model)
    code, err = run("evaluate", *models, "--data", folder / "a.parquet", "-")
    assert code == 0, err
    assert "16 rows read: 16 kept" in err


def test_data_with_scores_margins_and_weights_is_built_and_trained(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"score_chosen": number, "score_rejected": 0.5, "weight": 2}
    file, store = tmp_path / "rated.jsonl", tmp_path / "rated.store"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = run("data", "build", file, "--tokenizer", tiny_model, "--output", store)
    assert code == 0, err
    output = ("--output", tmp_path / "out", "--batch-size", "8")
    code, err = run("train", "--model", tiny_model, "--data", store, *output)
    assert code == 0, err
    assert f"scores of {2 * len(rows)} completions, 0 … {len(rows) - 1}, mean" in err
    assert f"margins of {len(rows) - 1} completions" in err
    assert "[W526] 1 ×" in err
    assert "not read" not in err


def test_build_shows_weights_of_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "bytes", byte_level(), chat_template=CHATML)
    answers = [assistant("yes", weight=-1)], [assistant("no")]
    row = {"prompt": [user("q")], "chosen": answers[0], "rejected": answers[1]}
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps(row) + "\n")
    output = tmp_path / "a.store"
    with pytest.raises(SystemExit) as ended:
        main(["data", "build", str(data), "--tokenizer", str(model), "--output", str(output)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "tokens of turns with a weight other than 0 and 1: " in shown
    assert "in 1 completion, −1; below 0: " in shown


def test_a_store_of_an_older_version_names_both_versions_and_the_remedy(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "old.store"
    assert run("data", "build", pairs_file, "--tokenizer", tiny_model, "--output", store)[0] == 0
    store.write_bytes(store.read_bytes().replace(b"LRSTORE3", b"LRSTORE2", 1))
    code, err = run("train", "--model", tiny_model, "--data", store, "--output", tmp_path / "out")
    assert code == 2
    assert f"{store}: a store of format version 2, but this library reads versions 3 and 4" in err
    assert "build it again with `logratio data build`" in err


def test_a_folder_without_data_is_a_one_line_error(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    cache = ("--cache", tmp_path / "cache")
    code, err = run("precompute", "--model", tiny_model, "--data", tmp_path, *cache)
    assert code == 2
    assert "unknown type (weights.bin)" in err


def test_ctrl_c_in_build_reports_saved_progress(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Intake, *row: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Intake, "take", interrupted)
    output = tmp_path / "out.store"
    command = ("data", "build", pairs_file, "--tokenizer", tiny_model, "--output", output)
    code, err = run(*command)
    assert code == 130
    assert "nothing was saved yet" in err
    monkeypatch.undo()
    monkeypatch.setattr(build, "EVERY", 0.0)
    monkeypatch.setattr(ingest, "BATCH_ROWS", 4)
    monkeypatch.setattr(Intake, "close", interrupted)
    code, err = run(*command)
    assert "resume from the last save" in err
    monkeypatch.undo()
    code, err = run(*command)
    assert code == 0
    assert "continues after" in err
