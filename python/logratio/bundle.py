"""The bundle format: the folder that `logratio.export` writes and `logratio.serving` reads.

    scorer.onnx             the graph, with its weights
    scorer.onnx.data        the weights, if graph and weights together exceed 2 GB
    tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja
    bundle.json             the manifest, described in this module

Uses only the standard library, so that a server can verify a bundle before any other library
reads it.
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

FORMAT_VERSION = 3
"""Version 2 added fields with defaults, so bundles of version 1 can still be read. Version 3 added
reward models."""
_READABLE = (1, 2, FORMAT_VERSION)
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
"""Names and ranks of the graph's inputs, all int64, as filled by `_rust.candidate_layout`."""
OUTPUTS = ("reward", "policy_logps", "reference_logps")
"""Names of the graph's outputs, all float32 `[N]`, one value per candidate."""
REWARD_MODEL = "reward_model"
"""The kind of a graph that is a reward model, whose only output is the reward."""
GOLDEN_GROUPS = 3
"""Minimum number of golden groups, which are given as token ids; text groups are additional."""
CHUNK = 128
"""Completion tokens per chunk of the head, which bounds the number of logits in memory."""

PARITY = (1e-4, 1e-6)
"""Tolerance at export in nats per sequence, absolute and relative to the sum of log-probs."""
REPLAY = (1e-3, 1e-5)
"""Tolerance at load: larger, because kernels of other machines round differently."""

_MANIFEST_LIMIT = 16 * 2**20
_BLOCK = 2**20


class BundleError(LogratioError, ValueError):
    """The folder is not a bundle, was altered, or has a newer format."""


@dataclass(frozen=True)
class FileEntry:
    """The size of a file in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphInfo:
    """Properties of the graph.

    Attributes:
        opset: The ONNX opset of the graph.
        kind: ``two_models``; ``adapter``, one base model with an adapter for the policy; or
            ``reward_model``, whose rewards are its scores.
        chunk: Completion tokens per chunk of the head.
        vocabulary_size: Vocabulary size of the models; token ids are below it.
        max_positions: Longest sequence that the models support; None if not recorded.
    """

    opset: int
    kind: str
    chunk: int
    vocabulary_size: int
    max_positions: int | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return OUTPUTS[:1] if self.kind == REWARD_MODEL else OUTPUTS


@dataclass(frozen=True)
class GoldenGroup:
    """A prompt and candidates with the log-probs that torch computed.

    Attributes:
        prompt_ids: Token ids of the prompt.
        candidates: Token ids of each candidate.
        policy_logps: Log-prob sums of the policy, one per candidate, in nats; empty for a reward
            model.
        reference_logps: The same for the reference.
        prompt: The prompt's text if the ids come from text: tokenizing it must give these ids.
        completions: The candidates' texts, in the same way.
        messages: The chat messages, instead of `prompt`.
        scores: Scores of a reward model, one per candidate; None for a policy.
    """

    prompt_ids: list[int]
    candidates: list[list[int]]
    policy_logps: list[float]
    reference_logps: list[float]
    prompt: str | None = None
    completions: list[str] | None = None
    messages: list[dict[str, str]] | None = None
    scores: list[float] | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``.

    Attributes:
        beta: The reward is beta times the log-ratio; 1 for a reward model, whose reward is its
            score.
        policy: Readable fingerprint of the policy, or of the reward model.
        reference: Readable fingerprint of the reference; empty for a reward model.
        tokenization: The tokenization rules of the training.
        special_ids: Ids of ``bos``, ``eos`` and ``pad``; None for a missing one.
        graph: Properties of the graph.
        files: Every file of the folder except the manifest.
        golden: Groups with known log-probs, verified at every load.
        parity: Largest differences from torch measured at export, in nats, by check.
        versions: Versions of the libraries that created the bundle.
        format_version: Version of the format; see `FORMAT_VERSION`.
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
        """A short name of the policy for logs and responses."""
        return f"logratio-{str(self.policy.get('digest', ''))[:12] or 'unnamed'}"

    @property
    def is_reward_model(self) -> bool:
        """Whether the rewards are scores of a reward model, and not log-ratios."""
        return self.graph.kind == REWARD_MODEL

    def to_json(self) -> str:
        """Return the manifest as JSON, the content of ``bundle.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"


def graph_properties(
    beta: float,
    policy: Mapping[str, Any],
    reference: Mapping[str, Any],
    format_version: int = FORMAT_VERSION,
) -> dict[str, str]:
    """Return the metadata stored in the graph, which ties it to the manifest."""
    return {
        "logratio.format_version": str(format_version),
        "logratio.beta": repr(beta),
        "logratio.policy": str(policy.get("digest", "")),
        "logratio.reference": str(reference.get("digest", "")),
    }


def tolerance(logps: float, limits: tuple[float, float]) -> float:
    """Return the tolerance in nats of the sum `logps` under `PARITY` or `REPLAY`."""
    return limits[0] + limits[1] * abs(logps)


