"""Messages that are already rendered are detected by the markup of the template."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chats_for_tests import assistant, system, user
from tokenizers_for_tests import CHATML, byte_level, save
from trl_templates import EOS, TEMPLATES, TOKENS, template

from logratio.data import (
    ChatTemplate,
    ChatTemplateError,
    PreferenceTokenizer,
    TokenizationRules,
    build_store,
)
from logratio.data.store.row_report import BadDataError
from logratio.data.tokenization.rendering import Markers
from logratio.serving.candidates import CandidateEncoder

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHAT = (user("What is 3 < 5?"), assistant("A <b>true</b> statement [1]."), user("Why?"))
ORDINARY = (
    "What is 3 < 5?",
    "<p>old <s>price</s></p> and more",
    "a[0] = b[i]; if (a < b && c > d) {}",
    "He said: user: hi\nassistant: hello, and left.",
    "The user asked the assistant.",
    "<think>\nhm\n</think>\n\nYes.",
    "\n",
    "",
)


def markers(source: str) -> Markers:
    return Markers(ChatTemplate(source, TOKENS), ("<s>", "</s>"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_text_is_found_and_ordinary_text_is_not(name: str) -> None:
    own, found = template(name), Markers(template(name), (TOKENS["bos_token"], EOS))
    assert not any(map(found.find, ORDINARY))
    for turns in (CHAT[:1], CHAT, (system("Be kind."), *CHAT)):
        try:
            text = own.render(turns, add_generation_prompt=True)
        except ChatTemplateError:  # it takes no system turn
            continue
        if turns[-1]["content"] not in text:  # it takes lists of parts only
            continue
        assert found.find(text), turns
        assert found.find(f"Go on: {text}And now?"), turns


@pytest.mark.parametrize("source", [CHATML, LLAMA2, VICUNA])
def test_rendered_prompts_and_transcripts(source: str) -> None:
    found, own = markers(source), ChatTemplate(source, TOKENS)
    for turns in (CHAT[:1], CHAT):
        assert found.find(own.render(turns, add_generation_prompt=True))
    assert not any(map(found.find, ORDINARY))


def test_an_end_of_turn_is_looked_for_at_the_end_only() -> None:
    found = markers(CHATML)
    assert found.find("Hello!<|im_end|>\n") == "<|im_end|>"
    assert found.find("The token <|im_end|> ends a turn.") is None
    assert markers(LLAMA2).find("Hello! </s>") == "</s>"
    assert markers(LLAMA2).find("<s>old</s> new") is None
    assert markers(LLAMA2).find("Now [INST] Hi") == "[INST]"


def test_headers_of_plain_words_need_both_and_a_place() -> None:
    found = markers(VICUNA)
    assert found.find("USER: hi ASSISTANT:") == "USER:"
    assert found.find("Be kind. USER: hi ASSISTANT:") == "USER:"
    assert found.find("USER: hi ASSISTANT: Hello!") == "USER:"
    for text in ("USER: hi", "ASSISTANT:", "ASSISTANT: a USER: b", "Say USER: and ASSISTANT: b"):
        assert found.find(text) is None


def test_a_template_that_cannot_be_read_marks_nothing() -> None:
    for source in ("{{ raise_exception('no') }}", "always the same", "{{ messages[0].content }}"):
        assert markers(source).find("<|im_start|>user") is None


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreferenceTokenizer:
    folder = save(tmp_path / "tokenizer", byte_level())
    return PreferenceTokenizer.load(folder, chat_template=CHATML)


@pytest.mark.parametrize("side", ["input", "chosen", "rejected"])
def test_a_rendered_row_is_refused_with_advice(
    tmp_path: Path, tokenizer: PreferenceTokenizer, side: str
) -> None:
    path, row = tmp_path / "d.jsonl", {"input": "hi", "chosen": "Hello!", "rejected": "No."}
    row[side] += "<|im_end|>" if side != "input" else "<|im_start|>assistant\n"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(BadDataError, match=r"d.jsonl:1 \[E405\].*formats.columns prompt=input"):
        build_store(path, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "is_foreign"),
    [
        ("<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", True),
        ("[INST] hi [/INST]", True),
        ("<start_of_turn>user\nhi<end_of_turn>", True),
        *((text, False) for text in ORDINARY if text.strip()),
    ],
)
def test_markers_of_another_template_are_counted(
    tmp_path: Path, tokenizer: PreferenceTokenizer, prompt: str, is_foreign: bool
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"input": prompt, "chosen": "Hello!", "rejected": "No."}) + "\n")
    _, report = build_store(path, tokenizer)
    assert ("W523" in report.warnings_by_code) == is_foreign


def test_the_advice_works(
    tmp_path: Path, tokenizer: PreferenceTokenizer, run: Callable[..., tuple[int, str, str]]
) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"input": prompt, "chosen": "Hello!", "rejected": "No."}) + "\n")
    folder = tmp_path / "tokenizer"
    (folder / "chat_template.jinja").write_text(CHATML)
    build = ("data", "build", path, "--tokenizer", folder, "--output", tmp_path / "d.store")
    code, _, error = run(*build)
    assert code and "E405" in error
    assert run(*build, "--columns", "prompt=input")[0] == 0


def test_a_served_candidate_that_was_rendered_is_refused_alone(tmp_path: Path) -> None:
    rules = TokenizationRules()
    folder = save(tmp_path / "bundle", byte_level())
    (folder / "chat_template.jinja").write_text(CHATML)
    encoder = CandidateEncoder(folder, rules, truncate=False)
    candidates = ["Hello!", "<|im_start|>assistant\nHello!<|im_end|>\n"]
    found = encoder.encode((user("hi"),), candidates)
    assert [bool(one.error) for one in found.candidates] == [False, True]
    assert "[E405]" in str(found.candidates[1].error)


def test_inspect_reads_the_limits_and_the_date_of_a_tokenizer(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    path, folder = tmp_path / "d.jsonl", save(tmp_path / "tokenizer", byte_level())
    (folder / "chat_template.jinja").write_text(CHATML)
    path.write_text(json.dumps({"prompt": "hi", "chosen": "Hello!", "rejected": "No."}) + "\n")
    code, out, _ = run("data", "inspect", path, "--tokenizer", folder, "--chat")
    assert code == 0 and "<|im_start|>" in out.replace("│", "")
    code, out, _ = run("data", "inspect", path, "--tokenizer", folder, "--text")
    assert code == 0 and "<|im_start|>" not in out.replace("│", "")
    code, _, error = run("data", "inspect", path, "--chat")
    assert code == 2 and "--tokenizer is missing" in error
