"""The bad-input matrix: each fault × kind of input × position is reported with one code."""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from accounts import Row, account, pair
from conftest import Run
from piped import piped
from tokenizers_for_tests import CHATML, byte_level, save, with_bos, word_level

from logratio.data import BadDataError, PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.readers import open_inputs
from logratio.data.records import stops
from logratio.data.store import build

LIMIT = 4000
"""Most bytes of a line in these tests, instead of 64 MiB."""

LONG = " the cat sat on the mat and the dog ran to the house and you?"
CHAT = [{"role": "user", "content": "why"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))


SOUND = [pair(1), pair(2)]


@dataclass(frozen=True)
class Fault:
    """A row and its expected report.

    Attributes:
        row: The row, or the bytes of its line.
        code: An E or R code: refused; a W code: kept with a warning; "": kept; "duplicate": left
            out.
        column: The column in the report, if any.
        tokenizer: The tokenizer that triggers it.
        only_last: Whether it can only be the last line, whose line end is missing.
        of_two: Whether it is reported for the later of two rows; a valid row is the other.
    """

    row: Row | bytes
    code: str
    column: int | None = None
    tokenizer: str = "words"
    only_last: bool = False
    of_two: bool = False


FAULTS: dict[str, Fault] = {
    "malformed": Fault(b'{"prompt" "p"}', "E101", 11),
    "cut": Fault(b'{"prompt": "the cat", "cho', "E102", 23, only_last=True),
    "cut inside a character": Fault('{"prompt": "é'.encode()[:-1], "E102", only_last=True),
    "not UTF-8": Fault(b'{"prompt": "\xff"}', "E103", 13),
    "lone surrogate": Fault(rb'{"prompt": "\ud800"}', "E104"),
    "long line": Fault(b'{"prompt": "' + b"x" * LIMIT + b'"}', "E107"),
    "missing rejected": Fault(pair(0, rejected=...), "E201"),
    "null chosen": Fault(pair(0, chosen=None), "E202"),
    "number chosen": Fault(pair(0, chosen=4), "E203"),
    "no object": Fault(b'"text"', "E203"),
    "key twice": Fault(b'{"prompt": "p", "prompt": "q"}', "E205"),
    "unknown shape": Fault({"question": "q"}, "E206"),
    "no template": Fault({"prompt": CHAT, "chosen": YES, "rejected": NO}, "E401", None, "plain"),
    "two EOS": Fault(pair(0, chosen=" good </s> </s>"), "E402"),
    "roles": Fault({"prompt": CHAT, "chosen": CHAT, "rejected": NO}, "E403"),
    "prompt too long, an error": Fault(pair(0, prompt=LONG * 2), "E304", None, "strict"),
    "empty chosen": Fault(pair(0, chosen=""), "R301"),
    "both empty": Fault(pair(0, chosen="", rejected=""), "R301"),
    "identical": Fault(pair(0, chosen=" bad"), "R302"),
    "identical once cut": Fault(pair(0, chosen=LONG + " yes", rejected=LONG + " no"), "R303"),
    "prompt too long": Fault(pair(0, prompt=LONG * 2), "R304"),
    "empty prompt, no BOS": Fault(pair(0, prompt=""), "R305", None, "no BOS"),
    "duplicate": Fault(SOUND[1], "duplicate", of_two=True),
    "special token": Fault(pair(0, prompt="the </s> cat"), "W501"),
    "boundary moves": Fault(pair(0, prompt="how are ", chosen="you"), "W502", None, "bytes"),
    "completion cut": Fault(pair(0, chosen=LONG), "W503"),
    "empty prompt": Fault(pair(0, prompt=""), "W504"),
    "NUL": Fault(pair(0, prompt="the \0 cat"), "W505"),
    "prompt cut": Fault(pair(0, prompt=LONG * 2), "W506", None, "keep end"),
    "the other way round": Fault(
        pair(2, chosen=SOUND[1]["rejected"], rejected=SOUND[1]["chosen"]), "W507", of_two=True
    ),
    "messages among strings": Fault({"prompt": CHAT, "chosen": YES, "rejected": NO}, ""),
    "CRLF": Fault(json.dumps(pair(0)).encode() + b"\r", ""),
    "extra key": Fault(pair(0, id=7), ""),
}
PLACES = {"first": 0, "middle": 1, "last": 2}
CASES = [
    (name, place)
    for name, fault in FAULTS.items()
    for place in PLACES
    if place == "last" or not fault.only_last
]

