"""Draws the figures of how_the_kernels_work.md as SVG files: `python docs/figures/draw.py`. Needs nothing but Python.

Every figure has a background of its own, so that it can be read on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
INK, FAINT = "#1f2328", "#59636e"
Colour = tuple[str, str]  # of a box and of its border
BLUE: Colour = ("#dbeafe", "#1d4ed8")
ORANGE: Colour = ("#ffedd5", "#c2410c")
GREEN: Colour = ("#dcfce7", "#15803d")
PURPLE: Colour = ("#f3e8ff", "#7e22ce")
GREY: Colour = ("#eef0f2", "#59636e")
WHITE: Colour = ("#ffffff", "#59636e")
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Figure:
    """An SVG picture; lengths are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        heads = "".join(
            f'<marker id="head{i}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
            for i, colour in enumerate(ARROWS)
        )
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="{FONT}"><title>{escape(title)}</title><defs>{heads}</defs>',
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: Colour = WHITE,
        *lines: str,
        size: int = 14,
        dashed: bool = False,
    ) -> None:
        """A rectangle with lines of text in its middle, the first in bold where there are more."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{min(4, height / 4)}" fill="{colour[0]}" '
            f'stroke="{colour[1]}"{dash}/>'
        )
        top = y + height / 2 - (len(lines) - 1) * (size + 4) / 2
        for i, line in enumerate(lines):
            self.text(
                x + width / 2,
                top + i * (size + 4) + size * 0.36,
                line,
                size=size,
                anchor="middle",
                bold=i == 0 and len(lines) > 1,
            )

    def text(
        self, x: float, y: float, line: str, size: int = 14, anchor: str = "start", colour: str = INK, bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(line)}</text>'
        )

    def note(self, x: float, y: float, *lines: str, anchor: str = "start") -> None:
        """Smaller lines of text, one below the other."""
        for i, line in enumerate(lines):
            self.text(x, y + 17 * i, line, size=13, anchor=anchor, colour=FAINT)

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """Through all points, with its head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        head = f"url(#head{ARROWS.index(colour)})"
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="{head}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = FAINT, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{colour}"{dash}/>')

    def frame(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{colour}" stroke-width="2.4"/>'
        )

    def save(self, name: str, folder: Path) -> None:
        (folder / f"{name}.svg").write_text("\n".join([*self.parts, "</svg>", ""]))


ARROWS = [INK, FAINT, *(line for _, line in (BLUE, ORANGE, GREEN, PURPLE))]


