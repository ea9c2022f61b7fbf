"""The load-balancing loss of a run: whose coefficient, the whole update's value, and where."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, SIZES
from routers import COEFFICIENT, everything_in_float64, padded_forward
from safetensors.torch import load_file
from small_configs import small_config
from stop_after import stop_after
from tiny_models import WORDS, tiny, word_tokenizer
from torch import Tensor
from transformers import LlamaConfig, MixtralModel, PreTrainedConfig

from logratio.data.feed import Feed, FeedSettings
from logratio.errors import ConfigError
from logratio.logps.attention import shared_prompts
from logratio.logps.completion import groups_of
from logratio.logps.router import RouterSums
from logratio.training import LoraSettings, TrainConfig, load_model, train
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.dataset import load_training_data
from logratio.training.router_loss import RouterLoss, coefficient_in_trl, router_coefficient
from logratio.training.run_folder import RunExistsError
from logratio.training.update import Updater

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def save(folder: Path, config: PreTrainedConfig) -> Path:
    """Write a tiny model and the word-level tokenizer."""
    tiny(config, scale=4.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Mixtral; never changed by a test."""
    config = FAMILIES["mixtral"].config(vocab_size=len(WORDS))
    return save(tmp_path_factory.mktemp("mixtral"), config)


@pytest.fixture
def config(mixtral: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    """Two updates of eight pairs with the loss, in several micro-batches each."""
    return TrainConfig(
        mixtral,
        [pairs_file],
        tmp_path / "policy",
        router_aux_loss_coef=COEFFICIENT,
        lr=1e-3,
        batch_size=8,
        token_budget=64,
    )


def coefficient(folder: Path, kind: str, given: float | None, **fields: Any) -> float:
    """Save the config of a small model, and return the coefficient of a run."""
    made = small_config(kind)
    for name, value in fields.items():
        setattr(made, name, value)
    made.save_pretrained(folder)
    return router_coefficient(TrainConfig(folder, "-", folder, router_aux_loss_coef=given))


@pytest.mark.parametrize(
    ("kind", "fields", "given", "expected"),
    [
        ("mixtral", {}, None, 0.0),
        ("mixtral", {}, 0.3, 0.3),
        ("mixtral", {"output_router_logits": True}, None, 0.001),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.02}, None, 0.02),
        ("mixtral", {"output_router_logits": True}, 0.0, 0.0),
        ("jetmoe", {"output_router_logits": True, "aux_loss_coef": 0.04}, None, 0.04),
        ("dbrx", {"output_router_logits": True}, None, 0.01),
        ("deepseek_v3", {"output_router_logits": True}, None, 0.0),
        ("llama", {}, None, 0.0),
        ("llama", {}, 0.0, 0.0),
    ],
)
def test_the_coefficient_is_the_runs_or_the_one_that_the_model_requests(
    kind: str, fields: dict[str, Any], given: float | None, expected: float, tmp_path: Path
) -> None:
    assert coefficient(tmp_path, kind, given, **fields) == expected


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "glm4_moe"])
def test_a_coefficient_without_such_a_loss_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"router_aux_loss_coef 0\.1 .*{kind}: remove it"):
        coefficient(tmp_path, kind, 0.1)


def test_a_requested_loss_without_a_coefficient_is_refused(tmp_path: Path) -> None:
    fields = {"output_router_logits": True, "router_aux_loss_coef": None}
    with pytest.raises(ConfigError, match="set router_aux_loss_coef, or 0 for none"):
        coefficient(tmp_path, "granitemoe", None, **fields)


@pytest.mark.parametrize("given", [-0.1, float("nan")])
def test_the_coefficient_is_a_number_from_0(given: Any, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="router_aux_loss_coef"):
        replace(config, router_aux_loss_coef=given)


def test_a_wrong_coefficient_is_refused_before_any_work(
    tiny_model: Path, config: TrainConfig
) -> None:
    with pytest.raises(ConfigError, match="models of type llama: remove it"):
        train(replace(config, model=tiny_model), show_progress=False)
    assert not Path(config.output).exists()


def test_trl_uses_the_coefficient_of_every_mixture(tmp_path: Path) -> None:
    for kind, expected in {"mixtral": 0.001, "jetmoe": None, "llama": None}.items():
        small_config(kind).save_pretrained(tmp_path / kind)
        assert coefficient_in_trl(tmp_path / kind) == expected


def update_of(
    config: TrainConfig, budget: int, layout: str
) -> tuple[dict[str, float], Tensor, list[Any], int]:
    """Run the first update in float64, as SimPO, which has no reference.

    Returns:
        Its metrics, its gradient, its groups, and the number of micro-batches.
    """
    config = replace(config, loss="simpo", max_grad_norm=1e9)
    data = load_training_data(config, show_progress=False, refused=None, recorded_date=lambda: None)
    store = data.store
    policy: Any = load_model(config.model).double().requires_grad_()
    policy.set_attn_implementation("eager")
    policy.set_experts_implementation("eager")
    updater = Updater(config, store, policy, None, layout)
    feed = Feed(store, FeedSettings(groups_per_update=16, token_budget=budget, layout=layout))
    batches = list(feed)
    shared = nullcontext() if layout == "padded" else shared_prompts(policy)
    with everything_in_float64(), shared:
        values, count = updater.update(1, 0.0, iter(batches))
    assert count == 16
    groups = [
        group for micro in batches for group in groups_of(updater._batch(micro.layout.groups))
    ]
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return values, gradient, [policy, groups], len(batches)


