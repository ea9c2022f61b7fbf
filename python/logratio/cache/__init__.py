"""The reference cache, for anyone: looked at, checked, merged, exported, read. Loads no torch."""

from logratio._rust import CorruptCacheError as CorruptCacheError
from logratio._rust import content_key as content_key
from logratio.cache.conditions import DamagedFingerprintError as DamagedFingerprintError
from logratio.cache.identity import StoredReference as StoredReference
from logratio.cache.identity import record_tolerance as record_tolerance
from logratio.cache.reading import MissingCompletionsError as MissingCompletionsError
from logratio.cache.reading import ReferenceLogps as ReferenceLogps
from logratio.cache.reference_cache import NoReferenceError as NoReferenceError
from logratio.cache.reference_cache import ReferenceCache as ReferenceCache
from logratio.cache.results import CacheFile as CacheFile
from logratio.cache.results import Change as Change
from logratio.cache.results import Exported as Exported
from logratio.cache.results import ReferenceReport as ReferenceReport
