"""The data report as text for a terminal of 80 columns."""

from textwrap import wrap
from typing import TYPE_CHECKING

from logratio.data.analysis.histograms import bars, histogram, side_by_side
from logratio.data.analysis.intervals import Interval, written
from logratio.data.analysis.lengths import SMALL_EFFECT, SMALL_SUPERIORITY, LengthBias
from logratio.data.analysis.padding import BATCH, Padding
from logratio.data.analysis.sharing import BUDGET, UPDATE, Sharing
from logratio.data.analysis.similarity import Similarity
from logratio.data.analysis.tokens import TokenUse

if TYPE_CHECKING:
    from logratio.data.analysis.whole import Analysis

WIDTH = 80
_BINS = 10
_SHOWN = 3


def to_text(analysis: "Analysis") -> str:
    """Return the whole report."""
    blocks = [analysis.account.to_text().splitlines()]
    if analysis.groups:
        blocks += [
            _table(analysis),
            _histograms(analysis),
            _cuts(analysis),
            _wrapped(_bias(analysis.bias)),
            _wrapped(_noise(analysis)),
            _wrapped(_padding(analysis.padding)),
            _wrapped(_sharing(analysis.sharing)),
            _wrapped(_tokens(analysis.tokens)),
            _similarity(analysis.similarity, analysis.groups),
            _wrapped([str(one) for one in analysis.findings]),
        ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _table(analysis: "Analysis") -> list[str]:
    head = f"{'tokens':<11}{'median':>10}{'mean':>10}{'p95':>10}{'longest':>10}{'in all':>16}"
    rows = [
        f"{name:<11}{numbers.median:>10,.1f}{numbers.mean:>10,.1f}{numbers.quantile(0.95):>10,}"
        f"{numbers.largest:>10,}{numbers.total:>16,}"
        for name, numbers in analysis.lengths.items()
    ]
    kept = analysis.account.kept
    made = [] if analysis.groups == kept else [f"{kept:,} rows make {analysis.groups:,} groups", ""]
    return [*made, head, *rows]


def _histograms(analysis: "Analysis") -> list[str]:
    panels = {
        f"{name}, tokens": bars(histogram(numbers, _BINS).named(), WIDTH // 2 - 2)
        for name, numbers in analysis.lengths.items()
    }
    return side_by_side(panels, WIDTH)


def _cuts(analysis: "Analysis") -> list[str]:
    panels = {
        f"{what} cut, by tokens lost": bars(bins, WIDTH // 2 - 2)
        for code, what in (("W506", "prompts"), ("W503", "completions"))
        if (bins := analysis.account.cut_bins(code))
    }
    return side_by_side(panels, WIDTH) if panels else []


def _bias(bias: LengthBias | None) -> list[str]:
    if bias is None:
        return ["length bias: nothing is compared"]
    difference = written(bias.chosen.mean - bias.rejected.mean, 1, sign=True)
    measured = "d_z" if bias.kind == "paired" else "d"
    sentences = [
        f"length bias: chosen is longer in {_percent(bias.longer)}, equal in "
        f"{_percent(bias.equal)}, shorter in {_percent(bias.shorter)} of {_compared(bias)}",
        f"chosen − rejected = {difference} tokens on average"
        + (f", median {written(bias.difference.median, 0, sign=True)}" if bias.difference else ""),
        f"Cohen's {measured} = {written(bias.effect, 3)} ({_interval(bias.effect_interval)})"
        if bias.varies
        else f"Cohen's {measured} is not defined: the lengths do not vary",
        f"P(chosen longer) = {bias.superiority:.3f} ({_interval(bias.superiority_interval)}), ties "
        "as one half: so often is “the longer wins” right",
    ]
    if bias.strength is None:
        sentences.append(
            f"no warning: that takes |d| ≥ {SMALL_EFFECT}, or P ≥ {SMALL_SUPERIORITY} or "
            f"≤ {1 - SMALL_SUPERIORITY:.2f}, and an interval without “no effect”"
        )
    return sentences


def _compared(bias: LengthBias) -> str:
    if bias.kind == "paired":
        return f"{bias.chosen.count:,} pairs"
    return f"{bias.chosen.count:,} up × {bias.rejected.count:,} down"


def _noise(analysis: "Analysis") -> list[str]:
    flips = analysis.flips
    if not analysis.are_pairs:
        return ["label noise: cannot be estimated: not all groups are pairs"]
    if analysis.groups != analysis.account.kept:
        return ["label noise: cannot be estimated: a row holds several pairs"]
    if flips is None:
        return ["label noise: cannot be estimated: no pair was judged twice"]
    low, high = flips.interval
    return [
        f"label noise: {_percent(flips.rate)} of the judgements are flipped (95 %: {_percent(low)} "
        f"… {_percent(high)})",
        f"estimated from {flips.pairs:,} pairs that were judged more than once, "
        f"{flips.contested:,} of them both ways",
        "assumes that judges err independently and equally often on every pair, and that no row is "
        "a copy of another; where that fails it is a lower bound",
    ]


def _padding(found: Padding | None) -> list[str]:
    if found is None:
        return []
    return [
        f"computing: {found.rows:,} tokens in rows of prompt and completion, "
        f"{_percent(found.prompt_share)} of them prompt",
        f"sharing the prompt computes {found.shared:,} instead: {_percent(found.saved)} saved",
        f"padded batches of {BATCH} groups: {_percent(found.waste)} padding in file order, "
        f"{_percent(found.sorted_waste)} sorted by length",
    ]


def _sharing(found: Sharing | None) -> list[str]:
    if found is None:
        return []
    saved = {name: _percent(found.saved(name)) for name in ("micro_batches", "one_pass")}
    most = {name: _percent(found.saved(name)) for name in ("updates", "whole")}
    return [
        f"shared beginnings: of {found.grouped:,} tokens with each prompt once a group, "
        f"`train --share-beginnings` computes {found.micro_batches:,}: {saved['micro_batches']} "
        f"saved (updates of {UPDATE} groups, micro-batches of {BUDGET:,} tokens)",
        f"`precompute --share-beginnings` computes {found.one_pass:,}: {saved['one_pass']} saved",
        f"the most that larger micro-batches can save: {most['updates']} in training, "
        f"{most['whole']} in `precompute`",
    ]


def _tokens(use: TokenUse) -> list[str]:
    lines = [f"vocabulary: {use.used:,} ids are used"]
    if use.vocabulary is not None:
        share = _percent(use.used / use.vocabulary)
        lines = [f"vocabulary: {use.used:,} of {use.vocabulary:,} ids are used ({share})"]
    if use.special:
        named = ", ".join(f"{text} {count:,}" for text, count in use.special.items())
        lines.append(f"special tokens: {named}")
    if use.ended is not None:
        lines.append(
            f"{use.ended:,} of {use.completions:,} completions end with {' or '.join(use.stops)} "
            f"({_percent(use.ended / use.completions)})"
        )
    if use.unknown:
        lines.append(f"{use.unknown:,} tokens have ids that the tokenizer does not know")
    if use.compared:
        lines.append(
            f"all completions begin with one token in {_percent(use.same_start / use.compared)} "
            f"of the groups"
        )
    return lines


def _similarity(found: Similarity | None, groups: int) -> list[str]:
    if found is None:
        return []
    rule = f"Jaccard ≥ {found.threshold:g} of windows of {found.shingle} tokens"
    if not found.similar:
        return [f"near-duplicates: none among {groups:,} groups ({rule})"]
    return [
        f"near-duplicates: {found.similar:,} of {groups:,} groups resemble an earlier one, whoever "
        "is chosen",
        f"  {_percent(found.similar / groups)}, in {found.clusters:,} clusters of up to "
        f"{found.largest:,} groups; {rule}",
        *(f"  {example}" for example in found.examples[:_SHOWN]),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(interval: Interval) -> str:
    return f"95 %: {written(interval[0], 3)} … {written(interval[1], 3)}"


def _wrapped(sentences: list[str]) -> list[str]:
    """Break sentences into lines; all but the first, which heads the block, stand further in."""
    lines = []
    for number, sentence in enumerate(sentences):
        first = "  " if number and not sentence.startswith("[") else ""
        lines += wrap(
            sentence,
            WIDTH,
            initial_indent=first,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
