"""A whole decode, ours against every peer: time and peak memory.

    python benchmarks/decode.py --out benchmarks/results/decode

The decoder is Kandinsky 2.x's (52.8 million parameters) with random weights, the same in every peer. Every peer runs in a process of its
own, its result is compared with the published decode in float32 before it is timed, and its peak memory is what it takes beyond weights and
latents. "of roofline" is the published convolutions' operations at the rate of a large matrix product of the dtype, plus the norms' bytes at
the copy rate, as a share of the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published_decoder import published
from timing import copy_bandwidth, environment, matmul_rate, milliseconds, write
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import movq_ext

VQ = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, num_vq_embeddings=16384, vq_embed_dim=4,
          norm_type="spatial", down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
          up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3)  # fmt: skip
SMALL = dict(VQ, block_out_channels=(32, 32, 64, 64))
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 1e-2}
Decode = Callable[[Tensor], Tensor]


def peer(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Decode:
    """`ours`, `published` or `diffusers`, each maybe with ` compiled` and ` nhwc` behind."""
    kind, *how = name.split()
    if kind == "diffusers":
        from diffusers import VQModel

        model: Any = VQModel.from_pretrained(folder).to(device, dtype).eval()
        network = lambda z: model.decode(z, force_not_quantize=True).sample
    else:
        model = movq_ext.from_pretrained(folder).to(device, dtype).eval()
        if kind == "published":
            model.decoder = published(model.decoder)
        network = lambda z: model.decoder(model.post_quant_conv(z), z)
    if "nhwc" in how:
        model.to(memory_format=torch.channels_last)
    if "compiled" in how:
        network = torch.compile(network, dynamic=False)
    return (lambda z: network(z.contiguous(memory_format=torch.channels_last))) if "nhwc" in how else network


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    return next(int(line.split()[1]) / 1e3 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def measure_one(options: argparse.Namespace) -> dict[str, Any]:
    """Runs in its own process: ms and MB of one peer, or why there are none."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    z = torch.randn(options.batch, 4, options.size // 8, options.size // 8)
    network = movq_ext.from_pretrained(options.folder).eval()
    wanted = None
    if options.size <= 512:
        wanted = published(network.decoder).to(device)(network.post_quant_conv(z).to(device), z.to(device)).cpu()
    del network
    z = z.to(device, dtype)
    decode = peer(options.peer, options.folder, device, dtype)
    out = decode(z)
    if wanted is not None:
        error = float((out.float().cpu() - wanted).norm() / wanted.norm())
        if not error < TOLERANCE[options.dtype]:
            return {"failed": f"wrong: {error:.1e}"}
    del out, wanted
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        decode(z)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM again
        before = resident("VmRSS")
        decode(z)
        peak = resident("VmHWM")
    return {"ms": milliseconds(lambda: decode(z), device, options.seconds), "MB": peak - before}


def run(name: str, options: argparse.Namespace, **case: Any) -> dict[str, Any]:
    arguments = [f"--{key}={value}" for key, value in case.items()]
    command = [sys.executable, __file__, f"--peer={name}", f"--folder={options.folder}", f"--device={options.device}",
               f"--seconds={options.seconds}", *arguments]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return {"failed": "over 600 s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["died"])[-1]
        return {"failed": "out of memory" if "OutOfMemory" in last or done.returncode < 0 else last[:60]}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def work(folder: Path, size: int) -> tuple[float, float]:
    """Operations of the published decode of one image, and its maps' bytes per byte of an element that norms move: 2 reads, 1 write."""
    moved = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal moved
        moved += 3 * inputs[0].numel()

    decoder = published(movq_ext.from_pretrained(folder).decoder.to("meta"))
    for module in decoder.modules():
        if isinstance(module, movq_ext.SpatialNorm):
            module.register_forward_pre_hook(count)
    z = torch.empty(1, 4, size // 8, size // 8, device="meta")
    with FlopCounterMode(display=False) as flops:
        decoder(z, z)
    return flops.get_total_flops(), moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"), help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the image; 256 on a CPU, 256 to 2048 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="float32 on a CPU, all on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", help="1 on a CPU, 1 and 8 on a GPU")
    parser.add_argument("--peers", nargs="+", help="as in `published compiled nhwc`, quoted")
    parser.add_argument("--seconds", type=float, default=0.5, help="to measure each for, and 3 decodes at least")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no measurement after this long")
    parser.add_argument("--quick", action="store_true", help="a small decoder and few peers, to rehearse")
    for name, kind in (("peer", str), ("folder", Path), ("size", int), ("batch", int), ("dtype", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        with torch.no_grad():
            print(json.dumps(measure_one(options)))
        return
    from diffusers import VQModel

    device, start = torch.device(options.device), time.monotonic()
    cuda = device.type == "cuda"
    kinds = ["ours", "published", "diffusers"]
    names = options.peers or (kinds if options.quick else [f"{kind}{how}" for how in ("", " nhwc", " compiled", " compiled nhwc") for kind in kinds])
    sizes = options.sizes or ([64] if options.quick else [256, 512, 768, 1024, 2048] if cuda else [256])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        torch.manual_seed(0)
        VQModel(**(SMALL if options.quick else VQ)).save_pretrained(folder)
        bandwidth = copy_bandwidth(device)
        for dtype in options.dtypes or (["bfloat16", "float16", "float32"] if cuda else ["float32"]):
            rate = matmul_rate(device, 8192 if cuda else 2048, getattr(torch, dtype))
            for size in sizes:
                operations, moved = work(options.folder, size)
                for batch in options.batches or ([1, 8] if cuda and not options.quick else [1]):
                    best = 1e3 * batch * (operations / rate + moved * getattr(torch, dtype).itemsize / bandwidth)
                    for name in names:
                        late = time.monotonic() - start > 60 * options.minutes
                        result = {"failed": "no time"} if late else run(name, options, size=size, batch=batch, dtype=dtype)
                        ms = result.get("ms")
                        rows.append({"dtype": dtype, "size": size, "batch": batch, "decoder": name, "ms": ms or result["failed"], "MB": result.get("MB", "-"),
                                     "images/s": 1e3 * batch / ms if ms else "-", "of roofline": best / ms if ms else "-"})  # fmt: skip
    head = {**environment(device), "copy bandwidth, GB/s": bandwidth / 1e9, "threads": torch.get_num_threads()}
    write(options.out, "decode", "Decoding", {**head, **ratios(rows)}, rows)


def ratios(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Our best against the peers' best, for every case."""
    found = {}
    for case in dict.fromkeys((row["dtype"], row["size"], row["batch"]) for row in rows):
        measured = [row for row in rows if (row["dtype"], row["size"], row["batch"]) == case and isinstance(row["ms"], float)]
        ours, theirs = ([row for row in measured if row["decoder"].startswith("ours") == mine] for mine in (True, False))
        if ours and theirs:
            text = [f"{min(r[key] for r in theirs) / min(r[key] for r in ours):.2f}x {what}"
                    for key, what in (("ms", "the speed"), ("MB", "less memory"))
                    if min(r[key] for r in ours) > 0]
            found[f"{case[0]}, {case[1]}x{case[1]}, batch {case[2]}, ours against the best peer"] = ", ".join(text)
    return found


if __name__ == "__main__":
    main()
