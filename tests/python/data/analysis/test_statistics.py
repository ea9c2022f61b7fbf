"""Statistics of a dataset: small cases by hand, and an oracle that loops over the pairs."""

import json
import math
from itertools import chain, combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.analysis import analyse
from logratio.data.analysis.pairs import (
    LengthBias,
    estimate_flips,
    length_bias,
    unpaired_bias,
    votes_of,
)
from logratio.data.analysis.report import length_finding
from logratio.data.analysis.statistics import (
    Columns,
    Distribution,
    bars,
    binned,
    histogram,
    side_by_side,
    written,
)
from logratio.data.analysis.token_use import BUDGET, UPDATE, padding, sharing
from logratio.data.store.row_report import DataReport
from logratio.data.store.turn_weights import WeightCounts

CHOSEN, REJECTED, CANDIDATE, DEMONSTRATION = range(4)

Group = tuple[int, list[tuple[int, int, int]]]
"""Tokens of a prompt; for each completion its tokens, its trained tokens and its role."""


def make(groups: list[Group]) -> Store:
    """Build a store of these shapes; groups share no tokens."""
    writer = StoreWriter()
    for number, (prompt, completions) in enumerate(groups):
        ids = np.arange(sum(length for length, _, _ in completions), dtype=np.int32)
        mask = [[1] * counted + [0] * (length - counted) for length, counted, _ in completions]
        writer.push(
            np.full(prompt, number, np.int32),
            ids,
            np.array(list(chain.from_iterable(mask)), np.uint8),
            np.array([length for length, _, _ in completions], np.uint32),
            np.array([role for _, _, role in completions], np.uint8),
            0,
            number + 1,
        )
    return writer.finish()


def pairs(*lengths: tuple[int, int, int]) -> list[Group]:
    """Pairs of (prompt, chosen, rejected) tokens, all of them trained."""
    return [(p, [(c, c, CHOSEN), (r, r, REJECTED)]) for p, c, r in lengths]


integers = st.lists(st.integers(-50, 5000), min_size=1, max_size=60)


@settings(deadline=None)
@given(integers)
def test_a_distribution_is_the_column_that_it_counts(numbers: list[int]) -> None:
    column = np.array(numbers)
    found = Distribution.of(column)
    assert (found.count, found.total, found.largest) == (len(column), column.sum(), column.max())
    assert found.mean == pytest.approx(column.mean())
    assert found.median == np.median(column)
    assert found.deviation == pytest.approx(column.std(ddof=1) if len(column) > 1 else 0)
    for share in (0.005, 0.5, 0.95, 1.0):
        assert found.quantile(share) == np.quantile(column, share, method="inverted_cdf")
    assert found.above(7) == (column > 7).sum()


@settings(deadline=None)
@given(integers, integers)
def test_joined_distributions_are_those_of_the_joined_columns(a: list[int], b: list[int]) -> None:
    joined = Distribution.of(np.array(a)).joined(Distribution.of(np.array(b)))
    together = Distribution.of(np.array(a + b))
    assert joined.values.tolist() == together.values.tolist()
    assert joined.counts.tolist() == together.counts.tolist()


def test_numbers_that_are_far_apart_are_counted_too() -> None:
    found = Distribution.of(np.array([1, 10**9, 1]))
    assert (found.values.tolist(), found.counts.tolist()) == ([1, 10**9], [2, 1])


def test_an_empty_store_has_no_statistics() -> None:
    none = Distribution.of(np.zeros(0, np.int64))
    numbers = none.count, none.mean, none.deviation, none.median, none.largest, none.quantile(0.5)
    assert numbers == (0, 0, 0, 0, 0, 0)


def test_length_bias_by_hand() -> None:
    # Differences 2, 1, 0, -1: mean 0.5, deviation sqrt(5/3).
    bias = length_bias(Columns.of(make(pairs((5, 4, 2), (5, 3, 2), (5, 2, 2), (5, 1, 2)))))
    assert bias is not None
    assert (bias.longer, bias.equal, bias.shorter) == (0.5, 0.25, 0.25)
    assert bias.superiority == 0.5 + 0.25 / 2
    d = 0.5 / math.sqrt(5 / 3)
    assert bias.effect == pytest.approx(d)
    half = 1.959964 * math.sqrt(1 / 4 + d**2 / 8)
    assert bias.effect_interval == pytest.approx((d - half, d + half), abs=1e-5)
    assert bias.strength is None  # four pairs show nothing


