"""The columns that TRL's `DPOTrainer` reads a reference from, for rows that it tokenized."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import SharedLayout, Store
from logratio.integrations.lookup import CachedLogps, counted_places
from logratio.integrations.token_rows import Collate, TokenRows, token_rows
from logratio.training.config import PathLike, Precision, PrecomputeConfig
from logratio.training.fingerprint import Fingerprint, model_fingerprint
from logratio.training.models import precision_of
from logratio.training.reference import StaleCacheError, open_cache
from logratio.training.reference_pass import Precompute
from logratio.training.setup import Dataset
from logratio.training.shares import Share

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
COLUMNS = ["ref_chosen_logps", "ref_rejected_logps"]
ROWS = 256
"""Rows collated at a time."""


def reference_columns(
    dataset: Any,
    collate: Collate,
    *,
    cache: PathLike,
    reference: PathLike,
    precision: Precision | None = None,
    ld_alpha: float | None = None,
    fill: bool = False,
    token_budget: int = 16384,
    device: str | None = None,
) -> Any:
    """Return a tokenized dataset with the reference's log-probs in columns that TRL reads.

    The ids of a row are those that `collate` makes of it: truncation is TRL's own, and so is which
    tokens are scored. Columns of these names that are there already are replaced.

    Args:
        dataset: A `datasets.Dataset` as TRL tokenized it: `prompt_ids`, `chosen_ids` and
            `rejected_ids`, lists of int.
        collate: TRL's data collator, with its `max_length` and `truncation_mode`.
        cache: Root of the reference cache.
        reference: Folder of the reference model or adapter.
        precision: What the reference computes in; None: bf16 on a GPU, fp32 on a CPU.
        ld_alpha: Weight of the tokens beyond the shorter side's length (LD-DPO, Liu et al. 2024,
            arXiv 2409.06411); None: 1.
        fill: Score what the cache lacks now, which loads the reference for as long as that takes.
        token_budget: Of this pass: tokens in a batch.
        device: Where this pass runs; None: a GPU where there is one.

    Returns:
        The dataset with `ref_chosen_logps` and `ref_rejected_logps`, float64, in nats.

    Raises:
        StaleCacheError: The cache is another reference's, or lacks completions.
        ForeignRowsError: The collator feeds more than token ids.
    """
    settings = PrecomputeConfig(
        reference, [], cache, token_budget, precision=precision, device=device
    )
    fingerprint = model_fingerprint(reference, precision_of(settings))
    with tempfile.TemporaryDirectory(prefix="logratio-") as folder:
        rows = token_rows(_batches(dataset), collate, Path(folder) / "rows.store")
        if fill:
            _fill(rows.store, settings)
        sums = _sums(rows, _cached(rows.store, cache, fingerprint), ld_alpha)
    bare = dataset.remove_columns([name for name in COLUMNS if name in dataset.column_names])
    for name, column in zip(COLUMNS, sums.T, strict=True):
        bare = bare.add_column(name, column)
    return bare


def _batches(dataset: Any) -> Iterator[list[dict[str, Any]]]:
    ids = dataset.select_columns(IDS).with_format(None)
    for first in range(0, len(ids), ROWS):
        lists = ids[first : first + ROWS].values()
        yield [dict(zip(IDS, row, strict=True)) for row in zip(*lists, strict=True)]


def _fill(store: Store, settings: PrecomputeConfig) -> None:
    """Score what is missing, with the pass of `logratio precompute`."""
    if len(store):
        data = Dataset(store, None, None)  # type: ignore[arg-type]  # neither is used
        Precompute(settings, data, Share(), show_progress=True).run()


def _cached(store: Store, cache: PathLike, fingerprint: Fingerprint) -> CachedLogps:
    logps = CachedLogps(store, open_cache(cache, fingerprint))
    if logps.missing:
        raise StaleCacheError(
            f"{cache}: {logps.missing:,} of {store.completions:,} completions, as TRL tokenizes "
            "and cuts them, are not in the cache; fill=True scores them now"
        )
    return logps


def _sums(rows: TokenRows, logps: CachedLogps, ld_alpha: float | None) -> NDArray[np.float64]:
    """Return what TRL sums up for each side: float64 `[R, 2]`, 0 where nothing is scored."""
    every = np.zeros(rows.store.completions + 1)  # the last is what number -1 finds
    weights = None if ld_alpha is None else _LengthWeights(rows, ld_alpha)
    for layout in logps.stretches():
        every[layout.completions] = logps.sums(layout, weights(layout) if weights else None)
    sums: NDArray[np.float64] = every[rows.completions]
    return sums


class _LengthWeights:
    """LD-DPO: tokens beyond the shorter side's number of tokens that count weigh `alpha`."""

    def __init__(self, rows: TokenRows, alpha: float) -> None:
        self._alpha = alpha
        lengths = np.append(rows.store.counted_lengths(), 0).astype(np.int64)[rows.completions]
        self._shared = np.zeros(rows.store.completions + 1, np.int64)
        self._shared[rows.completions] = lengths.min(axis=1, keepdims=True)

    def __call__(self, layout: SharedLayout) -> NDArray[np.float64]:
        """Return the weight of each token of a stretch: float64 `[S]`."""
        shared = np.repeat(self._shared[layout.completions], layout.completion_lengths)
        weights = np.where(counted_places(layout) <= shared, 1.0, self._alpha)
        return weights * layout.completion_mask
