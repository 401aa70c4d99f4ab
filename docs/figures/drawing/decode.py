"""The figures of a decode on a CPU."""

from __future__ import annotations

from .svg import BLUE, GREEN, GREY, ORANGE, PURPLE, WHITE, Figure


def strips() -> Figure:
    figure = Figure(860, 332, "One strip of a map through norm and convolution")
    figure.text(24, 32, "A decode on a CPU: one strip of rows goes through all of a step before the next begins", bold=True)
    for row in range(12):
        colour = ORANGE if 4 <= row < 8 else BLUE if row in (3, 8) else GREY
        figure.box(24, 56 + row * 18, 150, 18, colour)
    figure.note(24, 294, "map x, in memory,", "its moments known")
    figure.arrow((176, 164), (238, 164))
    figure.box(242, 108, 150, 112, PURPLE, "normalised strip", "x * scale + shift, SiLU", "halo included", size=12)
    figure.arrow((394, 164), (456, 164))
    figure.box(460, 126, 150, 76, GREEN, "convolution", "adds to the rows of out", "(oneDNN)", size=12)
    figure.arrow((612, 164), (674, 164))
    for row in range(12):
        figure.box(678, 56 + row * 18, 150, 18, ORANGE if 4 <= row < 8 else GREEN if row < 4 else WHITE)
    figure.note(678, 294, "out, measured as it", "is written")
    figure.note(
        242,
        250,
        "A 3x3 convolution needs one more row on either",
        "side (blue), which is normalised twice. No row of",
        "out is convolved twice.",
    )
    figure.note(242, 308, "The next norm has its statistics without a pass.")
    return figure
