"""LD-DPO's and SamPO's weights of tokens, against loops over the tokens."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import Answer, groups_of, losses_of, objective_of, pair
from torch import Tensor

from logratio.logps.batch import TargetTokens
from logratio.logps.checks import batch_of
from logratio.training.methods.token_weights import weighted_sums

PAIRS = [([1, 2], [[5, 6, 7], [5, 8, 9, 10, 11]]), ([3], [[4, 4, 4, 4], [6]])]
LENGTHS = [3, 5, 4, 1]


def targets_of(holes: Sequence[int] = ()) -> TargetTokens:
    """Return the 13 targets of two pairs; those at `holes` do not count."""
    targets = batch_of(PAIRS, "shared").targets
    counted = targets.counted.copy()
    counted[list(holes)] = False
    mask = torch.from_numpy(counted)
    lengths = torch.zeros(4, dtype=torch.float64).index_add(0, targets.completion_of, mask.double())
    return replace(targets, counted=counted, completion_mask=mask, lengths=lengths)


def weights_of(name: str, targets: TargetTokens, **options: float) -> list[float]:
    found = objective_of(name, **options).token_weights(targets)
    assert found is not None
    assert found.dtype == torch.float64
    weights: list[float] = found.tolist()
    return weights


def test_ld_dpo_weighs_what_is_beyond_the_shorter_completion() -> None:
    weights = weights_of("ld-dpo", targets_of(), alpha=0.3)
    assert weights == [*(1, 1, 1), *(1, 1, 1, 0.3, 0.3), *(1, 0.3, 0.3, 0.3), 1]


def test_ld_dpo_skips_tokens_that_do_not_count() -> None:
    """Of the rejected completion 5, 8, 9, 10, 11, the second token does not count."""
    targets = targets_of(holes=[4])
    weights = np.array(weights_of("ld-dpo", targets, alpha=0.3))
    assert weights[targets.counted].tolist()[:7] == [*(1, 1, 1), *(1, 1, 1, 0.3)]


def test_ld_dpo_by_hand() -> None:
    policy = torch.tensor([-1, -2, -3, -1, -1, -2, -4, -5, -1, -1, -1, -1, -2.0])
    reference = torch.tensor([-2, -2, -2, -1, -2, -1, -2, -2, -1, -1, -1, -1, -1.0])
    targets = targets_of()
    weights = objective_of("ld-dpo", alpha=0.5).token_weights(targets)
    own, fixed = (weighted_sums(targets, one, weights) for one in (policy, reference))
    assert own.tolist() == [-6, -4 - 0.5 * 9, -1 - 0.5 * 3, -2]
    assert fixed.tolist() == [-6, -4 - 0.5 * 4, -1 - 0.5 * 3, -1]
    a, b, c, d = [
        Answer(p, r, n) for p, r, n in zip(own.tolist(), fixed.tolist(), LENGTHS, strict=True)
    ]
    losses = losses_of("ld-dpo", groups_of(pair(a, b), pair(c, d)), alpha=0.5)
    # D is 0 - (-2.5) and 0 - (-1).
    by_hand = [0.575939419879, 0.644396660074]
    assert by_hand == pytest.approx([log(1 + exp(-0.25)), log(1 + exp(-0.1))], rel=1e-11)
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-11)


@pytest.mark.parametrize("name", ["ld-dpo", "sampo"])
def test_the_loss_of_weighted_tokens_starts_at_ln_2(name: str) -> None:
    targets = targets_of(holes=[2, 5])
    weights = objective_of(name).token_weights(targets)
    logps = -torch.rand(13, generator=torch.Generator().manual_seed(0))
    sums = weighted_sums(targets, logps, weights).tolist()
    a, b, c, d = [Answer(one, one, n) for one, n in zip(sums, LENGTHS, strict=True)]
    losses = losses_of(name, groups_of(pair(a, b), pair(c, d)))
    assert losses.tolist() == pytest.approx([log(2)] * 2, rel=1e-15)


holes = st.lists(st.integers(0, 12), max_size=8, unique=True).filter(
    # Each completion keeps a token that counts.
    lambda found: all(set(range(a, b)) - set(found) for a, b in ((0, 3), (3, 8), (8, 12), (12, 13)))
)


def completions(targets: TargetTokens) -> list[range]:
    offsets = targets.completion_offsets.tolist()
    return [range(*both) for both in pairwise(offsets)]


@settings(max_examples=25)
@given(holes=holes, alpha=st.sampled_from([0.0, 0.25, 1.0]))
def test_ld_dpo_agrees_with_a_loop_over_the_tokens(holes: list[int], alpha: float) -> None:
    targets = targets_of(holes)
    weights = weights_of("ld-dpo", targets, alpha=alpha)
    counts = [sum(bool(targets.counted[i]) for i in places) for places in completions(targets)]
    for number, places in enumerate(completions(targets)):
        shorter, seen = min(counts[number], counts[number ^ 1]), 0
        for i in places:
            if targets.counted[i]:
                assert weights[i] == (1.0 if seen < shorter else alpha)
                seen += 1


@settings(max_examples=25)
@given(holes=holes)
def test_sampo_takes_as_many_counted_tokens_of_either_side(holes: list[int]) -> None:
    targets = targets_of(holes)
    weights = np.array(weights_of("sampo", targets))
    counts = [int(targets.counted[places].sum()) for places in map(list, completions(targets))]
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert not weights[~targets.counted].any()
    for number, places in enumerate(completions(targets)):
        assert weights[list(places)].sum() == min(counts[number], counts[number ^ 1])


def at_rows(rows: Sequence[int]) -> TargetTokens:
    return replace(targets_of(), rows=np.array(rows, dtype=np.int64))


def test_sampo_draws_the_same_tokens_of_a_row_wherever_it_is() -> None:
    first, again = at_rows([40, 41, 6, 7]), at_rows([40, 41, 90, 91])
    assert weights_of("sampo", first) == weights_of("sampo", first)
    assert weights_of("sampo", first)[:8] == weights_of("sampo", again)[:8]


def test_sampo_draws_every_token_about_equally_often() -> None:
    """Three of five tokens, in 500 rows: 300 times each, with a deviation of 11."""
    drawn = sum(
        np.array(weights_of("sampo", at_rows([2 * i, 2 * i + 1, 0, 1])))[3:8] for i in range(500)
    )
    assert np.abs(drawn - 300).max() < 5 * 11


@pytest.mark.parametrize("name", ["ld-dpo", "sampo"])
def test_weights_of_a_part_are_those_of_the_batch(name: str) -> None:
    """A micro-batch is computed in parts, each with its own call."""
    targets = targets_of(holes=[4, 9])
    parts = [part.targets for part in targets.parts(1)]
    assert len(parts) == 2
    found = [weight for part in parts for weight in weights_of(name, part)]
    assert found == weights_of(name, targets)


def test_methods_without_weights_have_plain_sums() -> None:
    targets = targets_of(holes=[0])
    assert objective_of("dpo").token_weights(targets) is None
    logps: Tensor = -torch.arange(1, 14, dtype=torch.float32)
    assert weighted_sums(targets, logps, None).tolist() == [-5, -30, -42, -13]


def test_ld_dpo_with_alpha_1_is_dpo() -> None:
    targets = targets_of(holes=[4])
    assert set(weights_of("ld-dpo", targets, alpha=1.0)) == {1.0}
