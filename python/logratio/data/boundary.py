"""Where the prompt's ids end and a completion's begin."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from logratio.data.scripts import Script


@dataclass(frozen=True, slots=True)
class Tail:
    """The ids behind a prompt.

    Attributes:
        ids: Every token.
        mask: 1 where a token counts.
        moved: Whether the ids before it change when the text goes on.
    """

    ids: list[int]
    mask: list[int]
    moved: bool


def tails_of(
    script: Script,
    running: Sequence[list[int]],
    encode: Callable[[list[str]], list[list[int]]],
) -> Iterator[Tail]:
    """Cut each completion's ids out of the ids of the whole text.

    A tokenizer may merge the end of the prompt with the beginning of the answer. The prompt's ids
    must not depend on the answer, so such an answer is encoded on its own instead.

    Args:
        script: The record as text.
        running: Ids of each of the script's running texts.
        encode: Texts to ids, without added special tokens.
    """
    prompt, *rest = running
    texts = iter(rest)
    for pieces in script.completions:
        moved = False
        ids: list[int] = []
        mask: list[int] = []
        before = prompt
        for piece, whole in zip(pieces, islice(texts, len(pieces)), strict=True):
            if whole[: len(before)] == before:
                own = whole[len(before) :]
            else:
                own = encode([piece.text])[0]
                moved = True
            ids += own
            mask += [int(piece.counts)] * len(own)
            before = whole
        yield Tail(ids, mask, moved)