def test_only_tokens_that_count_are_compared() -> None:
    groups: list[Group] = [(3, [(9, 2, CHOSEN), (5, 4, REJECTED)])]
    bias = length_bias(Columns.of(make(groups)))
    assert bias is not None
    assert (bias.chosen.mean, bias.rejected.mean, bias.longer) == (2, 4, 0)


def test_lists_are_judged_by_their_ends() -> None:
    ranked: Group = (3, [(9, 9, CANDIDATE), (1, 1, CANDIDATE), (4, 4, CANDIDATE)])
    many: Group = (3, [(7, 7, CHOSEN), (1, 1, REJECTED), (5, 5, REJECTED)])
    imitated: Group = (3, [(2, 2, DEMONSTRATION)])
    columns = Columns.of(make([ranked, imitated, many]))
    assert [found.tolist() for found in columns.compared()] == [[0, 4], [2, 6]]
    assert not columns.are_pairs()


def test_demonstrations_have_nothing_to_compare() -> None:
    assert length_bias(Columns.of(make([(3, [(2, 2, DEMONSTRATION)])]))) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40))
def test_paired_bias_against_going_through_the_pairs(lengths: list[tuple[int, int]]) -> None:
    bias = length_bias(Columns.of(make(pairs(*((1, c, r) for c, r in lengths)))))
    assert bias is not None
    differences = [c - r for c, r in lengths]
    wins = sum((d > 0) + 0.5 * (d == 0) for d in differences)
    assert bias.superiority == pytest.approx(wins / len(lengths))
    spread = np.std(differences, ddof=1) if len(lengths) > 1 else 0
    assert bias.effect == pytest.approx(np.mean(differences) / spread if spread > 0 else 0)
    assert bias.superiority_interval[0] <= bias.superiority <= bias.superiority_interval[1]


samples = st.lists(st.integers(1, 9), min_size=2, max_size=25)


@settings(deadline=None)
@given(samples, samples)
def test_unpaired_bias_against_going_through_all_pairs(up: list[int], down: list[int]) -> None:
    groups: list[Group] = [(1, [(n, n, CHOSEN)]) for n in up]
    groups += [(1, [(n, n, REJECTED)]) for n in down]
    bias = length_bias(Columns.of(make(groups)))
    assert bias is not None
    assert bias.kind == "unpaired"
    both = list(product(up, down))
    assert bias.longer == pytest.approx(sum(a > b for a, b in both) / len(both))
    assert bias.equal == pytest.approx(sum(a == b for a, b in both) / len(both))
    squares = sum((n - np.mean(up)) ** 2 for n in up) + sum((n - np.mean(down)) ** 2 for n in down)
    pooled = math.sqrt(squares / (len(up) + len(down) - 2))
    expected = (np.mean(up) - np.mean(down)) / pooled if pooled else 0
    assert bias.effect == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shift", "strength"),
    [(0.0, None), (0.1, None), (0.3, "small"), (-0.6, "medium"), (1, "large")],
)
def test_a_shift_in_length_is_named_by_its_size(shift: float, strength: str | None) -> None:
    noise = np.random.default_rng(0).normal(shift, 1, 2000)
    lengths = [(1, 1000 + round(50 * n), 1000) for n in noise]
    bias = length_bias(Columns.of(make(pairs(*lengths))))
    assert bias is not None
    assert bias.strength == strength
    assert bias.effect == pytest.approx(shift, abs=0.06)


def test_the_interval_of_the_effect_covers_it() -> None:
    random, covered = np.random.default_rng(1), 0
    for _ in range(300):
        lengths = 500 + np.round(random.normal([60, 40], 40, (80, 2))).astype(int)
        bias = length_bias(Columns.of(make(pairs(*((1, c, r) for c, r in lengths.tolist())))))
        assert bias is not None
        low, high = bias.effect_interval
        covered += low <= 20 / (40 * math.sqrt(2)) <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_unpaired_samples_that_do_not_overlap() -> None:
    bias = unpaired_bias(Distribution.of(np.array([5, 6])), Distribution.of(np.array([1, 2])))
    assert (bias.longer, bias.equal, bias.superiority) == (1, 0, 1)
    assert bias.difference is None


def test_flips_by_hand() -> None:
    # Of two pairs judged twice one is contested: 2ε(1 − ε) = 1/2, so ε = 1/2.
    flips = estimate_flips(np.array([[2, 0], [1, 1], [1, 0]]))
    assert flips is not None
    assert (flips.disagreement, flips.rate) == (0.5, 0.5)
    assert (flips.pairs, flips.contested, flips.judgements) == (2, 1, 4)
    # 18 of 100: 2ε(1 − ε) = 0.18 has the root 0.1.
    flips = estimate_flips(votes_of(82, 18))
    assert flips is not None
    assert flips.rate == pytest.approx(0.1)
    assert flips.interval[0] < 0.1 < flips.interval[1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20))
