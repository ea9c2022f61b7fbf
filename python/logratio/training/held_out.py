"""Evaluation of held-out groups during a run: the split, the metrics, samples."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import Store
from logratio.data.analysis.distributions import calibration, distributions
from logratio.data.analysis.evaluation_result import KlEstimate, by_source
from logratio.data.readers.inputs import as_inputs
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError, LogratioError
from logratio.intervals import spread, wilson
from logratio.logps.batch import Batch
from logratio.progress import say
from logratio.training.config import TrainConfig
from logratio.training.dataset import Dataset, load_training_data
from logratio.training.evaluation import (
    Sample,
    check_sampling,
    drawn_sums,
    kl_estimate,
    sample_completions,
    sample_texts,
    sums_over,
)
from logratio.training.methods.columns import Columns, averages
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.logps import GroupLogps
from logratio.training.methods.objective import Objective
from logratio.training.models import training_budget
from logratio.training.moving_reference import moving
from logratio.training.parallel.processes import Processes
from logratio.training.policy import as_reference
from logratio.training.reference import (
    AdapterReference,
    FrozenReference,
    Reference,
    reference_builder,
    side_effect_free,
)
from logratio.training.update import Updater
from logratio.training.validation import needs_reference

REFUSED_FILE = "refused_eval.jsonl"
_SAMPLED = ("kl", "sample_length", "reference_sample_length")
"""Metrics of sampled completions."""


def check_metric(config: TrainConfig) -> None:
    """Check that `best_metric` is among the metrics of the run's evaluations.

    Raises:
        ConfigError: It is not; the message lists the metrics.
    """
    if config.best_metric is None:
        return
    known = Objective.of(config).metrics()
    known += ["expected_calibration_error"] * ("rewards/accuracies" in known)
    known += _SAMPLED if config.eval_samples and needs_reference(config) else ()
    name = config.best_metric.removeprefix("eval_")
    if name in _SAMPLED and name not in known:
        raise ConfigError(f"--best-metric {name} is measured on samples: set --eval-samples")
    if name not in known:
        raise ConfigError(
            f"--best-metric {config.best_metric!r} is unknown; choose from {', '.join(known)}"
        )


def split_by_prompt(store: Store, share: float, seed: int) -> np.ndarray:
    """Choose held-out groups so that no prompt is on both sides.

    Args:
        store: The tokenized groups.
        share: Share of the groups to hold out, in (0, 1). Groups of one prompt stay together, so
            the result is as close to it as whole prompts allow.
        seed: Seed of the choice. It depends on a prompt's token ids, not on its position.

    Returns:
        Whether each group is held out, bool `[G]`.

    Raises:
        ConfigError: There are fewer than two prompts.
    """
    salt = str(seed).encode()
    hashes = [
        hashlib.sha256(salt + store.group(group)[0].tobytes()).digest()
        for group in range(len(store))
    ]
    prompts, which, counts = np.unique(
        np.array(hashes, dtype="S32"), return_inverse=True, return_counts=True
    )
    if len(prompts) < 2:
        raise ConfigError("--eval-share needs at least two different prompts in the data")
    # Prompts are in the order of their hashes, which is random but for the seed.
    taken = int(np.searchsorted(np.cumsum(counts), share * len(store), side="left")) + 1
    held: np.ndarray = which < min(taken, len(prompts) - 1)
    return held


@dataclass(frozen=True)
class HeldOutData:
    """The data of a run, divided.

    Attributes:
        train: Groups to train on.
        held_out: Groups to evaluate on; None: no evaluation.
        dataset: The tokenized `eval_data`; None if the groups come from the training data.
    """

    train: Store
    held_out: Store | None = None
    dataset: Dataset | None = None


def divide(
    config: TrainConfig,
    dataset: Dataset,
    *,
    writes: bool,
    show_progress: bool,
    processes: Processes | None = None,
) -> HeldOutData:
    """Load `eval_data`, or hold a share of the training data out.

    Args:
        config: Settings of the run; `rules` are those that the training data was tokenized with.
        dataset: The training data.
        writes: Write the refused rows of `eval_data` to the output folder.
        show_progress: Draw a progress bar.
        processes: The processes of the run; None: this one alone.

    Raises:
        BadDataError, ConfigError: As raised by `load_training_data` and `split_by_prompt`.
    """
    if config.eval_data is not None:
        output = Path(config.output) if writes else None
        is_first = processes is None or processes.is_first
        held = load_training_data(
            replace(config, data=as_inputs(config.eval_data), mix=None),
            refused=output / REFUSED_FILE if output and is_first else None,
            show_progress=show_progress,
            recorded_date=lambda: config.rules.date,
            folder=output,
            processes=processes,
        )
        _report_shared_prompts(dataset.store, held.store)
        return HeldOutData(dataset.store, held.store, held)
    if not config.eval_share:
        return HeldOutData(dataset.store)
    held_out = split_by_prompt(dataset.store, config.eval_share, config.seed)
    with TemporaryDirectory(dir=config.output if writes else None) as folder:
        # The memory maps keep the data readable when the folder is deleted.
        train = _selected(dataset.store, ~held_out, Path(folder) / "train.store")
        return HeldOutData(train, _selected(dataset.store, held_out, Path(folder) / "held.store"))


def _selected(store: Store, keep: np.ndarray, path: Path) -> Store:
    """Return the groups for which `keep` holds, in a file: they may be larger than memory."""
    return store.select(keep, path, store.metadata)


def _report_shared_prompts(train: Store, held_out: Store) -> None:
    """Print how many held-out groups have a prompt that is trained on."""
    held = [held_out.group(group)[0].tobytes() for group in range(len(held_out))]
    wanted = set(held)  # the smaller of the two sides
    trained = {
        prompt
        for group in range(len(train))
        if (prompt := train.group(group)[0].tobytes()) in wanted
    }
    if shared := sum(prompt in trained for prompt in held):
        say(
            f"{shared:,} of {len(held_out):,} held-out groups have a prompt that is also in the "
            "training data, so their accuracy says little about new prompts"
        )


@dataclass(frozen=True)
class HeldOutResult:
    """An evaluation of held-out groups.

    Attributes:
        step: Number of updates done.
        groups: Number of held-out groups.
        metrics: Means over the groups, under the names of training with `eval_` in front.
        accuracy_interval: 95 % Wilson interval of the accuracy; None without pairs.
        sources: Number of groups and accuracy (or loss, for demonstrations) of each input file.
        kl: Estimated KL divergence from the reference, if samples were requested.
        samples: Sampled completions.
        chosen_rewards, rejected_rewards: Rewards of the groups, float64 `[B]`; None without pairs.
        distributions: Their histograms and calibration: see `distributions`; None without pairs.
    """

    step: int
    groups: int
    metrics: dict[str, float]
    accuracy_interval: tuple[float, float] | None = None
    sources: dict[str, tuple[int, float]] = field(default_factory=dict)
    kl: KlEstimate | None = None
    samples: list[Sample] = field(default_factory=list)
    chosen_rewards: np.ndarray | None = None
    rejected_rewards: np.ndarray | None = None
    distributions: dict[str, Any] | None = None

    def __repr__(self) -> str:
        shown = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl")
        figures = [f"{name} {self.metrics[name]:.4g}" for name in shown if name in self.metrics]
        return f"HeldOutResult(step {self.step:,}, {', '.join(figures)})"

    def to_text(self) -> str:
        """Return one line for the terminal."""
        text = f"update {self.step:,}: held-out loss {self.metrics['eval_loss']:.4f}"
        if self.accuracy_interval:
            low, high = self.accuracy_interval
            accuracy = self.metrics["eval_rewards/accuracies"]
            margin = self.metrics["eval_rewards/margins"]
            text += f", accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}], margin {margin:.3f}"
        if self.kl:
            text += f", KL {self.kl.nats:.2f}{spread(self.kl.standard_error)} nats"
        return text

    def sample_rows(self) -> list[dict[str, Any]]:
        """Return the rows of `samples.jsonl`, without the number of the update."""
        return [asdict(sample) for sample in self.samples]

    def to_dict(self) -> dict[str, Any]:
        """Return the row of `evaluations.jsonl`: everything but samples and single rewards."""
        return {
            "step": self.step,
            "groups": self.groups,
            **self.metrics,
            "accuracy_interval": list(self.accuracy_interval) if self.accuracy_interval else None,
            "sources": {
                name: {"groups": count, "value": value}
                for name, (count, value) in self.sources.items()
            },
            "kl": asdict(self.kl) if self.kl else None,
            "distributions": self.distributions,
        }


class EvaluationInterruptedError(LogratioError):
    """A signal ended an evaluation before it was complete."""


class HeldOut:
    """The held-out groups of a run; scores of the reference are computed once.

    Args:
        config: Settings of the run.
        store: The held-out groups.
        tokenizer: The tokenizer of the run.

    Attributes:
        cached: The reference's log-probs of these groups from a cache, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        tokenizer: PreferenceTokenizer,
    ) -> None:
        self.config, self.store, self.tokenizer = config, store, tokenizer
        self.cached: Reference | None = None
        self._interrupted: Callable[[], int | None] = lambda: None
        self._reference_sums: np.ndarray | None = None
        self._reference_texts: list[list[int]] | None = None
        models = [config.model, *([config.reference] if config.reference else [])]
        check_sampling(models, config.eval_samples, config.max_new_tokens, store)

    def evaluate(
        self,
        step: int,
        updater: Updater,
        interrupted: Callable[[], int | None] = lambda: None,
    ) -> HeldOutResult:
        """Evaluate the policy; its mode and the random states are unchanged.

        Args:
            step: Number of updates done.
            updater: The policy, the reference and the objective.
            interrupted: Returns the number of a signal that should end the evaluation, or None.

        Raises:
            EvaluationInterruptedError: `interrupted` returned a number.
        """
        self._interrupted = interrupted
        updater.strategy.settle()
        with side_effect_free(updater.policy), updater.autocast():
            data = GroupData.of(self.store, updater.objective)
            policy = self._sums(updater, lambda batch: updater.policy_sums(batch, data))
            if self._reference_sums is None or moving(updater.reference):
                self._reference_sums = self._of_reference(updater, data)
        columns = self._columns(updater, data, policy, self._reference_sums)
        metrics = {f"eval_{name}": value for name, value in averages(columns)[0].items()}
        result = HeldOutResult(
            step, len(self.store), metrics, sources=_sources(self.store, columns)
        )
        if "rewards/accuracies" in columns:
            plain = {name: c for name, c in columns.items() if isinstance(c, Tensor)}
            result = _with_pairs(result, plain)
        return self._with_samples(result, updater) if self.config.eval_samples else result

    def _sums(self, updater: Updater, of: Callable[[Batch], Tensor]) -> np.ndarray:
        budget = training_budget(self.config) * updater.processes.per_prompt
        return sums_over(
            self.store,
            of,
            budget,
            updater.layout,
            updater.device,
            lambda *_: self._heed_signal(),
            updater.processes,
        )

    def _of_reference(self, updater: Updater, data: GroupData) -> np.ndarray:
        """Return the summed log-probs under the reference, float64 `[N]`; zeros without one."""
        reference = self.cached or updater.reference
        if reference is None:
            return np.zeros(self.store.completions)
        return self._sums(updater, lambda batch: updater.sums_of(reference, batch, data))

    def _columns(
        self, updater: Updater, data: GroupData, policy: np.ndarray, reference: np.ndarray
    ) -> Columns:
        """Return the loss and the metrics of each group, as in training.

        What a loss takes from an update is taken from all held-out groups.
        """
        store, objective = self.store, updater.objective
        groups = GroupLogps(
            torch.from_numpy(policy),
            torch.from_numpy(reference),
            data.lengths_of(store),
            torch.from_numpy(store.roles()),
            store.completion_offsets(),
            data.values,
            has_reference=data.has_reference,
        )
        found = objective.statistics(groups, trains=False)
        groups = replace(groups, statistics=found)
        losses = objective.losses(groups)
        if data.weights is not None:
            losses = losses * torch.from_numpy(data.weights)
        return objective.columns(losses, groups)

    def _with_samples(self, result: HeldOutResult, updater: Updater) -> HeldOutResult:
        """Add sampled completions of policy and reference, and the KL that they estimate."""
        policy, config = updater.policy, self.config
        prompts = [
            self.store.group(i % len(self.store))[0].tolist() for i in range(config.eval_samples)
        ]
        with side_effect_free(policy):
            with updater.autocast():
                drawn = self._draw(policy, prompts)
                sums = drawn_sums(policy, prompts, drawn)
            if updater.reference is None:
                return replace(result, samples=self._texts(prompts, drawn, None))
            with _reference_model(config, updater) as reference, updater.autocast():
                if self._reference_texts is None or moving(updater.reference):
                    self._reference_texts = self._draw(reference, prompts)
                ratios = sums - drawn_sums(reference, prompts, drawn)
        kl = kl_estimate(ratios, drawn)
        lengths = [len(ids) for ids in self._reference_texts]
        values = kl.nats, kl.mean_length, float(np.mean(lengths))
        extra = {f"eval_{name}": value for name, value in zip(_SAMPLED, values, strict=True)}
        samples = self._texts(prompts, drawn, self._reference_texts)
        return replace(result, metrics=result.metrics | extra, kl=kl, samples=samples)

    def _draw(self, model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        drawn = sample_completions(
            model,
            prompts,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            seed=self.config.seed,
        )
        self._heed_signal()
        return drawn

    def _heed_signal(self) -> None:
        if self._interrupted():
            raise EvaluationInterruptedError

    def _texts(
        self, prompts: list[list[int]], drawn: list[list[int]], others: list[list[int]] | None
    ) -> list[Sample]:
        return sample_texts(self.tokenizer, prompts, drawn, others)


def _sources(store: Store, columns: Columns) -> dict[str, tuple[int, float]]:
    """Return the number of groups and the accuracy, or else the loss, of each input file."""
    column = columns.get("rewards/accuracies", columns["loss"])
    assert isinstance(column, Tensor)
    return by_source(store, column.numpy())


def _with_pairs(result: HeldOutResult, columns: Mapping[str, Tensor]) -> HeldOutResult:
    """Add what only pairs and lists have: accuracy's interval, calibration, single rewards."""
    chosen, rejected = (columns[f"rewards/{side}"].numpy() for side in ("chosen", "rejected"))
    margins = columns["rewards/margins"].numpy()
    error = calibration(margins).expected_error
    accuracy = result.metrics["eval_rewards/accuracies"]
    return replace(
        result,
        metrics=result.metrics | {"eval_expected_calibration_error": error},
        accuracy_interval=wilson(accuracy, result.groups),
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        distributions=distributions(chosen, rejected),
    )


@contextmanager
def _reference_model(config: TrainConfig, updater: Updater) -> Iterator[nn.Module]:
    """Yield the reference as a model that can generate.

    It is in memory, or is the policy without its adapters, or, if the run reads its log-probs from
    a cache, is loaded for the time of the block.
    """
    if isinstance(updater.reference, FrozenReference):
        yield updater.reference.model
    elif isinstance(updater.reference, AdapterReference) or (config.lora and not config.reference):
        with as_reference(updater.policy):
            yield updater.policy
    else:
        yield updater.load(reference_builder(config))
