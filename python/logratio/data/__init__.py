"""Preference data: read, decode, tokenize and store. Imports neither torch nor transformers.

`build_store` reads files into a `Store`; `Feed` yields micro-batches of a store.
"""

from logratio._rust import Store
from logratio.data.feed import Feed, FeedSettings, FeedStateError, MicroBatch
from logratio.data.formats.labels import FormatSettingsError
from logratio.data.formats.settings import FormatSettings
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
from logratio.data.store.load import StoreMismatchError, load_store
from logratio.data.store.row_report import BadDataError, DataReport
from logratio.data.tokenization.chat_template import ChatTemplate, ChatTemplateError
from logratio.data.tokenization.groups import TokenizationRules, TokenizedCompletion, TokenizedGroup
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_classes import TokenizerError
from logratio.errors import CorruptStoreError

__all__ = [
    "CODES",
    "BadDataError",
    "ChatTemplate",
    "ChatTemplateError",
    "Completion",
    "CorruptStoreError",
    "DataReport",
    "Feed",
    "FeedSettings",
    "FeedStateError",
    "FormatSettings",
    "FormatSettingsError",
    "InvalidRecordError",
    "Message",
    "MicroBatch",
    "PreferenceRecord",
    "PreferenceTokenizer",
    "Refusal",
    "Source",
    "Store",
    "StoreMismatchError",
    "TokenizationRules",
    "TokenizedCompletion",
    "TokenizedGroup",
    "TokenizerError",
    "build_store",
    "load_store",
]
