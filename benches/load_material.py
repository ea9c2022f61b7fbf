"""The models that bench_load.py serves, and its requests."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from load_client import Request

if TYPE_CHECKING:
    from bench_rank import Shape

BUNDLE = "ours-f32"
"""Folder of the bundle, as bench_rank.py names it."""
_WORDS_SEED = 11
_COMPLETE = "complete"


def models(folder: Path, name: str) -> Path:
    """Return the folder of a shape's models, bundle and padded graphs; write them the first time.

    Args:
        folder: Where they are kept.
        name: Layers × width - thousands of words, such as 6x384-50k.
    """
    made = folder / name
    if not (made / _COMPLETE).exists():
        from bench_rank import material

        made.mkdir(parents=True, exist_ok=True)
        print(f"writing models of {name}", file=sys.stderr, flush=True)
        material(made, _shape(name), 0.1, [])
        (made / _COMPLETE).touch()
    return made


def _shape(name: str) -> "Shape":
    from bench_rank import SHAPES, Shape

    shapes = {shape.name: shape for shape in (*SHAPES, Shape(2, 64, 32000))}
    if name not in shapes:
        sys.exit(f"no shape {name}: there are {', '.join(shapes)}")
    return shapes[name]


@dataclass(frozen=True)
class Texts:
    """Texts of an exact number of tokens.

    Attributes:
        words: Words that are one token each, also next to each other.
    """

    words: list[str]

    @classmethod
    def of(cls, bundle: Path) -> "Texts":
        """Find the words of a bundle's tokenizer."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        pieces = [piece[1:] for piece in tokenizer.get_vocab() if piece.startswith("▁")]
        words = sorted(
            word for word in pieces if len(word) > 2 and word.isascii() and word.isalpha()
        )
        single = [word for word in words if len(tokenizer.encode(f"the {word} the").ids) == 4]
        return cls(single)

    def text(self, random: np.random.Generator, tokens: int) -> str:
        """Draw a text."""
        return " ".join(random.choice(self.words, size=tokens).tolist())

    def body(
        self, random: np.random.Generator, prompt: int, candidates: int, length: int
    ) -> dict[str, object]:
        """Draw a rerank request: tokens of the prompt, candidates, tokens of each (with EOS)."""
        documents = [" " + self.text(random, length - 1) for _ in range(candidates)]
        return {"query": self.text(random, prompt - 1), "documents": documents}

    def request(
        self, random: np.random.Generator, kind: str, prompt: int, candidates: int, length: int
    ) -> Request:
        """Draw a request to the rerank route."""
        return Request(kind, json.dumps(self.body(random, prompt, candidates, length)).encode())


def small_requests(texts: Texts, count: int, seed: int = _WORDS_SEED) -> list[Request]:
    """Draw requests of different small sizes: 2 to 6 candidates of 8 to 24 tokens.

    Their prompts have 16 to 48 tokens. All texts differ, so that nothing could be cached.
    """
    random = np.random.default_rng(seed)
    return [
        texts.request(
            random,
            "small",
            int(random.integers(16, 49)),
            int(random.integers(2, 7)),
            int(random.integers(8, 25)),
        )
        for _ in range(count)
    ]
