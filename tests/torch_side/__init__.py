"""The torch side of csrc, compiled for CPU tensors with loops in place of the kernels: torch.ops.torch_side.*.

It shows, without a GPU, what one would be given: checks and their messages, layouts, copies, strides of results, device, stream.
"""

import atexit
import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import emulator
import pybind11
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent


operators = torch.ops.torch_side


@functools.cache
def build():
    """Compile and load the library in under a minute; return (the Python module, the fake CUDA runtime)."""
    folder = Path(tempfile.mkdtemp(prefix="torch_side"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    include = [HERE, HERE / "include", CSRC, pybind11.get_include(), TORCH / "include", sysconfig.get_path("include")]
    defines = ["USE_CUDA", "TORCH_EXTENSION_NAME=_C", "TORCH_TARGET_VERSION=0x020b000000000000"]
    flags = ["-std=c++20", "-O1", "-fPIC", *(f"-I{path}" for path in include), *(f"-D{name}" for name in defines)]
    sources = [*CSRC.glob("*.cpp"), CSRC / "kernels/probe.cu", *HERE.glob("*.cpp")]
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    for path, target in zip(sources, objects, strict=True):
        subprocess.run([emulator.CXX, *flags, "-include", "fake_cuda.h", "-x", "c++", "-c", str(path), "-o", target], check=True)
    library = folder / "_C.so"
    torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([emulator.CXX, "-shared", *objects, *torch_libraries, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("torch_side._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fake = ctypes.CDLL(str(library))
    fake.take_events.restype = ctypes.c_char_p
    return module, fake


def sliced(x):
    """Return x with gaps between its elements and an unaligned address."""
    padded = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    padded[..., 1::2] = x
    return padded[..., 1::2]
