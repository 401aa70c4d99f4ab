"""Figures and tables of decode.py's results, from its JSON. Figures need matplotlib, which is not a dependency of the package.

    python benchmarks/plots.py benchmarks/results/decode_cpu --profile benchmarks/results/profile_cpu \\
        --into README.md docs/performance.md

``comparison.png`` shows time and memory of every decoder in its fastest layout, in the first case of every dtype. ``cases.png``
compares ours with the fastest peer in all cases. ``roofline.png`` shows the rate at which each decoder completes the published
model's operations, against the device's measured limits: a 3x3 convolution, a matrix product and the bandwidth of a copy. With a
profile of ours, it also shows our layers by kind. Documents get the tables of tables.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import Rows, case_name, compared_cases, decoder_name, is_ours, measured_cases, put_tables, short

OURS, OURS_16_BIT, THEIRS, KEPT, ROOF = "#d9480f", "#f0a381", "#8b949e", "#c9d1d9", "#24292f"
BORDER = "#d0d7de"
WIDTH = 9.5  # inches: about the width of a README
PARTS = {  # labels of our layers: text, offset, alignment
    "convolution": ("its convolutions and upsampling", (5, 13), "left"),
    "attention": ("its attention", (-9, 0), "right"),
    "norm": ("its norms", (9, 0), "left"),
}


def draw(folder: Path, profile: Path | None = None) -> str:
    """Draw the figures of ``folder/decode.json``. Returns the names of the files, or the reason for drawing none."""
    try:
        import matplotlib
    except ImportError:
        return "not drawn: matplotlib is not installed"
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12})
    results = json.loads((folder / "decode.json").read_text())
    cases = first_cases(measured_cases(results["rows"]))
    if not cases:
        return "not drawn: nothing was measured"
    comparison(folder / "comparison.png", cases)
    drawn = ["comparison.png"]
    if compared_cases(results["rows"]):
        speedups(folder / "cases.png", results["rows"])
        drawn.append("cases.png")
    times = json.loads((profile / "profile.json").read_text()) if profile else None
    if roofline(folder / "roofline.png", results, cases, times):
        drawn.append("roofline.png")
    return ", ".join(drawn)


def first_cases(cases: dict[tuple[Any, ...], Any]) -> dict[tuple[Any, ...], Any]:
    """Return the first case of every device, mode and dtype."""
    kinds: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for device, model, threads, mode, dtype, size, batch in cases:
        kinds.setdefault((device, mode, dtype), (device, model, threads, mode, dtype, size, batch))
    return {case: cases[case] for case in kinds.values()}


def label(decoder: str) -> str:
    return decoder_name(decoder).replace("published code", "published").replace("`torch.compile`", "compiled")


def title(case: tuple[Any, ...]) -> str:
    device, model, threads, mode, dtype, size, batch = case
    what = {"decode": "Decoding", "train": "A training step on"}[mode]
    images = "an image" if batch == 1 else f"{batch} images"
    where = "a GPU" if device == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    small = " with the shipped model" if model == "shipped" else ""
    return f"{what} {images} of {size}x{size} in {dtype}{small} on {where}"


def comparison(path: Path, cases: dict[tuple[Any, ...], Rows]) -> None:
    """Draw bar charts of time and of memory for each case."""
    import matplotlib.pyplot as plt

    heights = [0.9 + 0.33 * len(rows) for rows in cases.values()]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (case, rows) in zip(parts, cases.items(), strict=True):
        part.suptitle(title(case), weight="bold")
        left, right = part.subplots(1, 2, width_ratios=(1, 1.15))
        bars(left, rows, "ms")
        bars(right, rows, "MB")
        left.set_title("time", loc="left")
        packed = any(number(row["kept MB"]) > 1 for row in rows)
        kept = "kept between calls" if case[0] == "cuda" else "packed weights"  # on a GPU cuBLAS's workspace too
        right.set_title(f"peak memory (light: {kept})" if packed else "peak memory", loc="left")
        right.set_yticklabels([])
    save(figure, path)


def bars(axis: Any, rows: Rows, key: str) -> None:
    """Draw a bar for each row, the first on top. Packed weights extend the bar of its memory."""
    ours = next((row for row in rows if is_ours(row)), None)
    names = [label(row["decoder"]) for row in rows]
    lengths = [row[key] for row in rows]
    drawn = axis.barh(names, lengths, color=[OURS if is_ours(row) else THEIRS for row in rows], height=0.7)
    if key == "MB":
        kept = [max(0.0, number(row["kept MB"])) for row in rows]  # negative after the first call freed something
        drawn = axis.barh(names, kept, left=lengths, color=KEPT, height=0.7)
        lengths = [length + more for length, more in zip(lengths, kept, strict=True)]
    axis.bar_label(drawn, [bar_text(row, ours, key) for row in rows], padding=4)
    axis.set_xlim(0, 1.6 * max(*lengths, 0.001))  # leaves room for the numbers
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines["bottom"].set_visible(False)


def bar_text(row: dict[str, Any], ours: dict[str, Any] | None, key: str) -> str:
    """Return the label of a bar: its value, and the ratio to ours."""
    text = f"{short(row[key])} {key}"
    if ours is not None and row is not ours and ours[key] > 0:
        text += f"  ({row[key] / ours[key]:.2f}x)"
    return f"{text} + {row['kept MB']:.0f}" if key == "MB" and number(row["kept MB"]) > 1 else text


def speedups(path: Path, rows: Rows) -> None:
    """Draw a bar for each case: how many times as long as ours the fastest peer takes."""
    import matplotlib.pyplot as plt

    found = compared_cases(rows)
    ratios = [peer["ms"] / ours["ms"] for ours, peer in found.values()]
    figure, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.33 * len(found)), layout="constrained")
    colors = [OURS if case[4] == "float32" else OURS_16_BIT for case in found]
    axis.barh([case_name(case) for case in found], ratios, color=colors, height=0.7)
    texts = [f"{ratio:.2f}x  {label(peer['decoder'])}" for ratio, (_, peer) in zip(ratios, found.values(), strict=True)]
    for bar, (ratio, text) in enumerate(zip(ratios, texts, strict=True)):  # to the right of the line at 1
        axis.annotate(text, (max(ratio, 1), bar), xytext=(4, 0), textcoords="offset points", va="center")
    axis.axvline(1, color=ROOF, linewidth=1)
    axis.set_xlim(0, 1.7 * max(*ratios, 1))  # leaves room for the labels
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines["bottom"].set_visible(False)
    axis.set_title("Speed relative to the fastest other decoder", loc="left", weight="bold")
    save(figure, path)


def number(value: Any) -> float:
    return value if isinstance(value, float) else 0.0


def roofline(path: Path, results: dict[str, Any], cases: dict[tuple[Any, ...], Rows], profile: dict[str, Any] | None) -> bool:
    """Draw operations per second over operations per byte, for each decoding case whose work was counted."""
    import matplotlib.pyplot as plt

    wanted = {case: rows for case, rows in cases.items() if case[3] == "decode" and f"{case[1]} {case[5]}" in results["work"]}
    if not wanted:
        return False
    figure, axes = plt.subplots(len(wanted), figsize=(WIDTH, 5.2 * len(wanted)), squeeze=False, layout="constrained")
    for axis, (case, rows) in zip(axes[:, 0], wanted.items(), strict=True):
        device, model, threads, _, dtype, size, batch = case
        work, item = results["work"][f"{model} {size}"], {"float32": 4}.get(dtype, 2)
        where = device if device == "cuda" else f"{device}, {threads} threads"
        rates = {what: 1e3 * results[f"{where}: {dtype} {what}, TFLOP/s"] for what in ("convolution", "matmul")}
        bandwidth = results[f"{where}: copy bandwidth, GB/s"]
        operations = sum(work[kind]["operations"] for kind in ("convolution", "attention"))
        intensity = operations / sum(part["elements"] for part in work.values()) / item
        points = [(row, 1e-6 * batch * operations / row["ms"]) for row in rows]
        is_profiled = profile and (device, model, dtype, size, batch) == ("cpu", "kandinsky", "float32", 256, 1)
        parts = profiled(work, item, profile) if profile and is_profiled else {}
        draw_roofline(axis, rates, bandwidth)
        lowest = min(y for _, y in [*points, *parts.values()])
        axis.set_ylim(min(0.04 * max(rates.values()), 0.7 * lowest), 1.6 * max(rates.values()))
        for kind, (x, y) in parts.items():
            axis.plot(x, y, "D", color=OURS, markerfacecolor="white", markersize=8, markeredgewidth=1.8, zorder=3)
            text, place, side = PARTS[kind]
            axis.annotate(f"{text}  {y:.0f}", (x, y), xytext=place, textcoords="offset points", va="center", ha=side, color=OURS)
        for row, y in points:
            ours = is_ours(row)
            axis.plot(intensity, y, "o", color=OURS if ours else THEIRS, markersize=11 if ours else 7, zorder=3)
        at = spread_labels([y for _, y in points], 1.15)
        for (row, y), height in zip(points, at, strict=True):
            ours = is_ours(row)
            text, beside = f"{label(row['decoder'])}  {y:.0f}", (2.4 * intensity, height)
            style = {"color": OURS, "weight": "bold"} if ours else {"color": ROOF}
            line = {"arrowstyle": "-", "color": THEIRS, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
            card = {"color": "white", "pad": 1}
            axis.annotate(text, (intensity, y), xytext=beside, va="center", arrowprops=line, bbox=card, **style)
        axis.set_title(title(case), weight="bold")
    save(figure, path)
    return True


def draw_roofline(axis: Any, rates: dict[str, float], bandwidth: float) -> None:
    """Draw the measured limits of the device, in GFLOP/s and GB/s."""
    from matplotlib.ticker import LogLocator, NullLocator

    peak, least, most = max(rates.values()), 0.4, 3e4
    ridge = peak / bandwidth
    axis.plot([least, ridge, most], [least * bandwidth, peak, peak], color=ROOF, linewidth=2)
    low = min(rates, key=lambda what: rates[what])
    axis.plot([rates[low] / bandwidth, most], [rates[low]] * 2, color=ROOF, linewidth=1, linestyle="--")
    names = {"convolution": "a 3x3 convolution", "matmul": "a matrix product"}
    for what, rate in rates.items():
        place = (4, -10 if what == low else 10)
        axis.annotate(f"{names[what]}  {rate:.0f}", (ridge, rate), xytext=place, textcoords="offset points", va="center")
    axis.annotate(f"a copy  {bandwidth:.0f} GB/s", (0.8, 0.8 * bandwidth), xytext=(9, -8), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlim=(least, most))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("operations per byte, if each layer reads and writes its maps and weights once")
    axis.set_ylabel("GFLOP/s, counting the published operations")
    axis.grid(which="major", color=BORDER, linewidth=0.6)


def spread_labels(heights: Sequence[float], ratio: float) -> list[float]:
    """Return heights of labels for points at falling heights, each label at least a ratio below the previous one."""
    places: list[float] = []
    for height in heights:
        places.append(min(height, places[-1] / ratio) if places else height)
    return places


def profiled(work: dict[str, dict[str, int]], item: int, profile: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return operations per byte and GFLOP/s for each kind of layer in a profiled decode of ours."""
    ms = next(row for row in profile["rows"] if row["stage"] == "all")
    times = {"convolution": ms["convolution"] + ms["upsampling"], "attention": ms["attention"], "norm": ms["norm"]}
    return {
        kind: (part["operations"] / part["elements"] / item, 1e-6 * part["operations"] / times[kind])
        for kind, part in work.items()
        if times[kind] > 0
    }


def save(figure: Any, path: Path) -> None:
    """Save on a white card with a border, which is legible on a dark page too."""
    import matplotlib.pyplot as plt

    figure.set_edgecolor(BORDER)
    figure.set_linewidth(2)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    figure.savefig(path, dpi=200, facecolor="white", edgecolor=BORDER)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with decode.json, where the figures are written")
    parser.add_argument("--profile", type=Path, help="folder with a profile.json of a 256x256 decode in float32 on a CPU")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="documents that get tables")
    options = parser.parse_args()
    print(draw(options.folder, options.profile))
    for document in options.into:
        written = put_tables(document, json.loads((options.folder / "decode.json").read_text())["rows"])
        print(f"{document}: {', '.join(written) or 'no marks for tables'}")


if __name__ == "__main__":
    main()