def test_disagreement_against_drawing_two_judgements(votes: list[tuple[int, int]]) -> None:
    flips = estimate_flips(np.array(votes))
    judged = [[1] * a + [0] * b for a, b in votes if a + b > 1]
    if not judged:
        assert flips is None
        return
    drawn = [np.mean([x != y for x, y in combinations(one, 2)]) for one in judged]
    weights = [len(one) - 1 for one in judged]
    assert flips is not None
    assert flips.disagreement == pytest.approx(min(1, float(np.average(drawn, weights=weights))))


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_planted_flips_are_found_and_covered(rate: float) -> None:
    random, covered, found = np.random.default_rng(3), 0, []
    for _ in range(200):
        judged = random.integers(2, 5, 400)
        flipped = random.binomial(judged, rate)
        flips = estimate_flips(np.stack([judged - flipped, flipped], axis=1))
        assert flips is not None
        found.append(flips.rate)
        covered += flips.interval[0] <= rate <= flips.interval[1]
    assert np.mean(found) == pytest.approx(rate, rel=0.05)
    assert covered / 200 >= 0.93  # conservative


def test_judgements_worse_than_a_coin_are_a_coin() -> None:
    flips = estimate_flips(votes_of(0, 10))
    assert flips is not None
    assert flips.rate == 0.5


def test_padding_by_hand() -> None:
    # Nine pairs: eight whose rows are 5 and 3 long, and one of 21 and 11 in its own batch.
    found = padding(Columns.of(make(pairs(*[(2, 3, 1)] * 8, (1, 20, 10)))))
    assert found is not None
    assert found.rows == 8 * (5 + 3) + 21 + 11
    assert found.prompts == 8 * 2 * 2 + 2
    assert found.shared == 8 * 6 + 31
    assert found.in_order == found.in_length_order == 16 * 5 + 2 * 21
    assert found.waste == 1 - 96 / 122
    assert found.saved == 1 - 79 / 96
    assert padding(Columns.of(StoreWriter().finish())) is None


shapes = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.lists(
            st.tuples(st.integers(1, 9), st.just(1), st.integers(0, len(ROLES) - 1)),
            min_size=1,
            max_size=4,
        ),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(shapes)
def test_padding_against_padding_rows(groups: list[Group]) -> None:
    def padded(order: list[Group]) -> int:
        batches = [order[at : at + 8] for at in range(0, len(order), 8)]
        rows = [[p + c for p, completions in batch for c, _, _ in completions] for batch in batches]
        return sum(len(lengths) * max(lengths) for lengths in rows)

    found = padding(Columns.of(make(groups)))
    assert found is not None
    assert found.in_order == padded(groups)
    by_length = sorted(groups, key=lambda group: group[0] + max(c for c, _, _ in group[1]))
    assert found.in_length_order == padded(by_length)
    assert found.rows == sum(p + c for p, completions in groups for c, _, _ in completions)
    assert found.shared == sum(p + sum(c for c, _, _ in completions) for p, completions in groups)


def turns(count: int, length: int = 30) -> Store:
    """Conversations of three rated turns after one of three system prompts, shuffled."""
    random, writer, rows = np.random.default_rng(count), StoreWriter(), []

    def ids(tokens: int) -> list[int]:
        length = int(tokens * random.uniform(0.5, 1.5))
        return [int(i) for i in random.integers(0, 9, length)]

    systems = [[10 + number, *ids(20)] for number in range(3)]
    for talk in range(count):
        prompt = systems[talk % 3]
        for _ in range(3):
            prompt = prompt + ids(5)
            answers = ids(length), ids(length)
            rows.append((prompt, answers))
            prompt = prompt + answers[0]
    for at in random.permutation(len(rows)).tolist():
        prompt, answers = rows[at]
        flat = np.array(answers[0] + answers[1], np.int32)
        lengths = np.array([*map(len, answers)], np.uint32)
        mask, roles = np.ones(len(flat), np.uint8), np.array([CHOSEN, REJECTED], np.uint8)
        writer.push(np.array(prompt, np.int32), flat, mask, lengths, roles, 0, at)
    return writer.finish()


def beginnings(store: Store, groups: list[int]) -> int:
    """Count the distinct prefixes of the groups' sequences, as nodes of a tree of dictionaries."""
    root: dict[int, Any] = {}
    nodes = 0
    for group in groups:
        prompt, completions, _, _ = store.group(group)
        for completion in completions:
            at = root
            for token in chain(prompt.tolist(), completion.tolist()):
                nodes += token not in at
                at = at.setdefault(token, {})
    return nodes


