"""The demo: its task, a small run that learns, and protection of existing folders."""

import json
import random
import sys
from pathlib import Path

import pytest
from rich.console import Console

from logratio.demo import task
from logratio.demo.report import best_of_rows, draw_picture, rows, show, summary
from logratio.demo.run import Demo, DemoConfig
from logratio.extras import MissingExtraError


def test_the_rule_on_examples() -> None:
    prompt = "Ana the cat went to the river ."
    assert task.rule(prompt, " the cat was happy .") == 1
    assert task.rule(prompt, " the cat was sad . the cat was kind .") == 0
    assert task.rule(prompt, " the dog was happy .") == -1
    assert task.rule(prompt, " a rude friend gave the owl a cake .") == -3
    assert task.rule(prompt, "") == 0


def test_the_tokenizer_knows_every_word(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    task.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    draw = random.Random(0)
    training, held_out = task.split_prompts(0)
    for prompt in training + held_out:
        text = prompt + task.completion(prompt, draw)
        ids = tokenizer.encode(text).ids
        assert ids[0] == task.BOS
        assert tokenizer.token_to_id("<unk>") not in ids
        assert tokenizer.decode(ids) == text


def test_the_seed_determines_the_data() -> None:
    prompts, _ = task.split_prompts(3)
    assert prompts == task.split_prompts(3)[0] != task.split_prompts(4)[0]
    assert list(task.demonstrations(prompts, 3)) == list(task.demonstrations(prompts, 3))
    assert list(task.demonstrations(prompts, 3)) != list(task.demonstrations(prompts, 4))


def test_held_out_prompts_are_held_out() -> None:
    training, held_out = task.split_prompts(0)
    assert len(set(training) | set(held_out)) == 800
    assert not set(training) & set(held_out)


def test_a_folder_with_other_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an earlier demo"):
        Demo(DemoConfig(output=tmp_path), Console(quiet=True)).run()
    assert (tmp_path / "thesis.tex").exists()


def test_missing_extras_are_reported_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"logratio\[demo"):
        show(DemoConfig(output=tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_a_small_demo_learns_and_ranks(tmp_path: Path) -> None:
    config = DemoConfig(
        output=tmp_path / "demo",
        demonstrations=1600,
        preference_prompts=500,
        held_out_prompts=60,
    )
    result = Demo(config, Console(quiet=True)).run()
    assert result.dpo.rewards.mean() > result.sft.rewards.mean() + 0.5
    assert result.win_rate > 0.6
    assert result.evaluation.accuracy > 0.6
    first, _, last = result.best_of
    assert last.reward > first.reward + 0.5
    assert last.random < last.reward <= last.oracle
    assert json.loads(json.dumps(summary(result)))["win_rate"] == result.win_rate
    assert len(rows(result)) == 6
    assert len(best_of_rows(result)) == 3
    seen, unseen = (
        {json.loads(line)["prompt"] for line in (config.output / name).read_text().splitlines()}
        for name in ("preferences.jsonl", "held_out.jsonl")
    )
    assert not seen & unseen
    picture = draw_picture(config.output, result)
    assert picture.read_bytes().startswith(b"\x89PNG")
