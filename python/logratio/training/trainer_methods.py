"""Methods and attributes that scripts expect of a `Trainer` of transformers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from logratio.bundle import TOKENIZER_FILES
from logratio.errors import ConfigError, LogratioError
from logratio.report.run_files import SETTINGS_FILE
from logratio.training.callbacks import RunState
from logratio.training.config import TrainConfig
from logratio.training.model_card import CARD_FILE
from logratio.training.models import ADAPTER_CONFIG
from logratio.training.run_folder import TrainResult

_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *(ADAPTER_CONFIG, *TOKENIZER_FILES, "added_tokens.json", SETTINGS_FILE, CARD_FILE),
)
"""Files of an output folder that are the model; the others are records of its run."""
_INSTEAD: Mapping[str, str] = {
    "add_callback": "pass callbacks to DPOTrainer",
    "create_optimizer": "choose optimizer, lr and lr_scheduler",
    "get_train_dataloader": "use logratio.Feed",
    "hyperparameter_search": "use logratio.sweep",
    "log_metrics": "metrics.jsonl in the output folder has the metrics of every update",
    "predict": "use logratio.evaluate, or export_bundle and Reranker to score completions",
    "save_metrics": "metrics.jsonl in the output folder has the metrics of every update",
    "save_state": "trainer.save(step) writes a checkpoint, as save_every does",
}
"""Methods of transformers' trainer without an equivalent, and what to use."""


class NoSuchAttributeError(LogratioError, AttributeError):
    """The trainer has no such attribute, or does not have it yet."""


class TransformersMethods:
    """What a script calls before and after `train`, under the names of transformers.

    Attributes:
        result: The result of `train`; None before it has ended.
        state: The state of the run, once it has started.
    """

    config: TrainConfig
    state: RunState
    result: TrainResult | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("state", "model"):
            raise NoSuchAttributeError(
                f"DPOTrainer.{name} exists once train() has started the updates; for a run that "
                "had already finished, train() returns the folder and the metrics"
            )
        advice = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise NoSuchAttributeError(f"{type(self).__name__} has no {name}{advice}")

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.state.policy

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Copy the trained model and its tokenizer to another folder.

        `train` has saved it to the output folder already, so that without `output_dir` nothing is
        left to do.

        Args:
            output_dir: The folder of the copy, which is created if it is missing.

        Raises:
            ConfigError: `train` has not ended.
        """
        source = self._ended("save_model").output
        target = Path(output_dir or source)
        if target.resolve() == source.resolve():
            return
        target.mkdir(parents=True, exist_ok=True)
        for path in {one for pattern in _MODEL_FILES for one in source.glob(pattern)}:
            shutil.copyfile(path, target / path.name)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, Any]:
        """Return the metrics of the saved model on the held-out data.

        Args:
            eval_dataset: Must be None: the held-out data is given to `DPOTrainer`.

        Returns:
            The row of `evaluations.jsonl`, with names such as "eval_loss".

        Raises:
            ConfigError: `train` has not ended, or the run has no held-out data.
        """
        if eval_dataset is not None:
            raise ConfigError(
                "evaluate() uses the held-out data of the run: give it to DPOTrainer as eval_data, "
                "or evaluate other data with logratio.evaluate"
            )
        result = self._ended("evaluate")
        if not result.evaluations:
            raise ConfigError(
                "evaluate() needs held-out data: give DPOTrainer eval_data or eval_share"
            )
        wanted = result.best_step or result.steps
        rows = [row for row in result.evaluations if row["step"] == wanted]
        return dict((rows or result.evaluations)[-1])

    def push_to_hub(self, *arguments: Any, **settings: Any) -> None:
        """Refuse to upload: a run never uses the network.

        Raises:
            ConfigError: Always, with the command that uploads the model.
        """
        del arguments, settings
        raise ConfigError(
            "DPOTrainer uploads nothing: upload the output folder with "
            f"`hf upload ORG/NAME {self.config.output}`"
        )

    def _ended(self, method: str) -> TrainResult:
        if self.result is None:
            raise ConfigError(f"{method}() needs a trained model: call train() first")
        return self.result
