"""Settings of a loss that have no effect, are out of range or unknown are refused."""

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from loss_inputs import objective_of

from logratio.cli.objective_flags import Objective as CommandLine
from logratio.errors import ConfigError
from logratio.synonyms import LOSSES
from logratio.training.config import TrainConfig
from logratio.training.methods.method import Option
from logratio.training.methods.objective import ALONE, Objective, terms_of
from logratio.training.methods.table import METHODS, MIXTURES
from logratio.training.run_file import RUN_FILE, record_settings

OPTIONS = sorted({name for method in METHODS.values() for name in method.options})


def terms(loss: str, **settings: object) -> object:
    return terms_of(TrainConfig("model", "data", "out", loss=loss, **settings))  # type: ignore[arg-type]


def value_in_range(option: str) -> float:
    """A value that at least one method accepts."""
    (found, *_) = [m.options[option].default for m in METHODS.values() if option in m.options]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_a_method_lacks_is_an_error(name: str) -> None:
    for option in OPTIONS:
        if option not in METHODS[name].options:
            with pytest.raises(ConfigError, match=f"{name} has no .*{option}"):
                objective_of(name, **{option: value_in_range(option)})


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_a_method_has_is_used(name: str) -> None:
    for option, range_ in METHODS[name].options.items():
        value = 0.4 if range_.allows(0.4) else 2.0
        (term,) = objective_of(name, **{option: value}).terms
        assert term.options == {
            key: value if key == option else one.default
            for key, one in METHODS[name].options.items()
        }


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.beta is None])
def test_a_beta_that_a_method_lacks_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no .*beta"):
        objective_of(name, 0.1)


@pytest.mark.parametrize("beta", [0.0, -0.1, inf, -inf, nan])
@pytest.mark.parametrize("name", ["dpo", "simpo", "kto", "lipo", "dpo+sft"])
def test_a_beta_out_of_range_is_an_error(name: str, beta: float) -> None:
    with pytest.raises(ConfigError, match="beta must be"):
        terms(name, beta=beta)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.options])
def test_an_option_out_of_its_range_is_an_error(name: str) -> None:
    for option, has in METHODS[name].options.items():
        ends = [has.low, has.high] if has.is_open else [has.low - 1e-9, has.high + 1e-9]
        for value in (*ends, nan, inf, -inf):
            with pytest.raises(ConfigError, match=option):
                objective_of(name, **{option: value})


