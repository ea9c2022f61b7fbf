"""What makes a reference's log-probs valid: its weights, config, adapter and compute dtype.

Read from the model's folder, without loading the model, so that a run with everything cached
needs none. A difference in a hard field is another reference; soft fields are only recorded.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from logratio.training.config import Precision, Quantization
from logratio.training.models import ADAPTER_CONFIG, base_folder, check_model_folder
from logratio.training.quantization import SCHEMES

VERSION = 1
CHUNK = 2**24
IGNORED_CONFIG = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Config entries that cannot change a log-prob: names, and how weights are stored or loaded."""
IGNORED_ADAPTER_CONFIG = {"base_model_name_or_path", "inference_mode", "revision", "peft_version"}


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a reference.

    Attributes:
        hard: fields of which any difference makes another reference.
        soft: fields that may move a log-prob by rounding only.
    """

    hard: Mapping[str, Any]
    soft: Mapping[str, Any]

    @property
    def digest(self) -> bytes:
        """32 bytes: the hash of the hard fields."""
        return hashlib.sha256(_canonical(self.hard)).digest()

    @property
    def name(self) -> str:
        """The cache folder's name: the first 16 hexadecimal digits of the digest."""
        return self.digest.hex()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return it readable, for `fingerprint.json` and the bundle."""
        return {"digest": self.digest.hex(), "hard": dict(self.hard), "soft": dict(self.soft)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Name the hard fields in which `other` (a hard mapping) differs."""
        names = sorted(self.hard.keys() | other.keys())
        return [name for name in names if self.hard.get(name) != other.get(name)]


def model_fingerprint(
    folder: str | Path, precision: Precision = "fp32", quantization: Quantization | None = None
) -> Fingerprint:
    """Fingerprint the model or adapter in `folder`, computing in `precision`.

    A checkpoint that is quantised says so in its config; `quantization` is what loading adds.

    Raises:
        ModelFolderError: the folder holds no model.
    """
    folder = Path(folder)
    check_model_folder(folder)
    base = base_folder(folder)
    hard = {
        "version": VERSION,
        "config": _config(base / "config.json", IGNORED_CONFIG),
        "weights": weights_digest(base, "*.safetensors"),
        "adapter": _adapter(folder) if base != folder else None,
        "compute_dtype": {"fp32": "float32", "bf16": "bfloat16 autocast over float32"}[precision],
    }
    if quantization:
        hard["quantization"] = SCHEMES[quantization]
    soft = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Fingerprint(hard, soft)


def _adapter(folder: Path) -> dict[str, Any]:
    return {
        "config": _config(folder / ADAPTER_CONFIG, IGNORED_ADAPTER_CONFIG),
        "weights": weights_digest(folder, "adapter_model.safetensors"),
    }


def _config(path: Path, ignored: set[str]) -> dict[str, Any]:
    fields = json.loads(path.read_text())
    return {name: value for name, value in sorted(fields.items()) if name not in ignored}


def weights_digest(folder: Path, pattern: str) -> str:
    """Hash every tensor's name, dtype, shape and bytes, however they are spread over files."""
    tensors = {
        name: entry for path in sorted(folder.glob(pattern)) for name, entry in _tensors(path)
    }
    return hashlib.sha256(_canonical(tensors)).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and [dtype, shape, SHA-256 of the bytes] of each tensor of a file."""
    with path.open("rb") as file:
        header, start = _header(file, path)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            yield name, [entry["dtype"], entry["shape"], _sha256(file, end - begin)]


def _header(file: Any, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < size <= path.stat().st_size - 8:
        raise ValueError(f"{path}: not a safetensors file")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _sha256(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        chunk = file.read(min(size, CHUNK))
        if not chunk:
            raise ValueError("a safetensors file ends inside a tensor")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def parameter_count(folder: str | Path) -> int:
    """Count a model's parameters from its files' headers; an adapter's base is counted with it."""
    folder = Path(folder)
    base = base_folder(folder)
    return sum(_elements(path) for part in {folder, base} for path in part.glob("*.safetensors"))


def _elements(path: Path) -> int:
    with path.open("rb") as file:
        header, _ = _header(file, path)
    return sum(int(torch.Size(entry["shape"]).numel()) for entry in header.values())


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
