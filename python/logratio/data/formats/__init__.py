"""Convert rows to records: the known formats of preference data, detected row by row.

`Decoder` reads one row at a time; `detect` reports the format of some rows and the reason.
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
