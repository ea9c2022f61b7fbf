"""`logratio report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Output folder of a run, also a running one.")
    ],
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write. Default: report.html in OUTPUT."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
) -> None:
    """Write the HTML report of a training run, from the files in its output folder.

    The page is one file: curves, held-out rewards and calibration, samples, data, settings and
    versions. `train` writes it too; this command works for runs that have ended in any way.
    """
    from logratio.report import write_report
    from logratio.report.pictures import can_draw

    written = write_report(folder, file)
    if not quiet:
        if not can_draw():
            typer.echo("without pictures: pip install 'logratio[plots]' adds them", err=True)
        typer.echo(written)
