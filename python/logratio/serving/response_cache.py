"""Scores of candidates that were scored before, by the content of what was scored.

A candidate's score does not depend on the other candidates of its request, so a new candidate of a
known prompt costs only itself. No text and no token is kept, only keyed hashes and numbers.
"""

import hashlib
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock

import numpy as np

from logratio.serving.candidates import Candidate, CandidateGroup
from logratio.serving.scores import Sums

ENTRY_BYTES = 320
"""Memory of one entry, rounded up: the hash, the packed numbers, and their places in the table."""
_PACKED = struct.Struct("<3d")

Ids = tuple[int, ...]


class ResponseCache:
    """Scores by bundle, prompt, candidate and given log-probs; the least recently used one goes.

    Safe to share between threads. The hash is BLAKE2b of 128 bits, with a key that each process
    draws at random, so nobody can prepare two requests with the same hash.

    Args:
        megabytes: The most memory that the entries may need, in MiB.
    """

    def __init__(self, megabytes: float) -> None:
        self._most = max(1, int(megabytes * 2**20) // ENTRY_BYTES)
        self._key = os.urandom(32)
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, digest: str, group: CandidateGroup) -> dict[Ids, Sums]:
        """Return the known scores of a group's candidates.

        Args:
            digest: The bundle's digest.
            group: The tokenized prompt and its candidates.
        """
        found: dict[Ids, Sums] = {}
        names = [*self._names(digest, group, group.different())]
        with self._lock:
            for ids, name in names:
                if (packed := self._entries.get(name)) is not None:
                    self._entries.move_to_end(name)
                    found[ids] = _PACKED.unpack(packed)
        return found

    def add(self, digest: str, group: CandidateGroup, sums: Mapping[Ids, Sums]) -> None:
        """Keep the scores of a group's candidates; those that are not finite are left out."""
        finite = {ids: one for ids, one in sums.items() if math.isfinite(one[0])}
        names = [*self._names(digest, group, finite)]
        with self._lock:
            for ids, name in names:
                self._entries[name] = _PACKED.pack(*finite[ids])
                self._entries.move_to_end(name)
            while len(self._entries) > self._most:
                self._entries.popitem(last=False)

    def _names(
        self, digest: str, group: CandidateGroup, several: Iterable[Ids]
    ) -> Iterator[tuple[Ids, bytes]]:
        """Yield sequences of ids of a group, and the hash of each with all that decides its score.

        The lengths are hashed too, so that no other division of the same ids has the same hash.
        """
        given = {one.ids: one.reference_logps for one in group.candidates}
        start = hashlib.blake2b(key=self._key, digest_size=16)
        start.update(f"{digest} {len(group.prompt_ids)}:".encode())
        start.update(_bytes(group.prompt_ids))
        for ids in several:
            one = start.copy()
            one.update(f"{given[ids]!r} {len(ids)}:".encode())
            one.update(_bytes(ids))
            yield ids, one.digest()


def without(group: CandidateGroup, known: Mapping[Ids, Sums]) -> tuple[Candidate, ...]:
    """Return the candidates of a group whose scores are not known."""
    return tuple(one for one in group.candidates if one.ids not in known)


def _bytes(ids: Ids) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()
