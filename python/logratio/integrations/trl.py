"""TRL's `DPOTrainer` with the reference cache, so that no reference model is in memory."""

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
from logratio.hub import local_folder
from logratio.integrations.table import CachedLogps, loss_token_numbers
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
"""Rows per collated batch."""


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
    """Add the reference log-probs to a tokenized dataset, in the columns that TRL reads.

    The rows are collated as in training, so truncation and loss tokens are those of TRL. Existing
    columns with these names are replaced.

    Args:
        dataset: A `datasets.Dataset` tokenized by TRL, with `prompt_ids`, `chosen_ids` and
            `rejected_ids`, lists of int.
        collate: TRL's data collator, with its `max_length` and `truncation_mode`.
        cache: Root of the reference cache.
        reference: Folder of the reference model or adapter.
        precision: Precision of the reference; None: bf16 on a GPU, fp32 on a CPU.
        ld_alpha: Weight of the tokens beyond the shorter side's length (LD-DPO, Liu et al. 2024,
            arXiv 2409.06411); None: 1.
        fill: Compute missing log-probs first, which loads the reference for that time.
        token_budget: Tokens per batch when filling the cache.
        device: Device when filling the cache; None: a GPU if there is one.

    Returns:
        The dataset with `ref_chosen_logps` and `ref_rejected_logps`, float64, in nats.

    Raises:
        StaleCacheError: The cache is of another reference, or lacks completions.
        ForeignRowsError: The collator feeds the model more than token ids.
    """
    reference = local_folder(reference)
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
    """Compute missing log-probs as `logratio precompute` does."""
    if len(store):
        data = Dataset(store, None, None)  # type: ignore[arg-type]  # both are unused
        Precompute(settings, data, Share(), show_progress=True).run()


def _cached(store: Store, cache: PathLike, fingerprint: Fingerprint) -> CachedLogps:
    logps = CachedLogps(store, open_cache(cache, fingerprint))
    if logps.missing:
        raise StaleCacheError(
            f"{cache}: {logps.missing:,} of {store.completions:,} completions, as tokenized and "
            "truncated by TRL, are not in the cache; fill=True computes them"
        )
    return logps


def _sums(rows: TokenRows, logps: CachedLogps, ld_alpha: float | None) -> NDArray[np.float64]:
    """Return the sums of each side as TRL computes them, float64 `[R, 2]`; 0 without tokens."""
    every = np.zeros(rows.store.completions + 1)  # index -1 reads the last, which stays 0
    weights = None if ld_alpha is None else _LengthWeights(rows, ld_alpha)
    for layout in logps.chunks():
        every[layout.completions] = logps.sums(layout, weights(layout) if weights else None)
    sums: NDArray[np.float64] = every[rows.completions]
    return sums


class _LengthWeights:
    """LD-DPO weights: `alpha` for tokens beyond the shorter side's number of loss tokens."""

    def __init__(self, rows: TokenRows, alpha: float) -> None:
        self._alpha = alpha
        lengths = np.append(rows.store.counted_lengths(), 0).astype(np.int64)[rows.completions]
        self._shared = np.zeros(rows.store.completions + 1, np.int64)
        self._shared[rows.completions] = lengths.min(axis=1, keepdims=True)

    def __call__(self, layout: SharedLayout) -> NDArray[np.float64]:
        """Return the weight of each token of a chunk, float64 `[S]`."""
        shared = np.repeat(self._shared[layout.completions], layout.completion_lengths)
        weights = np.where(loss_token_numbers(layout) <= shared, 1.0, self._alpha)
        return weights * layout.completion_mask


trl: Any = require("trl", "trl")

TESTED = "1.16.0"
"""The version of TRL used in the tests."""
HOOK = "_precompute_ref_logps"
SAMPLE = 8
"""Pairs scored again as a check if the policy is its own reference."""
NATS = {"fp32": 1e-3, "bf16": 2.0}
"""Absolute tolerance of a sequence's sum in nats, in addition to 1e-5 of it."""


class TrlError(LogratioError, ValueError):
    """This version of TRL, or its settings, cannot be used with a cache."""


def check_trl(version: str, trainer: type) -> None:
    """Check that TRL's trainer has the method to override; warn if the version is not tested.

    Raises:
        TrlError: The method is missing or has other parameters.
    """
    hook = getattr(trainer, HOOK, None)
    takes = list(inspect.signature(hook).parameters) if hook else []
    if takes != ["self", "dataset", "name", "batch_size"]:
        raise TrlError(
            f"trl {version} has no {trainer.__name__}.{HOOK}(dataset, name, batch_size), which is "
            f"needed to use the cache; install trl=={TESTED}, which is tested"
        )
    if version != TESTED:
        warnings.warn(f"trl {version} is not tested with logratio; trl {TESTED} is", stacklevel=3)


@dataclass(frozen=True)
class _Reference:
    """The arguments of the trainer below in addition to TRL's."""

    cache: PathLike
    folder: PathLike
    fill: bool
    precision: Precision | None
    token_budget: int
    check: bool


