"""Generated data: tiny stories about animals, and a hidden rule that scores them.

The rule is the ground truth: it creates the preferences and scores the generations. No model sees
it, so the demo's results are independent of the models.
"""

import json
import random
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

ANIMALS = ["cat", "dog", "fox", "owl", "bear", "duck", "frog", "mouse", "goat", "crow"]
NAMES = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jun"]
PLACES = ["river", "forest", "market", "school", "garden", "castle", "harbour", "meadow"]
GOOD = ["happy", "proud", "kind", "brave", "calm", "glad"]
BAD = ["sad", "angry", "scared", "lost", "rude", "tired"]
ACTIONS = ["sang", "danced", "slept", "waited", "read", "cooked"]
THINGS = ["song", "book", "cake", "kite", "drum", "lamp"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
BOS, EOS = 1, 2


HELD_OUT_SHARE = 0.25


def split_prompts(seed: int) -> tuple[list[str], list[str]]:
    """Shuffle the 800 prompts and split them into training and held-out prompts."""
    everything = [
        f"{name} the {animal} went to the {place} ."
        for name, animal, place in product(NAMES, ANIMALS, PLACES)
    ]
    random.Random(seed).shuffle(everything)
    held_out = int(len(everything) * HELD_OUT_SHARE)
    return everything[held_out:], everything[:held_out]


def repeated(prompts: list[str], count: int) -> list[str]:
    """Return `count` prompts, repeating the list as needed."""
    return list(islice(cycle(prompts), count))


def completion(prompt: str, draw: random.Random) -> str:
    """Continue a story at random, with good and bad moods."""
    animal = prompt.split()[2]
    return " " + " ".join(_sentence(animal, draw) for _ in range(draw.randint(2, 4)))


def _sentence(animal: str, draw: random.Random) -> str:
    who = animal if draw.random() < 0.7 else draw.choice(ANIMALS)
    mood = draw.choice(GOOD if draw.random() < 0.5 else BAD)
    return draw.choice(
        [
            f"the {who} was {mood} .",
            f"the {who} {draw.choice(ACTIONS)} and felt {mood} .",
            f"a {mood} friend gave the {who} a {draw.choice(THINGS)} .",
            f"the {who} {draw.choice(ACTIONS)} in the {draw.choice(PLACES)} .",
        ]
    )


def rule(prompt: str, text: str) -> int:
    """Score a story: good moods minus bad ones, minus 2 for every other animal."""
    words, animal = text.split(), prompt.split()[2]
    good = sum(word in GOOD for word in words)
    bad = sum(word in BAD for word in words)
    strangers = sum(word in ANIMALS and word != animal for word in words)
    return good - bad - 2 * strangers


def demonstrations(prompts: list[str], seed: int) -> Iterator[dict[str, str]]:
    """Yield a prompt/completion row for SFT per prompt."""
    draw = random.Random(seed)
    for prompt in prompts:
        yield {"prompt": prompt, "completion": completion(prompt, draw)}


def write_rows(path: Path, rows: Iterator[dict[str, str]] | list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vocabulary() -> list[str]:
    """Return every word of the language, special tokens first."""
    grammar = ["the", "a", "was", "and", "felt", "friend", "gave", "in", "went", "to", "."]
    return [*SPECIAL, *grammar, *ANIMALS, *NAMES, *PLACES, *GOOD, *BAD, *ACTIONS, *THINGS]


def save_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer of the language to `folder`."""
    words = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1))


def save_model(folder: Path, seed: int) -> Path:
    """Write a small untrained Llama with the language's tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from logratio.training.models import quietly

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    with quietly():
        LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