@pytest.mark.parametrize("layout", ["shared", "tree", "padded"])
def test_an_update_is_the_same_however_it_is_cut(config: TrainConfig, layout: str) -> None:
    """1 × 16, some × some and 16 × 1 groups, against one padded batch in transformers."""
    found = [update_of(config, budget, layout) for budget in (100_000, 100, 1)]
    counts = [count for *_, count in found]
    assert counts[0] == 1
    assert 2 < counts[1] < counts[2] == 16
    values, gradient, (policy, groups), _ = found[0]
    for other, slope, _, _ in found[1:]:
        for name in values:
            assert other[name] == pytest.approx(values[name], rel=1e-11, abs=1e-12)
        assert float((slope - gradient).norm()) <= 1e-11 * float(gradient.norm())
    with everything_in_float64(), torch.no_grad():
        expected = padded_forward(policy, groups).aux_loss
    assert values["aux_loss"] == pytest.approx(float(expected), rel=1e-12)
    without = replace(config, router_aux_loss_coef=0.0)
    plain, apart, *_ = update_of(without, 100, layout)
    assert "aux_loss" not in plain
    assert float((apart - gradient).norm()) > 1e-3 * float(gradient.norm())


def test_a_run_logs_the_loss_and_trains_with_it(config: TrainConfig) -> None:
    before = load_file(Path(config.model) / "model.safetensors")
    histories, weights = [], []
    for name, value in {"with": COEFFICIENT, "without": 0.0}.items():
        one = replace(config, output=Path(config.output) / name, router_aux_loss_coef=value)
        histories.append(train(one, show_progress=False).history)
        weights.append(load_file(Path(one.output) / "model.safetensors"))
    assert all(1.5 < row["aux_loss"] < 4 for row in histories[0])
    assert all("aux_loss" not in row for row in histories[1])
    # The preference loss of the first update is that at the start: the other loss is apart.
    assert histories[0][0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    routers = [name for name in before if "gate.weight" in name]
    assert routers
    for name in routers:
        changes = [float((after[name] - before[name]).norm()) for after in weights]
        assert changes[0] > 0
        assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize("budget", [64, 100_000])
def test_a_resumed_run_ends_with_the_same_bits(config: TrainConfig, budget: int) -> None:
    config = replace(config, token_budget=budget, epochs=2)
    whole = train(config, show_progress=False)
    cut = replace(config, output=Path(config.output).with_name("cut"))
    with pytest.raises(RunInterruptedError), stop_after(2):
        train(cut, show_progress=False)
    rest = train(replace(cut, resume=True), show_progress=False)
    assert rest.history == whole.history[2:]
    one, other = (load_file(Path(c.output) / "model.safetensors") for c in (config, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_runs_with_other_coefficients_are_different_runs(config: TrainConfig) -> None:
    train(config, show_progress=False)
    with pytest.raises(RunExistsError, match="router_aux_loss_coef"):
        train(replace(config, router_aux_loss_coef=0.1), show_progress=False)


Share = tuple[RouterSums | None, RouterSums]


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[Share]:
    """Record the sums of each update and of each of its micro-batches."""
    seen = list[Share]()
    share = RouterLoss.share

    def recorded(self: RouterLoss, sums: RouterSums) -> Tensor:
        seen.append((self.whole, sums))
        return share(self, sums)

    monkeypatch.setattr(RouterLoss, "share", recorded)
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_drop_the_same_values_when_tokens_are_counted(
    config: TrainConfig, dropout: float, shares: list[Share]
) -> None:
    lora = LoraSettings(rank=4, targets=ATTENTION, dropout=dropout)
    config = replace(config, lora=lora, lr=0.1, batch_size=16, epochs=4)
    train(config, show_progress=False)
    updates = [[*update] for _, update in groupby(shares, lambda share: id(share[0]))]
    assert len(updates) == 4
    for update in updates:
        whole: Any = update[0][0]
        each: list[Any] = [sums.counts for _, sums in update]
        assert len(each) > 1
        assert torch.equal(sum(each), whole.counts)
    first: Any = updates[0][0][0]
    assert not torch.equal(first.counts, whole.counts)  # the adapters have learned


def test_adapters_learn_from_it_although_routers_are_frozen(config: TrainConfig) -> None:
    weights = []
    for number, value in enumerate((COEFFICIENT, 0.0)):
        output = Path(config.output) / str(number)
        one = replace(
            config,
            output=output,
            router_aux_loss_coef=value,
            lora=LoraSettings(rank=4, targets=ATTENTION),
        )
        train(one, show_progress=False)
        weights.append(load_file(output / "adapter_model.safetensors"))
    assert not any("gate" in name for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_reference_and_evaluation_passes_do_not_compute_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routers are observed twice per micro-batch: when counted, and when trained."""
    asked = list[tuple[bool, bool]]()
    forward = MixtralModel.forward

    def watched(self: MixtralModel, **options: Any) -> Any:
        asked.append((options.get("output_router_logits", False), torch.is_grad_enabled()))
        return forward(self, **options)

    monkeypatch.setattr(MixtralModel, "forward", watched)
    result = train(replace(config, eval_share=0.2, epochs=2), show_progress=False)
    assert result.evaluations
    assert "eval_aux_loss" not in result.evaluations[0]
    counts = {kind: asked.count(kind) for kind in set(asked)}
    assert counts[(True, True)] == counts[(True, False)] > 4
    assert counts[(False, False)] > counts[(True, True)]


def test_other_models_have_no_such_loss(tmp_path: Path, pairs_file: Path) -> None:
    model = save(tmp_path / "llama", LlamaConfig(**SIZES | {"vocab_size": len(WORDS)}))
    config = TrainConfig(model, [pairs_file], tmp_path / "policy")
    assert RouterLoss.of(config, load_model(model)) is None
