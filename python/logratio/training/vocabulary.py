"""Do a tokenizer's ids fit the models, and does transformers give the same ones?"""

import json
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from logratio._rust import Census, Store
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_files import read_tokenizer
from logratio.errors import LogratioError
from logratio.training.config import PathLike
from logratio.training.fingerprint import tensor_shapes
from logratio.training.models import base_folder, quietly

_PROBES = (
    "The quick brown fox, isn't it?  Two  spaces;\ta tab\n\nand 12,345.67 lines\r\n",
    " leading and trailing ",
    "naïve e\u0301 漢字 カナ العربية हिन्दी 🙂👩‍👩‍👧 ﬁ Ⅳ \u00a0\u200b x",
    "def f(x):\n    return [x, {'a': 1}]  # done",
)
_MOST_TOKENS = 64
"""Added tokens that are tried, inside and between words."""


class VocabularyError(LogratioError, ValueError):
    """Token ids that a model has no embedding for, or that another tokenizer would not give."""


def embedding_rows(folder: PathLike) -> int | None:
    """Count the ids that a model has an embedding for, without its weights.

    Returns:
        The number of its config, or of an adapter that brings a larger embedding of its own; None
        where the config names none.
    """
    config = json.loads((base_folder(folder) / "config.json").read_text("utf-8"))
    text = config.get("text_config") or {}
    rows = config.get("vocab_size") or text.get("vocab_size")
    if not isinstance(rows, int):
        return None
    own = [shape[0] for name, shape in _adapter_shapes(Path(folder)) if "embed_tokens" in name]
    return max([rows, *own])


def _adapter_shapes(folder: Path) -> list[tuple[str, list[int]]]:
    """List an adapter's tensors that replace one of the base."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return []
    return [(name, shape) for name, shape in tensor_shapes(path) if "lora_" not in name]


def check_embedding(folder: PathLike, tokenizer: PreferenceTokenizer, store: Store) -> None:
    """Refuse data whose ids are beyond a model's embedding.

    An embedding with more rows than the tokenizer has ids is usual: it is padded.

    Raises:
        VocabularyError: With the largest id that the data uses, and what it stands for.
    """
    rows = embedding_rows(folder)
    if rows is None or tokenizer.vocabulary_size <= rows:
        return
    used = np.flatnonzero(Census(store).uses)
    largest = int(used[-1]) if len(used) else -1
    if largest >= rows:
        raise VocabularyError(
            f"{folder}: the model has an embedding for {rows:,} ids, and the data uses the id "
            f"{largest:,} ({tokenizer.decode([largest])!r}): its tokenizer knows "
            f"{tokenizer.vocabulary_size:,} ids. Take the tokenizer that the model was trained "
            "with, or resize the model: model.resize_token_embeddings(len(tokenizer))"
        )


def check_reference(
    reference: PathLike, model: PathLike, tokenizer: PreferenceTokenizer, store: Store
) -> None:
    """Refuse a reference for which the data's ids mean something else, or nothing.

    Raises:
        VocabularyError: Its embedding is too small, or its own tokenizer gives other ids.
    """
    check_embedding(reference, tokenizer, store)
    folder = Path(reference)
    own = next((f for f in (folder, base_folder(folder)) if (f / "tokenizer.json").exists()), None)
    if own is None or own.resolve() == Path(model).resolve():
        return
    theirs = read_tokenizer(own)
    if theirs.digest == tokenizer.digest:
        return
    ours, other = tokenizer.files.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if (elsewhere := other.get(token)) not in (number, None):
            raise VocabularyError(
                f"{own}: its tokenizer is another one than that of {model}: {token!r} is the id "
                f"{elsewhere:,} there and {number:,} here, so log-probs of the same ids cannot be "
                "compared"
            )


def check_ids(folder: PathLike, tokenizer: PreferenceTokenizer) -> None:
    """Refuse a folder that transformers, as it is installed, reads otherwise than we do.

    A folder that transformers cannot read is not compared.

    Raises:
        VocabularyError: With a text and both ids.
    """
    try:
        with quietly():
            config = AutoConfig.from_pretrained(
                base_folder(folder), local_files_only=True, trust_remote_code=False
            )
            theirs = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception:  # whatever a library raises for a folder that it does not know
        return
    ours = tokenizer.files.tokenizer
    added = [token.content for token in ours.get_added_tokens_decoder().values()]
    texts = [*_PROBES, *(f"a {token}b {token} c" for token in added[-_MOST_TOKENS:])]
    for text, known in zip(texts, theirs(texts)["input_ids"], strict=True):
        ids = ours.encode(text).ids
        if ids != known:
            raise VocabularyError(
                f"{folder}: transformers reads {text!r} as the ids {_shown(known)}, and here it "
                f"would be {_shown(ids)}. Save the tokenizer's own backend, and it is read alike: "
                "AutoTokenizer.from_pretrained(folder).backend_tokenizer.save('tokenizer.json'), "
                'with "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
            )


def _shown(ids: list[int]) -> str:
    return f"{ids[:12]}{' …' if len(ids) > 12 else ''}"
