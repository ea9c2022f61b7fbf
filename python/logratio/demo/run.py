"""The demo's steps, each with the public API."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer

from logratio.data.analysis.evaluation_result import Evaluation
from logratio.data.tokenization.groups import TokenizationRules
from logratio.demo import task
from logratio.export.export import export_bundle
from logratio.export.plan import ExportConfig
from logratio.synonyms import takes_known_names
from logratio.training.config import EvaluateConfig, PrecomputeConfig, TrainConfig
from logratio.training.evaluation import evaluate
from logratio.training.precomputation import precompute
from logratio.training.run_folder import RunExistsError
from logratio.training.trainer import train
from logratio.validation import Range, check_fields

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Candidates:
    """Sampled texts of each prompt."""

    prompts: list[str]
    texts: list[list[str]]

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return zip(self.prompts, self.texts, strict=True)

    def pairs(self) -> Iterator[dict[str, str]]:
        """Yield the best and worst text of each prompt by the rule, if their scores differ."""
        for prompt, texts in self:
            ranked = sorted(texts, key=lambda text: task.rule(prompt, text))
            worst, best = ranked[0], ranked[-1]
            if task.rule(prompt, best) > task.rule(prompt, worst):
                yield {"prompt": prompt, "chosen": best, "rejected": worst}


def draw(model_folder: Path, prompts: list[str], count: int, seed: int) -> Candidates:
    """Sample `count` stories per prompt from the model in `model_folder`."""
    from logratio.training.evaluation import sample_completions
    from logratio.training.models import load_model

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    drawn = sample_completions(
        load_model(model_folder),
        [one for one in ids for _ in range(count)],
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=[task.EOS],
        seed=seed,
    )
    texts = [" " + text for text in tokenizer.decode_batch(drawn)]
    return Candidates(prompts, [texts[i : i + count] for i in range(0, len(texts), count)])


SIZES = (1, 4, 16)


@dataclass(frozen=True)
class BestOf:
    """The rule's mean score of the story chosen from the first `n`.

    Attributes:
        n: Number of candidates.
        reward: Chosen by the exported implicit reward.
        random: The mean of the candidates, the expected score of a random choice.
        oracle: Chosen by the rule itself.
        standard_error: Standard error of `reward` over prompts.
    """

    n: int
    reward: float
    random: float
    oracle: float
    standard_error: float


def best_of(bundle: Path, candidates: Candidates) -> list[BestOf]:
    """Choose among each prompt's candidates with the bundle in the folder `bundle`."""
    from logratio.serving.reranker import Reranker

    reranker = Reranker.load(bundle)
    truth = np.array([[task.rule(p, text) for text in texts] for p, texts in candidates])
    rewards = np.array(
        [[score.reward for score in reranker.score(p, texts)] for p, texts in candidates]
    )
    return [_best_of(n, rewards[:, :n], truth[:, :n]) for n in SIZES]


def _best_of(n: int, rewards: np.ndarray, truth: np.ndarray) -> BestOf:
    picked = np.take_along_axis(truth, rewards.argmax(axis=1)[:, None], axis=1)[:, 0]
    return BestOf(
        n=n,
        reward=float(picked.mean()),
        random=float(truth.mean()),
        oracle=float(truth.max(axis=1).mean()),
        standard_error=float(picked.std(ddof=1) / np.sqrt(len(picked))),
    )


MARKER = "logratio-demo.json"
BETA = 0.1
RULES = TokenizationRules(max_length=96)


def train_sft(folder: Path, prompts: list[str], seed: int) -> Path:
    """Teach a small model to write stories, one demonstration per prompt, in `folder`.

    Returns:
        The folder of the trained model.
    """
    start = task.save_model(folder / "untrained", seed)
    rows = task.demonstrations(prompts, seed + 1)
    data = task.write_rows(folder / "demonstrations.jsonl", rows)
    config = TrainConfig(
        start, [data], folder / "sft", loss="sft", lr=2e-3, batch_size=32, epochs=4,
        save_every=0, seed=seed, rules=RULES,
    )  # fmt: skip
    return train(config).output


