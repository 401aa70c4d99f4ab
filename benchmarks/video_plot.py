"""Figure of video.py's results: where the time of a decode goes with diffusers and with `movq_ext.accelerate`. Needs matplotlib.

python benchmarks/video_plot.py benchmarks/results/video_cpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from plots import BORDER, KEPT, OURS, ROOF, THEIRS, WIDTH, save

COLOURS = {"norms": OURS, "upsampling": "#f2a65a", "convolutions": THEIRS, "other": KEPT}
LABELS = {
    "norms": "spatial norms and activations",
    "upsampling": "upsampling",
    "convolutions": "causal convolutions and their padding",
    "other": "other",
}
NAMES = {"diffusers": "diffusers", "movq_ext": "movq_ext"}


def draw(folder: Path) -> None:
    """Draw ``folder/parts.png`` from ``folder/video.json``: two bars for each clip."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12})
    clips: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in json.loads((folder / "video.json").read_text())["rows"]:
        if row["candidate"] in NAMES:
            clips.setdefault((row["frames"], row["size"], row["dtype"]), []).append(row)
    figure, axes = plt.subplots(len(clips), figsize=(WIDTH, 0.6 + 1.15 * len(clips)), squeeze=False, layout="constrained")
    for axis, ((frames, size, dtype), rows) in zip(axes[:, 0], clips.items(), strict=True):
        draw_clip(axis, rows)
        axis.set_title(f"{frames} frames of {size} in {dtype}", loc="left", weight="bold")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LABELS), frameon=False)
    save(figure, folder / "parts.png")


def draw_clip(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw one bar of the decode's time for each row, divided into its parts."""
    names, left = [NAMES[row["candidate"]] for row in rows], [0.0] * len(rows)
    shares = {part: [row.get(part, 0.0) for row in rows] for part in LABELS}
    shares["other"] = [1 - sum(row[part] for part in LABELS if part != "other") for row in rows]
    for part, values in shares.items():
        lengths = [1e-3 * row["ms"] * value for row, value in zip(rows, values, strict=True)]
        bars = axis.barh(names, lengths, left=left, color=COLOURS[part], height=0.7, label=LABELS[part])
        if part == "norms":
            axis.bar_label(bars, [f"{value:.0%}" for value in values], label_type="center", color="white", fontsize=9)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    for name, end, row in zip(names, left, rows, strict=True):
        text = f"{end:.1f} s" + ("" if row["candidate"] == "diffusers" else f"  ({row['ratio']:.2f}x faster)")
        axis.annotate(text, (end, name), xytext=(5, 0), textcoords="offset points", va="center", color=ROOF)
    axis.set_xlim(0, 1.25 * max(left))
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines["bottom"].set_color(BORDER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with video.json, where parts.png is written")
    draw(parser.parse_args().folder)


if __name__ == "__main__":
    main()
