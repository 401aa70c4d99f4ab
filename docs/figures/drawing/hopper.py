"""The figures of attention on Hopper."""

from __future__ import annotations

from .svg import BLUE, GREEN, GREY, ORANGE, PURPLE, WHITE, Figure


def seesaw() -> Figure:
    figure = Figure(860, 520, "Attention on Hopper: shared memory, and who computes what")
    figure.text(24, 32, "One block on a multiprocessor (keys and values in one tensor, head 512, 16-bit types)", bold=True)
    scale = 812 / (227 * 1024)
    parts = [
        ("q: 64 x 512", 65536, BLUE),
        ("stage 0: 64 keys x 512", 65536, GREEN),
        ("stage 1: 64 keys x 512", 65536, ORANGE),
        ("", 8192, PURPLE),
        ("", 8192, PURPLE),
    ]
    x = 24.0
    for name, size, colour in parts:
        figure.box(x, 50, size * scale, 48, colour, name, size=12)
        x += size * scale
    figure.box(x, 50, 836 - x, 48, WHITE)
    figure.note(24, 118, "q | two stages | the weights of each stage, 8 KiB | barriers and values of rows, 2 KiB | not used")

    figure.text(24, 156, "A stage serves twice: as keys for one warpgroup, as values for both", size=13, bold=True)
    for row, (name, own, other) in enumerate((("warpgroup 0", 0, 1), ("warpgroup 1", 1, 0))):
        y = 172 + row * 62
        figure.text(24, y + 30, name, size=13)
        figure.box(130, y, 210, 46, (GREEN, ORANGE)[own], f"scores of stage {own}", "q stage^T: 64 x 64", size=12)
        half = ("columns 0 to 255", "columns 256 to 511")[row]
        figure.box(360, y, 220, 46, GREY, f"sums: {half}", "64 x 256, 128 registers a thread", size=12)
        figure.note(600, y + 18, f"+= own weights x stage {own}", f"+= the other's weights x stage {other}")

    figure.text(24, 320, "The seesaw, over one pair of stages (not to scale)", size=13, bold=True)
    rows = (
        ("warpgroup 0", ((0, 150, GREEN, "scores 0"), (150, 80, WHITE, "exp"), (230, 130, GREEN, "values 0"),
                         (360, 60, WHITE, "wait"), (420, 130, ORANGE, "values 1"))),
        ("warpgroup 1", ((0, 180, ORANGE, "scores 1"), (180, 50, WHITE, "wait"), (230, 130, GREEN, "values 0"),
                         (430, 130, ORANGE, "values 1"))),
        ("", ((240, 170, WHITE, "exp, while values 0 run"),)),
        ("loading thread", ((0, 370, ORANGE, "both stages are in use"), (370, 200, GREEN, "next stage 0"),
                            (570, 120, ORANGE, "next stage 1"))),
    )  # fmt: skip
    for row, (name, spans) in enumerate(rows):
        y = 336 + row * 38
        figure.text(24, y + 20, name, size=13)
        for start, width, colour, label in spans:
            dashed = label.startswith("both")
            figure.box(130 + start, y, width - 4, 30, WHITE if dashed else colour, label, size=12, dashed=dashed)
    figure.note(24, 506, "A stage is loaded again as soon as both warpgroups have added its values.")
    return figure
