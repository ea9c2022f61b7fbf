"""How every picture looks: its style, and colours that colour-blind readers can distinguish."""

from typing import Any

BLUE, ORANGE, GREEN, GREY, SKY = "#0072b2", "#d55e00", "#009e73", "#999999", "#56b4e9"
"""Colours of Okabe and Ito."""

# "default" overrides the user's matplotlibrc. Text in an SVG stays text, and the ids of its
# elements are the same in every run.
STYLE: list[Any] = [
    "default",
    {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "logratio", "pdf.fonttype": 42},
]
"""Styles for matplotlib.style.context."""
NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
"""Metadata by suffix, so that the same data gives the same bytes."""
