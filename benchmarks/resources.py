"""Report registers, spills, shared memory, occupancy and access widths of every kernel for every target.

    python benchmarks/resources.py --out benchmarks/results/resources.md

Needs nvcc and cuobjdump (from a CUDA toolkit, or from the triton that torch installs) but no GPU. Exits with 1 if a kernel
spills, or if the compiler serialises its wgmma or ignores its setmaxnreg.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "kernels"
# Warps and blocks per multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"). All targets
# have 65536 registers, allocated to warps in units of 256.
LIMITS = {"80": (64, 32), "86": (48, 16), "89": (48, 24), "90": (64, 32), "90a": (64, 32), "100": (64, 32), "120": (48, 24)}
HOPPER = "shared_kv_*.cu"  # compiled for 9.0a; only a trap for other targets
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG|LDSM|LDS|STS|LDL|STL)((?:\.\w+)*)")
PRODUCT = re.compile(r"\b(H[GM]*MA\.\w+)")  # of tensor cores, with the shape
# Prints the shared memory that a launch of each Hopper kernel requests, by the head size and the tensors that stay resident.
HOPPER_SHARED = """
#include <cstdio>
#include "kernels/shared_kv_tile.cuh"
template <int Head, int Residents>
void print() { std::printf("%d %d %u\\n", Head, Residents, movq::shared_kv::SharedMemory<__half, Head, Residents>::kBytes); }
int main() { print<128, 1>(), print<128, 2>(), print<256, 1>(), print<256, 2>(), print<512, 1>(), print<512, 2>(); }
"""


class Kernel(NamedTuple):
    source: str
    name: str
    target: str
    registers: int
    spills: int
    shared: int
    threads: int
    accesses: Counter[str]
    products: Counter[str]

    def warps(self) -> int:
        """Resident warps per multiprocessor by registers and threads; the shared memory of a launch is not known here."""
        max_warps, max_blocks = LIMITS[self.target]
        block_warps = -(-self.threads // 32)
        blocks_by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // block_warps
        return min(max_blocks, max_warps // block_warps, blocks_by_registers) * block_warps


def find_tool(name: str) -> str:
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:  # it has cuobjdump, which a bare nvcc lacks
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    if found := shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name):
        return found
    sys.exit(f"{name} not found in {', '.join(map(str, folders))} or on PATH; set CUDA_HOME")


def short_name(name: str) -> str:
    """Shorten `void movq::spatial_norm::(anonymous namespace)::f<float, 4>(args)` to `f<float, 4>`."""
    name = name.replace("(anonymous namespace)::", "").replace("__nv_", "").replace("__half", "half")
    name = re.sub(r"\(bool\)([01])|\(int\)(\d+)", lambda m: m[2] or ("false", "true")[int(m[1])], name)
    if "<" not in name:
        return name.split("(")[0].removeprefix("void ").split("::")[-1]
    return re.sub(r".*?(\w+<)", r"\1", re.sub(r"\w+::", "", name.split(">(")[0] + ">").removeprefix("void "), count=1)


def compile_source(source: Path, target: str) -> list[Kernel]:
    """Compile one file for one target and read the reports of ptxas and cuobjdump on its kernels."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        options = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", code, "-Xptxas=-v", "-cubin"]
        command = [nvcc, *options, "-o", cubin, source]
        compiler = subprocess.run(command, capture_output=True, text=True)
        if compiler.returncode:
            sys.exit(f"{source.name} does not compile for sm_{target}:\n{compiler.stderr}")
        # ptxas reports serialised wgmma and an ignored setmaxnreg, but does not fail.
        if any(loss in compiler.stderr for loss in ("wgmma.mma_async instructions are serialized", "'setmaxnreg'")):
            sys.exit(f"{source.name} loses performance:\n{compiler.stderr}")
        sass = subprocess.run([cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    launch_bounds = dict(re.findall(r"\.entry (\w+).*?\.maxntid (\d+)", compile_to_ptx(source, target), re.S))
    accesses: dict[str, Counter[str]] = {}
    products: dict[str, Counter[str]] = {}
    for part in re.split(r"Function : ", sass)[1:]:
        widths = (f"{m[1]}{''.join(re.findall(r'[.](?:128|64|U16|S16|U8|S8)', m[2]))}" for m in ACCESS.finditer(part))
        accesses[part.split()[0]] = Counter(widths)
        products[part.split()[0]] = Counter(PRODUCT.findall(part))
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*)",
        compiler.stderr.replace("\n", " ").replace("ptxas info    : Compiling", "\nptxas info    : Compiling"),
    )
    names = subprocess.run(
        ["c++filt"], input="\n".join(row[0] for row in report), check=True, capture_output=True, text=True
    ).stdout
    hopper_shared = measure_hopper_shared_memory() if target == "90a" else {}
    kernels = []
    for (mangled, stores, loads, registers, rest), name in zip(report, names.splitlines(), strict=True):
        shared = int(found[1]) if (found := re.search(r"(\d+) bytes smem", rest)) else 0
        threads, spills = int(launch_bounds.get(mangled, 1024)), int(stores) + int(loads)
        if walk := re.match(r"walk<\w+, (\d+), (\w+)", short_name(name)):
            shared += hopper_shared.get((int(walk[1]), 2 if walk[2] == "QueryGradient" else 1), 0)
            if target == "90a" and not any(product.startswith("HGMMA") for product in products[mangled]):
                sys.exit(f"{short_name(name)} has no HGMMA instructions")
        kernels.append(
            Kernel(source.stem, short_name(name), target, int(registers), spills, shared, threads, accesses[mangled],
                   products[mangled])
        )  # fmt: skip
    return kernels


