"""Beginnings shared across groups: the fp64 oracle's values and gradients, and no leak."""

from contextlib import nullcontext
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from oracle import Group, in_float64, per_token_logps
from rope_configs import ROPES, config_of
from tiny_models import FAMILIES, tiny
from torch import Tensor
from trees import gradients, related_groups, store_of, tree_of

from logratio.logps.attention import parts, shared_prompts, tree
from logratio.logps.attention.tree import CALL, COPY, gather, split_runs
from logratio.logps.batch import Part
from logratio.logps.checks import check_tree
from logratio.logps.completion import batch_of, completion_loss, groups_of, limits_of, score
from logratio.logps.sequences import Runs
from logratio.training.memory import GroupQueue


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_equals_the_oracle_in_values_and_gradients(family: str) -> None:
    model, groups = tiny(FAMILIES[family]()), related_groups(seed=len(family))
    double = in_float64(model)
    expected = per_token_logps(double, groups)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    logps = score(model, tree_of(groups))
    assert float((logps.double() - expected).detach().abs().max()) <= 1e-5
    (weights * logps).sum().backward()
    truth = gradients(double)
    assert float((gradients(model).double() - truth).norm() / truth.norm()) <= 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_in_any_cut(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a run, one call for all, and what is between: the same numbers, exactly in fp64."""
    model, groups = tiny(FAMILIES["mistral"]()).double(), related_groups(seed, 4 + 2 * seed)
    expected = per_token_logps(in_float64(model), groups).detach()
    batch = tree_of(groups)
    sequences = {tuple(prompt + ids) for prompt, answers in groups for ids in answers}
    assert batch.input_ids.numel() < sum(map(len, sequences))
    for price in (0, 1_000, 10**9):
        monkeypatch.setattr(tree, "CALL", price)
        with torch.no_grad():
            logps = score(model, batch).double()
        assert float((logps - expected).abs().max()) <= 1e-6  # log-probs are float32


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_runs_of_a_tree_are_computed_in_parts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "MASK_CELLS", 0)
    monkeypatch.setattr(parts, "PART_CELLS", 100)
    monkeypatch.setattr(parts, "LEAST_ROWS", 3)
    model, groups = tiny(FAMILIES[family]()).double(), related_groups(seed=1)
    for price in (0, 10**9):
        monkeypatch.setattr(tree, "CALL", price)
        double = in_float64(model)
        expected = per_token_logps(double, groups)
        expected.square().sum().backward()
        model.zero_grad()
        logps = score(model, tree_of(groups))
        logps.square().sum().backward()
        assert float((logps.double() - expected).detach().abs().max()) <= 1e-6
        truth = gradients(double)
        assert float((gradients(model) - truth).norm() / truth.norm()) <= 1e-6


def test_a_loss_over_a_tree_has_the_gradients_of_separate_groups() -> None:
    """Whole groups are handed to the loss one after another, wherever their tokens lie."""
    groups, found = related_groups(3), []

    def share(logps: Tensor, part: Part) -> Tensor:
        return part.targets.sums(logps).div(20).exp().sum()

    for layout in ("padded", "tree"):
        model = tiny(FAMILIES["llama"]())
        batch = batch_of(groups, layout)
        with nullcontext() if layout == "padded" else shared_prompts(model):
            loss = completion_loss(model, batch, share)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (one, first), (other, second) = found
    assert torch.allclose(one, other, rtol=1e-5)
    assert float((first - second).norm() / first.norm()) <= 1e-5


def test_gradients_are_the_same_bits_at_every_run() -> None:
    batch, found = tree_of(related_groups(5, 12)), []
    for _ in range(3):
        model = tiny(FAMILIES["llama"]())
        score(model, batch).sum().backward()
        found.append(gradients(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_leak_check_of_a_tree(family: str) -> None:
    assert check_tree(tiny(FAMILIES[family]())) is None


def test_a_tree_that_leaks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ends(runs: Runs) -> np.ndarray:
        return np.full(runs.starts[-1], runs.starts[-1], dtype=np.int64)

    monkeypatch.setattr(Runs, "ends", property(without_ends))
    reason = check_tree(tiny(FAMILIES["llama"]()))
    assert reason is not None and "see each other" in reason


@pytest.mark.parametrize("name", ROPES)
def test_a_model_that_looks_at_its_company_gets_calls_of_its_own(name: str) -> None:
    """Dynamic factors depend on the longest sequence of a call, so a tree is cut into calls too."""
    model = tiny(config_of(name))
    assert limits_of(model.config)
    random = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(i) for i in random.integers(1, 60, length)]

    start, answer = ids(30), ids(20)
    groups: list[Group] = [
        (start, [answer, ids(5)]),
        (start + answer + ids(3), [ids(4), ids(40)]),
        (start + ids(50), [ids(3), ids(7)]),
    ]
    with torch.no_grad():
        alone = [score(model, batch_of([(p, [c])], "padded")) for p, cs in groups for c in cs]
        logps = score(model, tree_of(groups))
    assert float((logps - torch.cat(alone)).abs().max()) <= 1e-5


def test_a_batch_gives_its_groups_back() -> None:
    groups = related_groups(1)
    assert groups_of(tree_of(groups)) == groups


def test_gathered_gradients_add_up() -> None:
    torch.manual_seed(0)
    calls = [((0, 5),), ((0, 3), (5, 9)), ((0, 2), (5, 6), (9, 10))]
    states = torch.randn(1, 2, 10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather(x, calls), states)
    # Sums of many copies are taken in float32: in bfloat16 1 + 1/256 is 1.
    many = [((0, 1),), *(((0, 1), (at, at + 1)) for at in range(1, 300))]
    low = torch.zeros(1, 1, 300, 1, dtype=torch.bfloat16, requires_grad=True)
    torch.cat(gather(low, many), 2).sum().backward()
    assert low.grad is not None and float(low.grad[0, 0, 0, 0]) == 300


def price(cuts: tuple[int, ...], starts: np.ndarray, paths: np.ndarray) -> float:
    """What the calls between these cuts cost, by the docstring."""
    total = 0.0
    for a, b in pairwise(cuts):
        length, known = int(starts[b] - starts[a]), int(paths[a])
        half = 2 if b == a + 1 and not known else 1
        total += length * (known + length) / half + COPY * known + CALL
    return total


def test_cuts_are_the_cheapest() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        own = random.integers(1, 120, 6)
        paths = random.integers(0, 90, 6) * random.integers(0, 2, 6)
        starts = np.concatenate([[0], np.cumsum(own)])
        inner = [c for n in range(6) for c in combinations(range(1, 6), n)]
        best = min(price((0, *chosen, 6), starts, paths) for chosen in inner)
        assert price(tuple(split_runs(starts, paths)), starts, paths) == best


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_a_queue_takes_what_begins_alike_together(budget: int) -> None:
    groups = related_groups(2, 12)
    store = store_of(groups)
    queue, taken = GroupQueue(store, np.arange(12), "tree"), []
    while len(queue):
        taken.append(queue.take(budget))
        tokens = store.tree_tokens(taken[-1], np.array([0, len(taken[-1])]))
        assert len(taken[-1]) == 1 or tokens <= budget
    assert sorted(np.concatenate(taken).tolist()) == list(range(12))
    ordered = [groups[at][0] for at in np.concatenate(taken)]
    long = [prompt for prompt in ordered if len(prompt) >= 8]
    assert long == sorted(long)
