"""Write the table of codes into the troubleshooting page, and the API reference as HTML.

`make docs` runs it. The reference is made from the docstrings, by pdoc, in ``target/docs``.
"""

import re
import sys
from pathlib import Path

from logratio.data.records import CODES, CURES

PAGE = Path(__file__).with_name("troubleshooting.md")
_TABLE = re.compile(r"(<!-- codes:.*? -->\n).*?(<!-- /codes -->)", re.DOTALL)


def with_codes(page: str) -> str:
    """Return the page with the table of every code, its meaning and its cure."""
    rows = [f"| {code} | {CODES[code]} | {CURES[code]} |".replace("\n", " ") for code in CODES]
    table = "\n".join(["| code | meaning | what to do |", "| --- | --- | --- |", *rows])
    return _TABLE.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def write_reference(folder: Path) -> None:
    """Write the API reference of every public module."""
    import pdoc
    import pdoc.render

    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(
        "logratio", "!logratio._rust", "!logratio.cli", "!logratio.demo", output_directory=folder
    )


if __name__ == "__main__":
    PAGE.write_text(with_codes(PAGE.read_text()))
    write_reference(Path(sys.argv[1]))
