"""Peak memory of a decode by image size: whole, and in strips with `decode_tiled`.

    python benchmarks/memory.py --out benchmarks/results/memory --sizes 256 512 1024 2048 --max-memory 1000

The decoder is Kandinsky 2.x's with random weights. Each decode runs in a separate process. "MB" is the peak resident memory of
that process on a CPU, including the interpreter, torch and 211 MB of weights; on a GPU it is the peak of the allocator. "error"
is the relative difference from the whole decode.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import environment, write

import movq_ext


def measure_one(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    decoder = movq_ext.MOVQDecoder(ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3,
                                   resolution=256, z_channels=4, zq_ch=4).eval().to(device)  # fmt: skip
    z = torch.randn(1, 4, options.size // 8, options.size // 8, device=device)
    start = time.perf_counter()
    if options.max_memory_one:
        out = movq_ext.decode_tiled(decoder, z, z, max_memory=options.max_memory_one << 20)
    else:
        with torch.no_grad():
            out = decoder(z, z)
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    seconds = time.perf_counter() - start
    torch.save(out.cpu(), options.save)
    return {"seconds": seconds, "MB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory"), help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--max-memory", type=int, nargs="+", default=[500], help="memory for strips, in MiB")
    parser.add_argument("--whole-up-to", type=int, default=1024, help="the largest image to decode whole")
    for name, kind in (("size", int), ("max-memory-one", int), ("save", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size:
        print(json.dumps(measure_one(options)))
        return
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            for budget in [*([0] if size <= options.whole_up_to else []), *options.max_memory]:
                save = Path(folder) / f"{budget}.pt"
                arguments = [f"--size={size}", f"--max-memory-one={budget}", f"--save={save}", f"--device={options.device}"]
                command = [sys.executable, __file__, *arguments]
                done = subprocess.run(command, capture_output=True, text=True)
                row = {"image": f"{size}x{size}", "max_memory, MiB": budget or "whole", "seconds": "-"}
                row |= {"MB": (done.stderr.strip().splitlines() or ["died"])[-1][:80], "error": "-"}
                if done.returncode == 0:
                    row |= json.loads(done.stdout.splitlines()[-1])
                    if budget and (Path(folder) / "0.pt").exists():
                        whole, out = torch.load(Path(folder) / "0.pt"), torch.load(save)
                        row["error"] = float((out - whole).norm() / whole.norm())
                rows.append(row)
                print(row, file=sys.stderr)
    write(options.out, "memory", "Peak memory of a decode", environment(torch.device(options.device)), rows)


if __name__ == "__main__":
    main()
