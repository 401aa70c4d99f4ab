"""Run CUDA kernels on the CPU, from their own source; report their errors and count their memory accesses and instructions.

    library = emulator.build("csrc/kernels/scale.cu", glue='''
        EXPORT(scale, const float* x, float* y, int64_t n) { movq::scale(x, y, n, nullptr); }
    ''')
    result = library.call("scale", x=x, y=y, n=x.numel())   # numpy arrays or torch tensors; writes y in place
    assert result.buffers["x"].read_bytes == x.nbytes

README.md lists the checks and the counters.
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
# The runtime is not instrumented: it may access device memory, which is poisoned for instrumented code.
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
    """A kernel failed a check, or its launcher raised."""


def available():
    """Return True if the emulator can be built here."""
    return sys.platform == "linux" and shutil.which(CXX) is not None


# --- Building


def _cache_folder():
    base = os.environ.get("MOVQ_EMULATOR_CACHE") or Path.home() / ".cache" / "movq_ext" / "emulator"
    Path(base).mkdir(parents=True, exist_ok=True)
    return Path(base)


def _digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def _compile(target, command):
    """Write `target` with `command` unless it exists. The write is atomic."""
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        compiler = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if compiler.returncode:
            raise EmulatorError(f"{' '.join(command)}\n{compiler.stderr}")
        part.replace(target)
    return target


def build(*sources, glue=""):
    """Compile .cu files and `glue`, C++ code whose EXPORT functions call the launchers for Python. Returns a Library."""
    headers = [*(HERE / "include").glob("*.h"), *sorted(KERNELS.parent.rglob("*.h")), *sorted(KERNELS.rglob("*.cuh"))]
    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    common = _digest(version, *(h.read_text() for h in headers))
    cache = _cache_folder()
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
        return _compile(target, [CXX, *flags, "-x", "c++", "-c", str(path)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    target = cache / f"lib_{_digest(*objects)}.so"
    return Library(_compile(target, [CXX, "-shared", "-fsanitize=address,undefined", *map(str, objects)]))


# --- Calling


def empty(shape, dtype=np.float32):
    """Return an array of NaN (all bits set), in which elements that a kernel does not write stand out."""
    return np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


def _memory(array):
    """Return the address, size and offset in its allocation of an array's or a tensor's elements, in bytes, including gaps."""
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
        raise ValueError(f"expected strides that are not negative, got {strides}")
    return address, sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True)) + size, offset


def _item_size(array):
    return array.element_size() if hasattr(array, "data_ptr") else array.itemsize


def _buffers(pointers):
    """Merge arguments whose memory overlaps: {name: (array, writable)} becomes buffers and {name: (buffer index, offset)}."""
    spans = sorted((*_memory(array), name, writable) for name, (array, writable) in pointers.items())
    buffers, locations = [], {}
    for address, size, offset, name, writable in spans:
        last = buffers[-1] if buffers else None
        if last and address < last.address + last.size:
            last.size = max(last.size, address + size - last.address)
            last.names.append(name)
            last.writable |= writable
        else:
            buffers.append(SimpleNamespace(address=address, size=size, offset=offset, names=[name], writable=writable))
        locations[name] = len(buffers) - 1, address - buffers[-1].address
    return buffers, locations


class Library:
    """A built library and the process it runs in."""

    def __init__(self, path):
        self.path = path
        self.process = None
        self.signatures = {}

    def call(
        self,
        function,
        *,
        seeds=SEEDS,
        multiprocessors=4,
        shared_limit=227 << 10,
        dependent_launches=True,
        timeout=300,
        windows=None,
        run_blocks=None,
        **arguments,
    ):
        """Call an exported function once per seed, from the same state each time, and write the results into the arrays.

        The emulated device has `multiprocessors` and `shared_limit` bytes of shared memory per block, and launches dependent
        kernels unless told otherwise. None is a null pointer.
        For tensors that are too large to allocate, an array may hold a window of one: `windows` maps its name to the index of its
        first element in the tensor, and `run_blocks` maps a kernel to the range (first, end) of its blocks to run.
        Returns the counters of the first run: `.launches` in order, `.buffers` by argument name, `.device_queries` and
        `.encoded_tensor_maps`.
        Raises EmulatorError if a check fails, if results differ between seeds, or after `timeout` seconds.
        """
        names, types = self._signature(function)
        if set(names) != set(arguments):
            raise TypeError(f"{function}() takes {', '.join(names)}, got {', '.join(arguments)}")
        given = ((name, kind, arguments[name]) for name, kind in zip(names, types, strict=True))
        pointers = {name: (value, kind == "P") for name, kind, value in given if kind in "rP" and value is not None}
        buffers, locations = _buffers(pointers)
        for name, first in (windows or {}).items():
            index, offset = locations[name]
            locations[name] = index, offset - first * _item_size(arguments[name])
        answer = self._ask(
            {
                "function": function,
                "seeds": tuple(seeds),
                "multiprocessors": multiprocessors,
                "shared_limit": shared_limit,
                "dependent_launches": dependent_launches,
                "run_blocks": run_blocks or {},
                "values": [locations.get(name, arguments[name]) for name in names],
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
            buffers={name: counters[i] for name, (i, _) in locations.items()},
            device_queries=report["device_queries"],
            encoded_tensor_maps=report["encoded_tensor_maps"],
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
        ]  # in this order, so that AddressSanitizer finds the throw of the C++ library
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
                raise EmulatorError(f"no answer after {timeout} s: the kernel may never end")
            header = self.process.stdout.read(8)
            if header:
                return pickle.loads(self.process.stdout.read(struct.unpack("q", header)[0]))
        except BrokenPipeError:
            pass
        self.close()
        self.log.seek(0)
        raise EmulatorError(self.log.read().decode(errors="replace") or "the emulator's process died without a message")

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __del__(self):
        self.close()
