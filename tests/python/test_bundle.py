"""Altered bundles are refused, and the message names the file and the broken rule."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import (
    accept_files,
    copy_bundle,
    rewrite_manifest,
    tiny_bundle,
    tiny_graph,
    with_template,
)

from logratio.bundle import (
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    WEIGHTS,
    BundleError,
    Manifest,
    describe_file,
    digest_of,
    manifest_bytes,
    read_manifest,
    verify_files,
)
from logratio.bundle.graph_file import read_graph
from logratio.errors import ConfigError
from logratio.serving import Reranker

GRAPH_INFO = {
    **{"opset": 23, "kind": "two_models", "chunk": 128, "vocabulary_size": 20},
    "max_positions": 512,
    "per_token": True,
}


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return copy_bundle(tmp_path_factory, tmp_path / "bundle")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny bundle's manifest as JSON values."""
    path = tiny_bundle(tmp_path_factory) / "bundle" / MANIFEST
    return dict(json.loads(path.read_text()))


def refusal(bundle: Path) -> str:
    """Return the error message of loading a bundle."""
    with pytest.raises(BundleError) as caught:
        Reranker.load(bundle)
    return str(caught.value)


def test_manifest_reads_back_as_it_was_written(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (bundle / MANIFEST).write_text(manifest.to_json())
    assert asdict(read_manifest(bundle)) == asdict(manifest)
    Reranker.load(bundle)


@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json", "tokenizer_config.json"])
def test_a_flipped_bit_is_detected(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert "altered" in refusal(bundle)
    assert name in refusal(bundle)


def test_a_truncated_file_is_detected(bundle: Path) -> None:
    os.truncate(bundle / GRAPH, 1000)
    assert "1000 bytes" in refusal(bundle)


def test_an_extra_file_is_refused(bundle: Path) -> None:
    (bundle / "libcustom.so").write_bytes(b"\x7fELF")
    assert "libcustom.so: not listed" in refusal(bundle)


def test_missing_file_is_named(bundle: Path) -> None:
    (bundle / GRAPH).unlink()
    assert "scorer.onnx: missing" in refusal(bundle)


def test_links_are_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    (bundle / GRAPH).rename(outside)
    (bundle / GRAPH).symlink_to(outside)
    assert "regular file" in refusal(bundle)
    (bundle / GRAPH).unlink()
    (bundle / GRAPH).hardlink_to(outside)
    assert "not a regular file with a single name" in refusal(bundle)
    (bundle / GRAPH).unlink()
    os.mkfifo(bundle / GRAPH)
    assert "not a regular file" in refusal(bundle)
    (bundle / GRAPH).unlink()
    (bundle / GRAPH).mkdir()
    assert "not a regular file" in refusal(bundle)


def test_linked_manifest_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).rename(tmp_path / "manifest")
    (bundle / MANIFEST).symlink_to(tmp_path / "manifest")
    assert "regular file" in refusal(bundle)


def test_newer_format_is_refused_by_name(bundle: Path) -> None:
    rewrite_manifest(bundle, format_version=FORMAT_VERSION + 1)
    assert f"this logratio reads up to {FORMAT_VERSION}" in refusal(bundle)


def test_an_older_format_is_read(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    optional = {field.name for field in fields(Manifest) if field.default is not MISSING}
    older = {name: value for name, value in content.items() if name not in optional}
    (bundle / MANIFEST).write_text(json.dumps({**older, "format_version": 1}))
    assert read_manifest(bundle).beta == content["beta"]


def test_folders_that_are_not_bundles_are_refused(bundle: Path, tmp_path: Path) -> None:
    assert "no such bundle folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no bundle.json" in refusal(tmp_path / "empty")
    (bundle / MANIFEST).write_text('{"format_version": 1')
    assert "not JSON" in refusal(bundle)
    (bundle / MANIFEST).write_text("[" * 100_000)
    assert "not JSON" in refusal(bundle)
    (bundle / MANIFEST).write_text("[1]")
    assert "not a JSON object" in refusal(bundle)
    (bundle / MANIFEST).write_bytes(b" " * (16 * 2**20 + 1))
    assert "larger than 16777216 bytes" in refusal(bundle)


@pytest.mark.parametrize(
    "name", ["../scorer.onnx", "/etc/passwd", "a/b", ".hidden", "weights.bin", "SCORER.ONNX"]
)
def test_only_known_file_names_are_accepted(
    bundle: Path, content: dict[str, Any], name: str
) -> None:
    rewrite_manifest(bundle, files=content["files"] | {name: content["files"][GRAPH]})
    assert f"lists {name!r}, which is not a file of a bundle" in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beta": 0.5}, "logratio.beta differs from the manifest"),
        ({"beta": -1.0}, "not above 0"),
        ({"beta": True}, "wrong type"),
        ({"beta": "0.1"}, "wrong type"),
        ({"golden": []}, "no golden group"),
        ({"policy": {"digest": "00"}}, "logratio.policy differs from the manifest"),
        ({"surprise": 1}, "surprise is unknown"),
        ({"graph": GRAPH_INFO | {"opset": 20}}, "has opset 23; the manifest has 20"),
        ({"graph": GRAPH_INFO | {"max_positions": None}}, "maximum positions of its models"),
        ({"files": {}}, "does not list scorer.onnx"),
        ({"special_ids": {"bos": 1, "eos": 3, "pad": 2}}, "special tokens"),
        ({"tokenization": {"max_length": 1}}, "tokenizer or rules"),
        ({"tokenization": {"no_such_rule": 1}}, "tokenizer or rules"),
        ({"graph": GRAPH_INFO | {"vocabulary_size": 5}}, "outside the vocabulary"),
        ({"graph": GRAPH_INFO | {"chunk": 0}}, "impossible properties"),
        ({"graph": GRAPH_INFO | {"chunk": 2**62}}, "impossible properties"),
        ({"graph": GRAPH_INFO | {"vocabulary_size": 2**31}}, "impossible properties"),
    ],
)
def test_invalid_values_are_refused(bundle: Path, change: dict[str, Any], reason: str) -> None:
    rewrite_manifest(bundle, **change)
    assert reason in refusal(bundle)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    bundle: Path, content: dict[str, Any]
) -> None:
    golden = json.loads(json.dumps(content["golden"]).replace("19", "18"))
    rewrite_manifest(bundle, golden=golden, graph=GRAPH_INFO | {"vocabulary_size": 19})
    assert "tokenizer has more ids" in refusal(bundle)


