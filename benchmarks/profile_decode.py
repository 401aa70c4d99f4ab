"""Where the time of a decode goes: milliseconds by kind of work and by the decoder's stage.

    python benchmarks/profile_decode.py --out benchmarks/results/profile
    python benchmarks/profile_decode.py --nhwc --device cpu --out benchmarks/results/profile_cpu --into docs/profiling.md

The decoder is Kandinsky 2.x's with random weights. Decodes run under torch.profiler with a range for each layer
(`movq_ext.annotate`). Times are those of operators on a CPU and of kernels on a GPU. "norm" is everything in SpatialNorm,
"attention" everything in AttnBlock except its norm, "upsampling" everything in Upsample, and "convolution" all other operators of
convolutions. A compiled decode has no layers. There the names of its kernels decide, and a kernel of several kinds counts as the
first of norm, attention, upsampling, convolution.

Layout copies are copies between NCHW and channels_last: by PyTorch's operators, inside oneDNN on a CPU (which also has blocked
layouts for maps and weights), and inside cuDNN on a GPU. The trace (profile.trace.json) opens in ui.perfetto.dev.
`profile_decode.sh` also runs this under Nsight Systems.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import environment, milliseconds, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import movq_ext

KINDS = {
    "norm": ("group_norm", "spatial_norm", "var_mean"),
    "attention": ("attention", "softmax", "bmm"),
    "upsampling": ("upsample", "interpolate", "transpose2d", "convolution_transpose", "_unsafe_index"),
    "convolution": ("conv",),
}  # words in the names of operators
CLASSES = {
    "norm": (movq_ext.SpatialNorm, movq_ext.GroupNorm),
    "attention": (movq_ext.AttnBlock,),
    "upsampling": (movq_ext.Upsample,),
}
OUTSIDE = "no layer"
MARKS = ("<!-- profile table -->", "<!-- end of profile table -->")
COLUMNS = ("convolution", "norm", "attention", "upsampling", "other")
KANDINSKY = dict(ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3, resolution=256,
                 z_channels=4, zq_ch=4)  # fmt: skip


def kind(operator: str, around: Sequence[nn.Module]) -> str:
    """Return the kind of work of an operator inside these layers, the innermost first."""
    for layer in around:  # a convolution in an Upsample is upsampling, in an AttnBlock attention
        for name, classes in CLASSES.items():
            if isinstance(layer, classes):
                return name
    found = (name for name, words in KINDS.items() if any(word in operator for word in words))
    return next(found, "other") if not around else "convolution" if "conv" in operator else "other"


def stage(layer: str | None) -> str:
    """Return the stage of a layer: ``up.3`` for ``up.3.block.0.norm1``."""
    return OUTSIDE if layer is None else ".".join(layer.split(".")[: 2 if layer.startswith("up.") else 1])


def layers_around(layer: str | None, layers: dict[str, nn.Module]) -> list[nn.Module]:
    """Return the layer with this dotted name and the layers around it, the innermost first."""
    parts = layer.split(".") if layer else []
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return [layers[name] for name in names if name in layers]


def chain(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def time_by_stage(
    events: Iterable[Any], layers: dict[str, nn.Module], gpu: bool
) -> tuple[Counter[tuple[str, str]], Counter[str], float]:
    """Return microseconds by (stage, kind), by operator or kernel, and of kernels outside all operators."""
    times: Counter[tuple[str, str]] = Counter()
    operators: Counter[str] = Counter()
    whole = 0.0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            whole += 0.0 if event.is_user_annotation or event.name in layers else event.device_time_total  # events include ranges
            continue
        layer = next((above.name for above in chain(event) if above.name in layers), None)
        # The caller's name shows what a small operator is part of: aten::copy_ in aten::convolution.
        path = " ".join(above.name for above in reversed(list(chain(event))) if above.name not in layers)
        kernels = [(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name not in layers]
        for name, time in kernels if gpu else [(event.name, event.self_cpu_time_total)]:
            times[stage(layer), kind(f"{path} {name}", layers_around(layer, layers))] += time
            operators[name if name not in layers else "Python between operators"] += time
    return times, operators, whole - times.total() if gpu else 0.0


class LayoutCopies(TorchDispatchMode):
    """Counts operators that copy a map from NCHW to channels_last or back."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = layout(args[1] if function is torch.ops.aten.copy_.default else args[0]) if args else None
        out = function(*args, **(kwargs or {}))
        copies = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        self.count += function in copies and None not in (source, layout(out)) and source != layout(out)
        return out


