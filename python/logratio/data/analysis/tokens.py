"""Which tokens the data uses, and how its completions begin and end."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from logratio._rust import Census, Store

if TYPE_CHECKING:
    from logratio.data.tokenization import PreferenceTokenizer

_TOP = 10


@dataclass(frozen=True, slots=True)
class TokenUse:
    """Counts over all tokens, each prompt once.

    Attributes:
        tokens: All of them.
        used: Distinct ids.
        vocabulary: Ids that the tokenizer has; None where none was given.
        unknown: Tokens whose id the tokenizer does not have; 0 where none was given.
        top: The ids used most, as (id, count).
        top_texts: What these ids are, in the same order; empty without a tokenizer.
        special: How often each special token stands in the data: those that do.
        ended: Completions that end with one of the tokenizer's stop tokens, or as the chat
            template ends an answer, where white space follows that token; None without any.
        stops: These tokens, as text.
        completions: All of them.
        compared: Groups of two completions or more.
        same_start: Of these, groups whose completions all begin with one token.
        common: Tokens that all completions of a compared group begin with, added up.
    """

    tokens: int
    used: int
    vocabulary: int | None
    unknown: int
    top: tuple[tuple[int, int], ...]
    top_texts: tuple[str, ...]
    special: Mapping[str, int]
    ended: int | None
    stops: tuple[str, ...]
    completions: int
    compared: int
    same_start: int
    common: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def token_use(store: Store, tokenizer: "PreferenceTokenizer | None" = None) -> TokenUse:
    """Count the tokens of a store, one pass over all of them.

    Args:
        store: Any.
        tokenizer: The one that made it: names ids, and says how many there are.
    """
    census = Census(store)
    uses, ends = census.uses, census.ends
    top = np.argsort(-uses, kind="stable")[:_TOP]
    top = top[uses[top] > 0]
    special, vocabulary, ended, unknown = {}, None, None, 0
    stops: list[int] = []
    if tokenizer is not None:
        vocabulary = tokenizer.vocabulary_size
        unknown = int(uses[vocabulary:].sum()) + census.beyond
        named = tokenizer.special_ids()
        special = {
            text: int(uses[number])
            for text, number in named.items()
            if number < len(uses) and uses[number]
        }
        stops = [number for number in tokenizer.stop_ids if number < vocabulary]
        if stops:
            last = {*stops, *tokenizer.closing_ids[-1:]}
            ended = sum(int(ends[number]) for number in last if number < len(ends))
    return TokenUse(
        tokens=store.tokens,
        used=int(np.count_nonzero(uses)),
        vocabulary=vocabulary,
        unknown=unknown,
        top=tuple((int(number), int(uses[number])) for number in top),
        top_texts=tuple(tokenizer.decode([int(number)]) for number in top) if tokenizer else (),
        special=special,
        ended=ended,
        stops=tuple(tokenizer.decode([number]) for number in stops) if tokenizer else (),
        completions=store.completions,
        compared=census.compared,
        same_start=census.same_start,
        common=census.common,
    )