def test_missing_value_is_named(bundle: Path, content: dict[str, Any]) -> None:
    (bundle / MANIFEST).write_text(
        json.dumps({name: value for name, value in content.items() if name != "golden"})
    )
    assert "golden is missing" in refusal(bundle)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_of_a_manifest_is_refused_or_harmless(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = json.loads(json.dumps(content))
    holder: Any = values
    while True:  # walk to a random place and put something else there
        key = data.draw(
            st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        )
        if not (isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.booleans())):
            break
        holder = holder[key]
    holder[key] = data.draw(junk | st.lists(junk, max_size=2))
    folder = tmp_path_factory.mktemp("changed")
    (folder / MANIFEST).write_text(json.dumps(values))
    try:
        manifest = read_manifest(folder)
    except BundleError:
        return
    assert manifest.beta > 0
    assert manifest.golden


def change_graph(bundle: Path, change: Callable[[onnx_ir.Model], None]) -> None:
    """Alter the graph and list the altered file in the manifest, as an attacker would."""
    model = onnx_ir.load(bundle / GRAPH)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(value.const_value.numpy().copy(), name=value.name)
    change(model)
    (bundle / GRAPH).unlink()
    onnx_ir.save(model, bundle / GRAPH)
    accept_files(bundle)


def test_the_golden_groups_detect_other_weights(bundle: Path) -> None:
    def double_a_weight(model: onnx_ir.Model) -> None:
        values = model.graph.initializers.values()
        largest = max(values, key=lambda value: value.const_value.size)  # type: ignore[union-attr]
        assert largest.const_value is not None
        largest.const_value = onnx_ir.tensor(
            2 * np.asarray(largest.const_value.numpy()), name=largest.name
        )

    change_graph(bundle, double_a_weight)
    assert "gives a golden candidate the reward" in refusal(bundle)


def test_other_golden_values_are_detected(bundle: Path, content: dict[str, Any]) -> None:
    golden = json.loads(json.dumps(content["golden"]))
    golden[0]["policy_logps"][0] += 0.1
    rewrite_manifest(bundle, golden=golden)
    assert "gives a golden candidate the reward" in refusal(bundle)


def test_golden_ids_outside_the_vocabulary_are_refused(
    bundle: Path, content: dict[str, Any]
) -> None:
    golden = json.loads(json.dumps(content["golden"]))
    golden[0]["prompt_ids"][0] = 25  # the embedding has 20 rows
    rewrite_manifest(bundle, golden=golden, graph=GRAPH_INFO | {"vocabulary_size": 30})
    assert "the graph fails on a golden group" in refusal(bundle)


