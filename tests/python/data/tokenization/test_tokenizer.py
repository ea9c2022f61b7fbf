"""Tokenization: BOS, EOS, prompt boundary, truncation, chats; the same for every caller."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, byte_level, save, whole_text, with_bos, word_level
from transformers import AutoTokenizer

from logratio.data import (
    Completion,
    InvalidRecordError,
    PreferenceRecord,
    PreferenceTokenizer,
    Refusal,
    Source,
    TokenizationRules,
    TokenizedGroup,
)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
HERE = Source("data.jsonl", 3)
KINDS: dict[str, Callable[[], Any]] = {
    "bytes": byte_level,
    "words": word_level,
    "text": whole_text,
    "bytes with bos": lambda: with_bos(byte_level()),
    "words with bos": lambda: with_bos(word_level()),
    "text with bos": lambda: with_bos(whole_text()),
}
BOS, EOS = 1, 2


@cache
def folder(kind: str, **config: Any) -> Path:
    return save(Path(mkdtemp()), KINDS[kind](), **config)


def load(kind: str, template: str | None = None, **rules: Any) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(folder(kind), TokenizationRules(**rules), template)


def pair(prompt: str, chosen: str, rejected: str, context: str = "") -> PreferenceRecord:
    return PreferenceRecord(
        prompt,
        (Completion("chosen", chosen, context), Completion("rejected", rejected)),
        HERE,
    )


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(*answer: dict[str, str], context: tuple[dict[str, str], ...] = ()) -> PreferenceRecord:
    completion = Completion("demonstration", answer, context)
    return PreferenceRecord((turn("user", "how"),), (completion,), HERE)


def encoded(tokenizer: PreferenceTokenizer, record: PreferenceRecord) -> TokenizedGroup:
    group = tokenizer.encode_record(record)
    assert isinstance(group, TokenizedGroup), group
    return group


def refused(tokenizer: PreferenceTokenizer, record: PreferenceRecord) -> str:
    refusal = tokenizer.encode_record(record)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.source == HERE
    return refusal.code


def counted(tokenizer: PreferenceTokenizer, group: TokenizedGroup, index: int = 0) -> list[str]:
    """Return the trained parts of a completion as text."""
    completion = group.completions[index]
    stretches: list[list[int]] = []
    before = 0.0
    for token, counts in zip(completion.ids, completion.mask, strict=True):
        if counts and not before:
            stretches.append([])
        if counts:
            stretches[-1].append(token)
        before = counts
    return [tokenizer.decode(ids) for ids in stretches]


# Beginnings and ends


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_where_transformers_puts_it(kind: str, config: dict[str, bool]) -> None:
    path = folder(kind, **config)
    theirs = AutoTokenizer.from_pretrained(path)
    ours = PreferenceTokenizer.load(path)
    for text in ("how are you", "the cat sat"):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
    assert (ours.encode_prompt("the cat")[0] == BOS) == kind.endswith("bos")


def test_the_repr_has_the_vocabulary_and_template() -> None:
    tokenizer = load("words", "{% for m in messages %}{{ m.content }}{% endfor %}", max_length=64)
    size = tokenizer.vocabulary_size
    assert repr(tokenizer) == f"PreferenceTokenizer({size:,} ids, a chat template, max_length=64)"


def test_bos_is_never_doubled() -> None:
    tokenizer = load("words with bos")
    assert tokenizer.encode_prompt("<s> the cat") == tokenizer.encode_prompt("the cat")
    assert refused(tokenizer, pair("<s> <s> the cat", "a", "it")) == "E402"
    assert refused(tokenizer, pair("", "<s> the", "it")) == "E402"


def test_bos_is_never_invented() -> None:
    tokenizer = PreferenceTokenizer.load(folder("bytes", bos_token=None))
    assert tokenizer.bos_id is None
    assert BOS not in load("bytes").encode_prompt("the cat")


def test_eos_ends_plain_completions_once() -> None:
    tokenizer = load("words")
    once = tokenizer.encode_completion("the cat", "sat")
    assert once == tokenizer.encode_completion("the cat", "sat </s>")
    assert (once.count(EOS), once[-1]) == (1, EOS)
    assert refused(tokenizer, pair("the cat", "sat </s> </s>", "sat")) == "E402"


def test_eos_is_left_to_the_rules() -> None:
    tokenizer = load("words", append_eos=False)
    assert EOS not in tokenizer.encode_completion("the cat", "sat")
    assert tokenizer.encode_completion("the cat", "sat </s>")[-1] == EOS


def test_a_cut_completion_has_no_eos() -> None:
    words = " sat on the mat and the dog ran"
    for length in range(3, 12):
        tokenizer = load("words", max_length=length)
        group = encoded(tokenizer, pair("the cat", words, " ran"))
        chosen = group.completions[0].ids
        whole = len(words.split()) + 1
        is_cut = length - 2 < whole
        assert len(chosen) == min(length - 2, whole)
        assert (EOS in chosen) != is_cut
        assert ("W503" in group.notes) == is_cut


def test_empty_prompt_needs_a_bos() -> None:
    group = encoded(load("words with bos"), pair("", "yes", "no"))
    assert (group.prompt_ids, group.notes) == ([BOS], ["W504"])
    assert refused(load("words"), pair("", "yes", "no")) == "R305"


# Boundary


def test_prompt_is_fixed_and_the_rest_is_the_completion() -> None:
    tokenizer = load("bytes", append_eos=False)
    group = encoded(tokenizer, pair("how are you?", " I am fine", " no"))
    assert group.prompt_ids == tokenizer.encode_prompt("how are you?")
    texts = [tokenizer.decode(completion.ids) for completion in group.completions]
    assert texts == [" I am fine", " no"]
    assert [completion.role for completion in group.completions] == ["chosen", "rejected"]
    assert [completion.mask for completion in group.completions] == [
        [1] * len(completion.ids) for completion in group.completions
    ]
    assert group.notes == []


def test_answers_that_share_a_beginning_keep_it() -> None:
    tokenizer = load("words", append_eos=False)
    group = encoded(tokenizer, pair("what is it?", " the cat", " the cat and the dog"))
    assert [tokenizer.decode(c.ids) for c in group.completions] == [
        "the cat",
        "the cat and the dog",
    ]


def test_boundary_that_moves_is_counted_and_the_prompt_stays() -> None:
    """A prompt that ends with a space merges with the answer's first word in byte-level BPE."""
    tokenizer = load("bytes", append_eos=False)
    group = encoded(tokenizer, pair("how are ", "you", "\nno"))
    assert group.prompt_ids == tokenizer.encode_prompt("how are ")
    assert tokenizer.decode(group.completions[0].ids) == "you"
    assert group.notes == ["W502"]


