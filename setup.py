"""Build movq_ext, and the CUDA extension movq_ext._C if there are a CUDA toolkit and a CUDA build of torch.

MOVQ_EXT_CUDA=1 requires the extension, MOVQ_EXT_CUDA=0 leaves it out. CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS work as for
torch.utils.cpp_extension.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ARCH_LIST = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
MINIMUM_TORCH = (2, 11)  # whose stable ABI the extension is compiled for: it runs with this and every later version


class NoExtensionError(Exception):
    """The extension cannot be compiled, for the reason in the message."""


def find_toolkit():
    """Return the folder of the CUDA toolkit, or raise NoExtensionError."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        homes, looked = [Path(home)], home
    else:
        nvcc = shutil.which("nvcc")
        homes = [path.parents[1] for path in (Path(nvcc), Path(nvcc).resolve())] if nvcc else []
        homes.append(Path("/usr/local/cuda"))
        looked = "PATH and /usr/local/cuda; CUDA_HOME and CUDA_PATH are not set"
    for home in homes:
        # Look for headers too: the nvcc on PATH may be a wrapper around a toolkit that lives elsewhere.
        headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
        if (home / "bin/nvcc").is_file() and headers:
            return home
    raise NoExtensionError(f"no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found: looked in {looked}")


def nvcc_output(toolkit, option):
    try:
        return subprocess.run([toolkit / "bin/nvcc", option], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoExtensionError(f"{toolkit / 'bin/nvcc'} does not run: {error}") from error


def find_torch():
    """Return the torch that the package will run with, or None if it is not installed yet.

    The extension works only with torches of one CUDA major version, but pip builds in an isolated environment that hides the
    installed one. So ask this interpreter for its search path without that environment.
    """
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    script = "import json, sys; print(json.dumps(sys.path))"
    paths = subprocess.run([sys.executable, "-P", "-c", script], env=outside, check=True, capture_output=True, text=True).stdout
    sys.path += [path for path in json.loads(paths) if path not in sys.path]
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return None
        raise NoExtensionError(f"torch cannot be imported: {error}") from error
    except (ImportError, OSError) as error:
        raise NoExtensionError(f"torch cannot be imported: {error}") from error
    return torch


def plan_extension():
    """Return the build record (the versions to compile with, or why not to compile) and the packages that the build requires."""
    setting = os.environ.get("MOVQ_EXT_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SetupError(f"MOVQ_EXT_CUDA must be 0, 1 or unset, got {setting!r}")
    if setting == "0":
        return {"torch": None, "reason": "MOVQ_EXT_CUDA=0"}, []
    try:
        toolkit = find_toolkit()
        release = re.search(r"release (\d+)\.(\d+)", nvcc_output(toolkit, "--version"))
        nvcc = ".".join(release.groups()) if release else "of unknown version"
        torch = find_torch()
        if torch is None:
            # pip reads the requirements first, and then runs this file again in a build environment that has them.
            return {"torch": None, "reason": "torch is not installed"}, [f"torch>={dotted(MINIMUM_TORCH)}"]
        if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < MINIMUM_TORCH:
            raise NoExtensionError(f"torch {torch.__version__} is older than {dotted(MINIMUM_TORCH)}")
        if not torch.version.cuda:
            raise NoExtensionError(f"torch {torch.__version__} is a build without CUDA")
        if torch.version.cuda.split(".")[0] != nvcc.split(".")[0]:
            raise NoExtensionError(f"torch {torch.__version__} needs an nvcc of CUDA {torch.version.cuda}, got {nvcc}")
        if find_spec("pybind11") is None:  # only without build isolation
            raise NoExtensionError("pybind11 is not installed")
    except NoExtensionError as reason:
        return {"torch": None, "reason": str(reason)}, []
    os.environ["CUDA_HOME"] = str(toolkit)  # cpp_extension reads it on import
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_arch_list(toolkit)
    os.environ["TORCH_CUDA_ARCH_LIST"] = with_hopper_instructions(arch_list)
    built = {"torch": torch.__version__, "minimum_torch": dotted(MINIMUM_TORCH), "nvcc": nvcc}
    return {**built, "arch_list": os.environ["TORCH_CUDA_ARCH_LIST"]}, []


def dotted(version):
    return ".".join(map(str, version))


def default_arch_list(toolkit):
    """Return the architectures of ARCH_LIST that this nvcc supports, with PTX of the last for newer GPUs."""
    known = nvcc_output(toolkit, "--list-gpu-arch").split()
    return " ".join(arch for arch in ARCH_LIST if f"compute_{arch.replace('.', '')}" in known) + "+PTX"


def with_hopper_instructions(arch_list):
    """Replace 9.0 with 9.0a. Its code runs on the same GPUs and may use wgmma, as shared_kv_forward.cu and its backward do.

    PTX stays 9.0: newer GPUs cannot compile PTX of 9.0a.
    """
    arch_list = re.sub(r"\b(9\.0\+PTX|Hopper)(?=[; ]|$)", "9.0a;9.0+PTX", arch_list)
    return re.sub(r"\b9\.0(?=[; ]|$)", "9.0a", arch_list)


record, requires = plan_extension()


class BuildPy(build_py):
    """Report once what is built, and write a build record that can be read without loading the extension."""

    def run(self):
        super().run()
        if record["torch"] is None:
            if os.environ.get("MOVQ_EXT_CUDA") == "1":
                raise SetupError(f"MOVQ_EXT_CUDA=1 requires the CUDA extension, but {record['reason']}")
            self.warn(f"movq_ext is built without its CUDA kernels: {record['reason']}")
        else:
            self.warn("movq_ext is built with its CUDA kernels: torch {torch}, nvcc {nvcc}, for {arch_list}".format_map(record))
        root = Path("." if self.editable_mode else self.build_lib)
        (root / "movq_ext" / "_build_record.json").write_text(json.dumps(record))


def extension():
    """Return the arguments of setup() that compile movq_ext._C."""
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    class BuildExt(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Without force, setuptools keeps a library newer than our sources even if torch's headers changed since. ninja
            # rebuilds only what is out of date, and each torch has its own folder of objects.
            self.force = True
            self.build_temp = str(Path(self.build_temp) / f"torch-{record['torch']}")

    stable = [
        "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MINIMUM_TORCH),  # a later addition is a compile error
        "-DUSE_CUDA",  # declares the functions for CUDA in torch's C interface
    ]
    module = CUDAExtension(
        "movq_ext._C",
        sources=sorted(glob("csrc/*.cpp") + glob("csrc/kernels/*.cu")),
        # pybind11 itself: torch 2.11's copy of it refuses to be compiled for the stable ABI.
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", *stable],
            "nvcc": ["-O3", "-std=c++20", "-lineinfo", "-Xptxas=-warn-spills"],
        },
    )
    return {"ext_modules": [module], "cmdclass": {"build_py": BuildPy, "build_ext": BuildExt}}


setup(setup_requires=requires, **(extension() if record["torch"] else {"cmdclass": {"build_py": BuildPy}}))