@functools.cache
def measure_hopper_shared_memory() -> dict[tuple[int, int], int]:
    """Return the bytes per block by (head size, resident tensors)."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "shared.cu", Path(folder) / "shared"
        source.write_text(HOPPER_SHARED)
        options = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}", "-arch=sm_90a"]
        subprocess.run([find_tool("nvcc"), *options, "-o", program, source], check=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {(int(head), int(residents)): int(size) for head, residents, size in map(str.split, lines)}


def compile_to_ptx(source: Path, target: str) -> str:
    command = [find_tool("nvcc"), "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch=compute_{target}", "-ptx", "-o", "-", source]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def format_sections(kernels: list[Kernel]) -> dict[str, str]:
    """Return the heading and table of each source file."""
    sections = {}
    for source in sorted({k.source for k in kernels}):
        multiplies = any(k.products for k in kernels if k.source == source)
        lines = [
            f"## {source}.cu\n",
            "| kernel | registers | warps resident | spilled bytes | shared bytes | global loads, stores on sm_90 | "
            f"shared on sm_90 |{' tensor cores on sm_90 |' * multiplies}",
            f"|---|---|---|---:|---:|---|---|{'---|' * multiplies}",
        ]
        for name in sorted({k.name for k in kernels if k.source == source}):
            rows = [k for k in kernels if (k.source, k.name) == (source, name)]
            shown = next((k for k in rows if k.target.startswith("90")), rows[0])
            listed = [" ".join(f"{w} x{n}" for w, n in sorted(shown.accesses.items()) if w.startswith(kinds)) for kinds in
                      (("LDG", "STG"), ("LDS", "STS"))]  # fmt: skip
            products = " ".join(f"{shape} x{n}" for shape, n in sorted(shown.products.items()))
            lines.append(
                f"| `{name}` | {' '.join(str(k.registers) for k in rows)} | {' '.join(str(k.warps()) for k in rows)} | "
                f"{max(k.spills for k in rows)} | {max(k.shared for k in rows)} | {listed[0]} | {listed[1]} |"
                + f" {products} |"
                * multiplies
            )
        sections[f"{source}.cu"] = "\n".join(lines)
    return sections


def read_sections(path: Path) -> dict[str, str]:
    """Return the sections of an earlier report."""
    parts = path.read_text().split("\n## ")[1:] if path.exists() else []
    return {part.split("\n")[0]: "## " + part.strip() for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table; standard output by default")
    parser.add_argument(
        "--targets", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="SM", help="compute capabilities, such as 90"
    )
    parser.add_argument(
        "--sources", nargs="+", metavar="FILE", help="files of csrc/kernels to compile; other sections of --out stay as they are"
    )
    options = parser.parse_args()
    jobs = [
        (source, target)
        for source in sorted(KERNELS.glob("*.cu"))
        for target in options.targets
        if (target == "90a") == source.match(HOPPER) and (not options.sources or source.name in options.sources)
    ]
    targets = [target for target in options.targets if target != "90a"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_source(*job), jobs) for kernel in found]
    version = subprocess.run([find_tool("nvcc"), "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    text = (
        f"# Resources of the kernels, from `benchmarks/resources.py` with nvcc {release[1] if release else '?'}\n\n"
        f"Registers and resident warps are for sm_{', sm_'.join(targets)}, in this order; `shared_kv_*` is for sm_90a only. A "
        f"multiprocessor holds {', '.join(str(LIMITS[t][0]) for t in targets)} warps; registers and threads reduce that to the "
        "number given. "
        "Accesses are `.128` for 16 bytes, `.64` for 8 and without a suffix for 4; x counts instructions in the code, not "
        "executions. Shared bytes include what a launch of `shared_kv_*` requests. The other kernels request it by the size of "
        "the problem; the tests check that it leaves room for these warps. "
        "No `wgmma` is serialised, and no `setmaxnreg` ignored: the script fails if the compiler says so.\n"
    )
    sections = read_sections(options.out) if options.out and options.sources else {}
    sections |= format_sections(kernels)
    text += "".join(f"\n{section}\n" for _, section in sorted(sections.items()))
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    spilled = [
        f"{k.name} for sm_{k.target}" for k in kernels if k.spills or any(w.startswith(("LDL", "STL")) for w in k.accesses)
    ]
    if spilled:
        sys.exit("kernels that use local memory: " + "; ".join(spilled))


if __name__ == "__main__":
    main()
