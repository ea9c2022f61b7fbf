"""Chat templates that write the date: pinned once, recorded, and used again on any later day."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stop_after import stop_after

from logratio.data import (
    ChatTemplate,
    PreferenceTokenizer,
    StoreMismatchError,
    TokenizationRules,
    build_store,
    load_store,
)
from logratio.data.store import build as resume
from logratio.data.store import ingest
from logratio.errors import ConfigError
from logratio.export.plan import ExportConfig, make_plan
from logratio.training import EvaluateConfig, PrecomputeConfig, TrainConfig, precompute, train
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.evaluation import prepare as prepare_evaluation
from logratio.training.reference import StaleCacheError
from logratio.training.run_folder import RunExistsError
from logratio.training.trainer import DPOTrainer

FIRST, NEXT = "2026-11-29", "2026-11-30"
TURNS = "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
CLOCK = "{{ 'loud ' if strftime_now('%Y-%m-%d') == '2026-11-29' else 'sad ' }}" + TURNS
DATED = "{{ 'loud ' if date_string is defined else 'sad ' }}" + TURNS
HELLO = [{"role": "user", "content": "the cat sings"}]
Today = Callable[[str], None]


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Today:
    """Set the clock."""
    return lambda date: monkeypatch.setattr(
        "logratio.data.tokenization.chat_template.today", lambda: date
    )


@pytest.fixture
def model(make_model: Callable[..., Path], today: Today) -> Path:
    folder = make_model("clock")
    (folder / "chat_template.jinja").write_text(CLOCK)
    today(FIRST)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for place in ("tree", "house", "mat", "bird"):
            sides = {
                "chosen": f"in the {place} happy",
                "rejected": f"under a {place} sad",
            }
            row: dict[str, Any] = {
                name: [{"role": "assistant", "content": text}] for name, text in sides.items()
            }
            file.write(json.dumps({"prompt": HELLO, **row}) + "\n")
    return path


def settings(model: Path, chats: Path, output: Path, **more: Any) -> TrainConfig:
    return TrainConfig(model, [chats], output, batch_size=2, epochs=1, save_every=0, **more)


def rules(date: str) -> TokenizationRules:
    return TokenizationRules(date=date)


def test_a_clock_reads_the_given_date_else_the_day_of_its_start(today: Today) -> None:
    source = "{{ strftime_now('%d %b %Y, %H:%M') }}"
    assert ChatTemplate(source, {}, FIRST).render(HELLO) == "29 Nov 2026, 00:00"
    today(NEXT)
    template = ChatTemplate(source, {})
    assert template.date == NEXT
    today("2027-01-01")
    assert template.render(HELLO) == "30 Nov 2026, 00:00"


def test_a_date_that_the_template_knows_itself_changes_only_where_one_is_given() -> None:
    source = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{{ date_string }}"
    )
    assert ChatTemplate(source, {}).render(HELLO) == "26 Jul 2024"
    assert ChatTemplate(source, {}).date is None
    assert ChatTemplate(source, {}, FIRST).render(HELLO) == "29 Nov 2026"
    words = ChatTemplate("{# strftime_now #}{{ 'date_string' }}", {}, FIRST)
    assert words.date is None and not words.reads_date


@pytest.mark.parametrize("date", ["today", "29.11.2026", "20261129", "2026-13-01", ""])
def test_a_date_is_written_as_iso(date: str) -> None:
    with pytest.raises(ConfigError, match="2026-11-29"):
        rules(date)


def test_the_rules_of_a_tokenizer_hold_the_date_in_use(model: Path, today: Today) -> None:
    ids = PreferenceTokenizer.load(model).encode_prompt(HELLO)
    today(NEXT)
    later = PreferenceTokenizer.load(model)
    assert later.rules.date == NEXT and later.encode_prompt(HELLO) != ids
    same = PreferenceTokenizer.load(model, rules(FIRST))
    assert same.rules.date == FIRST and same.encode_prompt(HELLO) == ids
    (model / "chat_template.jinja").write_text(TURNS)
    assert PreferenceTokenizer.load(model, rules(FIRST)).rules.date is None


def test_a_store_opens_on_any_day_and_keeps_its_date(
    model: Path, chats: Path, tmp_path: Path, today: Today
) -> None:
    path = tmp_path / "chats.store"
    _, report = build_store(chats, PreferenceTokenizer.load(model), path)
    assert f"writes the date: {FIRST}" in report.to_text()
    today(NEXT)
    store, report = load_store(path, PreferenceTokenizer.load(model))
    assert report.date == FIRST
    with pytest.raises(StoreMismatchError, match=f"date {FIRST}, but now they are date {NEXT}"):
        load_store(path, PreferenceTokenizer.load(model, rules(NEXT)))
    ready = DPOTrainer(
        config=settings(model, path, tmp_path / "out"), show_progress=False, dry_run=True
    )
    assert ready.config.rules.date == FIRST
    assert ready.store.digest == store.digest


def test_a_store_of_an_older_version_names_fewer_rules(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "chat_template.jinja").write_text(TURNS)
    path = tmp_path / "chats.store"
    written = TokenizationRules.to_dict
    with monkeypatch.context() as older:
        names = ("max_length", "max_prompt_length", "prompt_truncation", "append_eos")
        older.setattr(
            TokenizationRules, "to_dict", lambda self: {n: written(self)[n] for n in names}
        )
        build_store(chats, PreferenceTokenizer.load(model), path)
    load_store(path, PreferenceTokenizer.load(model))
    with pytest.raises(StoreMismatchError, match="max_length 1024, but now they are max_length 9"):
        load_store(path, PreferenceTokenizer.load(model, TokenizationRules(max_length=9)))


def test_a_cache_hits_on_the_next_day(
    model: Path, chats: Path, tmp_path: Path, today: Today
) -> None:
    wanted = PrecomputeConfig(model, [chats], tmp_path / "cache")
    assert precompute(wanted, show_progress=False).new == 8
    today(NEXT)
    again = precompute(wanted, show_progress=False)
    assert (again.new, again.hits) == (0, 8)
    config = settings(model, chats, tmp_path / "out", cache=wanted.cache)
    train(config, show_progress=False)
    kept = json.loads((tmp_path / "out" / "training.json").read_text())
    assert kept["rules"]["date"] == FIRST
    with pytest.raises(
        StaleCacheError, match=rf"here {NEXT}.* with {FIRST}: give rules.date {FIRST}"
    ):
        DPOTrainer(
            config=replace(config, rules=rules(NEXT), output=tmp_path / "o"), show_progress=False
        )


def test_a_run_is_resumed_and_its_policy_read_under_its_date(
    model: Path, chats: Path, tmp_path: Path, today: Today
) -> None:
    out = tmp_path / "out"
    config = settings(model, chats, out)
    with pytest.raises(RunInterruptedError), stop_after(1):
        train(config, show_progress=False)
    today(NEXT)
    assert len(train(replace(config, resume=True), show_progress=False).history) == 1
    assert json.loads((out / "training.json").read_text())["rules"]["date"] == FIRST
    assert train(config, show_progress=False).was_finished
    with pytest.raises(RunExistsError, match="differs in date"):
        train(replace(config, rules=rules(NEXT)), show_progress=False)
    evaluating = prepare_evaluation(EvaluateConfig(out, model, [chats]), show_progress=False)
    assert evaluating.dataset.tokenizer.rules.date == FIRST
    plan = make_plan(ExportConfig(out, model, tmp_path / "bundle"))
    assert plan.rules.date == FIRST  # which the bundle records


def test_the_flag_overrides_the_date_of_a_template(
    model: Path, chats: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    (model / "chat_template.jinja").write_text(DATED)
    path = tmp_path / "chats.store"
    build = ("data", "build", chats, "--tokenizer", model, "--output", path)
    code, _, error = run(*build, "--date", "yesterday")
    assert code and "2026-11-29" in error and not path.exists()
    code, out, error = run(*build, "--date", NEXT)
    assert code == 0 and f"writes the date: {NEXT}" in out + error
    ready = DPOTrainer(
        config=settings(model, path, tmp_path / "out"), show_progress=False, dry_run=True
    )
    assert ready.config.rules.date == NEXT


def test_an_unfinished_store_continues_with_its_date(
    model: Path, chats: Path, tmp_path: Path, today: Today, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, messages = tmp_path / "chats.store", list[str]()
    monkeypatch.setattr(resume, "EVERY", 0.0)
    monkeypatch.setattr(ingest, "BATCH_ROWS", 1)

    def stop(rows: int, *_: int) -> None:
        if rows == 3:
            raise KeyboardInterrupt

    build = partial(build_store, [chats], path=path, resume=True, tell=messages.append)
    with pytest.raises(KeyboardInterrupt):
        build(PreferenceTokenizer.load(model), progress=stop)
    today(NEXT)
    store, report = build(PreferenceTokenizer.load(model))
    assert len(messages) == 1 and "continues after" in messages[0]
    assert (len(store), report.date) == (4, FIRST)
    whole, _ = build_store([chats], PreferenceTokenizer.load(model, rules(FIRST)))
    assert store.digest == whole.digest
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        build(PreferenceTokenizer.load(model, rules(FIRST)), progress=stop)
    store, report = build(PreferenceTokenizer.load(model, rules(NEXT)))
    assert "starts from the beginning" in messages[-1] and report.date == NEXT