def test_history_of_a_side_does_not_count() -> None:
    tokenizer = load("words", append_eos=False)
    group = encoded(tokenizer, pair("the cat", "ran to", " sat", context=" sat on the mat and "))
    assert counted(tokenizer, group) == ["ran to"]
    assert tokenizer.decode(group.completions[0].ids) == "sat on the mat and ran to"
    assert group.completions[0].mask == [0] * 5 + [1] * 2


text = st.text("ab c\n.é漢😀<", max_size=12)
said = text.filter(lambda words: words.strip())


@patient
@given(prompt=text, chosen=said, rejected=said, context=text, kind=st.sampled_from(sorted(KINDS)))
def test_ids_give_the_text_back_and_masks_fit(
    prompt: str, chosen: str, rejected: str, context: str, kind: str
) -> None:
    tokenizer = load(kind, append_eos=False)
    group = tokenizer.encode_record(pair(prompt, chosen, rejected, context))
    if isinstance(group, Refusal):
        assert group.code in ("R301", "R302", "R305")
        return
    assert group.prompt_ids == tokenizer.encode_prompt(prompt)
    for completion, own in zip(group.completions, (context + chosen, rejected), strict=True):
        assert len(completion.ids) == len(completion.mask) > 0
        assert set(completion.mask) <= {0, 1}
        if kind.startswith("bytes"):
            ids = group.prompt_ids + completion.ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + own


