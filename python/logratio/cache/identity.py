"""Identify the reference of a cache folder, and the conditions under which it was filled.

`fingerprint.json` stores two kinds of fields. A difference in a hard field (weights, config,
adapter, precision) makes another reference. Soft fields (device, layout, library versions) cause
only rounding, so they are stored next to the hard fields but are not hashed.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from logratio.durable import write_atomic
from logratio.errors import LogratioError


class DamagedFingerprintError(LogratioError, ValueError):
    """A folder's fingerprint cannot be read, or its fields do not match its digest."""


def record_conditions(folder: Path, soft: Mapping[str, Any]) -> None:
    """Store the soft fields of a writer in a cache folder.

    The file is named after the hash of its content: writers with the same conditions share one
    file, and no two writers ever write different content to it.
    """
    text = json.dumps(dict(soft), indent=1, sort_keys=True)
    path = folder / f"conditions-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        write_atomic(path, text)


def read_conditions(folder: Path) -> list[Mapping[str, Any]]:
    """Return the soft fields of a folder's writers, one mapping per distinct set of conditions.

    Raises:
        DamagedFingerprintError: A file of conditions cannot be read.
    """
    found: list[Mapping[str, Any]] = []
    for path in sorted(folder.glob("conditions-*.json")):
        try:
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise DamagedFingerprintError(
                f"{path}: cannot read the conditions ({error})"
            ) from error
    return found


Kind = Literal["per-token", "sums"]

FINGERPRINT_FILE = "fingerprint.json"
"""File in each folder that describes its reference in readable form."""
SUMS = ".sums"
"""Suffix of a folder that contains only sums."""
NAME_DIGITS = 16
SHOWN_DIGITS = 8
"""Shown digits of the weights' hash, which distinguish models of one architecture."""
FLOAT32_TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.75
"""Nats per token; the same as in training's check of a sample under other conditions."""
JOURNAL_HEADER = 64
JOURNAL_MAGIC = b"LRJOURN1"
KINDS: tuple[Kind, Kind] = ("per-token", "sums")
"""Indexed by the number in a journal's header."""


@dataclass(frozen=True)
class StoredReference:
    """One folder of a cache: the log-probs or sums of one reference.

    Attributes:
        path: The folder.
        kind: `per-token`, the log-prob of every completion token; or `sums`, one per completion.
        digest: The hash of the hard fields, 32 bytes, which identifies the reference.
        hard: The fields that identify the reference; empty if the folder has no
            `fingerprint.json`.
        soft: The conditions under which the folder was filled, one mapping per kind of writer.
        problem: Why `hard` and `soft` cannot be trusted, or None.
    """

    path: Path
    kind: Kind
    digest: bytes
    hard: Mapping[str, Any]
    soft: tuple[Mapping[str, Any], ...] = ()
    problem: str | None = None

    def __repr__(self) -> str:
        return f"StoredReference({str(self.path)!r}, {self.kind}, {self.describe()})"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def proper_name(self) -> str:
        """The folder name that training expects."""
        return self.digest.hex()[:NAME_DIGITS] + (SUMS if self.kind == "sums" else "")

    @property
    def keeps_sums(self) -> bool:
        """Whether the folder contains only sums."""
        return self.kind == "sums"

    @property
    def tolerance(self) -> float:
        """Largest difference in nats per token between two records; see `record_tolerance`."""
        return record_tolerance(self.hard)

    def check(self) -> None:
        """Check that the folder's fingerprint can be trusted.

        Raises:
            DamagedFingerprintError: The fingerprint was altered.
        """
        if self.problem:
            raise DamagedFingerprintError(self.problem)

    def describe(self) -> str:
        """Describe the model in a few words: its type, sizes and precision."""
        return ", ".join(_described(self.hard)) or "unknown model (no fingerprint.json)"


def _described(hard: Mapping[str, Any]) -> Iterator[str]:
    config = hard.get("config") or {}
    if kind := config.get("model_type"):
        yield str(kind)
    for field, words in (
        ("num_hidden_layers", "{} layers"),
        ("hidden_size", "hidden size {}"),
        ("vocab_size", "vocabulary {:,}"),
    ):
        if isinstance(value := config.get(field), int):
            yield words.format(value)
    if adapter := hard.get("adapter"):
        settings = adapter.get("config", {})
        yield f"adapter {settings.get('peft_type', '')} r={settings.get('r', '?')}"
    if isinstance(weights := hard.get("weights"), str):
        yield f"weights {weights[:SHOWN_DIGITS]}"
    for field in sorted(hard.keys() - {"version", "config", "weights", "adapter"}):
        if hard[field] is not None:
            yield f"{field.replace('_', ' ')} {hard[field]}"


