"""The documentation is true: its code runs, its commands and files exist."""

import importlib
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run
from documented import PAGES, blocks, commands, help_of
from pdoc.doc import Module
from repository import PACKAGE, ROOT, manifest

import logratio
from logratio.data.formats.catalogue import FORMATS
from logratio.data.records import CODES, CURES

README = (ROOT / "README.md").read_text()
ELSEWHERE = ["python/docs/migrating.md", "python/docs/cluster.md"]
"""Pages whose code a separate test runs: test_trl_port.py, test_ray_train.py."""
RUN = [
    *("README.md", "python/docs/data.md", "python/docs/cache.md", "python/docs/serving.md"),
    *("python/docs/training.md", "python/docs/methods.md"),
]
"""Pages with Python code; each page uses the files of the pages before it."""


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


@pytest.mark.parametrize("heading", ["Schedule and optimizer", "LoRA"])
def test_commands_that_tune_a_run_work(
    heading: str,
    make_model: Callable[..., Path],
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    page = (ROOT / "python/docs/training.md").read_text()
    block = page.partition(f"## {heading}\n")[2].partition("```sh\n")[2].partition("```")[0]
    monkeypatch.chdir(make_model("model").parent)
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line]
    assert lines
    for line in lines:
        code, _, errors = run(*shlex.split(line)[1:], "--no-report")
        assert code == 0, errors


def test_commands_in_the_pages_use_existing_options() -> None:
    for call in commands("logratio"):
        words = [word for word in call if re.fullmatch("[a-z]+", word)]
        shown = help_of(*words[: 2 if words[0] in {"bundle", "cache", "data"} else 1])
        options = [word.partition("=")[0] for word in call if word.startswith("--")]
        assert not [name for name in options if not re.search(rf"{name}\b", shown)], call


@pytest.mark.parametrize("call", commands("make"), ids=" ".join)
def test_make_targets_in_the_pages_exist(call: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert next(word for word in call if "=" not in word and not word.startswith("-")) in targets


def test_the_tests_that_the_makefile_names_exist() -> None:
    text = (ROOT / "Makefile").read_text()
    quick = text.partition("addprefix tests/python/,")[2].partition(")")[0]
    named = [f"tests/python/{word}" for word in quick.replace("\\", " ").split()]
    named += re.findall(r"tests/[\w/.]+", text.replace("tests/python/,", ""))
    assert len(named) >= 10
    assert not [path for path in named if not (ROOT / path).exists()]


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


def test_the_table_of_methods_is_that_of_the_library() -> None:
    page = ROOT / "python" / "docs" / "methods.md"
    build = runpy.run_path(str(page.with_name("build.py")))
    assert page.read_text() == build["with_methods"](page.read_text()), "run `make docs`"


def test_the_families_on_the_page_are_those_that_export() -> None:
    """`tests/python/export/test_families.py` is the proof of each."""
    page = ROOT / "python" / "docs" / "export.md"
    build = runpy.run_path(str(page.with_name("build.py")))
    assert page.read_text() == build["with_families"](page.read_text()), "run `make docs`"


def test_the_reference_describes_every_public_name() -> None:
    build = runpy.run_path(str(ROOT / "python/docs/build.py"))
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli", "demo"}
    public = {"logratio", "logratio.errors", *(f"logratio.{room}" for room in rooms)}
    assert set(build["PACKAGES"]) == public
    build["import_front_door"]()
    for name in public:
        module = importlib.import_module(name)
        described = Module(module)
        assert set(described.members) >= set(getattr(module, "__all__", ())), name
        assert described.members or described.submodules, name


@pytest.mark.parametrize("heading", ["Where to look", "Own implementations, and why"])
def test_the_tables_of_the_architecture_page_name_files(heading: str) -> None:
    page = (ROOT / "python" / "docs" / "architecture.md").read_text()
    table = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    paths = re.findall(r"`([\w/]+\.(?:py|rs))`", table)
    assert len(paths) >= 10
    places = (ROOT, PACKAGE)
    assert not [path for path in paths if not any((place / path).is_file() for place in places)]


def test_each_row_of_where_to_look_names_what_its_files_define() -> None:
    page = (ROOT / "python" / "docs" / "architecture.md").read_text()
    table = page.partition("## Where to look\n")[2].partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ") and ".py`" in row]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.(?:py|rs))`(?: \(`(\w+)`)?", row)
        assert named
        for path, name in named:
            file = next(place / path for place in (ROOT, PACKAGE) if (place / path).is_file())
            assert name, f"{path}: name what it defines, as (`name`)"
            defines = rf"^(?:class|def|pub fn) {name}\b|^{name}(?::.*)? = "
            assert re.search(defines, file.read_text(), re.M), f"{path} defines no {name}"


def test_functions_in_tables_can_be_imported() -> None:
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    tables = re.findall(r"(.*\n.*\n)\n\| function \|.*\n((?:\|.*\n)+)", text)
    assert tables
    for before, table in tables:
        module = importlib.import_module(re.findall(r"`(logratio[\w.]*)`", before)[-1])
        names = re.findall(r"^\| `(\w+)[(`]", table, re.M)
        assert names
        assert not [name for name in names if name not in module.__all__]


def test_the_number_of_formats_is_that_of_the_code() -> None:
    (others,) = re.findall(r"\[(\d+) other formats\]", README)
    (every,) = re.findall(r"(\d+) formats, detected", (ROOT / "CHANGELOG.md").read_text())
    listed = (ROOT / "python" / "docs" / "data.md").read_text().partition("## Formats\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", listed.partition("\n\n###")[0], re.M)
    names = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert names >= FORMATS.keys()
    assert int(every) == len(FORMATS)
    assert int(others) == len(FORMATS.keys() - {"trl", "trl-chat", "trl-chat-implicit"})


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