@patient
@given(
    prompt=said,
    one=said,
    others=st.lists(said, max_size=3),
    length=st.integers(2, 30),
    policy=st.sampled_from(["keep_start", "keep_end"]),
)
def test_a_completion_does_not_depend_on_its_siblings(
    prompt: str, one: str, others: list[str], length: int, policy: Any
) -> None:
    tokenizer = load("bytes with bos", max_length=length, prompt_truncation=policy)
    group = tokenizer.encode_completions(prompt, [*others, one])
    assert group.prompt_ids == tokenizer.encode_prompt(prompt)
    assert group.completions[-1].ids == tokenizer.encode_completion(prompt, one)
    assert all(len(group.prompt_ids) + len(c.ids) <= length for c in group.completions)


@patient
@given(st.lists(st.tuples(text, text, text), max_size=5))
def test_a_batch_is_its_records_one_by_one(rows: list[tuple[str, str, str]]) -> None:
    tokenizer = load("text", CHATML)
    records = [pair(*row) for row in rows]
    records += [chat(turn("assistant", row[1])) for row in rows]
    assert tokenizer.encode_records(records) == [tokenizer.encode_record(r) for r in records]


# Truncation


def prompt_of_six(length: int, **rules: Any) -> TokenizedGroup | Refusal:
    tokenizer = load("words with bos", max_length=length, append_eos=False, **rules)
    return tokenizer.encode_record(pair("the cat sat on the", " mat and the dog", " house"))


def test_long_prompt_is_dropped_cut_or_an_error() -> None:
    tokenizer = load("words with bos")
    whole = tokenizer.encode_prompt("the cat sat on the")
    refusal = prompt_of_six(6)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.stops) == ("R304", False)
    assert refusal.reason == "the prompt has 6 tokens, the limit is 5"
    error = prompt_of_six(6, prompt_truncation="error")
    assert isinstance(error, Refusal)
    assert (error.code, error.stops) == ("E304", True)
    start = prompt_of_six(10, max_prompt_length=4, prompt_truncation="keep_start")
    assert isinstance(start, TokenizedGroup)
    assert (start.prompt_ids, start.notes) == (whole[:4], ["W506"])
    end = prompt_of_six(10, max_prompt_length=4, prompt_truncation="keep_end")
    assert isinstance(end, TokenizedGroup)
    assert (end.prompt_ids, end.notes) == ([BOS, *whole[-3:]], ["W506"])
    assert len(end.completions[0].ids) == 4  # the room that a cut prompt leaves
    fits = prompt_of_six(7)
    assert isinstance(fits, TokenizedGroup)
    assert fits.prompt_ids == whole
    assert [len(completion.ids) for completion in fits.completions] == [1, 1]


def test_prompt_budget_of_one_keeps_bos() -> None:
    group = prompt_of_six(10, max_prompt_length=1, prompt_truncation="keep_end")
    assert isinstance(group, TokenizedGroup)
    assert group.prompt_ids == [BOS]


def test_pair_that_truncation_makes_identical_is_refused() -> None:
    record = pair("the cat", " sat on the mat", " sat on the house")
    assert refused(load("words", max_length=5), record) == "R303"
    encoded(load("words", max_length=6), record)


def test_pair_that_is_identical_as_tokens_is_refused() -> None:
    assert refused(load("words"), pair("the cat", " sat on", " sat  on")) == "R302"


def test_history_that_leaves_no_room_for_the_answer() -> None:
    record = pair("the cat", "ran", " sat", context=" sat on the mat and ")
    assert refused(load("words", max_length=7), record) == "R306"
    encoded(load("words", max_length=8), record)


def test_completion_without_a_token_is_empty() -> None:
    """Only the EOS would be trained."""
    tokenizer = with_bos(word_level())
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    path = save(Path(mkdtemp()), tokenizer)
    assert refused(PreferenceTokenizer.load(path), pair("the", "\u200b", "cat")) == "R301"


