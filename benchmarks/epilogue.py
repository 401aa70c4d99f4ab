"""The epilogue of a convolution, ``x + bias + residual`` in place: ours against PyTorch's ``x.add_(bias).add_(residual)``.

    python benchmarks/epilogue.py --out benchmarks/results/epilogue

Before it is timed, every result is checked against the sum in float64. GB/s count one read of x and of the residual and one write
of x. That is the minimum for maps that do not fit on chip.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from timing import arguments, copy_bandwidth, environment, milliseconds, write
from torch import Tensor

import movq_ext
from movq_ext.ops.functional import add_bias_residual_

SIZES = [(512, 32), (512, 64), (512, 128), (256, 256), (128, 512), (128, 1024)]  # channels, height = width
QUICK = [(64, 16), (32, 32)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def pytorch(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    x = x.add_(bias[:, None, None])
    return x if residual is None else x.add_(residual)


def exact_sum(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    out = x.double() + bias.double()[:, None, None]
    return out if residual is None else out + residual.double()


def measure(function: Any, x: Tensor, bias: Tensor, residual: Tensor | None) -> float | str:
    """Return milliseconds, or the reason for a failure. x is not changed."""
    out = function(x.clone(), bias, residual).double()
    reference = exact_sum(x, bias, residual)
    error = float((out - reference).norm() / reference.norm())
    if not error < TOLERANCE[x.dtype]:
        return f"wrong: {error:.1e}"
    del out, reference
    overwritten = x.clone()
    return milliseconds(lambda: function(overwritten, bias, residual), x.device)


def main() -> None:
    options, device = arguments(__doc__, "epilogue", 2.0, "tiny sizes")
    start = time.monotonic()
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels, size in QUICK if options.quick else SIZES:
            for layout in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                shape = (1, channels, size, size)
                x, other = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout) for _ in range(2))
                bias = torch.randn(channels, device=device, dtype=dtype)
                for residual in (other, None):
                    row: dict[str, Any] = {"dtype": str(dtype)[6:], "C": channels, "H=W": size, "residual": residual is not None,
                                           "layout": "nhwc" if layout == torch.channels_last else "nchw"}  # fmt: skip
                    for name, function in (("ours", add_bias_residual_), ("pytorch", pytorch)):
                        late = time.monotonic() - start > 60 * options.minutes
                        row[f"{name} ms"] = "no time" if late else measure(function, x, bias, residual)
                    ours, theirs = row["ours ms"], row["pytorch ms"]
                    if isinstance(ours, float):
                        row["GB/s"] = (2 if residual is None else 3) * x.numel() * x.element_size() / ours / 1e6
                        row["of copy"] = row["GB/s"] * 1e9 / bandwidth
                    else:
                        row |= {"GB/s": "-", "of copy": "-"}
                    row["x pytorch"] = theirs / ours if isinstance(ours, float) and isinstance(theirs, float) else "-"
                    rows.append(row)
    head = {**environment(device), "copy bandwidth, GB/s": bandwidth / 1e9, "path": movq_ext.explain(x)}
    write(options.out, "epilogue", "Bias and residual of a convolution", head, rows)


if __name__ == "__main__":
    main()
