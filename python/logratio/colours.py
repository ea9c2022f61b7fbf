"""Colours of pictures that colour-blind readers can distinguish (Okabe and Ito)."""

BLUE, ORANGE, GREEN, GREY, SKY = "#0072b2", "#d55e00", "#009e73", "#999999", "#56b4e9"
