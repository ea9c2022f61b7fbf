"""`logratio export`, `rank` and `serve` from the command line, and their error messages."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from shared_traces import shared_traces
from tiny_models import save_tiny_model

from logratio.cli.app import main

ROWS = [
    {"prompt": "the cat sits", "candidates": [" in the tree happy", " under a mat sad"]},
    {"prompt": "the dog", "candidates": [" runs"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with policy, reference, their bundle, and a file of candidates."""
    folder = tmp_path_factory.mktemp("scoring")
    for seed, name in enumerate(("reference", "policy")):
        save_tiny_model(folder / name, seed)
    with shared_traces(), pytest.raises(SystemExit) as ended:
        main(export_arguments(folder, "bundle"))
    assert not ended.value.code
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "candidates.jsonl").write_text(rows)
    return folder


def export_arguments(folder: Path, output: str, *more: str) -> list[str]:
    names = {"--policy": "policy", "--reference": "reference", "--output": output}
    words = [word for flag, name in names.items() for word in (flag, str(folder / name))]
    return ["export", *words, "--beta", "0.1", *more]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_ranking_prints_rewards_and_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("rank", "--bundle", folder / "bundle", "--input", folder / "candidates.jsonl")
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "2 prompts ranked, 3 candidates with a reward" in err
    first, second = map(json.loads, out.splitlines())
    rewards = first["rewards"]
    assert first["order"] == sorted(range(2), key=lambda i: -rewards[i])
    assert second["order"] == [0]
    gaps = zip(first["policy_logps"], first["reference_logps"], strict=True)
    assert rewards == pytest.approx([0.1 * (p - r) for p, r in gaps], abs=1e-5)


def test_ranking_reads_standard_input_and_exits_with_1_after_a_bad_row(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (folder / "candidates.jsonl").read_bytes()
    arguments = ("rank", "--bundle", folder / "bundle", "--input", "-")
    for content, expected in ((rows, 0), (b"{\n" + rows, 1)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        code, out, err = run(capsys, *arguments)
        assert (code, len(out.splitlines())) == (expected, 2 + expected)
        assert "depend on the length of standard input" in err
    assert "[E101] 1 row refused" in err


def test_ranking_exits_with_1_only_if_a_prompt_has_no_reward_at_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    for candidates, expected in ((["", " runs"], 0), (["", ""], 1)):
        rows.write_text(json.dumps({"prompt": "the dog", "candidates": candidates}) + "\n")
        code, out, err = run(capsys, "rank", "--bundle", folder / "bundle", "--input", rows)
        assert code == expected
        assert ("1 prompt without any reward" in err) == bool(expected)
        assert "errors" in json.loads(out)


def test_ranking_into_a_file(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranked.jsonl"
    bundle, rows = str(folder / "bundle"), str(folder / "candidates.jsonl")
    with pytest.raises(SystemExit) as ended:
        main(["rank", "--bundle", bundle, "--input", rows, "--output", str(output)])
    assert not ended.value.code
    assert len(output.read_text().splitlines()) == 2


def test_dry_runs_print_a_forecast_and_stop(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, rows = folder / "bundle", folder / "candidates.jsonl"
    code, out, err = run(capsys, "rank", "--bundle", bundle, "--input", rows, "--dry-run")
    assert (code, out) == (0, "")
    assert "needs about" in err
    code, out, err = run(capsys, *export_arguments(folder, "other", "--dry-run"))
    assert (code, out) == (0, "")
    assert "needs about" in err
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (lambda f: export_arguments(f, "bundle"), "bundle"),
        (lambda f: ["rank", "--bundle", str(f / "policy"), "--input", "x"], "bundle"),
        (
            lambda f: ["rank", "--bundle", str(f / "bundle"), "--input", str(f / "nothing")],
            "nothing",
        ),
        (lambda f: ["serve", "--bundle", str(f / "nothing")], "nothing"),
    ],
    ids=["output-taken", "no-bundle", "no-input", "no-folder"],
)
def test_errors_are_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Callable[[Path], list[str]],
    sentence: str,
) -> None:
    code, _, err = run(capsys, *arguments(folder))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert sentence in line
    assert "Traceback" not in err
