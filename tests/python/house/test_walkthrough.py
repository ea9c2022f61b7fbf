"""The commands of the one-page walkthrough, in order, on a tiny model with a chat template."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run
from repository import ROOT
from tiny_models import WORDS

from logratio.serving import Reranker

PAGE = (ROOT / "python" / "docs" / "walkthrough.md").read_text()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ ' ' + m.content + ('</s>' if m.role == 'assistant' else ' a') }}{% endfor %}"
)


def commands() -> list[list[str]]:
    text = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("logratio ")]


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(count: int, start: int = 0) -> list[str]:
    words = WORDS[3:17]
    return [
        f"the {words[n % 14]} {words[n // 14 % 14]} {words[n // 7 % 14]}"
        for n in range(start, start + count)
    ]


def pairs(asked: list[str]) -> list[dict[str, object]]:
    return [
        {
            "prompt": turns(question),
            "chosen": [{"role": "assistant", "content": "in the house happy"}],
            "rejected": [{"role": "assistant", "content": f"under a {WORDS[8 + n % 3]} sad"}],
        }
        for n, question in enumerate(asked)
    ]


@pytest.mark.slow
def test_every_command_of_the_walkthrough_works(
    run: Run, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (make_model("base") / "chat_template.jinja").write_text(TEMPLATE)
    asked = questions(60)
    answers = ("in the house happy", "under a tree sad")
    write(
        tmp_path / "demonstrations.jsonl",
        [{"messages": turns(one, answers[n % 2])} for n, one in enumerate(asked)],
    )
    write(tmp_path / "pairs.jsonl", pairs(asked))
    write(tmp_path / "held_out.jsonl", pairs(questions(20, start=100)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOGRATIO_NO_REPORT", raising=False)  # tests set it elsewhere
    done = []
    for command in commands():
        if command[0] == "serve":
            continue  # serving has tests of its own; the bundle is used below
        code, out, err = run(*command)
        assert code == 0, (command, err)
        done.append((command[0], out))
    assert [name for name, _ in done] == [
        *("data", "data", "train", "train", "sweep", "evaluate", "export"),
    ]
    assert (tmp_path / "policy" / "report.html").exists()
    assert (tmp_path / "policy" / "samples.jsonl").exists()
    assert re.search(r"KL", dict(done)["evaluate"])
    best, other = Reranker.load("bundle").rank(
        turns(asked[0]), ["under a dog sad", "in the house happy"]
    )
    assert best.index == 1
    assert best.reward is not None
    assert other.reward is not None
    assert best.reward > other.reward
