"""Preference data: files to records to ids to a store. Loads neither torch nor transformers."""

from logratio.data.ahead import ahead
from logratio.data.arenas import Arenas
from logratio.data.batches import lay_out, micro_batches
from logratio.data.chat import ChatTemplate, ChatTemplateError
from logratio.data.codes import CODES
from logratio.data.dataset import build_store
from logratio.data.feed import Feed, FeedSettings, FeedStateError, MicroBatch
from logratio.data.formats import FormatSettings
from logratio.data.groups import TokenizedCompletion, TokenizedGroup
from logratio.data.records import (
    Completion,
    InvalidRecordError,
    Message,
    PreferenceRecord,
    Refusal,
    Source,
)
from logratio.data.report import BadDataError, DataReport
from logratio.data.sealed import (
    StoreMismatchError,
    datasets_of,
    is_store,
    load_store,
    rules_of,
    source_names,
)
from logratio.data.tokenization import PreferenceTokenizer
from logratio.data.truncation import TokenizationRules

__all__ = [
    "CODES",
    "Arenas",
    "BadDataError",
    "ChatTemplate",
    "ChatTemplateError",
    "Completion",
    "DataReport",
    "Feed",
    "FeedSettings",
    "FeedStateError",
    "FormatSettings",
    "InvalidRecordError",
    "Message",
    "MicroBatch",
    "PreferenceRecord",
    "PreferenceTokenizer",
    "Refusal",
    "Source",
    "StoreMismatchError",
    "TokenizationRules",
    "TokenizedCompletion",
    "TokenizedGroup",
    "ahead",
    "build_store",
    "datasets_of",
    "is_store",
    "lay_out",
    "load_store",
    "micro_batches",
    "rules_of",
    "source_names",
]
