"""The bundle: the folder that `scoring` writes and `serving` reads, and the only thing they share.

    scorer.onnx             the graph, with its weights
    scorer.onnx.data        the weights, where graph and weights together pass 2 GB
    tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja
    bundle.json             what this module describes

Knows files and JSON only (standard library), so that a server can check a bundle before any
other library sees a byte of it.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from logratio.errors import LogratioError

FORMAT_VERSION = 2
"""Version 2 added fields with defaults; a bundle of version 1 has none of them, and is read."""
_READABLE = (1, FORMAT_VERSION)
MANIFEST = "bundle.json"
GRAPH = "scorer.onnx"
WEIGHTS = "scorer.onnx.data"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
FILE_NAMES = frozenset({GRAPH, WEIGHTS, *TOKENIZER_FILES})

INPUTS = {
    "prompt_ids": 2,
    "prompt_mask": 2,
    "candidate_ids": 2,
    "candidate_mask": 2,
    "group": 1,
    "token_index": 2,
    "token_row": 2,
}
"""Names and ranks of the graph's inputs, all int64: what `_rust.candidate_layout` fills."""
OUTPUTS = ("reward", "policy_logps", "reference_logps")
"""Names of the graph's outputs, all float32 `[N]`: one number per candidate."""
GOLDEN_GROUPS = 3
"""Least golden groups of a bundle: those of token ids. Those of text come on top."""
CHUNK = 128
"""Completion tokens that the head scores at a time: `chunk` logits rows are held, never all."""

PARITY = (1e-4, 1e-6)
"""Export: nats per sequence by which the graph may differ from torch, fixed and per nat summed."""
REPLAY = (1e-3, 1e-5)
"""Load: the same on another machine, whose kernels round differently."""

_MANIFEST_LIMIT = 16 * 2**20
_BLOCK = 2**20


class BundleError(LogratioError, ValueError):
    """The folder is not a bundle, was altered, or is of a newer format."""


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written: its bytes and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphInfo:
    """What is in the graph.

    Attributes:
        opset: ONNX operator set that it really uses.
        kind: ``two_models``, or ``adapter``: one base whose adapter is on for the policy.
        chunk: Completion tokens that the head scores at a time.
        vocabulary_size: Ids are below it.
        max_positions: The longest sequence that the models were made for; None: not recorded.
    """

    opset: int
    kind: str
    chunk: int
    vocabulary_size: int
    max_positions: int | None = None


@dataclass(frozen=True)
class GoldenGroup:
    """A prompt and candidates of it with their right answers, computed by torch.

    Attributes:
        prompt_ids: The prompt.
        candidates: Ids of each candidate.
        policy_logps: Nats, one sum per candidate.
        reference_logps: The same under the reference.
        prompt: The prompt's text where the ids come from text: encoding it must give these ids.
        completions: The candidates' texts, likewise.
        messages: In the place of a prompt's text, the turns of a chat.
    """

    prompt_ids: list[int]
    candidates: list[list[int]]
    policy_logps: list[float]
    reference_logps: list[float]
    prompt: str | None = None
    completions: list[str] | None = None
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``.

    Attributes:
        beta: The reward is beta times the log-ratio.
        policy: Readable fingerprint of the policy.
        reference: Readable fingerprint of the reference.
        tokenization: Rules by which text became ids in training.
        special_ids: ``bos``, ``eos`` and ``pad``; None where there is none.
        graph: What is in the graph.
        files: Every file of the folder but this one.
        golden: Groups with known answers, replayed at every load.
        parity: Largest differences in nats that the export measured, by check.
        versions: Of the libraries that made the bundle.
        format_version: Of this description; see `FORMAT_VERSION`.
    """

    beta: float
    policy: dict[str, Any]
    reference: dict[str, Any]
    tokenization: dict[str, Any]
    special_ids: dict[str, int | None]
    graph: GraphInfo
    files: dict[str, FileEntry]
    golden: list[GoldenGroup]
    parity: dict[str, float]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """A short name for logs and answers: which policy this is."""
        return f"logratio-{str(self.policy.get('digest', ''))[:12] or 'unnamed'}"

    def to_json(self) -> str:
        """Write the manifest as it stands in the folder."""
        return json.dumps(asdict(self), indent=1) + "\n"


def graph_properties(
    beta: float,
    policy: Mapping[str, Any],
    reference: Mapping[str, Any],
    format_version: int = FORMAT_VERSION,
) -> dict[str, str]:
    """Return what the graph repeats of the manifest, so that the two cannot be mixed up."""
    return {
        "logratio.format_version": str(format_version),
        "logratio.beta": repr(beta),
        "logratio.policy": str(policy.get("digest", "")),
        "logratio.reference": str(reference.get("digest", "")),
    }


def tolerance(logps: float, limits: tuple[float, float]) -> float:
    """Return the nats by which a sum of `logps` may be off under `PARITY` or `REPLAY`."""
    return limits[0] + limits[1] * abs(logps)


def digest_of(folder: str | Path) -> str:
    """Return the SHA-256 of ``bundle.json``, in hexadecimal: it names the bundle and all its files.

    Raises:
        BundleError: There is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder")
    if not (folder / MANIFEST).exists():
        raise BundleError(f"{folder}: no {MANIFEST}, so this is not a bundle")
    return hashlib.sha256(_read_plainly(folder, MANIFEST, _MANIFEST_LIMIT)).hexdigest()


