"""The tasks of bench_methods.py: models, data of every kind, and a rule that scores stories.

The demo's task has a hidden rule, from which data of every kind is made. The stories of
`story_prefs.jsonl` come as pairs, so they also serve as lists of two and as demonstrations, but not
as labelled answers.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_stories import RULES as STORY_RULES
from bench_stories import rule as story_rule
from bench_stories import split
from shared_material import SHARED, STORIES, STORIES260K

from logratio.data import TokenizationRules
from logratio.demo import task
from logratio.demo.run import MAX_NEW_TOKENS, RULES, Candidates, draw, train_sft
from logratio.training.methods.method import DataKind

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers of a task that a row of the results records.

    Attributes:
        updates: Updates of each run.
        completions: Completions in each update: 2 for a pair, 1 for an answer.
        lr: Peak learning rate of every method.
        samples: Held-out prompts that both models complete.
        prompts: Training prompts with four sampled stories each; 0: the data is given.
        demonstrations: Stories that the SFT model learned from; 0: the model is given.
    """

    updates: int
    completions: int
    lr: float
    samples: int
    prompts: int = 0
    demonstrations: int = 0


@dataclass(frozen=True)
class BenchTask:
    """A model to start from, data, and the judge of what a policy writes.

    Attributes:
        name: Kind of its rows in the results.
        model: Folder of the model to start from, which is also the reference.
        data: The training data of each kind.
        held_out: Held-out pairs.
        cache: Folder for the reference's log-probs, which all runs read.
        rule: Scores a story from its prompt and its text.
        rules: How the data is tokenized.
        sizes: Numbers of the task.
        max_new_tokens: Maximum length of a sampled story.
    """

    name: str
    model: Path
    data: Mapping[DataKind, Path]
    held_out: Path
    cache: Path
    rule: Callable[[str, str], int]
    rules: TokenizationRules
    sizes: Sizes
    max_new_tokens: int


ANSWERS = 4
DEMO_SIZES = Sizes(24, 48, 3e-4, samples=200, prompts=600, demonstrations=4000)
STORY_SIZES = Sizes(24, 16, 3e-4, samples=96)
FILES: dict[DataKind, str] = {
    "pairs": "pairs.jsonl",
    "lists": "lists.jsonl",
    "labelled answers": "answers.jsonl",
    "demonstrations": "good.jsonl",
}


def demo_task(folder: Path, seed: int) -> BenchTask:
    """Return the demo's task for a seed; `folder` keeps its models and data for the next call."""
    made = folder / "made.json"
    wanted = asdict(DEMO_SIZES)
    if not made.exists() or json.loads(made.read_text()) != wanted:
        if made.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _make(folder, seed)
        made.write_text(json.dumps(wanted))
    data = {kind: folder / name for kind, name in FILES.items()}
    return BenchTask(
        "task",
        folder / "sft",
        data,
        folder / "held_out.jsonl",
        folder / "cache",
        task.rule,
        RULES,
        DEMO_SIZES,
        MAX_NEW_TOKENS,
    )


def _make(folder: Path, seed: int) -> None:
    """Train the SFT model, sample stories from it, and write data of every kind."""
    training, held_out = task.split_prompts(seed)
    model = train_sft(folder, task.repeated(training, DEMO_SIZES.demonstrations), seed)
    drawn = draw(model, task.repeated(training, DEMO_SIZES.prompts), ANSWERS, seed + 1)
    rows: dict[DataKind, Callable[[Candidates], Iterator[Row]]] = {
        "pairs": pairs,
        "lists": lists,
        "labelled answers": answers,
        "demonstrations": demonstrations,
    }
    for kind, name in FILES.items():
        task.write_rows(folder / name, rows[kind](drawn))
    others = draw(model, task.repeated(held_out, DEMO_SIZES.samples), ANSWERS, seed + 2)
    task.write_rows(folder / "held_out.jsonl", pairs(others))


def pairs(drawn: Candidates) -> Iterator[Row]:
    """Yield the best and the worst story of each prompt, with the difference of their scores."""
    for row in drawn.pairs():
        prompt = row["prompt"]
        gap = task.rule(prompt, row["chosen"]) - task.rule(prompt, row["rejected"])
        yield {**row, "margin": gap}


def lists(drawn: Candidates) -> Iterator[Row]:
    """Yield all stories of each prompt with their scores, unless all are equally good."""
    for prompt, texts in drawn:
        scores = [task.rule(prompt, text) for text in texts]
        if len(set(scores)) > 1:
            yield {"prompt": prompt, "completions": texts, "scores": scores}


def answers(drawn: Candidates) -> Iterator[Row]:
    """Yield both stories of each pair as separate answers, labelled as good or bad."""
    for row in drawn.pairs():
        for side in ("chosen", "rejected"):
            yield {
                "prompt": row["prompt"],
                "completion": row[side],
                "label": side == "chosen",
            }


def demonstrations(drawn: Candidates) -> Iterator[Row]:
    """Yield the stories that score above 0."""
    for prompt, texts in drawn:
        for text in texts:
            if task.rule(prompt, text) > 0:
                yield {"prompt": prompt, "completion": text}


def story_task(folder: Path, seed: int) -> BenchTask:
    """Return the task of the story preferences: stories260K, judged by a rule on words."""
    held_out, training = split(SHARED / STORIES, folder, seed)
    kinds: tuple[DataKind, ...] = ("pairs", "lists", "demonstrations")
    return BenchTask(
        "stories",
        (SHARED / STORIES260K).parent,
        dict.fromkeys(kinds, training),
        held_out,
        folder / "cache",
        lambda _, text: story_rule(text),
        STORY_RULES,
        STORY_SIZES,
        max_new_tokens=48,
    )
