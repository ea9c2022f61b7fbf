"""Documents that cannot lie: README's code runs, its map is the tree, its commands exist."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repository import ROOT, manifest, tracked

README = (ROOT / "README.md").read_text()
PAGES = [name for name in tracked() if name.endswith(".md")]


def blocks(language: str) -> list[str]:
    """Fenced blocks of README in `language`, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of `program` in README's shell blocks."""
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
    # README speaks of a folder with a model in model/ and preferences in pairs.jsonl.
    assert make_model("model") == tmp_path / "model"
    assert pairs_file == tmp_path / "pairs.jsonl"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert blocks("python"), "README shows no use of the library"
    for number, block in enumerate(blocks("python"), 1):
        exec(compile(block, f"README.md, block {number}", "exec"), names)


@pytest.mark.parametrize("call", commands("logratio"), ids=" ".join)
def test_command_takes_the_options_that_readme_gives_it(call: list[str]) -> None:
    words = [word for word in call if re.fullmatch("[a-z]+", word)]
    depth = 2 if words[0] in {"cache", "data"} else 1
    done = subprocess.run(
        [sys.executable, "-m", "logratio", *words[:depth], "--help"],
        env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    options = [word.partition("=")[0] for word in call if word.startswith("--")]
    assert not [option for option in options if not re.search(rf"{option}\b", done.stdout)]


@pytest.mark.parametrize("call", commands("make"), ids=" ".join)
def test_make_has_the_target_that_readme_names(call: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert next(word for word in call if "=" not in word and not word.startswith("-")) in targets


def mapped() -> Iterator[tuple[str, str]]:
    """Paths of README's file map with the words beside them; a folder's path ends with a slash.

    A line is a name, two spaces or more, and a phrase. Two spaces of indent lead into a folder.
    """
    section = README.partition("\n## File map\n")[2].partition("\n## ")[0]
    (tree,) = re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S)
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition("  ")
        path = "".join([*folders[:depth], name])
        folders[depth:] = [name]
        yield path, phrase.strip()


def test_file_map_has_a_phrase_for_every_line() -> None:
    assert not [path for path, phrase in mapped() if not phrase]


def test_file_map_is_the_tree() -> None:
    paths = [path for path, _ in mapped()]
    assert len(paths) == len(set(paths))
    # A folder with no line below it stands for all it holds; a folder's line for its __init__.py.
    parents = {
        path for path in paths for other in paths if other != path and other.startswith(path)
    }
    whole = tuple(path for path in paths if path.endswith("/") and path not in parents)
    files = {name for name in tracked() if Path(name).name != "__init__.py"}
    missing = {name for name in files if name not in paths and not name.startswith(whole)}
    gone = {path for path in paths if not any(name.startswith(path) for name in tracked())}
    assert (missing, gone) == (set(), set())


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_within_a_page_meet_a_heading(page: str) -> None:
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_changelog_begins_with_the_version_in_the_manifest() -> None:
    (first, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first == manifest("Cargo.toml")["package"]["version"]


@pytest.mark.parametrize("heading", ["File map", "Decisions"])
def test_readme_has_its_sections(heading: str) -> None:
    assert f"\n## {heading}\n" in README