def broadcast() -> Figure:
    p = Figure(860, 366, "A 1x1 convolution after the nearest resize, as published, and before it")
    cells = (BLUE, ORANGE, GREEN, PURPLE, GREY, WHITE)

    def grid(x: float, y: float, size: float, times: int, letters: str) -> None:
        for row in range(2 * times):
            for column in range(3 * times):
                cell = row // times * 3 + column // times
                p.box(x + column * size, y + row * size, size, size, cells[cell], letters[cell], size=12 if times > 1 else 15)

    p.text(24, 34, "As published: resize, then convolve 6 x 4 pixels", bold=True)
    grid(30, 66, 36, 1, "abcdef")
    grid(270, 54, 24, 2, "abcdef")
    grid(560, 54, 24, 2, "ABCDEF")
    p.text(84, 60, "zq", anchor="middle", size=13)
    p.arrow((150, 102), (256, 102))
    p.note(203, 92, "nearest", anchor="middle")
    p.arrow((426, 102), (546, 102))
    p.note(486, 92, "1x1 conv", anchor="middle")
    p.note(486, 122, "24 times", anchor="middle")
    p.note(715, 98, "A is made from a", "alone: one product,", "made four times")

    p.line(24, 176, 836, 176, dashed=True)
    p.text(24, 206, "Here: convolve 3 x 2 cells, and let every pixel look its cell up", bold=True)
    grid(30, 240, 36, 1, "abcdef")
    p.text(84, 234, "zq", anchor="middle", size=13)
    p.arrow((150, 276), (256, 276))
    p.note(203, 266, "1x1 conv", anchor="middle")
    p.note(203, 296, "6 times", anchor="middle")
    grid(270, 240, 36, 1, "ABCDEF")
    p.text(324, 234, "zq_y (and zq_b)", anchor="middle", size=13)
    p.arrow((390, 276), (546, 276))
    p.note(468, 266, "read in the kernel", anchor="middle")
    p.note(468, 296, "nothing is written", anchor="middle")
    for row in range(4):
        for column in range(6):
            p.box(560 + column * 24, 228 + row * 24, 24, 24, (cells[row // 2 * 3 + column // 2][0], "#8c959f"), "f", size=12)
    p.note(715, 272, "each pixel of f meets", "the value of its cell")
    p.note(
        430,
        346,
        "A resize copies values and a 1x1 convolution treats every position alike, so the two can change places.",
        anchor="middle",
    )
    return p


def passes() -> Figure:
    p = Figure(860, 452, "The two passes of SpatialNorm's forward, with the bytes they move")
    p.text(24, 32, "SpatialNorm forward: f is 512 x 64 x 64 in bfloat16, zq is 4 x 32 x 32", bold=True)
    p.box(24, 112, 130, 126, BLUE, "f", "512 x 64 x 64", "4 MiB")
    p.box(296, 64, 180, 60, ORANGE, "statistics", "256 blocks")
    p.arrow((154, 132), (225, 132), (225, 94), (294, 94), colour=BLUE[1])
    p.note(162, 82, "read 1: 4 MiB")
    for i in range(8):
        p.box(566 + i * 30, 72, 26, 44, GREY)
    p.arrow((476, 94), (562, 94))
    p.note(566, 64, "per group and chunk: mean, m2, count")
    p.box(566, 148, 236, 44, ORANGE, "merge_statistics: mean, rstd", size=14)
    p.arrow((684, 116), (684, 146))
    p.note(692, 137, "always in the same order")

    p.box(296, 220, 180, 84, ORANGE, "modulate", "1024 blocks", "(f - mean) rstd w + c", size=14)
    p.arrow((154, 218), (225, 218), (225, 262), (294, 262), colour=BLUE[1])
    p.note(162, 282, "read 2: 4 MiB")
    p.arrow((566, 170), (386, 170), (386, 218))
    p.box(696, 220, 130, 84, GREEN, "out", "512 x 64 x 64", "4 MiB")
    p.arrow((476, 262), (694, 262), colour=GREEN[1])
    p.note(585, 252, "then Y, B, SiLU; write: 4 MiB", anchor="middle")

    p.box(24, 366, 130, 60, PURPLE, "zq", "4 x 32 x 32")
    p.box(212, 366, 130, 60, GREY, "conv_y, conv_b", "1x1, PyTorch's")
    p.box(400, 366, 150, 60, PURPLE, "zq_y, zq_b", "512 x 32 x 32,", "1 MiB each", size=13)
    p.arrow((154, 396), (210, 396), colour=PURPLE[1])
    p.arrow((342, 396), (398, 396), colour=PURPLE[1])
    p.arrow((440, 366), (440, 306), colour=PURPLE[1])
    p.note(450, 334, "read on the small grid: 2 x 2 pixels share a value")
    p.note(570, 392, "The resized maps of the published", "order, 4 MiB each, are never made.")
    return p


def layouts() -> Figure:
    p = Figure(860, 386, "Which elements a thread owns in NCHW and in channels_last")
    threads = (BLUE, ORANGE, GREEN, PURPLE)
    p.text(24, 32, "NCHW: adjacent elements are pixels of one channel", bold=True)
    for row in range(3):
        p.note(24, 70 + row * 34, f"channel {row}")
        for access in range(4):
            for i in range(8):
                colour = threads[access] if row == 1 else GREY
                p.box(100 + (access * 8 + i) * 16, 54 + row * 34, 16, 22, colour)
    for access in range(4):
        p.text(164 + access * 128, 180, f"thread {access}", size=13, anchor="middle", colour=threads[access][1])
    p.note(
        626,
        60,
        "An access: 8 pixels, 16 bytes.",
        "A thread keeps to one channel:",
        "one mean, rstd, weight, bias.",
        "Its warp reads 512 adjacent bytes.",
    )

    p.line(24, 200, 836, 200, dashed=True)
    p.text(24, 230, "channels_last (NHWC): adjacent elements are channels of one pixel", bold=True)
    for row in range(3):
        p.note(24, 268 + row * 34, f"pixel {row}")
        for access in range(4):
            for i in range(8):
                p.box(100 + (access * 8 + i) * 16, 252 + row * 34, 16, 22, threads[access] if row == 0 else GREY)
    for access in range(4):
        p.text(164 + access * 128, 374, f"thread {access}", size=13, anchor="middle", colour=threads[access][1])
    p.note(
        626,
        258,
        "An access: 8 channels, 16 bytes.",
        "A thread keeps to 8 channels and",
        "steps down the pixels. 8 threads",
        "read 128 bytes of one pixel, so a",
        "warp reads four such pieces.",
    )
    return p


def tile() -> Figure:
    p = Figure(860, 606, "One tile of attention: operands, warps and where everything is kept")
    p.text(24, 32, "A tile: 64 queries meet 128 keys (head 512, 16-bit types, 8 warps)", bold=True)
    # scores
    p.text(24, 66, "1. scores = q k^T: each warp makes 32 x 32", size=13, bold=True)
    p.box(24, 150, 190, 64, BLUE, "q: 64 x 512", "shared memory, stays", size=13)
    p.box(250, 78, 128, 60, GREEN, "k: 128 x 512", "128 bytes of", "each at a time", size=12)
    for row in range(2):
        for column in range(4):
            p.box(250 + column * 32, 150 + row * 32, 32, 32, ORANGE, str(row * 4 + column), size=13)
    p.note(400, 92, "8 chunks of 128 keys x 64 elements: 18 KiB,", "through the ring of stages in shared memory")
    p.note(400, 174, "scores: 64 x 128, float32, in registers", "(32 of every thread), numbered by warp")

    p.arrow((314, 216), (314, 256))
    p.text(24, 250, "2. online softmax", size=13, bold=True)
    p.note(326, 240, "weights = exp2(score - maximum so far), rounded to 16 bits")
    p.box(250, 258, 128, 64, PURPLE, "weights", "64 x 128", "shared", size=13)
    p.note(400, 284, "17 KiB: every warp needs all of them, since the warps", "cut the next product another way")

    p.text(24, 362, "3. sums += weights v: each warp makes all 64 rows of 64 columns", size=13, bold=True)
    p.box(24, 470, 128, 64, PURPLE, "weights", "64 x 128", size=13)
    p.box(190, 380, 512, 64, GREEN, "v: 128 x 512", "16 whole tokens at a time, the same ring of stages", size=13)
    for warp in range(8):
        p.box(190 + warp * 64, 470, 64, 64, ORANGE, f"warp {warp}", "64 x 64", size=12)
    p.note(714, 490, "sums: 64 x 512,", "float32: 128", "registers a thread")
    p.arrow((154, 502), (186, 502))
    p.note(24, 560, "No value of v is read from shared memory twice: a column of v belongs to one warp.")
    p.note(
        24,
        580,
        "A warp with 16 whole rows, as in FlashAttention-2, would need 16 x 512 / 32 = 256 registers a thread for its sums.",
    )
    return p


def budget() -> Figure:
    p = Figure(860, 452, "The memory of one block of attention")
    p.text(24, 32, "One block on a multiprocessor (head 512, 16-bit types, 227 KiB of shared memory a block)", bold=True)
    scale = 812 / (227 * 1024)
    parts = [
        ("", 1280, GREY),
        ("weights", 17408, PURPLE),
        ("rows: q, 64 x 512", 66560, BLUE),
        *((f"stage {i}", 18432, GREEN) for i in range(4)),
    ]
    p.text(24, 66, "Shared memory: 158976 bytes asked for", size=13, bold=True)
    x = 24.0
    for name, size, colour in parts:
        p.box(x, 78, size * scale, 48, colour, name, size=12)
        x += size * scale
    p.box(x, 78, 836 - x, 48, WHITE, "not used", size=12, dashed=True)
    p.note(24, 146, "1280 statistics | 17408 weights | 66560 rows | 4 stages of 18432")

    p.text(
        24,
        186,
        "Registers: up to 255 of every thread; 256 threads take the whole register file, so one block a multiprocessor",
        size=13,
        bold=True,
    )
    x = 24.0
    for name, count, colour in (
        ("sums: 128", 128, ORANGE),
        ("s: 32", 32, ORANGE),
        ("t: 32", 32, ORANGE),
        ("24", 24, GREEN),
        ("the rest", 39, WHITE),
    ):
        p.box(x, 198, count * 812 / 255, 48, colour, name, size=12)
        x += count * 812 / 255
    p.note(24, 266, "s and t are tiles of scores; t is needed for two of the gradients alone. 24 hold the operands of mma.")

    p.text(24, 306, "The ring: while one stage is read, three are under way (cp.async)", size=13, bold=True)
    for row, (label, first) in enumerate((("step 5", 1), ("step 6", 2))):
        y = 322 + row * 58
        p.note(24, y + 27, label)
        for stage in range(4):
            read, asked = stage == first, stage == (first + 3) % 4
            chunk = 5 + row + (stage - first) % 4
            colour = ORANGE if read else GREEN
            p.box(
                90 + stage * 130,
                y,
                120,
                44,
                colour,
                f"stage {stage}: chunk {chunk}",
                "is read" if read else "asked for now" if asked else "under way",
                size=12,
            )
    p.note(
        620,
        336,
        "A step: wait for the oldest",
        "copies; a barrier; ask for the",
        "chunk three ahead, into the",
        "stage of the step before;",
        "multiply.",
    )
    return p


def units() -> Figure:
    p = Figure(860, 372, "How blocks share the line of units of attention")
    p.text(24, 32, "3 row tiles x 7 column tiles = 21 units in one line; 4 blocks take 6, 5, 5 and 5", bold=True)
    colours = (BLUE, ORANGE, GREEN, PURPLE)
    shares = [6, 5, 5, 5]
    owner = [block for block, share in enumerate(shares) for _ in range(share)]
    for row in range(3):
        p.text(24, 76 + row * 46, f"row tile {row}", size=13)
        for column in range(7):
            unit = row * 7 + column
            p.box(110 + column * 58, 54 + row * 46, 54, 36, colours[owner[unit]], str(unit), size=13)
    for block in range(4):
        p.box(560, 54 + block * 34, 22, 22, colours[block])
        first = sum(shares[:block])
        p.text(592, 70 + block * 34, f"block {block}: units {first} to {first + shares[block] - 1}", size=13)
    p.line(24, 206, 836, 206, dashed=True)
    p.text(24, 234, "What each block leaves behind", size=13, bold=True)
    for row, blocks in enumerate(((0, 1), (1, 2), (2, 3))):
        y = 250 + row * 36
        p.text(24, y + 19, f"row tile {row}", size=13)
        for i, block in enumerate(blocks):
            p.box(110 + i * 190, y, 180, 28, colours[block], f"part of block {block}, and its lse", size=12)
        p.arrow((480, y + 14), (560, y + 14))
    p.box(
        562,
        250,
        264,
        100,
        GREY,
        "combine",
        "rows of out = sum of parts,",
        "each times exp(its lse - lse),",
        "in the order of the blocks",
        size=13,
    )
    return p


def phases() -> Figure:
    p = Figure(860, 640, "Which of the nine weights fold together for each of the four pixels")
    p.text(24, 32, "A 3x3 convolution of the doubled map sees only 2x2 pixels of the small one", bold=True)
    names = "abcdefghi"
    small = (BLUE, ORANGE, GREEN, PURPLE)

    p.note(24, 58, "small map (four of its pixels), weights, doubled map")
    for row in range(2):
        for column in range(2):
            p.box(24 + column * 44, 76 + row * 44, 44, 44, small[row * 2 + column], "PQRS"[row * 2 + column], size=15)
    for i, name in enumerate(names):
        p.box(176 + i % 3 * 30, 76 + i // 3 * 30, 30, 30, WHITE, name, size=14)
    for row in range(4):
        for column in range(4):
            p.box(
                340 + column * 30,
                70 + row * 30,
                30,
                30,
                small[row // 2 * 2 + column // 2],
                "PQRS"[row // 2 * 2 + column // 2],
                size=13,
            )
    for x, y in ((370, 100), (400, 100), (370, 130), (400, 130)):
        p.frame(x, y, 30, 30, INK)
    p.note(
        490,
        92,
        "The four framed pixels lie around the middle of",
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
        p.text(x, y, ("upper " if row == 0 else "lower ") + ("left pixel" if column == 0 else "right pixel"), size=13, bold=True)
        for i, name in enumerate(names):
            r, c = row + i // 3, column + i % 3
            p.box(
                x + i % 3 * 40,
                y + 14 + i // 3 * 40,
                40,
                40,
                small[r // 2 * 2 + c // 2],
                f"{name} {'PQRS'[r // 2 * 2 + c // 2]}",
                size=13,
            )
        p.arrow((x + 130, y + 74), (x + 168, y + 74))
        for i, weight in enumerate(folded):
            p.box(x + 176 + i % 2 * 92, y + 14 + i // 2 * 60, 92, 60, small[i], weight, f"on {'PQRS'[i]}", size=13)
    p.note(
        430,
        606,
        "4 pixels x 4 products = 16 multiplications a channel pair instead of 4 x 9 = 36: 2.25 times fewer.",
        anchor="middle",
    )
    p.note(430, 626, "The sums of weights are made in every call; only rounding differs.", anchor="middle")
    return p


def windows() -> Figure:
    p = Figure(860, 420, "The upsampling as windows of 2x2 pixels, and its borders")
    p.text(24, 32, "fold_windows: every 2x2 window of the small map makes the four large pixels around its middle", bold=True)
    size, x, y = 56, 60, 96
    for row in range(4):
        for column in range(5):
            inside = 0 < row < 3 and 0 < column < 4
            p.box(
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
            p.box(cx - 13, cy - 13, 26, 26, ORANGE if (row, column) == (1, 1) else GREY)
    p.note(32, 316, "small map 2 x 3 (blue), zeros around it;", "3 x 4 windows, one around each square")

    p.arrow((356, 196), (410, 196))
    size, x, y = 30, 430, 92
    for row in range(6):
        for column in range(8):
            inside = 0 < row < 5 and 0 < column < 7
            window = row // 2, column // 2
            colour = ORANGE if window == (1, 1) else GREY
            p.box(x + column * size, y + row * size, size, size, colour if inside else WHITE, dashed=not inside, size=12)
    p.frame(x + size, y + size, 6 * size, 4 * size, BLUE[1])
    p.note(430, 300, "6 x 8 pixels are made; the 4 x 6 in the blue frame", "are the doubled map, the rest is dropped")
    p.note(
        688,
        112,
        "The 3x3 convolution of",
        "the doubled map pads",
        "with zeros. Its zeros fall",
        "on the zeros around the",
        "small map, so the folded",
        "weights are right at the",
        "border as they are.",
    )
    p.line(24, 348, 836, 348, dashed=True)
    p.note(
        24,
        374,
        "fold_upsampling writes the same sixteen sums as one 4x4 kernel: F.conv_transpose2d with stride 2 and padding 1 makes",
        "the 4 x 6 pixels at once. Upsample runs that, so training and a GPU do; a decode in strips runs the windows.",
    )
    return p


def strips() -> Figure:
    p = Figure(860, 332, "One strip of a map through norm and convolution")
    p.text(24, 32, "A decode on a CPU: one strip of rows goes through all of a step before the next begins", bold=True)
    for row in range(12):
        colour = ORANGE if 4 <= row < 8 else BLUE if row in (3, 8) else GREY
        p.box(24, 56 + row * 18, 150, 18, colour)
    p.note(24, 294, "map x, in memory,", "its moments known")
    p.arrow((176, 164), (238, 164))
    p.box(242, 108, 150, 112, PURPLE, "normalised strip", "x * scale + shift, SiLU", "halo included", size=12)
    p.arrow((394, 164), (456, 164))
    p.box(460, 126, 150, 76, GREEN, "convolution", "adds to the rows of out", "(oneDNN)", size=12)
    p.arrow((612, 164), (674, 164))
    for row in range(12):
        p.box(678, 56 + row * 18, 150, 18, ORANGE if 4 <= row < 8 else GREEN if row < 4 else WHITE)
    p.note(678, 294, "out, measured as it", "is written")
    p.note(
        242,
        250,
        "A 3x3 convolution needs one row more on either",
        "side (blue), which is normalised twice. No row of",
        "out is convolved twice.",
    )
    p.note(242, 308, "The next norm has its statistics without a pass.")
    return p


FIGURES = {
    "spatial_norm_broadcast": broadcast,
    "spatial_norm_passes": passes,
    "spatial_norm_layouts": layouts,
    "attention_tile": tile,
    "attention_budget": budget,
    "attention_units": units,
    "upsample_phases": phases,
    "upsample_windows": windows,
    "strips": strips,
}


def draw(folder: Path = HERE) -> None:
    for name, figure in FIGURES.items():
        figure().save(name, folder)


if __name__ == "__main__":
    draw()
