"""`logratio data inspect`: the format of a file, the reason, and the resulting records."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chats_for_tests import assistant, hh, user
from tokenizers_for_tests import CHATML, byte_level, save

from logratio.cli.app import main
from logratio.data import PreferenceTokenizer, TokenizationRules
from logratio.data.formats import FormatSettings
from logratio.data.inspection import CHARACTERS, TOKENS, FileInspection, inspect, plain, show_record
from logratio.data.records import Completion, PreferenceRecord, Source

Row = dict[str, Any]
PAIR = {"prompt": "the cat", "chosen": " sat", "rejected": " ran", "id": 1}
AB = {"instruction": "u", "output_1": "a", "output_2": "b", "preference": 2}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[Row | str], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), byte_level(), chat_template=CHATML)


def look(path: Path, **settings: Any) -> FileInspection:
    (found,) = inspect([path], FormatSettings(**settings)).files
    return found


def test_known_file(write: Callable[..., Path]) -> None:
    path = write([PAIR, PAIR | {"chosen": "", "note": "x"}])
    found = look(path)
    assert (found.container, found.rows, found.is_known) == ("JSON lines", 2, True)
    assert found.detection.format == "trl"
    assert (found.keys_read, found.keys_unread) == (("prompt", "chosen", "rejected"), ("id",))
    assert [str(one) for one in found.refusals] == [
        f"{path.as_posix()}:2 [R301] the chosen completion is empty"
    ]
    shown = inspect([path]).to_text()
    assert shown.startswith(f"{path.as_posix()}\n  container  JSON lines, 2 rows inspected\n")
    for line in (
        "  format     trl\n",
        "  why        `prompt`, `chosen`, `rejected` are strings: plain text, read unchanged\n",
        "  becomes    chosen, rejected: plain text",
        "  read       prompt, chosen, rejected\n",
        "  not read   id\n",
        "  prompt\nthe cat\n  chosen\n‹ sat›\n  rejected\n‹ ran›\n",
    ):
        assert line in shown


def graded(*weights: float) -> Row:
    """Return a pair of chats whose chosen answer has turns of these weights."""
    turns = [[assistant("a", weight=one), user("u")] for one in weights]
    chosen = [turn for both in turns for turn in both][:-1]
    return {"prompt": [user("q")], "chosen": chosen, "rejected": [assistant("b", weight=2)]}


def test_weights_of_turns_are_counted_and_what_sft_does_with_them(
    write: Callable[..., Path], folder: Path
) -> None:
    data = write([graded(-1, 1), graded(0.5), graded(-2, -2, 0)])
    for tokenizer in (None, PreferenceTokenizer.load(folder)):
        shown = inspect([data], tokenizer=tokenizer).to_text()
        counts = "7 in 6 completions, −2 … 2; below 0: 3 in 2\n"
        assert f"  values     turns with a weight other than 0 and 1: {counts}" in shown
        assert (
            "  --loss sft reads 3 of 3 rows: the better answer; training stops, because 3 turns "
            "have a weight below 0, in 2 rows\n"
        ) in shown
    assert ", with the weights −1, 1\n" in shown
    assert ", with the weights 2\n" in shown
    assert "×−1 ‹" in shown
    assert "×1 ‹" not in shown
    alone = inspect(
        [
            write([graded(-2)]),
        ]
    ).to_text()
    assert "2 in 2 completions, −2 … 2; below 0: 1 in 1" in alone


def test_sft_trains_on_weights_above_0_and_on_pairs_with_a_bad_rejected_answer(
    write: Callable[..., Path],
) -> None:
    bad = graded(0.5, 1) | {"rejected": [assistant("b", weight=-1)]}
    found = look(write([bad]))
    assert found.imitated == "reads 1 of 1 row: the better answer"
    assert found.turn_weights is not None
    assert found.turn_weights.bad == 1
    assert look(write([PAIR])).turn_weights is None


def test_a_missing_label_is_explained_with_a_flag(write: Callable[..., Path]) -> None:
    found = look(path := write([AB, AB | {"preference": 1}, AB]))
    assert not found.is_known and not found.detection.near
    assert "--label 'preference: 1=output_1 2=output_2'" in found.detection.reason
    shown = inspect([path]).to_text()
    assert "format     unknown" in shown
    assert shown.count("refused ") == 1 and "(and 2 more)" in shown
    assert "`preference` = 2, 1:" in found.detection.reason
    assert look(path, label="preference: 1=output_1 2=output_2").is_known


def test_unknown_file_names_similar_formats(write: Callable[..., Path]) -> None:
    path = write([{"question": "q", "response_j": "a", "source": "x"}] * 3)
    near = look(path).detection.near
    assert near["stack-exchange"] == ("response_k",)
    shown = inspect([path]).to_text()
    assert "similar    stack-exchange, but it lacks response_k\n" in shown
    assert look(write([{"a": 1}])).detection.near == {}


def test_broken_and_mixed_rows_are_named(write: Callable[..., Path]) -> None:
    thumb = {"prompt": "u", "completion": "c", "label": True}
    path = write([PAIR, "{", {"chosen": hh("a", "b"), "rejected": hh("a", "c")}, thumb])
    found = look(path)
    assert [one.code for one in found.refusals] == ["E101", "E204"]
    assert not found.is_known
    assert dict(found.detection.counts) == {"trl": 1, "hh": 1}
    assert "format     trl and hh\n" in inspect([path]).to_text()


def test_file_without_a_row(write: Callable[..., Path]) -> None:
    found = look(write([""]))
    assert (found.rows, found.is_known, found.example) == (0, False, None)
    assert found.detection.reason == "no rows to inspect"


def test_pairs_that_are_all_refused_are_not_shown_as_demonstrations(
    write: Callable[..., Path],
) -> None:
    rows = [PAIR | {"chosen": PAIR["rejected"]}, PAIR | {"rejected": ""}, PAIR | {"rejected": None}]
    shown = inspect([write(rows)]).to_text()
    assert "demonstration" not in shown
    for code in ("[R302]", "[R301]", "[E202]"):
        assert code in shown
    assert "  format     trl\n" in shown


def test_rendered_messages_are_counted_without_a_tokenizer(write: Callable[..., Path]) -> None:
    rendered = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    path = write([{"input": rendered, "chosen": "a", "rejected": "b"}])
    assert "  warning    [W523] 1 × " in inspect([path]).to_text()


def test_only_the_first_rows_are_read(write: Callable[..., Path]) -> None:
    path = write([PAIR] * 10 + ["{"])
    (found,) = inspect([path], rows=10).files
    assert (found.rows, found.refusals) == (10, ())
    with pytest.raises(FileNotFoundError):
        inspect([path.parent / "absent.jsonl"])


def test_tokens_and_mask(write: Callable[..., Path], folder: Path) -> None:
    tokenizer = PreferenceTokenizer.load(folder)
    chosen = [user("how"), assistant("a"), user("why"), assistant("yes")]
    path = write([{"chosen": chosen, "rejected": [user("how"), assistant("no")]}])
    shown = inspect([path], tokenizer=tokenizer).to_text()
    joined = shown.replace("│", "")
    assert "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n\n  chosen, " in joined
    assert "‹no<|im_end|>" in joined
    assert "a<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n‹yes" in joined
    counted = re.search(r"chosen, (\d+) of (\d+) tokens are trained", shown)
    assert counted and 0 < int(counted[1]) < int(counted[2])
    assert "‹" not in shown.split("\n  chosen, ")[0]


def test_tokens_keep_the_space_that_they_begin_with(
    write: Callable[..., Path], folder: Path
) -> None:
    tokenizer = PreferenceTokenizer.load(folder)
    shown = inspect([write([PAIR])], tokenizer=tokenizer).to_text().replace("│", "")
    assert "the cat\n  chosen" in shown
    assert "‹ sat</s>›" in shown and "‹ ran</s>›" in shown


def test_refused_by_the_tokenizer_is_shown_as_text(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = PreferenceTokenizer.load(save(tmp_path / "plain", byte_level()))
    path = write([{"question": "q", "chosen": "a", "rejected": "b"}])
    shown = inspect([path], tokenizer=tokenizer).to_text()
    assert "[E401]" in shown and "[assistant] ‹a›\n" in shown


def test_long_texts_and_many_tokens_are_cut_in_the_middle(
    write: Callable[..., Path], folder: Path
) -> None:
    path = write([PAIR | {"prompt": "x" * 2000, "chosen": " y" * 300}])
    assert f"… {2000 - CHARACTERS:,} characters …" in inspect([path]).to_text()
    tokenizer = PreferenceTokenizer.load(folder, TokenizationRules(max_length=4096))
    shown = inspect([path], tokenizer=tokenizer).to_text()
    shown = shown.replace(",", "")
    counts = [int(number) for number in re.findall(r"(\d+) tokens(?: are trained)?\n", shown)]
    assert len(counts) == 3 and counts[2] < TOKENS < min(counts[:2])
    left_out = re.findall(r"… (\d+) tokens …", shown)
    assert [int(number) + TOKENS for number in left_out] == counts[:2]


def test_scores_tools_steps_and_controls_are_shown() -> None:
    here = Source("f", 1)
    sides = (
        Completion("chosen", "a\x1b[31m", score=2.0, margin=1.5, weight=1.0),
        Completion("rejected", "b", score=0.5),
    )
    shown = plain(show_record(PreferenceRecord("p", sides, here)))
    assert "chosen (score 2, margin 1.5, weight 1)\n‹a\\x1b[31m›" in shown
    assert "rejected (score 0.5)\n" in shown
    step = (Completion("chosen", "2. b", "1. a\n"),)
    record = PreferenceRecord((user("q"),), step, here, ({"name": "f"},), ends=False)
    shown = plain(show_record(record))
    assert "[1 tool]" in shown and "  chosen\n1. a\n‹2. b›\n" in shown
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    answer = (call, {"role": "tool", "content": "4"}, assistant("a"), assistant("b", weight=0))
    shown = plain(
        show_record(PreferenceRecord((user("q"),), (Completion("chosen", answer, ()),), here))
    )
    assert "[assistant] ‹[{'name': 'f'}]›\n[tool] 4\n[assistant] ‹a›\n[assistant] b\n" in shown


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["data", "inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_command(
    write: Callable[..., Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, labelled = write([PAIR]), write([AB], "ab.jsonl")
    code, out, _ = run(capsys, known, "--tokenizer", folder)
    assert code == 0 and "‹ sat</s>›" in out.replace("│", "")
    code, out, _ = run(capsys, known, labelled)
    assert code == 1 and out.count("  format     ") == 2
    code, out, _ = run(capsys, labelled, "--label", "preference: 1=output_1 2=output_2")
    assert (code, "format     ab" in out) == (0, True)
    renamed = write([{"q": "u", "a": "x", "b": "y"}], "renamed.jsonl")
    code, out, _ = run(capsys, renamed, "--columns", "prompt=q,chosen=a", "--columns", "rejected=b")
    assert (code, "format     trl" in out) == (0, True)
    listed = write([{"prompt": "u", "completions": ["x", "y"], "scores": [1, 2]}], "list.jsonl")
    code, out, _ = run(capsys, listed, "--lists", "groups", "--format", "scored", "--first", "1")
    assert (code, "candidate (score 2)" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--columns", "prompt"], "write it as prompt=query"),
        (["--columns", "x=y"], "no format reads 'x'"),
        (["--format", "x"], "'x' is not one of trl"),
        (["--label", "x"], "write it as 'preference: 1=output_1 2=output_2'"),
    ],
)
def test_flags_that_cannot_be_followed_end_in_a_sentence(
    write: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    code, _, err = run(capsys, write([PAIR]), *arguments)
    assert code == 2
    assert err.startswith("error: ") and words in err


def test_colours_where_a_terminal_has_them(
    write: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = run(capsys, write([PAIR]))
    assert re.search(r"\x1b\[[0-9;]*m sat\x1b\[0m", out)
    assert "‹" not in out


def test_inspection_loads_no_framework() -> None:
    code = (
        "import sys, logratio.data.inspection, logratio.cli.data\n"
        "print(*{'torch', 'transformers', 'datasets'} & {m.partition('.')[0] for m in sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
