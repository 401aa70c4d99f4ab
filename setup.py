"""Builds movq_ext, with the CUDA extension movq_ext._C where nvcc and a CUDA build of torch are found.

MOVQ_EXT_CUDA=1 insists on the extension, MOVQ_EXT_CUDA=0 leaves it out. TORCH_CUDA_ARCH_LIST and MAX_JOBS are torch's.
"""

import json
import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ARCH_LIST = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def import_torch():
    """The torch that the package will run with, or None.

    pip builds in an environment of its own, but an extension works only with the very torch it was compiled against: the
    one in the environment that is installed into. That one is where this interpreter keeps its packages.
    """
    for path in ("", sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if path and path not in sys.path:
            sys.path.append(path)
        try:
            import torch
        except ImportError:
            continue
        return torch
    return None


def find_cuda():
    """The folder of the CUDA toolkit, or None."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path and Path(on_path).parents[1], "/usr/local/cuda"]
    for home in (Path(home) for home in homes if home):
        # An nvcc alone is no toolkit: /usr/local/bin may hold a wrapper of one that lives elsewhere.
        if (home / "bin/nvcc").is_file() and [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]:
            return home
    return None


def plan():
    """(torch to compile against or None, why not, what the build environment lacks)."""
    wish = os.environ.get("MOVQ_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"MOVQ_EXT_CUDA must be 0 or 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "MOVQ_EXT_CUDA=0", []
    if not find_cuda():
        reason = "nvcc was not found (looked for a CUDA toolkit in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    elif not (torch := import_torch()):
        return None, "torch is not installed", ["torch>=2.11"]
    elif not torch.version.cuda:
        reason = f"torch {torch.__version__} is a build without CUDA"
    else:
        return torch, None, []
    if wish == "1":
        raise SetupError(f"MOVQ_EXT_CUDA=1 asks for the CUDA extension, but {reason}")
    return None, reason, []


def extension():
    os.environ["CUDA_HOME"] = str(find_cuda())  # read when cpp_extension is imported
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCH_LIST)
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "movq_ext._C",
        sources=sorted(glob("csrc/*.cpp") + glob("csrc/kernels/*.cu")),
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={"cxx": ["-O3", "-std=c++20"], "nvcc": ["-O3", "-std=c++20", "-lineinfo", "-Xptxas=-warn-spills"]},
    )


torch, reason, requires = plan()


class BuildPy(build_py):
    """Says once what is built, and leaves a record of it that can be read without loading the extension."""

    def run(self):
        super().run()
        if torch is None:
            if requires and os.environ.get("MOVQ_EXT_CUDA") == "1":
                raise SetupError(f"MOVQ_EXT_CUDA=1 asks for the CUDA extension, but {reason}")
            self.warn(f"movq_ext is installed without its CUDA kernels: {reason}")
            record = {"torch": None, "reason": reason}
        else:
            record = {"torch": torch.__version__, "cuda": torch.version.cuda, "arch_list": os.environ["TORCH_CUDA_ARCH_LIST"]}
            self.warn(f"movq_ext is compiled with its CUDA kernels: {record}")
        root = Path("." if self.editable_mode else self.build_lib)
        (root / "movq_ext" / "_build_record.json").write_text(json.dumps(record))


commands = {"build_py": BuildPy}
extensions = []
if torch is not None:
    extensions.append(extension())
    from torch.utils.cpp_extension import BuildExtension

    commands["build_ext"] = BuildExtension

setup(
    ext_modules=extensions,
    cmdclass=commands,
    setup_requires=requires,  # what pip adds to its build environment
)
