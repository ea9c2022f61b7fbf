"""Time and memory of an update with each method, against DPO on the same pairs.

Both arms live in one process, have the same weights, and take turns (A B B A …) on the same random
pairs. The log-probs of the reference are known, as with a cache, except for methods that compare
distributions. Time is CPU time of one thread, which depends little on other work on the machine.
Memory is the peak of an update above weights and moments: gradients, activations, logits.

Methods for lists get the pairs as lists of two. Methods for labelled answers get both answers of
each pair, each with its prompt, and methods for demonstrations the chosen ones.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from step_memory import Memory
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data import Feed, FeedSettings, MicroBatch
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch
from logratio.logps.completion import transformer
from logratio.training import TrainConfig, load_model
from logratio.training.methods.objective import Objective
from logratio.training.reference import FrozenReference, PerToken, Reference
from logratio.training.update import Updater


@dataclass(frozen=True)
class CostSizes:
    """Sizes of the measurement, which a row of the results records."""

    rounds: int = 10
    pairs: int = 4
    prompt: int = 60
    completion: int = 60
    vocabulary: int = 32_000
    width: int = 80
    layers: int = 4


COST_SIZES = CostSizes()
M_MMAP_THRESHOLD = -3
"""Of mallopt: larger tensors get separate pages, which a peak counts once and exactly."""
MARGIN, SCORE = 2.0, (2.0, 0.0)
CHOSEN, REJECTED, MISMATCHED, DEMONSTRATION = map(
    ROLES.index, ("chosen", "rejected", "mismatched", "demonstration")
)


class KnownReference(PerToken):
    """A reference that scores each batch once, and then gives the same log-probs."""

    def __init__(self, reference: FrozenReference) -> None:
        self.reference = reference
        self.known: dict[bytes, Tensor] = {}

    def logps(self, batch: Batch) -> Tensor:
        """Return log-probs of tokens, detached, float32 `[S]`."""
        rows = batch.targets.rows.tobytes()
        if rows not in self.known:
            self.known[rows] = self.reference.logps(batch)
        return self.known[rows]


class Arm:
    """An objective with a policy, its optimizer and the micro-batches of one update."""

    def __init__(self, name: str, model: Path, sizes: CostSizes, attention: ExitStack) -> None:
        config = TrainConfig(model, "-", "unused", loss=name, precision="fp32")
        self.objective = Objective.of(config)
        store = store_for(self.objective, sizes)

        def loaded() -> nn.Module:
            found = load_model(model)
            attention.enter_context(shared_prompts(transformer(found)))
            return found

        reference = reference_for(self.objective, loaded)
        policy = loaded().requires_grad_()
        self.updater = Updater(config, store, policy, reference, "shared")
        settings = FeedSettings(groups_per_update=len(store), token_budget=1_000_000)
        self.batches: list[MicroBatch] = list(Feed(store, settings, depth=0))

    def seconds(self) -> float:
        """Run one update, and return its CPU seconds."""
        start = process_time()
        self.updater.update(1, 1e-6, iter(self.batches))
        return process_time() - start

    def memory(self) -> int:
        """Return the peak of an update above weights and moments, in bytes."""
        memory = Memory("cpu")
        self.updater.optimizer.zero_grad(set_to_none=True)
        memory.mark_policy()
        memory.begin()
        self.seconds()
        memory.end()
        return memory.peak - memory.policy


def reference_for(objective: Objective, loaded: Callable[[], nn.Module]) -> Reference | None:
    """Return the reference that an objective needs."""
    if not objective.needs_reference:
        return None
    frozen = FrozenReference(loaded())
    return frozen if objective.needs_divergences else KnownReference(frozen)


def store_for(objective: Objective, sizes: CostSizes) -> Store:
    """Draw the pairs, in the form that an objective trains on."""
    random, writer = np.random.default_rng(0), StoreWriter()

    def ids(count: int) -> np.ndarray:
        return random.integers(3, sizes.vocabulary, count).astype(np.int32)

    drawn = [(ids(sizes.prompt), ids(2 * sizes.completion)) for _ in range(sizes.pairs)]
    for line, (prompt, both) in enumerate(drawn):
        chosen, rejected = np.split(both, 2)
        other = drawn[line - 1][1][: sizes.completion]
        for roles, answers in groups_of(objective, chosen, rejected, other):
            lengths = np.full(len(roles), sizes.completion, np.uint32)
            values = np.full((len(roles), 4), np.nan, np.float32)
            if roles == [CHOSEN, REJECTED]:
                values[:, 0], values[0, 2] = SCORE, MARGIN
            counted = np.ones(len(answers), np.uint8)
            kinds = np.array(roles, np.uint8)
            writer.push(prompt, answers, counted, lengths, kinds, 0, line, values)
    return writer.finish()


def groups_of(
    objective: Objective, chosen: np.ndarray, rejected: np.ndarray, other: np.ndarray
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the groups of a pair: the roles and the ids of their answers."""
    if objective.data == "demonstrations":
        yield [DEMONSTRATION], chosen
    elif objective.data == "labelled answers":
        for role, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
            added = [MISMATCHED] if objective.needs_mismatches else []
            yield [role, *added], np.concatenate([answer, *[other] * len(added)])
    else:
        yield [CHOSEN, REJECTED], np.concatenate([chosen, rejected])