def describe_file(path: Path) -> FileEntry:
    """Measure and hash a file that was just written."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``bundle.json`` and check every value's type; the other files are not touched.

    Raises:
        BundleError: No bundle, a newer format, or a value that cannot be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder")
    if not (folder / MANIFEST).exists():
        raise BundleError(f"{folder}: no {MANIFEST}, so this is not a bundle")
    content = _read_plainly(folder, MANIFEST, _MANIFEST_LIMIT)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise BundleError(f"{folder / MANIFEST}: not a JSON object")
    version = values.get("format_version")
    if type(version) is not int or version not in _READABLE:
        raise BundleError(
            f"{folder}: bundle format {version!r}, and this logratio reads up to {FORMAT_VERSION}; "
            "install a version of logratio that knows it, or export again"
        )
    return _manifest(values, str(folder / MANIFEST))


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Check that the folder holds exactly the files that the manifest lists, byte for byte.

    Each must be a regular file with one name on disk (no symbolic link, no hard link through
    which a file from elsewhere could come in), of the size and SHA-256 that were written down.

    Raises:
        BundleError: Names the file and the rule it breaks.
    """
    folder = Path(folder)
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    for name in sorted(present - manifest.files.keys()):
        raise BundleError(f"{folder / name}: not listed in {MANIFEST}")
    for name in sorted(manifest.files.keys() - present):
        raise BundleError(f"{folder / name}: missing")
    for name, entry in sorted(manifest.files.items()):
        _verify_file(folder, name, entry)


def _verify_file(folder: Path, name: str, entry: FileEntry) -> None:
    descriptor = _open_plainly(folder, name)
    with os.fdopen(descriptor, "rb") as file:
        if (size := os.fstat(descriptor).st_size) != entry.size:
            raise BundleError(f"{folder / name}: {size} bytes, {entry.size} were written")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise BundleError(f"{folder / name}: altered (its SHA-256 is not the one written)")


def _read_plainly(folder: Path, name: str, limit: int) -> bytes:
    with os.fdopen(_open_plainly(folder, name), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise BundleError(f"{folder / name}: above {limit} bytes")
    return content


def _open_plainly(folder: Path, name: str) -> int:
    """Open a regular file of the folder itself, following no link."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{folder / name}: cannot be opened as a plain file") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise BundleError(f"{folder / name}: not a regular file with one name (a link?)")
    return descriptor


def _manifest(values: Mapping[str, Any], where: str) -> Manifest:
    manifest: Manifest = _build(Manifest, values, where)
    if not (math.isfinite(manifest.beta) and manifest.beta > 0):
        raise BundleError(f"{where}: beta is {manifest.beta}, not above 0")
    if not manifest.golden:
        raise BundleError(f"{where}: no golden group, so nothing shows that it scores rightly")
    if manifest.format_version > 1 and len(manifest.golden) < GOLDEN_GROUPS:
        raise BundleError(
            f"{where}: {len(manifest.golden)} golden groups, and an export writes at least "
            f"{GOLDEN_GROUPS}"
        )
    _check_length(manifest, where)
    if not (1 <= manifest.graph.chunk <= 2**16 and manifest.graph.vocabulary_size < 2**31):
        raise BundleError(f"{where}: its graph cannot be")
    for name in manifest.files:
        if name not in FILE_NAMES:
            raise BundleError(f"{where}: a bundle has no file {name!r}")
    for name in (GRAPH, TOKENIZER_FILES[0]):
        if name not in manifest.files:
            raise BundleError(f"{where}: lists no {name}")
    for group in manifest.golden:
        _check_golden(group, manifest.graph.vocabulary_size, where)
    return manifest


def _check_length(manifest: Manifest, where: str) -> None:
    length, positions = manifest.tokenization.get("max_length"), manifest.graph.max_positions
    if positions is not None and isinstance(length, int) and length > positions:
        raise BundleError(
            f"{where}: its rules allow {length:,} tokens, and its models {positions:,}"
        )


def _check_golden(group: GoldenGroup, vocabulary_size: int, where: str) -> None:
    lengths = {len(group.candidates), len(group.policy_logps), len(group.reference_logps)}
    rows = [group.prompt_ids, *group.candidates]
    if len(lengths) != 1 or len(rows) < 2 or not all(rows):
        raise BundleError(f"{where}: a golden group does not add up")
    if not all(0 <= id_ < vocabulary_size for row in rows for id_ in row):
        raise BundleError(f"{where}: a golden group has ids outside the vocabulary")


def _build(kind: Any, values: object, where: str) -> Any:
    """Make a dataclass of a JSON object: every field without a default, no unknown one."""
    if not isinstance(values, Mapping):
        raise BundleError(f"{where}: {kind.__name__} is not an object")
    declared = {field.name: field.type for field in fields(kind)}
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    for name in sorted((declared.keys() - optional) ^ (values.keys() - optional)):
        raise BundleError(f"{where}: {name} is {'missing' if name in declared else 'unknown'}")
    return kind(
        **{
            name: _typed(declared[name], value, f"{where}: {name}")
            for name, value in values.items()
        }
    )


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value if it is of `kind`, with dataclasses rebuilt inside it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or type(value) is kind:
        return value
    if origin is UnionType:
        return None if value is None else _typed(arguments[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], item, where) for item in value]
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if is_dataclass(kind):
        return _build(kind, value, where)
    raise BundleError(f"{where} has the wrong type")
