"""The text of each token of a candidate."""

from collections.abc import Sequence

from logratio.data.tokenization.tokenizer import PreferenceTokenizer

_LONGEST = 4
"""Most tokens of one character: UTF-8 has at most four bytes for one, and a token at least one."""


class TokenTexts:
    """Divides the texts of candidates into those of their tokens.

    A token is decoded after another one, because decoders drop the space before the first token of
    a text. A character of several tokens is in the last of them, as in answers that are streamed.

    Keeps what it has decoded: make one for each request.
    """

    def __init__(self, tokenizer: PreferenceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.pad_id
        self._text_before = tokenizer.decode([self._before])
        self._known: dict[tuple[int, ...], str] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return one text per token; joined, they are the decoded text of all.

        Args:
            ids: Token ids of a candidate.

        Returns:
            The texts. A token that ends inside a character has an empty one.
        """
        whole = self._decoded(tuple(ids))
        texts: list[str] = []
        start, pending = 0, ()  # type: int, tuple[int, ...]
        for number in ids:
            pending = (*pending[1 - _LONGEST :], number)
            text = self._at(whole, start, pending)
            texts.append(text)
            if text:
                start, pending = start + len(text), ()
        if texts:
            texts[-1] += whole[start:]  # a truncated candidate may end inside a character
        return texts

    def _at(self, whole: str, start: int, pending: tuple[int, ...]) -> str:
        """Return the text of the last tokens if it continues the whole text at `start`, else "".

        The bytes of an unfinished character are decoded as U+FFFD, which is not in the whole text.
        If it is, an earlier token may already have been given it: so the first of the tokens may be
        left out.
        """
        for first in range(len(pending)):
            text = self._text(pending[first:])
            if text and whole.startswith(text, start):
                return text
        return ""

    def _text(self, ids: tuple[int, ...]) -> str:
        if (text := self._known.get(ids)) is None:
            text = self._known[ids] = self._decoded(ids)
        return text

    def _decoded(self, ids: tuple[int, ...]) -> str:
        text = self._tokenizer.decode([self._before, *ids])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return self._tokenizer.decode(ids)