def digest_of(folder: str | Path) -> str:
    """Return the SHA-256 of ``bundle.json`` in hexadecimal, which identifies all files.

    Raises:
        BundleError: The folder is not a bundle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder")
    if not (folder / MANIFEST).exists():
        raise BundleError(f"{folder}: no {MANIFEST}, so this is not a bundle")
    return hashlib.sha256(_read_regular_file(folder, MANIFEST, _MANIFEST_LIMIT)).hexdigest()


def describe_file(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``bundle.json`` and check the type of every value; other files are not read.

    Raises:
        BundleError: The folder is not a bundle, has a newer format, or a value is invalid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder")
    if not (folder / MANIFEST).exists():
        raise BundleError(f"{folder}: no {MANIFEST}, so this is not a bundle")
    content = _read_regular_file(folder, MANIFEST, _MANIFEST_LIMIT)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise BundleError(f"{folder / MANIFEST}: not a JSON object")
    version = values.get("format_version")
    if type(version) is not int or version not in _READABLE:
        raise BundleError(
            f"{folder}: bundle format {version!r}; this logratio reads up to {FORMAT_VERSION}: "
            "install a newer version of logratio, or export again"
        )
    return _manifest(values, str(folder / MANIFEST))


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Check that the folder contains exactly the files that the manifest lists.

    Each must be a regular file of the listed size and SHA-256. Symbolic links and hard links are
    refused, because they could bring in files from elsewhere.

    Raises:
        BundleError: A file breaks a rule; the message names both.
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
    descriptor = _open_regular_file(folder, name)
    with os.fdopen(descriptor, "rb") as file:
        if (size := os.fstat(descriptor).st_size) != entry.size:
            raise BundleError(f"{folder / name}: {size} bytes instead of {entry.size}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise BundleError(f"{folder / name}: altered (its SHA-256 differs from the manifest)")


def _read_regular_file(folder: Path, name: str, limit: int) -> bytes:
    with os.fdopen(_open_regular_file(folder, name), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise BundleError(f"{folder / name}: larger than {limit} bytes")
    return content


def _open_regular_file(folder: Path, name: str) -> int:
    """Open a regular file in the folder; links are refused."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{folder / name}: cannot be opened as a regular file") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise BundleError(f"{folder / name}: not a regular file with a single name (a link?)")
    return descriptor


def _manifest(values: Mapping[str, Any], where: str) -> Manifest:
    manifest: Manifest = _build(Manifest, values, where)
    if not (math.isfinite(manifest.beta) and manifest.beta > 0):
        raise BundleError(f"{where}: beta is {manifest.beta}, not above 0")
    if not manifest.golden:
        raise BundleError(f"{where}: no golden group, so its scores cannot be verified")
    if manifest.format_version > 1 and len(manifest.golden) < GOLDEN_GROUPS:
        raise BundleError(
            f"{where}: {len(manifest.golden)} golden groups, but an export writes at least "
            f"{GOLDEN_GROUPS}"
        )
    _check_length(manifest, where)
    if not (1 <= manifest.graph.chunk <= 2**16 and manifest.graph.vocabulary_size < 2**31):
        raise BundleError(f"{where}: its graph has impossible properties")
    for name in manifest.files:
        if name not in FILE_NAMES:
            raise BundleError(f"{where}: lists {name!r}, which is not a file of a bundle")
    for name in (GRAPH, TOKENIZER_FILES[0]):
        if name not in manifest.files:
            raise BundleError(f"{where}: does not list {name}")
    for group in manifest.golden:
        _check_golden(group, manifest.graph, where)
    return manifest


def _check_length(manifest: Manifest, where: str) -> None:
    length, positions = manifest.tokenization.get("max_length"), manifest.graph.max_positions
    if positions is not None and isinstance(length, int) and length > positions:
        raise BundleError(
            f"{where}: its rules allow {length:,} tokens, but its models only {positions:,}"
        )


def _check_golden(group: GoldenGroup, graph: GraphInfo, where: str) -> None:
    if (group.scores is not None) != (graph.kind == REWARD_MODEL):
        raise BundleError(f"{where}: a golden group is not of the graph's kind")
    known = (group.policy_logps, group.reference_logps)
    lengths = {len(group.candidates), *map(len, known if group.scores is None else [group.scores])}
    rows = [group.prompt_ids, *group.candidates]
    if len(lengths) != 1 or len(rows) < 2 or not all(rows):
        raise BundleError(f"{where}: a golden group has inconsistent lengths")
    if not all(0 <= id_ < graph.vocabulary_size for row in rows for id_ in row):
        raise BundleError(f"{where}: a golden group has ids outside the vocabulary")


def _build(kind: Any, values: object, where: str) -> Any:
    """Build a dataclass from a JSON object, with all required fields and no unknown ones."""
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
    """Return a JSON value as `kind`, with nested dataclasses."""
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
