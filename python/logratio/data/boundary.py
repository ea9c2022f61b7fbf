"""Where the prompt's ids end and a completion's begin.

Equal ids are not enough: a token for unknown text replaces any amount of text. Where the
last token before a completion would take in the beginning of it, that beginning would vanish.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from logratio.data.pieces import PieceEncoder
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
    encoder: PieceEncoder,
) -> Iterator[Tail]:
    """Cut each completion's ids out of the ids of the whole text.

    A tokenizer may merge the end of the prompt with the beginning of the answer. The prompt's ids
    must not depend on the answer, so such an answer is encoded on its own instead.

    Args:
        script: The record as text.
        running: Ids of each of the script's running texts, without added special tokens.
        encoder: What made them.
    """
    prompt, *rest = running
    texts = iter(rest)
    for pieces in script.completions:
        moved = False
        ids: list[int] = []
        mask: list[int] = []
        before, text = prompt, script.prompt
        for piece, whole in zip(pieces, islice(texts, len(pieces)), strict=True):
            if _goes_on(before, whole, text, piece.text, encoder):
                own = whole[len(before) :]
            else:
                own = encoder.encode([piece.text])[0]
                moved = True
            ids += own
            mask += [int(piece.counts)] * len(own)
            before, text = whole, text + piece.text
        yield Tail(ids, mask, moved)


def _goes_on(
    before: list[int], whole: list[int], text: str, more: str, encoder: PieceEncoder
) -> bool:
    """Say whether the tokens of a text stand for the same text when more follows."""
    if whole[: len(before)] != before:
        return False
    if not before or before[-1] != encoder.unknown_id:
        return True
    return encoder.end_of(text + more, len(before)) <= len(text)
