"""Turns with weights: each turn's log-ratio times its weight, bad turns below 0."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_groups import weighted_store
from oracle import in_float64, per_token_logps
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from logratio._rust import Store, StoreWriter
from logratio.data.feed import Feed, FeedSettings, MicroBatch, lay_out
from logratio.errors import ConfigError
from logratio.logps.batch import TargetTokens, to_torch
from logratio.training import TrainConfig
from logratio.training.held_out import HeldOut
from logratio.training.methods.data_checks import check_data
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.logps import GroupLogps
from logratio.training.methods.objective import Objective, sample_groups
from logratio.training.methods.table import METHODS
from logratio.training.methods.token_weights import WeightedTurns, weighted_sums
from logratio.training.reference import FrozenReference
from logratio.training.update import Updater

VALUES = [-1.0, 0.25, 3.0]
POSITIVE = [0.25, 3.0]
SAME = 1e-6
LAYOUTS = ("shared", "tree", "padded")


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return in_float64(tiny(FAMILIES["llama"](), 0, scale=3.0))


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return in_float64(tiny(FAMILIES["llama"](), 1, scale=2.0)).requires_grad_(False)


@pytest.fixture(autouse=True)
def no_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logratio.training.router_loss.router_coefficient", lambda _: 0.0)


def configured(loss: str, **settings: Any) -> TrainConfig:
    return TrainConfig(Path(), [], Path(), loss=loss, max_grad_norm=1e12, **settings)


def by_hand(weights: list[float]) -> Store:
    """Return a pair of four tokens each, in two turns of two; `weights` are those of the turns."""
    writer, others = StoreWriter(), sorted({w for w in weights if w not in (0, 1)})
    codes = [others.index(w) + 2 if w in others else int(w) for w in weights]
    writer.push(
        np.array([1], np.int32),
        np.arange(5, 13, dtype=np.int32),
        np.repeat(np.array(codes, np.uint8), 2),
        np.array([4, 4], np.uint32),
        np.array([0, 1], np.uint8),
        0,
        3,
    )
    return writer.finish(f'{{"turn_weights": {others}, "files": ["chats.jsonl"]}}')


def targets_of(store: Store, layout: str = "shared") -> TargetTokens:
    arrays = lay_out(store, np.arange(len(store)), layout)
    return to_torch(arrays).targets


def test_a_bad_turn_of_the_chosen_answer_by_hand() -> None:
    """R of the turns are 1, 2, -1 and 0.5: the chosen side is 1 - 2, the rejected one is -1 + 1."""
    store = by_hand([1, -1, 1, 2])
    objective = Objective.of(configured("dpo", beta=0.5))
    data, targets = GroupData.of(store, objective), targets_of(store)
    policy = torch.tensor([-1, -1, -1, -1, -2, -2, -1, -1.5], dtype=torch.float64)
    theirs = torch.tensor([-1, -2, -2, -2, -1.5, -1.5, -1, -2], dtype=torch.float64)
    weights = data.token_weights(objective, targets)
    assert weights is not None
    assert weights.tolist() == [1, 1, -1, -1, 1, 1, 2, 2]
    sums = [weighted_sums(targets, one, weights) for one in (policy, theirs)]
    groups = data.groups(targets, *sums)
    assert groups.logratios.tolist() == [-1, 0]
    assert groups.lengths.tolist() == [4, 6]
    assert objective.losses(groups).tolist() == pytest.approx([log(1 + exp(0.5))], rel=1e-14)
    assert log(1 + exp(0.5)) == pytest.approx(0.974076984180107, rel=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_at_their_tokens_in_every_layout(layout: str) -> None:
    store = weighted_store("lists", VALUES)
    data = GroupData.of(store, Objective.of(configured("dpo")))
    weights = data.token_weights(Objective.of(configured("dpo")), targets_of(store, layout))
    assert weights is not None
    table = [0.0, 1.0, *VALUES]
    masks = np.concatenate([mask for group in range(len(store)) for mask in store.group(group)[2]])
    assert weights.tolist() == [table[code] for code in masks]


def oracle_sums(model: PreTrainedModel, store: Store, values: list[float]) -> tuple[Tensor, Tensor]:
    """Sum weight times log-prob of every completion, one at a time; and the sizes of weights."""
    table, sums, lengths = torch.tensor([0.0, 1.0, *values], dtype=torch.float64), [], []
    for group in range(len(store)):
        prompt, completions, masks, _ = store.group(group)
        for ids, mask in zip(completions, masks, strict=True):
            weights = table[torch.from_numpy(mask.astype(np.int64))]
            logps = per_token_logps(model, [(prompt.tolist(), [ids.tolist()])])
            sums.append((logps * weights).sum())
            lengths.append(weights.abs().sum())
    return torch.stack(sums), torch.stack(lengths)


def oracle(
    config: TrainConfig,
    store: Store,
    values: list[float],
    policy: PreTrainedModel,
    reference: PreTrainedModel,
) -> tuple[float, list[Tensor]]:
    """Return the loss over all groups, and its gradients by autograd."""
    objective, model = Objective.of(config), deepcopy(policy)
    sums, lengths = oracle_sums(model, store, values)
    theirs = oracle_sums(reference, store, values)[0].detach()
    data = GroupData.of(store, objective)
    groups = GroupLogps(
        sums,
        theirs if data.has_reference else torch.zeros_like(sums),
        lengths,
        torch.from_numpy(store.roles()),
        store.completion_offsets(),
        data.values,
        has_reference=data.has_reference,
    )
    found = objective.statistics(groups.on_host(), trains=False)
    loss = objective.losses(replace(groups, statistics=found)).mean()
    return loss.item(), [*torch.autograd.grad(loss, [*model.parameters()])]


def micro_batches(store: Store, budget: int, layout: str) -> Iterator[MicroBatch]:
    settings = FeedSettings(groups_per_update=len(store), token_budget=budget, layout=layout)
    yield from Feed(store, settings, depth=0)


def updater(
    config: TrainConfig,
    store: Store,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    layout: str = "padded",
) -> Updater:
    frozen = FrozenReference(reference) if Objective.of(config).needs_reference else None
    return Updater(config, store, deepcopy(policy), frozen, layout)


@pytest.mark.parametrize("budget", [10**6, 60, 1])
@pytest.mark.parametrize(
    ("loss", "values"),
    [
        *((loss, VALUES) for loss in ("dpo", "kto", "bco", "nca", "plackett-luce", "aot")),
        *((loss, POSITIVE) for loss in ("ipo", "simpo", "orpo", "sft")),
    ],
)
def test_an_update_is_that_of_a_plain_float64_model(
    loss: str,
    values: list[float],
    budget: int,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
) -> None:
    config = configured(loss)
    store = weighted_store(Objective.of(config).data, values)
    expected, slopes = oracle(config, store, values, policy, reference)
    one = updater(config, store, policy, reference)
    metrics, _ = one.update(1, 0.0, micro_batches(store, budget, "padded"))
    assert metrics["loss"] == pytest.approx(expected, rel=SAME)
    scale = max(float(slope.abs().max()) for slope in slopes)
    for parameter, slope in zip(one.policy.parameters(), slopes, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope, rtol=SAME, atol=SAME * scale)


def weighted_side(
    model: PreTrainedModel, other: PreTrainedModel, prompt: list[int], ids: list[int], w: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Σ w·r and Σ w·KL(reference ‖ policy) over the tokens of one completion."""
    text, start = torch.tensor([prompt + ids]), len(prompt) - 1
    own, theirs = (one(text).logits[0, start:-1].log_softmax(-1) for one in (model, other))
    places = torch.arange(len(ids)), torch.tensor(ids)
    divergences = (theirs.exp() * (theirs - own)).sum(-1)
    return ((own - theirs)[places] * w).sum(), (divergences * w).sum()


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_divergences_have_the_weights_of_their_tokens(
    loss: str, policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    store, config = weighted_store("pairs", POSITIVE, 4), configured(loss, beta=0.05)
    table, losses = torch.tensor([0.0, 1.0, *POSITIVE], dtype=torch.float64), []
    with torch.no_grad():
        for group in range(len(store)):
            prompt, completions, masks, _ = store.group(group)
            (r_w, k_w), (r_l, k_l) = (
                weighted_side(
                    policy, reference, prompt.tolist(), ids.tolist(), table[mask.tolist()]
                )
                for ids, mask in zip(completions, masks, strict=True)
            )
            shift = k_w - k_l if loss == "tdpo1" else 0.5 * (k_w - k_l)
            losses.append(-logsigmoid(0.05 * (r_w - r_l + shift)))
    one = updater(config, store, policy, reference)
    metrics, _ = one.update(1, 0.0, micro_batches(store, 60, "padded"))
    assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=SAME)


