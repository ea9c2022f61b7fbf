"""The Python API: type errors name the field, one input may be given alone, one base class."""

import dataclasses
import inspect as inspect_module
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pyarrow
import pytest

from logratio.cache import ReferenceCache
from logratio.data import (
    FeedSettings,
    FormatSettings,
    PreferenceTokenizer,
    TokenizationRules,
    build_store,
    load_store,
)
from logratio.data.inspection import inspect
from logratio.data.readers import as_inputs
from logratio.demo.run import DemoConfig
from logratio.errors import ConfigError, LogratioError, SettingTypeError
from logratio.export.export import export_bundle
from logratio.export.plan import ExportConfig
from logratio.report import write_report
from logratio.serving import Reranker, RewardFunction, rank_file
from logratio.training import (
    DPOTrainer,
    EvaluateConfig,
    LoraSettings,
    PrecomputeConfig,
    SFTConfig,
    SweepConfig,
    TrainConfig,
    evaluate,
    load_model,
    merge_adapter,
    precompute,
    read_lora_config,
    train,
)
from logratio.validation import Range, check_fields

RUN: dict[str, Any] = {"model": "m", "data": ["d"], "output": "o"}
PAIR: dict[str, Any] = {"policy": "p", "reference": "r"}
FEED: dict[str, Any] = {"groups_per_update": 1, "token_budget": 1}
EXPORT: dict[str, Any] = {**PAIR, "output": "o"}


@pytest.mark.parametrize(
    ("kind", "given", "wrong", "words"),
    [
        (TrainConfig, RUN, {"lr": "1e-4"}, "lr must be a number, not '1e-4' (a str)"),
        (TrainConfig, RUN, {"batch_size": 8.0}, "batch_size must be a whole number, not 8.0"),
        (TrainConfig, RUN, {"epochs": True}, "epochs must be a whole number, not True (a bool)"),
        (TrainConfig, RUN, {"lora": True}, "lora must be a LoraSettings or None, not True"),
        (TrainConfig, RUN, {"resume": "yes"}, "resume must be True or False"),
        (TrainConfig, RUN, {"mix": 0.5}, "mix must be a list, each item a number or None"),
        (TrainConfig, RUN, {"mix": ["a"]}, "mix must be"),
        (TrainConfig, RUN, {"model": 3}, "model must be a string or a Path"),
        (TrainConfig, RUN, {"data": 3}, "data: an int is not data"),
        (TrainConfig, RUN, {"data": {"train": "x"}}, "data: a dict is not data"),
        (TrainConfig, RUN, {"rules": {"max_length": 8}}, "rules must be a TokenizationRules"),
        (TrainConfig, RUN, {"beta": "0.1"}, "beta must be a number or None"),
        (PrecomputeConfig, {"model": "m", "data": "d", "cache": "c"}, {"workers": "2"}, "workers"),
        (EvaluateConfig, {**PAIR, "data": "d"}, {"samples": 1.5}, "samples must be a whole"),
        (LoraSettings, {}, {"targets": "q_proj"}, "targets must be a list, each item a string"),
        (LoraSettings, {}, {"rank": "16"}, "rank must be a whole number"),
        (TokenizationRules, {}, {"max_length": "512"}, "max_length must be a whole number"),
        (FormatSettings, {}, {"columns": ["prompt=q"]}, "columns must be a dict"),
        (FeedSettings, FEED, {"seed": 1.0}, "seed must be a whole number"),
        (ExportConfig, EXPORT, {"output": 0.1}, "output must be a string or a Path, not 0.1"),
        (DemoConfig, {}, {"output": "demo"}, "output must be a Path, not 'demo'"),
    ],
)
def test_a_wrong_type_names_its_field(
    kind: Callable[..., object], given: dict[str, Any], wrong: dict[str, Any], words: str
) -> None:
    kind(**given)
    with pytest.raises(SettingTypeError) as caught:
        kind(**{**given, **wrong})
    assert words in str(caught.value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw8bit, adamw-host, not 'sgd'"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, bf16-weights"),
        ({"read_mode": "mmap"}, "read_mode must be one of map, pread"),
    ],
)
def test_an_unknown_value_is_answered_with_the_allowed_ones(
    wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**RUN, **wrong)
    assert words in str(caught.value)


def test_equivalent_types_are_converted() -> None:
    same: dict[str, Any] = {"batch_size": np.int64(4), "label_smoothing": np.float32(0.25)}
    same["mix"] = [1, 2]
    config = TrainConfig(**RUN, lr=1, **same)
    assert (type(config.lr), config.lr) == (float, 1.0)
    assert (type(config.batch_size), config.batch_size) == (int, 4)
    assert (type(config.label_smoothing), config.label_smoothing) == (float, 0.25)
    assert config.mix == (1.0, 2.0)
    assert LoraSettings(targets=["q", "v"]).targets == ("q", "v")  # type: ignore[arg-type]


