"""Callbacks: code of the user that a trainer calls during a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError, LogratioError
from logratio.training.config import TrainConfig

if TYPE_CHECKING:
    from logratio.training.held_out import HeldOutResult
    from logratio.training.run_folder import TrainResult


class CallbackError(LogratioError, RuntimeError):
    """A callback raised an exception; the run has been saved and can be resumed."""


@dataclass
class RunState:
    """The state of a run, as callbacks see it.

    Attributes:
        config: Settings of the run.
        updates: Number of updates planned.
        policy: The model that is trained. Do not change it.
        tokenizer: The tokenizer of the run.
        step: Number of updates done.
        epoch: Passes over the data done, with fractions.
        stop_reason: Why the run ends early; None: it does not.
        log_history: One row per update and evaluation of this process, with the names of
            transformers: "loss", "learning_rate", "eval_loss", "step", "epoch".
    """

    config: TrainConfig
    updates: int
    policy: nn.Module
    tokenizer: PreferenceTokenizer
    step: int = 0
    epoch: float = 0.0
    stop_reason: str | None = None
    log_history: list[dict[str, float]] = field(default_factory=list)

    @property
    def global_step(self) -> int:
        """Number of updates done; the name of transformers."""
        return self.step

    @property
    def max_steps(self) -> int:
        """Number of updates planned; the name of transformers."""
        return self.updates

    def log(self, values: Mapping[str, float]) -> None:
        """Add the metrics of an update or of an evaluation to `log_history`."""
        named = {"learning_rate" if name == "lr" else name: one for name, one in values.items()}
        self.log_history.append({**named, "epoch": self.epoch, "step": self.step})

    def stop(self, reason: str) -> None:
        """End the run after this update; the model is saved as at the end of a whole run."""
        self.stop_reason = reason


class Callback:
    """Base class of callbacks: override the methods that you need.

    A trainer calls them in its own thread, so a slow method delays the run. If a method raises an
    exception, the trainer saves a checkpoint and ends with `CallbackError`.

    Example:
        >>> class StopAtMargin(Callback):
        ...     def on_update(self, state, metrics):
        ...         if metrics["rewards/margins"] > 2.0:
        ...             state.stop("the margin is above 2")
    """

    def on_start(self, state: RunState) -> None:
        """Called once, before the first update of this process."""

    def on_update(self, state: RunState, metrics: Mapping[str, float]) -> None:
        """Called after each update.

        Args:
            state: The run.
            metrics: The row of `metrics.jsonl`, computed before the update's step.
        """

    def on_evaluate(self, state: RunState, result: "HeldOutResult") -> None:
        """Called after each evaluation of held-out data."""

    def on_checkpoint(self, state: RunState, folder: Path) -> None:
        """Called after a checkpoint has been saved to `folder`."""

    def on_end(self, state: RunState, result: "TrainResult") -> None:
        """Called once the model has been saved."""


def check_callbacks(
    callbacks: Callback | Sequence[Callback] | None,
) -> tuple[Callback, ...]:
    """Return one callback or several as a tuple; each must be an instance of `Callback`.

    Raises:
        ConfigError: One is not, or has a method that would never be called; the message names it.
    """
    given = () if callbacks is None else callbacks
    every = tuple(given) if isinstance(given, list | tuple) else (given,)
    for one in every:
        if not isinstance(one, Callback):
            raise ConfigError(_refusal(one))
        _check_methods(one)
    return every


def _refusal(given: object) -> str:
    """Return why an object is no callback, and what to pass instead."""
    if isinstance(given, type) and issubclass(given, Callback):
        return f"callbacks: pass an instance, {given.__name__}(), not the class"
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    if kind == "EarlyStoppingCallback":
        return f"callbacks: instead of {kind}, set early_stop and best_metric"
    return (
        f"callbacks must be instances of logratio.Callback, not {kind}: derive from it; its "
        "methods are on_start, on_update, on_evaluate, on_checkpoint and on_end"
    )


def _check_methods(callback: Callback) -> None:
    """Refuse methods that look like events and would never be called."""
    known = {name for name in vars(Callback) if name.startswith("on_")}
    for name in dir(callback):
        if name.startswith("on_") and name not in known:
            near = _TRANSFORMERS.get(name)
            advice = f"use {near}" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"{type(callback).__name__}.{name} is never called: {advice}")


_TRANSFORMERS: Mapping[str, str] = {
    "on_train_begin": "on_start",
    "on_train_end": "on_end",
    "on_step_end": "on_update",
    "on_log": "on_update",
    "on_save": "on_checkpoint",
}
"""Events of transformers' callbacks, and the methods that are called then here."""
