"""The figures of SpatialNorm."""

from __future__ import annotations

from .svg import BLUE, GREEN, GREY, ORANGE, PURPLE, WHITE, Figure


def broadcast() -> Figure:
    figure = Figure(860, 366, "A 1x1 convolution after the nearest resize, as published, and before it")
    cells = (BLUE, ORANGE, GREEN, PURPLE, GREY, WHITE)

    def grid(x: float, y: float, size: float, times: int, letters: str) -> None:
        for row in range(2 * times):
            for column in range(3 * times):
                cell = row // times * 3 + column // times
                figure.box(
                    x + column * size, y + row * size, size, size, cells[cell], letters[cell], size=12 if times > 1 else 15
                )

    figure.text(24, 34, "As published: resize, then convolve 6 x 4 pixels", bold=True)
    grid(30, 66, 36, 1, "abcdef")
    grid(270, 54, 24, 2, "abcdef")
    grid(560, 54, 24, 2, "ABCDEF")
    figure.text(84, 60, "zq", anchor="middle", size=13)
    figure.arrow((150, 102), (256, 102))
    figure.note(203, 92, "nearest", anchor="middle")
    figure.arrow((426, 102), (546, 102))
    figure.note(486, 92, "1x1 conv", anchor="middle")
    figure.note(486, 122, "24 times", anchor="middle")
    figure.note(715, 98, "A depends on a", "alone: one product,", "computed four times")

    figure.line(24, 176, 836, 176, dashed=True)
    figure.text(24, 206, "Here: convolve 3 x 2 cells, and let every pixel look up its cell", bold=True)
    grid(30, 240, 36, 1, "abcdef")
    figure.text(84, 234, "zq", anchor="middle", size=13)
    figure.arrow((150, 276), (256, 276))
    figure.note(203, 266, "1x1 conv", anchor="middle")
    figure.note(203, 296, "6 times", anchor="middle")
    grid(270, 240, 36, 1, "ABCDEF")
    figure.text(324, 234, "zq_y (and zq_b)", anchor="middle", size=13)
    figure.arrow((390, 276), (546, 276))
    figure.note(468, 266, "read in the kernel", anchor="middle")
    figure.note(468, 296, "nothing is written", anchor="middle")
    for row in range(4):
        for column in range(6):
            figure.box(560 + column * 24, 228 + row * 24, 24, 24, (cells[row // 2 * 3 + column // 2][0], "#8c959f"), "f", size=12)
    figure.note(715, 272, "each pixel of f uses", "the value of its cell")
    figure.note(
        430,
        346,
        "A resize copies values and a 1x1 convolution treats every position alike, so the two can be swapped.",
        anchor="middle",
    )
    return figure


def passes() -> Figure:
    figure = Figure(860, 452, "The two passes of SpatialNorm's forward, with the bytes they move")
    figure.text(24, 32, "SpatialNorm forward: f is 512 x 64 x 64 in bfloat16, zq is 4 x 32 x 32", bold=True)
    figure.box(24, 112, 130, 126, BLUE, "f", "512 x 64 x 64", "4 MiB")
    figure.box(296, 64, 180, 60, ORANGE, "statistics", "256 blocks")
    figure.arrow((154, 132), (225, 132), (225, 94), (294, 94), colour=BLUE[1])
    figure.note(162, 82, "read 1: 4 MiB")
    for i in range(8):
        figure.box(566 + i * 30, 72, 26, 44, GREY)
    figure.arrow((476, 94), (562, 94))
    figure.note(566, 64, "per group and chunk: mean, m2, count")
    figure.box(566, 148, 236, 44, ORANGE, "merge_statistics: mean, rstd", size=14)
    figure.arrow((684, 116), (684, 146))
    figure.note(692, 137, "always in the same order")

    figure.box(296, 220, 180, 84, ORANGE, "modulate", "1024 blocks", "(f - mean) rstd w + c", size=14)
    figure.arrow((154, 218), (225, 218), (225, 262), (294, 262), colour=BLUE[1])
    figure.note(162, 282, "read 2: 4 MiB")
    figure.arrow((566, 170), (386, 170), (386, 218))
    figure.box(696, 220, 130, 84, GREEN, "out", "512 x 64 x 64", "4 MiB")
    figure.arrow((476, 262), (694, 262), colour=GREEN[1])
    figure.note(585, 252, "then Y, B, SiLU; write: 4 MiB", anchor="middle")

    figure.box(24, 366, 130, 60, PURPLE, "zq", "4 x 32 x 32")
    figure.box(212, 366, 130, 60, GREY, "conv_y, conv_b", "1x1, PyTorch's")
    figure.box(400, 366, 150, 60, PURPLE, "zq_y, zq_b", "512 x 32 x 32,", "1 MiB each", size=13)
    figure.arrow((154, 396), (210, 396), colour=PURPLE[1])
    figure.arrow((342, 396), (398, 396), colour=PURPLE[1])
    figure.arrow((440, 366), (440, 306), colour=PURPLE[1])
    figure.note(450, 334, "read on the small grid: 2 x 2 pixels share a value")
    figure.note(570, 392, "The resized maps of the published", "order, 4 MiB each, are never written.")
    return figure


def layouts() -> Figure:
    figure = Figure(860, 386, "Which elements a thread owns in NCHW and in channels_last")
    threads = (BLUE, ORANGE, GREEN, PURPLE)
    figure.text(24, 32, "NCHW: adjacent elements are pixels of one channel", bold=True)
    for row in range(3):
        figure.note(24, 70 + row * 34, f"channel {row}")
        for access in range(4):
            for i in range(8):
                colour = threads[access] if row == 1 else GREY
                figure.box(100 + (access * 8 + i) * 16, 54 + row * 34, 16, 22, colour)
    for access in range(4):
        figure.text(164 + access * 128, 180, f"thread {access}", size=13, anchor="middle", colour=threads[access][1])
    figure.note(
        626,
        60,
        "An access: 8 pixels, 16 bytes.",
        "A thread keeps to one channel:",
        "one mean, rstd, weight, bias.",
        "Its warp reads 512 adjacent bytes.",
    )

    figure.line(24, 200, 836, 200, dashed=True)
    figure.text(24, 230, "channels_last (NHWC): adjacent elements are channels of one pixel", bold=True)
    for row in range(3):
        figure.note(24, 268 + row * 34, f"pixel {row}")
        for access in range(4):
            for i in range(8):
                figure.box(100 + (access * 8 + i) * 16, 252 + row * 34, 16, 22, threads[access] if row == 0 else GREY)
    for access in range(4):
        figure.text(164 + access * 128, 374, f"thread {access}", size=13, anchor="middle", colour=threads[access][1])
    figure.note(
        626,
        258,
        "An access: 8 channels, 16 bytes.",
        "A thread keeps to 8 channels and",
        "steps down the pixels. 8 threads",
        "read 128 bytes of one pixel, so a",
        "warp reads four such pieces.",
    )
    return figure
