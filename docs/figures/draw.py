"""Draw the figures of how_the_kernels_work.md as SVG files: `python docs/figures/draw.py`. Needs only Python.

Each figure has its own background, so that it is readable on light and dark pages.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # also where PYTHONSAFEPATH keeps Python from doing so

from drawing import attention, decode, hopper, spatial_norm, upsampling  # noqa: E402

FIGURES = {
    "spatial_norm_broadcast": spatial_norm.broadcast,
    "spatial_norm_passes": spatial_norm.passes,
    "spatial_norm_layouts": spatial_norm.layouts,
    "attention_tile": attention.tile,
    "attention_budget": attention.budget,
    "attention_units": attention.units,
    "hopper_seesaw": hopper.seesaw,
    "upsample_phases": upsampling.phases,
    "upsample_windows": upsampling.windows,
    "upsample_products": upsampling.products,
    "strips": decode.strips,
    "winograd": decode.winograd,
}


def draw(folder: Path = HERE) -> None:
    """Write all figures to the folder."""
    for name, figure in FIGURES.items():
        figure().save(name, folder)


if __name__ == "__main__":
    draw()