def layout(x: object) -> str | None:
    """Return nchw, nhwc, or None for a tensor that is not a map or has the same order in both."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return None
    nchw, nhwc = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
    return None if nchw == nhwc else "nchw" if nchw else "nhwc"


def onednn_reorders(decode: Callable[[], object]) -> dict[str, int]:
    """Count the maps and weights that oneDNN reorders in a call, from its log on the C library's stdout."""
    libc, stdout = ctypes.CDLL(None), os.dup(1)
    with tempfile.TemporaryFile() as file:
        libc.fflush(None)
        os.dup2(file.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                decode()
            libc.fflush(None)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        file.seek(0)
        lines = [line.split(",") for line in file.read().decode().splitlines() if ",exec,cpu,reorder," in line]
    found = {"maps": 0, "weights": 0}
    for line in lines:
        memory = next(field for field in line if field.startswith("src:"))
        source, target = (part.split(":")[4] for part in memory.split()[:2])  # src:f32:a:blocked:abcd::f0
        if source != target and line[-2].count("x") == 3:
            found["maps" if source[0] == target[0] == "a" else "weights"] += 1  # weights: blocked along a, as in Acdb64a
    return found


def measure(options: argparse.Namespace, decoder: nn.Module, decode: Callable[[], object], device: torch.device) -> None:
    gpu = device.type == "cuda"
    head = {**environment(device), "compiled": options.compiled}
    head["weights"] = "channels_last" if options.nhwc else "contiguous"
    head["ms per decode, without the profiler"] = round(milliseconds(decode, device, seconds=1.0), 2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with movq_ext.annotate(decoder), profile(activities=activities) as profiler:
        for _ in range(options.decodes):
            decode()
        if gpu:
            torch.cuda.synchronize()
    options.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.out / "profile.trace.json"))
    layers = {**dict(decoder.named_modules()), type(decoder).__name__: decoder}
    times, operators, rest = time_by_stage(profiler.events() or [], layers, gpu)
    if gpu:
        times[OUTSIDE, "other"] += max(rest, 0.0)
    total = times.total()
    names = list(dict.fromkeys(name for name, _ in times))
    rows = [row(name, {k: times[name, k] for k in COLUMNS}, total, options.decodes) for name in names]
    rows.append(row("all", {k: sum(times[name, k] for name in names) for k in COLUMNS}, total, options.decodes))
    rows.append({"stage": "share", **{key: 100 * rows[-1][key] / rows[-1]["ms"] for key in (*COLUMNS, "ms")}, "%": "-"})
    head["layout copies per decode"] = layout_copies(options, decode, profiler.events() or [], gpu)
    head["longest"] = ", ".join(f"{name[:60]} {time / 1e3 / options.decodes:.3g} ms" for name, time in operators.most_common(8))
    title = f"Where the time of a decode goes: {options.size}x{options.size}, batch {options.batch}, {options.dtype}"
    write(options.out, "profile", title, head, rows)
    text = (options.out / "profile.md").read_text()
    if options.into:
        put_table(options.into, text)
    print(text)


def put_table(path: Path, text: str) -> None:
    """Put the table, with the time and the copies from the head, between the marks in a document."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"{path} has no {MARKS[0]} and {MARKS[1]}")
    lines = text.splitlines()
    title = f"{lines[0].removeprefix('# ')} ({lines[4].removeprefix('- device: ')}):"
    said = [line for line in lines if line.startswith(("- ms per decode", "- layout copies", "- weights"))]
    table = [line for line in lines if line.startswith("|")]
    path.write_text("\n".join([before + MARKS[0], title, "", *said, "", *table, mark + after]))


def row(name: str, times: dict[str, float], total: float, decodes: int) -> dict[str, Any]:
    """Convert microseconds of all decodes to a row with milliseconds of one."""
    return {"stage": name, **{k: time / 1e3 / decodes for k, time in times.items()}, "ms": sum(times.values()) / 1e3 / decodes,
            "%": 100 * sum(times.values()) / total}  # fmt: skip


def layout_copies(options: argparse.Namespace, decode: Callable[[], object], events: Iterable[Any], gpu: bool) -> str:
    found = {}
    if not options.compiled:  # the dispatcher does not see the operators of a compiled program
        with LayoutCopies() as counter:
            decode()
        found["by operators"] = counter.count
    if gpu:
        found["by cuDNN"] = sum("nchwToNhwc" in event.name or "nhwcToNchw" in event.name for event in events) // options.decodes
    elif torch.backends.mkldnn.is_available():
        reordered = onednn_reorders(decode)
        found |= {"of maps in oneDNN": reordered["maps"], "of weights in oneDNN": reordered["weights"]}
    return ", ".join(f"{number} {what}" for what, number in found.items())


def capture(decoder: nn.Module, decode: Callable[[], object], decodes: int) -> None:
    """Run decodes between the marks of `nsys profile --capture-range=cudaProfilerApi`."""
    with movq_ext.annotate(decoder):
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        for _ in range(decodes):
            decode()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile"), help="folder for the results")
    parser.add_argument("--size", type=int, help="height and width of the image; 256 on a CPU, 1024 on a GPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--compiled", action="store_true", help="torch.compile the decoder")
    parser.add_argument("--nhwc", action="store_true", help="weights in channels_last")
    parser.add_argument("--decodes", type=int, default=3, help="number of decodes to profile")
    parser.add_argument("--capture", action="store_true", help="mark the decodes for nsys instead of running torch.profiler")
    parser.add_argument("--into", type=Path, help=f"document that gets the table, between {' and '.join(MARKS)}")
    parser.add_argument("--quick", action="store_true", help="rehearse: a small decoder and map")
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    if options.capture and not gpu:
        parser.error("--capture needs a GPU")
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.size = size = options.size or (64 if options.quick else 1024 if gpu else 256)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    config: dict[str, Any] = {**KANDINSKY, **({"ch": 32} if options.quick else {})}
    decoder = movq_ext.MOVQDecoder(**config).eval().to(device, dtype)
    if options.nhwc:
        decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = torch.randn(options.batch, 4, size // 8, size // 8, device=device, dtype=dtype)
    if options.compiled:
        torch._inductor.config.cpp.enable_kernel_profile = True
    network = torch.compile(decoder, dynamic=False) if options.compiled else decoder
    decode = lambda: network(z, z)
    with torch.no_grad():
        decode()
        if options.capture:
            capture(decoder, decode, options.decodes)
        else:
            measure(options, decoder, decode, device)


if __name__ == "__main__":
    main()
