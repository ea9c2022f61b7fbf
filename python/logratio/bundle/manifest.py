"""The manifest of a bundle, ``bundle.json``: its fields, and the checks of their values."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from logratio.bundle.files import (
    MANIFEST,
    TOKENIZER_FILES,
    BundleError,
    FileEntry,
    check_entries,
    read_regular_file,
)
from logratio.bundle.graph_info import (
    FLOAT32,
    PADDED,
    REFERENCE_FREE,
    REWARD_MODEL,
    SHARED_BASE,
    SHARED_PROMPT,
    GraphInfo,
    Precision,
)
from logratio.errors import ConfigError

FORMAT_VERSION = 4
"""Version 2 added fields with defaults, so bundles of version 1 can still be read. Version 3 added
reward models. Version 4 added the number and the hash of the golden groups, a long and a truncated
one among them, the training method, graphs without a reference model, precisions and log-probs per
token."""
_READABLE = (1, 2, 3, FORMAT_VERSION)
_SINCE_DIGEST = 4
"""The first version whose golden groups have a recorded number and hash."""
GOLDEN_GROUPS = 3
"""Minimum number of golden groups, which are given as token ids; text groups are additional."""
LONG = 64
"""Minimum tokens of the longest golden sequence, or the rules' maximum length if it is smaller."""
PARITY = (1e-4, 1e-6)
"""Tolerance at export in nats per sequence, absolute and relative to the sum of log-probs."""
REPLAY = (1e-3, 1e-5)
"""Tolerance at load: larger, because kernels of other machines round differently."""
FLOAT16_REPLAY = (5e-2, 1e-3)
"""The same for graphs that compute in float16, which has 11 bits."""

TOKENIZATION = "logratio.tokenization"
"""The graph's property with the result of `tokenization_digest`, since version 4."""
_GOLDEN_INPUTS = (*("prompt_ids", "candidates", "prompt", "completions", "messages", "max_length"),)
_MANIFEST_LIMIT = 16 * 2**20
_LARGEST = 2**31


@dataclass(frozen=True)
class GoldenGroup:
    """A prompt and candidates with the log-probs that torch computed.

    Attributes:
        prompt_ids: Token ids of the prompt.
        candidates: Token ids of each candidate.
        policy_logps: Log-prob sums of the policy, one per candidate, in nats; empty for a reward
            model.
        reference_logps: The same for the reference; empty if the reward has none. For a
            ``cached_reference`` graph: the input with which it was verified.
        prompt: The prompt's text if the ids come from text: tokenizing it must give these ids.
        completions: The candidates' texts, in the same way.
        messages: The chat messages, instead of `prompt`.
        scores: Scores of a reward model, one per candidate; None for a policy.
        max_length: The limit in tokens under which the text was truncated to these ids; None: that
            of the bundle's rules, without truncation.
        graph_outputs: What the graph itself gave at export, by output; None if its precision is
            float32, so that torch's values are the expected ones.
    """

    prompt_ids: list[int]
    candidates: list[list[int]]
    policy_logps: list[float]
    reference_logps: list[float]
    prompt: str | None = None
    completions: list[str] | None = None
    messages: list[dict[str, str]] | None = None
    scores: list[float] | None = None
    max_length: int | None = None
    graph_outputs: dict[str, list[float]] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest candidate."""
        return len(self.prompt_ids) + max(map(len, self.candidates))

    @property
    def case(self) -> str:
        """What the group covers: ``truncated``, ``chat``, ``text``, ``long`` or ``ids``."""
        if self.max_length is not None:
            return "truncated"
        if self.messages is not None:
            return "chat"
        if self.prompt is not None:
            return "text"
        return "long" if self.longest >= LONG else "ids"


@dataclass(frozen=True)
class GoldenDigest:
    """The number of golden groups, and the SHA-256 of their canonical JSON in hexadecimal."""

    groups: int
    sha256: str


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
        golden_digest: Number and hash of the golden groups, so that none can be left out. None:
            `to_json` computes them.
        method: The loss of the policy's training, such as ``dpo``; None if not recorded.
        precision: The numbers that the graph stores and computes with.
        base: The digest of the bundle that has the graph, for a ``shared_base`` bundle; else None.
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
    golden_digest: GoldenDigest | None = None
    method: str | None = None
    precision: Precision = FLOAT32
    base: str | None = None

    @property
    def replay(self) -> tuple[float, float]:
        """The tolerance of the golden groups at load, for `tolerance`."""
        return FLOAT16_REPLAY if self.precision.dtype == "float16" else REPLAY

    @property
    def name(self) -> str:
        """A short name of the policy for logs and responses."""
        return f"logratio-{str(self.policy.get('digest', ''))[:12] or 'unnamed'}"

    @property
    def is_reward_model(self) -> bool:
        """Whether the rewards are scores of a reward model, and not of log-probs."""
        return self.graph.kind == REWARD_MODEL

    @property
    def tokenization_digest(self) -> str | None:
        """What the graph's property `TOKENIZATION` must be; None in older formats."""
        if self.format_version < _SINCE_DIGEST:
            return None
        return tokenization_digest(self.tokenization, self.special_ids, self.files, self.golden)

    @property
    def adapter_tie(self) -> tuple[int, int]:
        """The two numbers that an adapter's file stores, which tie it to base and manifest."""
        stated = graph_properties(self.beta, self.policy, self.reference, self.format_version)
        stated[TOKENIZATION] = self.tokenization_digest or ""
        return adapter_tie(str(self.base), stated)

    def to_json(self) -> str:
        """Return the manifest as JSON, the content of ``bundle.json``."""
        values = asdict(self)
        values["golden_digest"] = asdict(golden_digest(values["golden"]))
        return json.dumps(values, indent=1) + "\n"


