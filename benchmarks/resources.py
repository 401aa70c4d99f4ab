"""Report registers, spills, shared memory, occupancy and access widths of every kernel for every target.

    python benchmarks/resources.py --out benchmarks/results/resources.md

Needs nvcc and cuobjdump (from a CUDA toolkit, or from the triton that torch installs) but no GPU. Exits with 1 if a kernel
spills, or if the compiler serialises its wgmma or ignores its setmaxnreg.
"""

from __future__ import annotations

import argparse
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


class Kernel(NamedTuple):
    source: str
    name: str
    target: str
    registers: int
    spills: int
    shared: int
    threads: int
    accesses: Counter[str]

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
    for part in re.split(r"Function : ", sass)[1:]:
        widths = (f"{m[1]}{''.join(re.findall(r'[.](?:128|64|U16|S16|U8|S8)', m[2]))}" for m in ACCESS.finditer(part))
        accesses[part.split()[0]] = Counter(widths)
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*)",
        compiler.stderr.replace("\n", " ").replace("ptxas info    : Compiling", "\nptxas info    : Compiling"),
    )
    names = subprocess.run(
        ["c++filt"], input="\n".join(row[0] for row in report), check=True, capture_output=True, text=True
    ).stdout
    kernels = []
    for (mangled, stores, loads, registers, rest), name in zip(report, names.splitlines(), strict=True):
        shared = int(found[1]) if (found := re.search(r"(\d+) bytes smem", rest)) else 0
        threads, spills = int(launch_bounds.get(mangled, 1024)), int(stores) + int(loads)
        kernels.append(Kernel(source.stem, short_name(name), target, int(registers), spills, shared, threads, accesses[mangled]))
    return kernels


def compile_to_ptx(source: Path, target: str) -> str:
    command = [find_tool("nvcc"), "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch=compute_{target}", "-ptx", "-o", "-", source]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def format_table(kernels: list[Kernel]) -> str:
    lines = []
    for source in sorted({k.source for k in kernels}):
        lines += [
            f"\n## {source}.cu\n",
            "| kernel | registers | warps resident | spilled bytes | static shared bytes | global loads, stores on sm_90 | "
            "shared on sm_90 |",
            "|---|---|---|---:|---:|---|---|",
        ]
        for name in sorted({k.name for k in kernels if k.source == source}):
            rows = [k for k in kernels if (k.source, k.name) == (source, name)]
            widths = next((k for k in rows if k.target.startswith("90")), rows[0]).accesses
            listed = [" ".join(f"{w} x{n}" for w, n in sorted(widths.items()) if w.startswith(kinds)) for kinds in
                      (("LDG", "STG"), ("LDS", "STS"))]  # fmt: skip
            lines.append(
                f"| `{name}` | {' '.join(str(k.registers) for k in rows)} | {' '.join(str(k.warps()) for k in rows)} | "
                f"{max(k.spills for k in rows)} | {max(k.shared for k in rows)} | {listed[0]} | {listed[1]} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table; standard output by default")
    parser.add_argument(
        "--targets", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="SM", help="compute capabilities, such as 90"
    )
    options = parser.parse_args()
    jobs = [
        (source, target)
        for source in sorted(KERNELS.glob("*.cu"))
        for target in options.targets
        if (target == "90a") == source.match(HOPPER)
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
        "executions. Shared memory is requested at launch, by the size of the problem; the tests check that it leaves room for "
        f"these warps.\n{format_table(kernels)}\n"
    )
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
