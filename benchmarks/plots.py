"""Figures of decode.py's results, drawn from its JSON. They need matplotlib, which nothing else here does.

    python benchmarks/plots.py benchmarks/results/decode_cpu --profile benchmarks/results/profile_cpu

``comparison.png`` has time and memory of every decoder in its fastest layout. ``roofline.png`` has what each does of the
published model's operations in a second against what the device can: its rate in a 3x3 convolution and a matrix product, and its
bandwidth in a copy. With a profile of ours, the kinds of its layers are in it too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
CASE = ("device", "mode", "dtype", "size", "batch")
OURS, THEIRS, KEPT, ROOF = "#d9480f", "#8b949e", "#c9d1d9", "#24292f"
BORDER = "#d0d7de"
WIDTH = 9.5  # inches, of about as many pixels as a README is wide
HOW = {"": "eager", "compiled": "compiled", "frozen": "compiled, frozen"}
PARTS = {  # of ours: a text, and where it is
    "convolution": ("its convolutions and upsampling", (5, 13), "left"),
    "attention": ("its attention", (-9, 0), "right"),
    "norm": ("its norms", (9, 0), "left"),
}


def draw(folder: Path, profile: Path | None = None) -> str:
    """Both figures of ``folder/decode.json``. Returns what there is to say about them."""
    try:
        import matplotlib
    except ImportError:
        return "not drawn: matplotlib is not installed"
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12})
    results = json.loads((folder / "decode.json").read_text())
    cases = by_case(results["rows"])
    if not cases:
        return "not drawn: nothing was measured"
    comparison(folder / "comparison.png", cases)
    times = json.loads((profile / "profile.json").read_text()) if profile else None
    drawn = roofline(folder / "roofline.png", results, cases, times)
    return "comparison.png, roofline.png" if drawn else "comparison.png"


def by_case(rows: Rows) -> dict[tuple[Any, ...], Rows]:
    """The rows that were measured, for each case those that `fastest` chooses."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if isinstance(row["ms"], float):
            cases.setdefault(tuple(row[key] for key in CASE), []).append(row)
    return {case: fastest(found) for case, found in cases.items()}


def fastest(rows: Rows) -> Rows:
    """Ours as it is made, and every other decoder in its fastest layout for each way of running it; the fastest first."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kind, how = words(row["decoder"])
        if kind == "ours" and row["decoder"] != "ours":
            continue
        if (kind, how) not in best or row["ms"] < best[kind, how]["ms"]:
            best[kind, how] = row
    return sorted(best.values(), key=lambda row: float(row["ms"]))


def words(decoder: str) -> tuple[str, str]:
    """As in peers.py: whose it is, and how it runs, but for the layout."""
    kind, *how = decoder.split()
    return kind, " ".join(word for word in how if word != "nhwc")


def label(decoder: str) -> str:
    kind, how = words(decoder)
    return "movq_ext" if kind == "ours" else f"{kind}, {HOW.get(how, how)}"


def title(case: tuple[Any, ...]) -> str:
    device, mode, dtype, size, batch = case
    what = {"decode": "Decoding", "train": "A training step on"}[mode]
    images = "an image" if batch == 1 else f"{batch} images"
    return f"{what} {images} of {size}x{size} in {dtype} on a {'GPU' if device == 'cuda' else 'CPU'}"


def comparison(path: Path, cases: dict[tuple[Any, ...], Rows]) -> None:
    """A pair of bar charts for each case, of time and of memory."""
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
        right.set_title("peak memory (light: packed weights)" if packed else "peak memory", loc="left")
        right.set_yticklabels([])
    save(figure, path)


def bars(axis: Any, rows: Rows, key: str) -> None:
    """A bar for each row, the first on top. Behind its memory what the first call left in derived or packed weights."""
    ours = next((row for row in rows if row["decoder"] == "ours"), None)
    names = [label(row["decoder"]) for row in rows]
    lengths = [row[key] for row in rows]
    drawn = axis.barh(names, lengths, color=[OURS if row is ours else THEIRS for row in rows], height=0.7)
    if key == "MB":
        kept = [number(row["kept MB"]) for row in rows]
        drawn = axis.barh(names, kept, left=lengths, color=KEPT, height=0.7)
        lengths = [length + more for length, more in zip(lengths, kept, strict=True)]
    axis.bar_label(drawn, [said(row, ours, key) for row in rows], padding=4)
    axis.set_xlim(0, 1.6 * max(*lengths, 0.001))  # the numbers are behind the bars
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines["bottom"].set_visible(False)


def said(row: dict[str, Any], ours: dict[str, Any] | None, key: str) -> str:
    """A bar's number, and how many times ours it is."""
    text = f"{row[key]:.0f} {key}"
    if ours is not None and row is not ours and ours[key] > 0:
        text += f"  ({row[key] / ours[key]:.2f}x)"
    return f"{text} + {row['kept MB']:.0f}" if key == "MB" and number(row["kept MB"]) > 1 else text