@pytest.mark.parametrize(("count", "length"), [(1, 30), (30, 30), (12, 300)])
def test_sharing_against_a_tree_of_dictionaries(count: int, length: int) -> None:
    """Prompts that agree in their first 8 tokens share; here, all with a common prefix do."""
    store, every = turns(count, length), list(range(3 * count))
    assert (found := sharing(store))
    assert found.grouped == store.tokens
    assert found.alone == sum(beginnings(store, [group]) for group in every)
    assert found.whole == beginnings(store, every)
    plan = store.plan(order="length_grouped", groups_per_update=UPDATE, token_budget=BUDGET)
    offsets = plan.micro_offsets[plan.update_offsets]
    updates = [plan.order[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    assert found.updates == sum(beginnings(store, update) for update in updates)
    assert found.whole <= found.one_pass <= found.micro_batches <= found.alone
    assert found.updates <= found.micro_batches
    assert found.saved("whole") == 1 - found.whole / found.grouped
    assert found.to_dict()["saved_whole"] == found.saved("whole")
    assert sharing(StoreWriter().finish()) is None


@settings(deadline=None)
@given(shapes)
def test_any_store_can_be_described(groups: list[Group]) -> None:
    store = make(groups)
    analysis = analyse(store, DataReport(read=len(store), kept=len(store)), threshold=0.9)
    assert analysis.to_text()
    assert analysis.to_dict()["groups"] == len(groups)
    assert analysis.lengths["group"].total == store.tokens == analysis.tokens.tokens
    assert sum(analysis.lengths[name].count for name in ("prompt", "group")) == 2 * len(groups)


@settings(deadline=None)
@given(integers, st.integers(2, 40))
def test_every_number_is_in_a_bin_or_outside(numbers: list[int], bins: int) -> None:
    found = histogram(Distribution.of(np.array(numbers)), bins)
    assert len(found.counts) <= bins
    assert found.below + sum(found.counts) + found.beyond == len(numbers)
    column = np.array(numbers)
    for low, count in zip(found.edges, found.counts, strict=False):
        assert count == ((column >= low) & (column < low + found.width)).sum()
    assert str(found.width).rstrip("0") in {"1", "2", "5"}
    assert found.start % found.width == 0


def test_few_different_numbers_have_a_bin_each() -> None:
    found = histogram(Distribution.of(np.array([3] * 1000 + [7])), 10)
    assert (found.start, found.width, found.counts) == (3, 1, (1000, 0, 0, 0, 1))
    far = histogram(Distribution.of(np.array([3] * 1000 + [70])), 10)
    assert (far.start, far.counts, far.beyond) == (3, (1000,), 1)


def test_numbers_are_written_with_a_minus() -> None:
    assert [written(n, 1) for n in (-1.25, -0.01, 3)] == ["−1.2", "0.0", "3.0"]
    assert [written(n, 0, sign=True) for n in (-2, 0, 2)] == ["−2", "+0", "+2"]


def test_a_store_without_counts_reports_its_groups() -> None:
    account = analyse(make(pairs((5, 4, 2), (3, 2, 1)))).account
    assert (account.read, account.kept, account.refused) == (2, 2, 0)
    assert (account.prompt_tokens, account.completion_tokens) == (8, 9)


def test_bins_have_names() -> None:
    found = binned(Distribution.of(np.array([1, 10, 19, 25, 70])), 10, 10, 2)
    assert found.named() == [("< 10", 1), ("10-19", 2), ("20-29", 1), ("≥ 30", 1)]
    assert binned(Distribution.of(np.array([3])), 3, 1, 1).named() == [("3", 1)]


def test_bars_are_proportional() -> None:
    lines = bars([("a", 1000), ("bb", 500), ("c", 0), ("d", 4)], 24)
    assert lines == [
        " a ███████████████ 1,000",
        "bb ███████▌ 500",
        " c  0",
        " d  4",
    ]
    assert max(map(len, lines)) == 24


def test_blocks_are_side_by_side() -> None:
    lines = side_by_side({"A": ["1"], "B": ["2", "3"], "C": []}, 20)
    assert lines == ["A          B", "1          2", "           3", "C"]


def as_array(*votes: Any) -> NDArray[np.int64]:
    return np.array(votes, np.int64)


def test_without_repeated_judgements_there_is_no_estimate() -> None:
    assert estimate_flips(as_array([1, 0], [0, 1])) is None
    assert estimate_flips(np.zeros((0, 2), np.uint32)) is None


def one_longer(*differences: int) -> LengthBias:
    bias = length_bias(Columns.of(make(pairs(*((1, 50 + d, 50) for d in differences)))))
    assert bias is not None
    return bias


def test_the_warning_names_the_effect_that_is_large() -> None:
    """A constant difference has no deviation, and few far values no stable mean: d is 0.00."""
    for bias in (one_longer(*[1] * 40), one_longer(*[1] * 36, *[-9] * 4)):
        assert (bias.effect, bias.strength) == (0, "large")
        (found,) = length_finding(bias)
        assert "d =" not in found.text
        assert (
            f"“the longer wins” is right for {100 * bias.superiority:.1f} %, a large" in found.text
        )
    bad = WeightCounts.of("turn", np.array([-2.0, -2.0]), np.array([0, 1]))
    assert str(bad).endswith("2 in 2 completions, −2; below 0: 2 in 2")
    (found,) = length_finding(one_longer(*[1] * 40), bad)
    assert "divides by length" not in found.text, "such losses refuse turns below 0"
    (found,) = length_finding(one_longer(*[-1] * 40))
    assert "“the shorter wins” is right for 100.0 %" in found.text
    assert not length_finding(one_longer(*[0] * 40))
    assert not length_finding(one_longer(1, 1))


def test_the_accuracy_is_that_of_the_rule_which_is_named() -> None:
    """Chosen is shorter more often, but much longer where it is longer: the mean decides."""
    bias = one_longer(*[-1] * 52, *range(40, 88))
    assert bias.is_of_means and bias.effect > 0.5 > bias.superiority
    (found,) = length_finding(bias)
    assert f"d = {bias.effect:.2f}" in found.text
    assert "“the longer wins” is right for 48.0 %" in found.text


def test_lengths_that_do_not_vary_have_no_effect_size() -> None:
    assert not one_longer(1, 1, 1).varies
    assert one_longer(1, 2, 1).varies
    same = unpaired_bias(Distribution.of(np.array([5, 5])), Distribution.of(np.array([1, 1])))
    assert not same.varies


@pytest.mark.parametrize(("good", "bad"), [(3, 2), (3, 0), (0, 2)])
def test_good_and_bad_answers_are_counted_and_a_missing_kind_is_named(good: int, bad: int) -> None:
    answers: list[Group] = [(2, [(4, 4, CHOSEN)])] * good + [(2, [(3, 3, REJECTED)])] * bad
    mismatched = ROLES.index("mismatched")
    added: list[Group] = [(prompt, [*own, (5, 5, mismatched)]) for prompt, own in answers]
    for groups in (answers, added):  # KTO adds answers to other prompts
        found = analyse(make(groups))
        assert found.labels == (good, bad)
        assert found.to_dict()["labels"] == {"good": good, "bad": bad}
        counts = f"{good} good answers, {bad} bad answers"
        assert counts in found.to_text()
        assert counts in found.to_summary()
        codes = [one.code for one in found.findings]
        assert ("W527" in codes) == (not (good and bad))


def test_good_answers_with_bad_turns_lack_no_kind_of_answer() -> None:
    found = analyse(weighted_answers([-1.0, 0.5]))
    assert found.labels == (3, 0)
    assert "W527" not in [one.code for one in found.findings]
    assert found.turn_weights is not None
    assert found.to_dict()["turn_weights"]["bad"] == 3
    words = "tokens of turns with a weight other than 0 and 1: 6 in 3 completions, −1 … 0.5; below"
    for text in (found.to_text(), found.to_summary()):
        assert words in text.replace("\n    ", " ")
    others = analyse(weighted_answers([2.0, 0.5])).findings
    (missing,) = [one for one in others if one.code == "W527"]
    assert "weights below 0 for bad turns" in missing.text


def weighted_answers(values: list[float]) -> Store:
    """Three good answers of three tokens, the first two of which have these weights."""
    writer = StoreWriter()
    for number in range(3):
        ids = np.arange(number, number + 3, dtype=np.int32)
        mask, lengths = np.array([2, 3, 1], np.uint8), np.array([3], np.uint32)
        writer.push(ids[:1], ids, mask, lengths, np.array([CHOSEN], np.uint8), 0, number + 1)
    return writer.finish(json.dumps({"turn_weights": values}))


def test_pairs_have_no_counts_of_labels() -> None:
    found = analyse(make(pairs((5, 4, 2), (5, 3, 2))))
    assert found.labels is None
    assert "good answer" not in found.to_text()