def record_tolerance(hard: Mapping[str, Any]) -> float:
    """Return the largest difference in nats per token between two records of one completion.

    Log-probs depend on the shape of the batch through rounding: little in float32, much in bfloat16
    and with quantized weights. An unknown dtype counts as float32: this may report a false
    contradiction, but never misses one.

    Args:
        hard: The hard fields of the reference's fingerprint.
    """
    config = hard.get("config") or {}
    is_quantized = bool(hard.get("quantization") or config.get("quantization_config"))
    is_exact = hard.get("compute_dtype", "float32") == "float32" and not is_quantized
    return FLOAT32_TOLERANCE if is_exact else COARSE_TOLERANCE


def fingerprint_digest(hard: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a fingerprint's hard fields, 32 bytes."""
    text = json.dumps(hard, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def find_references(root: Path) -> list[StoredReference]:
    """Return the references in `root`, sorted by name, or the one whose folder `root` is.

    Raises:
        OSError: The folder cannot be listed.
    """
    if reference := read_reference(root):
        return [reference]
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return [found for folder in folders if (found := read_reference(folder))]


def read_reference(folder: Path) -> StoredReference | None:
    """Return the reference of a folder, or None if it is not a cache folder."""
    stored, soft, problem = _read_fields(folder)
    identity = _identity_from_files(folder)
    digest = fingerprint_digest(stored["hard"]) if stored else identity and identity[0]
    if digest is None:
        if problem is None:
            return None
        digest = bytes(32)  # unknown: no file in the folder is readable
    return StoredReference(
        path=folder,
        kind=identity[1] if identity else KINDS[folder.name.endswith(SUMS)],
        digest=digest,
        hard=stored["hard"] if stored else {},
        soft=soft,
        problem=problem,
    )


def _read_fields(
    folder: Path,
) -> tuple[dict[str, Any] | None, tuple[Mapping[str, Any], ...], str | None]:
    """Return a folder's fingerprint, all its conditions, and a problem with them or None."""
    path, stored = folder / FINGERPRINT_FILE, None
    try:
        stored = read_fingerprint(path) if path.exists() else None
        first = [stored["soft"]] if stored else []
        return stored, (*first, *read_conditions(folder)), None
    except DamagedFingerprintError as error:
        return stored, (), str(error)


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Read a fingerprint's `digest`, `hard` and `soft` fields.

    Raises:
        DamagedFingerprintError: It cannot be read, or its fields do not match its digest.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = {"digest": fields["digest"], "hard": dict(fields["hard"])}
        found["soft"] = dict(fields.get("soft", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFingerprintError(f"{path}: cannot read the fingerprint ({error})") from error
    if fingerprint_digest(found["hard"]).hex() != found["digest"]:
        raise DamagedFingerprintError(
            f"{path}: its fields do not match its digest, so the file was altered: restore it or "
            "remove it (it only describes the reference in readable form)"
        )
    return found


def _identity_from_files(folder: Path) -> tuple[bytes, Kind] | None:
    """Return the digest and kind in the first readable manifest or journal."""
    manifests = (_identity_from_manifest(path) for path in sorted(folder.glob("*.manifest.json")))
    journals = (_identity_from_journal(path) for path in sorted(folder.glob("*.journal")))
    return next((found for some in (manifests, journals) for found in some if found), None)


def _identity_from_manifest(path: Path) -> tuple[bytes, Kind] | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        digest, kind = bytes.fromhex(fields["fingerprint"]), fields["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (digest, kind) if len(digest) == 32 and kind in KINDS else None


def _identity_from_journal(path: Path) -> tuple[bytes, Kind] | None:
    try:
        with path.open("rb") as file:
            header = file.read(JOURNAL_HEADER)
    except OSError:
        return None
    if len(header) < JOURNAL_HEADER or not header.startswith(JOURNAL_MAGIC):
        return None
    (kind,) = struct.unpack_from("<I", header, 56)
    return (header[16:48], KINDS[kind]) if kind < len(KINDS) else None
