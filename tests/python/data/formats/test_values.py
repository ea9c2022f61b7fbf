"""Scores, ranks, margins and weights that public data sets carry, as rows and in the store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats_for_tests import assistant, gpt, human, user
from numpy.testing import assert_array_equal
from tokenizers_for_tests import CHATML, save, word_level

from logratio._rust import VALUES, Store
from logratio.cli.app import main
from logratio.data import BadDataError, FormatSettings, PreferenceTokenizer, build_store
from logratio.data.formats import Decoded, Decoder
from logratio.data.inspection import inspect
from logratio.data.records import InvalidRecordError, Source

Row = dict[str, Any]
Side = dict[str, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("words"), word_level(), chat_template=CHATML)


def chats(chosen: str, rejected: str) -> Row:
    return {
        "chosen": [user("the"), assistant(chosen)],
        "rejected": [user("the"), assistant(rejected)],
    }


PAIR = {"prompt": "the", "chosen": "cat", "rejected": "dog"}
OUTPUTS = {"prompt": "the", "response_1": "cat", "response_2": "dog"}
NECTAR = {
    "prompt": "\n\nHuman: the\n\nAssistant: ",
    "answers": [
        {"answer": "cat", "model": "gpt-4", "rank": 1.0},
        {"answer": "dog", "model": "llama-2", "rank": 4.0},
    ],
    "turns": 1,
    "num_responses": 7,
}
ULTRAFEEDBACK = {
    "source": "s",
    "instruction": "the",
    "models": ["m", "n"],
    "completions": [
        {"model": "m", "response": "dog", "overall_score": 6.5},
        {"model": "n", "response": "cat", "overall_score": 8},
    ],
}
WEBGPT = {
    "question": {"dataset": "eli5", "full_text": "the"},
    "answer_0": "dog",
    "answer_1": "cat",
    "score_0": -0.5,
    "score_1": 0.5,
}
GROUPS = {"lists": "groups"}
SCORED: tuple[Side, Side] = (
    {"score": 8.0, "margin": 1.5},
    {"score": 6.5},
)

CASES: dict[str, tuple[Row, Row, tuple[Side, ...]]] = {
    "ultrafeedback_binarized": (
        {"prompt": "the", "prompt_id": "x", **chats("cat", "dog"), "messages": [user("the")]}
        | {"score_chosen": 8.0, "score_rejected": 6.5},
        {},
        SCORED,
    ),
    "argilla's cleaned ultrafeedback": (
        {"source": "s", "prompt": "the", **chats("cat", "dog")}
        | {"chosen-rating": 8.0, "chosen-model": "m", "rejected-rating": 6.5},
        {},
        SCORED,
    ),
    "argilla's dpo-mix": (
        {**chats("cat", "dog"), "chosen_rating": 8, "rejected_rating": 6.5},
        {},
        SCORED,
    ),
    "argilla's responses": (
        {"instruction": "the", "chosen_response": "cat", "rejected_response": "dog"}
        | {"chosen_avg_rating": 8.0, "rejected_avg_rating": 6.5},
        {},
        SCORED,
    ),
    "nemo-aligner's rewards": (
        {"prompt": "the", "chosen_response": "cat", "rejected_response": "dog"}
        | {"chosen_reward": 8.0, "rejected_reward": 6.5},
        {},
        SCORED,
    ),
    "intel's scores": (PAIR | {"chosen_score": 8.0, "rejected_score": 6.5}, {}, SCORED),
    "TRL's margin": (PAIR | {"margin": 0.75}, {}, ({"margin": 0.75}, {})),
    "a margin counts more than scores": (
        PAIR | {"margin": 3, "score_chosen": 8.0, "score_rejected": 6.5},
        {},
        ({"score": 8.0, "margin": 3.0}, {"score": 6.5}),
    ),
    "CSV's cells are strings": (
        PAIR | {"margin": "", "score_chosen": "8", "score_rejected": "6.5", "weight": "0.5"},
        {},
        ({"score": 8.0, "margin": 1.5, "weight": 0.5}, {"score": 6.5, "weight": 0.5}),
    ),
    "one score": (PAIR | {"score_chosen": 8.0}, {}, ({"score": 8.0}, {})),
    "HelpSteer2": (OUTPUTS | {"preference_strength": -2}, {}, ({"margin": 2.0}, {})),
    "HelpSteer3": (
        {"domain": "d", "language": "l", "context": [user("the")]}
        | {"response1": "dog", "response2": "cat", "overall_preference": 3},
        {},
        ({"margin": 3.0}, {}),
    ),
    "SHP": (
        {"history": "the", "human_ref_A": "dog", "human_ref_B": "cat"}
        | {"labels": 0, "score_A": 5, "score_B": 20},
        {},
        ({"score": 20.0, "margin": 15.0}, {"score": 5.0}),
    ),
    "Nectar's pairs": (NECTAR, {}, ({"rank": 1.0, "margin": 3.0}, {"rank": 4.0})),
    "Nectar's lists": (NECTAR, GROUPS, ({"rank": 1.0}, {"rank": 4.0})),
    "Nectar's best and worst": (
        NECTAR,
        {"lists": "best_worst"},
        ({"rank": 1.0, "margin": 3.0}, {"rank": 4.0}),
    ),
    "UltraFeedback's pairs": (ULTRAFEEDBACK, {}, SCORED),
    "UltraFeedback's lists": (ULTRAFEEDBACK, GROUPS, ({"score": 8.0}, {"score": 6.5})),
    "WebGPT": (WEBGPT, {}, ({"score": 0.5, "margin": 1.0}, {"score": -0.5})),
    "a list of weights": (
        {"prompt": "the", "completions": ["cat", "dog"], "scores": [2, 1], "weight": [0.5, 2]},
        GROUPS,
        ({"score": 2.0, "weight": 0.5}, {"score": 1.0, "weight": 2.0}),
    ),
    "right and wrong answers": (
        {"prompt": "the", "response_1": "cat", "response_2": "dog", "scores": [True, False]},
        {},
        ({}, {}),
    ),
    "right and wrong answers as a list": (
        {"prompt": "the", "response_1": "cat", "response_2": "dog", "scores": [True, False]},
        GROUPS,
        ({"score": 1.0}, {"score": 0.0}),
    ),
    "LLaMA-Factory's pairs with a weight": (
        {"conversations": [human("the")], "chosen": gpt("cat"), "rejected": gpt("dog")}
        | {"weight": 0.25},
        {},
        ({"weight": 0.25}, {"weight": 0.25}),
    ),
    "KTO": (
        {"prompt": "the", "completion": "cat", "label": True, "score": 0.9, "weight": 2},
        {},
        ({"score": 0.9, "weight": 2.0},),
    ),
    "demonstrations": (
        {"prompt": "the", "completion": "cat", "weight": 2},
        {"demonstrations": True},
        ({"weight": 2.0},),
    ),
    "the better answer as a demonstration": (
        PAIR | {"score_chosen": 8, "score_rejected": 1, "weight": 2},
        {"demonstrations": True},
        ({"score": 8.0, "weight": 2.0},),
    ),
    "token ids": (
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9]}
        | {"score_chosen": 8.0, "score_rejected": 6.5},
        {},
        SCORED,
    ),
    "a renamed column": (
        PAIR | {"gap": 0.5, "importance": 3},
        {"columns": {"margin": "gap", "weight": "importance"}},
        ({"margin": 0.5, "weight": 3.0}, {"weight": 3.0}),
    ),
}


def matrix(sides: tuple[Side, ...]) -> np.ndarray[Any, Any]:
    """The expected values, float32 `[K, 4]`."""
    rows = [[side.get(name, np.nan) for name in VALUES] for side in sides]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_data_sets_numbers_are_in_the_store(case: str, folder: Path) -> None:
    row, settings, expected = CASES[case]
    tokenizer = PreferenceTokenizer.load(folder)
    store, report = build_store([[row]], tokenizer, formats=FormatSettings(**settings))
    assert_array_equal(store.values(), matrix(expected))
    named = {name for side in expected for name in side}
    assert report.values.keys() == named
    assert not {*report.extra_keys} & {key for key in row if "score" in key or "rating" in key}
    assert not {*report.extra_keys} & {"margin", "weight", "preference_strength"}


def decode(row: Row, **settings: Any) -> Decoded:
    return Decoder(FormatSettings(**settings)).decode(row, Source("rows.jsonl", 1))


def test_a_chosen_answer_with_the_lower_score_has_no_margin_and_is_counted() -> None:
    decoded = decode(PAIR | {"score_chosen": 1.0, "score_rejected": 6.5})
    (chosen, rejected) = decoded.records[0].completions
    assert (chosen.score, chosen.margin, rejected.score) == (1.0, None, 6.5)
    assert decoded.warnings == ("W526",)
    decoded = decode(PAIR | {"margin": -1})
    assert decoded.records[0].completions[0].margin is None
    assert decoded.warnings == ("W526",)
    assert decode(PAIR | {"score_chosen": 1, "score_rejected": 1}).warnings == ()


@pytest.mark.parametrize("value", ["good", True, [1], 1e300, {"a": 1}])
def test_a_score_or_margin_that_is_no_number_stays_unread(value: Any) -> None:
    decoded = decode(PAIR | {"score_chosen": value, "margin": value})
    assert set(decoded.extra_keys) == {"score_chosen", "margin"}
    assert {one.values for one in decoded.records[0].completions} == {(None,) * 4}


@pytest.mark.parametrize("value", [None, "", float("nan")])
def test_a_missing_number_is_no_number_and_nothing_to_report(value: Any) -> None:
    decoded = decode(PAIR | {"score_chosen": value, "margin": value, "weight": value})
    assert decoded.extra_keys == ()
    assert {one.values for one in decoded.records[0].completions} == {(None,) * 4}


@pytest.mark.parametrize(
    "value", [-0.5, "heavy", float("inf"), True, 1e300, [1, 2, 3], [1, -1], {"a": 1}]
)
def test_a_weight_that_is_no_weight_stops_the_run_with_its_line(value: Any, folder: Path) -> None:
    with pytest.raises(BadDataError, match=r":2 \[E212\] .*'weight'"):
        build_store([[PAIR, PAIR | {"weight": value}]], PreferenceTokenizer.load(folder))


def test_a_rank_or_score_that_no_float32_holds_is_refused() -> None:
    row = {"prompt": "u", "completions": ["a", "b"], "scores": [1, 1e39]}
    with pytest.raises(InvalidRecordError, match="E212"):
        decode(row)


def test_a_label_that_a_flag_explains_is_no_margin() -> None:
    row = {"prompt": "u", "response_1": "a", "response_2": "b", "overall_preference": 7}
    label = "overall_preference: 1..3=response_1 5..7=response_2"
    assert decode(row, label=label).records[0].completions[0].margin is None


def test_merged_rows_keep_the_score_and_weight_of_each_answer(folder: Path) -> None:
    rows = [
        {"prompt": "the", "response": "cat", "helpfulness": 4, "weight": 1.0},
        {"prompt": "the", "response": "dog", "helpfulness": 2, "weight": 0.5},
    ]
    formats = FormatSettings(group_by="prompt", score="helpfulness")
    store, _ = build_store([rows], PreferenceTokenizer.load(folder), formats=formats)
    expected = ({"score": 4.0, "margin": 2.0, "weight": 1.0}, {"score": 2.0, "weight": 0.5})
    assert_array_equal(store.values(), matrix(expected))


def test_values_are_no_part_of_the_content(folder: Path) -> None:
    rows = [PAIR | {"weight": 1}, PAIR | {"weight": 2}]
    store, report = build_store([rows], PreferenceTokenizer.load(folder))
    assert (len(store), report.deduplicated) == (1, 1)
    assert store.values()[:, 3].tolist() == [1, 1]
    assert report.values["weight"].count == 2
    (one,), (other,) = (decode(row).records for row in rows)
    assert one.digest() == other.digest()


def test_inspect_shows_and_counts_values() -> None:
    rows = [PAIR | {"margin": 1.5, "weight": 0.5}, PAIR | {"chosen": "mat", "margin": 0.5}]
    (found,) = inspect([rows]).files
    shown = found.segments()
    text = "".join(one.text for one in shown)
    assert "  values     margins of 2 completions, 0.5 … 1.5, mean 1\n" in text
    assert "  values     weights of 2 completions, 0.5 … 0.5, mean 0.5\n" in text
    assert "  chosen (margin 1.5, weight 0.5)\n" in text
    assert "score" not in text
    (found,) = inspect([[PAIR]]).files
    assert "values" not in "".join(one.text for one in found.segments())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert not ended.value.code, shown.err
        return shown.out + shown.err

    return command


@pytest.mark.parametrize("case", ["ultrafeedback_binarized", "Nectar's pairs", "HelpSteer2", "KTO"])
def test_commands_keep_and_count_values(
    case: str, folder: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    row, _, expected = CASES[case]
    file, output = tmp_path / "rows.jsonl", tmp_path / "rows.store"
    file.write_text(json.dumps(row) + "\n")
    assert "  values     " in run("data", "inspect", file)
    built = run("data", "build", file, "--tokenizer", folder, "--output", output)
    assert_array_equal(Store.open(output).values(), matrix(expected))
    reported = run("data", "report", output)
    for name in VALUES:
        has_one = any(name in side for side in expected)
        assert (f"{name}s of " in built) == (f"{name}s of " in reported) == has_one
    run("data", "verify", output)