@takes_known_names()
@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        output: Folder for all files; an earlier demo in it is replaced.
        seed: Seed of data, models, order and samples. The same seed gives the same data, and the
            same table only on the same machine and versions: training amplifies rounding.
        demonstrations: Number of stories for SFT.
        preference_prompts: Number of prompts whose sampled stories become pairs.
        held_out_prompts: Number of prompts for the tables.
    """

    output: Path = Path("logratio-demo")
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    demonstrations: Annotated[int, Range(1)] = 4000
    preference_prompts: Annotated[int, Range(1)] = 1500
    held_out_prompts: Annotated[int, Range(2)] = 200

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Judged:
    """Scores by the hidden rule, and lengths, of a model's stories on held-out prompts."""

    rewards: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class DemoResult:
    """The demo's measurements.

    Attributes:
        sft, dpo: Stories of both models, scored by the rule.
        evaluation: The policy on held-out pairs, with its KL to the SFT model.
        best_of: For each N, the rule's score of the story chosen by the exported reward.
        seconds: Duration of each step.
    """

    sft: Judged
    dpo: Judged
    evaluation: Evaluation
    best_of: list[BestOf]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def win_rate(self) -> float:
        """Share of held-out prompts where DPO's story beats SFT's by the rule; ties count half."""
        return float(((np.sign(self.dpo.rewards - self.sft.rewards) + 1) / 2).mean())


class Demo:
    """One demo: its files and its steps."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.folder = config.output
        self._training, self._held_out = task.split_prompts(config.seed)
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoResult:
        """Run every step."""
        _replace(self.folder)
        torch.set_num_threads(
            1
        )  # the model is tiny: synchronising threads costs more than it saves
        seed = self.config.seed
        held_out = task.repeated(self._held_out, self.config.held_out_prompts)
        with self._step("SFT", "a small Llama learns to write stories"):
            self._sft()
        with self._step("preferences", "its stories, ranked by a hidden rule"):
            self._preferences()
        with self._step("reference cache", "the SFT model's log-probs, once"):
            precompute(PrecomputeConfig(self._sft_model, self._pairs, self._cache, rules=RULES))
        with self._step("DPO", "with the cache, so no second model in memory"):
            self._dpo()
        with self._step("evaluation", "held-out pairs and fresh samples"):
            evaluation = self._evaluate()
            sft = _judge(draw(self._sft_model, held_out, 1, seed + 4))
            dpo = _judge(draw(self._policy, held_out, 1, seed + 4))
        with self._step("export", "policy and reference as one ONNX graph, checked against torch"):
            export_bundle(ExportConfig(self._policy, self._sft_model, self._bundle))
        with self._step("best-of-N", "the exported reward chooses among the SFT model's stories"):
            ranked = best_of(self._bundle, draw(self._sft_model, held_out, 16, seed + 5))
        return DemoResult(sft, dpo, evaluation, ranked, self.seconds)

    @property
    def _sft_model(self) -> Path:
        return self.folder / "sft"

    @property
    def _policy(self) -> Path:
        return self.folder / "dpo"

    @property
    def _cache(self) -> Path:
        return self.folder / "cache"

    @property
    def _bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def _pairs(self) -> list[Path]:
        return [self.folder / "preferences.jsonl"]

    def _sft(self) -> None:
        prompts = task.repeated(self._training, self.config.demonstrations)
        train_sft(self.folder, prompts, self.config.seed)

    def _preferences(self) -> None:
        config, seed = self.config, self.config.seed
        training = task.repeated(self._training, config.preference_prompts)
        held_out = task.repeated(self._held_out, config.held_out_prompts)
        for path, prompts, part in (
            (self._pairs[0], training, 0),
            (self.folder / "held_out.jsonl", held_out, 1),
        ):
            drawn = draw(self._sft_model, prompts, 4, seed + 6 + part)
            task.write_rows(path, drawn.pairs())

    def _dpo(self) -> None:
        train(
            TrainConfig(
                self._sft_model, self._pairs, self._policy, cache=self._cache, beta=BETA,
                lr=3e-4, batch_size=32, epochs=2, save_every=0, seed=self.config.seed, rules=RULES,
            )
        )  # fmt: skip

    def _evaluate(self) -> Evaluation:
        return evaluate(
            EvaluateConfig(
                self._policy, self._sft_model, [self.folder / "held_out.jsonl"], beta=BETA,
                samples=self.config.held_out_prompts, max_new_tokens=64, seed=self.config.seed,
                rules=RULES,
            )
        )  # fmt: skip

    @contextmanager
    def _step(self, name: str, what: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/]: {what}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def _judge(candidates: Candidates) -> Judged:
    rewards = [task.rule(p, texts[0]) for p, texts in candidates]
    lengths = [len(texts[0].split()) for _, texts in candidates]
    return Judged(np.array(rewards), np.array(lengths))


def _replace(folder: Path) -> None:
    """Remove the files of an earlier demo, and create the folder.

    Raises:
        FileExistsError: The folder contains other files.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise RunExistsError(
                f"{folder} is not empty and not an earlier demo; choose another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps({"made_by": "logratio demo"}))
