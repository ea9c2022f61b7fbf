"""What a user says about the data where the data does not say it."""

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from logratio.data.formats.labels import FormatSettingsError, Label
from logratio.data.formats.row import Strings
from logratio.data.readers.derived_rows import RowFunction, as_row_function
from logratio.data.readers.inputs import Reading
from logratio.data.readers.rows import Row
from logratio.validation import Converted, check_fields

Lists = Literal["pairs", "best_worst", "groups"]
Kind = Literal["pair", "unpaired", "group", "demonstration"]
"""What one record says: this is better than that; this is good (or bad); this is the order of
these; do it like this."""


@dataclass(frozen=True, slots=True)
class FormatSettings:
    """How rows are read.

    Attributes:
        demonstrations: Make records of one completion to imitate; of a pair the chosen one, of a
            list the best.
        lists: What becomes of a ranked or scored list: ``pairs`` (everything better than something
            else; ties are left out and counted), ``best_worst`` (one pair), ``groups`` (one group,
            best first).
        format: The name of the only format that is read; None: what each row is.
        columns: A key of the data for a name that formats know: ``{"prompt": "question"}``, or a
            path into objects and lists: ``{"prompt": "info.post"}``.
        label: What a label's values mean; text is read by `Label.parse`.
        kinds: What records may say; others are refused (E206). None: anything, but all rows of a
            file the same.
        strings: What a string is that spells a list of messages, as JSON or Python's ``repr``:
            ``messages`` or ``text``. None: messages where all parts of a row that could be
            messages are (counted, W522), text where none is; refused otherwise (E215).
        split: The split to read of folders and of a `datasets.DatasetDict` that hold several, as
            ``train``. None: the only one.
        encoding: Of files of text, as ``cp1252`` or ``utf-16``. None: UTF-8.
        rows: A function that every row goes through first, or its name, ``module:function``, or
            that of a layout (`logratio.data.layouts`). It gets a dict, and returns one, a list of
            them, or None to leave the row out (R316).
        group_by: A key: neighbours that say the same there become one row, with a list under every
            other key. None: each row is a row.
        score: The score that ranks a list: a key of its answers, with dots into objects
            (``annotations.honesty.Rating``), or of a list of numbers beside them. None: the first
            known one; where others could rank the list too, that is counted (W525).

    Raises:
        FormatSettingsError: A value is not possible.
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

    def __post_init__(self) -> None:
        from logratio.data.formats.catalogue import KNOWN_NAMES, names_of_formats

        if self.lists not in get_args(Lists):
            known = ", ".join(get_args(Lists))
            raise FormatSettingsError(f"lists is {self.lists!r}, not one of {known}")
        if self.strings not in (None, *get_args(Strings)):
            known = ", ".join(get_args(Strings))
            raise FormatSettingsError(f"strings is {self.strings!r}, not one of {known}")
        if self.format is not None and self.format not in names_of_formats():
            known = ", ".join(names_of_formats())
            raise FormatSettingsError(f"the format {self.format!r} is not one of {known}")
        if isinstance(self.label, str):
            object.__setattr__(self, "label", Label.parse(self.label))
        check_fields(self)
        if self.encoding is not None:
            _check_encoding(self.encoding)
        for name in self.columns:
            if name not in KNOWN_NAMES:
                known = ", ".join(sorted(KNOWN_NAMES))
                raise FormatSettingsError(f"columns: no format reads {name!r}; known are {known}")

    @property
    def reading(self) -> Reading:
        """What is said about containers."""
        encoding = self.encoding
        if encoding and codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
            encoding = None
        function = self.rows if isinstance(self.rows, RowFunction) else None
        return Reading(self.split, encoding, function, self.group_by)

    @property
    def told(self) -> Label | None:
        """The label, read."""
        return self.label if isinstance(self.label, Label) else None


def _check_encoding(name: str) -> None:
    """Refuse what is no encoding of text."""
    try:
        "".encode(name)
    except LookupError:
        raise FormatSettingsError(
            f"encoding: Python knows no text in {name!r}; it knows cp1252, utf-16, gb18030 …"
        ) from None
