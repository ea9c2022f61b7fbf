"""Rows to records: every known format of preference data, detected or refused.

`Decoder` reads a row at a time; `detect` says of some rows what they are and why.
"""

from logratio.data.formats.catalogue import FORMATS, INSPECT, KNOWN_SHAPES, Format, near_formats
from logratio.data.formats.decoder import Decoded, Decoder, Detection, detect
from logratio.data.formats.labels import FormatSettingsError, Label
from logratio.data.formats.settings import FormatSettings, Kind, Lists

__all__ = [
    "FORMATS",
    "INSPECT",
    "KNOWN_SHAPES",
    "Decoded",
    "Decoder",
    "Detection",
    "Format",
    "FormatSettings",
    "FormatSettingsError",
    "Kind",
    "Label",
    "Lists",
    "detect",
    "near_formats",
]
