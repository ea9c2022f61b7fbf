"""The reference cache, for anyone: looked at, checked, merged, exported, read. Loads no torch."""

from logratio._rust import CorruptCacheError as CorruptCacheError
from logratio._rust import content_key as content_key
from logratio.cache.cache import NoReferenceError as NoReferenceError
from logratio.cache.cache import ReferenceCache as ReferenceCache
from logratio.cache.identity import DamagedFingerprintError as DamagedFingerprintError
from logratio.cache.identity import StoredReference as StoredReference
from logratio.cache.identity import record_tolerance as record_tolerance
from logratio.cache.logps import MissingCompletionsError as MissingCompletionsError
from logratio.cache.logps import ReferenceLogps as ReferenceLogps
from logratio.cache.results import CacheFile as CacheFile
from logratio.cache.results import Change as Change
from logratio.cache.results import Exported as Exported
from logratio.cache.results import ReferenceReport as ReferenceReport
