"""Settings for reading data, where the data itself is ambiguous."""

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from logratio.data.formats.labels import FormatSettingsError, Label
from logratio.data.formats.row import Strings
from logratio.data.readers.derived_rows import RowFunction, as_row_function
from logratio.data.readers.inputs import Reading
from logratio.data.readers.rows import Row
from logratio.synonyms import takes_known_names
from logratio.validation import Converted, changes, check_fields

Lists = Literal["pairs", "best_worst", "groups"]
Kind = Literal["pair", "unpaired", "group", "demonstration"]
"""The kind of a record: a better and a worse answer; an answer with a boolean label; several ranked
answers; an answer to imitate."""


@takes_known_names()
@dataclass(frozen=True, slots=True)
class FormatSettings:
    """How rows are read.

    Attributes:
        demonstrations: Read one completion to imitate per row (SFT): of a pair the chosen one, of a
            list the best.
        lists: How to convert a ranked or scored list: ``pairs`` (every better answer with every
            worse one; ties are left out and counted), ``best_worst`` (one pair), or ``groups`` (one
            group, best first).
        format: The only format that is accepted. None: detect the format of each row.
        columns: A key of the data for each name that a format reads: ``{"prompt": "question"}``,
            or a path into objects and lists: ``{"prompt": "info.post"}``.
        label: The meaning of a label's values; a string is parsed by `Label.parse`.
        kinds: The accepted kinds of records; others are refused (E206). None: every kind, but one
            kind per file.
        strings: How to read a string that spells a list of messages, as JSON or Python's
            ``repr``: as ``messages`` or as ``text``. None: as messages if all parts of the row are
            such strings (counted, W522), as text if none is; other rows are refused (E215).
        split: The split to read of folders and of a `datasets.DatasetDict` with several, as
            ``train``. None: the only one.
        encoding: Encoding of text files, as ``cp1252`` or ``utf-16``. None: UTF-8.
        rows: A function that is applied to every row first, its name as ``module:function``, or
            the name of a layout (`logratio.data.layouts`). It receives a dict and returns a dict,
            a list of dicts, or None to leave the row out (R316).
        group_by: A key by which adjacent rows with equal values are merged into one row, with a
            list under every other key. None: rows are not merged.
        score: The score that ranks a list: a key of its answers, with dots into objects
            (``annotations.honesty.Rating``), or the key of a list of numbers. None: the first known
            one; if others could also rank the list, the row is counted (W525).

    Raises:
        FormatSettingsError: A value is invalid.
    """

    demonstrations: bool = False
    lists: Lists = "pairs"
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    label: Label | str | None = None
    kinds: tuple[Kind, ...] | None = None
    strings: Strings | None = None
    score: str | None = None
    split: str | None = None
    encoding: str | None = None
    rows: Annotated[RowFunction | Callable[[Row], Any] | str | None, Converted(as_row_function)] = (
        None
    )
    group_by: str | None = None

    __repr__ = changes

    def __post_init__(self) -> None:
        from logratio.data.formats.catalogue import KNOWN_NAMES, names_of_formats

        if self.lists not in get_args(Lists):
            known = ", ".join(get_args(Lists))
            raise FormatSettingsError(f"--lists is {self.lists!r}, not one of {known}")
        if self.strings not in (None, *get_args(Strings)):
            known = ", ".join(get_args(Strings))
            raise FormatSettingsError(f"--strings is {self.strings!r}, not one of {known}")
        if self.format is not None and self.format not in names_of_formats():
            known = ", ".join(names_of_formats())
            raise FormatSettingsError(f"--format {self.format!r} is not one of {known}")
        if isinstance(self.label, str):
            object.__setattr__(self, "label", Label.parse(self.label))
        check_fields(self)
        if self.encoding is not None:
            _check_encoding(self.encoding)
        for name in self.columns:
            if name not in KNOWN_NAMES:
                known = ", ".join(sorted(KNOWN_NAMES))
                raise FormatSettingsError(f"--columns: no format reads {name!r}; known are {known}")

    @property
    def reading(self) -> Reading:
        """The settings that concern containers."""
        encoding = self.encoding
        if encoding and codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
            encoding = None
        function = self.rows if isinstance(self.rows, RowFunction) else None
        return Reading(self.split, encoding, function, self.group_by)

    @property
    def parsed_label(self) -> Label | None:
        """The label after parsing."""
        return self.label if isinstance(self.label, Label) else None


def _check_encoding(name: str) -> None:
    """Raise FormatSettingsError unless Python knows the text encoding."""
    try:
        "".encode(name)
    except LookupError:
        raise FormatSettingsError(
            f"--encoding: unknown text encoding {name!r}; Python knows cp1252, utf-16, gb18030 …"
        ) from None
