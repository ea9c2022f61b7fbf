"""`logratio bundle inspect` and `verify`, and `--expect` of `rank`."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import Run
from tiny_bundle import copy_bundle, rewrite_manifest

from logratio.bundle import (
    GRAPH,
    MANIFEST,
    Agreement,
    Precision,
    digest_of,
    manifest_bytes,
)


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_bundle(tmp_path_factory, tmp_path / "bundle")


def test_inspect_shows_what_a_bundle_contains(bundle: Path, run: Run) -> None:
    digest = digest_of(manifest_bytes(bundle))
    code, out, _ = run("bundle", "inspect", bundle)
    assert code == 0
    assert out.splitlines()[-1] == digest
    for words in ("two models", "0.25", "llama", "float32", "opset 23", "3 ids, 1 long, 1 text"):
        assert words in out
    assert "shared: a prompt is computed once" in out
    code, out, _ = run("bundle", "inspect", bundle, "--json")
    found = json.loads(out)
    assert found["layout"] == "shared"
    assert (code, found["digest"], found["beta"]) == (0, digest, 0.25)
    assert found["golden_groups"] == {"ids": 3, "long": 1, "text": 1, "truncated": 1}
    assert found["limits"] == {"max_length": 512, "max_positions": 512, "vocabulary_size": 20}
    assert found["graph"]["tensor_bytes"]["float32"] > 100_000
    assert found["files"].keys() == {GRAPH, "tokenizer.json", "tokenizer_config.json"}


def test_inspect_shows_how_well_a_smaller_precision_agrees(bundle: Path, run: Run) -> None:
    measured = Agreement("rows.jsonl", 24, 192, 0.011, 0.05, 0.995, 0.96)
    precision = asdict(Precision(bits=8, agreement=measured, forced=True))
    rewrite_manifest(bundle, precision=precision)
    _, out, _ = run("bundle", "inspect", bundle)
    for words in ("8 bits", "1.1e-02", "5.0e-02", "99.5%", "96.0%", "forced"):
        assert words in out


def test_inspect_exits_with_1_if_the_graph_is_not_that_of_an_export(bundle: Path, run: Run) -> None:
    (bundle / GRAPH).write_bytes(b"\x0b")
    code, out, _ = run("bundle", "inspect", bundle)
    assert code == 1
    assert "not sound" in out and "not an ONNX file" in out


def test_verify_lists_its_checks(bundle: Path, run: Run) -> None:
    digest = digest_of(manifest_bytes(bundle))
    code, out, _ = run("bundle", "verify", bundle, "--expect", digest)
    assert code == 0
    assert out.splitlines()[0].endswith(digest)
    for words in ("digest: as expected", "files: 3 files", "graph: 401 nodes", "6 golden groups"):
        assert words in out
    assert out.splitlines()[-1] == "sound"


def test_verify_exits_with_1_and_names_what_failed(bundle: Path, run: Run) -> None:
    digest = digest_of(manifest_bytes(bundle))
    values = json.loads((bundle / MANIFEST).read_text())
    values["golden"][0]["policy_logps"][0] += 1
    rewrite_manifest(bundle, golden=values["golden"])
    code, out, _ = run("bundle", "verify", bundle)
    assert code == 1
    assert "not sound: CPUExecutionProvider gives a golden candidate the reward" in out
    code, out, _ = run("bundle", "verify", bundle, "--expect", digest)
    assert code == 1
    assert "its digest is sha256:" in out
    (bundle / "more").write_bytes(b"")
    code, out, _ = run("bundle", "verify", bundle)
    assert code == 1
    assert "more: not listed in bundle.json" in out


def test_what_cannot_be_checked_exits_with_2(bundle: Path, tmp_path: Path, run: Run) -> None:
    for command in ("inspect", "verify"):
        code, _, err = run("bundle", command, tmp_path / "nowhere")
        assert code == 2
        assert "no such folder" in err
    code, _, err = run("bundle", "verify", bundle, "--expect", "12")
    assert code == 2
    assert "--expect is '12'" in err


def test_rank_refuses_another_bundle_than_the_expected_one(
    bundle: Path, tmp_path: Path, run: Run
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat", "candidates": ["sad"]}\n')
    digest = digest_of(manifest_bytes(bundle))
    arguments = ("rank", "--bundle", bundle, "--input", rows, "--expect")
    code, out, _ = run(*arguments, digest)
    assert (code, len(out.splitlines())) == (0, 1)
    code, out, err = run(*arguments, "sha256:" + "0" * 64)
    assert (code, out) == (2, "")
    assert f"its digest is {digest}" in err
