"""Nearest 2x upsampling and its 3x3 convolution: our methods against PyTorch's interpolate and convolution.

    python benchmarks/upsample.py --out benchmarks/results/upsample

Maps and weights are in channels_last. `forward` is inference; `backward` times the forward pass with its gradients. "automatic"
is what `upsample_conv` does by itself. On a GPU, "chosen" is the method that it takes by counted operations and bytes, and
"GFLOP" and "MB" are its counts. Before it is timed, every result is checked against the convolution in float64. float32 runs in
TF32 if torch.backends.cudnn.allow_tf32 is True, its default.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import arguments, convolution_rate, copy_bandwidth, environment, milliseconds, write
from torch import Tensor

import movq_ext
from movq_ext.ops.functional import upsample_conv
from movq_ext.ops.paths import upsampling_method
from movq_ext.ops.upsampling import METHODS, count_costs

SIZES = [(512, 16), (512, 32), (512, 64), (256, 128), (256, 256), (128, 256)]  # channels, height = width of the small map
QUICK = [(64, 8), (32, 16)]
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 2e-2}


def pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def forward(function: Any, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(*inputs)]


def backward(function: Any, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def measure(run: Callable[[], list[Tensor]], exact: list[Tensor], device: torch.device) -> float | str:
    """Return milliseconds, or the reason for a failure."""
    results = run()
    error = max(float((x.double() - y).norm() / y.norm()) for x, y in zip(results, exact, strict=True))
    if not error < TOLERANCE[results[0].dtype]:
        return f"wrong: {error:.1e}"
    del results
    return milliseconds(run, device)


def main() -> None:
    options, device = arguments(__doc__, "upsample", 3.0, "tiny sizes")
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels, size in QUICK if options.quick else SIZES:
            torch.manual_seed(0)
            draw = partial(torch.randn, device=device)
            shapes = (1, channels, size, size), (channels, channels, 3, 3), (1, channels, 2 * size, 2 * size)
            x, weight, dout = (draw(shape).to(dtype, memory_format=torch.channels_last) for shape in shapes)
            inputs = [x, weight * (9 * channels) ** -0.5, draw(channels).to(dtype)]
            cost = count_costs(x, channels, True, dtype)
            for name, run, methods in (("forward", forward, METHODS), ("backward", backward, ("transposed", "direct"))):
                exact = run(pytorch, [tensor.double() for tensor in inputs], dout.double())
                row: dict[str, Any] = {"dtype": str(dtype)[6:], "C": channels, "H=W": size, "pass": name}
                functions = {method: partial(upsample_conv, method=method) if method in methods else None for method in METHODS}
                for method, function in {**functions, "automatic": upsample_conv, "pytorch": pytorch}.items():
                    late = time.monotonic() - start > 60 * options.minutes
                    timed = function and not late
                    result = measure(partial(run, function, inputs, dout), exact, device) if timed else "no time" if late else "-"
                    row[f"{method} ms"] = result
                measured = {method: row[f"{method} ms"] for method in (*methods, "automatic")}
                times = {method: result for method, result in measured.items() if isinstance(result, float)}
                row["fastest"] = min(times, key=lambda method: times[method]) if times else "-"
                if device.type == "cuda":
                    chosen = upsampling_method(x, channels, True, in_inference=run is forward, weight_dtype=dtype)
                    row |= {"chosen": chosen, "GFLOP": cost[chosen].operations / 1e9, "MB": cost[chosen].bytes / 1e6}
                theirs, ours = row["pytorch ms"], row["automatic ms"]
                row["x pytorch"] = theirs / ours if isinstance(theirs, float) and isinstance(ours, float) else "-"
                rows.append(row)
                del exact
    head = {
        **environment(device),
        "copy bandwidth, GB/s": copy_bandwidth(device) / 1e9,
        "3x3 convolution, TFLOP/s": convolution_rate(device, 8 if options.quick else 64) / 1e12,
        "path": movq_ext.explain(x, "upsample_conv"),
    }
    write(options.out, "upsample", "Upsampling and its convolution", head, rows)


if __name__ == "__main__":
    main()
