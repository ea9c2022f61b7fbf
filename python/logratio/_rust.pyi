from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TypedDict, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from logratio.errors import CorruptCacheError as CorruptCacheError
from logratio.errors import CorruptStoreError as CorruptStoreError

__all__ = [
    "ROLES",
    "VALUES",
    "CacheFolder",
    "CacheReader",
    "CacheWriter",
    "CandidateLayout",
    "Census",
    "CorruptCacheError",
    "CorruptStoreError",
    "EncodedPairs",
    "Layout",
    "PaddedLayout",
    "PairRules",
    "PieceTable",
    "Plan",
    "SharedLayout",
    "Store",
    "StoreWriter",
    "TreeLayout",
    "candidate_layout",
    "content_key",
    "near_duplicates",
]

ROLES: tuple[str, ...]
VALUES: tuple[str, ...]

@final
class StoreWriter:
    def __new__(
        cls, path: str | PathLike[str] | None = None, *, deduplicate: bool = False
    ) -> StoreWriter: ...
    @staticmethod
    def resume(
        path: str | PathLike[str], *, deduplicate: bool = False
    ) -> tuple[StoreWriter, str] | None: ...
    def __len__(self) -> int: ...
    def push(
        self,
        prompt_ids: NDArray[np.int32],
        completion_ids: NDArray[np.int32],
        completion_mask: NDArray[np.uint8],
        completion_lengths: NDArray[np.uint32],
        roles: NDArray[np.uint8],
        file: int,
        line: int,
        values: NDArray[np.float32] | None = None,
    ) -> tuple[int, int]: ...
    def push_many(
        self,
        prompt_ids: NDArray[np.int32],
        prompt_lengths: NDArray[np.uint32],
        completion_ids: NDArray[np.int32],
        completion_mask: NDArray[np.uint8],
        completion_lengths: NDArray[np.uint32],
        group_sizes: NDArray[np.uint32],
        roles: NDArray[np.uint8],
        files: NDArray[np.uint32],
        lines: NDArray[np.uint64],
        values: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
    def conflicts(self) -> tuple[NDArray[np.int64], NDArray[np.uint32]]: ...
    def place(self, group: int) -> tuple[int, int]: ...
    def checkpoint(self, note: str) -> None: ...
    def finish(self, metadata: str = "{}") -> Store: ...
    def close(self) -> None: ...

@final
class Store:
    @staticmethod
    def open(path: str | PathLike[str], digest: str | None = None) -> Store: ...
    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Path, str]]: ...
    @property
    def path(self) -> Path | None: ...
    def select(
        self,
        keep: NDArray[np.bool_],
        path: str | PathLike[str] | None = None,
        metadata: str = "{}",
    ) -> Store: ...
    def __len__(self) -> int: ...
    @property
    def completions(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def metadata(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def verify(self) -> None: ...
    def shared_lengths(self) -> NDArray[np.uint32]: ...
    def prompt_lengths(self) -> NDArray[np.uint32]: ...
    def completion_lengths(self) -> NDArray[np.uint32]: ...
    def counted_lengths(self) -> NDArray[np.uint32]: ...
    def completion_offsets(self) -> NDArray[np.int64]: ...
    def roles(self) -> NDArray[np.uint8]: ...
    def values(self) -> NDArray[np.float32]: ...
    def sources(self) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]: ...
    @property
    def is_weighted(self) -> bool: ...
    def mask(self, completions: NDArray[np.int64]) -> NDArray[np.uint8]: ...
    def keys(self) -> NDArray[np.uint8]: ...
    def sum_keys(self) -> NDArray[np.uint8]: ...
    def group(
        self, index: int
    ) -> tuple[
        NDArray[np.int32], list[NDArray[np.int32]], list[NDArray[np.uint8]], NDArray[np.uint8]
    ]: ...
    def plan(
        self,
        *,
        order: str,
        seed: int = 0,
        epoch: int = 0,
        groups_per_update: int,
        token_budget: int,
        layout: str = "shared",
        rank: int = 0,
        world_size: int = 1,
        weights: NDArray[np.float64] | None = None,
        datasets: NDArray[np.uint32] | None = None,
        attention_cost: float = 0.0,
    ) -> Plan: ...
    def shared_layout(
        self,
        groups: NDArray[np.int64],
        *,
        arena: NDArray[np.uint8] | Callable[[int], NDArray[np.uint8]] | None = None,
        fields: Sequence[str] | None = None,
        multiple_of: int = 1,
        width: int | None = None,
        pad_id: int = 0,
    ) -> SharedLayout: ...
    def tree_layout(
        self,
        groups: NDArray[np.int64],
        *,
        arena: NDArray[np.uint8] | Callable[[int], NDArray[np.uint8]] | None = None,
        fields: Sequence[str] | None = None,
        multiple_of: int = 1,
        width: int | None = None,
        pad_id: int = 0,
    ) -> TreeLayout: ...
    def tree_tokens(
        self, groups: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.uint64]: ...
    def tree_order(self, groups: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def tree_fit(self, groups: NDArray[np.int64], budget: int) -> int: ...
    def tree_cuts(self, groups: NDArray[np.int64], budget: int) -> NDArray[np.int64]: ...
    def padded_layout(
        self,
        groups: NDArray[np.int64],
        *,
        arena: NDArray[np.uint8] | Callable[[int], NDArray[np.uint8]] | None = None,
        fields: Sequence[str] | None = None,
        side: str = "right",
        multiple_of: int = 1,
        width: int | None = None,
        pad_id: int = 0,
    ) -> PaddedLayout: ...

@final
class Plan:
    @property
    def order(self) -> NDArray[np.int64]: ...
    @property
    def micro_offsets(self) -> NDArray[np.int64]: ...
    @property
    def update_offsets(self) -> NDArray[np.int64]: ...

@disjoint_base
class Layout:
    @property
    def arena(self) -> NDArray[np.uint8]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def table(self) -> dict[str, tuple[str, int, list[int]]]: ...
    @property
    def input_ids(self) -> NDArray[np.int64]: ...
    @property
    def attention_mask(self) -> NDArray[np.int64]: ...
    @property
    def position_ids(self) -> NDArray[np.int64]: ...
    @property
    def token_mask(self) -> NDArray[np.int64]: ...
    @property
    def segment_ids(self) -> NDArray[np.int64]: ...
    @property
    def logit_index(self) -> NDArray[np.int64]: ...
    @property
    def target_ids(self) -> NDArray[np.int64]: ...
    @property
    def completion_mask(self) -> NDArray[np.bool_]: ...
    @property
    def completion_of(self) -> NDArray[np.int64]: ...
    @property
    def completion_offsets(self) -> NDArray[np.int64]: ...
    @property
    def prompt_lengths(self) -> NDArray[np.int64]: ...
    @property
    def completion_lengths(self) -> NDArray[np.int64]: ...
    @property
    def group_sizes(self) -> NDArray[np.int64]: ...
    @property
    def roles(self) -> NDArray[np.uint8]: ...
    @property
    def groups(self) -> NDArray[np.int64]: ...
    @property
    def completions(self) -> NDArray[np.int64]: ...

@final
class SharedLayout(Layout):
    @property
    def cu_seqlens_q(self) -> NDArray[np.int32]: ...
    @property
    def cu_seqlens_k(self) -> NDArray[np.int32]: ...
    @property
    def key_index(self) -> NDArray[np.int64]: ...
    @property
    def max_seqlens(self) -> NDArray[np.int64]: ...

@final
class TreeLayout(Layout):
    @property
    def cu_seqlens_q(self) -> NDArray[np.int32]: ...
    @property
    def cu_seqlens_k(self) -> NDArray[np.int32]: ...
    @property
    def key_index(self) -> NDArray[np.int64]: ...
    @property
    def max_seqlens(self) -> NDArray[np.int64]: ...

@final
class PaddedLayout(Layout): ...

@final
class CandidateLayout:
    @property
    def prompt_ids(self) -> NDArray[np.int64]: ...
    @property
    def prompt_mask(self) -> NDArray[np.int64]: ...
    @property
    def candidate_ids(self) -> NDArray[np.int64]: ...
    @property
    def candidate_mask(self) -> NDArray[np.int64]: ...
    @property
    def group(self) -> NDArray[np.int64]: ...
    @property
    def token_index(self) -> NDArray[np.int64]: ...
    @property
    def token_row(self) -> NDArray[np.int64]: ...

class _CachePart(TypedDict):
    name: str
    sealed: bool
    in_use: bool
    rows: int
    tokens: int
    bytes: int
    torn: int
    problem: str | None

class _CacheReport(TypedDict):
    whole: bool
    parts: list[_CachePart]
    distinct: int | None
    leftovers: list[str]
    problems: list[str]

class _CacheChange(TypedDict):
    completions: int
    repeats: int
    shards: list[str]
    removed: list[str]
    in_use: list[str]

@final
class CacheFolder:
    def __new__(
        cls,
        folder: str | PathLike[str],
        fingerprint: bytes,
        *,
        sums: bool = False,
        tolerance: float | None = None,
    ) -> CacheFolder: ...
    def inspect(self) -> _CacheReport: ...
    def verify(self) -> _CacheReport: ...
    def compact(self, *, other_hosts: bool = False) -> _CacheChange: ...
    def seal_idle(self, *, other_hosts: bool = False) -> _CacheChange: ...
    def merge(self, folders: Sequence[str | PathLike[str]]) -> _CacheChange: ...

@final
class CacheWriter:
    def __new__(
        cls, folder: str | PathLike[str], fingerprint: bytes, *, sums: bool = False
    ) -> CacheWriter: ...
    def append(
        self, keys: NDArray[np.uint8], offsets: NDArray[np.int64], logps: NDArray[np.float32]
    ) -> None: ...
    def append_sums(
        self, keys: NDArray[np.uint8], tokens: NDArray[np.uint32], sums: NDArray[np.float64]
    ) -> None: ...
    @property
    def file_bytes(self) -> int: ...
    def seal(self) -> str | None: ...
    def close(self) -> None: ...

@final
class CacheReader:
    @staticmethod
    def open(
        folder: str | PathLike[str],
        fingerprint: bytes,
        *,
        sums: bool = False,
        pread: bool = False,
        tolerance: float | None = None,
    ) -> CacheReader: ...
    def __len__(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def torn_bytes(self) -> int: ...
    def distinct(self) -> int: ...
    def join(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]: ...
    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
    def read_sums(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.float64]]: ...
    def slice(
        self, after: bytes | None, limit: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.float32], NDArray[np.float64]]: ...

@final
class PieceTable:
    def __new__(cls, capacity: int) -> PieceTable: ...
    def encode(
        self, texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
    def encode_pairs(
        self,
        prompts: Sequence[str] | tuple[NDArray[np.uint8], NDArray[np.int64]],
        chosen: Sequence[str] | tuple[NDArray[np.uint8], NDArray[np.int64]],
        rejected: Sequence[str] | tuple[NDArray[np.uint8], NDArray[np.int64]],
        rules: PairRules,
        encode: Callable[[list[str]], list[list[int]]],
    ) -> EncodedPairs: ...

@final
class PairRules:
    def __new__(
        cls,
        *,
        opening: Sequence[int],
        ending: int | None,
        bos: int | None,
        eos: int | None,
        special: Sequence[int],
        prompt_budget: int,
        max_length: int,
    ) -> PairRules: ...

@final
class EncodedPairs:
    @property
    def prompt_ids(self) -> NDArray[np.int32]: ...
    @property
    def prompt_lengths(self) -> NDArray[np.uint32]: ...
    @property
    def completion_ids(self) -> NDArray[np.int32]: ...
    @property
    def completion_lengths(self) -> NDArray[np.uint32]: ...
    @property
    def moved(self) -> NDArray[np.uint32]: ...
    @property
    def odd(self) -> NDArray[np.bool_]: ...

def candidate_layout(
    prompts: list[NDArray[np.int32]], candidates: list[list[NDArray[np.int32]]], chunk: int = 128
) -> CandidateLayout: ...
def content_key(ids: NDArray[np.int32], start: int) -> bytes: ...
def near_duplicates(
    store: Store, threshold: float = 0.8, shingle: int = 5
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]: ...

@final
class Census:
    def __new__(cls, store: Store) -> Census: ...
    @property
    def uses(self) -> NDArray[np.int64]: ...
    @property
    def ends(self) -> NDArray[np.int64]: ...
    @property
    def beyond(self) -> int: ...
    @property
    def compared(self) -> int: ...
    @property
    def same_start(self) -> int: ...
    @property
    def common(self) -> int: ...