def number(value: Any) -> float:
    return value if isinstance(value, float) else 0.0


def roofline(path: Path, results: dict[str, Any], cases: dict[tuple[Any, ...], Rows], profile: dict[str, Any] | None) -> bool:
    """Operations a second against operations a byte, for each case of decoding that the results have the counts for."""
    import matplotlib.pyplot as plt

    wanted = {case: rows for case, rows in cases.items() if case[1] == "decode" and str(case[3]) in results.get("work", {})}
    if not wanted:
        return False
    figure, axes = plt.subplots(len(wanted), figsize=(WIDTH, 5.2 * len(wanted)), squeeze=False, layout="constrained")
    for axis, (case, rows) in zip(axes[:, 0], wanted.items(), strict=True):
        device, _, dtype, size, batch = case
        work, item = results["work"][str(size)], {"float32": 4}.get(dtype, 2)
        rates = {what: 1e3 * results[f"{device}: {dtype} {what}, TFLOP/s"] for what in ("convolution", "matmul")}
        bandwidth = results[f"{device}: copy bandwidth, GB/s"]
        operations = sum(work[kind]["operations"] for kind in ("convolution", "attention"))
        intensity = operations / sum(part["elements"] for part in work.values()) / item
        points = [(row, 1e-6 * batch * operations / row["ms"]) for row in rows]
        parts = profiled(work, item, profile) if profile and (size, batch) == (256, 1) else {}
        roof(axis, rates, bandwidth)
        lowest = min(y for _, y in [*points, *parts.values()])
        axis.set_ylim(min(0.04 * max(rates.values()), 0.7 * lowest), 1.6 * max(rates.values()))
        for kind, (x, y) in parts.items():
            axis.plot(x, y, "D", color=OURS, markerfacecolor="white", markersize=8, markeredgewidth=1.8, zorder=3)
            text, place, side = PARTS[kind]
            axis.annotate(f"{text}  {y:.0f}", (x, y), xytext=place, textcoords="offset points", va="center", ha=side, color=OURS)
        for row, y in points:
            ours = row["decoder"] == "ours"
            axis.plot(intensity, y, "o", color=OURS if ours else THEIRS, markersize=11 if ours else 7, zorder=3)
        at = apart([y for _, y in points], 1.15)
        for (row, y), height in zip(points, at, strict=True):
            ours = row["decoder"] == "ours"
            text, beside = f"{label(row['decoder'])}  {y:.0f}", (2.4 * intensity, height)
            style = {"color": OURS, "weight": "bold"} if ours else {"color": ROOF}
            line = {"arrowstyle": "-", "color": THEIRS, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
            card = {"color": "white", "pad": 1}
            axis.annotate(text, (intensity, y), xytext=beside, va="center", arrowprops=line, bbox=card, **style)
        axis.set_title(title(case), weight="bold")
    save(figure, path)
    return True


def roof(axis: Any, rates: dict[str, float], bandwidth: float) -> None:
    """What the device was measured to do: GFLOP/s and GB/s."""
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
    axis.set_xlabel("operations a byte, if each layer reads and writes its maps and weights once")
    axis.set_ylabel("GFLOP/s, operations as published")
    axis.grid(which="major", color=BORDER, linewidth=0.6)


def apart(heights: Sequence[float], ratio: float) -> list[float]:
    """Places for labels of points at these heights, which fall: as high or lower, each a ratio below the last."""
    places: list[float] = []
    for height in heights:
        places.append(min(height, places[-1] / ratio) if places else height)
    return places


def profiled(work: dict[str, dict[str, int]], item: int, profile: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By kind of layer of a profiled decode of ours: operations a byte, and GFLOP/s."""
    ms = next(row for row in profile["rows"] if row["stage"] == "all")
    times = {"convolution": ms["convolution"] + ms["upsampling"], "attention": ms["attention"], "norm": ms["norm"]}
    return {
        kind: (part["operations"] / part["elements"] / item, 1e-6 * part["operations"] / times[kind])
        for kind, part in work.items()
        if times[kind] > 0
    }


def save(figure: Any, path: Path) -> None:
    """On a white card with a border, to be read in a dark page too."""
    import matplotlib.pyplot as plt

    figure.set_edgecolor(BORDER)
    figure.set_linewidth(2)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    figure.savefig(path, dpi=200, facecolor="white", edgecolor=BORDER)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds decode.json, and gets the figures")
    parser.add_argument("--profile", type=Path, help="holds a profile.json of the same decode and device")
    options = parser.parse_args()
    print(draw(options.folder, options.profile))


if __name__ == "__main__":
    main()
