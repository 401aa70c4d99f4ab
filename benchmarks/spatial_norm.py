"""SpatialNorm + SiLU: our layer and our operator alone, against the published formula in eager mode, torch.compile of it and of
its reformulation (conv_y and conv_b at the latent's resolution), and diffusers' layer.

    python benchmarks/spatial_norm.py --out benchmarks/results/spatial_norm

The operator alone ("op") gets conv_y(zq) and conv_b(zq) as inputs, and its gradients stop there: the difference to "ours" is what
the layer spends on them. Before it is timed, every result is checked against the published formula. GB/s count two reads of f and
one write for the forward pass, and two reads of f and of dout and one write of the gradient in addition for the backward pass.
That is the minimum for maps that do not fit on chip.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import arguments, copy_bandwidth, environment, milliseconds, write
from torch import Tensor

import movq_ext

SIZES = [(512, 32), (512, 64), (512, 128), (256, 256), (128, 512), (128, 1024)]  # channels, height = width
QUICK = [(64, 16), (32, 32)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYERS = ("ours", "op", "eager", "diffusers", "compile", "compile reformulated")  # compilation takes longest, so it comes last
Layer = Callable[[Tensor, Tensor], Tensor]


def published(norm: movq_ext.SpatialNorm, f: Tensor, zq: Tensor) -> Tensor:
    zq = F.interpolate(zq, size=f.shape[2:], mode="nearest")
    return F.silu(group_norm(norm, f) * norm.conv_y(zq) + norm.conv_b(zq))


def reformulated(norm: movq_ext.SpatialNorm, f: Tensor, zq: Tensor) -> Tensor:
    """Compute the same with the 1x1 convolutions before the resize: what a user of torch.compile could write."""
    y, b = (F.interpolate(conv(zq), size=f.shape[2:], mode="nearest") for conv in (norm.conv_y, norm.conv_b))
    return F.silu(group_norm(norm, f) * y + b)


def group_norm(norm: movq_ext.SpatialNorm, f: Tensor) -> Tensor:
    layer = norm.norm_layer
    return F.group_norm(f, layer.num_groups, layer.weight, layer.bias, layer.eps)


class OperatorAlone:
    """Our operator without the layer's convolutions: their results are inputs, computed for the first zq."""

    def __init__(self, norm: movq_ext.SpatialNorm) -> None:
        self.norm = norm
        self.modulation: tuple[Tensor, Tensor] | None = None

    def __call__(self, f: Tensor, zq: Tensor) -> Tensor:
        if self.modulation is None:
            layout = torch.channels_last if f.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            maps = (conv(zq).detach().contiguous(memory_format=layout) for conv in (self.norm.conv_y, self.norm.conv_b))
            y, b = (x.requires_grad_() for x in maps)
            self.modulation = y, b
        layer = self.norm.norm_layer
        return movq_ext.spatial_norm(
            f, *self.modulation, layer.weight, layer.bias, layer.num_groups, layer.eps, activation="silu"
        )

    def inputs(self, f: Tensor) -> tuple[Tensor, ...]:
        assert self.modulation is not None, "call the operator before its inputs are asked for"
        return f, *self.modulation


def peers(norm: movq_ext.SpatialNorm, channels: int, compiled: bool) -> dict[str, Layer | None]:
    """Return layers with the same weights; None for one that is not installed."""
    eager, before_resize = functools.partial(published, norm), functools.partial(reformulated, norm)
    found: dict[str, Layer | None] = {
        "ours": lambda f, zq: norm(f, zq, "silu"),
        "op": OperatorAlone(norm),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False) if compiled else None,
        "compile reformulated": torch.compile(before_resize, dynamic=False) if compiled else before_resize,
    }
    try:
        from diffusers.models.attention_processor import SpatialNorm

        theirs = SpatialNorm(channels, norm.conv_y.in_channels).to(norm.conv_y.weight)
        theirs.load_state_dict(norm.state_dict())
        found["diffusers"] = lambda f, zq: F.silu(theirs(f, zq))
    except ImportError:
        found["diffusers"] = None
    return found


