"""A reward model: the same loop and data, and scores that transformers and peft compute too."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, write_pairs
from rewards import plain_scores
from safetensors.torch import load_file, save_file
from stop_after import stop_after
from tiny_models import mamba_config, tiny, word_tokenizer
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CTRLConfig,
    PreTrainedConfig,
)

from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError, LogratioError
from logratio.training import (
    EvaluateConfig,
    LoraSettings,
    SweepConfig,
    TrainConfig,
    evaluate,
    train,
)
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.merging import merge_adapter
from logratio.training.models import ModelFolderError, load_model, quietly
from logratio.training.policy import build_policy
from logratio.training.sweep_runs import prepare
from logratio.training.trainer import DPOTrainer

PAIRS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


@pytest.fixture
def config(tiny_model: Path, data: Path, tmp_path: Path) -> TrainConfig:
    settings = TrainConfig(tiny_model, [data], tmp_path / "out", loss="bradley-terry", lr=1e-2)
    return replace(settings, batch_size=4, epochs=2, save_every=0)


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folders of a whole reward model and of an adapter, trained once each."""
    folder = tmp_path_factory.mktemp("trained")

    def run(kind: str) -> Path:
        lora = LoraSettings(rank=4) if kind == "adapter" else None
        settings = TrainConfig(tiny_model, [data], folder / kind, loss="bradley-terry", lora=lora)
        train(replace(settings, lr=1e-2, batch_size=4, epochs=3), show_progress=False)
        return folder / kind

    return run


def quiet(config: TrainConfig) -> list[dict[str, float]]:
    return train(config, show_progress=False).history


def groups_of(model: Path, data: Path) -> list[tuple[list[int], list[list[int]]]]:
    """The token ids of each pair, chosen first, as the tokenizer of the library makes them."""
    tokenizer, groups = PreferenceTokenizer.load(model), []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        found = tokenizer.encode_completions(row["prompt"], [row["chosen"], row["rejected"]])
        groups.append((found.prompt_ids, [one.ids for one in found.completions]))
    return groups


def oracle_scores(model: Any, groups: list[Any]) -> Iterator[Tensor]:
    """Scores of chosen and rejected, float64 `[B]` each, by transformers' own forward."""
    yield from plain_scores(model, groups).view(-1, 2).unbind(1)


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_first_update_is_that_of_transformers_in_float64(
    config: TrainConfig, data: Path, center: float
) -> None:
    config = replace(config, batch_size=PAIRS, loss_options={"center": center}, max_grad_norm=1e9)
    first = quiet(config)[0]
    model: Any = build_policy(config, "cpu").double()
    model.set_attn_implementation("eager")
    chosen, rejected = oracle_scores(model, groups_of(Path(config.model), data))
    loss = (-logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2).mean()
    loss.backward()
    chosen, rejected = chosen.detach(), rejected.detach()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    expected = {
        "loss": float(loss.detach()),
        "grad_norm": norm,
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).double().mean()),
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=2e-5)
    assert not [name for name in first if name.startswith(("logps/", "logratios/"))]


