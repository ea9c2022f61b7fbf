"""Settings from YAML files: what is read, and the errors with file and line."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logratio.config_file import ConfigFileError, flat, read_values, unwritable
from logratio.data import FormatSettings, TokenizationRules
from logratio.errors import MissingInputError
from logratio.training import EvaluateConfig, LoraSettings, PrecomputeConfig, SFTConfig, TrainConfig

REQUIRED = "model: m\ndata: d\noutput: o\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def read(file: Path, text: str, **overrides: Any) -> TrainConfig:
    file.write_text(text)
    return TrainConfig.from_yaml(file, **overrides)


def made(**settings: Any) -> TrainConfig:
    return TrainConfig("m", "d", "o", **settings)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("lr: 1e-6", {"lr": 1e-6}),  # a string in YAML 1.1
        ("lr: 2.5E-5", {"lr": 2.5e-5}),
        ("lr: 1", {"lr": 1.0}),
        ("token_budget: 8_192", {"token_budget": 8192}),
        ("seed: 010", {"seed": 10}),  # 8 in YAML 1.1
        ("beta: null", {}),
        ("beta: ~", {}),
        ("beta:", {}),
        ("compile: off", {"compile_layers": "off"}),  # False in YAML 1.1
        ("compile: on", {"compile_layers": "on"}),
        ("compile_layers: true", {"compile_layers": True}),
        ("deterministic: yes", {"deterministic": True}),
        ("deterministic: False", {}),
        ("date: 2026-11-29", {"rules": TokenizationRules(date="2026-11-29")}),  # a date in YAML 1.1
        ("learning_rate: 1e-5", {"lr": 1e-5}),
        ("loss_type: sigmoid", {"loss": "dpo"}),
        ("num-train-epochs: 3", {"epochs": 3}),
        ("mix: [1, 2.5]", {"mix": (1.0, 2.5)}),
        ("eos: no", {"rules": TokenizationRules(append_eos=False)}),
        ("chat: true", {"rules": TokenizationRules(text_as="chat")}),
        ("chat: off", {"rules": TokenizationRules(text_as="text")}),
        ("max-length: 64", {"rules": TokenizationRules(max_length=64)}),
        (
            "rules:\n  max_length: 4096\n  max_prompt_length: 2000",
            {"rules": TokenizationRules(max_length=4096, max_prompt_length=2000)},
        ),
        (
            "max_prompt_length: 9\nrules: {max_length: 64}",
            {"rules": TokenizationRules(max_length=64, max_prompt_length=9)},
        ),
        ("lora: true", {"lora": LoraSettings()}),
        ("lora: {}", {"lora": LoraSettings()}),
        ("lora: false", {}),
        ("lora:", {}),
        ("use_peft: true\nlora_r: 4", {"lora": LoraSettings(rank=4)}),
        ("lora: {r: 4, lora_alpha: 8}", {"lora": LoraSettings(4, 8.0)}),
        ("lora:\n  target_modules: [q_proj]", {"lora": LoraSettings(targets=("q_proj",))}),
        ("load_in_4bit: true", {"quantization": "4bit"}),
        ("load_in_4bit: false", {}),
        ("lora: {use_rslora: yes}", {"lora": LoraSettings(use_rslora=True)}),
        ("lora: on\nlora_dora: true", {"lora": LoraSettings(use_dora=True)}),
        ("lora: on\nlora_target: [q_proj]", {"lora": LoraSettings(targets=("q_proj",))}),
        (
            "formats: {format: trl, columns: {prompt: question}}",
            {"formats": FormatSettings(format="trl", columns={"prompt": "question"})},
        ),
        (
            "label: 'preference: 1=output_1 2=output_2'",
            {"formats": FormatSettings(label="preference: 1=output_1 2=output_2")},
        ),
        ("rows: argilla", {"formats": FormatSettings(rows="argilla")}),
    ],
)
def test_a_file_is_read_as_the_settings(file: Path, text: str, settings: dict[str, Any]) -> None:
    assert read(file, REQUIRED + text) == made(**settings)


def test_numbers_are_text_where_text_is_needed(file: Path) -> None:
    config = read(file, "model: 7\ndata: [2024, -]\noutput: 1e3")
    assert (config.model, config.data, config.output) == ("7", ["2024", "-"], "1e3")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("lr: fast", 4, "lr must be a number, not 'fast'"),
        ('beta: "0.1"', 4, "beta must be a number or None, not '0.1'"),
        ("epochs: 1.5", 4, "epochs must be a whole number"),
        ("epochs: yes", 4, "epochs must be a whole number"),
        ("chat: [a]", 4, "text_as must be one of text, chat or None"),
        ("deterministic: 1", 4, "deterministic must be True or False"),
        ("\nprecision: fp16", 5, "precision must be one of fp32, bf16"),
        ("lr: [1e-6]", 4, "lr must be a number"),
        ("mix: [[1]]", 4, "cannot be nested"),
        ("columns: {a: {b: c}}", 4, "cannot be nested"),
        ("columns: {prompt: a, prompt: b}", 4, "a key is given twice"),
        ("learnin_rate: 1", 4, "unknown key learnin_rate: did you mean lr?"),
        ("batchsize: 1", 4, "did you mean batch_size?"),
        ("nonsense: 1", 4, "unknown key nonsense"),
        ("bf16: true", 4, "unknown key bf16: use `precision: bf16`"),
        ("gradient_accumulation_steps: 8", 4, "set `batch_size`, the number of pairs"),
        ("resume: true", 4, "belongs to one call, not to a file: give resume=True"),
        ("dry-run: true", 4, "give dry_run=True"),
        ("lr: 1\nlr: 1", 5, "lr is already given in line 4"),
        ("{}: 1", 4, "a key must be a word"),
        ("learning_rate: 1\nlr: 1", 5, "already given in line 4"),
        ("max_length: 9\nrules: {max_length: 9}", 5, "already given in line 4"),
        ("rules: 3", 4, "rules is a block"),
        ("lora: 8", 4, "lora is a block"),
        ("lora_rank: 8", 4, "lora_rank is given without lora: true"),
        ("lora: false\nlora_rank: 8", 5, "lora_rank is given without lora: true"),
        ("lora:\n  rnk: 8", 5, "unknown key rnk: did you mean rank?"),
        ("lora:\n  target_modul: q", 5, "unknown key target_modul: did you mean targets?"),
        ("lora:\n  bias: none", 5, "unknown key bias: biases of the base are not trained"),
        ("r: 8", 4, "unknown key r: write it below `lora:`, indented"),
        ("target_modules: [q]", 4, "unknown key target_modules: write it below `lora:`"),
        ("grid:\n  lr: 1", 4, "unknown key grid; blocks here are lora, rules, formats"),
        ("epochs: 1, 2", 4, "epochs must be a whole number, not '1, 2'"),
        ("formats:\n  lists: pairs\n  format: nope", 6, "formats.format 'nope' is not one of"),
        ("date: tomorrow", 4, "write it as 2026-11-29"),
        ("rules:\n  max_length: 8\n  max_prompt_length: 9", 4, "max_prompt_length is 9"),
        ("kinds: [pair]", 4, "unknown key kinds"),
        ("seed: !!python/object/apply:os.getcwd []", 4, "tag python/object/apply"),
        ("seed: !!python/name:os.getcwd ''", 4, "the tag python/name:os.getcwd is not supported"),
        ("seed: !!set {1}", 4, "the tag set is not supported"),
        ("x: [", 4, "not YAML"),
        ("'x", 4, "not YAML"),
        ("---\na: 1", 4, "not YAML"),
    ],
)
def test_an_error_has_the_line(file: Path, text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigFileError, match=reason) as caught:
        read(file, REQUIRED + text)
    assert str(caught.value).startswith(f"{file}:{line}: ")


@pytest.mark.parametrize(
    "text",
    [
        *("q_proj,v_proj", "q_proj, v_proj", '"q_proj, v_proj"', "[q_proj, v_proj]"),
        *("\n    - q_proj\n    - v_proj", "[ q_proj , v_proj ]"),
    ],
)
@pytest.mark.parametrize("key", ["targets", "target_modules", "target", "modules_to_save"])
def test_a_list_may_be_written_with_commas(file: Path, text: str, key: str) -> None:
    if key == "target":
        given = f"{REQUIRED}lora: true\nlora_target: {text}\n".replace("\n    -", "\n  -")
    else:
        given = f"{REQUIRED}lora:\n  {key}: {text}\n"
    lora = read(file, given).lora
    assert lora
    name = "modules_to_save" if key == "modules_to_save" else "targets"
    assert getattr(lora, name) == ("q_proj", "v_proj")


def test_a_comma_in_a_name_of_a_file_or_of_a_run_stays(file: Path) -> None:
    config = read(file, "model: m\ndata: a,b.jsonl\noutput: o,p\nrun_name: a, b\nmix: 1, 2.5\n")
    assert config.data in ("a,b.jsonl", ["a,b.jsonl"], ("a,b.jsonl",))
    assert (config.output, config.run_name, config.mix) == ("o,p", "a, b", (1.0, 2.5))


def test_all_linear_layers_have_the_name_of_peft(file: Path) -> None:
    lora = read(file, REQUIRED + "lora:\n  r: 4\n  target_modules: all-linear\n").lora
    assert lora and (lora.rank, lora.targets) == (4, ())


@pytest.mark.parametrize("text", ["", "# nothing", "- a", "word", "[" * 5000, "a: \x00", b"\xff"])
def test_a_file_without_keys_is_refused(file: Path, text: str | bytes) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigFileError, match=r"run\.yaml"):
        TrainConfig.from_yaml(file)


def test_an_alias_cannot_fill_the_memory(file: Path) -> None:
    layers = "".join(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(ConfigFileError, match="unknown key l0"):
        read(file, "l0: &l0 [a]\n" + layers)
    shared = "".join(f"- &l{n} [*l{n - 1}, *l{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(ConfigFileError, match="cannot be nested"):
        read(file, f"data:\n- &l0 [a]\n{shared}")


def test_a_missing_file_and_missing_settings(file: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        TrainConfig.from_yaml(file)
    with pytest.raises(ConfigFileError, match="data and output must be given"):
        read(file, "model: m")
    assert read(file, "model: m", data="d", output="o") == made()


def test_overrides_take_precedence(file: Path) -> None:
    config = read(file, REQUIRED + "lr: 1\nlora: true", learning_rate=2.0, lora=None, output="p")
    assert (config.lr, config.lora, config.output) == (2.0, None, "p")


def test_other_commands_have_files_too(file: Path) -> None:
    file.write_text("model: m\ndata: d\ncache: c\nquantization: 4bit\nmax_length: 9\n")
    rules = TokenizationRules(max_length=9)
    expected = PrecomputeConfig("m", "d", "c", quantization="4bit", rules=rules)
    assert PrecomputeConfig.from_yaml(file) == expected
    file.write_text("policy: p\nref_model: r\ndata: d\nsamples: 5\n")
    assert EvaluateConfig.from_yaml(file) == EvaluateConfig("p", "r", "d", samples=5)
    file.write_text(REQUIRED)
    assert SFTConfig.from_yaml(file) == SFTConfig("m", "d", "o")


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(
    words,
    st.lists(words, min_size=1, max_size=3),
    st.floats(1e-12, 1e12),
    st.one_of(st.none(), words),
    st.dictionaries(st.sampled_from(["prompt", "chosen"]), words),
)
def test_written_settings_are_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    data: list[str],
    lr: float,
    device: str | None,
    columns: dict[str, str],
) -> None:
    config = TrainConfig(
        model, data, Path("out"), lr=lr, device=device, formats=FormatSettings(columns=columns)
    )
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(file) == dataclasses.replace(config, output="out")


def test_every_field_is_written_except_those_of_one_call(file: Path) -> None:
    label = FormatSettings(label="p: 1='a b' 2=c", rows="argilla", group_by="id")
    config = made(lora=LoraSettings(targets=("q",)), formats=label, mix=(1.0, 2.0), resume=True)
    assert read(file, config.to_yaml()) == dataclasses.replace(config, resume=False)
    written = {line.partition(":")[0] for line in config.to_yaml().splitlines() if line[0] != " "}
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert written - {"- d", "- 1.0", "- 2.0"} == fields - {"resume", "overwrite"}


def test_a_value_without_text_is_left_out() -> None:
    table = pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    config = TrainConfig("m", [table], "o", formats=FormatSettings(rows=lambda row: row))
    assert unwritable(config) == ["data"]
    assert unwritable(config.formats) == ["rows"]
    assert "\ndata:" not in config.to_yaml()
    assert "\n  rows:" not in config.to_yaml()


def test_flat_settings_have_the_keys_outside_blocks(file: Path) -> None:
    file.write_text("lora: {rank: 4}\nrules: {max_length: 9}\nlr: 1\n")
    values = read_values(TrainConfig, file)
    assert flat(TrainConfig, values) == {"lora": True, "lora_rank": 4, "max_length": 9, "lr": 1}
    file.write_text("lora: false\n")
    assert flat(TrainConfig, read_values(TrainConfig, file)) == {"lora": False}
