"""The data report of a store that is a file."""

import json
from pathlib import Path

from logratio._rust import Store
from logratio.data.analysis.whole import Analysis, analyse
from logratio.data.tokenization import PreferenceTokenizer
from logratio.data.truncation import TokenizationRules
from logratio.errors import LogratioError


class OtherTokenizerError(LogratioError, ValueError):
    """A store was made with another tokenizer than the one that is to name its tokens."""


def analyse_store(
    path: Path, *, tokenizer: Path | None = None, threshold: float | None = None
) -> Analysis:
    """Describe a sealed store, with the account that it carries.

    Args:
        path: The store.
        tokenizer: Folder of the tokenizer that made it; None: tokens have no names.
        threshold: As `analyse` takes it.

    Raises:
        OtherTokenizerError: Another tokenizer made it.
        OSError: A file cannot be read.
        ValueError: The store is damaged, the tokenizer malformed, or the threshold impossible.
    """
    store = Store.open(path)
    named = None
    if tokenizer is not None:
        named = PreferenceTokenizer.load(tokenizer, TokenizationRules(append_eos=False))
        if json.loads(store.metadata).get("tokenizer", named.digest) != named.digest:
            raise OtherTokenizerError(f"{path} was made with another tokenizer than {tokenizer}")
    return analyse(store, tokenizer=named, threshold=threshold)
