"""Log-probs of a reference that is not in the graph: from the caller, or from a cache."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from logratio.bundle import CACHED_REFERENCE, Manifest
from logratio.cache import ReferenceCache, ReferenceLogps, content_key
from logratio.errors import ConfigError
from logratio.serving.candidates import Candidate, CandidateGroup

_MISSING = "no log-probs of the reference"


def with_reference(group: CandidateGroup, logps: Sequence[float | None]) -> CandidateGroup:
    """Add the reference's log-probs to the candidates; one without any gets an error.

    Args:
        group: The tokenized prompt and its candidates.
        logps: Log-prob sum of each candidate, in nats, or None.

    Raises:
        ConfigError: The number of log-probs is not that of the candidates, one is above 0 or not
            finite, or equal candidates have different ones.
    """
    if len(logps) != len(group.candidates):
        raise ConfigError(
            f"reference_logps has {len(logps)} values, but there are {len(group.candidates)} "
            "candidates"
        )
    known: dict[tuple[int, ...], float | None] = {}
    for candidate, value in zip(group.candidates, logps, strict=True):
        if value is not None and not (math.isfinite(value) and value <= 0):
            raise ConfigError(f"reference_logps contains {value}, which is not a sum of log-probs")
        if candidate.error is None and known.setdefault(candidate.ids, value) != value:
            raise ConfigError("reference_logps differs between equal candidates")
    pairs = zip(group.candidates, logps, strict=True)
    return replace(group, candidates=tuple(_with(*pair) for pair in pairs))


def _with(candidate: Candidate, value: float | None) -> Candidate:
    if candidate.error is not None:
        return candidate
    if value is None:
        return Candidate((), candidate.truncated, _MISSING)
    return replace(candidate, reference_logps=float(value))


class CachedReference:
    """Looks up the reference's log-probs of candidates in the cache of `logratio precompute`.

    Args:
        logps: The reference, opened.
    """

    def __init__(self, logps: ReferenceLogps) -> None:
        self._logps = logps

    @classmethod
    def open(cls, cache: str | Path, manifest: Manifest) -> "CachedReference":
        """Open the reference of a bundle in a cache.

        Args:
            cache: The cache's folder.
            manifest: The bundle's manifest, which identifies the reference if the policy's
                training recorded it; else the cache must have only one.

        Raises:
            ConfigError: The bundle takes no reference log-probs.
            NoReferenceError: The cache has not this reference.
            DamagedFingerprintError, CorruptCacheError: The cache is damaged.
        """
        if manifest.graph.kind != CACHED_REFERENCE:
            raise ConfigError(
                "--cache is for a bundle exported with `--reference cached`; this one needs none"
            )
        digest = manifest.reference.get("digest")
        name = bytes.fromhex(digest) if isinstance(digest, str) else None
        return cls(ReferenceCache(cache).open(name))

    @property
    def state(self) -> tuple[str, int]:
        """Name of the reference and number of its records, which grows when more are computed."""
        return self._logps.reference.name, len(self._logps)

    def fill(self, group: CandidateGroup) -> CandidateGroup:
        """Add the reference's log-probs to the candidates; one that is missing gets an error.

        Raises:
            CorruptCacheError: The cache is damaged.
        """
        start, sound = len(group.prompt_ids), list(group.different())
        if not sound:
            return group
        keys = [content_key(np.array([*group.prompt_ids, *ids], np.int32), start) for ids in sound]
        rows = self._logps.join(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32))
        found = dict(zip(sound, rows.tolist(), strict=True))
        hits = [ids for ids in sound if found[ids] >= 0]
        _, sums = self._logps.read_sums(np.array([found[ids] for ids in hits], np.int64))
        known = dict(zip(hits, sums.tolist(), strict=True))
        return with_reference(group, [known.get(one.ids) for one in group.candidates])