@pytest.mark.parametrize(
    "rules",
    [
        {"max_length": 1},
        {"max_length": 8, "max_prompt_length": 8},
        {"max_prompt_length": 0},
        {"prompt_truncation": "middle"},
    ],
)
def test_impossible_rules(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is|must be"):
        TokenizationRules(**rules)


def test_rules_survive_json() -> None:
    rules = TokenizationRules(512, 128, "keep_end", append_eos=False)
    assert TokenizationRules.from_dict(json.loads(json.dumps(rules.to_dict()))) == rules
    assert replace(rules, max_prompt_length=None).prompt_budget == 511


# Warnings


def test_odd_text_is_kept_and_noted() -> None:
    tokenizer = load("bytes", CHATML)
    assert encoded(tokenizer, pair("say </s> now", "a", "b")).notes == ["W501"]
    assert encoded(tokenizer, pair("say", "a\0", "b")).notes == ["W505"]
    assert encoded(tokenizer, chat(turn("assistant", "say <|im_end|> so"))).notes == ["W501"]
    assert encoded(tokenizer, chat(turn("assistant", "fine"))).notes == []


# Chats

WITH_EOS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"  # noqa: E501
THINKING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"  # noqa: E501
LAST_THINKS = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501
BACKWARDS = "{% for m in messages | reverse %}{{ m.role }} {{ m.content }} {% endfor %}"
COUNTING = "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}{{ '?' if add_generation_prompt }}"  # noqa: E501
HIDING = "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
STRICT = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML


def test_chat_ends_as_its_template_does() -> None:
    tokenizer = load("bytes with bos", CHATML)
    group = encoded(tokenizer, chat(turn("assistant", "fine")))
    assert tokenizer.decode(group.prompt_ids) == (
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(group.completions[0].ids) == "fine<|im_end|>\n"


def test_chat_ids_are_those_of_transformers() -> None:
    path = folder("bytes with bos")
    theirs = AutoTokenizer.from_pretrained(path)
    tokenizer = PreferenceTokenizer.load(path, chat_template="{{ bos_token }}" + CHATML)
    messages = [turn("user", "how"), turn("assistant", "fine")]
    expected = theirs.apply_chat_template(
        messages, chat_template=tokenizer.chat_template, return_dict=False
    )
    assert isinstance(expected, list)
    group = encoded(tokenizer, chat(messages[1]))
    assert group.prompt_ids + group.completions[0].ids == expected
    assert (group.prompt_ids + group.completions[0].ids).count(BOS) == 1


def test_space_after_the_templates_eos_is_not_trained() -> None:
    tokenizer = load("bytes", WITH_EOS)
    group = encoded(tokenizer, chat(turn("assistant", "fine")))
    assert tokenizer.decode(group.completions[0].ids) == "fine</s>"
    assert group.completions[0].ids[-1] == EOS


def test_only_answers_count_in_a_chat_of_many_turns() -> None:
    tokenizer = load("bytes", WITH_EOS)
    answer = (turn("assistant", "a"), turn("user", "why"), turn("assistant", "b"))
    group = encoded(tokenizer, chat(*answer))
    assert counted(tokenizer, group) == ["a</s>", "b</s>"]
    assert tokenizer.decode(group.completions[0].ids) == "a</s>\n\n[user]why[assistant]b</s>"
    history = encoded(tokenizer, chat(answer[2], context=answer[:2]))
    assert counted(tokenizer, history) == ["b</s>"]
    assert history.completions[0].ids == group.completions[0].ids


def test_template_that_asks_otherwise_than_it_tells() -> None:
    """The generation prompt of a thinking model ends with <think>, a rendered answer omits it.

    Prompt and answer together equal the rendered text, unless the answer begins with the whole
    generation prompt.
    """
    tokenizer = load("bytes", THINKING)
    for content in ("fine", "<think", "<t", "assistant", "<assistan", "how", "<think>fine"):
        group = encoded(tokenizer, chat(turn("assistant", content)))
        assert tokenizer.decode(group.prompt_ids) == "<user>how<assistant>"
        assert tokenizer.decode(group.completions[0].ids) == content + "</s>"
        assert group.notes == ["W512"]
    group = encoded(tokenizer, chat(turn("assistant", "<think>\nso")))
    assert tokenizer.decode(group.prompt_ids) == "<user>how<assistant><think>\n"
    assert tokenizer.decode(group.completions[0].ids) == "so</s>"
    assert group.notes == []


def test_template_that_writes_the_last_turn_otherwise() -> None:
    tokenizer = load("bytes", LAST_THINKS)
    answer = (turn("assistant", "a"), turn("user", "why"), turn("assistant", "b"))
    group = encoded(tokenizer, chat(*answer))
    assert counted(tokenizer, group) == ["a</s>", "<think></think>b</s>"]
    assert group.notes == []


def test_chats_that_cannot_be_written() -> None:
    record = chat(turn("assistant", "fine"))
    assert refused(load("bytes"), record) == "E401"
    assert refused(load("bytes", HIDING), record) == "E404"
    long = chat(turn("assistant", "a"), turn("user", "b"), turn("assistant", "c"))
    assert refused(load("bytes", STRICT), long) == "E403"
    assert refused(load("bytes", BACKWARDS), long) == "E404"
    assert refused(load("bytes", BACKWARDS), record) == "E404"
    encoded(load("bytes", STRICT), record)
    assert counted(load("bytes"), encoded(load("bytes", COUNTING), record)) == ["4:fine"]
    twice = "{{ bos_token }}{{ bos_token }}" + CHATML
    assert refused(load("bytes", twice), record) == "E402"


# One rule for every caller


@pytest.mark.parametrize("kind", KINDS)
def test_serving_encodes_as_training(kind: str) -> None:
    tokenizer = load(kind, CHATML, max_length=40)
    group = encoded(tokenizer, pair("how are you?", " I am fine", " no, and you? " * 9))
    assert group.prompt_ids == tokenizer.encode_prompt("how are you?")
    candidates = [" I am fine", " no, and you? " * 9]
    for completion, own in zip(group.completions, candidates, strict=True):
        assert completion.ids == tokenizer.encode_completion("how are you?", own)
    asked = [turn("user", "how")]
    talk = encoded(tokenizer, chat(turn("assistant", "fine")))
    assert talk.prompt_ids == tokenizer.encode_prompt(asked)
    assert talk.completions[0].ids == tokenizer.encode_completion(asked, "fine")


def test_what_cannot_be_scored_is_an_error_with_its_code() -> None:
    tokenizer = load("words", max_length=4)
    with pytest.raises(InvalidRecordError, match=r"^\[R304\]"):
        tokenizer.encode_prompt("the cat sat on the mat")
    with pytest.raises(InvalidRecordError, match=r"^\[R301\]"):
        tokenizer.encode_completions("the cat", ["sat", " "])
    with pytest.raises(InvalidRecordError, match=r"^\[E401\]"):
        tokenizer.encode_prompt([turn("user", "how")])
    with pytest.raises(InvalidRecordError, match=r"^\[E403\]"):
        load("words", CHATML).encode_prompt([turn("assistant", "how")])
    with pytest.raises(InvalidRecordError, match=r"^\[E104\]"):
        tokenizer.encode_completion("the cat", "\ud800")
    same = tokenizer.encode_completions("the cat", ["sat", "sat"])
    assert [c.role for c in same.completions] == ["candidate", "candidate"]


# Folders


def test_special_tokens_may_be_objects_or_in_the_older_file(tmp_path: Path) -> None:
    path = save(
        tmp_path, byte_level(), bos_token={"content": "<s>", "lstrip": False}, eos_token=None
    )
    (path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = PreferenceTokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


def test_truncation_and_padding_of_the_file_are_not_ours(tmp_path: Path) -> None:
    tokenizer = word_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    ours = PreferenceTokenizer.load(save(tmp_path, tokenizer))
    assert len(ours.encode_prompt("the cat sat on the mat")) == 6


def test_missing_names(tmp_path: Path) -> None:
    path = save(tmp_path, word_level(), eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="append_eos"):
        PreferenceTokenizer.load(path)
    tokenizer = PreferenceTokenizer.load(path, TokenizationRules(append_eos=False))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (None, 0)
    path = save(tmp_path, word_level(), pad_token=None)
    assert PreferenceTokenizer.load(path).pad_id == EOS


def test_vocabulary_size_bounds_every_id(tmp_path: Path) -> None:
    tokenizer = word_level()
    assert PreferenceTokenizer.load(save(tmp_path, tokenizer)).vocabulary_size == (
        tokenizer.get_vocab_size()
    )


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        PreferenceTokenizer.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        PreferenceTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        PreferenceTokenizer.load(tmp_path)
    save(tmp_path, word_level())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
        PreferenceTokenizer.load(tmp_path)


def test_digest_changes_with_everything_that_changes_ids(tmp_path: Path) -> None:
    variants = [
        PreferenceTokenizer.load(save(tmp_path / "words", word_level())),
        PreferenceTokenizer.load(save(tmp_path / "bytes", byte_level())),
        PreferenceTokenizer.load(save(tmp_path / "bos", with_bos(word_level()))),
        PreferenceTokenizer.load(save(tmp_path / "eos", word_level(), eos_token="<pad>")),
        PreferenceTokenizer.load(tmp_path / "words", chat_template=CHATML),
    ]
    assert len({tokenizer.digest for tokenizer in variants}) == len(variants)
    again = PreferenceTokenizer.load(save(tmp_path / "again", word_level()))
    assert again.digest == variants[0].digest


# Real tokenizers


@pytest.mark.shared
def test_gpt2_known_ids(shared: Path) -> None:
    tokenizer = PreferenceTokenizer.load(shared / "models/gpt2-tokenizer")
    assert tokenizer.encode_prompt("Hello world") == [15496, 995]
    assert tokenizer.encode_completion("Hello", ", my dog is cute")[:-1] == [
        *(11, 616, 3290, 318, 13779),
    ]
    assert tokenizer.eos_id == tokenizer.pad_id == 50256
    assert tokenizer.vocabulary_size == 50257


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories3M", "stories260K", "gpt2-tokenizer"])
def test_real_tokenizers_as_transformers(shared: Path, name: str) -> None:
    tokenizer = PreferenceTokenizer.load(shared / "models" / name)
    theirs = AutoTokenizer.from_pretrained(shared / "models" / name)
    for prompt in ("Once upon a time", "Tom said, ", "  two  spaces\nand a line"):
        assert tokenizer.encode_prompt(prompt) == theirs(prompt)["input_ids"]


def test_a_spelled_special_token_is_text_where_the_rules_split(tmp_path: Path) -> None:
    folder = save(tmp_path / "t", byte_level(), chat_template=CHATML)
    rules = TokenizationRules(split_special_tokens=True)
    splitting, usual = PreferenceTokenizer.load(folder, rules), PreferenceTokenizer.load(folder)
    spelled = PreferenceRecord(
        "say </s>", (Completion("chosen", "</s> it"), Completion("rejected", "no")), HERE
    )
    group, control = splitting.encode_record(spelled), usual.encode_record(spelled)
    assert isinstance(group, TokenizedGroup)
    assert isinstance(control, TokenizedGroup)
    assert usual.eos_id in control.prompt_ids
    assert "W501" in control.notes
    assert usual.eos_id not in group.prompt_ids
    assert group.notes == []
    assert splitting.decode(group.prompt_ids) == "say </s>"
    assert [c.ids.count(splitting.eos_id or -1) for c in group.completions] == [1, 1]  # the end
    chat = PreferenceRecord(
        ({"role": "user", "content": "say <|im_end|>"},),
        tuple(
            Completion(role, ({"role": "assistant", "content": role},), ())
            for role in ("chosen", "rejected")
        ),
        HERE,
    )
    refused = splitting.encode_record(chat)
    assert isinstance(refused, Refusal)
    assert refused.code == "R307"