Ask = Callable[[], list[Path | str]]
Give = Callable[..., tuple[str, Ask]]


@pytest.fixture(params=["plain", "gz", "zst", "stdin", "folder"])
def give(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Give:
    """Provide content in one of five ways; return its name in errors, and its argument."""

    def give(content: bytes, name: str = "rows.jsonl") -> tuple[str, Ask]:
        if request.param == "stdin":

            def put() -> list[Path | str]:
                monkeypatch.setattr(sys, "stdin", piped(content))
                return ["-"]

            return "stdin", put
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        if request.param == "gz":
            content = gzip.compress(content)
        elif request.param == "zst":
            content = pyarrow.Codec("zstd").compress(content, asbytes=True)
        path.write_bytes(content)
        named = path.parent if request.param == "folder" else path
        return path.as_posix(), lambda: [named]

    return give


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreferenceTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    words = save(folder / "words", with_bos(word_level()))
    bare = save(folder / "bare", word_level(), bos_token=None)
    letters = save(folder / "bytes", with_bos(byte_level()))
    load, rules = PreferenceTokenizer.load, TokenizationRules
    return {
        "words": load(words, rules(max_length=16, text_as="text"), CHATML),
        "plain": load(words, rules(max_length=16)),
        "strict": load(words, rules(max_length=16, prompt_truncation="error")),
        "keep end": load(words, rules(max_length=16, prompt_truncation="keep_end")),
        "no BOS": load(bare, rules(max_length=16)),
        "bytes": load(letters, rules(max_length=64)),
    }


@pytest.fixture(autouse=True)
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "open_inputs", partial(open_inputs, max_line_bytes=LIMIT))


def lines(rows: list[Row | bytes]) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


@pytest.mark.parametrize(("name", "place"), CASES, ids=[f"{n}-{p}" for n, p in CASES])
def test_a_fault_is_reported_at_every_position(
    give: Give, tokenizers: dict[str, PreferenceTokenizer], name: str, place: str
) -> None:
    fault = FAULTS[name]
    tokenizer = tokenizers[fault.tokenizer]
    rows: list[Row | bytes] = [*SOUND]
    rows.insert(PLACES[place], fault.row)
    content = lines(rows)
    file, ask = give(content[:-1] if fault.only_last else content)
    line = 3 if fault.of_two and place != "last" else PLACES[place] + 1
    at = f"{file}:{line}" + (f":{fault.column}" if fault.column else "")
    if stops(fault.code):
        with pytest.raises(BadDataError) as caught:
            build_store(ask(), tokenizer)
        (error,) = caught.value.errors
        assert error.startswith(f"{at} [{fault.code}] ")
    if fault.code == "E401":
        return  # regardless of --max-bad-fraction
    store, report = build_store(ask(), tokenizer, max_bad_fraction=0.4)
    is_refused, is_twice = fault.code[:1] in ("E", "R"), fault.code == "duplicate"
    assert account(report) == (3, 3 - is_refused - is_twice, is_refused, is_twice)
    assert len(store) == report.kept
    assert report.refused_by_code == Counter({fault.code: 1} if is_refused else {})
    if fault.code[:1] == "W":
        assert report.warnings_by_code[fault.code] == 1
    else:
        assert not report.warnings_by_code
    if fault.code:
        (place,) = report.places[fault.code]
        assert place == at or place.startswith(f"{at} ")
    if name == "extra key":
        assert report.extra_keys == Counter(id=1)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E106"),
        (b"\n \r\n", "E106"),
        (b"\xef\xbb\xbf", "E106"),
        (b"[]", "E106"),
        (b"[" + lines([*SOUND]) + b"]", "E101"),  # no comma between them
        (b"[" + b",".join(lines([*SOUND]).split(b"\n")[:2]), "E102"),
        (b"[{}}]", "E109"),
        (b"PK\x03\x04", "E112"),
    ],
)
def test_faults_of_whole_files(
    give: Give, tokenizers: dict[str, PreferenceTokenizer], content: bytes, code: str
) -> None:
    file, ask = give(content)
    with pytest.raises(BadDataError) as caught:
        build_store(ask(), tokenizers["words"])
    (error,) = caught.value.errors
    assert error.startswith(file)
    assert f" [{code}] " in error


