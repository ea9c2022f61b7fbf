"""What makes a reference's log-probs valid: its weights, config, adapter and compute dtype.

Read from the model's folder, without loading the model, so that a run with everything cached
needs none. A difference in a hard field is another reference; a soft one is told and re-scored.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from logratio.cache.identity import DamagedFingerprintError, fingerprint_digest, read_fingerprint
from logratio.training.config import Precision, Quantization
from logratio.training.models import (
    ADAPTER_CONFIG,
    SCHEMES,
    ModelFolderError,
    base_folder,
    check_model_folder,
)

NAMES = {
    "_name_or_path", "architectures", "auto_map", "transformers_version", "_commit_hash",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id",
}  # fmt: skip
"""What a model is called, and classifiers' labels. The class follows from `model_type` alone."""

LOADING = {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "gradient_checkpointing",
}  # fmt: skip
"""How weights are stored, loaded and run. They are always loaded in float32: the dtype that they
are stored in is hashed with them, and the attention is a soft field."""

TRAINING = {
    "attention_dropout", "attn_pdrop", "attn_dropout", "embd_pdrop", "embedding_dropout",
    "resid_pdrop", "resid_dropout", "hidden_dropout", "dropout", "activation_dropout",
    "ffn_dropout", "layerdrop", "layer_dropout", "classifier_dropout", "summary_first_dropout",
    "initializer_range", "initializer_factor", "router_aux_loss_coef", "router_z_loss_coef",
    "router_jitter_noise",
}  # fmt: skip
"""What acts in training mode only, or before the weights are loaded; dropout is always off here."""

IGNORED_CONFIG = NAMES | LOADING | TRAINING
"""Config entries that cannot change a log-prob. An entry that is not named here can."""

IGNORED_ADAPTER_CONFIG = {
    "base_model_name_or_path", "inference_mode", "revision", "peft_version", "lora_dropout",
}  # fmt: skip
"""The base's weights are hashed themselves, wherever it lies."""


