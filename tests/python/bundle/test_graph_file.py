"""The graph's file is checked before ONNX Runtime reads it, and each refusal names the rule."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import tiny_bundle

from logratio.bundle import GRAPH, WEIGHTS, BundleError, check_graph_file, protobuf, read_manifest
from logratio.bundle.graph_file import read_graph
from logratio.bundle.operators import DOMAINS, GROWING, OPERATORS
from logratio.export.graph import OPSETS

WEIGHTS_BYTES = 10_000
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (tiny_bundle(tmp_path_factory) / "bundle" / GRAPH).read_bytes()


def refusal(content: bytes, change: Change, weights: int | None = None) -> str:
    """Change a graph; return why it is refused."""
    model = onnx.ModelProto.FromString(content)
    change(model)
    with pytest.raises(BundleError) as caught:
        read_graph(model.SerializeToString(), weights)
    return str(caught.value)


def test_the_graph_of_an_export_is_described(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_bundle(tmp_path_factory) / "bundle"
    manifest = read_manifest(folder)
    found = check_graph_file(folder, manifest.files, manifest.graph.opset)
    model = onnx.load(folder / GRAPH)
    assert found.opset == 23
    assert found.operators.total() == found.nodes > len(model.graph.node)  # with the loop's
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    assert found.tensor_bytes.total() >= sum(sizes.values())
    assert max(found.tensor_bytes, key=found.tensor_bytes.__getitem__) == "float32"


def test_the_opsets_are_those_that_exports_write() -> None:
    assert set(DOMAINS[""]) == set(OPSETS)
    assert DOMAINS.keys() == OPERATORS.keys()
    assert GROWING.keys() <= set(OPERATORS[""])


@pytest.mark.parametrize(
    ("domain", "operator"),
    [
        *(("", name) for name in ("Loop", "If", "ConstantOfShape", "Tile", "StringConcat")),
        *(("com.microsoft", "EPContext"), ("attacker", "Run"), ("ai.onnx", "Add")),
        ("", "Scan "),
    ],
)
def test_other_operators_are_refused(content: bytes, domain: str, operator: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[5].domain, model.graph.node[5].op_type = domain, operator

    name = f"{domain}.{operator}" if domain else operator
    assert f"the operator {name!r}, which no export writes" in refusal(content, change)


@pytest.mark.parametrize("operator", ["If", "Loop"])
def test_other_operators_are_refused_inside_the_loop(content: bytes, operator: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        scan = next(node for node in model.graph.node if node.op_type == "Scan")
        body = next(a for a in scan.attribute if a.name == "body")
        body.g.node[0].op_type = operator

    assert f"the operator {operator!r}" in refusal(content, change)


def test_a_loop_inside_a_loop_is_refused(content: bytes) -> None:
    def change(model: onnx.ModelProto) -> None:
        scan = next(node for node in model.graph.node if node.op_type == "Scan")
        body = next(a for a in scan.attribute if a.name == "body")
        body.g.node.append(scan)

    assert "a loop inside a loop" in refusal(content, change)


def external(**entries: str) -> Change:
    """Move the first weights to a file; `entries` replace those of its place."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in ({"location": WEIGHTS, "length": str(size)} | entries).items():
            tensor.external_data.add(key=key, value=value)

    return change


@pytest.mark.parametrize(
    "location",
    [
        *("../secret", "x/../../secret", "/etc/passwd", "", ".", f"./{WEIGHTS}"),
        *(f"{WEIGHTS}/../secret", GRAPH, f"{WEIGHTS}\0", "file:///etc/passwd"),
    ],
)
def test_weights_elsewhere_are_refused(content: bytes, location: str) -> None:
    change = external(location=location)
    assert "its weights point outside the bundle" in refusal(content, change, WEIGHTS_BYTES)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": "-4"}, f"has no place in {WEIGHTS}"),
        ({"offset": "1e3"}, f"has no place in {WEIGHTS}"),
        ({"offset": "9" * 30}, f"has no place in {WEIGHTS}"),
        ({"length": ""}, f"has no place in {WEIGHTS}"),
        ({"offset": "9999"}, f"ends after {WEIGHTS}"),
        ({"length": "9" * 12}, f"ends after {WEIGHTS}"),
        ({"length": "1"}, "has 1 bytes instead of"),
        ({"basepath": "/etc"}, "has a place with 'basepath'"),
    ],
)
def test_external_data_must_lie_in_the_file(
    content: bytes, entries: dict[str, str], reason: str
) -> None:
    assert reason in refusal(content, external(**entries), WEIGHTS_BYTES)


def test_external_data_needs_a_file_of_the_bundle(content: bytes) -> None:
    assert "point outside the bundle" in refusal(content, external())
    model = onnx.ModelProto.FromString(content)
    external()(model)
    assert read_graph(model.SerializeToString(), WEIGHTS_BYTES).nodes


