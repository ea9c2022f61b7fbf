"""Judge a bundle on held-out pairs: accuracy and calibration of its rewards, without torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from logratio._rust import Store
from logratio.bundle import CACHED_REFERENCE, read_manifest
from logratio.data.analysis.evaluation_result import Evaluation, summarize
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Inputs, as_inputs
from logratio.data.store.build import build_store
from logratio.data.store.load import is_store, load_store, source_names
from logratio.data.store.row_report import DataReport
from logratio.data.store.turn_weights import with_weights
from logratio.data.store.unpaired import are_pairs
from logratio.data.tokenization.groups import TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_files import read_tokenizer
from logratio.errors import ConfigError
from logratio.forecast import count
from logratio.progress import Advance, progress, reading_progress
from logratio.serving.candidates import Candidate, CandidateGroup
from logratio.serving.reranker import Reranker

GROUPS = 64
"""Pairs scored together."""

_WHOLE = "a bundle scores whole completions, each token once, and the data has some with turns"
_MODELS = "evaluate the models, with --policy and --reference"


def evaluate_bundle(
    reranker: Reranker,
    store: Store,
    *,
    show_progress: bool = True,
) -> Evaluation:
    """Measure how well a bundle's rewards agree with preferences.

    Args:
        reranker: The loaded bundle.
        store: Pairs that `bundle_pairs` has read with the bundle's tokenizer and rules.
        show_progress: Draw a progress bar.

    Returns:
        Accuracy, margins, lengths, calibration and the accuracy of each input file. Log-ratios are
        None for a bundle whose rewards are not β times them.

    Raises:
        ConfigError: The bundle takes the reference's log-probs as an input, which pairs do not
            have; or the graph gives no finite reward for a pair.

    Example:
        ::

            store, report = bundle_pairs("bundle", "held-out.jsonl")
            evaluate_bundle(Reranker.load("bundle"), store).accuracy
    """
    if reranker.manifest.graph.kind == CACHED_REFERENCE:
        raise ConfigError(
            "the bundle takes the reference's log-probs as an input, and pairs have none: evaluate "
            "the models, with --policy and --reference"
        )
    with progress("evaluating", len(store), "pairs", show=show_progress) as advance:
        rewards, logratios = _scored(reranker, store, advance)
    wrong = ~np.isfinite(rewards)
    if wrong.any():
        group = int(np.searchsorted(store.completion_offsets(), wrong.argmax(), "right")) - 1
        (place,) = source_names(store, [group])
        raise ConfigError(f"the bundle gives no finite reward for a completion of {place}")
    if np.isnan(logratios).any():
        return summarize(store, rewards, None)
    return summarize(store, logratios, reranker.manifest.beta)


def _scored(reranker: Reranker, store: Store, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
    """Return the reward and the log-ratio of each completion, float64 `[N]` each."""
    rewards, logratios = list[float](), list[float]()
    for first in range(0, len(store), GROUPS):
        groups = list(_groups(store, range(first, min(first + GROUPS, len(store)))))
        for scores in reranker.score_groups(groups):
            rewards += [score.reward for score in scores]
            logratios += [score.policy_logps - score.reference_logps for score in scores]
        advance(len(groups))
    return np.array(rewards), np.array(logratios)


def _groups(store: Store, numbers: range) -> Iterator[CandidateGroup]:
    for number in numbers:
        prompt, completions, _, _ = store.group(number)
        candidates = tuple(Candidate(tuple(ids.tolist())) for ids in completions)
        yield CandidateGroup(tuple(prompt.tolist()), False, candidates)


def bundle_pairs(
    bundle: str | Path,
    data: Inputs,
    *,
    formats: FormatSettings | None = None,
    max_bad_fraction: float = 0.0,
    show_progress: bool = True,
) -> tuple[Store, DataReport]:
    """Read pairs with the tokenizer and the rules of a bundle.

    Args:
        bundle: The bundle's folder.
        data: Inputs, or one sealed store that was built with the same tokenizer and rules.
        formats: How rows are read. None: detected.
        max_bad_fraction: Share of malformed rows above which the data is refused.
        show_progress: Draw a progress bar.

    Returns:
        The pairs, and the counts of all rows.

    Raises:
        BundleError: The folder is not a bundle.
        BadDataError: Rows are malformed; each is named by file:line and code.
        StoreMismatchError: The store was built with another tokenizer or other rules.
        ConfigError: There are no pairs, other groups, completions that count only in part, or
            turns with weights.
    """
    data, folder = as_inputs(data), Path(bundle)
    rules = TokenizationRules.from_dict(read_manifest(folder).tokenization)
    tokenizer = PreferenceTokenizer(read_tokenizer(folder, as_written=True), rules)
    if is_store(data):
        store, report = load_store(str(data[0]), tokenizer)
    else:
        with reading_progress(show=show_progress) as on_rows:
            store, report = build_store(
                data,
                tokenizer,
                formats=formats,
                max_bad_fraction=max_bad_fraction,
                progress=on_rows,
            )
    _refuse(store, ~are_pairs(store), "an evaluation needs pairs, and the data has others")
    _refuse(store, with_weights(store), f"{_WHOLE} with a `weight` other than 1; {_MODELS}")
    partly = store.counted_lengths() < store.completion_lengths()
    _refuse(
        store,
        np.logical_or.reduceat(partly, store.completion_offsets()[:-1]),
        f"{_WHOLE} that do not count; {_MODELS}",
    )
    return store, report


def _refuse(store: Store, wrong: np.ndarray, what: str) -> None:
    """Raise an error for the groups that are `wrong`, bool `[G]`, if there are any."""
    if wrong.any():
        (place,) = source_names(store, np.flatnonzero(wrong)[:1].tolist())
        raise ConfigError(f"{what}: {count(int(wrong.sum()), 'group')} (first: {place})")
