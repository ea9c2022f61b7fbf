"""Stop tokens: all are known, and sampled answers and data are checked against them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_for_tests import CHATML, byte_level, save, word_level
from transformers import PreTrainedModel

from logratio.data import PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.analysis import analyse
from logratio.training import load_model
from logratio.training.evaluation import sample_completions

EOS, IM_END = 2, 5
GEMMA = CHATML.replace("<|im_end|>", "</s>")
CHAT = [{"role": "user", "content": "how are you"}]


def folder(path: Path, template: str | None = None, **files: Any) -> Path:
    """Save a tokenizer together with JSON files of its model."""
    save(path, byte_level(), chat_template=template)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("template", "files", "stops"),
    [
        (None, {}, (EOS,)),
        (
            CHATML,
            {},
            (EOS, IM_END),
        ),  # a Qwen base model: the template has another end
        (GEMMA, {}, (EOS,)),
        (None, {"generation_config": {"eos_token_id": IM_END}}, (EOS, IM_END)),
        (None, {"generation_config": {"eos_token_id": [IM_END, 3]}}, (EOS, 3, IM_END)),
        (None, {"generation_config": {"eos_token_id": None}}, (EOS,)),
        (None, {"config": {"eos_token_id": [3]}}, (EOS, 3)),
        (None, {"config": {"text_config": {"eos_token_id": 3}}}, (EOS, 3)),
        (CHATML, {"generation_config": {"eos_token_id": [3]}}, (EOS, 3, IM_END)),
        ("{{ messages[0].content }}{{ messages[1].content }} end", {}, (EOS,)),
        ("{{ raise_exception('no chats') }}", {}, (EOS,)),
    ],
)
def test_every_token_that_ends_an_answer_is_known(
    tmp_path: Path, template: str | None, files: dict[str, Any], stops: tuple[int, ...]
) -> None:
    path = folder(tmp_path / "t", template, **files)
    assert PreferenceTokenizer.load(path).stop_ids == stops


class Spoken:
    """A model whose `generate` returns given ids and records its arguments."""

    def __init__(self, model: PreTrainedModel, ids: list[int]) -> None:
        self.model, self.ids = model, ids
        self.asked: dict[str, Any] = {}

    def get_base_model(self) -> PreTrainedModel:
        return self.model

    def generate(self, input_ids: torch.Tensor, **how: Any) -> torch.Tensor:
        self.asked = how
        said = torch.tensor([self.ids] * len(input_ids))
        return torch.cat([input_ids, said], dim=1)


def test_a_drawn_answer_ends_at_the_first_of_the_stop_tokens(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    assert isinstance(model, PreTrainedModel)
    for stops, drawn in (([2, 7], [6, 7]), ([2], [6, 7, 8, 2]), ([], [6, 7, 8, 2, 9]), ([4], None)):
        spoken = Spoken(model, [6, 7, 8, 2, 9])
        found = sample_completions(spoken, [[1, 5]], max_new_tokens=5, stop_ids=stops)  # type: ignore[arg-type]
        assert found == [drawn or spoken.ids]
        assert spoken.asked["eos_token_id"] == (stops or None)


def test_generation_stops_at_any_of_them(tiny_model: Path) -> None:
    """Each of the first sampled tokens ends the answer once it is a stop token."""
    model = load_model(tiny_model)
    prompts = [[1, 5, n] for n in range(5, 15)]
    free = sample_completions(model, prompts, max_new_tokens=6, stop_ids=[])
    stops = sorted({completion[2] for completion in free})
    assert len(stops) > 1
    cut = sample_completions(model, prompts, max_new_tokens=6, stop_ids=stops)
    for whole, ended in zip(free, cut, strict=True):
        first = next(place for place, token in enumerate(whole) if token in stops)
        assert ended == whole[: first + 1]


def rows(path: Path, suffix: str) -> Path:
    pairs = [
        {"prompt": f"how {n}", "chosen": f" fine{suffix}", "rejected": f" bad{suffix}"}
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.mark.parametrize(
    ("suffix", "eos", "template", "ended"),
    [("", True, None, 6), ("<|im_end|>", False, CHATML, 6), ("", False, None, 0)],
)
def test_the_report_counts_answers_that_end(
    tmp_path: Path, suffix: str, eos: bool, template: str | None, ended: int
) -> None:
    path = folder(tmp_path / "t", template)
    tokenizer = PreferenceTokenizer.load(path, TokenizationRules(append_eos=eos))
    store, report = build_store([rows(tmp_path / "rows.jsonl", suffix)], tokenizer)
    found = analyse(store, report, tokenizer=tokenizer)
    assert found.tokens.ended == ended
    assert found.tokens.stops == (("</s>",) if template is None else ("</s>", "<|im_end|>"))
    assert f"{ended} of 6 completions end with </s>" in found.to_text()
    assert not found.findings  # without EOS in the rules, none is expected


def test_data_of_which_no_answer_ends_is_warned_about(tmp_path: Path) -> None:
    """The template ends turns with plain text: a model trained on it never stops."""
    tokenizer = PreferenceTokenizer.load(
        folder(tmp_path / "t", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    )
    path = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "fine"}
    row = {"prompt": CHAT, "chosen": [answer], "rejected": [{**answer, "content": "bad"}]}
    path.write_text(json.dumps(row) + "\n")
    store, report = build_store([path], tokenizer)
    found = analyse(store, report, tokenizer=tokenizer)
    assert [one.code for one in found.findings] == ["W517"]
    assert "none of 2 completions ends with </s>" in found.findings[0].text


def test_white_space_after_the_stop_token_does_not_hide_it(tmp_path: Path) -> None:
    tokenizer = PreferenceTokenizer.load(folder(tmp_path / "t", CHATML))
    assert tokenizer.decode(tokenizer.encode_completion(CHAT, "fine")) == "fine<|im_end|>\n"
    path = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "fine"}
    row = {"prompt": CHAT, "chosen": [answer], "rejected": [{**answer, "content": "bad"}]}
    path.write_text(json.dumps(row) + "\n")
    store, report = build_store([path], tokenizer)
    found = analyse(store, report, tokenizer=tokenizer)
    assert found.tokens.ended == 2
    assert not found.findings


def test_steps_are_not_expected_to_end(tmp_path: Path) -> None:
    tokenizer = PreferenceTokenizer.load(save(tmp_path / "t", word_level(), chat_template=CHATML))
    row = {"prompt": "how", "initial_reason_steps": "yes ", "chosen": "good", "rejected": "bad"}
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps(row) + "\n")
    store, report = build_store([path], tokenizer)
    found = analyse(store, report, tokenizer=tokenizer)
    assert found.tokens.ended == 0
    assert not found.findings