def model_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a model folder's config.json with every default filled in.

    A default that is left out and one that is spelled are equal, as are `10000` and `10000.0` and
    names of other times for the same setting. Where transformers does not know the model, the file
    counts as it is.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:
        written = json.loads((folder / "config.json").read_text())
        return {k: _plain(v) for k, v in sorted(written.items()) if k not in IGNORED_CONFIG}
    return _settings(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a config and of the configs inside it (text, vision).

    A known field that is None is left out, so that a version of transformers that knows more
    optional fields finds the same reference.
    """
    known = {field.name for field in fields(config)}
    found = {}
    for name, value in sorted(json.loads(config.to_json_string(use_diff=False)).items()):
        if name in IGNORED_CONFIG or (value is None and name in known):
            continue
        part = getattr(config, name, None)
        found[name] = _settings(part) if isinstance(part, PreTrainedConfig) else _plain(value)
    return found


def adapter_settings(path: Path) -> dict[str, Any]:
    """Return the settings in adapter_config.json; lists of names there are sets, in any order."""
    found = {}
    for name, value in sorted(json.loads(path.read_text()).items()):
        if name not in IGNORED_ADAPTER_CONFIG:
            is_names = isinstance(value, list) and all(isinstance(v, str) for v in value)
            found[name] = sorted(value) if is_names else _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Write whole floats as integers, at any depth."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


VERSION = 2
COMPUTE_DTYPE = "compute_dtype"
"""The hard field that states the precision."""
COMPUTES_IN: Mapping[Precision, str] = {
    "fp32": "float32",
    "bf16": "bfloat16 autocast over float32",
    "bf16-weights": "bfloat16",
}
"""How a fingerprint states the precision; bfloat16 alone: the weights too are rounded to it."""
CHUNK = 2**24
SHOWN_CHARACTERS = 40
"""A longer value of a field, or a hash, is named and not shown."""


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
        return fingerprint_digest(self.hard)

    @property
    def name(self) -> str:
        """The cache folder's name: the first 16 hexadecimal digits of the digest."""
        return self.digest.hex()[:16]

    @property
    def precision(self) -> Precision | None:
        """The `--precision` that makes this fingerprint; None where none does."""
        stated = self.hard.get(COMPUTE_DTYPE)
        return next((name for name, words in COMPUTES_IN.items() if words == stated), None)

    def to_dict(self) -> dict[str, Any]:
        """Return it readable, for `fingerprint.json` and the bundle."""
        return {"digest": self.digest.hex(), "hard": dict(self.hard), "soft": dict(self.soft)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Name the hard fields in which `other` (a hard mapping) differs."""
        names = sorted(self.hard.keys() | other.keys())
        return [name for name in names if self.hard.get(name) != other.get(name)]

    def explain(self, stored: Mapping[str, Any]) -> str:
        """Say how this differs from what is `stored` (a hard mapping): `field old -> new, ...`."""
        old, new = dict(_flat(stored)), dict(_flat(self.hard))
        names = [name for name in sorted(old | new) if old.get(name, "") != new.get(name, "")]
        return ", ".join(_change(name, old, new) for name in names) or "nothing"


def stored_fingerprint(path: Path) -> Fingerprint:
    """Read a fingerprint that lies in its cache folder, `<name>` or `<name>.sums`.

    Raises:
        DamagedFingerprintError: its fields do not hash to its digest or to the folder's name.
    """
    fields = read_fingerprint(path)
    found = Fingerprint(fields["hard"], fields["soft"])
    if path.parent.name.split(".")[0] != found.name:
        raise DamagedFingerprintError(
            f"{path}: its folder's name is not that of its fields; the file was altered, or the "
            "folder renamed, so what the cache holds is unknown"
        )
    return found


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    shown = [str(fields.get(name, "absent")) for fields in (old, new)]
    is_hash = any(len(text) == 64 and " " not in text for text in shown)
    if is_hash or any(len(text) > SHOWN_CHARACTERS for text in shown):
        return name
    return f"{name} {shown[0]} -> {shown[1]}"


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
        "config": model_settings(base),
        "weights": weights_digest(base, "*.safetensors"),
        "adapter": _adapter(folder) if base != folder else None,
        COMPUTE_DTYPE: COMPUTES_IN[precision],
    }
    if quantization:
        hard["quantization"] = SCHEMES[quantization]
    return Fingerprint(hard, versions())


def versions() -> dict[str, str]:
    """Return the soft fields that are known without the model."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _adapter(folder: Path) -> dict[str, Any]:
    return {
        "config": adapter_settings(folder / ADAPTER_CONFIG),
        "weights": weights_digest(folder, "adapter_model.safetensors"),
    }


def weights_digest(folder: Path, pattern: str) -> str:
    """Hash every tensor's name, dtype, shape and bytes, however they are spread over files.

    A name that two files hold counts with both: which of them is loaded is not known here.
    """
    tensors: dict[str, list[Any]] = {}
    for path in sorted(folder.glob(pattern)):
        for name, entry in _tensors(path):
            tensors.setdefault(name, []).append(entry)
    return fingerprint_digest(tensors).hex()


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
        raise ModelFolderError(f"{path}: not a safetensors file")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _sha256(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        chunk = file.read(min(size, CHUNK))
        if not chunk:
            raise ModelFolderError("a safetensors file ends inside a tensor")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def parameter_count(folder: str | Path) -> int:
    """Count a model's parameters from its files' headers; an adapter's base is counted with it."""
    folder = Path(folder)
    base = base_folder(folder)
    return sum(_elements(path) for part in {folder, base} for path in part.glob("*.safetensors"))


def _elements(path: Path) -> int:
    return sum(int(torch.Size(shape).numel()) for _, shape in tensor_shapes(path))


def tensor_shapes(path: Path) -> list[tuple[str, list[int]]]:
    """Return the name and shape of each tensor of a safetensors file, from its header."""
    with path.open("rb") as file:
        header, _ = _header(file, path)
    return [(name, entry["shape"]) for name, entry in header.items()]