def test_defaults_are_in_their_ranges() -> None:
    for method in METHODS.values():
        assert all(option.allows(option.default) for option in method.options.values())
        assert method.beta is None or method.beta > 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("dop", "'dop' is unknown, did you mean dpop.; choose from dpo, .*or name a function"),
        ("", "'' is unknown"),
        ("dpo+", "'' is unknown"),
        ("dpo+nothing:0.5", "'nothing' is unknown"),
        ("DPO", "'DPO' is unknown"),
        ("dpo:0", "weight must be a number above 0"),
        ("dpo:-1", "weight must be a number above 0"),
        ("dpo+sft:nan", "weight must be a number above 0"),
        ("dpo:inf", "weight must be a number above 0"),
        ("dpo+dpo", "dpo occurs twice"),
        ("mpo+dpo", "dpo occurs twice"),
        ("dpo+kto", "dpo needs pairs and kto needs labelled answers"),
        ("dpo+plackett-luce", "dpo needs pairs and plackett-luce needs lists"),
        ("kto+sft", "kto needs labelled answers and sft needs demonstrations"),
        ("kto+lipo", "one kind of data"),
        ("ld-dpo:0.5+sft", "weighs tokens cannot be mixed"),
        ("sampo+dpo", "weighs tokens cannot be mixed"),
        ("no_such_module:loss", "cannot be imported"),
        ("math:pi", "neither a function nor a Method"),
    ],
)
def test_a_loss_that_cannot_be_used_is_an_error(loss: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        terms(loss)


@pytest.mark.parametrize("loss", ["dpo+sft", "simpo+sft:0.1", "plackett-luce+sft", "sft"])
def test_imitation_may_be_added_to_pairs_and_lists(loss: str) -> None:
    assert Objective.of(TrainConfig("model", "data", "out", loss=loss)).terms


def test_weights_and_names_of_mixtures_multiply() -> None:
    config = TrainConfig("model", "data", "out", loss="mpo:2+hinge:0.25")
    weights = {term.name: term.weight for term in terms_of(config)}
    assert weights == {"dpo": 1.6, "bco": 0.4, "sft": 2.0, "hinge": 0.25}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_name_methods(name: str) -> None:
    weights = {term.name: term.weight for term in objective_of(name).terms}
    assert weights == MIXTURES[name]
    assert weights.keys() <= METHODS.keys()


def test_an_option_of_one_of_several_methods_goes_to_that_one() -> None:
    first, second = objective_of("dpo+simpo", gamma=0.3, label_smoothing=0.2).terms
    assert first.options == {"label_smoothing": 0.2}
    assert second.options == {"gamma": 0.3, "label_smoothing": 0.2}


def test_settings_of_their_own_are_options_of_some_method() -> None:
    assert set(ALONE) <= set(OPTIONS)


@pytest.mark.parametrize("loss", [3, {"dpo": 1.0}, ["dpo", ("sft", 0.2)], len])
def test_a_loss_that_is_no_text_is_refused_with_what_works(loss: Any) -> None:
    with pytest.raises(ConfigError, match=r"is a method, such as dpo or dpo:1\.0"):
        TrainConfig("model", "data.jsonl", "out", loss=loss)


@pytest.mark.parametrize(
    ("name", "near"),
    [("dppo", "dpo"), ("KTO", "kto"), ("best_worst", "best-worst"), ("orpp", "orpo")],
)
def test_an_unknown_method_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown, did you mean {near}"):
        Objective.of(TrainConfig("model", "data.jsonl", "out", loss=name))


@pytest.mark.parametrize("name", ALONE)
def test_an_option_that_is_given_in_two_ways_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0.2, and .*{name} is 0.3: give one"):
        terms("simpo", loss_options={name: 0.3}, **{name: 0.2})
    assert objective_of("simpo", **{name: 0.3})


def test_an_option_that_is_repeated_on_the_command_line_is_refused() -> None:
    flags = CommandLine(loss_option=["penalty=2", "penalty=3"])
    with pytest.raises(ConfigError, match="penalty is given twice"):
        flags.settings()
    assert CommandLine(loss_option=["a=2,b=3"]).settings()["loss_options"] == {"a": 2, "b": 3}


@pytest.mark.parametrize("name", ALONE)
def test_the_recorded_settings_of_a_run_can_be_used_again(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = TrainConfig(tiny_model, "data", tmp_path, loss="simpo", loss_options={name: 0.3})
    record_settings(config)
    again = TrainConfig.from_yaml(tmp_path / RUN_FILE)
    assert terms_of(again) == terms_of(config)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (Option(1, "", is_open=True), "above 0"),
        (Option(1, "", 0, 0.5, is_open=True), "above 0 and below 0.5"),
        (Option(1, ""), "at least 0"),
        (Option(1, "", 0, 0.5), "0 to 0.5"),
        (Option(1, "", -inf), "finite"),
    ],
)
def test_a_range_is_written_in_words(option: Option, words: str) -> None:
    assert option.range == words
    assert not option.allows(nan)


def test_an_option_out_of_range_is_answered_with_its_range() -> None:
    with pytest.raises(ConfigError, match="loss kto: desirable_weight must be above 0, not 0"):
        objective_of("kto", desirable_weight=0.0)


@pytest.mark.parametrize("name", [*LOSSES, "sigmoid", "exo_pair", "apo_zero"])
def test_a_loss_of_trl_is_answered_with_the_method_here(name: str) -> None:
    with pytest.raises(ConfigError, match="is a name of TRL: give ") as caught:
        objective_of(name)
    own = str(caught.value).partition("give ")[2].partition(";")[0].partition(",")[0]
    assert own in METHODS
