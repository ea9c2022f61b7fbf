"""No token of an answer is lost at the boundary to its prompt, with any tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers_for_tests import (
    SENTENCES,
    SPECIAL,
    byte_level,
    save,
    unigram,
    whole_text,
    word_level,
    word_piece,
)

from logratio.data import DataReport, PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.analysis import analyse
from logratio.data.store.ingest import _view, touch, touching

UNKNOWN = 0


def bytes_without_an_alphabet() -> Tokenizer:
    """Byte-level BPE with only the bytes of its training, and a token for unknown ones."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def fused() -> Tokenizer:
    tokenizer = whole_text()
    tokenizer.model.fuse_unk = True
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "word pieces": word_piece,
    "unigram": unigram,
    "words": word_level,
    "whole text": whole_text,
    "whole text, unknown fused": fused,
    "bytes without an alphabet": bytes_without_an_alphabet,
    "bytes": byte_level,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreferenceTokenizer]:
    folder = tmp_path_factory.mktemp("kinds")
    rules = TokenizationRules(append_eos=False)
    return {
        kind: PreferenceTokenizer.load(save(folder / kind, make()), rules)
        for kind, make in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["the ☃", "the cat☃", "☃☃", "the cat", "the cat "])
@pytest.mark.parametrize("answer", ["☃ sat", "☃", "a b", "cat", " sat on"])
def test_an_answer_has_tokens_for_all_of_it(
    kind: str, prompt: str, answer: str, tokenizers: dict[str, PreferenceTokenizer]
) -> None:
    """Alone or after any prompt, an answer of unknown text has at least one token."""
    tokenizer = tokenizers[kind]
    raw = tokenizer.files.tokenizer
    group = tokenizer.encode_completions(prompt, [answer, answer + " the dog"])
    short, long = (completion.ids for completion in group.completions)
    whole = raw.encode(prompt + answer, add_special_tokens=False)
    start = next((end for _, end in whole.offsets[len(group.prompt_ids) - 1 :]), 0)
    if whole.ids[: len(group.prompt_ids)] == group.prompt_ids and start <= len(prompt):
        assert short == whole.ids[len(group.prompt_ids) :]
    else:
        assert short == raw.encode(answer, add_special_tokens=False).ids
        assert "W502" in group.notes
    assert short
    assert len(long) > len(short)


def test_the_beginning_of_a_candidate_does_not_vanish(
    tokenizers: dict[str, PreferenceTokenizer],
) -> None:
    """An unknown word at the end of a prompt absorbed an answer that followed without a space."""
    tokenizer = tokenizers["words"]
    group = tokenizer.encode_completions("the zzz", ["cat sat", " sat"])
    first, second = (completion.ids for completion in group.completions)
    assert tokenizer.decode(second) == "sat"
    assert tokenizer.decode(first) == "cat sat"
    assert group.notes.count("W502") == 1


TEXTS = st.text("ab ☃é\n", max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=6))
def test_pairs_in_bulk_equal_single_pairs(
    kind: str, rows: list[tuple[str, str, str]], tokenizers: dict[str, PreferenceTokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.takes_pairs == (kind == "bytes")
    if not tokenizer.takes_pairs:
        return
    columns = [list(column) for column in zip(*rows, strict=True)]
    pairs = tokenizer.encode_pairs(columns)
    kept = [row for row, is_odd in zip(rows, pairs.odd, strict=True) if not is_odd]
    ids = iter(pairs.completion_ids.tolist())
    lengths = iter(pairs.completion_lengths.tolist())
    for prompt, *answers in kept:
        for answer in answers:
            found = [next(ids) for _ in range(next(lengths))]
            assert found == tokenizer.encode_completion(prompt, answer)


def report_of(
    tokenizer: PreferenceTokenizer, path: Path, rows: list[tuple[str, str]]
) -> tuple[DataReport, list[str]]:
    lines = [
        json.dumps({"prompt": prompt, "chosen": answer, "rejected": " bad"})
        for prompt, answer in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    store, report = build_store([path], tokenizer, deduplicate=False)
    return report, [one.code for one in analyse(store, report, tokenizer=tokenizer).findings]


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_missing_white_space_is_warned_about_once(
    kind: str, tokenizers: dict[str, PreferenceTokenizer], tmp_path: Path
) -> None:
    """In bulk and one by one."""
    path = tmp_path / "rows.jsonl"
    glued = [("the cat:", "yes"), ("how are you?", "fine"), ("the dog", "7 cats")]
    apart = [("the cat:", " yes"), ("how\n", "fine"), ("", "fine"), ("猫", "fine"), ("how", "é")]
    report, codes = report_of(tokenizers[kind], path, [*glued, ("how ", "fine")])
    assert report.touching_rows == 3
    assert "W520" in codes
    report, codes = report_of(tokenizers[kind], path, [*apart, *glued])
    assert report.touching_rows == 3
    assert "W520" not in codes


def test_bulk_and_single_rows_agree_on_touching() -> None:
    texts = ["", "a", "a ", " a", "é", "9", "~", "a\n", "猫a", "a猫", "(", "\0"]
    pairs = [(prompt, answer) for prompt in texts for answer in texts]
    columns = [pyarrow.array(column) for column in zip(*pairs, strict=True)]
    found = touching(*(_view(column) for column in columns))
    assert found.tolist() == [touch(prompt, answer) for prompt, answer in pairs]
    assert touching(*map(list, zip(*pairs, strict=True))).tolist() == found.tolist()