def golden_digest(groups: Sequence[Mapping[str, Any]]) -> GoldenDigest:
    """Count and hash golden groups.

    Args:
        groups: The groups as JSON values.
    """
    return GoldenDigest(len(groups), hashlib.sha256(_canonical(groups)).hexdigest())


def tokenization_digest(
    tokenization: Mapping[str, Any],
    special_ids: Mapping[str, int | None],
    files: Mapping[str, FileEntry],
    golden: Sequence[Any],
) -> str:
    """Hash all that decides the ids of a text, and the inputs of the golden groups.

    The graph stores the result, so that its tokenizer, rules and golden groups cannot be exchanged
    for others in the manifest alone.

    Args:
        tokenization: The tokenization rules.
        special_ids: Ids of the special tokens.
        files: Entries of the files; only the tokenizer's are used.
        golden: The golden groups, or their inputs.

    Returns:
        The SHA-256 of the canonical JSON, in hexadecimal.
    """
    values = {
        "tokenization": dict(tokenization),
        "special_ids": dict(special_ids),
        "files": {name: files[name].sha256 for name in TOKENIZER_FILES if name in files},
        "golden": [{name: getattr(group, name) for name in _GOLDEN_INPUTS} for group in golden],
    }
    return hashlib.sha256(_canonical(values)).hexdigest()


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


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


def adapter_tie(base: str, properties: Mapping[str, str]) -> tuple[int, int]:
    """Return two numbers of 31 bits, which tie an adapter's file to its base and its manifest.

    Args:
        base: The digest of the base's bundle.
        properties: What a graph would store: see `graph_properties` and `TOKENIZATION`.
    """
    first, second = (
        int(hashlib.sha256(one).hexdigest()[:8], 16) >> 1
        for one in (base.encode(), _canonical(properties))
    )
    return first, second


def tolerance(logps: float, limits: tuple[float, float]) -> float:
    """Return the tolerance in nats of the sum `logps` under `PARITY` or `REPLAY`."""
    return limits[0] + limits[1] * abs(logps)


def manifest_bytes(folder: str | Path) -> bytes:
    """Return the content of ``bundle.json``.

    Raises:
        BundleError: The folder is not a bundle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder")
    if not (folder / MANIFEST).exists():
        raise BundleError(f"{folder}: no {MANIFEST}, so this is not a bundle")
    return read_regular_file(folder, MANIFEST, _MANIFEST_LIMIT)


def digest_of(content: bytes) -> str:
    """Return the digest of a bundle, ``sha256:`` and 64 hexadecimal digits.

    It identifies every file, because the manifest contains the SHA-256 of each.

    Args:
        content: The content of ``bundle.json``.
    """
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def check_digest(folder: str | Path, content: bytes, expect: str) -> None:
    """Check that a bundle is the expected one.

    Args:
        folder: The bundle, for messages.
        content: The content of its ``bundle.json``.
        expect: The digest, as printed by `logratio export`; ``sha256:`` may be left out.

    Raises:
        ConfigError: `expect` is not a SHA-256.
        BundleError: The bundle has another digest.
    """
    wanted = f"sha256:{expect.lower().removeprefix('sha256:')}"
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", wanted):
        raise ConfigError(
            f"--expect is {expect!r}: give the digest that `logratio export` or `logratio bundle "
            "inspect` prints, sha256: and 64 hexadecimal digits"
        )
    if (found := digest_of(content)) != wanted:
        raise BundleError(f"{folder}: its digest is {found}, not {wanted}")


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``bundle.json`` and check every value; other files are not read.

    Raises:
        BundleError: The folder is not a bundle, has a newer format, or a value is invalid.
    """
    return parse_manifest(manifest_bytes(folder), folder)