def tensor_change(act: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        if act == "text":
            tensor.data_type = TensorProto.STRING
        elif act == "typed":
            tensor.float_data.append(1.0)
        elif act == "huge":
            tensor.dims[0] = 2**62
        elif act == "negative":
            tensor.dims[0] = -1
        elif act == "two places":
            tensor.external_data.add(key="location", value=WEIGHTS)
        elif act == "expand":
            shape = np.array([2**13, 2**13])
            model.graph.initializer.append(numpy_helper.from_array(shape, "shape"))
            next(n for n in model.graph.node if n.op_type == "Expand").input[1] = "shape"
        elif act == "pad":
            pads = np.array([0, 2**13, 0, 2**13])
            model.graph.initializer.append(numpy_helper.from_array(pads, "pads"))
            model.graph.node.append(helper.make_node("Pad", ["prompt_ids", "pads"], ["padded"]))
        elif act == "conv":
            inputs = ["prompt_ids", "group"]
            model.graph.node.append(helper.make_node("Conv", inputs, ["c"], pads=[0, 2**13]))

    return change


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("text", "has the type 8"),
        ("typed", "field 4 of a tensor, which no export writes"),
        ("huge", "bytes instead of"),
        ("negative", "has a negative size"),
        ("two places", "is stored in two places"),
        ("expand", "(Expand) has the shape (8192, 8192)"),
        ("pad", "(Pad) has the shape (0, 8192, 0, 8192)"),
        ("conv", "the operator Conv with the attribute 'pads' too large"),
    ],
)
def test_impossible_tensors_are_refused(content: bytes, act: str, reason: str) -> None:
    assert reason in refusal(content, tensor_change(act), WEIGHTS_BYTES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.functions.add(), "field 25 of a model"),
        (lambda m: m.training_info.add(), "field 20 of a model"),
        (lambda m: m.graph.sparse_initializer.add(), "field 15 of a graph"),
        (lambda m: m.graph.quantization_annotation.add(), "field 14 of a graph"),
        (lambda m: m.opset_import.add(domain="com.microsoft", version=2), "'com.microsoft'"),
        (lambda m: m.opset_import.add(domain="ai.onnx.ml", version=1), "'ai.onnx.ml'"),
        (lambda m: m.opset_import.add(domain="", version=20), "imported twice"),
        (lambda m: m.graph.node[0].attribute.add(name="a", ref_attr_name="b"), "field 21"),
        (lambda m: m.graph.node[0].attribute.add(name="a").strings.append(b"x"), "field 9"),
        (lambda m: m.ClearField("graph"), "it has no graph"),
        (lambda m: setattr(m.graph.node[0], "overload", "x"), "a variant of the operator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_export_writes_is_refused(content: bytes, change: Change, reason: str) -> None:
    assert reason in refusal(content, change)


def test_a_repeated_graph_is_refused(content: bytes) -> None:
    """Readers of protobuf merge repeated messages; a check of one of them would miss the other."""
    model = onnx.ModelProto.FromString(content)
    again = onnx.ModelProto(graph=model.graph).SerializeToString()
    with pytest.raises(BundleError, match="field 7 of a model occurs twice"):
        read_graph(content + again, None)


@pytest.mark.parametrize(
    ("junk", "reason"),
    [
        (b"\x0b", "wire type 3"),  # a group, which other readers skip
        (b"\x00\x00", "field number 0"),
        (b"\x08\x80\x00", "longer than necessary"),
        (b"\x08" + b"\xff" * 10, "no end"),
        (b"\x3a\x7f", "exceeds its message"),
        (b"\x3a\xff\xff\xff\xff\x7f", "larger than 2 GiB"),
        (b"\x38\x01", "another type"),
    ],
)
def test_other_readings_of_the_bytes_are_refused(junk: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        read_graph(junk, None)


def test_a_file_of_endless_parts_is_given_up(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many_sizes(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims.extend([1] * 30_000)

    def long_name(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "A" * 100_000

    assert "a name has more than 65,536 bytes" in refusal(content, long_name)
    monkeypatch.setattr(protobuf, "_FIELDS", 30_000)
    assert read_graph(content, None).nodes
    assert "more than 30,000 fields and numbers" in refusal(content, many_sizes)


def test_deep_nesting_is_refused(content: bytes) -> None:
    def change(model: onnx.ModelProto) -> None:
        scan = next(node for node in model.graph.node if node.op_type == "Scan")
        inner = onnx.NodeProto.FromString(scan.SerializeToString())
        for _ in range(20):
            outer = onnx.NodeProto(op_type="Scan")
            body = outer.attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
            body.g.node.append(inner)
            inner = outer
        model.graph.node.append(inner)

    assert "a loop inside a loop" in refusal(content, change)


def test_a_linked_graph_is_not_read(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_bundle(tmp_path_factory) / "bundle"
    (tmp_path / GRAPH).symlink_to(folder / GRAPH)
    with pytest.raises(BundleError, match="not a regular file"):
        check_graph_file(tmp_path, {}, 23)
