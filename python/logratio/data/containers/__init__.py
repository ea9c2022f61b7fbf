"""Files, stdin and tables to rows: one face over every container of preference data.

pyarrow is loaded when a container needs it (.zst, Parquet, Arrow, tables), and not before.
"""

from logratio.data.containers.json_lines import JsonLines
from logratio.data.containers.json_text import json_type, parse_value
from logratio.data.containers.opening import Input, Opened, open_file, open_inputs
from logratio.data.containers.rows import MAX_RECORD_BYTES, Row, Rows

__all__ = [
    "MAX_RECORD_BYTES",
    "Input",
    "JsonLines",
    "Opened",
    "Row",
    "Rows",
    "json_type",
    "open_file",
    "open_inputs",
    "parse_value",
]
