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
    0x981: "LDG",
    0x986: "STG",
    0x223: "FFMA",  # of registers; the others take a constant or a uniform register
    0x423: "FFMA",
    0x623: "FFMA",
    0x823: "FFMA",
    0xA23: "FFMA",
    0xC23: "FFMA",
    0x308: "MUFU",
    0x947: "BRA",
    0x94D: "EXIT",
    0x82D: "PREEXIT",  # griddepcontrol.launch_dependents
    0x82E: "ACQBULK",  # griddepcontrol.wait
    0x983: "LDL",
    0x387: "STL",
}
INSTRUCTION_BYTES = 16


def compile_kernels(source: Path, target: int, folder: Path) -> dict[str, list[str]]:
    """Return each kernel's instructions by mangled name: one of OPCODES' names, or "" for all others."""
    return read_kernels(compile_cubin(source, target, folder))


def read_kernels(cubin: Path) -> dict[str, list[str]]:
    """Return the instructions of a compiled file's kernels, as compile_kernels() does."""
    return {name: _names(words) for name, words in _read(cubin).items()}


def compile_loops(source: Path, target: int, folder: Path) -> dict[str, list[list[str]]]:
    """Return the instructions of each kernel's loops, from the target of every branch backwards to that branch."""
    return read_loops(compile_cubin(source, target, folder), target)


def read_loops(cubin: Path, target: int) -> dict[str, list[list[str]]]:
    """Return the loops of a compiled file's kernels, as compile_loops() does."""
    loops: dict[str, list[list[str]]] = {}
    for name, words in _read(cubin).items():
        names = _names(words)
        branches = [
            (at, _branch_target(at, low | high << 64, target)) for at, (low, high) in enumerate(words) if names[at] == "BRA"
        ]
        loops[name] = [names[to : at + 1] for at, to in branches if to < at]  # the last one branches to itself: the end
    return loops


def compile_cubin(source: Path, target: int, folder: Path) -> Path:
    """Compile a file's kernels and return the path of the result."""
    cubin = folder / f"{source.stem}.{target}.cubin"
    options = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{target}", "-cubin"]
    subprocess.run([NVCC, *options, "-o", cubin, source], check=True)
    return cubin


def _read(cubin: Path) -> dict[str, list[tuple[int, int]]]:
    """Return each kernel's instructions as two words of 64 bits."""
    return {
        name.removeprefix(".text."): list(struct.iter_unpack("<QQ", code))
        for name, code in sections(cubin.read_bytes()).items()
        if name.startswith(".text.")
    }


def _names(words: list[tuple[int, int]]) -> list[str]:
    return [OPCODES.get(low & 0xFFF, "") for low, _ in words]


def _branch_target(at: int, instruction: int, target: int) -> int:
    """Return the index of the instruction to which instruction number `at`, a BRA, branches.

    The offset counts 4 bytes from the next instruction on. Its bits start at bit 34; before sm_90 that is all, since then its low
    byte is in bits 16 to 23. (As cuobjdump decodes it.)
    """
    offset = instruction >> 34 & (1 << 48) - 1
    offset -= (offset >> 47) << 48
    if target >= 90:
        offset = offset << 8 | instruction >> 16 & 0xFF
    return at + 1 + offset * 4 // INSTRUCTION_BYTES


def sections(elf: bytes) -> dict[str, bytes]:
    """Return the contents of the sections of a 64-bit ELF file by name."""
    (table,), (entry, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    strings = headers[names][4]

    def text(offset: int) -> str:
        return elf[offset : elf.index(b"\0", offset)].decode()

    return {text(strings + name): elf[offset : offset + size] for name, _, _, _, offset, size in headers}
