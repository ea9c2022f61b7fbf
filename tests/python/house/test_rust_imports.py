"""Imports between the files of the Rust core run one way: no file needs itself through others."""

import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from repository import ROOT, rust_sources

Module = tuple[str, ...]
USE = re.compile(r"\b(pub(?:\(\w+\))? )?use ([^;]+);")
CHILD = re.compile(r"\bmod (\w+);")
PATH = re.compile(r"\b(?:crate|super)(?:::\w+)+")


def spelt_out(tree: str) -> Iterator[Module]:
    """Yield each path of `use a::{b, c::{d, e}}`."""
    if "{" not in tree:
        if name := tree.split(" as ")[0].strip():
            yield tuple(name.split("::"))
        return
    start, inside = tree.split("{", 1)
    inside = inside[: inside.rindex("}")]
    depth, at = 0, 0
    for end, letter in enumerate(inside + ","):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            if part := inside[at:end].strip():
                yield from spelt_out(start + part)
            at = end + 1


class Crate:
    """The files of a crate by module, and what each imports."""

    def __init__(self, texts: dict[Module, str]) -> None:
        code = {name: re.sub(r"//.*", "", text) for name, text in texts.items()}
        self.code = {name: text.split("#[cfg(test)]\nmod tests")[0] for name, text in code.items()}
        self.exports: dict[Module, Module] = {}
        for name, text in self.code.items():
            for public, tree in USE.findall(text):
                for path in spelt_out(tree) if public else ():
                    if found := self.found(name, path):
                        self.exports[*name, path[-1]] = found

    def found(self, name: Module, path: Module) -> Module | None:
        """The file in `path`, as module `name` spells it; None outside the crate."""
        start = {"crate": (), "self": name, "super": name[:-1]}.get(path[0])
        full = name + path if start is None else start + path[1:]
        if start is None and full[: len(name) + 1] not in self.code:
            return None
        full = tuple(part for part in full if part != "self")
        for length in range(len(full), -1, -1):
            if full[:length] in self.exports:
                return self.exports[full[:length]]
            if full[:length] in self.code:
                return full[:length]
        return None

    def imports(self, name: Module) -> set[Module]:
        """The other files that a file names; a folder's own file names all files of the folder."""
        text = self.code[name]
        paths = [path for _, tree in USE.findall(text) for path in spelt_out(tree)]
        paths += [tuple(path.split("::")) for path in PATH.findall(USE.sub("", text))]
        paths += [("self", child) for child in CHILD.findall(text)]
        found = {self.found(name, path) for path in paths}
        return {other for other in found if other is not None} - {name}

    def circle(self) -> list[Module] | None:
        """Files that import each other in a circle, if any do."""
        try:
            TopologicalSorter({name: self.imports(name) for name in self.code}).prepare()
        except CycleError as error:
            return list(error.args[1])
        return None


def module(path: Path) -> Module:
    """Name the module of a file."""
    parts = path.relative_to(ROOT / "rust").with_suffix("").parts
    return tuple(part for part in parts if part not in {"lib", "mod"})


def test_no_rust_files_import_each_other_in_a_circle() -> None:
    crate = Crate({module(path): path.read_text() for path in rust_sources()})
    assert crate.imports(("cache", "reader")) >= {("cache", "source"), ("error",), ("content_key",)}
    assert crate.imports(("plan",)) == {
        *(("plan", name) for name in ("order", "packing", "request")),
        *(("error",), ("group",), ("parallel",)),
    }
    assert crate.circle() is None


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("use super::b;", "use crate::c;", False),
        ("use super::b::{self, Thing};", "use crate::{\n    c::X,\n    a::Y,\n};", True),
        ("use crate::Thing;", "fn f() { super::a::g() }", True),
        ("// use super::b;", "use super::a;", False),
        ("use super::own;", "", True),
    ],
)
def test_a_circle_is_seen(a: str, b: str, circle: bool) -> None:
    texts = {(): "mod a; mod b; pub use b::Thing; fn own() {}", ("a",): a, ("b",): b, ("c",): ""}
    assert (Crate(texts).circle() is not None) == circle