def test_every_settings_class_is_checked() -> None:
    """Detects a new settings class that does not call `check_fields`."""
    import logratio.training.config as config
    from logratio.data.store import build

    found = [
        kind
        for module in (config, build)
        for kind in vars(module).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        and kind.__name__.endswith(("Config", "Settings", "Rules"))
    ]  # fmt: skip
    assert len(found) >= 6
    kind: Any
    for kind in found:
        called = [vars(base).get("__post_init__") for base in kind.__mro__]
        assert any(one and "check_fields" in one.__code__.co_names for one in called), kind


def numeric_fields(kind: type) -> dict[str, list[Range]]:
    """Return the ranges of each field of a dataclass that takes numbers other than bools."""

    def parts(hint: Any) -> list[Any]:
        return [hint, *(part for inner in get_args(hint) for part in parts(inner))]

    hints = get_type_hints(kind, include_extras=True)
    every = {field.name: parts(hints[field.name]) for field in dataclasses.fields(kind)}
    return {
        name: [part for part in inside if isinstance(part, Range)]
        for name, inside in every.items()
        if {int, float} & {part for part in inside if isinstance(part, type)}
        and name != "loss_options"  # each method has ranges of its own
    }


RANGED = (
    *(TrainConfig, SFTConfig, PrecomputeConfig, EvaluateConfig, SweepConfig),
    *(ExportConfig, DemoConfig),
)


@pytest.mark.parametrize("kind", RANGED)
def test_every_number_has_a_range_of_finite_values(kind: type) -> None:
    given: dict[type, dict[str, Any]] = {
        PrecomputeConfig: {"model": "m", "data": "d", "cache": "c"},
        EvaluateConfig: {"policy": "p", "reference": "r", "data": "d"},
        ExportConfig: EXPORT,
        DemoConfig: {},
        SweepConfig: {"base": TrainConfig(**RUN), "eval_data": "d"},
    }
    assert numeric_fields(kind)
    for name, ranges in numeric_fields(kind).items():
        assert ranges, f"{kind.__name__}.{name} takes any number"
        hint = get_type_hints(kind)[name]
        is_list = "tuple" in str(hint)
        is_float = "float" in str(hint)
        for wrong in [-1, *([float("nan"), float("inf")] if is_float else [])]:
            settings = given.get(kind, RUN) | {name: [wrong] if is_list else wrong}
            with pytest.raises(ConfigError, match=f"{name} must be (at least|above) .*, not "):
                kind(**settings)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and below 1, not 1.0"),
        ({"save_every": -5}, "save_every must be at least 0, not -5"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction must be at least 0 and at most 1, not 2.0"),
        ({"lr": 0}, "lr must be above 0, not 0"),
        ({"decay": 0.0}, "decay must be above 0, not 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, not 0.5"),
        ({"mix": (1.0, -1.0)}, "mix must be above 0, not -1.0"),
    ],
)
def test_a_number_outside_its_range_is_refused_when_the_settings_are_made(
    wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**RUN, **wrong)
    assert str(caught.value) == words


@pytest.mark.parametrize("kind", [*RANGED, DPOTrainer])
def test_signatures_have_no_addresses_and_show_ranges(kind: type) -> None:
    shown = str(inspect_module.signature(kind))
    assert " at 0x" not in shown
    assert kind not in (TrainConfig, SFTConfig) or "Range(at least 0 and below 1)" in shown


def test_sft_settings_take_no_other_loss_and_no_beta() -> None:
    assert SFTConfig(**RUN).loss == "sft"
    with pytest.raises(ConfigError, match="SFTConfig has the loss sft: use TrainConfig for dpo"):
        SFTConfig(**RUN, loss="dpo")
    with pytest.raises(ConfigError, match="SFTConfig has no beta"):
        SFTConfig(**RUN, beta=0.1)


def test_the_repr_of_settings_shows_what_differs_from_the_defaults() -> None:
    config = TrainConfig("m", "d", "o", lr=1e-5, lora=LoraSettings(rank=4), compile_layers=True)
    assert repr(config) == (
        "TrainConfig(model='m', data=['d'], output='o', lr=1e-05, compile_layers='on', "
        "lora=LoraSettings(rank=4))"
    )
    assert repr(SFTConfig("m", "d", "o")) == "SFTConfig(model='m', data=['d'], output='o')"
    assert repr(TokenizationRules(max_length=8)) == "TokenizationRules(max_length=8)"
    assert repr(FormatSettings()) == "FormatSettings()"


