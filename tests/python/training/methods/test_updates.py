"""An update of each method is one step of its loss over all groups, however it is divided."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from method_groups import store_for
from oracle import in_float64, per_token_logps
from rewards import plain_scores, tiny_reward_model
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid
from transformers import PreTrainedModel

from logratio._rust import Store
from logratio.data.feed import Feed, FeedSettings, MicroBatch
from logratio.training import TrainConfig
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.logps import GroupLogps
from logratio.training.methods.objective import Objective
from logratio.training.methods.table import METHODS, MIXTURES
from logratio.training.reference import FrozenReference
from logratio.training.update import Updater

ALL = [*METHODS, *MIXTURES, "plackett-luce:0.5+sft:0.2"]
OTHERS = ("ld-dpo", "sampo", "wpo", "tdpo1", "tdpo2")
"""Methods that take more than the sums of log-probs, and have a test of their own."""
SAME = 1e-6
"""Llama's norms round to float32, so a last digit in float64 may become one in float32."""
BUDGETS = {"one micro-batch": 10**6, "some": 60, "one for each group": 1}


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return in_float64(tiny(FAMILIES["llama"](), 0, scale=3.0))


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return in_float64(tiny(FAMILIES["llama"](), 1, scale=2.0)).requires_grad_(False)


def configured(loss: str, **settings: Any) -> TrainConfig:
    return TrainConfig(Path(), [], Path(), loss=loss, max_grad_norm=1e12, **settings)


def updater(
    config: TrainConfig, store: Store, policy: PreTrainedModel, reference: PreTrainedModel
) -> Updater:
    frozen = FrozenReference(reference) if Objective.of(config).needs_reference else None
    return Updater(config, store, deepcopy(policy), frozen, "padded")


def micro_batches(store: Store, budget: int) -> Iterator[MicroBatch]:
    settings = FeedSettings(groups_per_update=len(store), token_budget=budget, layout="padded")
    yield from Feed(store, settings, depth=0)


def scale_of(slopes: list[Tensor]) -> float:
    return max(float(slope.abs().max()) for slope in slopes)


@pytest.fixture(autouse=True)
def no_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logratio.training.router_loss.router_coefficient", lambda _: 0.0)


def oracle_sums(model: PreTrainedModel, store: Store, objective: Objective) -> Tensor:
    """Sum the counted log-probs of every completion, or score it, one sequence at a time."""
    sums = []
    for group in range(len(store)):
        prompt, completions, masks, _ = store.group(group)
        for ids, mask in zip(completions, masks, strict=True):
            alone = [(prompt.tolist(), [ids.tolist()])]
            if objective.scores:
                sums.append(plain_scores(model, alone)[0])
                continue
            logps = per_token_logps(model, alone)
            sums.append((logps * torch.from_numpy(mask)).sum())
    return torch.stack(sums)


def oracle(
    config: TrainConfig, store: Store, policy: PreTrainedModel, reference: PreTrainedModel
) -> tuple[float, list[Tensor]]:
    """Return the loss of the update and its gradients, by autograd over all groups at once."""
    objective, model = Objective.of(config), deepcopy(policy)
    data = GroupData.of(store, objective)
    theirs = oracle_sums(reference, store, objective) if data.has_reference else None
    sums = oracle_sums(model, store, objective)
    groups = GroupLogps(
        sums,
        torch.zeros_like(sums) if theirs is None else theirs.detach(),
        torch.from_numpy(store.counted_lengths().astype(np.float64)),
        torch.from_numpy(store.roles()),
        store.completion_offsets(),
        data.values,
        has_reference=data.has_reference,
    )
    found = objective.statistics(groups.on_host(), trains=True)
    losses = objective.losses(replace(groups, statistics=found))
    weights = torch.ones(len(store)) if data.weights is None else torch.from_numpy(data.weights)
    loss = (losses * weights).mean()
    return loss.item(), [*torch.autograd.grad(loss, [*model.parameters()])]


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("loss", [one for one in ALL if one not in OTHERS])
def test_micro_batches_do_not_change_an_update(
    loss: str, budget: int, policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    config = configured(loss)
    store = store_for(Objective.of(config).data)
    if Objective.of(config).scores:
        policy = in_float64(tiny_reward_model())
    expected, slopes = oracle(config, store, policy, reference)
    one = updater(config, store, policy, reference)
    metrics, groups = one.update(1, 0.0, micro_batches(store, budget))
    assert groups == len(store)
    assert metrics["loss"] == pytest.approx(expected, rel=SAME)
    for parameter, slope in zip(one.policy.parameters(), slopes, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope, rtol=SAME, atol=SAME * scale_of(slopes))


class Scored(NamedTuple):
    """Counted tokens of a completion: log-probs, and distributions of policy and reference."""

    own: Tensor
    theirs: Tensor
    policy: Tensor
    reference: Tensor


def scored_pairs(
    store: Store, policy: PreTrainedModel, reference: PreTrainedModel
) -> Iterator[list[Scored]]:
    """Score the completions of each pair by whole logits, one sequence at a time."""
    for group in range(len(store)):
        prompt, completions, masks, _ = store.group(group)
        sides = list[Scored]()
        for ids, mask in zip(completions, masks, strict=True):
            whole = torch.from_numpy(np.concatenate([prompt, ids])).long()[None]
            at = slice(len(prompt) - 1, -1)
            counted = torch.from_numpy(mask).bool()
            token = torch.from_numpy(ids).long()[counted][:, None]
            both = [
                model(input_ids=whole).logits[0, at].log_softmax(1)[counted]
                for model in (policy, reference)
            ]
            sides.append(Scored(*(one.gather(1, token)[:, 0] for one in both), *both))
        yield sides


def check_update(one: Updater, loss: Tensor, model: PreTrainedModel, store: Store) -> None:
    """Compare an update in several micro-batches with a loss and its gradients by autograd."""
    slopes = [*torch.autograd.grad(loss, [*model.parameters()])]
    metrics, _ = one.update(1, 0.0, micro_batches(store, 60))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=SAME)
    grads = [parameter.grad for parameter in one.policy.parameters()]
    torch.testing.assert_close(grads, slopes, rtol=SAME, atol=SAME * scale_of(slopes))


