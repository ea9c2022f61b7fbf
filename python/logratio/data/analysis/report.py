"""The data report: the counts of all rows, and statistics and warnings about the kept groups."""

import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from logratio._rust import Store
from logratio.data.analysis.pairs import (
    SMALL_EFFECT,
    SMALL_SUPERIORITY,
    FlipEstimate,
    LengthBias,
    Similarity,
    estimate_flips,
    length_bias,
    similarity,
    votes_of,
)
from logratio.data.analysis.statistics import (
    Columns,
    Distribution,
    Places,
    bars,
    histogram,
    side_by_side,
    written,
)
from logratio.data.analysis.token_use import (
    BATCH,
    BUDGET,
    UPDATE,
    Padding,
    Sharing,
    TokenUse,
    padding,
    sharing,
    token_use,
)
from logratio.data.formats.catalogue import STEPS
from logratio.data.records import CODES
from logratio.data.store.row_report import DataReport
from logratio.data.store.turn_weights import WeightCounts, weight_counts
from logratio.data.store.value_counts import value_counts
from logratio.data.tokenization.groups import TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import LogratioError
from logratio.forecast import count
from logratio.intervals import Interval

NOTABLE_SIMILAR = 0.01
"""Warn if at least this share of the groups resembles an earlier one."""

NOTABLE_TOUCHING = 0.5
"""Warn if more than this share of plain prompts is joined to the answer without white space."""

