"""The figures of attention."""

from __future__ import annotations

from .svg import BLUE, GREEN, GREY, ORANGE, PURPLE, WHITE, Figure


def tile() -> Figure:
    figure = Figure(860, 606, "One tile of attention: operands, warps and storage")
    figure.text(24, 32, "A tile: 64 queries meet 128 keys (head 512, 16-bit types, 8 warps)", bold=True)
    # scores
    figure.text(24, 66, "1. scores = q k^T: each warp computes 32 x 32", size=13, bold=True)
    figure.box(24, 150, 190, 64, BLUE, "q: 64 x 512", "shared memory, resident", size=13)
    figure.box(250, 78, 128, 60, GREEN, "k: 128 x 512", "128 bytes of", "each at a time", size=12)
    for row in range(2):
        for column in range(4):
            figure.box(250 + column * 32, 150 + row * 32, 32, 32, ORANGE, str(row * 4 + column), size=13)
    figure.note(400, 92, "8 chunks of 128 keys x 64 elements: 18 KiB,", "through the ring of stages in shared memory")
    figure.note(400, 174, "scores: 64 x 128, float32, in registers", "(32 of every thread), numbered by warp")

    figure.arrow((314, 216), (314, 256))
    figure.text(24, 250, "2. online softmax", size=13, bold=True)
    figure.note(326, 240, "weights = exp2(score - maximum so far), rounded to 16 bits")
    figure.box(250, 258, 128, 64, PURPLE, "weights", "64 x 128", "shared", size=13)
    figure.note(400, 284, "17 KiB: every warp needs all of them, because the warps", "divide the next product differently")

    figure.text(24, 362, "3. sums += weights v: each warp computes all 64 rows of 64 columns", size=13, bold=True)
    figure.box(24, 470, 128, 64, PURPLE, "weights", "64 x 128", size=13)
    figure.box(190, 380, 512, 64, GREEN, "v: 128 x 512", "16 whole tokens at a time, the same ring of stages", size=13)
    for warp in range(8):
        figure.box(190 + warp * 64, 470, 64, 64, ORANGE, f"warp {warp}", "64 x 64", size=12)
    figure.note(714, 490, "sums: 64 x 512,", "float32: 128", "registers per thread")
    figure.arrow((154, 502), (186, 502))
    figure.note(24, 560, "No value of v is read from shared memory twice: a column of v belongs to one warp.")
    figure.note(
        24,
        580,
        "A warp with 16 whole rows, as in FlashAttention-2, would need 16 x 512 / 32 = 256 registers per thread for its sums.",
    )
    return figure


def budget() -> Figure:
    figure = Figure(860, 452, "The memory of one block of attention")
    figure.text(
        24,
        32,
        "One block on a multiprocessor (head 512, 16-bit types, the 163 KiB of shared memory of an A100)",
        bold=True,
    )
    scale = 812 / (163 * 1024)
    parts = [
        ("", 1024, GREY),
        ("weights", 17408, PURPLE),
        ("rows: q, 64 x 512", 66560, BLUE),
        *((f"stage {i}", 18432, GREEN) for i in range(4)),
    ]
    figure.text(24, 66, "Shared memory: 158720 bytes requested", size=13, bold=True)
    x = 24.0
    for name, size, colour in parts:
        figure.box(x, 78, size * scale, 48, colour, name, size=12)
        x += size * scale
    figure.box(x, 78, 836 - x, 48, WHITE, "not used", size=12, dashed=True)
    figure.note(24, 146, "1024 statistics | 17408 weights | 66560 rows | 4 stages of 18432")

    figure.text(
        24,
        186,
        "Registers: up to 255 of every thread; 256 threads take the whole register file, so one block per multiprocessor",
        size=13,
        bold=True,
    )
    x = 24.0
    for name, count, colour in (
        ("sums: 128", 128, ORANGE),
        ("s: 32", 32, ORANGE),
        ("t: 32", 32, ORANGE),
        ("32", 32, GREEN),
        ("the rest", 31, WHITE),
    ):
        figure.box(x, 198, count * 812 / 255, 48, colour, name, size=12)
        x += count * 812 / 255
    figure.note(24, 266, "s and t are tiles of scores; only two of the gradients need t. 32 registers hold the operands of mma.")

    figure.text(24, 306, "The ring: while one stage is read, three are in flight (cp.async)", size=13, bold=True)
    for row, (label, first) in enumerate((("step 5", 1), ("step 6", 2))):
        y = 322 + row * 58
        figure.note(24, y + 27, label)
        for stage in range(4):
            read, asked = stage == first, stage == (first + 3) % 4
            chunk = 5 + row + (stage - first) % 4
            colour = ORANGE if read else GREEN
            figure.box(
                90 + stage * 130,
                y,
                120,
                44,
                colour,
                f"stage {stage}: chunk {chunk}",
                "is read" if read else "requested now" if asked else "in flight",
                size=12,
            )
    figure.note(
        620,
        336,
        "A step: wait for the oldest",
        "copies; barrier; first products;",
        "request the chunk three ahead,",
        "into the stage of the last",
        "step; the other products.",
    )
    return figure


def units() -> Figure:
    figure = Figure(860, 372, "How blocks share the line of units of attention")
    figure.text(24, 32, "3 row tiles x 7 column tiles = 21 units in one line; 4 blocks take 6, 6, 6 and 3", bold=True)
    colours = (BLUE, ORANGE, GREEN, PURPLE)
    shares = [6, 6, 6, 3]
    owner = [block for block, share in enumerate(shares) for _ in range(share)]
    for row in range(3):
        figure.text(24, 76 + row * 46, f"row tile {row}", size=13)
        for column in range(7):
            unit = row * 7 + column
            figure.box(110 + column * 58, 54 + row * 46, 54, 36, colours[owner[unit]], str(unit), size=13)
    for block in range(4):
        figure.box(560, 54 + block * 34, 22, 22, colours[block])
        first = sum(shares[:block])
        figure.text(592, 70 + block * 34, f"block {block}: units {first} to {first + shares[block] - 1}", size=13)
    figure.line(24, 206, 836, 206, dashed=True)
    figure.text(24, 234, "What each block leaves", size=13, bold=True)
    for row, blocks in enumerate(((0, 1), (1, 2), (2, 3))):
        y = 250 + row * 36
        figure.text(24, y + 19, f"row tile {row}", size=13)
        for i, block in enumerate(blocks):
            figure.box(110 + i * 190, y, 180, 28, colours[block], f"part of block {block}, and its lse", size=12)
        figure.arrow((480, y + 14), (560, y + 14))
    figure.box(
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
    return figure
