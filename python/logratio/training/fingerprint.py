"""Fingerprint of a reference: a hash of its weights, config, adapter and compute dtype.

The fingerprint is computed from the model's folder without loading the model, so a run whose
log-probs are all cached needs no reference in memory. A difference in a hard field means a
different reference. A difference in a soft field changes log-probs by rounding only: it is
reported, and a sample of the cache is scored again.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from logratio.cache.identity import DamagedFingerprintError, fingerprint_digest, read_fingerprint
from logratio.training.config import Precision, Quantization, TrainConfig
from logratio.training.given_model import given_model
from logratio.training.models import (
    ADAPTER_CONFIG,
    SCHEMES,
    ModelFolderError,
    base_folder,
    check_model_folder,
    precision_of,
)

NAMES = {
    "_name_or_path", "architectures", "auto_map", "transformers_version", "_commit_hash",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id",
}  # fmt: skip
"""Names of a model, and labels of classifiers. `model_type` alone determines the class."""

LOADING = {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "gradient_checkpointing",
}  # fmt: skip
"""How weights are stored, loaded and run. The stored dtype is hashed with the weights, the compute
dtype is a separate hard field, and the attention implementation is a soft field."""

TRAINING = {
    "attention_dropout", "attn_pdrop", "attn_dropout", "embd_pdrop", "embedding_dropout",
    "resid_pdrop", "resid_dropout", "hidden_dropout", "dropout", "activation_dropout",
    "ffn_dropout", "layerdrop", "layer_dropout", "classifier_dropout", "summary_first_dropout",
    "initializer_range", "initializer_factor", "router_aux_loss_coef", "router_z_loss_coef",
    "router_jitter_noise",
}  # fmt: skip
"""Entries that act only in training mode or before the weights are loaded; dropout is off."""

IGNORED_CONFIG = NAMES | LOADING | TRAINING
"""Config entries that cannot change a log-prob. Every other entry is part of the fingerprint."""

IGNORED_ADAPTER_CONFIG = {
    "base_model_name_or_path", "inference_mode", "revision", "peft_version", "lora_dropout",
}  # fmt: skip
"""Adapter entries that cannot change a log-prob; the base's weights are hashed themselves."""