@dataclasses.dataclass
class Odd:
    """Annotations of other shapes."""

    pair: tuple[int, str] = (1, "a")
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    word: Literal["a", "b"] | int = "a"

    def __post_init__(self) -> None:
        check_fields(self)


def test_other_annotations() -> None:
    listed: Any = [2, "b"]
    assert Odd(pair=listed).pair == (2, "b")
    assert Odd(word=3).word == 3
    for wrong in ({"pair": (1, 2)}, {"pair": (1,)}, {"table": 1}, {"word": 1.5}):
        with pytest.raises(SettingTypeError):
            Odd(**wrong)
    with pytest.raises(ConfigError):
        Odd(word="c")  # type: ignore[arg-type]


class TestOneInput:
    """One path or table may be given instead of a list, wherever data is given."""

    def test_in_every_call(self, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
        tokenizer = PreferenceTokenizer.load(tiny_model)
        store, report = build_store(str(pairs_file), tokenizer)
        assert report.kept == len(store) == 16
        assert len(inspect(pairs_file).files) == 1
        done = precompute(
            PrecomputeConfig(tiny_model, str(pairs_file), tmp_path / "c"), show_progress=False
        )
        assert done.new == 32
        config = TrainConfig(tiny_model, pairs_file, tmp_path / "o", tmp_path / "c", batch_size=16)
        assert config.data == [pairs_file]
        assert train(config, show_progress=False).steps == 1

    def test_a_path_with_a_dash_is_not_standard_input(self) -> None:
        assert "-" not in PrecomputeConfig("m", "a-b.jsonl", "c").data

    def test_a_table_is_not_treated_as_a_list(self) -> None:
        table = pyarrow.table({"prompt": ["a"]})
        assert as_inputs(table) == [table]
        assert as_inputs((table, "x")) == [table, "x"]
        assert as_inputs(path for path in ("a", "b")) == ["a", "b"]


WRONG: Any = 3
TEXT: Any = "one string"


def unread() -> Reranker:
    """Return a reranker without a bundle: arguments are checked before anything of it is used."""
    return object.__new__(Reranker)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PreferenceTokenizer.load(WRONG), "folder must be a string or a Path, not 3 (an"),
        (lambda: Reranker.load(WRONG), "folder must be a string or a Path, not 3 (an int)"),
        (lambda: load_model(WRONG), "folder must be a string or a Path, not 3 (an int)"),
        (lambda: load_store(WRONG, WRONG), "path must be a string or a Path, not 3 (an int)"),
        (lambda: load_store("x", WRONG), "tokenizer must be a PreferenceTokenizer, not 3 (an int)"),
        (lambda: build_store("x", TEXT), "tokenizer must be a PreferenceTokenizer, not 'one st"),
        (lambda: read_lora_config(WRONG), "path must be a string or a Path, not 3 (an int)"),
        (lambda: ReferenceCache(WRONG), "root must be a string or a Path, not 3 (an int)"),
        (lambda: merge_adapter(WRONG, "x"), "model must be a string or a Path, not 3 (an int)"),
        (lambda: merge_adapter("x", WRONG), "output must be a string or a Path, not 3 (an int)"),
        (lambda: write_report(WRONG), "folder must be a string or a Path, not 3 (an int)"),
        (lambda: write_report("x", WRONG), "path must be a string, a Path or None, not 3 (an int)"),
        (lambda: rank_file(TEXT, "x"), "reranker must be a Reranker or a Workers, not 'one st"),
        (lambda: rank_file(unread(), WRONG), "input must be a string or a Path, not 3 (an int)"),
        (lambda: RewardFunction(WRONG), "bundle must be a string, a Path or a Reranker, not 3"),
        (lambda: RewardFunction(unread(), missing=TEXT), "missing must be a number or None"),
        (lambda: unread().rank(WRONG, ["a"]), "prompt must be a string or a list of messages"),
        (lambda: unread().rank("x", TEXT), "candidates must be a list of strings, not 'one str"),
        (lambda: unread().rank("x", WRONG), "candidates must be a list of strings, not 3"),
        (lambda: unread().rank("x", [WRONG]), "candidates must be a list of strings, not [3]"),
        (lambda: unread().score_many(TEXT), "requests must be a list, each item"),
        (lambda: unread().score_many([WRONG]), "requests must be a list, each item"),
    ],
)
def test_a_wrong_argument_of_a_call_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(SettingTypeError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "act",
    [
        lambda folder, pairs: PreferenceTokenizer.load(folder / "nowhere"),
        lambda folder, pairs: build_store("nothing.jsonl", PreferenceTokenizer.load(folder)),
        lambda folder, pairs: build_store([], PreferenceTokenizer.load(folder)),
        lambda folder, pairs: build_store([pairs, pairs], PreferenceTokenizer.load(folder)),
        lambda folder, pairs: build_store(pairs, PreferenceTokenizer.load(folder), resume=True),
        lambda folder, pairs: build_store(
            pairs,
            PreferenceTokenizer.load(folder),
            conflicts="best",  # type: ignore[arg-type]
        ),
        lambda folder, pairs: TokenizationRules(max_length=1),
        lambda folder, pairs: TokenizationRules(max_prompt_length=0),
        lambda folder, pairs: FeedSettings(groups_per_update=0, token_budget=1),
    ],
)
def test_a_users_mistake_raises_a_logratio_error(
    tiny_model: Path, pairs_file: Path, act: Callable[[Path, Path], object]
) -> None:
    with pytest.raises(LogratioError):
        act(tiny_model, pairs_file)


