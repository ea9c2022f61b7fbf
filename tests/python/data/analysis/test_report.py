"""`logratio data report`: the row counts, the text and the JSON."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, save, word_level

from logratio._rust import Store
from logratio.cli.app import main
from logratio.data import (
    DataReport,
    FormatSettings,
    PreferenceTokenizer,
    TokenizationRules,
    build_store,
)
from logratio.data.analysis import Analysis, analyse
from logratio.data.records import CODES, Cut, Refusal, Source
from logratio.data.store.row_report import BadDataError, write_refusal

Run = Callable[..., tuple[int, str, str]]

WORDS = "the cat sat on the mat and the dog ran to the house"


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ROWS: list[dict[str, Any]] = [
    pair("the cat", " sat on the mat", " ran"),
    pair("the dog", " ran to the house", " sat"),
    pair("the dog", " sat", " ran to the house"),  # contradicts it
    pair("the cat", " sat on the mat", " ran"),  # again
    pair("the mat", "", " ran"),  # empty
    pair("the house", " and the dog ran to the house and the cat sat on the mat", " sat"),  # cut
    pair("the cat and the dog", " ran", " sat on"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("words"), word_level())


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file of rows into the working directory, so that its name is short."""
    monkeypatch.chdir(tmp_path)
    path = Path("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its exit code, standard output and standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


GOLDEN = """\
7 rows read: 5 kept, 1 refused, 1 duplicate left out
13 prompt and 38 completion tokens
7 rows of trl
[R301] 1 × an empty completion
  rows.jsonl:5 the chosen completion is empty
[W503] 1 × a completion was truncated
  rows.jsonl:6
[W507] 1 × the same pair occurs with chosen and rejected exchanged
  rows.jsonl:3 against rows.jsonl:2
1 duplicate
  rows.jsonl:4 repeats rows.jsonl:1

tokens         median      mean       p95   longest          in all
prompt            2.0       2.6         5         5              13
chosen            5.0       4.8        10        10              24
rejected          2.0       2.8         5         5              14
group             9.0      10.2        14        14              51

prompt, tokens                           chosen, tokens
2 ██████████████████████████████████ 4    2 █████████████████████████████████ 2
3  0                                      3  0
4  0                                      4  0
5 ████████▌ 1                             5 █████████████████████████████████ 2
                                          6  0
                                          7  0
                                          8  0
                                          9  0
                                         10 ████████████████▌ 1
rejected, tokens                         group, tokens
2 ██████████████████████████████████ 3    9 █████████████████████████████████ 3
3 ███████████▍ 1                         10 ███████████ 1
4  0                                     11  0
5 ███████████▍ 1                         12  0
                                         13  0
                                         14 ███████████ 1

completions truncated, by tokens lost
4-7 ████████████████████████████████ 1

length bias: chosen is longer in 60.0 %, equal in 0.0 %, shorter in 40.0 % of 5
    pairs
  chosen − rejected = +2.0 tokens on average, median +3
  Cohen's d_z = 0.471 (95 %: −0.453 … 1.395)
  P(chosen longer) = 0.600 (95 %: 0.231 … 0.882), ties as one half: the accuracy
    of “the longer wins”
  not notable: a warning needs |d| ≥ 0.2, or P ≥ 0.58 or ≤ 0.42, and an interval
    without “no effect”

label noise: 50.0 % of the judgements are flipped (95 %: 5.0 % … 50.0 %)
  estimated from 2 pairs that were judged more than once, 1 of them both ways
  assumes that judges err independently and equally often on every pair, and
    that no row is a copy of another; otherwise it is a lower bound

computation: 64 tokens in rows of prompt and completion, 40.6 % of them prompt
  sharing the prompt computes 51 instead: 20.3 % saved
  padded batches of 8 groups: 46.7 % padding in file order, 46.7 % sorted by
    length

shared beginnings: --share-beginnings would save 0.0 % of the tokens in `train`
    (updates of 32 groups, micro-batches of 2,048 tokens) and 0.0 % in
    `precompute`
  with micro-batches of any size, at most 0.0 % and 0.0 %

vocabulary: 11 of 47 ids are used (23.4 %)
  special tokens: </s> 9
  9 of 10 completions end with </s> (90.0 %)
  in 0.0 % of the groups, all completions begin with the same token

near-duplicates: 1 of 5 groups resemble an earlier one (roles are ignored)
  20.0 %, in 1 cluster of up to 2 groups; Jaccard ≥ 0.8 of windows of 5 tokens
  rows.jsonl:3 resembles rows.jsonl:2 (1.00)

[W510] many groups are nearly the same: 1 of 5 groups resemble an earlier one;
    they weigh more in training, and a random split puts them on both sides
[W511] many completions were truncated: 1 of 10 (10.0 %); raise the limit
"""


def test_the_text_of_a_small_report(run: Run, file: Path, folder: Path) -> None:
    code, out, err = run("data", "report", file, "--tokenizer", folder, "--max-length", 12)
    assert (code, err) == (0, "")
    assert out == GOLDEN


def test_everything_is_written_that_is_asked_for(run: Run, file: Path, folder: Path) -> None:
    asked = ("--json", "report.json", "--picture", "report.svg", "--refused", "refused.jsonl")
    code, _, _ = run("data", "report", file, "--tokenizer", folder, *asked)
    assert code == 0
    report = json.loads(Path("report.json").read_text())
    account = report["account"]
    assert account["read"] == account["kept"] + account["refused"] + account["deduplicated"] == 7
    assert report["bias"]["difference"]["count"] == report["groups"] == 5
    assert report["flips"]["pairs"] == 2
    assert report["similarity"]["similar"] == 1
    assert ElementTree.parse("report.svg").getroot().tag.endswith("svg")
    (refused,) = map(json.loads, Path("refused.jsonl").read_text().splitlines())
    assert (refused["file"], refused["line"], refused["code"]) == ("rows.jsonl", 5, "R301")
    assert refused["row"] == ROWS[4]


def test_a_sealed_store_gives_the_same_report(run: Run, file: Path, folder: Path) -> None:
    tokenizer = PreferenceTokenizer.load(folder)
    build_store([file], tokenizer, "rows.store")
    _, expected, _ = run("data", "report", file, "--tokenizer", folder)
    code, out, _ = run("data", "report", "rows.store", "--tokenizer", folder)
    assert (code, out) == (0, expected)
    code, out, _ = run("data", "report", "rows.store")
    assert code == 0
    assert "[R301] 1 × an empty completion" in out
    assert "completions end with" not in out  # only the tokenizer knows which token that is


def test_impossible_requests_are_refused(
    run: Run, file: Path, folder: Path, tmp_path: Path
) -> None:
    other = save(tmp_path / "other", byte_level())
    build_store([file], PreferenceTokenizer.load(folder), "rows.store")
    for arguments, words in {
        (file,): "give the model's tokenizer with --tokenizer DIR",
        (file, "--tokenizer", folder, "--picture", "a.jpg"): "a picture is .svg, .png or .pdf",
        ("rows.store", file): "is a sealed store, which must be the only input",
        ("rows.store", "--tokenizer", other): "built with another tokenizer",
        ("absent.jsonl", "--tokenizer", folder): "absent.jsonl",
    }.items():
        code, out, err = run("data", "report", *arguments)
        assert (code, out) == (2, ""), arguments
        assert words in err
    Path("rows.store").write_bytes(b"LRSTORE1" + bytes(500))
    assert run("data", "report", "rows.store")[0] == 2


def test_broken_rows_are_counted_and_do_not_stop_it(run: Run, file: Path, folder: Path) -> None:
    file.write_text(file.read_text() + "{\n")
    code, out, _ = run("data", "report", file, "--tokenizer", folder)
    assert code == 0
    assert "8 rows read: 5 kept, 2 refused, 1 duplicate left out" in out
    stopped, _, err = run("data", "report", file, "--tokenizer", folder, "--max-bad-fraction", 0)
    assert stopped == 2
    assert "rows.jsonl:8" in err


def described(file: Path, folder: Path, **options: Any) -> Analysis:
    tokenizer = PreferenceTokenizer.load(folder, TokenizationRules(max_length=12))
    store, account = build_store([file], tokenizer)
    return analyse(store, account, tokenizer=tokenizer, **options)


def test_the_account_survives_json(file: Path, folder: Path) -> None:
    account = described(file, folder).account
    again = DataReport.from_dict(json.loads(json.dumps(account.to_dict())))
    assert again == account
    assert again.to_text() == account.to_text()
    assert again.cuts == {"W503": Counter({3: 1})}


def test_cuts_are_binned_by_powers_of_two() -> None:
    report = DataReport()
    report.cuts["W503"] = Counter({tokens.bit_length(): 1 for tokens in (1, 5)})
    assert report.cut_bins("W503") == [("1", 1), ("2-3", 0), ("4-7", 1)]
    assert report.cut_bins("W506") == []
    cut = Cut("W503", 5)
    assert cut == "W503"
    assert cut.tokens == 5
    assert cut in CODES


def test_prompts_that_are_cut_are_counted(file: Path, folder: Path) -> None:
    rules = TokenizationRules(max_length=9, max_prompt_length=3, prompt_truncation="keep_end")
    _, account = build_store([file], PreferenceTokenizer.load(folder, rules))
    assert account.cut_bins("W506") == [("2-3", 1)]  # "the cat and the dog" lost 2 words
    assert account.warnings_by_code["W506"] == 1


def test_an_enormous_row_is_not_written_again(tmp_path: Path) -> None:
    refusal = Refusal(Source("f", 3), "R301", "empty", 7)
    path = tmp_path / "refused.jsonl"
    with path.open("w") as file:
        write_refusal(file, refusal, {"prompt": "x" * (1 << 20)})
        write_refusal(file, refusal, {"when": object})
    huge, odd = map(json.loads, path.read_text().splitlines())
    assert "row" not in huge
    assert (huge["column"], huge["reason"]) == (7, "empty")
    assert odd["row"] == {"when": str(object)}


def test_demonstrations_have_no_bias_and_no_label_noise(tmp_path: Path, folder: Path) -> None:
    rows = [{"prompt": "the cat", "completion": f" sat{' and' * n}"} for n in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = PreferenceTokenizer.load(folder)
    store, account = build_store([path], tokenizer, formats=FormatSettings(demonstrations=True))
    analysis = analyse(store, account)
    assert (analysis.bias, analysis.flips) == (None, None)
    assert "not all groups are pairs" in analysis.to_text()


def test_a_picture_without_matplotlib_is_refused_before_data_is_read(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = ("--tokenizer", folder, "--picture", "a.svg")
    code, out, err = run("data", "report", "absent.jsonl", *picture)
    assert (code, out) == (2, "")
    assert "matplotlib is not installed" in err and "logratio[plots]" in err


texts = st.sampled_from(["", " sat", " ran to", " sat on the mat and the dog ran to the house"])
rows = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["the cat", "the dog", WORDS]), "chosen": texts, "rejected": texts}
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.lists(rows, min_size=1, max_size=12))
def test_the_account_always_adds_up(
    data: list[dict[str, str]], tmp_path: Path, folder: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    try:
        analysis = described(path, folder, threshold=0.5)
    except BadDataError:  # nothing was kept
        return
    account = analysis.account
    assert account.read == len(data)
    assert account.read == account.kept + account.refused + account.deduplicated
    assert analysis.groups == account.kept
    assert analysis.lengths["prompt"].total == account.prompt_tokens
    cuts = sum(account.cuts.get("W503", Counter()).values())
    assert cuts == account.warnings_by_code["W503"]
    assert analysis.bias is not None
    assert analysis.bias.chosen.count == account.kept
    assert analysis.similarity is not None
    assert analysis.similarity.similar < account.kept


def test_findings_are_given_where_there_is_reason(tmp_path: Path, folder: Path) -> None:
    random = np.random.default_rng(0)
    rows = []
    for number in range(60):
        prompt = " ".join(random.choice(WORDS.split(), 4))
        rows.append(pair(prompt, " sat on the mat" * 3, " ran" * (1 + number % 3)))
    rows += [pair(row["prompt"], row["rejected"], row["chosen"]) for row in rows[:30]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    analysis = described(path, folder, threshold=0.8)
    assert [one.code for one in analysis.findings] == ["W508", "W509", "W510", "W511"]
    assert all(str(one) in re.sub(r"\s+", " ", analysis.to_text()) for one in analysis.findings)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    (first, *_) = described(path, folder).findings
    assert (first.code, "“the longer wins” is right for 100.0 %" in first.text) == ("W508", True)


@pytest.mark.shared
def test_harmless_pairs(shared: Path) -> None:
    tokenizer = PreferenceTokenizer.load(shared / "models/gpt2-tokenizer")
    store, account = build_store([shared / "data/hh/harmless-base.test.jsonl.gz"], tokenizer)
    analysis = analyse(store, account, tokenizer=tokenizer, threshold=0.8)
    assert isinstance(store, Store)
    assert (account.read, account.kept, account.refused) == (2312, 2308, 4)
    bias, found = analysis.bias, analysis.padding
    assert bias is not None
    assert found is not None
    # The better answer to a harmful question is shorter, but not by enough for a warning.
    assert bias.longer == pytest.approx(0.435, abs=0.001)
    assert bias.effect == pytest.approx(-0.187, abs=0.001)
    assert not analysis.findings
    assert analysis.flips is None
    assert found.prompt_share == pytest.approx(0.724, abs=0.001)
    assert found.saved == pytest.approx(0.362, abs=0.001)
    assert found.waste == pytest.approx(0.604, abs=0.001)
    assert found.sorted_waste == pytest.approx(0.102, abs=0.001)
    assert analysis.sharing is not None
    assert analysis.sharing.saved("micro_batches") == pytest.approx(0.003, abs=0.001)
    assert analysis.sharing.saved("one_pass") == pytest.approx(0.041, abs=0.001)
    assert analysis.tokens.ended == 2 * 2308
    assert analysis.tokens.same_start / 2308 == pytest.approx(0.112, abs=0.001)
    assert analysis.similarity is not None
    assert analysis.similarity.examples[0].endswith("(0.81)")