def asked(objective: Objective) -> list[str]:
    """Return what the mathematics of an objective asks for that DPO's does not, or the reverse."""
    reasons = {
        "a pass that scores the whole update first": objective.needs_statistics,
        "sums of squared probabilities": objective.needs_confidences,
        "the reference's distributions": objective.needs_divergences,
        "weights of tokens": objective.weighs_tokens,
        "mismatched answers": objective.needs_mismatches,
        "a prompt for each answer": objective.data == "labelled answers",
        "one answer instead of two": objective.data == "demonstrations",
        "no reference": not objective.needs_reference,
    }
    return [reason for reason, holds in reasons.items() if holds]


class Bench:
    """The model of all arms, and the measurement of one method."""

    def __init__(self, folder: Path, sizes: CostSizes = COST_SIZES) -> None:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
        torch.manual_seed(0)
        self.model, self.sizes = folder / "model", sizes
        shape = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        AutoModelForCausalLM.from_config(shape).save_pretrained(self.model)

    def against_dpo(self, name: str) -> dict[str, Any]:
        """Return the ratios of time and memory to DPO's, and the raw measurements."""
        with ExitStack() as attention:
            arms = [Arm(one, self.model, self.sizes, attention) for one in ("dpo", name)]
            for arm in arms:
                arm.seconds()  # the first update allocates
            seconds = self._turns(arms)
            memory = [[arm.memory() for arm in arms] for _ in range(3)]
        ratios = [theirs / dpo for dpo, theirs in seconds]
        return {
            "time_ratio": median(ratios),
            "fastest_ratio": fastest(seconds, 1) / fastest(seconds, 0),
            "memory_ratio": median(theirs / dpo for dpo, theirs in memory),
            "asks": asked(arms[1].objective),
            "cpu_seconds": seconds,
            "bytes": memory,
            "parameters": sum(one.numel() for one in arms[0].updater.parameters),
        }

    def _turns(self, arms: list[Arm]) -> list[list[float]]:
        """Return the seconds of both arms in each round; they take turns in being the first."""
        rows = []
        for round_ in range(self.sizes.rounds):
            order = arms[::-1] if round_ % 2 else arms
            spent = [arm.seconds() for arm in order]
            rows.append(spent[::-1] if round_ % 2 else spent)
        return rows


def fastest(seconds: list[list[float]], arm: int) -> float:
    """Return the seconds of an arm's fastest update, which other work disturbed least."""
    return min(row[arm] for row in seconds)