NOTABLE_CUT = 0.05
"""Warn if at least this share of the completions was truncated."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning (W508 …) about the whole dataset.

    Attributes:
        code: One of `logratio.data.records.CODES`.
        text: The finding, with its numbers.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return f"[{self.code}] {CODES[self.code]}: {self.text}"


def length_finding(bias: LengthBias | None, weights: WeightCounts | None = None) -> list[Finding]:
    """Warn if length alone predicts which answer is chosen (W508)."""
    if bias is None or bias.strength is None:
        return []
    is_longer = bias.effect > 0 if bias.is_of_means else bias.superiority > 0.5
    direction = "longer" if is_longer else "shorter"
    accuracy = bias.superiority if is_longer else 1 - bias.superiority
    rule = f"“the {direction} wins” is right for {100 * accuracy:.1f} %"
    if bias.is_of_means:
        found = (
            f"the mean lengths differ by a {bias.strength} effect, d = {bias.effect:.2f}; {rule}"
        )
    else:
        found = f"{rule}, a {bias.strength} effect"
    text = f"{found}. Compare the policy's accuracy with it"
    if not (weights and weights.bad):  # such losses are not defined for turns below 0
        text += ", or use a loss that divides by length"
    return [Finding("W508", text)]


def noise_finding(flips: FlipEstimate | None) -> list[Finding]:
    """Warn if repeated judgements often contradict each other (W509)."""
    if flips is None or not flips.is_notable:
        return []
    text = (
        f"{100 * flips.rate:.1f} % are estimated to be flipped; a label smoothing of "
        f"{flips.rate:.2f} accounts for that"
    )
    return [Finding("W509", text)]


def similarity_finding(found: Similarity | None, groups: int) -> list[Finding]:
    """Warn if many groups are nearly the same as others (W510)."""
    if found is None or found.similar < NOTABLE_SIMILAR * groups:
        return []
    text = (
        f"{found.similar:,} of {groups:,} groups resemble an earlier one; they weigh more in "
        "training, and a random split puts them on both sides"
    )
    return [Finding("W510", text)]


def stop_finding(use: TokenUse) -> list[Finding]:
    """Warn if no completion ends with a stop token (W517)."""
    if use.ended != 0 or not use.completions:
        return []
    text = (
        f"none of {use.completions:,} completions ends with {' or '.join(use.stops)}: a model "
        "trained on them does not learn to stop. Compare the chat template with "
        "eos_token_id in generation_config.json"
    )
    return [Finding("W517", text)]


def label_finding(labels: tuple[int, int] | None, weights: WeightCounts | None) -> list[Finding]:
    """Warn if all single answers are good, or all are bad (W527), unless turns are below 0."""
    if labels is None or all(labels) or (weights and weights.bad):
        return []
    text = "add good ones"
    if labels[0]:
        text = (
            "add bad ones, or weights below 0 for bad turns; --loss sft imitates good answers "
            "without labels"
        )
    return [Finding("W527", f"{_labels(labels)}: {text}")]


def mixture_finding(account: DataReport) -> list[Finding]:
    """Warn if the chat template rendered some rows and not others (W519)."""
    if not (account.text_rows and account.chat_rows):
        return []
    text = (
        f"{count(account.text_rows, 'row')} of plain text, unchanged, and "
        f"{count(account.chat_rows, 'row')} that the chat template rendered; --chat renders all"
    )
    return [Finding("W519", text)]


def space_finding(account: DataReport) -> list[Finding]:
    """Warn if most answers follow their prompts without white space (W520)."""
    if account.touching_rows <= NOTABLE_TOUCHING * account.text_rows:
        return []
    text = (
        f"in {account.touching_rows:,} of {account.text_rows:,} rows of plain text; the model "
        "reads one word there: end the prompts, or begin the answers, with a space or a line break"
    )
    return [Finding("W520", text)]


def cut_finding(cut: int, completions: int) -> list[Finding]:
    """Warn if many completions were truncated (W511)."""
    if not completions or cut < NOTABLE_CUT * completions:
        return []
    text = f"{cut:,} of {completions:,} ({100 * cut / completions:.1f} %); raise the limit"
    return [Finding("W511", text)]


WIDTH = 80
_TEXT_BINS = 10
_SHOWN = 3


def to_text(analysis: "Analysis") -> str:
    """Return the whole report."""
    blocks = [_counts(analysis)]
    if analysis.groups:
        blocks += [
            [_labels(analysis.labels)] if analysis.labels else [],
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


def to_summary(analysis: "Analysis") -> str:
    """Return what a run needs to know: the counts of the rows, and the warnings."""
    warnings = _wrapped([str(one) for one in analysis.findings])
    warnings = [*([_labels(analysis.labels)] if analysis.labels else []), *warnings]
    more = "`logratio data report` shows lengths, length bias, label noise and what sharing saves"
    return "\n".join([*_counts(analysis), *warnings, more])


def _counts(analysis: "Analysis") -> list[str]:
    lines = analysis.account.to_text().splitlines()
    return lines + (_wrapped([str(analysis.turn_weights)]) if analysis.turn_weights else [])


def _labels(labels: tuple[int, int]) -> str:
    good, bad = labels
    return f"{count(good, 'good answer')}, {count(bad, 'bad answer')}"


def _table(analysis: "Analysis") -> list[str]:
    head = f"{'tokens':<11}{'median':>10}{'mean':>10}{'p95':>10}{'longest':>10}{'in all':>16}"
    rows = [
        f"{name:<11}{numbers.median:>10,.1f}{numbers.mean:>10,.1f}{numbers.quantile(0.95):>10,}"
        f"{numbers.largest:>10,}{numbers.total:>16,}"
        for name, numbers in analysis.lengths.items()
    ]
    kept = analysis.account.kept
    made = f"{count(analysis.groups, 'group')} from {count(kept, 'row')}"
    return [*([made, ""] if analysis.groups != kept else []), head, *rows]


def _histograms(analysis: "Analysis") -> list[str]:
    panels = {
        f"{name}, tokens": bars(histogram(numbers, _TEXT_BINS).named(), WIDTH // 2 - 2)
        for name, numbers in analysis.lengths.items()
    }
    return side_by_side(panels, WIDTH)


def _cuts(analysis: "Analysis") -> list[str]:
    panels = {
        f"{what} truncated, by tokens lost": bars(bins, WIDTH // 2 - 2)
        for code, what in (("W506", "prompts"), ("W503", "completions"))
        if (bins := analysis.account.cut_bins(code))
    }
    return side_by_side(panels, WIDTH) if panels else []


def _bias(bias: LengthBias | None) -> list[str]:
    if bias is None:
        return ["length bias: no completions are compared"]
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
        "as one half: the accuracy of “the longer wins”",
    ]
    if bias.strength is None:
        sentences.append(
            f"not notable: a warning needs |d| ≥ {SMALL_EFFECT}, or P ≥ {SMALL_SUPERIORITY} or "
            f"≤ {1 - SMALL_SUPERIORITY:.2f}, and an interval without “no effect”"
        )
    return sentences


def _compared(bias: LengthBias) -> str:
    if bias.kind == "paired":
        return count(bias.chosen.count, "pair")
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
        "a copy of another; otherwise it is a lower bound",
    ]


def _padding(found: Padding | None) -> list[str]:
    if found is None:
        return []
    return [
        f"computation: {found.rows:,} tokens in rows of prompt and completion, "
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
        f"shared beginnings: --share-beginnings would save {saved['micro_batches']} of the tokens "
        f"in `train` (updates of {UPDATE} groups, micro-batches of {BUDGET:,} tokens) and "
        f"{saved['one_pass']} in `precompute`",
        f"with micro-batches of any size, at most {most['updates']} and {most['whole']}",
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
        lines.append(f"{use.unknown:,} tokens have ids outside the tokenizer's vocabulary")
    if use.compared:
        lines.append(
            f"in {_percent(use.same_start / use.compared)} of the groups, all completions begin "
            "with the same token"
        )
    return lines


def _similarity(found: Similarity | None, groups: int) -> list[str]:
    if found is None:
        return []
    rule = f"Jaccard ≥ {found.threshold:g} of windows of {found.shingle} tokens"
    if not found.similar:
        return [f"near-duplicates: none among {groups:,} groups ({rule})"]
    return [
        f"near-duplicates: {found.similar:,} of {groups:,} groups resemble an earlier one "
        "(roles are ignored)",
        f"  {_percent(found.similar / groups)}, in {count(found.clusters, 'cluster')} of up to "
        f"{count(found.largest, 'group')}; {rule}",
        *(f"  {example}" for example in found.examples[:_SHOWN]),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(interval: Interval) -> str:
    return f"95 %: {written(interval[0], 3)} … {written(interval[1], 3)}"


def _wrapped(sentences: list[str]) -> list[str]:
    """Wrap sentences; all but the first, which heads the block, are indented."""
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


_BINS = 40  # in JSON


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """The contents of the data report.

    Attributes:
        account: The counts of all rows.
        groups: Groups in the store.
        are_pairs: Whether each group is one chosen and one rejected completion.
        labels: Numbers of good and of bad answers. None: not all groups are single answers with
            labels.
        lengths: Distributions of token counts: "prompt", "group" (the prompt once and all
            completions), and "chosen" and "rejected" if these are compared, else "completion".
            Completions are measured in trained tokens.
        bias: The lengths of chosen against rejected. None: no completions are compared.
        flips: The estimate of label noise. None: no pair was judged twice, or a row holds several
            pairs (the account counts rows).
        padding: The cost of padding and the saving of shared prompts. None: an empty store.
        sharing: The saving of shared beginnings across groups. None: an empty store.
        tokens: Use of the vocabulary.
        similarity: Near-duplicates. None: not searched.
        findings: Warnings about the whole dataset.
        turn_weights: How many tokens have a weight other than 0 and 1. None: no token.
    """

    account: DataReport
    groups: int
    are_pairs: bool
    labels: tuple[int, int] | None
    lengths: dict[str, Distribution]
    bias: LengthBias | None
    flips: FlipEstimate | None
    padding: Padding | None
    sharing: Sharing | None
    tokens: TokenUse
    similarity: Similarity | None
    findings: tuple[Finding, ...]
    turn_weights: WeightCounts | None

    def to_text(self) -> str:
        """Return the printed report, in lines of at most 80 columns except for long paths."""
        return to_text(self)

    def to_summary(self) -> str:
        """Return the counts of the rows and the warnings, as text."""
        return to_summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        parts = "bias", "flips", "padding", "sharing", "tokens", "similarity", "turn_weights"
        found = {name: getattr(self, name) for name in parts}
        return {
            "account": self.account.to_dict(),
            "groups": self.groups,
            "labels": self.labels and dict(zip(("good", "bad"), self.labels, strict=True)),
            "lengths": {name: numbers.to_dict() for name, numbers in self.lengths.items()},
            "histograms": {
                name: histogram(numbers, _BINS).to_dict() for name, numbers in self.lengths.items()
            },
            **{name: part and part.to_dict() for name, part in found.items()},
            "findings": [{"code": one.code, "text": one.text} for one in self.findings],
        }


def analyse(
    store: Store,
    account: DataReport | None = None,
    *,
    tokenizer: "PreferenceTokenizer | None" = None,
    threshold: float | None = None,
) -> Analysis:
    """Analyse a store, in a few seconds and 700 MB of memory for 10 million pairs.

    Args:
        store: A sealed store.
        account: The counts of all rows. None: those in the store's metadata, or else of its groups.
        tokenizer: The store's tokenizer, for special tokens, stop tokens and the vocabulary size.
        threshold: Least similarity of near-duplicates, in (0, 1]. None: do not search for them.

    Returns:
        The contents of the data report.

    Raises:
        ValueError: The threshold is not in (0, 1].
    """
    if account is None:
        account = _account(store)
    columns = Columns.of(store)
    bias, are_pairs = length_bias(columns), columns.are_pairs()
    flips = None
    if are_pairs and columns.groups == account.kept:
        flips = estimate_flips(votes_of(account.deduplicated, account.warnings_by_code["W507"]))
    similar = None if threshold is None else similarity(store, Places(store), threshold)
    labels, weights = label_counts(columns), weight_counts(store)
    cut, use = account.warnings_by_code["W503"], token_use(store, tokenizer)
    return Analysis(
        account,
        columns.groups,
        are_pairs,
        labels,
        _lengths(columns, bias),
        bias,
        flips,
        padding(columns),
        sharing(store),
        use,
        similar,
        (
            *label_finding(labels, weights),
            *length_finding(bias, weights),
            *noise_finding(flips),
            *similarity_finding(similar, columns.groups),
            *cut_finding(cut, store.completions),
            *mixture_finding(account),
            *space_finding(account),
            *([] if _has_no_stops(account, tokenizer) else stop_finding(use)),
        ),
        weights,
    )


def label_counts(columns: Columns) -> tuple[int, int] | None:
    """Return the numbers of good and bad answers; None if a group is no single labelled answer."""
    good, bad = (len(found) for found in columns.judged_alone())
    return (good, bad) if columns.groups and good + bad == columns.groups else None


def _has_no_stops(account: DataReport, tokenizer: "PreferenceTokenizer | None") -> bool:
    """Return whether no stop tokens are expected: single steps, or rules without EOS."""
    is_without = tokenizer is not None and not tokenizer.rules.append_eos
    return is_without or (bool(account.formats) and set(account.formats) <= STEPS)


def _account(store: Store) -> DataReport:
    stored = json.loads(store.metadata).get("report")
    if stored is not None:
        return DataReport.from_dict(stored)
    prompts = int(store.prompt_lengths().sum(dtype="i8"))
    answers = store.tokens - prompts
    kept = len(store)
    values = value_counts(store.values())
    return DataReport(kept, kept, prompt_tokens=prompts, completion_tokens=answers, values=values)


def _lengths(columns: Columns, bias: LengthBias | None) -> dict[str, Distribution]:
    """Return the distribution of each kind of length; empty for an empty store."""
    if not columns.groups:
        return {}
    answers = {"completion": Distribution.of(columns.counted)}
    if bias is not None:
        answers = {"chosen": bias.chosen, "rejected": bias.rejected}
    return {
        "prompt": Distribution.of(columns.prompts),
        **answers,
        "group": Distribution.of(columns.together()),
    }


class OtherTokenizerError(LogratioError, ValueError):
    """A store was built with another tokenizer than the given one."""


def analyse_store(
    path: Path, *, tokenizer: Path | None = None, threshold: float | None = None
) -> Analysis:
    """Analyse a sealed store, with the row counts in its metadata.

    Args:
        path: The store.
        tokenizer: Folder of the store's tokenizer. None: tokens are not named.
        threshold: See `analyse`.

    Raises:
        OtherTokenizerError: The store was built with another tokenizer.
        OSError: A file cannot be read.
        ValueError: The store is damaged, the tokenizer malformed, or the threshold invalid.
    """
    store = Store.open(path)
    named = None
    if tokenizer is not None:
        named = PreferenceTokenizer.load(tokenizer, TokenizationRules(append_eos=False))
        if json.loads(store.metadata).get("tokenizer", named.digest) != named.digest:
            raise OtherTokenizerError(f"{path} was built with another tokenizer than {tokenizer}")
    return analyse(store, tokenizer=named, threshold=threshold)
