"""Preference data: files to records to ids to a store. Loads neither torch nor transformers."""

from logratio.data.batches import micro_batches
from logratio.data.chat import ChatTemplate, ChatTemplateError
from logratio.data.codes import CODES
from logratio.data.dataset import StoreMismatchError, build_store, load_store
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
from logratio.data.tokenization import PreferenceTokenizer
from logratio.data.truncation import TokenizationRules

__all__ = [
    "CODES",
    "BadDataError",
    "ChatTemplate",
    "ChatTemplateError",
    "Completion",
    "DataReport",
    "FormatSettings",
    "InvalidRecordError",
    "Message",
    "PreferenceRecord",
    "PreferenceTokenizer",
    "Refusal",
    "Source",
    "StoreMismatchError",
    "TokenizationRules",
    "TokenizedCompletion",
    "TokenizedGroup",
    "build_store",
    "load_store",
    "micro_batches",
]