def parse_manifest(content: bytes, folder: str | Path) -> Manifest:
    """Check every value of a manifest.

    Args:
        content: The content of ``bundle.json``.
        folder: The bundle, for messages.

    Raises:
        BundleError: The bundle has a newer format, or a value is invalid.
    """
    where = str(Path(folder) / MANIFEST)
    try:
        values = json.loads(
            content,
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise BundleError(f"{where}: not a JSON object")
    version = values.get("format_version")
    if type(version) is not int or version not in _READABLE:
        raise BundleError(
            f"{folder}: bundle format {version!r}; this logratio reads up to {FORMAT_VERSION}: "
            "install a newer version of logratio, or export again"
        )
    return _manifest(values, where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, or refuse it: readers would disagree about a repeated key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return values


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


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
    graph = manifest.graph
    if not (1 <= graph.chunk <= 2**16 and 1 <= graph.vocabulary_size < _LARGEST):
        raise BundleError(f"{where}: its graph has impossible properties")
    if graph.layout not in (SHARED_PROMPT, PADDED):
        raise BundleError(f"{where}: its graph has the layout {graph.layout!r:.40}")
    is_adapter = graph.kind == SHARED_BASE
    if is_adapter != (manifest.base is not None):
        raise BundleError(f"{where}: the digest of its base is missing or superfluous")
    check_entries(manifest.files, where, has_graph=not is_adapter)
    for group in manifest.golden:
        _check_golden(group, graph, where)
    if manifest.format_version >= _SINCE_DIGEST:
        _check_all_golden(manifest, values["golden"], where)
    _check_length(manifest, where)
    return manifest


def _check_all_golden(manifest: Manifest, golden: Any, where: str) -> None:
    """Check that no golden group was left out, and that one is long."""
    known, found = manifest.golden_digest, golden_digest(golden)
    if known is None:
        raise BundleError(f"{where}: the number and hash of its golden groups are missing")
    if known.groups != found.groups:
        raise BundleError(
            f"{where}: {found.groups} golden groups, but the export wrote {known.groups}"
        )
    if known != found:
        raise BundleError(f"{where}: its golden groups were altered")
    if manifest.graph.max_positions is None:
        raise BundleError(f"{where}: the maximum positions of its models are missing")
    length = manifest.tokenization.get("max_length")
    needed = min(LONG, length) if isinstance(length, int) else LONG
    if max(group.longest for group in manifest.golden) < needed:
        raise BundleError(f"{where}: no golden group has {needed} tokens, so long ones are missing")


def _check_length(manifest: Manifest, where: str) -> None:
    length, positions = manifest.tokenization.get("max_length"), manifest.graph.max_positions
    if positions is not None and isinstance(length, int) and length > positions:
        raise BundleError(
            f"{where}: its rules allow {length:,} tokens, but its models only {positions:,}"
        )


def _check_golden(group: GoldenGroup, graph: GraphInfo, where: str) -> None:
    if (group.scores is not None) != (graph.kind == REWARD_MODEL):
        raise BundleError(f"{where}: a golden group is not of the graph's kind")
    known = [group.scores] if group.scores is not None else [group.policy_logps]
    if group.scores is None and graph.kind != REFERENCE_FREE:
        known.append(group.reference_logps)
    if group.graph_outputs is not None:
        if group.graph_outputs.keys() != set(graph.outputs):
            raise BundleError(f"{where}: a golden group lacks an output of the graph")
        known += group.graph_outputs.values()
    lengths = {len(group.candidates), *map(len, known)}
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
