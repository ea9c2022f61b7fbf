"""Run the trials of a sweep on a Ray cluster with Ray Tune, one device each.

All machines must see the folder of the sweep, the model and the cache. The driver records the rows,
so that one process writes the file.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logratio.extras import require
from logratio.training.config import SweepConfig, TrainConfig
from logratio.training.precomputation_ray import cluster
from logratio.training.sweep_results import SweepRow

if TYPE_CHECKING:
    from logratio.training.sweep_runs import Do


def run_on_ray(
    config: SweepConfig,
    runs: Sequence[TrainConfig],
    before: Sequence[SweepRow | None],
    do: "Do",
    record: Callable[[SweepRow], None],
) -> None:
    """Train and evaluate the runs on the cluster, several at a time.

    Args:
        config: Settings of the sweep.
        runs: Settings of each run, with absolute paths.
        before: The row of an earlier attempt of each run, or None.
        do: Trains and evaluates one run; called on the workers.
        record: Called here with the row of each run that has ended.
    """
    # Tune's table would repeat the rows, and name a folder that is deleted afterwards.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with cluster() as ray:
        tune = require("ray.tune", "ray")
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        storage = Path(config.base.output).absolute() / f".ray-{secrets.token_hex(8)}"
        trial = tune.with_resources(_trial(runs, before, do), _resources(config, ray))
        numbers = tune.grid_search([*range(len(runs))])
        tuner = tune.Tuner(
            trial,
            param_space={"number": numbers},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.workers),
            run_config=tune.RunConfig(
                storage_path=str(storage),
                verbose=0,
                callbacks=[_recorder(tune, runs, record)],
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def _trial(
    runs: Sequence[TrainConfig], before: Sequence[SweepRow | None], do: "Do"
) -> Callable[[Mapping[str, Any]], None]:
    """Return the function that a worker runs for one trial."""

    def trial(settings: Mapping[str, Any]) -> None:
        from ray import tune

        number = settings["number"]
        tune.report({"row": json.dumps(asdict(do(runs[number], before[number])))})

    return trial


def _resources(config: SweepConfig, ray: Any) -> dict[str, float]:
    """Return what one trial reserves: a GPU if the cluster has some, and one CPU."""
    wants_gpu = not (config.base.device or "cuda").startswith("cpu")
    has_gpu = wants_gpu and ray.cluster_resources().get("GPU", 0) >= 1
    return {"cpu": 1, "gpu": 1 if has_gpu else 0}


def _recorder(tune: Any, runs: Sequence[TrainConfig], record: Callable[[SweepRow], None]) -> Any:
    """Return a callback of Ray Tune that records each row when its trial reports it."""

    class Recorder(tune.Callback):  # type: ignore[misc]
        """Records the rows of trials that have ended."""

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
        ) -> None:
            if "row" in result:
                record(SweepRow(**json.loads(result["row"])))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            run = runs[trial.config["number"]]
            reason = str(trial.get_error() or "its worker ended").strip().splitlines()[-1]
            record(SweepRow.of(run, failed=f"the worker on Ray failed: {reason}"))

    return Recorder()