@pytest.mark.parametrize("blank", PLACES.values())
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_marks_and_blank_lines_are_accepted(
    give: Give, tokenizers: dict[str, PreferenceTokenizer], blank: int, mark: bytes
) -> None:
    rows: list[Row | bytes] = [*SOUND]
    rows.insert(blank, b"  \r")
    _, ask = give(mark + lines(rows))
    _, report = build_store(ask(), tokenizers["words"])
    assert (account(report), report.blank_lines) == ((2, 2, 0, 0), 1)


def test_array_is_accepted(give: Give, tokenizers: dict[str, PreferenceTokenizer]) -> None:
    _, ask = give(json.dumps(SOUND, indent=1).encode())
    store, report = build_store(ask(), tokenizers["words"])
    assert account(report) == (2, 2, 0, 0)
    assert store.sources()[1].tolist() == [2, 7]


def test_damaged_and_cut_packed_files(
    tmp_path: Path, tokenizers: dict[str, PreferenceTokenizer]
) -> None:
    content = lines([pair(i % 9, prompt=f"the {i}") for i in range(2000)])
    for suffix, packed in (
        ("gz", gzip.compress(content)),
        ("zst", pyarrow.Codec("zstd").compress(content, asbytes=True)),
    ):
        path = tmp_path / f"rows.jsonl.{suffix}"
        damaged = bytearray(packed)
        damaged[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
        for broken, code in ((packed[: len(packed) // 2], "E102"), (bytes(damaged), "E10[18]")):
            path.write_bytes(broken)
            with pytest.raises(BadDataError, match=rf"rows\.jsonl\.{suffix}:\d+.* \[{code}\]"):
                build_store([path], tokenizers["words"])


@pytest.mark.parametrize("place", PLACES.values())
@pytest.mark.parametrize("code", ["E103", "E110"])
def test_faults_of_csv(
    give: Give, tokenizers: dict[str, PreferenceTokenizer], place: int, code: str
) -> None:
    rows = [b"the cat, good, bad", b"the dog, good, bad"]
    rows.insert(place, b"the \xff cat, good, bad" if code == "E103" else b"the cat, good")
    file, ask = give(b"\n".join([b"prompt,chosen,rejected", *rows, b""]), "rows.csv")
    with pytest.raises(BadDataError) as caught:
        build_store(ask(), tokenizers["words"])
    (error,) = caught.value.errors
    assert error.startswith(f"{file}:{place + 2} [{code}] ")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """The tokenizers as folders, with the flags of their rules."""
    folder = tmp_path_factory.mktemp("folders")
    words = save(folder / "words", with_bos(word_level()))
    chat = save(folder / "chat", with_bos(word_level()))
    (chat / "chat_template.jinja").write_text(CHATML)
    bare = save(folder / "bare", word_level(), bos_token=None)
    letters = save(folder / "bytes", with_bos(byte_level()))
    short = ("--max-length", "16")
    return {
        "words": (chat, short),
        "plain": (words, short),
        "strict": (words, (*short, "--prompt-truncation", "error")),
        "keep end": (words, (*short, "--prompt-truncation", "keep_end")),
        "no BOS": (bare, short),
        "bytes": (letters, ("--max-length", "64")),
    }


@pytest.mark.parametrize("name", FAULTS)
def test_the_command_line_ends_as_the_matrix_requires(
    run: Run, folders: dict[str, tuple[Path, tuple[str, ...]]], tmp_path: Path, name: str
) -> None:
    """Exit code 2 without output for a stopping fault; else 0, with the row named or counted."""
    fault = FAULTS[name]
    content = lines([*SOUND, fault.row])
    path, store = tmp_path / "rows.jsonl", tmp_path / "pairs.store"
    path.write_bytes(content[:-1] if fault.only_last else content)
    tokenizer, limits = folders[fault.tokenizer]
    given = ("data", "build", path, "--tokenizer", tokenizer, "--output", store, *limits)
    code, out, err = run(*given)
    assert "Traceback" not in err
    at = f"{path}:3" + (f":{fault.column}" if fault.column else "")
    if stops(fault.code):
        assert (code, store.exists()) == (2, False)
        assert f"{at} [{fault.code}] " in err
        if fault.code == "E401":
            return
        code, out, err = run(*given, "--max-bad-fraction", "0.4")
    assert (code, store.exists()) == (0, True), err
    assert "3 rows read: " in out
    if fault.code[:1] in ("E", "R", "W"):
        assert fault.code in out
        assert f"{path}:3" in out
    assert not run("data", "verify", store)[0]
