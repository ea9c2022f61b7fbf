"""Train and evaluate a grid of runs that share one tokenization and one reference pass."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from logratio._rust import Store
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Inputs, as_inputs
from logratio.data.store.load import is_store
from logratio.durable import write_atomic
from logratio.errors import ConfigError
from logratio.extras import require
from logratio.forecast import Forecast, check_writable, count
from logratio.one_process import refuse_multiple_processes
from logratio.progress import say
from logratio.training import evaluation
from logratio.training.checkpoint import RunInterruptedError, newest
from logratio.training.config import (
    EvaluateConfig,
    PrecomputeConfig,
    SweepConfig,
    TrainConfig,
    with_local_models,
)
from logratio.training.dataset import (
    Dataset,
    check_mix,
    check_reference,
    load_dataset,
)
from logratio.training.fingerprint import model_fingerprint
from logratio.training.memory import FORWARD, evaluation_seconds, seconds, training_forecast
from logratio.training.methods.data_checks import check_groups
from logratio.training.methods.objective import Objective
from logratio.training.model_card import add_evaluation
from logratio.training.models import precision_of
from logratio.training.precomputation import precompute
from logratio.training.reference import holds_sums_only
from logratio.training.run_file import absolute, with_absolute_paths
from logratio.training.run_folder import CHECKPOINTS, date_of_store, locked_output
from logratio.training.sweep_results import (
    ROWS_FILE,
    SweepResult,
    SweepRow,
    append_row,
    card_fields,
    choose,
    evaluation_fields,
    read_rows,
    try_to_draw,
)
from logratio.training.trainer import DPOTrainer
from logratio.training.validation import beta_of, check_folders, check_settings, needs_reference
from logratio.validation import check_kind

SWEEP_FILE = "sweep.yaml"
TRAIN_STORE, HELD_OUT_STORE = "train.store", "held_out.store"
CACHE = "cache"


def sweep(config: SweepConfig, *, show_progress: bool = True) -> SweepResult:
    """Train and evaluate every combination of losses, β, learning rates and seeds.

    The data is tokenized once, and the reference scores it once. A run that fails is recorded with
    the reason, and the sweep continues. A sweep that was stopped continues when it is called again:
    finished runs are not repeated, and an unfinished run resumes from its checkpoint.

    Args:
        config: Settings of the sweep.
        show_progress: Draw progress bars and print notes.

    Returns:
        One row per run, and the run with the highest held-out accuracy within the KL budget.

    Raises:
        ConfigError, ModelFolderError, OutputError, BadDataError: A setting, folder or data row is
            invalid; raised before any training.
        RunInterruptedError: Ctrl-C or SIGTERM was received; a checkpoint has been saved.

    Example:
        >>> base = TrainConfig("sft-model", "pairs.jsonl", "swept", batch_size=8)
        >>> sweep(SweepConfig(base, "held-out.jsonl", lr=(1e-4, 1e-3), samples=8))
        SweepResult('swept', 2 runs, best dpo-beta0.1-lr0.001-seed0)
    """
    ready = prepare(config, show_progress=show_progress)
    return ready.run()


def prepare(config: SweepConfig, *, show_progress: bool = True) -> "Sweep":
    """Check the settings of a sweep and of each of its runs, without reading the data."""
    check_kind(config, SweepConfig)
    refuse_multiple_processes("sweep")
    config = replace(config, base=with_local_models(config.base))
    runs = runs_of(config)
    _check_sweep(config)
    for run in runs:
        check_settings(run)
        check_folders(run)
    return Sweep(config, runs, show_progress)


def runs_of(config: SweepConfig) -> list[TrainConfig]:
    """Return the settings of each run: every combination, without repetitions."""
    base, runs = config.base, dict[str, TrainConfig]()
    axes = (
        config.loss or (base.loss,),
        config.beta or (base.beta,),
        config.lr or (base.lr,),
        config.seed or (base.seed,),
    )
    for loss, beta, lr, seed in product(*axes):
        run = replace(base, loss=loss, beta=beta, lr=lr, seed=seed, precompute=False)
        _check_loss(run)
        if not needs_reference(run):
            run = replace(run, cache=None, reference=None)
        name = f"{loss}-beta{beta_of(run)!r}-lr{lr!r}-seed{seed}"
        runs[name] = replace(run, output=Path(base.output) / name, resume=not base.overwrite)
    return list(runs.values())


def _check_loss(run: TrainConfig) -> None:
    if (data := Objective.of(run).data) != "pairs":
        raise ConfigError(f"a sweep compares losses of pairs, and {run.loss!r} trains on {data}")
    if Objective.of(run).scores:
        raise ConfigError(
            f"a sweep evaluates policies against a reference, and {run.loss!r} trains a reward "
            "model: use `logratio train` and `logratio evaluate`"
        )


def _check_sweep(config: SweepConfig) -> None:
    """Check the settings that only a sweep has."""
    if config.kl_budget is not None and config.samples < 2:
        raise ConfigError("--kl-budget needs an estimate of the KL: set --samples to 2 or more")
    if config.workers is not None and config.engine != "ray":
        raise ConfigError("--workers are runs at a time on Ray: give --engine ray")
    for name in ("eval_share", "eval_every", "eval_samples", "best_metric", "early_stop"):
        if getattr(config.base, name):
            raise ConfigError(
                "a sweep evaluates each run once, after its end, on the sweep's --eval-data: "
                f"leave --{name.replace('_', '-')} out"
            )
    if config.engine == "ray":
        require("ray.tune", "ray")
    check_writable(Path(config.base.output))


@dataclass(frozen=True)
class Shared:
    """What all runs of a sweep read.

    Attributes:
        train: The store of the training data.
        held_out: The store of the held-out data.
        held_out_digest: Digest of the held-out data.
    """

    train: Path
    held_out: Path
    held_out_digest: str


class Sweep:
    """A prepared sweep: `run` performs it, `rehearse` estimates its cost.

    Attributes:
        config: Settings of the sweep.
        runs: Settings of each run.
    """

    def __init__(self, config: SweepConfig, runs: list[TrainConfig], show_progress: bool) -> None:
        self.config, self.runs, self.show_progress = config, runs, show_progress
        self.output = Path(config.base.output).absolute()
        self.reference = config.base.reference or config.base.model
        self.precision = precision_of(config.base)

    def rehearse(self) -> Forecast:
        """Tokenize the data in memory, and estimate the needs of the runs; writes nothing."""
        held_out = self._tokenize(self.config.eval_data, None).store
        return self._forecast(self._tokenize(self.config.base.data, None).store, held_out)

    def _forecast(self, store: Store, held_out: Store) -> Forecast:
        """Estimate the needs of the reference pass and of all runs, one after the other."""
        base, cached = self.config.base, [run for run in self.runs if needs_reference(run)]
        tokens = float(store.shared_lengths().sum()) if cached else 0.0
        where = base.device, self.precision
        scoring = seconds(self.reference, tokens, FORWARD, *where) if tokens else 0.0
        how = self._evaluation(Path(), base.model)
        evaluating = len(self.runs) * evaluation_seconds(
            how, held_out, float(held_out.shared_lengths().sum())
        )
        each = [training_forecast(self._cached(run), store) for run in self.runs]
        return replace(
            each[0],
            memory_bytes=max(one.memory_bytes for one in each),
            disk_bytes=sum(one.disk_bytes for one in each),
            disk_path=self.output,
            seconds=sum(one.seconds for one in each) + scoring + evaluating,
            notes=f"{count(len(each), 'run')} with the reference pass, each evaluated on "
            f"{count(len(held_out), 'pair')} and {count(self.config.samples, 'sample')}",
        )

    def run(self) -> SweepResult:
        """Tokenize the data, fill the cache, and train and evaluate each run.

        Raises:
            OutputError: The disk has too little space for the runs.
            RunExistsError: Another process runs a sweep in this folder.
            RunInterruptedError: Ctrl-C or SIGTERM was received.
        """
        with locked_output(self.output):
            write_atomic(self.output / SWEEP_FILE, self._settings().to_yaml())
            if self.config.base.overwrite:
                (self.output / ROWS_FILE).unlink(missing_ok=True)
            shared = self._prepare_data()
            self._fill_cache(shared)
            rows = self._run_all(shared)
        found = [rows[Path(run.output).name] for run in self.runs]
        output = Path(self.config.base.output)
        result = SweepResult(output, found, *choose(found, self.config.kl_budget))
        try_to_draw(result, self.config.kl_budget)
        return result

    def _settings(self) -> SweepConfig:
        """Return the settings with absolute paths, as the file of the sweep has them."""
        return replace(
            self.config,
            base=with_absolute_paths(self.config.base),
            eval_data=[absolute(one) for one in as_inputs(self.config.eval_data)],
        )

    def _prepare_data(self) -> Shared:
        """Tokenize held-out and training data to stores in the folder of the sweep."""
        paths = []
        for data, name in (
            (self.config.eval_data, HELD_OUT_STORE),
            (self.config.base.data, TRAIN_STORE),
        ):
            path = self.output / name
            dataset = self._tokenize(data, path)
            given = as_inputs(data)
            paths.append(Path(given[0]).absolute() if is_store(given) else path)
        base = self.config.base
        check_mix(base.mix, dataset.store)
        held_out, trained = paths
        digest = Store.open(held_out).digest
        shared = Shared(trained, held_out, digest)
        evaluation.prepare(self._evaluation(shared.held_out, base.model), show_progress=False)
        forecast = self._forecast(dataset.store, Store.open(held_out))
        check_writable(self.output, forecast.disk_bytes)
        if self.show_progress:
            say(forecast.to_text())
        return shared

    def _tokenize(self, data: Inputs, path: Path | None) -> Dataset:
        """Tokenize data to a store, or in memory; keep the date of an earlier store."""
        base = self.config.base
        recorded = date_of_store(Store.open(path)) if path and path.exists() else None
        dataset = load_dataset(
            base.model,
            data,
            base.rules,
            replace(base.formats, demonstrations=False, kinds=("pair",)),
            path=path,
            refused=path and path.with_suffix(".refused.jsonl"),
            max_bad_fraction=base.max_bad_fraction,
            show_progress=self.show_progress,
            recorded_date=lambda: recorded,
        )
        check_groups(dataset.store, "pairs", "a sweep")
        check_reference(self.reference, base.model, dataset.tokenizer, dataset.store)
        return dataset

    def _cached(self, run: TrainConfig) -> TrainConfig:
        """Return the settings of a run with the cache of the sweep, if its loss has a reference."""
        if not needs_reference(run):
            return run
        return replace(run, cache=Path(self.config.base.cache or self.output / CACHE).absolute())

    def _fill_cache(self, shared: Shared) -> None:
        """Score the training data with the reference, unless no loss needs it."""
        base, config = self.config.base, self.config
        cached = next((run.cache for run in map(self._cached, self.runs) if run.cache), None)
        if cached is None:
            return
        fingerprint = model_fingerprint(self.reference, self.precision, base.quantization)
        wanted = PrecomputeConfig(
            self.reference,
            shared.train,
            cached,
            sums_only=holds_sums_only(cached, fingerprint),
            share_beginnings=base.share_beginnings,
            engine=config.engine,
            workers=config.workers,
            read_mode=base.read_mode,
            precision=self.precision,
            quantization=base.quantization,
            device=base.device,
            rules=base.rules,
        )
        done = precompute(wanted, show_progress=self.show_progress)
        if self.show_progress:
            say(f"reference: {done.to_text()}")

    def _run_all(self, shared: Shared) -> dict[str, SweepRow]:
        """Train and evaluate the runs, and record a row for each as soon as it has ended."""
        path = self.output / ROWS_FILE
        rows = read_rows(path)
        runs = [self._with_shared(run, shared) for run in self.runs]

        def record(row: SweepRow) -> None:
            if rows.get(row.name) != row:
                append_row(path, row)
                rows[row.name] = row
            say(f"{row.name}: {_outcome(row)}")

        do = partial(
            train_and_evaluate,
            how=self._evaluation(shared.held_out, self.config.base.model),
            digest=shared.held_out_digest,
            show_progress=self.show_progress,
        )
        before = [rows.get(Path(run.output).name) for run in runs]
        if self.config.engine == "ray":
            from logratio.training.sweep_ray import run_on_ray

            run_on_ray(self.config, runs, before, do, record)
        else:
            for number, (run, earlier) in enumerate(zip(runs, before, strict=True), 1):
                if self.show_progress:
                    say(f"run {number} of {len(runs)}: {Path(run.output).name}")
                record(do(run, earlier))
        return rows

    def _with_shared(self, run: TrainConfig, shared: Shared) -> TrainConfig:
        """Return the settings of a run on the shared data, with absolute paths."""
        return replace(
            self._cached(run),
            model=Path(run.model).absolute(),
            reference=run.reference and Path(run.reference).absolute(),
            data=[shared.train],
            output=Path(run.output).absolute(),
            precision=self.precision,
            formats=FormatSettings(),  # a store has no rows
        )

    def _evaluation(self, held_out: Path, policy: str | Path) -> EvaluateConfig:
        """Return the settings of the evaluations; each run replaces the policy and β."""
        base = self.config.base
        return EvaluateConfig(
            policy,
            Path(self.reference).absolute(),
            [held_out],
            beta=1.0,
            samples=self.config.samples,
            max_new_tokens=self.config.max_new_tokens,
            precision=self.precision,
            device=base.device,
            rules=base.rules,
        )


def train_and_evaluate(
    run: TrainConfig,
    earlier: SweepRow | None,
    *,
    how: EvaluateConfig,
    digest: str,
    show_progress: bool,
) -> SweepRow:
    """Train and evaluate a run; an error becomes a row with the reason.

    Args:
        run: Settings of the run.
        earlier: The row of an earlier attempt; its evaluation is kept if it would be the same.
        how: Settings of the evaluation, except the policy and β.
        digest: Digest of the held-out data.
        show_progress: Draw progress bars and print notes.

    Raises:
        RunInterruptedError: Ctrl-C or SIGTERM was received.
    """
    started = time.monotonic()
    held_out = {"digest": digest, "samples": how.samples, "max_new_tokens": how.max_new_tokens}
    try:
        steps = DPOTrainer(config=_continued(run), show_progress=show_progress).train().steps
        if earlier and not earlier.failed and earlier.held_out == held_out:
            return earlier
        how = replace(how, policy=run.output, beta=beta_of(run))
        found = evaluation.prepare(how, show_progress=show_progress).run()
        row = SweepRow.of(
            run,
            steps=steps,
            seconds=time.monotonic() - started,
            evaluation=evaluation_fields(found),
            held_out=held_out,
        )
        add_evaluation(Path(run.output), card_fields(row))
        return row
    except RunInterruptedError:
        raise
    except Exception as error:  # the other runs do not depend on this one
        return SweepRow.of(run, failed=f"{type(error).__name__}: {error}")
    finally:
        _release_memory()


def _continued(run: TrainConfig) -> TrainConfig:
    """Return the settings of a run that resumes only if it has been interrupted."""
    started = newest(Path(run.output) / CHECKPOINTS) is not None
    return replace(run, resume=run.resume and started)


def _release_memory() -> None:
    """Release the models of a run that has ended."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _outcome(row: SweepRow) -> str:
    if row.failed:
        return f"failed: {row.failed}"
    kl = "" if row.kl != row.kl else f", KL {row.kl:.3g} nats"
    return f"held-out accuracy {row.accuracy:.3f}{kl}"


Do = Callable[[TrainConfig, SweepRow | None], SweepRow]
"""Trains and evaluates a run, given the row of an earlier attempt."""
