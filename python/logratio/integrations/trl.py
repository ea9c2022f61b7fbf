"""TRL's `DPOTrainer` with its reference from the cache: no reference model in memory."""

import inspect
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logratio._rust import SharedLayout, Store
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.integrations.table import CachedLogps, counted_places
from logratio.integrations.token_rows import Collate, TokenRows, token_rows
from logratio.training.config import PathLike, Precision, PrecomputeConfig
from logratio.training.dataset import Dataset
from logratio.training.fingerprint import Fingerprint, model_fingerprint
from logratio.training.models import precision_of
from logratio.training.precomputation import Precompute, Share
from logratio.training.reference import StaleCacheError, open_cache

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


trl: Any = require("trl", "trl")

TESTED = "1.16.0"
"""The version of TRL that the tests run."""
HOOK = "_precompute_ref_logps"
SAMPLE = 8
"""Pairs that are scored again where the policy is its own reference."""
NATS = {"fp32": 1e-3, "bf16": 2.0}
"""What rounding may move a sequence's sum by, beyond 1e-5 of it."""


class TrlError(LogratioError, ValueError):
    """TRL is another than the tested one, or its settings ask for what no cache can give."""


def check_trl(version: str, trainer: type) -> None:
    """Refuse a TRL whose trainer cannot be given a cache; warn where it is not the tested one.

    Raises:
        TrlError: The method that is overridden is missing, or takes something else.
    """
    hook = getattr(trainer, HOOK, None)
    takes = list(inspect.signature(hook).parameters) if hook else []
    if takes != ["self", "dataset", "name", "batch_size"]:
        raise TrlError(
            f"trl {version} has no {trainer.__name__}.{HOOK}(dataset, name, batch_size) to give "
            f"the cache to; install trl=={TESTED}, which is tested"
        )
    if version != TESTED:
        warnings.warn(f"trl {version} is not tested here, trl {TESTED} is", stacklevel=3)


@dataclass(frozen=True)
class _Reference:
    """What the trainer below is told beside what TRL is told."""

    cache: PathLike
    folder: PathLike
    fill: bool
    precision: Precision | None
    token_budget: int
    check: bool


class CachedDPOTrainer(trl.DPOTrainer):  # type: ignore[misc]  # an optional library's
    """TRL's `DPOTrainer` that reads the reference's log-probs from a cache.

    Everything else is TRL's: tokenization, losses (`ld_alpha` included), callbacks, `evaluate`.
    Unlike in TRL's own pass, a changed learning rate, seed or output folder finds everything in
    the cache, and a changed truncation, precision or `ld_alpha` is never served another's sums.

    Args:
        cache: Root of the reference cache.
        reference: Folder of the reference model: the model that training starts from, or with
            `peft_config` the base. It must be the one that `model` was loaded from, or another one
            on purpose; an adapter's folder is a reference too.
        fill: Score what the cache lacks before training. With several processes the first one does
            so while the others wait, no longer than `ddp_timeout`.
        precision: What the reference computes in; None: bf16 where TRL trains in bf16.
        token_budget: Of the reference's pass: tokens in a batch.
        check: Where `model` was loaded from `reference`, score 8 pairs again before training, and
            refuse a cache that says something else.
        trainer: What `DPOTrainer` takes; `args` must have `precompute_ref_log_probs=True`.

    Raises:
        TrlError: Another TRL, or settings with which no cache can be used.
        StaleCacheError: The cache is another reference's, or lacks completions, and not `fill`.
    """

    def __init__(
        self,
        *,
        cache: PathLike,
        reference: PathLike,
        fill: bool = False,
        precision: Precision | None = None,
        token_budget: int = 16384,
        check: bool = True,
        **trainer: Any,
    ) -> None:
        check_trl(trl.__version__, trl.DPOTrainer)
        _check_settings(trainer)
        self._reference = _Reference(cache, reference, fill, precision, token_budget, check)
        super().__init__(**trainer)
        if self.ref_model is not None or not set(COLUMNS) <= {*self.train_dataset.column_names}:
            raise TrlError(f"trl {trl.__version__} did not take its reference from the cache")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Take TRL's tokenized rows and put the cache's columns beside them."""
        if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
            raise TrlError(f"the {name} dataset is a stream: a cache needs to know every row")
        _check_model(self.model)
        gpu = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        # What is drawn while scoring must not move what training draws: a full cache draws nothing.
        with torch.random.fork_rng(gpu), self.accelerator.main_process_first():
            rows = self._looked_up(dataset)
            if self._reference.check and len(rows) and self._is_reference:
                self._check_sample(rows)
        return rows

    def _looked_up(self, dataset: Any) -> Any:
        return reference_columns(
            dataset,
            self.data_collator,
            cache=self._reference.cache,
            reference=self._reference.folder,
            precision=self._computes_in,
            ld_alpha=self.ld_alpha,
            fill=self._reference.fill,
            token_budget=self._reference.token_budget,
            device=str(self.accelerator.device),
        )

    @property
    def _computes_in(self) -> Precision:
        low = self.args.bf16 or self.model.dtype == torch.bfloat16
        return self._reference.precision or ("bf16" if low else "fp32")

    @property
    def _is_reference(self) -> bool:
        """Whether the model, whole and not yet trained, was loaded from the reference's folder."""
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        source, folder = Path(self.model.config._name_or_path), Path(self._reference.folder)
        return whole and not self.state.global_step and source.resolve() == folder.resolve()

    def _check_sample(self, rows: Any) -> None:
        """Score some pairs with TRL's own pass and compare.

        Raises:
            StaleCacheError: The cache says something else.
        """
        places = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))
        sample = rows.select(places).select_columns([*IDS, *COLUMNS]).with_format(None)
        batch = self._prepare_inputs(self.data_collator([*sample]))
        now = torch.cat(self.compute_ref_log_probs(self.model, batch)).float()
        kept = torch.cat([batch[name] for name in COLUMNS])
        gap = (now - kept).abs()
        if not bool((gap <= NATS[self._computes_in] + 1e-5 * kept.abs()).all()):
            raise StaleCacheError(
                f"{self._reference.cache}: the model was loaded from {self._reference.folder}, and "
                f"its log-probs are up to {float(gap.max()):.3g} nats per completion away from the "
                "cache's: name another reference, or check=False if that is meant"
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as TRL does; also on new data after training, for the cache is still there."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return found
        if isinstance(eval_dataset, dict):
            parts = [
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, part in eval_dataset.items()
            ]
            return {name: value for part in parts for name, value in part.items()}
        rows = self._prepare_dataset(eval_dataset, self.processing_class, self.args, "eval")
        rows = self._precompute_ref_logps(rows, "eval", self.args.per_device_eval_batch_size)
        # Past DPOTrainer.evaluate, which would want a reference model to score these rows again.
        found = super(trl.DPOTrainer, self).evaluate(rows, ignore_keys, metric_key_prefix)
        return found


def _check_settings(trainer: dict[str, Any]) -> None:
    args = trainer.get("args")
    if args is None or not args.precompute_ref_log_probs:
        raise TrlError(
            "give args=DPOConfig(precompute_ref_log_probs=True, ...): else TRL asks a model"
        )
    if trainer.get("ref_model") is not None:
        raise TrlError("leave ref_model out: the cache is the reference")
    if args.fp16:
        raise TrlError("no reference is scored in fp16: use bf16 or fp32")
    if trainer.get("quantization_config") is not None:
        raise TrlError("the model is to be quantized, and the cache's reference would not be")


def _check_model(model: Any) -> None:
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise TrlError("the model is quantized, and the cache's reference would not be")
