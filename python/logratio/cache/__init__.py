"""Inspect, verify, merge, export and read the reference cache. Does not import torch."""

from logratio._rust import content_key
from logratio.cache.cache import NoReferenceError, ReferenceCache
from logratio.cache.identity import DamagedFingerprintError, StoredReference, record_tolerance
from logratio.cache.logps import MissingCompletionsError, ReferenceLogps
from logratio.cache.merging import MergeError
from logratio.cache.results import CacheFile, Change, Exported, ReferenceReport
from logratio.errors import CorruptCacheError

__all__ = [
    "CacheFile",
    "Change",
    "CorruptCacheError",
    "DamagedFingerprintError",
    "Exported",
    "MergeError",
    "MissingCompletionsError",
    "NoReferenceError",
    "ReferenceCache",
    "ReferenceLogps",
    "ReferenceReport",
    "StoredReference",
    "content_key",
    "record_tolerance",
]
