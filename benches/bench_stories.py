"""Check that the policy learns story preferences with stories3M, over three seeds.

    python benches/bench_stories.py            # prints a table, appends to benches/results/

Needs the material in LOGRATIO_SHARED (default ../shared). The ground truth is a rule on words (see
its README); generations and best-of-8 are scored by the rule, not by the model.
"""

import json
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from shared_material import SHARED, STORIES, STORIES3M, check_shared
from tokenizers import Tokenizer

from logratio.data import TokenizationRules
from logratio.export.export import export_bundle
from logratio.export.plan import ExportConfig
from logratio.serving import Reranker
from logratio.training import (
    EvaluateConfig,
    PrecomputeConfig,
    TrainConfig,
    evaluate,
    load_model,
    precompute,
    train,
)
from logratio.training.evaluation import sample_completions

POSITIVE = re.compile(
    r"\b(happy|smil\w+|laugh\w*|fun|love\w*|hug\w*|glad|thank\w*|nice|kind|great|proud)\b", re.I
)
NEGATIVE = re.compile(
    r"\b(sad|cr(y|ied|ying)|scared|hurt|angry|mad|afraid|lost|broke\w*|bad|mean|worried)\b", re.I
)
RULES = TokenizationRules(append_eos=False)  # the stories are truncated at 48 tokens
BETA, HELD_OUT, PROMPTS, CANDIDATES, NEW_TOKENS = 0.1, 173, 96, 8, 48
RESULTS = Path(__file__).parent / "results" / "stories.jsonl"


@dataclass(frozen=True)
class StoryResult:
    """One seed's figures; shares are in [0, 1], the rest is the rule's score or nats."""

    seed: int
    accuracy: float
    kl: float
    positive_before: float
    positive_after: float
    best_of_reward: float
    best_of_random: float
    best_of_oracle: float
    seconds: float

    @property
    def recovered(self) -> float:
        """Position of the reward between a random choice (0) and the oracle (1)."""
        return (self.best_of_reward - self.best_of_random) / (
            self.best_of_oracle - self.best_of_random
        )


def rule(text: str) -> int:
    """Score a story: positive words minus negative ones."""
    return len(POSITIVE.findall(text)) - len(NEGATIVE.findall(text))


def run_seed(seed: int, shared: Path, folder: Path) -> StoryResult:
    """Split, precompute, train, evaluate, export and rerank with one seed."""
    torch.set_num_threads(1)  # the model is small
    start = time.monotonic()
    model = shared / "models" / "stories3M"
    held_out, training = split(shared / "data" / "story_prefs.jsonl", folder, seed)
    cache, policy, bundle = folder / "cache", folder / "policy", folder / "bundle"
    precompute(PrecomputeConfig(model, [training], cache, rules=RULES))
    train(
        TrainConfig(
            model, [training], policy, cache=cache, beta=BETA, lr=1e-5, batch_size=8, epochs=3,
            save_every=0, seed=seed, rules=RULES,
        )
    )  # fmt: skip
    measured = evaluate(
        EvaluateConfig(
            policy, model, [held_out], beta=BETA, samples=PROMPTS, max_new_tokens=NEW_TOKENS,
            seed=seed, rules=RULES,
        )
    )  # fmt: skip
    assert measured.kl is not None
    lines = held_out.read_text().splitlines()[:PROMPTS]
    prompts = [json.loads(line)["prompt"] for line in lines]
    drawn = [texts(model, prompts, seed + n) for n in range(CANDIDATES)]
    export_bundle(ExportConfig(policy, model, bundle, BETA))
    reward, random, oracle = best_of(bundle, prompts, drawn)
    return StoryResult(
        seed=seed,
        accuracy=measured.accuracy,
        kl=measured.kl.nats,
        positive_before=share_positive(drawn[0]),
        positive_after=share_positive(texts(policy, prompts, seed)),
        best_of_reward=reward,
        best_of_random=random,
        best_of_oracle=oracle,
        seconds=time.monotonic() - start,
    )


def run_seeds(seeds: range, shared: Path, folder: Path) -> list[StoryResult]:
    """Run several seeds, each in a process with one thread, one process per core."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_seed, seed, shared, folder / str(seed)) for seed in seeds]
        return [future.result() for future in running]


def split(data: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Hold out a random fifth of the pairs; return (held out, training)."""
    lines = data.read_text().splitlines(keepends=True)
    order = np.random.default_rng(seed).permutation(len(lines))
    folder.mkdir(parents=True, exist_ok=True)
    held_out, training = folder / "held_out.jsonl", folder / "training.jsonl"
    held_out.write_text("".join(lines[i] for i in order[:HELD_OUT]))
    training.write_text("".join(lines[i] for i in order[HELD_OUT:]))
    return held_out, training


def texts(model: Path, prompts: list[str], seed: int) -> list[str]:
    """Draw one story for each prompt."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    drawn = sample_completions(
        load_model(model), ids, max_new_tokens=NEW_TOKENS, stop_ids=[2], seed=seed
    )
    starts = tokenizer.decode_batch(ids)
    wholes = tokenizer.decode_batch([a + b for a, b in zip(ids, drawn, strict=True)])
    return [whole[len(start) :] for start, whole in zip(starts, wholes, strict=True)]


def share_positive(stories: list[str]) -> float:
    """Return the share of stories whose score is above 0."""
    return float(np.mean([rule(story) > 0 for story in stories]))


def best_of(bundle: Path, prompts: list[str], drawn: list[list[str]]) -> tuple[float, float, float]:
    """Return the rule's mean score of the reward's, a random and the rule's own choice."""
    reranker = Reranker.load(bundle)
    truth = np.array([[rule(story) for story in stories] for stories in drawn]).T
    rewards = np.array(
        [
            [score.reward for score in reranker.score(prompt, [stories[i] for stories in drawn])]
            for i, prompt in enumerate(prompts)
        ]
    )
    picked = truth[np.arange(len(prompts)), rewards.argmax(axis=1)]
    return float(picked.mean()), float(truth.mean()), float(truth.max(axis=1).mean())


def interval(values: list[float]) -> str:
    """Write a mean with its 95 % t-interval over three seeds."""
    error = 4.303 * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {error:.3f}"


def main() -> None:
    """Run three seeds, print the table and store the raw rows."""
    check_shared(STORIES, STORIES3M)
    with tempfile.TemporaryDirectory() as folder:
        results = run_seeds(range(3), SHARED.resolve(), Path(folder))
    print(*results, sep="\n")
    for name in ("accuracy", "kl", "positive_before", "positive_after", "recovered"):
        print(f"{name:16} {interval([getattr(result, name) for result in results])}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(asdict(result)) + "\n" for result in results)


if __name__ == "__main__":
    main()
