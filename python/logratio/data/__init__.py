"""Preference data: files to records to ids to a store. Loads neither torch nor transformers."""

from logratio.data.feed import (
    Arenas,
    Feed,
    FeedSettings,
    FeedStateError,
    MicroBatch,
    lay_out,
    micro_batches,
)
from logratio.data.formats import FormatSettings
from logratio.data.prefetch import ahead
from logratio.data.records import (
    CODES,
    Completion,
    InvalidRecordError,
    Message,
    PreferenceRecord,
    Refusal,
    Source,
)
from logratio.data.store.build import build_store
from logratio.data.store.load import (
    StoreMismatchError,
    datasets_of,
    is_store,
    load_store,
    rules_of,
    source_names,
)
from logratio.data.store.row_report import BadDataError, DataReport
from logratio.data.tokenization.chat_template import ChatTemplate, ChatTemplateError
from logratio.data.tokenization.groups import TokenizationRules, TokenizedCompletion, TokenizedGroup
from logratio.data.tokenization.tokenizer import PreferenceTokenizer

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
