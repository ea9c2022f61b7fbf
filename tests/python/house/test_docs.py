"""The documentation is true: its code runs, its commands and files exist."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT, manifest, tracked

import logratio
from logratio.data.records import CODES, CURES

README = (ROOT / "README.md").read_text()
PAGES = sorted(name for name in tracked() if name.endswith(".md"))
ELSEWHERE = ["python/docs/migrating.md"]
"""Pages whose code a test of its own runs: test_trl_port.py."""
RUN = [
    *("README.md", "python/docs/data.md", "python/docs/cache.md", "python/docs/serving.md"),
    "python/docs/training.md",
]
"""Pages with Python code; each page uses the files of the pages before it."""


def blocks(language: str, pages: Sequence[str] = PAGES) -> list[str]:
    """Fenced blocks in `language`, README's first, then the guides' in their order."""
    texts = [(ROOT / name).read_text() for name in pages]
    found = (re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) for text in texts)
    return [block for blocks in found for block in blocks]


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of `program` in the shell blocks of all pages."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")
    ]


def test_python_blocks_run_one_after_the_other(
    make_model: Callable[..., Path],
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The pages assume a model in model/ and preference pairs in pairs.jsonl.
    assert make_model("model") == tmp_path / "model"
    assert pairs_file == tmp_path / "pairs.jsonl"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert not [
        page for page in PAGES if page not in (*RUN, *ELSEWHERE) and blocks("python", [page])
    ]
    for page in RUN:
        assert blocks("python", [page])
        for number, block in enumerate(blocks("python", [page]), 1):
            shutil.rmtree("bundle", ignore_errors=True)
            exec(compile(block, f"{page}, block {number}", "exec"), names)


@cache
def help_of(*words: str) -> str:
    """Return what `logratio WORDS --help` prints."""
    return subprocess.run(
        [sys.executable, "-m", "logratio", *words, "--help"],
        env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_commands_in_the_pages_use_existing_options() -> None:
    for call in commands("logratio"):
        words = [word for word in call if re.fullmatch("[a-z]+", word)]
        shown = help_of(*words[: 2 if words[0] in {"cache", "data"} else 1])
        options = [word.partition("=")[0] for word in call if word.startswith("--")]
        assert not [name for name in options if not re.search(rf"{name}\b", shown)], call


@pytest.mark.parametrize("call", commands("make"), ids=" ".join)
def test_make_targets_in_the_pages_exist(call: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert next(word for word in call if "=" not in word and not word.startswith("-")) in targets


@pytest.mark.parametrize("name", logratio.__all__)
def test_a_public_name_can_be_imported(name: str) -> None:
    assert getattr(logratio, name).__module__.startswith("logratio.")
    assert name in dir(logratio)


def test_readme_is_short() -> None:
    assert README.count("\n") <= 200


def test_every_guide_is_linked_from_readme() -> None:
    guides = {name for name in PAGES if name.startswith("python/docs/")}
    assert guides == set(re.findall(r"\]\((python/docs/[^)#]+)\)", README))


def test_every_code_has_a_cure_and_is_on_the_page() -> None:
    assert CODES.keys() == CURES.keys()
    page = ROOT / "python" / "docs" / "troubleshooting.md"
    build = runpy.run_path(str(page.with_name("build.py")))
    assert page.read_text() == build["with_codes"](page.read_text()), "run `make docs`"


@pytest.mark.parametrize("heading", ["Where to look", "Own implementations, and why"])
def test_the_tables_of_the_architecture_page_name_files(heading: str) -> None:
    page = (ROOT / "python" / "docs" / "architecture.md").read_text()
    table = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    paths = re.findall(r"`([\w/]+\.(?:py|rs))`", table)
    assert len(paths) >= 10
    places = (ROOT, PACKAGE)
    assert not [path for path in paths if not any((place / path).is_file() for place in places)]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_within_a_page_have_a_heading(page: str) -> None:
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_changelog_begins_with_the_version_in_the_manifest() -> None:
    (first, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first == manifest("Cargo.toml")["package"]["version"]