def model_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a model folder's config.json with all defaults filled in.

    An omitted default equals a written one, `10000` equals `10000.0`, and old names of a setting
    equal new ones. If transformers does not know the model, the file is used unchanged.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:
        written = json.loads((folder / "config.json").read_text())
        return {k: _plain(v) for k, v in sorted(written.items()) if k not in IGNORED_CONFIG}
    return _settings(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a config and of its nested configs (text, vision).

    Known fields that are None are omitted, so that a newer transformers with more optional fields
    computes the same fingerprint.
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
    """Return the settings in adapter_config.json; lists of names are sorted, as order is free."""
    found = {}
    for name, value in sorted(json.loads(path.read_text()).items()):
        if name not in IGNORED_ADAPTER_CONFIG:
            is_names = isinstance(value, list) and all(isinstance(v, str) for v in value)
            found[name] = sorted(value) if is_names else _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Convert integral floats to integers, at any depth."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


VERSION = 2
COMPUTE_DTYPE = "compute_dtype"
"""Name of the hard field that records the precision."""
QUANTIZATION = "quantization"
"""Name of the hard field that records quantization at loading; absent without it."""
COMPUTES_IN: Mapping[Precision, str] = {
    "fp32": "float32",
    "bf16": "bfloat16 autocast over float32",
    "bf16-weights": "bfloat16",
}
"""Precision as recorded in a fingerprint; with "bfloat16", weights are rounded to it too."""
CHUNK = 2**24
SHOWN_CHARACTERS = 40
"""Values of fields that are longer than this, and hashes, are not shown in messages."""


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a reference.

    Attributes:
        hard: Fields that identify the reference: any difference means a different reference.
        soft: Fields that change log-probs by rounding only, such as library versions.
    """

    hard: Mapping[str, Any]
    soft: Mapping[str, Any]

    @property
    def digest(self) -> bytes:
        """Hash of the hard fields, 32 bytes."""
        return fingerprint_digest(self.hard)

    @property
    def name(self) -> str:
        """Name of the cache folder: the first 16 hexadecimal digits of the digest."""
        return self.digest.hex()[:16]

    @property
    def precision(self) -> Precision | None:
        """The `--precision` that gives this fingerprint; None if there is no such precision."""
        stated = self.hard.get(COMPUTE_DTYPE)
        return next((name for name, words in COMPUTES_IN.items() if words == stated), None)

    @property
    def quantization(self) -> Quantization | None:
        """The `--quantization` that gives this fingerprint; None if there was none."""
        stated = self.hard.get(QUANTIZATION)
        return next((name for name, words in SCHEMES.items() if words == stated), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fingerprint as a dict, for `fingerprint.json` and the bundle."""
        return {"digest": self.digest.hex(), "hard": dict(self.hard), "soft": dict(self.soft)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return the names of hard fields that differ from `other`, another hard mapping."""
        names = sorted(self.hard.keys() | other.keys())
        return [name for name in names if self.hard.get(name) != other.get(name)]

    def explain(self, stored: Mapping[str, Any]) -> str:
        """Describe the differences from `stored`, a hard mapping: `field old -> new, ...`."""
        old, new = dict(_flat(stored)), dict(_flat(self.hard))
        names = [name for name in sorted(old | new) if old.get(name, "") != new.get(name, "")]
        return ", ".join(_change(name, old, new) for name in names) or "nothing"


def stored_fingerprint(path: Path) -> Fingerprint:
    """Read the fingerprint at `path`, in a cache folder `<name>` or `<name>.sums`.

    Raises:
        DamagedFingerprintError: Its fields do not match its digest or the folder's name.
    """
    fields = read_fingerprint(path)
    found = Fingerprint(fields["hard"], fields["soft"])
    if path.parent.name.split(".")[0] != found.name:
        raise DamagedFingerprintError(
            f"{path}: its fields do not match the folder's name; the file was altered or the "
            "folder renamed, so the origin of the cached log-probs is unknown"
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
    """Return the fingerprint of the model or adapter in `folder`.

    Args:
        folder: Folder of the model or adapter.
        precision: Precision that the model computes in.
        quantization: Quantization applied at loading. A checkpoint that is already quantized
            records this in its config.

    Raises:
        ModelFolderError: The folder does not contain a loadable model.
    """
    folder = Path(folder)
    check_model_folder(folder, rewards=True)
    base = base_folder(folder)
    hard = {
        "version": VERSION,
        "config": model_settings(base),
        "weights": weights_digest(base, "*.safetensors"),
        "adapter": _adapter(folder) if base != folder else None,
        COMPUTE_DTYPE: COMPUTES_IN[precision],
    }
    if quantization:
        hard[QUANTIZATION] = SCHEMES[quantization]
    return Fingerprint(hard, versions())


def reference_fingerprint(config: TrainConfig) -> Fingerprint:
    """Return the fingerprint of a run's reference, which names its folder in a cache."""
    folder = config.reference or config.model
    return model_fingerprint(folder, precision_of(config), config.quantization)


def versions() -> dict[str, str]:
    """Return the soft fields that are known without loading the model."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _adapter(folder: Path) -> dict[str, Any]:
    return {
        "config": adapter_settings(folder / ADAPTER_CONFIG),
        "weights": weights_digest(folder, "adapter_model.safetensors"),
    }


def weights_digest(folder: Path, pattern: str) -> str:
    """Hash every tensor's name, dtype, shape and bytes, independently of the split into files.

    The weights of a model in memory are those at the start of the run: see `given_model`. If two
    files contain the same name, both tensors are hashed: either could be loaded.
    """
    if given := given_model(folder):
        return given.weights_digest
    tensors: dict[str, list[Any]] = {}
    for path in sorted(folder.glob(pattern)):
        state = path.stat()
        for name, entry in _tensors(path, state.st_size, state.st_mtime_ns):
            tensors.setdefault(name, []).append(entry)
    return fingerprint_digest(tensors).hex()


@lru_cache(maxsize=256)
def _tensors(path: Path, _size: int, _changed: int) -> list[tuple[str, list[Any]]]:
    """Return the name and [dtype, shape, SHA-256 of the bytes] of each tensor in a file.

    A run asks several times, and 140 GB take minutes; so a file of the same size that has not
    changed since is not read again.
    """
    found = []
    with path.open("rb") as file:
        header, start = _header(file, path)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            found.append((name, [entry["dtype"], entry["shape"], _sha256(file, end - begin)]))
    return found


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
    """Count a model's parameters from its files' headers; includes the base of an adapter."""
    if given := given_model(folder):
        return given.parameter_count()
    folder = Path(folder)
    base = base_folder(folder)
    return sum(_elements(path) for part in {folder, base} for path in part.glob("*.safetensors"))


def _elements(path: Path) -> int:
    return sum(int(torch.Size(shape).numel()) for _, shape in tensor_shapes(path))


def tensor_shapes(path: Path) -> list[tuple[str, list[int]]]:
    """Return the name and shape of each tensor in a safetensors file, from its header."""
    with path.open("rb") as file:
        header, _ = _header(file, path)
    return [(name, entry["shape"]) for name, entry in header.items()]
