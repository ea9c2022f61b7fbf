"""The data report as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from logratio.data.analysis.panels import caption, panels
from logratio.data.analysis.plot import plot
from logratio.data.analysis.svg import svg
from logratio.errors import ConfigError

if TYPE_CHECKING:
    from logratio.data.analysis.whole import Analysis


def draw(analysis: "Analysis", path: Path) -> None:
    """Write the picture: SVG without any library, or PNG by matplotlib where ``path`` ends so.

    Raises:
        ValueError: The name ends otherwise, or the store is empty.
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if not analysis.groups:
        raise ConfigError("there is no group to draw")
    title = f"{analysis.groups:,} preference groups"
    if analysis.are_pairs:
        title = f"{analysis.groups:,} preference pairs"
    shown = panels(analysis)
    if path.suffix == ".svg":
        path.write_text(svg(title, caption(analysis), shown), "utf-8")
    elif path.suffix == ".png":
        plot(path, title, caption(analysis), shown)
    else:
        raise ConfigError(f"{path}: a picture is .svg or .png")
