"""Runs CUDA kernels on the CPU, from their own source, and reports what they do wrong and what they cost.

    library = emulator.build("csrc/kernels/scale.cu", glue='''
        EXPORT(scale, const float* x, float* y, int64_t n) { movq::scale(x, y, n, nullptr); }
    ''')
    result = library.call("scale", x=x, y=y, n=x.numel())   # numpy arrays or torch tensors; y is written in place
    assert result.buffers["x"].read_bytes == x.nbytes

See README.md for what is checked and counted.
"""

import ctypes
import hashlib
import os
import pickle
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "csrc" / "kernels"
SEEDS = (0, 1, 2)
CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-fPIC", "-g1", "-Wall", "-fno-gnu-unique", "-ffp-contract=off"]
# The runtime is not instrumented: it alone may touch device memory, which AddressSanitizer takes for poisoned.
RUNTIME = [*COMMON, "-O2"]
KERNEL = [
    *COMMON,
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-Wno-unknown-pragmas",
    "-DMOVQ_EMULATOR",
    f"-I{HERE / 'include'}",
    f"-I{KERNELS}",
    f"-I{KERNELS.parent}",
]


class EmulatorError(RuntimeError):
    """A kernel did something it must not, or its launcher raised."""


def available():
    return sys.platform == "linux" and shutil.which(CXX) is not None


# --- Building


def _cache():
    base = os.environ.get("MOVQ_EMULATOR_CACHE") or Path.home() / ".cache" / "movq_ext" / "emulator"
    Path(base).mkdir(parents=True, exist_ok=True)
    return Path(base)


def _digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def _make(target, command):
    """Runs `command` to make `target`, which appears whole or not at all."""
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise EmulatorError(f"{' '.join(command)}\n{done.stderr}")
        part.replace(target)
    return target


def build(*sources, glue=""):
    """Compiles .cu files, and `glue`: C++ that exports functions with EXPORT and so says how Python calls the launchers."""
    headers = [*(HERE / "include").glob("*.h"), *sorted(KERNELS.parent.rglob("*.h")), *sorted(KERNELS.rglob("*.cuh"))]
    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    common = _digest(version, *(h.read_text() for h in headers))
    cache = _cache()
    jobs = [
        (f"runtime_{path.stem}", path, RUNTIME, "".join(h.read_text() for h in (HERE / "runtime").glob("*.h")))
        for path in sorted((HERE / "runtime").glob("*.cpp"))
    ]
    jobs += [(Path(path).stem, Path(path), [*KERNEL, f"-I{Path(path).resolve().parent}"], "") for path in sources]
    if glue:
        text = f'#include "export.h"\n{glue}'
        path = cache / f"glue_{_digest(text)}.cpp"
        path.write_text(text)
        jobs.append(("glue", path, KERNEL, ""))

    def compile_one(job):
        name, path, flags, extra = job
        target = cache / f"{name}_{_digest(common, flags, extra, path.resolve(), path.read_text())}.o"
        return _make(target, [CXX, *flags, "-x", "c++", "-c", str(path)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    target = cache / f"lib_{_digest(*objects)}.so"
    return Library(_make(target, [CXX, "-shared", "-fsanitize=address,undefined", *map(str, objects)]))


# --- Calling


def empty(shape, dtype=np.float32):
    """An array full of NaN (of ones in every bit): what a kernel leaves out shows."""
    return np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


def _memory(array):
    """(address, bytes, offset from where its allocation begins) of an array's or a tensor's elements, gaps included."""
    if hasattr(array, "data_ptr"):
        size, strides, address = array.element_size(), [s * array.element_size() for s in array.stride()], array.data_ptr()
        offset = array.storage_offset() * size
    else:
        size, strides, address = array.itemsize, array.strides, array.ctypes.data
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        offset = address - base.ctypes.data
    if 0 in array.shape:
        return address, 0, 0
    if any(stride < 0 for stride in strides):
        raise ValueError("negative strides")
    return address, sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True)) + size, offset


