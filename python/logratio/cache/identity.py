"""Which reference a folder of a cache belongs to, and the conditions it was filled under."""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from logratio.durable import write_whole
from logratio.errors import LogratioError


class DamagedFingerprintError(LogratioError, ValueError):
    """What a folder says of itself cannot be read, or is not what its digest was made from."""


def record_conditions(folder: Path, soft: Mapping[str, Any]) -> None:
    """Store the soft fields under which a cache's folder is being filled.

    Writers under the same conditions have one file, named after its content, so that no two
    writers write different things to one.
    """
    text = json.dumps(dict(soft), indent=1, sort_keys=True)
    path = folder / f"conditions-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        write_whole(path, text)


def read_conditions(folder: Path) -> list[Mapping[str, Any]]:
    """Return the soft fields that a folder's writers left, one mapping a kind of writer.

    Raises:
        DamagedFingerprintError: a file of conditions cannot be read.
    """
    found: list[Mapping[str, Any]] = []
    for path in sorted(folder.glob("conditions-*.json")):
        try:
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise DamagedFingerprintError(f"{path}: no readable conditions ({error})") from error
    return found


Kind = Literal["per-token", "sums"]

FINGERPRINT_FILE = "fingerprint.json"
"""Says in each folder, readably, whose log-probs these are."""
SUMS = ".sums"
"""What the name of a folder that keeps sums ends with."""
NAME_DIGITS = 16
SHOWN_DIGITS = 8
"""Of the weights' hash: tells models of one architecture apart."""
FLOAT32_TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.75
"""What training's check of a sample allows a token whose conditions differ."""
JOURNAL_HEADER = 64
JOURNAL_MAGIC = b"LRJOURN1"
KINDS: tuple[Kind, Kind] = ("per-token", "sums")
"""As the number in a journal's header has them."""


@dataclass(frozen=True)
class StoredReference:
    """One folder of a cache: the log-probs, or sums, of one reference.

    Attributes:
        path: the folder.
        kind: `per-token`, the log-prob of every completion token, or `sums`, one a completion.
        digest: 32 bytes that name the reference: the hash of its hard fields.
        hard: the fields of which any difference makes another reference; empty where the folder
            has no `fingerprint.json`.
        soft: the conditions that it was filled under, a mapping for each kind of writer.
        problem: why `hard` and `soft` cannot be believed, or None.
    """

    path: Path
    kind: Kind
    digest: bytes
    hard: Mapping[str, Any]
    soft: tuple[Mapping[str, Any], ...] = ()
    problem: str | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def proper_name(self) -> str:
        """The name under which training looks for this folder."""
        return self.digest.hex()[:NAME_DIGITS] + (SUMS if self.kind == "sums" else "")

    @property
    def keeps_sums(self) -> bool:
        """Whether it keeps sums only."""
        return self.kind == "sums"

    @property
    def tolerance(self) -> float:
        """Nats that two records of one completion may be apart: see `record_tolerance`."""
        return record_tolerance(self.hard)

    def check(self) -> None:
        """Refuse a folder of which nobody can say what it holds.

        Raises:
            DamagedFingerprintError: the fingerprint in it was altered.
        """
        if self.problem:
            raise DamagedFingerprintError(self.problem)

    def describe(self) -> str:
        """Return what the model is, in a few words: its kind, its sizes, what it computes in."""
        return ", ".join(_described(self.hard)) or "no fingerprint.json says which model it is"


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
    """Return the nats a token within which two records are two batches of one reference.

    Batches of other shapes round differently: in float32 hardly, in bfloat16 and in products of
    few bits by much. What no fingerprint tells is taken for float32: a contradiction is then told
    that may be none, and none is passed over.
    """
    config = hard.get("config") or {}
    is_quantized = bool(hard.get("quantization") or config.get("quantization_config"))
    is_exact = hard.get("compute_dtype", "float32") == "float32" and not is_quantized
    return FLOAT32_TOLERANCE if is_exact else COARSE_TOLERANCE


def fingerprint_digest(hard: Mapping[str, Any]) -> bytes:
    """Hash the hard fields of a fingerprint: 32 bytes."""
    text = json.dumps(hard, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def find_references(root: Path) -> list[StoredReference]:
    """Return the references whose folders lie in `root`, by name, or the one that `root` is of.

    Raises:
        OSError: the folder cannot be listed.
    """
    if own := read_reference(root):
        return [own]
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return [found for folder in folders if (found := read_reference(folder))]


def read_reference(folder: Path) -> StoredReference | None:
    """Say which reference a folder belongs to, or None where it is no folder of a cache."""
    stored, soft, problem = _read_words(folder)
    told = _told_by_files(folder)
    digest = fingerprint_digest(stored["hard"]) if stored else told and told[0]
    if digest is None:
        if problem is None:
            return None
        digest = bytes(32)  # no file says it: nothing in the folder can be read
    return StoredReference(
        path=folder,
        kind=told[1] if told else KINDS[folder.name.endswith(SUMS)],
        digest=digest,
        hard=stored["hard"] if stored else {},
        soft=soft,
        problem=problem,
    )


def _read_words(
    folder: Path,
) -> tuple[dict[str, Any] | None, tuple[Mapping[str, Any], ...], str | None]:
    """Return a folder's fingerprint, all its conditions, and what is wrong with them."""
    path, stored = folder / FINGERPRINT_FILE, None
    try:
        stored = read_fingerprint(path) if path.exists() else None
        own = [stored["soft"]] if stored else []
        return stored, (*own, *read_conditions(folder)), None
    except DamagedFingerprintError as error:
        return stored, (), str(error)


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Read a fingerprint's `digest`, `hard` and `soft` fields.

    Raises:
        DamagedFingerprintError: it cannot be read, or its fields do not hash to its digest.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = {"digest": fields["digest"], "hard": dict(fields["hard"])}
        found["soft"] = dict(fields.get("soft", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFingerprintError(f"{path}: no readable fingerprint ({error})") from error
    if fingerprint_digest(found["hard"]).hex() != found["digest"]:
        raise DamagedFingerprintError(
            f"{path}: its fields are not those that its digest was made from, so it was altered: "
            "put the right file back, or remove it: it only says in words whose log-probs these are"
        )
    return found


def _told_by_files(folder: Path) -> tuple[bytes, Kind] | None:
    """Return the reference and kind that the first readable manifest or journal names."""
    manifests = (_told_by_manifest(path) for path in sorted(folder.glob("*.manifest.json")))
    journals = (_told_by_journal(path) for path in sorted(folder.glob("*.journal")))
    return next((told for some in (manifests, journals) for told in some if told), None)


def _told_by_manifest(path: Path) -> tuple[bytes, Kind] | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        digest, kind = bytes.fromhex(fields["fingerprint"]), fields["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (digest, kind) if len(digest) == 32 and kind in KINDS else None


def _told_by_journal(path: Path) -> tuple[bytes, Kind] | None:
    try:
        with path.open("rb") as file:
            header = file.read(JOURNAL_HEADER)
    except OSError:
        return None
    if len(header) < JOURNAL_HEADER or not header.startswith(JOURNAL_MAGIC):
        return None
    (kind,) = struct.unpack_from("<I", header, 56)
    return (header[16:48], KINDS[kind]) if kind < len(KINDS) else None