def test_another_tokenization_is_detected(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text().replace('"Whitespace"', '"WhitespaceSplit"'))
    accept_files(bundle)
    assert "tokenizer gives other ids" in refusal(bundle)


def test_graph_with_other_inputs_or_outputs_is_refused(bundle: Path) -> None:
    def rename_output(model: onnx_ir.Model) -> None:
        model.graph.outputs[0].name = "another_output"

    def rename_input(model: onnx_ir.Model) -> None:
        model.graph.inputs[0].name = "another_input"

    change_graph(bundle, rename_output)
    assert "its outputs are not those of a scorer" in refusal(bundle)
    change_graph(bundle, rename_input)
    assert "its inputs are not those of a scorer" in refusal(bundle)


def test_a_file_that_is_not_a_graph_is_refused(bundle: Path) -> None:
    for junk in (b"", b"\x00", b"no graph at all", b"\xff" * 100):
        (bundle / GRAPH).write_bytes(junk)
        accept_files(bundle)
        assert GRAPH in refusal(bundle) or "not an ONNX file" in refusal(bundle)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "secret", "x/../../secret"])
@pytest.mark.parametrize("nested", [False, True], ids=["weight", "in a subgraph"])
def test_a_graph_cannot_refer_to_files_outside_the_bundle(
    bundle: Path, tmp_path: Path, location: str, nested: bool
) -> None:
    (tmp_path / "secret").write_bytes(bytes(4))

    def point_outside(model: onnx_ir.Model) -> None:
        tensor = onnx_ir.ExternalTensor(
            location, 0, 4, onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape([1]), name="outside"
        )
        scan = next(node for node in model.graph if node.op_type == "Scan")
        graph = scan.attributes["body"].as_graph() if nested else model.graph
        value = onnx_ir.Value(name="outside", const_value=tensor, shape=onnx_ir.Shape([1]))
        value.dtype = onnx_ir.DataType.FLOAT
        graph.register_initializer(value)

    change_graph(bundle, point_outside)
    assert f"its weights point outside the bundle ({location!r})" in refusal(bundle)


def test_a_graph_may_only_refer_to_the_bundles_weights(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (bundle / GRAPH).unlink()
    onnx_ir.save(tiny_graph(tmp_path_factory), bundle / GRAPH, external_data=WEIGHTS)
    accept_files(bundle)
    Reranker.load(bundle)
    files = read_manifest(bundle).files
    (bundle / WEIGHTS).unlink()
    rewrite_manifest(
        bundle, files={name: asdict(entry) for name, entry in files.items() if name != WEIGHTS}
    )
    assert "point outside the bundle" in refusal(bundle)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(BundleError):
        read_graph(junk, None)


@settings(max_examples=100, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_damaged_graphs_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    data = bytearray((tiny_bundle(tmp_path_factory) / "bundle" / GRAPH).read_bytes())
    data[int(place * len(data))] = value
    with contextlib.suppress(BundleError):  # other errors fail the test
        assert read_graph(bytes(data), None).nodes


def test_files_are_described_by_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    entry = describe_file(tmp_path / "file")
    assert entry.size == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_unaltered_bundle_is_verified(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest.files)
    (bundle / "more").write_bytes(b"")
    with pytest.raises(BundleError, match="not listed"):
        verify_files(bundle, manifest.files)


def test_fewer_golden_groups_than_an_export_writes_are_refused(
    bundle: Path, content: dict[str, Any]
) -> None:
    rewrite_manifest(bundle, golden=content["golden"][:1])
    assert "1 golden groups, but an export writes at least 3" in refusal(bundle)


def test_a_length_beyond_the_models_positions_is_refused(
    bundle: Path, content: dict[str, Any]
) -> None:
    assert content["graph"]["max_positions"] == 512
    rewrite_manifest(bundle, tokenization=content["tokenization"] | {"max_length": 513})
    assert "its rules allow 513 tokens, but its models only 512" in refusal(bundle)


def test_a_chat_template_needs_a_golden_chat(bundle: Path) -> None:
    with_template(bundle, "{% for m in messages %}{{ m.content }} {% endfor %}")
    assert Reranker.load(bundle).manifest.golden[-1].messages
    golden = json.loads((bundle / MANIFEST).read_text())["golden"]
    rewrite_manifest(bundle, golden=golden[:-1])
    assert "no golden group is a chat" in refusal(bundle)
    rewrite_manifest(bundle, golden=golden)
    (bundle / "chat_template.jinja").write_text("{% for m in messages %}a {% endfor %}")
    accept_files(bundle)
    assert "the tokenizer gives other ids here" in refusal(bundle)


@pytest.mark.parametrize("case", ["text", "truncated", "long"])
def test_no_case_of_the_golden_groups_can_be_left_out(
    bundle: Path, content: dict[str, Any], case: str
) -> None:
    whole = read_manifest(bundle).golden
    assert case in [group.case for group in whole]
    golden = [
        values for values, group in zip(content["golden"], whole, strict=True) if group.case != case
    ]
    rewrite_manifest(bundle, golden=golden)  # with a new number, and new hashes everywhere
    reasons = {
        "text": "no golden group is a text, so its tokenization is not verified",
        "truncated": "no golden group is truncated",
        "long": "no golden group has 64 tokens",
    }
    assert reasons[case] in refusal(bundle)


def test_the_number_and_hash_of_the_golden_groups_are_compared(
    bundle: Path, content: dict[str, Any]
) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps(content | {"golden": content["golden"][1:]}))
    assert "5 golden groups, but the export wrote 6" in refusal(bundle)
    other = json.loads(json.dumps(content["golden"]))
    other[0]["reference_logps"][0] += 1e-5
    path.write_text(json.dumps(content | {"golden": other}))
    assert "its golden groups were altered" in refusal(bundle)
    path.write_text(json.dumps(content | {"golden_digest": None}))
    assert "number and hash of its golden groups are missing" in refusal(bundle)


def test_the_graph_belongs_to_one_tokenizer_and_its_rules(
    bundle: Path, content: dict[str, Any]
) -> None:
    rules = content["tokenization"] | {"max_length": 500}  # no golden group shows this
    (bundle / MANIFEST).write_text(json.dumps(content | {"tokenization": rules}))
    assert "its logratio.tokenization differs from the manifest" in refusal(bundle)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"beta": 1.0, "beta": 2.0}', "'beta' occurs twice"),
        ('{"beta": NaN}', "NaN is not a finite number"),
        ('{"beta": 1e999}', "1e999 is not a finite number"),
        ('{"beta": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(
    bundle: Path, text: str, reason: str
) -> None:
    (bundle / MANIFEST).write_text(text)
    assert reason in refusal(bundle)


