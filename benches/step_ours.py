"""The trainer as users run it, instrumented; run by bench_step.py.

    python step_ours.py SPEC.json

Runs `DPOTrainer(TrainConfig(…))` with the store and cache of the material. The settings of an arm:
`config` are fields of TrainConfig, `cache` False keeps the reference as a second model in memory,
`precompute` fills a new cache first, in this process, and `patches` are names in
`step_patches.PATCHES`. The run stops after its last update, before it saves.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args

from step_patches import LOOP, PATCHES, TRAINER, UPDATE, check_used, replace
from step_record import Ids, Pair, Recorder, Spec
from torch import nn

from logratio._rust import SharedLayout
from logratio.data import FeedSettings, MicroBatch
from logratio.logps.batch import Layout
from logratio.training import TrainConfig
from logratio.training.config import Precision
from logratio.training.trainer import DPOTrainer


class AllUpdatesDone(Exception):  # noqa: N818
    """Raised to end the run when the measurement is complete."""


def pairs_of(layout: Layout) -> Callable[[], list[Pair]]:
    """Copy the inputs of a micro-batch; return a function that extracts its pairs later."""
    prompts, sides = layout.prompt_lengths.tolist(), layout.completion_lengths.reshape(-1, 2)
    ids, is_shared = layout.input_ids.copy(), isinstance(layout, SharedLayout)

    def shared() -> Iterator[Pair]:
        at = 0
        for prompt, (chosen, rejected) in zip(prompts, sides.tolist(), strict=True):
            cuts = [at, at + prompt, at + prompt + chosen, at + prompt + chosen + rejected]
            parts: list[Ids] = [ids[a:b] for a, b in pairwise(cuts)]
            yield parts[0], parts[1], parts[2]
            at = cuts[-1]

    def padded() -> Iterator[Pair]:
        for group, (prompt, lengths) in enumerate(zip(prompts, sides.tolist(), strict=True)):
            rows = ids[group], ids[len(prompts) + group]  # all chosen, then all rejected
            chosen, rejected = (
                row[prompt : prompt + length] for row, length in zip(rows, lengths, strict=True)
            )
            yield rows[0][:prompt], chosen, rejected

    return lambda: list(shared() if is_shared else padded())


def watch(spec: Spec, record: Recorder) -> None:
    """Add the recorder to the trainer: at the policy, the feed and each update."""
    build, update, feed = TRAINER.build_policy, UPDATE.Updater.update, TRAINER.DPOTrainer._feed

    def built(*given: Any) -> nn.Module:
        policy: nn.Module = build(*given)
        record.loaded(policy)
        return policy

    def began(self: Any, start: int) -> Any:
        record.begin()
        return feed(self, start)

    def seen(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for micro in batches:
            record.fed(pairs_of(micro.layout))
            yield micro
            del micro  # frees its buffer for the next one

    def updated(self: Any, *given: Any) -> Any:
        step, rate, batches, *most = given
        values, count = update(self, step, rate, seen(batches), *most)
        names = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
        record.updated(*[values[name] for name in names])
        if record.is_over:
            raise AllUpdatesDone
        return values, count

    replace(TRAINER, "build_policy", built)
    replace(TRAINER.DPOTrainer, "_feed", began)
    replace(UPDATE.Updater, "update", updated)
    if spec.order != FeedSettings.order:  # the trainer has no setting for it
        replace(LOOP, "FeedSettings", partial(FeedSettings, order=spec.order))


def configuration(spec: Spec, output: Path) -> TrainConfig:
    """Return the settings of all arms and of this arm."""
    folder, settings = Path(spec.material), spec.settings
    if spec.precision not in get_args(Precision):
        raise ValueError(f"we have no precision {spec.precision}")
    cache: Path | None = folder / "cache" if settings.get("cache", True) else None
    if settings.get("precompute"):
        cache = output / "cache"
    return TrainConfig(
        **{
            "model": folder / "model",
            "data": [folder / "pairs.store"],
            "output": output,
            "cache": cache,
            "precompute": bool(settings.get("precompute")),
            "beta": spec.beta,
            "lr": spec.lr,
            "warmup": 0.0,
            "batch_size": spec.batch,
            "precision": cast(Precision, spec.precision),
            "seed": spec.seed,
            "save_every": 0,
            "device": spec.device,
        }
        | settings.get("config", {})
    )


def timed_pass(seconds: list[float]) -> None:
    """Time the reference's pass, if the run makes one."""
    run = TRAINER.Precompute.run

    def timed(self: Any) -> Any:
        start = perf_counter()
        result = run(self)
        seconds.append(perf_counter() - start)
        return result

    replace(TRAINER.Precompute, "run", timed)


def run(spec: Spec) -> None:
    """Train on the material, and write the record."""
    record, seconds = Recorder(spec), list[float]()
    watch(spec, record)
    timed_pass(seconds)
    for name in spec.settings.get("patches", []):
        PATCHES[name]()
    with tempfile.TemporaryDirectory() as output:
        try:
            DPOTrainer(config=configuration(spec, Path(output)), show_progress=False).train()
        except AllUpdatesDone:
            check_used(spec.settings.get("patches", []))
            record.write(reference_seconds=sum(seconds) if seconds else None)


if __name__ == "__main__":
    run(Spec.from_command_line())
