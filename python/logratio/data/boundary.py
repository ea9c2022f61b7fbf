"""Where the prompt's ids end and a completion's begin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from logratio.data.scripts import Piece


@dataclass(frozen=True, slots=True)
class Tail:
    """The ids behind a prompt.

    Attributes:
        ids: Every token.
        mask: 1 where a token counts.
        moved: Whether the ids of what stands before change when the text goes on.
    """

    ids: list[int]
    mask: list[int]
    moved: bool


def tail_of(
    prompt: list[int],
    pieces: Sequence[Piece],
    running: Sequence[list[int]],
    encode: Callable[[str], list[int]],
) -> Tail:
    """Cut a completion's ids out of the ids of the whole text.

    A tokenizer may merge the end of the prompt with the beginning of the answer. The prompt's ids
    must not depend on the answer, so such an answer is encoded on its own instead.

    Args:
        prompt: Ids of the prompt's text.
        pieces: The completion's text, cut where counting begins and ends.
        running: For each piece, ids of the prompt and all pieces up to it.
        encode: Text to ids, without added special tokens.
    """
    ids: list[int] = []
    mask: list[int] = []
    moved = False
    before = prompt
    for piece, whole in zip(pieces, running, strict=True):
        if whole[: len(before)] == before:
            own = whole[len(before) :]
        else:
            own = encode(piece.text)
            moved = True
        ids += own
        mask += [int(piece.counts)] * len(own)
        before = whole
    return Tail(ids, mask, moved)
