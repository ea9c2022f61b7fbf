"""The word cache gives the tokenizer's ids, for every tokenizer and every text."""

import json
from pathlib import Path

import pytest
import tokenizers_for_tests as made
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from logratio._rust import PieceTable
from logratio.data.tokenization.word_cache import PATTERNS, PieceEncoder

ODD = "a bc,.'\u2019(\n\r\t \u00a0\u3000\u0301\u200bé日ß\uff71\u0966\u21671297<>|_s/</s>😀"
TEXTS = st.lists(
    st.text(st.sampled_from(ODD) | st.characters(codec="utf-8"), max_size=60)
    | st.lists(st.sampled_from(["the cat", " sat", "'s", "  ", "\n\n", "</s>", "12 "])).map(
        "".join
    ),
    max_size=6,
)


def encoder(tokenizer: Tokenizer) -> PieceEncoder:
    return PieceEncoder(tokenizer, json.loads(tokenizer.to_str()))


def with_pattern(pattern: str) -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def with_digits() -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


LOCAL = {"byte level": made.byte_level(), "digits": with_digits()}
LOCAL |= {f"pattern {number}": with_pattern(p) for number, p in enumerate(sorted(PATTERNS))}
ENCODERS = {name: (encoder(tokenizer), tokenizer) for name, tokenizer in LOCAL.items()}


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("name", LOCAL)
@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_pieces_have_the_ids_of_the_whole_text(name: str, texts: list[str]) -> None:
    pieces, tokenizer = ENCODERS[name]
    assert pieces.is_exact
    assert pieces.encode(texts) == expected(tokenizer, texts)


def prefix_space() -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unknown_pattern() -> Tokenizer:
    return with_pattern(r"\w+ ?|[^\w]+")


def spaced_token() -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.add_tokens(["cat sat"])
    return tokenizer


def greedy_token() -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", rstrip=True)])
    return tokenizer


def composing() -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.normalizer = normalizers.Replace("t s", "ts")
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [made.whole_text, made.word_level, prefix_space, unknown_pattern, spaced_token, greedy_token,
     composing],
)  # fmt: skip
def test_a_tokenizer_that_may_look_across_spaces_encodes_whole_texts(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    pieces = encoder(tokenizer)
    texts = ["the cat sat", "<mask> a  b", ""]
    assert not pieces.is_exact
    assert pieces.encode(texts) == expected(tokenizer, texts)


def test_real_text_has_the_ids_of_the_real_tokenizer(shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "models/gpt2-tokenizer/tokenizer.json"))
    pieces = encoder(tokenizer)
    lines = (shared / "data/formats/anthropic_hh.jsonl").read_text("utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line).values()]
    assert pieces.is_exact
    assert pieces.encode(texts) == expected(tokenizer, texts)
    assert pieces.encode(texts) == expected(tokenizer, texts)


def test_a_failure_in_the_tokenizer_leaves_nothing_half_learnt() -> None:
    table = PieceTable(1 << 20)

    def fails(pieces: list[str]) -> list[list[int]]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        table.encode(["a b"], fails)
    with pytest.raises(ValueError, match="ids of 1 pieces for 2"):
        table.encode(["a b"], lambda pieces: [[1]])
    ids, offsets = table.encode(["a b"], lambda pieces: [[len(piece)] for piece in pieces])
    assert (ids.tolist(), offsets.tolist()) == ([1, 2], [0, 2])
