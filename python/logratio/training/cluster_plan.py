"""Plan a run on a cluster: its data, and the config of its model, without weights or GPUs."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from logratio._rust import Store
from logratio.data.feed import FeedSettings, micro_batches
from logratio.data.readers.inputs import as_inputs
from logratio.data.store.load import is_store
from logratio.errors import ConfigError
from logratio.extras import MissingExtraError
from logratio.hub import local_folder
from logratio.training.accelerators import Accelerator
from logratio.training.cluster import CUDA, Cluster, ClusterForecast, Planner
from logratio.training.config import TrainConfig
from logratio.training.dataset import check_mix, load_training_data
from logratio.training.given_model import given_model
from logratio.training.held_out import divide
from logratio.training.lora import check_adapters
from logratio.training.measured_machine import Task, measure_cpu
from logratio.training.model_shape import policy_shape
from logratio.training.models import (
    AT_ONCE,
    ModelFolderError,
    architecture,
    base_folder,
    precision_of,
    training_budget,
)
from logratio.training.rank_loads import Lengths, rank_loads
from logratio.training.schedule import RunLength
from logratio.training.validation import check_settings

CPU = torch.device("cpu")


def plan_cluster(
    config: TrainConfig, cluster: Cluster, *, show_progress: bool = True
) -> ClusterForecast:
    """Forecast the memory of a GPU and the time of an update of a run on a cluster.

    The folder of the model needs no weights: config.json suffices if the data is a store, else
    tokenizer.json is needed too. Of an id of the Hugging Face hub only such files are downloaded.
    Nothing is written.

    Args:
        config: Settings of the run. The precision is bf16 by default, as on a GPU, and the token
            budget is that of a GPU.
        cluster: The GPUs.
        show_progress: Draw a progress bar while the data is read.

    Returns:
        The forecast. Precomputing, evaluation and checkpoints are not part of it.

    Raises:
        ConfigError: A setting is invalid or does not fit the cluster.
        ModelFolderError: A folder has no config of a causal language model.
        BadDataError: Rows are malformed.
        MeasurementError: The GPU is "cpu", and this machine could not be measured.

    Example:
        >>> config = TrainConfig("sft-model", "pairs.jsonl", "policy", batch_size=8)
        >>> forecast = plan_cluster(config, Cluster(world_size=8, gpu="h100"))
        >>> forecast.mode
        'ddp'
    """
    config = _settings(config, on_cpu=cluster.gpu == "cpu")
    return plan_with(config, cluster, _store(config, show_progress=show_progress))


def plan_with(config: TrainConfig, cluster: Cluster, store: Store) -> ClusterForecast:
    """Return the forecast of `plan_cluster` for tokenized data.

    Args:
        config: Settings with the precision and the token budget of the run.
        cluster: The GPUs.
        store: The groups to train on.
    """
    on_cpu = cluster.gpu == "cpu"
    loads = rank_loads(config, store, cluster.world_size, CPU if on_cpu else CUDA)
    topology = cluster.topology(_measured(config, store) if on_cpu else None)
    updates = RunLength.of(config, len(store)).updates
    return Planner(config, topology, loads, updates).choose()


def _settings(config: TrainConfig, *, on_cpu: bool) -> TrainConfig:
    """Check the settings of a run, and fill in the defaults of the device."""
    if config.precision == "fp32" and not on_cpu:
        raise ConfigError(
            "precision fp32: the figures of GPUs are those of bfloat16; plan with bf16 or "
            "bf16-weights"
        )
    if config.context_parallel_size > 1:
        raise ConfigError(
            "--world-size has no forecast of prompts that several GPUs compute together: leave "
            "out --context-parallel-size"
        )
    config = replace(
        config,
        device="cpu" if on_cpu else "meta",  # any device that this machine has
        precision=config.precision or ("fp32" if on_cpu else "bf16"),
        token_budget=config.token_budget or AT_ONCE["cpu" if on_cpu else "cuda"],
        model=_with_config(config.model, config.revision),
        revision=None,
        reference=_with_config(config.reference) if config.reference else None,
    )
    # A package such as bitsandbytes is needed on the GPUs, not here.
    with suppress(MissingExtraError):
        check_settings(config)
    with suppress(MissingExtraError):
        check_adapters(config)
    return config


def _with_config(model: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model whose config describes a causal language model."""
    if given_model(model):
        raise ConfigError("model: plan with a folder or an id, not with an object")
    folder = local_folder(model, revision, weights=False)
    if not folder.is_dir() or not (base_folder(folder) / "config.json").exists():
        raise ModelFolderError(
            f"{folder}: no config.json; a plan needs the model's config, but not its weights"
        )
    architecture(base_folder(folder))
    return folder


def _store(config: TrainConfig, *, show_progress: bool) -> Store:
    """Return the groups to train on. A store needs no tokenizer here, as no text is read."""
    folder, data = Path(config.model), as_inputs(config.data)
    if not (folder / "tokenizer.json").exists():
        if not is_store(data):
            raise ModelFolderError(
                f"{folder}: no tokenizer.json to count the tokens of the data; copy it from the "
                "model, or give a store made by `logratio data build` as data"
            )
        store = Store.open(data[0])
        check_mix(config.mix, store)
        return store
    dataset = load_training_data(
        config, refused=None, show_progress=show_progress, recorded_date=lambda: None
    )
    config = replace(config, rules=dataset.tokenizer.rules)
    return divide(config, dataset, writes=False, show_progress=show_progress).train


def _measured(config: TrainConfig, store: Store) -> Accelerator:
    """Measure this machine with the first micro-batch of the run."""
    task = Task(
        model=str(base_folder(config.model)),
        groups=first_groups(config, store),
        precision=precision_of(config),
        threads=int(os.environ.get("OMP_NUM_THREADS") or 1),  # torchrun's default
    )
    return measure_cpu(task, policy_shape(replace(config, lora=None, adapter="merge")))


def first_groups(config: TrainConfig, store: Store) -> Lengths:
    """Return the lengths of the groups in the first micro-batch of one process."""
    settings = FeedSettings(
        groups_per_update=config.batch_size,
        token_budget=training_budget(config),
        seed=config.seed,
    )
    groups = micro_batches(settings.plan(store, 0))[0].tolist()
    offsets, lengths = store.completion_offsets(), store.completion_lengths()
    prompts = store.prompt_lengths()
    return [
        [int(prompts[group]), *map(int, lengths[offsets[group] : offsets[group + 1]])]
        for group in groups
    ]
