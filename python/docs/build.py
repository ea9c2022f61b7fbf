"""Write tables of codes, methods and families into their pages, and the API reference as HTML.

`make docs` runs it. The reference is made from the docstrings, by pdoc, in ``target/docs``.
"""

import json
import re
import sys
from pathlib import Path

import logratio
from logratio.data.records import CODES, CURES
from logratio.export.families import REFUSED
from logratio.training.methods.method import Method
from logratio.training.methods.table import METHODS

PACKAGES = (
    "logratio",
    *(f"logratio.{name}" for name in ("bundle", "cache", "data", "export", "integrations")),
    *(f"logratio.{name}" for name in ("logps", "report", "serving", "training", "errors")),
)
"""What the API reference describes."""
PAGE = Path(__file__).with_name("troubleshooting.md")
METHODS_PAGE = PAGE.with_name("methods.md")
EXPORT_PAGE = PAGE.with_name("export.md")
FAMILIES_TABLE = PAGE.parents[2] / "tests/python/export/families.json"
_RULE_OF_3 = "| --- | --- | --- |"
_METHODS = re.compile(r"(<!-- methods:.*? -->\n).*?(<!-- /methods -->)", re.DOTALL)
_FAMILIES = re.compile(r"(<!-- families:.*? -->\n).*?(<!-- /families -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- codes:.*? -->\n).*?(<!-- /codes -->)", re.DOTALL)


def with_codes(page: str) -> str:
    """Return the page with the table of every code, its meaning and its cure."""
    rows = [f"| {code} | {CODES[code]} | {CURES[code]} |".replace("\n", " ") for code in CODES]
    table = "\n".join(["| code | meaning | what to do |", "| --- | --- | --- |", *rows])
    return _TABLE.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def with_methods(page: str) -> str:
    """Return the page with the table of every method."""
    head = ["`--loss`", "loss", "data", "reference", "bad turns"]
    head += ["β", "initial value", "options", "paper"]
    rows = [head, ["---"] * len(head)]
    rows += [[f"`{name}`", *_cells(method)] for name, method in METHODS.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return _METHODS.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def with_families(page: str) -> str:
    """Return the page with the model types that can be exported, and why others cannot."""
    rows = sorted(json.loads(FAMILIES_TABLE.read_text()).items())
    cells = {kind: f"`{kind}` {row['nats']:.0e}" for kind, row in rows}
    lines = ["| layout | opset | `model_type` and largest difference |", _RULE_OF_3]
    found = {kind: (row["layout"], row["opset"]) for kind, row in rows}
    for layout, opset in sorted({*found.values()}, reverse=True):
        same = [cells[kind] for kind, one in found.items() if one == (layout, opset)]
        lines.append(f"| {layout} | {opset} | {', '.join(same)} |")
    lines += ["", "| refused, because | `model_type` |", "| --- | --- |"]
    for reason in sorted({*REFUSED.values()}):
        same = [f"`{kind}`" for kind in sorted(REFUSED) if REFUSED[kind] == reason]
        lines.append(f"| {reason} | {', '.join(same)} |")
    table = "\n".join(lines)
    return _FAMILIES.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def _cells(method: Method) -> list[str]:
    options = (f"`{name}` {option.default:g}" for name, option in method.options.items())
    note = f" ({method.note})" if method.note else ""
    return [
        f"{method.formula}{note}",
        method.data,
        "yes" if method.needs_reference else "no",
        "yes" if method.bad_turns else "no",
        "" if method.beta is None else f"{method.beta:g}",
        "" if (value := method.default_initial_value) is None else f"{value:.4g}",
        ", ".join(options),
        method.paper,
    ]


def import_front_door() -> None:
    """Import the names of `logratio`, which are lazy: pdoc only sees names that are there."""
    for name in logratio.__all__:
        setattr(logratio, name, getattr(logratio, name))


def write_reference(folder: Path) -> None:
    """Write the API reference of every public name, by package."""
    import pdoc
    import pdoc.render

    import_front_door()
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*PACKAGES, output_directory=folder)


if __name__ == "__main__":
    PAGE.write_text(with_codes(PAGE.read_text()))
    METHODS_PAGE.write_text(with_methods(METHODS_PAGE.read_text()))
    EXPORT_PAGE.write_text(with_families(EXPORT_PAGE.read_text()))
    write_reference(Path(sys.argv[1]))
