"""What a user says about the data where the data does not say it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from logratio.errors import LogratioError

Lists = Literal["pairs", "best_worst", "groups"]
Kind = Literal["pair", "unpaired", "group", "demonstration"]
"""What one record says: this is better than that; this is good (or bad); this is the order of
these; do it like this."""

TIE, GOOD, BAD = "tie", "good", "bad"


class FormatSettingsError(LogratioError, ValueError):
    """Settings that cannot be followed."""


@dataclass(frozen=True, slots=True)
class Label:
    """What the values of a label mean.

    Attributes:
        key: Where the label stands.
        meanings: For each value, as text: the key of the better answer, ``tie``, or, for one
            completion alone, ``good`` or ``bad``.
    """

    key: str
    meanings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Label":
        """Read ``"preference: 1=output_1 2=output_2"``; quotes hold blanks together.

        Raises:
            FormatSettingsError: The text has another shape.
        """
        wanted = "write it as 'preference: 1=output_1 2=output_2'"
        key, colon, rest = text.partition(":")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise FormatSettingsError(f"the label {text!r} is not understood: {error}") from None
        pairs = [word.rpartition("=") for word in words]
        if not (colon and key.strip() and pairs) or not all(v and m for v, _, m in pairs):
            raise FormatSettingsError(f"the label {text!r} is not understood: {wanted}")
        return cls(key.strip(), {value: meaning for value, _, meaning in pairs})

    def answers(self) -> tuple[str, ...]:
        """Return the keys of the answers that it chooses between."""
        ours = (TIE, GOOD, BAD)
        return tuple(dict.fromkeys(m for m in self.meanings.values() if m not in ours))

    def is_thumb(self) -> bool:
        """Say whether it judges one completion alone."""
        return not self.answers() and bool({GOOD, BAD} & set(self.meanings.values()))


def spelled(value: Any) -> str:
    """Write a label's value as settings spell it: 1 and 1.0 are ``1``, true is ``true``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


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
        columns: A key of the data for a name that formats know: ``{"prompt": "question"}``.
        label: What a label's values mean; text is read by `Label.parse`.
        kinds: What records may say; others are refused (E206). None: anything, but all rows of a
            file the same.

    Raises:
        FormatSettingsError: A value is not possible.
    """

    demonstrations: bool = False
    lists: Lists = "pairs"
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    label: Label | str | None = None
    kinds: tuple[Kind, ...] | None = None

    def __post_init__(self) -> None:
        from logratio.data.formats.catalogue import KNOWN_NAMES, names_of_formats

        if self.lists not in get_args(Lists):
            known = ", ".join(get_args(Lists))
            raise FormatSettingsError(f"lists is {self.lists!r}, not one of {known}")
        if self.format is not None and self.format not in names_of_formats():
            known = ", ".join(names_of_formats())
            raise FormatSettingsError(f"the format {self.format!r} is not one of {known}")
        if isinstance(self.label, str):
            object.__setattr__(self, "label", Label.parse(self.label))
        for name in self.columns:
            if name not in KNOWN_NAMES:
                known = ", ".join(sorted(KNOWN_NAMES))
                raise FormatSettingsError(f"columns: no format reads {name!r}; known are {known}")

    @property
    def told(self) -> Label | None:
        """The label, read."""
        return self.label if isinstance(self.label, Label) else None
