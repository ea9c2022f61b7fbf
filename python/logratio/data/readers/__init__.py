"""Read rows from files, stdin and tables: one interface for every container of preference data.

pyarrow is imported only when a container needs it (.zst, Parquet, Arrow, tables).
"""

from logratio.data.readers.inputs import Input, Inputs, Opened, as_inputs, open_file, open_inputs
from logratio.data.readers.json import JsonLines, json_type, parse_value
from logratio.data.readers.rows import MAX_RECORD_BYTES, Row, Rows

__all__ = [
    "MAX_RECORD_BYTES",
    "Input",
    "Inputs",
    "JsonLines",
    "Opened",
    "Row",
    "Rows",
    "as_inputs",
    "json_type",
    "open_file",
    "open_inputs",
    "parse_value",
]
