"""Mutated bundles: seeded changes, as by accident or by an attacker, and a process that loads them.

`python mutated_bundles.py BUNDLE SECRET WORK FIRST LAST` prints a line of JSON for each seed. Its
caller sees from the last line which mutation crashed the process or never ended.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from logratio.bundle import (
    GRAPH,
    MANIFEST,
    REPLAY,
    TOKENIZER_FILES,
    WEIGHTS,
    BundleError,
    check_digest,
    describe_file,
    digest_of,
    golden_digest,
    manifest_bytes,
    tolerance,
)
from logratio.serving import Reranker, Score

SECRET = b"secret bytes that no bundle may read" * 8
PROBES: list[tuple[str, list[str]]] = [
    ("the cat sits", ["on the mat happy", "sad", "under a tree loud loud loud"]),
    ("a dog </s> runs in the house", ["happy </s>", "the bird sings"]),
]
LOAD_SECONDS = 20.0
_MEMORY = 8 * 2**30
_OPERATORS = ["Sin", "Cos", "Sub", "Max", "Neg", "Tanh", "Where", "Range", "Expand", "Not"]
_FOREIGN = [
    *(("", name) for name in ("If", "Loop", "ConstantOfShape", "Tile", "Constant", "RandomNormal")),
    *(("com.microsoft", name) for name in ("EPContext", "FusedMatMul", "PythonOp")),
    *(("attacker", "Run"), ("ai.onnx.ml", "StringNormalizer"), ("ai.onnx", "Add")),
]
_JUNK: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**300, -0.0, 1e308, "", "x" * 1000, [], {}, [[]]),
    *({"a": 1}, "../secret", [None], {"sha256": 1}, [0] * 1000),
]
_LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000 + "]" * 5000, "-"]


class Mutant:
    """A copy of a bundle, which the methods change; each returns what it did."""

    def __init__(self, folder: Path, secret: Path, seed: int) -> None:
        self.folder, self.secret = folder, secret
        self.random = random.Random(seed)

    def mutate(self) -> str:
        kinds = sorted(name for name in dir(self) if name.startswith("change_"))
        kind = self.random.choice(kinds)
        detail = getattr(self, kind)()
        return f"{kind.removeprefix('change_')}: {detail}"

    # Files, as a bad disk or copy leaves them, or an attacker who updates the hashes.

    def _file(self) -> Path:
        return self.random.choice(sorted(self.folder.iterdir()))

    def _relist(self) -> str:
        """Update sizes and hashes in the manifest, in half of the cases."""
        if self.random.random() < 0.5:
            return ""
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            values = self._values()
            for name in values["files"]:
                path = self.folder / name
                if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
                    values["files"][name] = vars(describe_file(path))
            self._write(values)
        return ", listed"

    def change_bit(self) -> str:
        path = self._file()
        data = bytearray(path.read_bytes())
        place = self.random.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        return f"{place} of {path.name}{self._relist()}"

    def change_head_of_graph(self) -> str:
        """Flip bits in front, where the nodes are, and not the weights."""
        path = self.folder / GRAPH
        data = bytearray(path.read_bytes())
        for _ in range(self.random.randint(1, 3)):
            data[self.random.randrange(60_000)] ^= 1 << self.random.randrange(8)
        path.write_bytes(data)
        return self._relist()

    def change_length(self) -> str:
        path = self._file()
        size = path.stat().st_size
        new = self.random.choice([0, 1, size // 2, size - 1, size + 1, size + 2**20])
        os.truncate(path, new)
        return f"{path.name} to {new}{self._relist()}"

    def change_content(self) -> str:
        path = self._file()
        junk = self.random.choice([b"", b"\0" * 1000, b"{}", self.random.randbytes(5000), SECRET])
        path.write_bytes(junk)
        return f"{path.name} to {junk[:6]!r}{self._relist()}"

    def change_two_files(self) -> str:
        one, other = self.random.sample(sorted(self.folder.iterdir()), 2)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{one.name}, {other.name}{self._relist()}"

    def change_name(self) -> str:
        path = self._file()
        name = self.random.choice([".hidden", path.name.upper(), "x.so", WEIGHTS, "a b\n", "é"])
        path.rename(self.folder / name)
        return f"{path.name} to {name!r}{self._relist()}"

    def change_number_of_files(self) -> str:
        if self.random.random() < 0.5:
            path = self._file()
            path.unlink()
            return f"without {path.name}{self._relist()}"
        name = self.random.choice([WEIGHTS, "libcustom.so", "bundle.json.sig", *TOKENIZER_FILES])
        (self.folder / name).write_bytes(self.random.randbytes(50))
        return f"with {name}{self._relist()}"

    def change_into_link(self) -> str:
        path = self._file()
        path.unlink()
        kind = self.random.choice(["symlink", "hardlink", "fifo", "folder", "loop"])
        if kind == "symlink":
            path.symlink_to(self.secret)
        elif kind == "hardlink":
            path.hardlink_to(self.secret)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(path)
        if path.name in (values := self._values_if_any()).get("files", {}):
            digest = hashlib.sha256(SECRET).hexdigest()  # an attacker who knows the target
            values["files"][path.name] = {"size": len(SECRET), "sha256": digest}
            self._write(values)
        return f"{path.name}: {kind}"

    # The manifest.

    def _values(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / MANIFEST).read_text()))

    def _values_if_any(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        return {} if path.is_symlink() or not path.is_file() or path.stat().st_nlink > 1 \
            else self._values()  # fmt: skip

    def _write(self, values: dict[str, Any], reseal: float = 0.5) -> None:
        if self.random.random() < reseal and isinstance(values.get("golden"), list):
            values["golden_digest"] = vars(golden_digest(values["golden"]))
        (self.folder / MANIFEST).write_text(json.dumps(values))

    def _walk(self, values: dict[str, Any]) -> tuple[Any, Any]:
        """A random place in the manifest: what holds it, and its key."""
        holder: Any = values
        while True:
            key = self.random.choice(
                sorted(holder) if isinstance(holder, dict) else range(len(holder))
            )
            inner = holder[key]
            if not (isinstance(inner, (dict, list)) and inner) or self.random.random() < 0.2:
                return holder, key
            holder = inner

    def change_value(self) -> str:
        values = self._values()
        holder, key = self._walk(values)
        junk = self.random.choice(_JUNK)
        holder[key] = junk
        self._write(values)
        return f"{key} to {junk!r:.40}"

    def change_number(self) -> str:
        """Change a number of the manifest slightly, which keeps its type."""
        values = self._values()
        for _ in range(1000):
            holder, key = self._walk(values)
            if type(holder[key]) in (int, float):
                break
        holder[key] += self.random.choice([-1, 1, 1e-9, 0.5, 1e6])
        if self.random.random() < 0.5:
            holder[key] = int(holder[key])
        self._write(values)
        return f"{key} to {holder[key]}"

    def change_key(self) -> str:
        values = self._values()
        holder, key = self._walk(values)
        if isinstance(holder, list):
            del holder[key]
        else:
            holder[self.random.choice(["", "new", "__class__", "../x", "é"])] = holder.pop(key)
        self._write(values)
        return str(key)

    def change_literal(self) -> str:
        """Write what JSON readers treat differently: NaN, large numbers, depth, repeated keys."""
        values = self._values()
        holder, key = self._walk(values)
        literal = self.random.choice([*_LITERALS, "twice"])
        if literal == "twice":
            text = json.dumps(values)
            text = f'{{"beta": {self.random.choice([0.5, values["beta"]])}, {text[1:]}'
        else:
            holder[key] = "@here@"
            text = json.dumps(values).replace('"@here@"', literal)
        (self.folder / MANIFEST).write_text(text)
        return f"{key}: {literal[:10]}"

    def change_golden(self) -> str:
        values = self._values()
        golden, act = values["golden"], self.random.choice(["cut", "repeat", "value", "order"])
        if act == "cut":
            del golden[self.random.randrange(len(golden))]
        elif act == "repeat":
            golden.append(self.random.choice(golden))
        elif act == "order":
            self.random.shuffle(golden)
        else:
            golden[0]["reference_logps"][0] += self.random.choice([0.01, 1.0, -5.0])
        self._write(values)
        return act

    # The graph, by an attacker who updates its hash.

    def _graph(self, change: Callable[[onnx.ModelProto], str]) -> str:
        model = onnx.ModelProto.FromString((self.folder / GRAPH).read_bytes())
        detail = change(model)
        (self.folder / GRAPH).write_bytes(model.SerializeToString())
        values = self._values()
        values["files"][GRAPH] = vars(describe_file(self.folder / GRAPH))
        self._write(values)
        return detail

    def change_operator(self) -> str:
        def change(model: onnx.ModelProto) -> str:
            node = self.random.choice(model.graph.node)
            before = node.op_type
            if self.random.random() < 0.5:
                node.op_type = self.random.choice(_OPERATORS)
            else:
                node.domain, node.op_type = self.random.choice(_FOREIGN)
                if self.random.random() < 0.5:
                    model.opset_import.append(onnx.helper.make_opsetid(node.domain, 1))
            return f"{before} to {node.domain}.{node.op_type}"

        return self._graph(change)

    def change_nodes(self) -> str:
        def change(model: onnx.ModelProto) -> str:
            nodes, place = model.graph.node, self.random.randrange(len(model.graph.node))
            act = self.random.choice(["without", "twice", "input", "attribute", "inside"])
            if act == "without":
                del nodes[place]
            elif act == "twice":
                nodes.append(nodes[place])
            elif act == "input" and nodes[place].input:
                nodes[place].input[0] = self.random.choice(nodes).output[0]
            elif act == "attribute":
                nodes[place].attribute.append(onnx.helper.make_attribute("to", 8))
            else:
                graph = onnx.helper.make_graph(nodes[:3], "inside", [], [])
                nodes[place].attribute.append(onnx.helper.make_attribute("body", graph))
            return f"{act} {nodes[min(place, len(nodes) - 1)].op_type}"

        return self._graph(change)

    def change_external_data(self) -> str:
        secret = str(self.secret)
        places = [secret, "../secret", f"x/../../{self.secret.name}", WEIGHTS, GRAPH, MANIFEST, ""]
        location, offset = self.random.choice(places), self.random.choice(["0", "-4", "9" * 30])

        def change(model: onnx.ModelProto) -> str:
            tensor = self.random.choice(model.graph.initializer)
            size = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offset), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
            return f"{location} at {offset}"

        return self._graph(change)

    def change_tensor(self) -> str:
        def change(model: onnx.ModelProto) -> str:
            tensor = self.random.choice(model.graph.initializer)
            act = self.random.choice(["size", "type", "values", "text", "shape"])
            if act == "size" and tensor.dims:
                tensor.dims[0] = self.random.choice([0, -1, 2**31, 2**62, tensor.dims[0] * 2**40])
            elif act == "type":
                tensor.data_type = self.random.choice([1, 7, 8, 10, 11, 99])
            elif act == "text":
                tensor.string_data.append(SECRET)
            elif act == "shape":
                huge = np.array([2**31, 2**20])
                model.graph.initializer.append(onnx.numpy_helper.from_array(huge, "huge"))
                node = next(node for node in model.graph.node if node.op_type == "Expand")
                node.input[1] = "huge"
            else:
                tensor.raw_data = bytes(len(tensor.raw_data))
            return f"{act} of {tensor.name}"

        return self._graph(change)

    def change_model(self) -> str:
        def change(model: onnx.ModelProto) -> str:
            act = self.random.choice(["function", "training", "sparse", "opset", "name", "beta"])
            if act == "function":
                model.functions.append(onnx.helper.make_function("a", "f", [], [], [], []))
            elif act == "training":
                model.training_info.add()
            elif act == "sparse":
                model.graph.sparse_initializer.add()
            elif act == "opset":
                model.opset_import[0].version = self.random.choice([0, -1, 9, 20, 22, 2**40])
            elif act == "name":
                part = self.random.choice([model.graph.input, model.graph.output])
                self.random.choice(part).name = "other"
            else:
                for entry in model.metadata_props:
                    entry.value = "0.5" if entry.key == "logratio.beta" else entry.value
            return act

        return self._graph(change)


def gap(score: Score, known: Score, beta: float) -> float:
    """How far a reward is from the original's, as a multiple of the tolerance at load."""
    if score.error is not None:
        return 0.0  # an error is no score
    slack = tolerance(known.policy_logps, REPLAY) + tolerance(known.reference_logps, REPLAY)
    return abs(score.reward - known.reward) / (beta * slack)