class CachedDPOTrainer(trl.DPOTrainer):  # type: ignore[misc]  # from an optional library
    """TRL's `DPOTrainer` with reference log-probs from a cache.

    Everything else is TRL's: tokenization, losses (including `ld_alpha`), callbacks, `evaluate`.
    Unlike TRL's precomputed log-probs, the cache stays valid when the learning rate, seed or output
    folder changes, and stale sums are never used when truncation, precision or `ld_alpha` changes.

    Args:
        cache: Root of the reference cache.
        reference: Folder of the reference model or adapter, usually the one that `model` was loaded
            from; with `peft_config`, the base model.
        fill: Compute missing log-probs before training. With several processes the first one
            computes them, and the others wait for up to `ddp_timeout`.
        precision: Precision of the reference; None: bf16 if TRL trains in bf16.
        token_budget: Tokens per batch when filling the cache.
        check: If `model` was loaded from `reference`, score 8 pairs again before training, and
            raise an error if the cache differs.
        trainer: Arguments of `DPOTrainer`; `args` must have `precompute_ref_log_probs=True`.

    Raises:
        TrlError: The version of TRL or the settings cannot be used with a cache.
        StaleCacheError: The cache is of another reference, or lacks completions without `fill`.

    Example:
        >>> args = DPOConfig("policy", precompute_ref_log_probs=True)
        >>> trainer = CachedDPOTrainer(
        ...     cache="cache", reference="model", model="model", args=args, train_dataset=dataset
        ... )
        >>> trainer.train()
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
            raise TrlError(f"trl {trl.__version__} did not use the cache for its reference")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Add the cache's columns to TRL's tokenized rows."""
        if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
            raise TrlError(f"the {name} dataset is a stream: the cache needs all rows in advance")
        _check_model(self.model)
        gpu = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        # Filling the cache must not change the random state of training: a full cache would not.
        with torch.random.fork_rng(gpu), self.accelerator.main_process_first():
            rows = self._with_reference_columns(dataset)
            if self._reference.check and len(rows) and self._is_reference:
                self._check_sample(rows)
        return rows

    def _with_reference_columns(self, dataset: Any) -> Any:
        return reference_columns(
            dataset,
            self.data_collator,
            cache=self._reference.cache,
            reference=self._reference.folder,
            precision=self._precision,
            ld_alpha=self.ld_alpha,
            fill=self._reference.fill,
            token_budget=self._reference.token_budget,
            device=str(self.accelerator.device),
        )

    @property
    def _precision(self) -> Precision:
        low = self.args.bf16 or self.model.dtype == torch.bfloat16
        return self._reference.precision or ("bf16" if low else "fp32")

    @property
    def _is_reference(self) -> bool:
        """Whether the model is unsharded, untrained, and loaded from the reference's folder."""
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        source, folder = Path(self.model.config._name_or_path), Path(self._reference.folder)
        return whole and not self.state.global_step and source.resolve() == folder.resolve()

    def _check_sample(self, rows: Any) -> None:
        """Score some pairs with TRL's own code, and compare them with the cache.

        Raises:
            StaleCacheError: They differ.
        """
        places = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))
        sample = rows.select(places).select_columns([*IDS, *COLUMNS]).with_format(None)
        batch = self._prepare_inputs(self.data_collator([*sample]))
        now = torch.cat(self.compute_ref_log_probs(self.model, batch)).float()
        kept = torch.cat([batch[name] for name in COLUMNS])
        gap = (now - kept).abs()
        if not bool((gap <= NATS[self._precision] + 1e-5 * kept.abs()).all()):
            raise StaleCacheError(
                f"{self._reference.cache}: the model was loaded from {self._reference.folder}, but "
                f"its log-probs are up to {float(gap.max()):.3g} nats per completion away from the "
                "cache's: use another reference, or check=False if this is intended"
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as TRL does, and also on new data after training, with the cache."""
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
        # Skip DPOTrainer.evaluate, which would need a reference model to score these rows again.
        found = super(trl.DPOTrainer, self).evaluate(rows, ignore_keys, metric_key_prefix)
        return found


def _check_settings(trainer: dict[str, Any]) -> None:
    args = trainer.get("args")
    if args is None or not args.precompute_ref_log_probs:
        raise TrlError(
            "pass args=DPOConfig(precompute_ref_log_probs=True, ...); otherwise TRL uses a model"
        )
    if trainer.get("ref_model") is not None:
        raise TrlError("leave ref_model out: the cache is the reference")
    if args.fp16:
        raise TrlError("fp16 is not supported for the reference: use bf16 or fp32")
    if trainer.get("quantization_config") is not None:
        raise TrlError(
            "quantization_config quantizes the model, but the cache's reference is not quantized"
        )


def _check_model(model: Any) -> None:
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise TrlError("the model is quantized, but the cache's reference is not")
