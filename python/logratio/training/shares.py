"""Which part of the work is this process's: by what a group holds, never by where it stands.

Every process finds the same parts by itself, whatever order it reads the data in and whatever is in
the cache by then; so what a lost process left is taken up by any later run, with any number.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logratio.errors import LogratioError


class ShareError(LogratioError, ValueError):
    """The share is not one of any division."""


@dataclass(frozen=True)
class Share:
    """One of `count` parts of the groups, of about the same number each.

    Attributes:
        index: from 0.
        count: parts in all.
        rank: this process among those that one launcher started; 0 draws the progress.
        beside: processes that the launcher started.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    beside: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Tell which groups are in this share, by the key of each one's first completion.

        Args:
            keys: uint8 `[G, 32]`.

        Returns:
            bool `[G]`.
        """
        # A key is a hash already: its first 64 bits are spread evenly.
        heads = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
        held: np.ndarray = heads % np.uint64(self.count) == self.index
        return held


def share_of(given: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """Return the share that `given` names ("2/4"), divided among the processes of torchrun.

    torchrun says in RANK and WORLD_SIZE which of its processes this is. No process group is made:
    the processes share nothing but the folder.

    Raises:
        ShareError: `given` is not of the form I/N with I from 1 to N.
    """
    index, count = _parse(given) if given else (0, 1)
    rank, beside = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if "RANK" not in environment or not 0 <= rank < beside:
        rank, beside = 0, 1
    return Share(index * beside + rank, count * beside, rank, beside)


def refuse_several(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to do the same work in each process of a launcher, over the same output.

    Raises:
        ShareError: torchrun started more than one process.
    """
    count = share_of(None, environment).beside
    if count > 1:
        raise ShareError(
            f"{command} runs in one process, and torchrun started {count} (WORLD_SIZE): each would "
            f"do the whole work. Start it without torchrun; `logratio precompute` is the command "
            "that divides its work among processes"
        )


def _parse(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise ShareError(f"share must be one of 1/N to N/N, as 2/4, not {given!r}")
    return index - 1, count