def test_the_lengths_of_a_store_are_the_sizes_of_its_weights() -> None:
    turns = WeightedTurns.of(by_hand([1, -1, 0.5, 2]))
    assert turns is not None
    assert turns.lengths().tolist() == [4, 5]
    assert WeightedTurns.of(by_hand([1, 0, 1, 1])) is None


def test_the_loss_has_the_slope_of_its_differences(
    policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    """Along the gradient, the loss rises by its length; norms round to float32."""
    config, store = configured("dpo"), weighted_store("pairs", VALUES)
    one = updater(config, store, policy, reference)
    one.update(1, 0.0, micro_batches(store, 60, "padded"))
    slopes = [parameter.grad.clone() for parameter in one.policy.parameters()]  # type: ignore[union-attr]
    length = sum(float((slope**2).sum()) for slope in slopes) ** 0.5
    losses = []
    for step in (-1e-4, 1e-4):
        moved = deepcopy(policy)
        with torch.no_grad():
            for parameter, slope in zip(moved.parameters(), slopes, strict=True):
                parameter.add_(slope, alpha=step / length)
        losses.append(oracle(config, store, VALUES, moved, reference)[0])
    assert (losses[1] - losses[0]) / 2e-4 == pytest.approx(length, rel=1e-3)


def test_a_step_makes_good_turns_likelier_and_bad_ones_less_likely(
    policy: PreTrainedModel,
) -> None:
    store = by_hand([1, -1, 0, 1])
    config = configured("dpo", optimizer="adamw", lr=1e-3)
    one = updater(config, store, policy, deepcopy(policy).requires_grad_(False))
    metrics, _ = one.update(1, 1e-3, micro_batches(store, 60, "padded"))
    assert metrics["loss"] == pytest.approx(log(2), rel=1e-12)

    def turns(model: PreTrainedModel) -> list[float]:
        prompt, completions, _, _ = store.group(0)
        texts = [(prompt.tolist(), [ids.tolist()]) for ids in completions]
        logps = torch.cat([per_token_logps(model, [text]) for text in texts])
        sums: list[float] = logps.view(4, 2).sum(1).tolist()
        return sums

    with torch.no_grad():
        before, after = turns(policy), turns(one.policy)  # type: ignore[arg-type]
    change = np.array(after) - np.array(before)
    assert change[0] - change[1] - change[3] > 0
    assert change[0] > 0 > change[1]


def test_held_out_groups_have_their_own_weights(
    policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    config = configured("dpo", token_budget=64)
    trained, held = weighted_store("pairs", [7.0, -3.0], 4), weighted_store("pairs", VALUES)
    one = updater(config, trained, policy, reference)
    result = HeldOut(config, held, None).evaluate(0, one)  # type: ignore[arg-type]
    expected, _ = oracle(config, held, VALUES, policy, reference)
    assert result.metrics["eval_loss"] == pytest.approx(expected, rel=SAME)


def test_a_store_of_pairs_names_the_store_that_sft_trains_on() -> None:
    objective = Objective.of(configured("sft"))
    with pytest.raises(ConfigError, match=r"`logratio data build --demonstrations` makes a store"):
        check_data(weighted_store("pairs", POSITIVE), objective, "--loss sft")
    with pytest.raises(ConfigError) as caught:
        check_data(weighted_store("lists", VALUES), Objective.of(configured("dpo")), "--loss dpo")
    assert "--demonstrations" not in str(caught.value)


REFUSING = [name for name, method in METHODS.items() if not method.bad_turns]


@pytest.mark.parametrize("loss", [name for name in METHODS if name != "bradley-terry"])
def test_bad_turns_are_refused_where_a_method_is_not_defined_for_them(loss: str) -> None:
    objective = Objective.of(configured(loss))
    good, bad = (weighted_store(objective.data, values) for values in (POSITIVE, VALUES))
    check_data(good, objective, f"--loss {loss}")
    if loss not in REFUSING:
        check_data(bad, objective, f"--loss {loss}")
        return
    with pytest.raises(ConfigError, match=r"`weight` below 0, and \d+ groups") as caught:
        check_data(bad, objective, f"--loss {loss}")
    assert "(first: weighted.jsonl:" in str(caught.value)


def test_one_method_of_a_mixture_is_enough_to_refuse_bad_turns() -> None:
    objective = Objective.of(configured("dpo+sft:0.2"))
    with pytest.raises(ConfigError, match="below 0"):
        check_data(by_hand([1, -1, 1, 1]), objective, "--loss dpo+sft:0.2")


def test_a_reward_model_takes_no_weights() -> None:
    objective = Objective.of(configured("bradley-terry"))
    check_data(by_hand([1, 0, 1, 1]), objective, "--loss bradley-terry")
    with pytest.raises(ConfigError, match=r"scores whole answers.*\(first: chats\.jsonl:3\)"):
        check_data(by_hand([1, 2, 1, 1]), objective, "--loss bradley-terry")


@pytest.mark.parametrize("loss", [one for one in METHODS if one not in (*REFUSING, "odpo")])
def test_methods_that_take_bad_turns_read_no_lengths(loss: str) -> None:
    objective = Objective.of(configured(loss))
    groups = sample_groups(objective.data).detached()
    groups = replace(groups, statistics=objective.statistics(groups, trains=False))
    longer = replace(groups, lengths=7 * groups.lengths)
    assert objective.needs_reference
    assert torch.equal(objective.losses(groups), objective.losses(longer))
