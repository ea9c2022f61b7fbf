"""Training material of bench_step.py: models with random weights, and pairs of token ids.

    python step_material.py WANTED.json

Creates a folder with `model/`, the store `pairs.store`, the reference's `cache/`, and for each
order of the pairs a file `ORDER.jsonl` with one update per line, exactly those of our planner, so
that every arm gets the same updates. `hh` are real HH pairs as GPT-2 tokens (LOGRATIO_SHARED,
default ../shared); for smaller vocabularies the ids are taken modulo the size, and are no longer
text. The other shapes are random ids of random lengths, without that folder. The cache has the
precision in which the arms train.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from shared_material import GPT2, HH, SHARED
from step_models import MODELS
from step_record import Pair
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data import DataReport, FeedSettings, PreferenceTokenizer, build_store
from logratio.data.feed import lay_out, micro_batches
from logratio.logps.batch import to_torch
from logratio.training import PrecomputeConfig, TrainConfig, precompute
from logratio.training.config import Precision
from logratio.training.models import AT_ONCE
from logratio.training.reference import cached_reference

LONGEST = 1024
ORDERS = ("shuffled", "length_grouped")


@dataclass(frozen=True)
class Wanted:
    """The requested material.

    Attributes:
        folder: where to create it.
        model: a name in `step_models.MODELS`.
        data: "hh" or a name in `SHAPES`.
        batch: pairs an update.
        updates: number of updates in the run; exactly as many pairs are created.
        seed: of the weights, the choice of the pairs and their order.
        threads: of torch.
        device: where the reference pass runs.
        precision: of the reference pass, as the arms train; a cache serves one precision only.
    """

    folder: str
    model: str
    data: str
    batch: int
    updates: int
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    precision: str = "fp32"


@dataclass(frozen=True)
class Shape:
    """Lengths to draw: medians in tokens, and the spread of their logarithm."""

    prompt: int
    completion: int
    spread: float


SHAPES = {
    "long-prompt": Shape(600, 100, 0.3),
    "short-prompt": Shape(30, 200, 0.5),
    "no-gain": Shape(1, 200, 0.0),  # nothing shared or padded
}


def drawn_pairs(shape: Shape, count: int, vocabulary: int, seed: int) -> list[Pair]:
    """Draw pairs of random ids; together a prompt and a completion have at most LONGEST."""
    random = np.random.default_rng(seed)

    def length(median: int, most: int) -> int:
        drawn = median * np.exp(shape.spread * random.standard_normal())
        return int(np.clip(round(drawn), 1, most))

    def ids(tokens: int) -> np.ndarray:
        return random.integers(3, vocabulary, tokens, dtype=np.int32)

    pairs: list[Pair] = []
    for _ in range(count):
        prompt = length(shape.prompt, LONGEST * 3 // 4)
        sides = [ids(length(shape.completion, LONGEST - prompt)) for _ in range(2)]
        pairs.append((ids(prompt), *sides))  # type: ignore[arg-type]
    return pairs


def real_pairs(
    tokenizer: PreferenceTokenizer, count: int, vocabulary: int, seed: int
) -> list[Pair]:
    """Return HH pairs in a seeded permutation."""
    store, _ = build_store([SHARED / HH], tokenizer)
    if count > len(store):
        raise ValueError(f"{count} pairs are needed, but only {len(store)} exist")
    chosen = np.random.default_rng(seed).permutation(len(store))[:count]
    pairs: list[Pair] = []
    for group in chosen:
        prompt, (better, worse), *_ = store.group(int(group))
        pairs.append((prompt % vocabulary, better % vocabulary, worse % vocabulary))
    return pairs


def write_model(folder: Path, name: str, data: str, seed: int) -> None:
    """Save a model of random weights: with GPT-2's tokenizer for `hh`, else with one of no words.

    Drawn pairs are ids already, so their tokenizer only has to have a name.
    """
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).save_pretrained(folder)
    if data != "hh":
        words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
        wordless = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        named = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=wordless, **named).save_pretrained(folder)
        return
    for file in (SHARED / GPT2).parent.glob("*.json"):
        if file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())


def write_store(path: Path, pairs: list[Pair], tokenizer: PreferenceTokenizer) -> Store:
    """Write pairs of ids to a store, as `logratio data build` does."""
    writer = StoreWriter(path)
    roles = np.array([ROLES.index("chosen"), ROLES.index("rejected")], dtype=np.uint8)
    for line, (prompt, *sides) in enumerate(pairs, 1):
        ids = np.concatenate([np.asarray(side, np.int32) for side in sides])
        lengths = np.array([len(side) for side in sides], dtype=np.uint32)
        writer.push(
            np.asarray(prompt, np.int32), ids, np.ones(len(ids), np.uint8), lengths, roles, 0, line
        )
    metadata = {
        "tokenizer": tokenizer.digest,
        "rules": tokenizer.rules.to_dict(),
        "report": DataReport(read=len(pairs), kept=len(pairs)).to_dict(),
        "files": ["drawn"],
        "datasets": [0],
    }
    return writer.finish(json.dumps(metadata))


def plan_updates(store: Store, order: str, batch: int, seed: int) -> list[np.ndarray]:
    """Return the groups of each update, in our planner's order."""
    budget = AT_ONCE["cpu"]  # the groups of an update do not depend on the budget
    settings = FeedSettings(groups_per_update=batch, token_budget=budget, order=order, seed=seed)
    plan = settings.plan(store, epoch=0)
    updates = -(-len(store) // batch)
    return [np.concatenate(micro_batches(plan, update)) for update in range(updates)]


def write_updates(path: Path, store: Store, updates: list[np.ndarray], sums: np.ndarray) -> None:
    """Write one update per line: ids of each pair and the reference's sums, `[G, 2]`."""
    with path.open("w") as file:
        for groups in updates:
            rows = []
            for group in groups.tolist():
                prompt, (chosen, rejected), *_ = store.group(group)
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                rows.append(
                    {name: ids.tolist() for name, ids in row.items()}
                    | {"reference": sums[group].tolist()}
                )
            file.write(json.dumps(rows) + "\n")


def reference_sums(wanted: Wanted, store: Store) -> tuple[np.ndarray, float]:
    """Fill the cache; return the reference's sums, `[G, 2]`, and the seconds it took."""
    folder = Path(wanted.folder)
    model, data, cache = (str(folder / name) for name in ("model", "pairs.store", "cache"))
    precision = cast(Precision, wanted.precision)
    start = perf_counter()
    precompute(
        PrecomputeConfig(model, [data], cache, device=wanted.device, precision=precision),
        show_progress=False,
    )
    seconds = perf_counter() - start
    config = TrainConfig(model, [data], folder / "none", cache=cache, precision=precision)
    reference = cached_reference(config, store)
    assert reference is not None
    batch = to_torch(lay_out(store, np.arange(len(store))))
    return reference.sums(batch).numpy().reshape(-1, 2), seconds


def make(wanted: Wanted) -> dict[str, Any]:
    """Fill the folder; return a summary: lengths, and the time of the reference pass."""
    folder = Path(wanted.folder)
    write_model(folder / "model", wanted.model, wanted.data, wanted.seed)
    tokenizer = PreferenceTokenizer.load(folder / "model")
    vocabulary, count = MODELS[wanted.model]().vocab_size, wanted.batch * wanted.updates
    if wanted.data == "hh":
        pairs = real_pairs(tokenizer, count, vocabulary, wanted.seed)
    else:
        pairs = drawn_pairs(SHAPES[wanted.data], count, vocabulary, wanted.seed)
    store = write_store(folder / "pairs.store", pairs, tokenizer)
    sums, seconds = reference_sums(wanted, store)
    for order in ORDERS:
        updates = plan_updates(store, order, wanted.batch, wanted.seed)
        write_updates(folder / f"{order}.jsonl", store, updates, sums)
    return {
        "prompt_tokens": store.prompt_lengths().tolist(),
        "completion_tokens": store.completion_lengths().reshape(-1, 2).tolist(),
        "vocabulary_modulo": wanted.data == "hh" and vocabulary < tokenizer.vocabulary_size,
        "reference_seconds": seconds,
    }


def main() -> None:
    """Create the material that the file on the command line requests."""
    wanted = Wanted(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(wanted.threads)
    (Path(wanted.folder) / "material.json").write_text(json.dumps(make(wanted)))


if __name__ == "__main__":
    main()