def _buffers(pointers):
    """Joins arguments whose memory overlaps. pointers: {name: (array, writable)} -> buffers, {name: (buffer, offset)}."""
    spans = sorted((*_memory(array), name, writable) for name, (array, writable) in pointers.items())
    buffers, where = [], {}
    for address, size, offset, name, writable in spans:
        last = buffers[-1] if buffers else None
        if last and address < last.address + last.size:
            last.size = max(last.size, address + size - last.address)
            last.names.append(name)
            last.writable |= writable
        else:
            buffers.append(SimpleNamespace(address=address, size=size, offset=offset, names=[name], writable=writable))
        where[name] = len(buffers) - 1, address - buffers[-1].address
    return buffers, where


class Library:
    """A built library, and the process it runs in."""

    def __init__(self, path):
        self.path = path
        self.process = None
        self.signatures = {}

    def call(self, function, *, seeds=SEEDS, multiprocessors=4, shared_limit=227 << 10, timeout=300, **arguments):
        """Calls an exported function, once per seed from the same state; results that differ are an error.

        The device has so many multiprocessors, and this many bytes of shared memory for a block. A stream, or any pointer
        that is to be null, is None. Returns the counters of the first run: `.launches`, a list, and
        `.buffers`, by argument name.
        """
        names, types = self._signature(function)
        if set(names) != set(arguments):
            raise TypeError(f"{function}() takes {', '.join(names)}; given {', '.join(arguments)}")
        given = ((name, kind, arguments[name]) for name, kind in zip(names, types, strict=True))
        pointers = {name: (value, kind == "P") for name, kind, value in given if kind in "rP" and value is not None}
        buffers, where = _buffers(pointers)
        answer = self._ask(
            {
                "function": function,
                "seeds": tuple(seeds),
                "multiprocessors": multiprocessors,
                "shared_limit": shared_limit,
                "values": [where.get(name, arguments[name]) for name in names],
                "buffers": [
                    ("+".join(b.names), ctypes.string_at(b.address, b.size), b.offset % 256, b.writable) for b in buffers
                ],
            },
            timeout,
        )
        if "error" in answer:
            raise EmulatorError(answer["error"])
        for buffer, data in zip(buffers, answer["contents"], strict=True):
            if buffer.writable:
                ctypes.memmove(buffer.address, data, len(data))
        report = answer["report"]
        counters = [SimpleNamespace(**b) for b in report["buffers"]]
        return SimpleNamespace(
            launches=[SimpleNamespace(**launch) for launch in report["launches"]],
            buffers={name: counters[i] for name, (i, _) in where.items()},
        )

    def _signature(self, function):
        if function not in self.signatures:
            answer = self._ask({"describe": function}, 60)
            names = re.findall(r"(\w+)\s*(?:,|$)", answer["parameters"])
            self.signatures[function] = names, answer["types"]
        return self.signatures[function]

    def _start(self):
        runtime = [
            subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in ("libasan.so", "libstdc++.so")
        ]  # in this order: AddressSanitizer must find the C++ library's throw
        environment = dict(
            os.environ,
            LD_PRELOAD=":".join(runtime),
            UBSAN_OPTIONS="print_stacktrace=1",
            ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1",
        )
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(HERE / "worker.py"), str(self.path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def _ask(self, question, timeout):
        if self.process is None:
            self._start()
        data = pickle.dumps(question)
        try:
            self.process.stdin.write(struct.pack("q", len(data)) + data)
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                self.close()
                raise EmulatorError(f"no answer in {timeout} s: a kernel that never ends?")
            header = self.process.stdout.read(8)
            if header:
                return pickle.loads(self.process.stdout.read(struct.unpack("q", header)[0]))
        except BrokenPipeError:
            pass
        self.close()
        self.log.seek(0)
        raise EmulatorError(self.log.read().decode(errors="replace") or "the emulator's process died without a word")

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __del__(self):
        self.close()
