"""Bar charts of what the benchmarks measured. They need matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def bars(path: Path, rows: Sequence[dict[str, Any]], case: Sequence[str], label: str, value: str, unit: str) -> str:
    """A chart for each combination of the ``case`` columns, a bar for each ``label``, as long as ``value``.

    Rows without a number are left out. Returns what there is to say about the picture.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "not drawn: matplotlib is not installed"
    charts: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if isinstance(row[value], float):
            charts.setdefault(tuple(row[key] for key in case), []).append(row)
    if not charts:
        return "not drawn: nothing was measured"
    heights = [0.8 + 0.28 * len(chart) for chart in charts.values()]
    figure, axes = plt.subplots(len(charts), figsize=(9, sum(heights)), height_ratios=heights, squeeze=False)
    for axis, (key, chart) in zip(axes[:, 0], charts.items(), strict=True):
        chart = sorted(chart, key=lambda row: -row[value])
        colours = ["tab:orange" if row[label].startswith("ours") else "tab:gray" for row in chart]
        drawn = axis.barh([row[label] for row in chart], [row[value] for row in chart], color=colours)
        axis.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
        axis.set_title(", ".join(f"{name} {text}" for name, text in zip(case, key, strict=True)), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    axes[-1, 0].set_xlabel(unit)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name
