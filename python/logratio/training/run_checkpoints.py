"""The checkpoints of a run: when they are written, and from which one a run continues."""

from pathlib import Path
from typing import Any

from torch import Tensor

from logratio.progress import say
from logratio.training import checkpoint
from logratio.training.checkpoint import Position
from logratio.training.checkpoint_folder import Writing
from logratio.training.config import TrainConfig
from logratio.training.moving_reference import moving
from logratio.training.parallel.sharded_files import is_sharded
from logratio.training.update import Updater

FOLDER = "checkpoints"


class RunCheckpoints:
    """The folder `checkpoints` of a run. All processes of the run do the same with it.

    Args:
        config: Settings of the run.
        updater: The model and the optimizer.
    """

    def __init__(self, config: TrainConfig, updater: Updater) -> None:
        self.folder = Path(config.output) / FOLDER
        self._config, self._updater = config, updater
        self._processes = updater.processes
        self._pending: tuple[Writing, Position] | None = None

    @property
    def _in_background(self) -> bool:
        """Whether shards are written while the run goes on, which takes host memory for a copy."""
        wanted = self._config.async_save
        if wanted is None:
            wanted = self._updater.device.type == "cuda"
        return wanted and is_sharded(self._updater.policy)

    @property
    def _reference(self) -> dict[str, Tensor] | None:
        """The weights of a reference that follows the policy."""
        follower = moving(self._updater.reference)
        return follower.tensors() if follower else None

    def begin(self, at: Position) -> Path | None:
        """Begin to save; return the folder if it is complete already.

        Raises:
            SaveError: This checkpoint, or the one before it, cannot be written.
        """
        self.finish()
        self._updater.strategy.settle()
        policy, optimizer = self._updater.policy, self._updater.optimizer
        background = self._in_background
        writing = checkpoint.begin_save(
            self.folder,
            policy,
            optimizer,
            at,
            self._processes,
            reference=self._reference,
            background=background,
        )
        self._pending = writing, at
        return None if background else self.finish()

    def completed(self) -> Path | None:
        """Complete a checkpoint that all processes have written by now, and return its folder."""
        if self._pending is None:
            return None
        waits = not self._pending[0].is_written
        return None if self._processes.highest(waits) else self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint that is being written, if any, and return its folder.

        Raises:
            SaveError: It cannot be written; earlier ones are unchanged.
        """
        if self._pending is None:
            return None
        (writing, at), self._pending = self._pending, None
        folder = writing.finish()
        if self._processes.is_first:
            checkpoint.remove_old(self.folder, at, self._config.keep_checkpoints)
        return folder

    def save(self, at: Position) -> Path:
        """Save, and return the folder once it is complete.

        Raises:
            SaveError: The checkpoint cannot be written; earlier ones are unchanged.
        """
        folder = self.begin(at) or self.finish()
        assert folder is not None
        return folder

    def save_best(self, step: int) -> None:
        """Keep the weights after update `step` as the best."""
        self._updater.strategy.settle()
        checkpoint.save_best(self.folder, self._updater.policy, step, self._processes)

    def load_best(self, step: int) -> None:
        """Restore the weights of `save_best`."""
        self._updater.strategy.settle()
        checkpoint.load_best(self.folder, self._updater.policy, step, self._processes)

    def resume(self, identity: dict[str, Any]) -> Position | None:
        """Restore the newest valid checkpoint of the run; None if there is none yet.

        Raises:
            ResumeError: All checkpoints are damaged, or they are of another run.
        """
        updater = self._updater
        updater.strategy.settle()
        at, refused = checkpoint.load_newest(
            self.folder,
            updater.policy,
            updater.optimizer,
            identity,
            self._processes,
            self._reference,
        )
        for sentence in refused:
            say(f"skipped a damaged checkpoint: {sentence}")
        if at is None:
            say(f"{self.folder}: no checkpoint yet, starting from the first update")
        else:
            say(f"{self.folder}: resuming after update {at.step:,}")
        return at