TILES = {"large tiles": 2**24, "tiles of three positions": 3 * 211}


@pytest.mark.parametrize("elements", TILES.values(), ids=TILES)
def test_wpo_weighs_pairs_by_the_whole_distribution(
    elements: int,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("logratio.logps.head.TILE_ELEMENTS", elements)
    config, store = configured("wpo", beta=0.05), store_for("pairs")
    model, losses = deepcopy(policy), list[Tensor]()
    for chosen, rejected in scored_pairs(store, model, reference):
        ratios = [(side.own - side.theirs).sum() for side in (chosen, rejected)]
        logs = [
            (side.own - side.policy.exp().square().sum(1).log()).mean()
            for side in (chosen, rejected)
        ]
        weight = (logs[0] + logs[1]).exp().detach()
        losses.append(-weight * logsigmoid(0.05 * (ratios[0] - ratios[1])))
    one = updater(config, store, policy, reference)
    check_update(one, torch.stack(losses).mean(), model, store)


@pytest.mark.parametrize("elements", TILES.values(), ids=TILES)
@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_tdpo_adds_divergences_of_whole_distributions(
    loss: str,
    elements: int,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("logratio.logps.divergence.TILE_ELEMENTS", elements)
    config, store = configured(loss, beta=0.05), store_for("pairs")
    model, losses = deepcopy(policy), list[Tensor]()
    for sides in scored_pairs(store, model, reference):
        ratios = [(side.own - side.theirs).sum() for side in sides]
        chosen, rejected = (
            kl_div(side.policy, side.reference, log_target=True, reduction="sum") for side in sides
        )
        shift = chosen - rejected if loss == "tdpo1" else 0.5 * (chosen.detach() - rejected)
        losses.append(-logsigmoid(0.05 * (ratios[0] - ratios[1] + shift)))
    one = updater(config, store, policy, reference)
    check_update(one, torch.stack(losses).mean(), model, store)


@pytest.mark.parametrize("loss", ["ld-dpo", "sampo"])
def test_weights_of_tokens_do_not_depend_on_micro_batches(
    loss: str, policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    config, store = configured(loss), store_for("pairs")
    found = []
    for budget in BUDGETS.values():
        one = updater(config, store, policy, reference)
        metrics, _ = one.update(1, 0.0, micro_batches(store, budget))
        found.append((metrics["loss"], metrics["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=SAME)
    assert found[2] == pytest.approx(found[0], rel=SAME)


@pytest.mark.parametrize("loss", ["dpo", "kto", "lipo", "sft"])
def test_groups_count_by_their_weights(
    loss: str, policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    config = configured(loss)
    store = store_for(Objective.of(config).data, weight=2.0)
    expected, slopes = oracle(config, store, policy, reference)
    plain, _ = oracle(config, store_for(Objective.of(config).data), policy, reference)
    assert expected != pytest.approx(plain, rel=1e-3)
    one = updater(config, store, policy, reference)
    metrics, _ = one.update(1, 0.0, micro_batches(store, 60))
    assert metrics["loss"] == pytest.approx(expected, rel=SAME)
    grads = [parameter.grad for parameter in one.policy.parameters()]
    torch.testing.assert_close(grads, slopes, rtol=SAME, atol=SAME * scale_of(slopes))
