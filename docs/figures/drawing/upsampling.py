"""The figures of the upsampling."""

from __future__ import annotations

from .svg import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, WHITE, Figure


def phases() -> Figure:
    figure = Figure(860, 640, "Which of the nine weights fold together for each of the four pixels")
    figure.text(24, 32, "A 3x3 convolution of the doubled map sees only 2x2 pixels of the small one", bold=True)
    names = "abcdefghi"
    small = (BLUE, ORANGE, GREEN, PURPLE)

    figure.note(24, 58, "small map (four of its pixels), weights, doubled map")
    for row in range(2):
        for column in range(2):
            figure.box(24 + column * 44, 76 + row * 44, 44, 44, small[row * 2 + column], "PQRS"[row * 2 + column], size=15)
    for i, name in enumerate(names):
        figure.box(176 + i % 3 * 30, 76 + i // 3 * 30, 30, 30, WHITE, name, size=14)
    for row in range(4):
        for column in range(4):
            figure.box(
                340 + column * 30,
                70 + row * 30,
                30,
                30,
                small[row // 2 * 2 + column // 2],
                "PQRS"[row // 2 * 2 + column // 2],
                size=13,
            )
    for x, y in ((370, 100), (400, 100), (370, 130), (400, 130)):
        figure.frame(x, y, 30, 30, INK)
    figure.note(
        490,
        92,
        "The four framed pixels lie around the centre of",
        "PQRS. Each sees a 3x3 window of the doubled",
        "map, drawn below; weights on the same letter",
        "are added before anything is multiplied.",
    )

    sums = {
        (0, 0): ("a+b+d+e", "c+f", "g+h", "i"),
        (0, 1): ("a+d", "b+c+e+f", "g", "h+i"),
        (1, 0): ("a+b", "c", "d+e+g+h", "f+i"),
        (1, 1): ("a", "b+c", "d+g", "e+f+h+i"),
    }
    for (row, column), folded in sums.items():
        x, y = 24 + column * 416, 224 + row * 190
        figure.text(
            x, y, ("upper " if row == 0 else "lower ") + ("left pixel" if column == 0 else "right pixel"), size=13, bold=True
        )
        for i, name in enumerate(names):
            r, c = row + i // 3, column + i % 3
            figure.box(
                x + i % 3 * 40,
                y + 14 + i // 3 * 40,
                40,
                40,
                small[r // 2 * 2 + c // 2],
                f"{name} {'PQRS'[r // 2 * 2 + c // 2]}",
                size=13,
            )
        figure.arrow((x + 130, y + 74), (x + 168, y + 74))
        for i, weight in enumerate(folded):
            figure.box(x + 176 + i % 2 * 92, y + 14 + i // 2 * 60, 92, 60, small[i], weight, f"on {'PQRS'[i]}", size=13)
    figure.note(
        430,
        606,
        "4 pixels x 4 products = 16 multiplications per channel pair instead of 4 x 9 = 36: 2.25 times fewer.",
        anchor="middle",
    )
    figure.note(430, 626, "The sums of weights are computed in every call; only rounding differs.", anchor="middle")
    return figure


def windows() -> Figure:
    figure = Figure(860, 420, "The upsampling as windows of 2x2 pixels, and its borders")
    figure.text(
        24, 32, "fold_windows: every 2x2 window of the small map computes the four large pixels around its centre", bold=True
    )
    size, x, y = 56, 60, 96
    for row in range(4):
        for column in range(5):
            inside = 0 < row < 3 and 0 < column < 4
            figure.box(
                x + (column - 0.5) * size,
                y + (row - 0.5) * size,
                size,
                size,
                BLUE if inside else WHITE,
                "" if inside else "0",
                size=13,
                dashed=not inside,
            )
    for row in range(3):
        for column in range(4):
            cx, cy = x + (column + 0.5) * size, y + (row + 0.5) * size
            figure.box(cx - 13, cy - 13, 26, 26, ORANGE if (row, column) == (1, 1) else GREY)
    figure.note(32, 316, "small map 2 x 3 (blue), zeros around it;", "3 x 4 windows, one around each square")

    figure.arrow((356, 196), (410, 196))
    size, x, y = 30, 430, 92
    for row in range(6):
        for column in range(8):
            inside = 0 < row < 5 and 0 < column < 7
            window = row // 2, column // 2
            colour = ORANGE if window == (1, 1) else GREY
            figure.box(x + column * size, y + row * size, size, size, colour if inside else WHITE, dashed=not inside, size=12)
    figure.frame(x + size, y + size, 6 * size, 4 * size, BLUE[1])
    figure.note(430, 300, "6 x 8 pixels are computed; the 4 x 6 in the blue frame", "are the doubled map, the others are dropped")
    figure.note(
        688,
        112,
        "The 3x3 convolution of",
        "the doubled map pads",
        "with zeros. Its zeros fall",
        "on the zeros around the",
        "small map, so the folded",
        "weights are right at the",
        "border too.",
    )
    figure.line(24, 348, 836, 348, dashed=True)
    figure.note(
        24,
        374,
        "fold_upsampling writes the same sixteen sums as one 4x4 kernel: F.conv_transpose2d with stride 2 and padding 1 computes",
        "the 4 x 6 pixels at once. Training and a GPU run that; a decode in strips runs the windows or nine products.",
    )
    return figure


def products() -> Figure:
    figure = Figure(860, 356, "Three products for two pixels of an upsampled row")
    figure.text(
        24, 32, "A filter w0, w1, w2 over a row in which every value stands twice: three products for two pixels", bold=True
    )
    values = ("x[i-1]", "x[i]", "x[i+1]")
    for column, name in enumerate(values):
        figure.box(40 + column * 200, 56, 110, 36, BLUE, name)
    figure.note(650, 78, "values")
    for column, name in enumerate(("x[i-1] - x[i]", "x[i]", "x[i] - x[i+1]")):
        centre = 195 + column * 100
        figure.box(centre - 46 - (54 if column == 0 else -54 if column == 2 else 0), 134, 92, 36, PURPLE, name, size=12)
    for start, end in ((95, 130), (275, 150), (295, 295), (315, 440), (495, 460)):
        figure.arrow((start, 94), (end, 132))
    figure.note(650, 156, "differences, shared with", "the neighbouring pairs")
    factors = ("\u00d7 w0", "\u00d7 (w0+w1+w2)", "\u00d7 -w2")
    for centre, factor in zip((141, 295, 449), factors, strict=True):
        figure.arrow((centre, 172), (centre, 208))
        figure.box(centre - 62, 210, 124, 36, GREEN, factor, size=13)
    figure.note(650, 232, "three products", "(two pixels of two taps: four)")
    for centre, name, others in ((218, "y[2i]", (141, 290)), (372, "y[2i + 1]", (300, 449))):
        for other in others:
            figure.arrow((other, 248), (centre, 294))
        figure.box(centre - 55, 296, 110, 36, ORANGE, name)
    figure.note(650, 318, "pixels")
    return figure