def measure(layer: Layer, expected: Layer, f: Tensor, zq: Tensor, backward: bool) -> float | str:
    """Return milliseconds, or the reason for a failure."""
    try:
        out = layer(f, zq)
        reference = expected(f.float(), zq.float()) if f.dtype == torch.float32 else expected(f, zq).float()
        error = float((out.float() - reference).norm() / reference.norm())
        if not error < TOLERANCE[f.dtype]:
            return f"wrong: {error:.1e}"
        if not backward:
            with torch.no_grad():
                return milliseconds(lambda: layer(f, zq), f.device)
        dout, inputs = torch.randn_like(f), layer.inputs(f) if isinstance(layer, OperatorAlone) else (f, zq)
        return milliseconds(lambda: torch.autograd.grad(layer(f, zq), inputs, dout), f.device)
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        if f.is_cuda:
            torch.cuda.empty_cache()


def main() -> None:
    options, device = arguments(__doc__, "spatial_norm", 4.0, "tiny sizes, and the reformulation without torch.compile")
    torch.backends.cudnn.allow_tf32 = False  # its error in conv_y and conv_b would count as the norm's
    start = time.monotonic()
    bandwidth = copy_bandwidth(device)
    cases = [
        (backward, dtype, channels, size, batch, layout)
        for backward in (False, True)
        for dtype in (torch.bfloat16, torch.float32)
        for channels, size in (QUICK if options.quick else SIZES)
        for batch in ((1,) if options.quick else (1, 8))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    rows: list[dict[str, Any]] = [
        {
            "pass": "forward+backward" if backward else "forward",
            "dtype": str(dtype)[6:],
            "C": channels,
            "H=W": size,
            "batch": batch,
            "layout": "nhwc" if layout == torch.channels_last else "nchw",
            **{f"{name} ms": "no time" for name in LAYERS},
        }
        for backward, dtype, channels, size, batch, layout in cases
    ]
    for name in LAYERS:  # the outer loop, so that a lack of time affects the last layer only
        for (backward, dtype, channels, size, batch, layout), row in zip(cases, rows, strict=True):
            if time.monotonic() - start > 60 * options.minutes:
                break
            torch.manual_seed(0)
            norm = movq_ext.SpatialNorm(channels, 4, num_groups=32, eps=1e-6).to(device, dtype)
            f = torch.randn(batch, channels, size, size, device=device, dtype=dtype).to(memory_format=layout).requires_grad_()
            cells = max(size // 8, min(32, size))
            zq = torch.randn(batch, 4, cells, cells, device=device, dtype=dtype).requires_grad_()
            layers = peers(norm, channels, not options.quick)
            layer = layers[name]
            row[f"{name} ms"] = "missing" if layer is None else measure(layer, layers["eager"], f, zq, backward)
            torch._dynamo.reset()
    for (backward, dtype, channels, size, batch, _), row in zip(cases, rows, strict=True):
        ours, others = row["ours ms"], LAYERS[1:]
        if isinstance(ours, float):
            row["GB/s"] = (8 if backward else 3) * batch * channels * size**2 * dtype.itemsize / ours / 1e6
            row["of copy"] = row["GB/s"] * 1e9 / bandwidth
            row |= {f"x {n}": row[f"{n} ms"] / ours if isinstance(row[f"{n} ms"], float) else "-" for n in others}
        else:
            row |= dict.fromkeys(("GB/s", "of copy", *(f"x {n}" for n in others)), "-")
    head = {
        **environment(device),
        "copy bandwidth, GB/s": bandwidth / 1e9,
        "path": movq_ext.explain(torch.empty(1, 1, 1, 1, device=device)),
    }
    write(options.out, "spatial_norm", "SpatialNorm + SiLU", head, rows)
    plot(options.out / "spatial_norm.png", rows, head["device"])


def plot(path: Path, rows: list[dict[str, Any]], device: str) -> None:
    """Plot the share of the copy bandwidth over sizes at batch 1, by pass, dtype and layout. Does nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(9, 5))
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["batch"] == 1 and row["of copy"] != "-":
            lines.setdefault((row["pass"], row["dtype"], row["layout"]), []).append(row)
    for name, points in lines.items():
        axes.plot(
            [f"{p['C']}x{p['H=W']}x{p['H=W']}" for p in points], [p["of copy"] for p in points], marker="o", label=", ".join(name)
        )
    axes.set(title=f"SpatialNorm + SiLU on {device}, batch 1", xlabel="C x H x W", ylabel="share of copy bandwidth", ylim=0)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