def test_the_new_head_follows_the_seed(config: TrainConfig) -> None:
    heads = [_head(replace(config, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.5 < float(heads[0].std()) / 0.02 < 1.5  # the initializer_range of the config


def _head(config: TrainConfig) -> Tensor:
    policy: Any = build_policy(config, "cpu")
    return policy.score.weight.detach()  # type: ignore[no-any-return]


def test_micro_batches_and_layouts_train_the_same_weights(config: TrainConfig) -> None:
    quiet(config)
    for number, changes in enumerate(
        ({"token_budget": 20}, {"share_beginnings": True}, {"activation_checkpointing": "all"})
    ):
        other = replace(config, output=f"{config.output}{number}", **changes)  # type: ignore[arg-type]
        quiet(other)
        one, two = (load_file(Path(c.output) / "model.safetensors") for c in (config, other))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    quiet(config)
    again = replace(config, output=tmp_path / "again")
    with stop_after(3), pytest.raises(RunInterruptedError):
        quiet(again)
    quiet(replace(again, resume=True))
    one, two = (load_file(Path(c.output) / "model.safetensors") for c in (config, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_transformers_computes_the_scores_of_the_saved_model(
    trained: Callable[[str], Path], tiny_model: Path, data: Path, kind: str
) -> None:
    folder = trained(kind)
    if kind == "whole":
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["architectures"] == [
            "LlamaForSequenceClassification"
        ]
    else:
        from peft import PeftModel

        base: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        with quietly():  # peft uses a deprecated name
            model = PeftModel.from_pretrained(base, folder).merge_and_unload()
    with torch.no_grad():
        chosen, rejected = oracle_scores(model.double().eval(), groups_of(tiny_model, data))
    result = evaluate(EvaluateConfig(folder, None, [data]), show_progress=False)
    assert result.accuracy == float((chosen > rejected).double().mean()) == 1.0
    assert result.reward_chosen == pytest.approx(float(chosen.mean()), rel=1e-4)
    assert result.reward_rejected == pytest.approx(float(rejected.mean()), rel=1e-4)
    assert result.margin == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert (result.beta, result.logratio_chosen, result.kl) == (None, None, None)


def test_a_padded_batch_in_transformers_has_the_same_scores(
    trained: Callable[[str], Path], tiny_model: Path, data: Path
) -> None:
    folder, groups = trained("whole"), groups_of(tiny_model, data)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [prompt + ids for prompt, answers in groups for ids in answers]
    width = max(map(len, rows))
    pad = model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
        torch.testing.assert_close(found, plain_scores(model, groups), rtol=1e-4, atol=1e-5)


def test_the_end_of_a_text_is_scored_though_it_is_the_padding_token(
    tiny_model: Path, config: TrainConfig, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(tmp_path / "same")
    policy: Any = build_policy(replace(config, model=tmp_path / "same"), "cpu")
    assert policy.config.pad_token_id is None
    policy = build_policy(config, "cpu")
    assert policy.config.pad_token_id == 0


def test_a_reward_model_is_trained_further(
    trained: Callable[[str], Path], config: TrainConfig, tmp_path: Path
) -> None:
    whole = replace(config, model=trained("whole"), lr=1e-6, max_steps=1)
    assert quiet(whole)[0]["loss"] < 0.1
    adapter = replace(config, model=trained("adapter"), output=tmp_path / "further")
    assert quiet(replace(adapter, adapter="continue", lr=1e-6, max_steps=1))[0]["loss"] < 0.1
    over = replace(config, model=trained("whole"), output=tmp_path / "over", lora=LoraSettings(2))
    quiet(replace(over, lr=1e-6, max_steps=1))
    assert evaluate(EvaluateConfig(over.output, None, config.data)).accuracy == 1.0


def test_a_merged_adapter_has_the_same_scores(
    trained: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    merge_adapter(trained("adapter"), tmp_path / "merged")
    first, second = (
        evaluate(EvaluateConfig(folder, None, [data]), show_progress=False).margin
        for folder in (trained("adapter"), tmp_path / "merged")
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_held_out_pairs_are_evaluated_during_the_run(config: TrainConfig) -> None:
    best = {"eval_share": 0.3, "best_metric": "rewards/accuracies"}
    result = train(replace(config, **best), show_progress=False)  # type: ignore[arg-type]
    row = result.evaluations[-1]
    assert row["eval_loss"] < math.log(2)
    assert row["accuracy_interval"][1] == 1.0
    assert 0 <= row["eval_expected_calibration_error"] < 0.5
    assert row["sources"]["pairs.jsonl"]["groups"] == row["groups"]
    card = (Path(config.output) / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("out")' in card


def test_bfloat16_scores_differ_by_rounding_only(
    trained: Callable[[str], Path], data: Path
) -> None:
    plain = evaluate(EvaluateConfig(trained("whole"), None, [data]), show_progress=False)
    for precision in ("bf16", "bf16-weights"):
        low = replace(EvaluateConfig(trained("whole"), None, [data]), precision=precision)
        assert evaluate(low, show_progress=False).margin == pytest.approx(plain.margin, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "model"}, "has no reference"),
        ({"beta": 0.1}, "has no beta"),
        ({"eval_share": 0.5, "eval_samples": 2}, "cannot write: remove eval_samples"),
        ({"loss": "bradley-terry+sft"}, "cannot be mixed"),
        ({"loss_options": {"center": -1.0}}, "center must be at least 0"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOTrainer(config=replace(config, **changes), dry_run=True)


def test_a_model_in_memory_is_refused(tiny_model: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match="folder or id, not an object"):
        DPOTrainer(
            model, data, tokenizer=tiny_model, loss="bradley-terry", output="x", dry_run=True
        )


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        ("whole", {"reference": "model"}, "remove reference"),
        ("whole", {"beta": 0.1}, "remove beta"),
        ("whole", {"samples": 2}, "remove samples"),
        ("model", {}, "reference is missing"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_refused(
    trained: Callable[[str], Path],
    tiny_model: Path,
    data: Path,
    policy: str,
    given: dict[str, Any],
    message: str,
) -> None:
    folders = {"model": tiny_model, "whole": trained("whole")}
    given = {name: folders.get(value, value) for name, value in given.items()}
    settings = EvaluateConfig(
        **{"policy": folders[policy], "reference": None, "data": [data]} | given
    )
    with pytest.raises(ConfigError, match=message):
        evaluate(settings, show_progress=False)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_commands_that_need_log_probs_refuse_a_reward_model(
    trained: Callable[[str], Path], config: TrainConfig, kind: str, run: Run
) -> None:
    for loss in ("dpo", "sft"):
        with pytest.raises(ModelFolderError, match="is a reward model"):
            DPOTrainer(config=replace(config, model=trained(kind), loss=loss), dry_run=True)
    code, _, error = run(
        "precompute", "--model", trained(kind), "--data", config.data[0], "--cache", "cache"
    )
    assert code == 2 and "is a reward model" in error
    with pytest.raises(ConfigError, match="a sweep evaluates policies"):
        prepare(SweepConfig(config, config.data))


def test_a_head_is_never_random(
    trained: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    """An adapter without the head's weights, a classifier, a family without such a class."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = json.loads((trained("adapter") / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(trained("adapter") / "adapter_model.safetensors")
    kept = {name: one for name, one in weights.items() if ".score." not in name}
    assert len(kept) < len(weights)
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match="no weights of the head 'score'"):
        load_model(adapter)
    three = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelFolderError, match="3 labels"):
        load_model(tmp_path / "three")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (mamba_config(), "no class with a scalar head"),
        (
            CTRLConfig(vocab_size=50, n_embd=32, dff=64, n_layer=1, n_head=2),
            "no linear layer 'score'",
        ),
    ],
    ids=["mamba", "ctrl"],
)
def test_a_family_without_such_a_class_is_refused(
    config: TrainConfig, tmp_path: Path, family: PreTrainedConfig, message: str
) -> None:
    tiny(family).save_pretrained(tmp_path / "family")
    word_tokenizer().save_pretrained(tmp_path / "family")
    with pytest.raises(LogratioError, match=message):
        DPOTrainer(config=replace(config, model=tmp_path / "family"), dry_run=True)


def test_the_commands_print_a_table_without_a_reference(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "result.json"
    code, shown, _ = run("evaluate", "--policy", trained("whole"), "--data", data, "--json", out)
    assert code == 0
    assert "score chosen" in shown and "log-ratio" not in shown
    found = json.loads(out.read_text())
    assert found["sources"] == {"pairs.jsonl": [PAIRS, 1.0]}
    assert found["beta"] is None
