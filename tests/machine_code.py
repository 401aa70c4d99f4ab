"""The instructions of compiled kernels, read from the machine code itself: nvcc alone does not come with a disassembler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# The low 12 bits of an instruction, on sm_80 to sm_120, as `cuobjdump -sass` prints them.
OPCODES = {
    0xB1D: "BAR",
    0x83B: "LDSM",
    0x23C: "HMMA",
    0x9F0: "HGMMA",  # both operands in shared memory
    0xDF0: "HGMMA",  # the first in registers
    0x9C5: "WARPGROUP",  # fences and waits of HGMMA
    0xFAE: "LDGSTS",
    0x306: "I2F",  # how a division of integers starts
    0xD06: "I2F",
    0x983: "LDL",
    0x387: "STL",
}
INSTRUCTION_BYTES = 16


def compile_kernels(source: Path, target: int, folder: Path) -> dict[str, list[str]]:
    """Return each kernel's instructions by mangled name: one of OPCODES' names, or "" for all others."""
    cubin = folder / f"{source.stem}.{target}.cubin"
    options = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{target}", "-cubin"]
    subprocess.run([NVCC, *options, "-o", cubin, source], check=True)
    return read_kernels(cubin)


def read_kernels(cubin: Path) -> dict[str, list[str]]:
    """Return the instructions of a compiled file's kernels, as compile_kernels() does."""
    return {
        name.removeprefix(".text."): [OPCODES.get(word & 0xFFF, "") for (word, _) in struct.iter_unpack("<QQ", code)]
        for name, code in sections(cubin.read_bytes()).items()
        if name.startswith(".text.")
    }


def sections(elf: bytes) -> dict[str, bytes]:
    """Return the contents of the sections of a 64-bit ELF file by name."""
    (table,), (entry, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    strings = headers[names][4]

    def text(offset: int) -> str:
        return elf[offset : elf.index(b"\0", offset)].decode()

    return {text(strings + name): elf[offset : offset + size] for name, _, _, _, offset, size in headers}
