"""The data report: the account of every row, and what the groups that were kept are like."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logratio._rust import Store
from logratio.data.analysis import findings
from logratio.data.analysis.columns import Columns
from logratio.data.analysis.distribution import Distribution
from logratio.data.analysis.histograms import histogram
from logratio.data.analysis.lengths import LengthBias, length_bias
from logratio.data.analysis.noise import FlipEstimate, estimate_flips, votes_of
from logratio.data.analysis.padding import Padding, padding
from logratio.data.analysis.places import Places
from logratio.data.analysis.sharing import Sharing, sharing
from logratio.data.analysis.similarity import Similarity, similarity
from logratio.data.analysis.tokens import TokenUse, token_use
from logratio.data.formats.catalogue import STEPS
from logratio.data.report import DataReport

if TYPE_CHECKING:
    from logratio.data.tokenization import PreferenceTokenizer

_BINS = 40  # in JSON and in the picture


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """Everything that the data report says.

    Attributes:
        account: What became of every row.
        groups: Groups in the store.
        are_pairs: Whether each is one chosen and one rejected completion.
        lengths: Distributions of tokens: "prompt", "group" (prompt once, all completions), and
            "chosen" and "rejected" where such are compared, else "completion"; completions by the
            tokens that count.
        bias: Lengths of chosen against rejected; None where nothing is compared.
        flips: The label-noise estimate; None where no pair was judged twice, and where a row
            holds several pairs, for the account counts rows.
        padding: What padding costs and sharing prompts saves; None for an empty store.
        sharing: What sharing beginnings across groups saves; None for an empty store.
        tokens: Use of the vocabulary.
        similarity: Near-duplicates; None where they were not looked for.
        findings: Warnings about the data as a whole.
    """

    account: DataReport
    groups: int
    are_pairs: bool
    lengths: dict[str, Distribution]
    bias: LengthBias | None
    flips: FlipEstimate | None
    padding: Padding | None
    sharing: Sharing | None
    tokens: TokenUse
    similarity: Similarity | None
    findings: tuple[findings.Finding, ...]

    def to_text(self) -> str:
        """Tell it to a person, in lines of at most 80 columns wherever places are short."""
        from logratio.data.analysis.text import to_text

        return to_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        parts = ("bias", "flips", "padding", "sharing", "tokens", "similarity")
        found = {name: getattr(self, name) for name in parts}
        return {
            "account": self.account.to_dict(),
            "groups": self.groups,
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
    """Describe a store, in some seconds and 700 MB for 10 million pairs.

    Args:
        store: A sealed store.
        account: What became of every row; None: as the store's metadata tell, else what it holds.
        tokenizer: The one that made the store: names special tokens and the size of the vocabulary.
        threshold: Look for near-duplicates from this similarity on, in (0, 1]; None: do not.

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
    cut, use = account.warnings_by_code["W503"], token_use(store, tokenizer)
    return Analysis(
        account,
        columns.groups,
        are_pairs,
        _lengths(columns, bias),
        bias,
        flips,
        padding(columns),
        sharing(store),
        use,
        similar,
        (
            *findings.length_finding(bias),
            *findings.noise_finding(flips),
            *findings.similarity_finding(similar, columns.groups),
            *findings.cut_finding(cut, store.completions),
            *findings.mixture_finding(account),
            *findings.space_finding(account),
            *([] if _go_on(account, tokenizer) else findings.stop_finding(use)),
        ),
    )


def _go_on(account: DataReport, tokenizer: "PreferenceTokenizer | None") -> bool:
    """Say whether nothing is expected to end: single steps, or text under rules without EOS."""
    is_without = tokenizer is not None and not tokenizer.rules.append_eos
    return is_without or (bool(account.formats) and set(account.formats) <= STEPS)


def _account(store: Store) -> DataReport:
    told = json.loads(store.metadata).get("report")
    if told is not None:
        return DataReport.from_dict(told)
    prompts = int(store.prompt_lengths().sum(dtype="i8"))
    answers = store.tokens - prompts
    kept = len(store)
    return DataReport(kept, kept, prompt_tokens=prompts, completion_tokens=answers)


def _lengths(columns: Columns, bias: LengthBias | None) -> dict[str, Distribution]:
    """Count the lengths of each kind; none of an empty store."""
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