def outcome(folder: Path, known: list[list[Score]], original: Path, beta: float) -> dict[str, Any]:
    """Load a mutant and score the probes; errors other than `BundleError` end the process."""
    try:
        scores = Reranker.load(folder, load_seconds=LOAD_SECONDS).score_many(PROBES)
    except BundleError as error:
        return {"refused": str(error)}
    pairs = [pair for rows in zip(scores, known, strict=True) for pair in zip(*rows, strict=True)]
    content = manifest_bytes(folder)
    is_detected = content == manifest_bytes(original)  # then nothing was changed
    try:
        check_digest(folder, content, digest_of(manifest_bytes(original)))
    except BundleError:
        is_detected = True
    return {
        "gap": max(gap(score, expected, beta) for score, expected in pairs),
        "is_detected_by_digest": is_detected,
    }


def main(bundle: Path, secret: Path, work: Path, first: int, last: int) -> None:
    """Load the mutants of seeds `first` to `last` - 1."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    original = Reranker.load(bundle)
    known, beta = original.score_many(PROBES), original.manifest.beta
    for seed in range(first, last):
        folder = Path(shutil.copytree(bundle, work / str(seed)))
        what = Mutant(folder, secret, seed).mutate()
        sys.stdout.write(json.dumps({"seed": seed, "what": what}) + "\n")
        sys.stdout.flush()
        start = time.monotonic()
        found = outcome(folder, known, bundle, beta) | {"seconds": time.monotonic() - start}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
        shutil.rmtree(folder)


if __name__ == "__main__":
    bundle, secret, work = map(Path, sys.argv[1:4])
    main(bundle, secret, work, int(sys.argv[4]), int(sys.argv[5]))