def test_exceptions_of_the_compiled_module_are_logratio_errors(tmp_path: Path) -> None:
    from logratio import _rust
    from logratio.errors import ArgumentError, CorruptCacheError, CorruptStoreError

    assert _rust.CorruptStoreError is CorruptStoreError
    assert _rust.CorruptCacheError is CorruptCacheError
    (tmp_path / "x.store").write_bytes(b"no store" * 100)
    with pytest.raises(LogratioError) as found:
        _rust.Store.open(tmp_path / "x.store")
    assert type(found.value) is CorruptStoreError
    assert isinstance(found.value, ValueError)
    writer = _rust.StoreWriter()
    writer.close()
    with pytest.raises(ArgumentError):
        writer.finish()


def test_names_of_other_trainers_are_fields() -> None:
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8}
    run: dict[str, Any] = {"model": "m", "train_dataset": "d", "output_dir": "o"}
    run |= {"learning_rate": 1e-4, "num_train_epochs": 2, "loss_type": "sigmoid", "ref_model": "r"}
    assert TrainConfig(**run, lora=LoraSettings(**lora)) == TrainConfig(
        "m", "d", "o", lr=1e-4, epochs=2, loss="dpo", reference="r", lora=LoraSettings(4, 8.0)
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"columns": {"prompt": "q"}}, "write formats=FormatSettings(columns=…)"),
        ({"max_length": 8}, "write rules=TokenizationRules(max_length=…)"),
        ({"lora_rank": 8}, "write lora=LoraSettings(rank=…)"),
        ({"bf16": True}, 'has no bf16: use `precision="bf16"`'),
        ({"per_device_train_batch_size": 8}, "set `batch_size`, the number of pairs in an update"),
        ({"rpo_alpha": 0.1}, 'has no rpo_alpha: add sft with a weight: `loss="dpo+sft:0.1"`'),
        ({"torch_compile": True}, 'use `compile_layers="on"` or `auto`'),
        ({"precompute_ref_log_probs": True}, "use `cache=…, precompute=True`"),
        ({"max_seq_length": 9}, "use `rules=TokenizationRules(max_length=…)`"),
        ({"learning_rte": 1e-4}, "did you mean learning_rate?"),
        ({"lerning_rate": 1e-4}, "did you mean learning_rate?"),
        ({"batchsize": 8}, "did you mean batch_size?"),
        ({"learning_rate": 1e-4, "lr": 1e-5}, "learning_rate means lr, which is given too"),
    ],
)
def test_an_unknown_name_is_answered_with_a_suggestion(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises((SettingTypeError, ConfigError)) as caught:
        TrainConfig(**RUN, **wrong)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["compute_metrics", "quiet", "x"])
def test_a_name_that_resembles_no_field_has_no_suggestion(name: str) -> None:
    wrong: dict[str, Any] = {name: 1}
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**RUN, **wrong)
    assert str(caught.value) == f"TrainConfig has no {name}"


def test_the_trainer_shows_what_users_of_transformers_look_for() -> None:
    shown = [*inspect_module.signature(DPOTrainer).parameters]
    assert shown[:2] == ["model", "data"]
    names = {"tokenizer", "reference", "eval_data", "peft_config", "callbacks", "config"}
    assert names <= set(shown)


@pytest.mark.parametrize(
    "kind", [*RANGED, LoraSettings, TokenizationRules, FormatSettings, FeedSettings]
)
def test_an_unknown_name_is_one_kind_of_error_in_all_settings(kind: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="has no wrong_name") as caught:
        kind(wrong_name=1)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("call", [train, precompute, evaluate, export_bundle])
def test_settings_of_another_class_are_refused(call: Callable[..., object]) -> None:
    with pytest.raises(
        SettingTypeError, match=r"expected a \w+Config, not a dict: write \w+\(\*\*"
    ):
        call(dict(RUN))
