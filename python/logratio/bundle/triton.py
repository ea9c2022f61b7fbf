"""A model repository for NVIDIA Triton from a bundle: the graph, and a configuration for it."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from logratio.bundle.files import GRAPH, WEIGHTS, BundleError, verify_files
from logratio.bundle.graph_file import Port, check_graph_file
from logratio.bundle.manifest import check_digest, digest_of, manifest_bytes, parse_manifest
from logratio.bundle.signature import check_signature
from logratio.errors import ConfigError, InputError

CONFIG = "config.pbtxt"
_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}


def write_triton_repository(
    folder: Path,
    output: Path,
    name: str | None = None,
    *,
    expect: str | None = None,
    allowed_signers: str | Path | None = None,
) -> Path:
    """Write a model repository for Triton's ONNX Runtime backend.

    The graph takes token ids: `logratio.serving.GraphTensors` makes them from text.

    Args:
        folder: The bundle, whose files and graph are checked.
        output: The repository; other models in it are kept.
        name: Name of the model; None: the bundle's name.
        expect: Digest that the bundle must have; None: any.
        allowed_signers: File of keys, one of which must have signed the bundle; None: no check.

    Returns:
        The folder of the model.

    Raises:
        BundleError: The folder is not a bundle, was altered, or has another digest or signature.
        ConfigError: The name cannot be that of a model, `expect` is not a digest,
            `allowed_signers` cannot be used, or the bundle is an adapter or takes adapters.
        InputError: The repository already has a model of this name.
    """
    content = manifest_bytes(folder)
    if expect is not None:
        check_digest(folder, content, expect)
    if allowed_signers is not None:
        check_signature(folder, content, allowed_signers)
    manifest = parse_manifest(content, folder)
    name = name or manifest.name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r} must have letters, digits and ._- only")
    if manifest.base is not None or manifest.graph.takes_adapters:
        raise ConfigError(f"{folder}: Triton takes no adapters; export without --base")
    model = output / name
    if model.exists():
        raise InputError(f"{model} already exists: choose another --name, or remove it")
    verify_files(folder, manifest.files)
    graph = check_graph_file(folder, manifest.files, manifest.graph.opset)
    config = triton_config(name, graph.inputs, graph.outputs, digest_of(content))
    version = model / _VERSION
    version.mkdir(parents=True)
    for file in (GRAPH, WEIGHTS):
        if file in manifest.files:
            shutil.copyfile(folder / file, version / file)
    (model / CONFIG).write_text(config)
    return model


def triton_config(
    name: str, inputs: Mapping[str, Port], outputs: Mapping[str, Port], digest: str
) -> str:
    """Return the text of Triton's ``config.pbtxt``.

    Triton does not combine requests (``max_batch_size: 0``): the first size of the inputs differs,
    and candidates refer to rows of the prompts.

    Raises:
        BundleError: An input or output has a type that no export writes.
    """
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{GRAPH}"',
        "max_batch_size: 0",
        f"input [\n{_ports(inputs)}\n]",
        f"output [\n{_ports(outputs)}\n]",
        f'parameters {{ key: "logratio.digest" value {{ string_value: "{digest}" }} }}',
    ]
    return "\n".join(lines) + "\n"


def _ports(ports: Mapping[str, Port]) -> str:
    for name, port in ports.items():
        if port.dtype not in _TYPES or not _NAME.fullmatch(name):
            raise BundleError(f"{name!r:.100} is no input or output of an export ({port.dtype})")
    return ",\n".join(
        f'  {{ name: "{name}" data_type: {_TYPES[port.dtype]} dims: {[*port.shape]} }}'
        for name, port in ports.items()
    )
