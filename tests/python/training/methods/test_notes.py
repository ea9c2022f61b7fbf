"""A run is warned of a loss that begins in the wrong direction, and of labels out of balance."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from loss_inputs import objective_of

from logratio._rust import ROLES, Store, StoreWriter
from logratio.training.methods.notes import goes_the_other_way, notes_of
from logratio.training.methods.table import METHODS


def labelled(good: int, bad: int, weight_of_good: float = math.nan) -> Store:
    """Single answers with labels; only good ones may have a weight."""
    writer = StoreWriter()
    for line, role in enumerate(["chosen"] * good + ["rejected"] * bad, 1):
        values = np.full((1, 4), np.nan, np.float32)
        values[0, 3] = weight_of_good if role == "chosen" else math.nan
        one = np.ones(1, np.uint8)
        tokens = np.array([line], np.int32)
        roles = np.array([ROLES.index(role)], np.uint8)
        writer.push(tokens, tokens, one, one.astype(np.uint32), roles, 0, line, values)
    return writer.finish()


@pytest.mark.parametrize(
    ("good", "bad", "options", "warns"),
    [
        (12, 12, {}, False),
        (16, 12, {}, False),
        (17, 12, {}, True),
        (12, 16, {}, True),
        (12, 16, {"desirable_weight": 1.5}, False),
        (40, 10, {"undesirable_weight": 3.5}, False),
        (40, 10, {"undesirable_weight": 5.0}, True),
        (5, 0, {}, False),
    ],
)
def test_kto_warns_if_the_ratio_of_the_weights_is_outside_1_to_4_thirds(
    good: int, bad: int, options: dict[str, float], warns: bool
) -> None:
    ratio = good * options.get("desirable_weight", 1.0)
    ratio /= max(bad, 1) * options.get("undesirable_weight", 1.0)
    assert warns == (bad > 0 and not 1 <= ratio <= 4 / 3)
    found = notes_of(labelled(good, bad), objective_of("kto", **options))
    assert [note[:6] for note in found] == ["[W528]"] * warns


def test_the_advised_weights_end_the_warning_and_weights_of_rows_count() -> None:
    (note,) = notes_of(labelled(40, 10), objective_of("kto"))
    assert "desirable_weight=0.25 to 0.333" in note
    assert "undesirable_weight=3 to 4" in note
    for option, value in (("desirable_weight", 0.3), ("undesirable_weight", 3.2)):
        assert not notes_of(labelled(40, 10), objective_of("kto", **{option: value}))
    assert not notes_of(labelled(40, 10, weight_of_good=0.25), objective_of("kto"))
    assert not notes_of(labelled(40, 10), objective_of("bco-unpaired"))


@pytest.mark.parametrize("name", METHODS)
def test_only_discopop_begins_in_the_wrong_direction(name: str) -> None:
    (term,) = objective_of(name).terms
    assert goes_the_other_way(term) == (name == "discopop")


def test_the_direction_of_discopop_changes_where_its_derivative_says() -> None:
    """At 0 its derivative is (1 − ln 2)/(4τ) − 3/4."""
    change = (1 - math.log(2)) / 3
    for tau, expected in ((0.999 * change, True), (1.001 * change, False), (1.0, False)):
        assert goes_the_other_way(objective_of("discopop", tau=tau).terms[0]) is expected


def test_the_command_prints_the_warnings_once_before_training(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    given = ("train", "--model", tiny_model, "--data", pairs_file, "--output", tmp_path / "out")
    _, _, err = run(*given, "--loss", "discopop", "--dry-run")
    assert err.count("[W529]") == 1
    assert "discopop with tau 0.05" in err
    assert "W529" not in run(*given, "--loss", "discopop", "--loss-option", "tau=1", "--dry-run")[2]
