"""The figures of a decode on a CPU."""

from __future__ import annotations

from .svg import BLUE, GREEN, GREY, ORANGE, PURPLE, WHITE, Colour, Figure


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


def winograd() -> Figure:
    figure = Figure(860, 416, "Winograd's minimal filtering: 24 products for 8 pixels")
    figure.text(24, 32, "F(4, 3) on rows and F(2, 3) on columns: 24 products for 4 x 2 pixels, instead of 72", bold=True)
    points = ("0", "p", "-p", "1/p", "-1/p", "\u221e"), ("0", "1", "-1", "\u221e")
    figure.text(24, 66, "6 x 4 inputs", size=13, bold=True)
    _grid(figure, (24, 78), (6, 4), 34, BLUE)
    for row in range(4):
        for column in range(2):
            figure.frame(24 + 34 * (column + 1), 78 + 34 * (row + 1), 34, 34, ORANGE[1])
    figure.arrow((168, 180), (250, 180))
    figure.note(209, 158, "evaluate", anchor="middle")
    figure.note(209, 204, "rows, then", "columns", anchor="middle")

    figure.text(300, 66, "24 factors of the inputs", size=13, bold=True)
    for column, point in enumerate(points[1]):
        figure.note(317 + 34 * column, 304, point, anchor="middle")
    for row, point in enumerate(points[0]):
        figure.note(292, 100 + 34 * row, point, anchor="end")
    _grid(figure, (300, 78), (6, 4), 34, PURPLE)
    figure.text(465, 186, "\u00d7", size=22, anchor="middle")
    figure.text(494, 66, "24 factors of the weights", size=13, bold=True)
    _grid(figure, (494, 78), (6, 4), 34, GREY)
    figure.arrow((638, 180), (712, 180))
    figure.note(675, 158, "interpolate", anchor="middle")
    figure.note(675, 204, "columns,", "then rows", anchor="middle")
    figure.text(732, 100, "4 x 2 pixels", size=13, bold=True)
    _grid(figure, (732, 112), (4, 2), 34, ORANGE)

    figure.note(
        24,
        346,
        "Each factor belongs to a point of the rows (left of it) and a point of the columns (below it). Factors of the",
        "same two points are multiplied and summed over the input channels: one matrix product for each of the 24 pairs,",
        "over many tiles of pixels. Tiles are 4 x 2 pixels apart, so neighbours share inputs (orange frames: the pixels'",
        "places in the input).",
    )
    return figure


def _grid(figure: Figure, corner: tuple[int, int], size: tuple[int, int], cell: int, colour: Colour) -> None:
    for row in range(size[0]):
        for column in range(size[1]):
            figure.box(corner[0] + cell * column, corner[1] + cell * row, cell, cell, colour)