def test_impossible_sizes_are_refused(bundle: Path, content: dict[str, Any]) -> None:
    for size in (-1, 2**31):
        files = content["files"] | {GRAPH: content["files"][GRAPH] | {"size": size}}
        (bundle / MANIFEST).write_text(json.dumps(content | {"files": files}))
        assert f"scorer.onnx has {size} bytes; the limit is" in refusal(bundle)


def test_rules_under_which_a_golden_text_cannot_be_read_are_a_refusal(
    bundle: Path, content: dict[str, Any]
) -> None:
    rules = content["tokenization"] | {"max_prompt_length": 2}
    rewrite_manifest(bundle, tokenization=rules)
    assert "a golden group cannot be tokenized here" in refusal(bundle)


def test_the_expected_digest_names_one_bundle(bundle: Path) -> None:
    digest = digest_of(manifest_bytes(bundle))
    assert Reranker.load(bundle, expect=digest.upper()).manifest.beta
    assert Reranker.load(bundle, expect=digest.removeprefix("sha256:")).manifest.beta
    for word in ("", "sha256:12", "sha512:" + digest[7:], digest + "0"):
        with pytest.raises(ConfigError, match="give the digest that"):
            Reranker.load(bundle, expect=word)
    rewrite_manifest(bundle, parity={})
    with pytest.raises(BundleError, match=f"its digest is sha256:[0-9a-f]{{64}}, not {digest}"):
        Reranker.load(bundle, expect=digest)


class Session:
    """A session with wrong rewards, or which never returns."""

    def __init__(self, session: Any, act: str) -> None:
        self.session, self.act = session, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, names: Any, feed: Any, options: Any = None) -> Any:
        if self.act == "loop":
            while not options.terminate:
                time.sleep(0.01)
            raise RuntimeError("terminated")
        reward, policy, reference = self.session.run(names, feed, options)
        return reward + np.float32(0.01), policy, reference


def test_rewards_are_compared_with_the_other_two_outputs(bundle: Path) -> None:
    reranker = Reranker.load(bundle)
    reranker._session = Session(reranker._session, "shift")
    with pytest.raises(BundleError, match="rewards are not β·"):
        reranker.score("the cat", ["sad"])


def test_a_graph_that_never_ends_times_out(bundle: Path) -> None:
    reranker = Reranker.load(bundle)
    reranker._session = Session(reranker._session, "loop")
    with pytest.raises(BundleError, match=r"the golden groups did not finish within 0\.2 s"):
        reranker.replay(0.2)
