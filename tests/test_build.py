"""The build: wheels, sdists, the extension's requirements, and imports from a source folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import movq_ext
from movq_ext import build_info

SOURCE = Path(__file__).resolve().parents[1]
COMPILED = build_info()["extension"] == "loaded"
NOWHERE = {"CUDA_HOME": "/nowhere"}  # no toolkit there


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a clone contains, so that builds do not litter the checkout."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns(".[!c]*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_record.json")
    return Path(shutil.copytree(SOURCE, folder / "movq_ext", ignore=ignore))


@pytest.fixture
def toolkit(tmp_path):
    """A stand-in for CUDA 13.0: enough to be found, not to compile."""
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/include").mkdir()
    (tmp_path / "cuda/include/cuda_runtime.h").touch()
    answers = "compute_80 compute_90 compute_100 Cuda compilation tools, release 13.0, V13.0.88"
    (tmp_path / "cuda/bin/nvcc").write_text(f"#!/bin/sh\necho '{answers}'\n")
    (tmp_path / "cuda/bin/nvcc").chmod(0o755)
    return tmp_path / "cuda"


def stand_in_for_torch(folder, version, cuda):
    (folder / "torch/utils").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(f"__version__ = {version!r}\nclass version: cuda = {cuda!r}\n")
    (folder / "torch/utils/cpp_extension.py").write_text(
        "class BuildExtension: pass\ndef CUDAExtension(name, **args): return args\n"
    )
    return {"PYTHONPATH": str(folder)}


def backend(hook, source, *args, **environment):
    """Call a hook of setuptools' backend as pip does without isolation; return (exit status, log, the hook's result)."""
    script = f"import json, sys, setuptools.build_meta as backend; print(json.dumps(backend.{hook}(*sys.argv[1:])))"
    clean = {key: value for key, value in os.environ.items() if key not in ("MOVQ_EXT_CUDA", "CUDA_HOME", "CUDA_PATH")}
    run = subprocess.run([sys.executable, "-c", script, *map(str, args)], cwd=source, env={**clean, **environment},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    return run.returncode, run.stdout, None if run.returncode else json.loads(run.stdout.splitlines()[-1])


def build(kind, source, out, **environment):
    """Build a wheel, sdist or editable; return the log and the path of the file."""
    out.mkdir()
    status, log, name = backend(f"build_{kind}", source, out, **environment)
    assert status == 0, log
    return log, out / name


@pytest.fixture(scope="module")
def native_wheel(source, tmp_path_factory):
    log, wheel = build("wheel", source, tmp_path_factory.mktemp("wheel") / "out", **NOWHERE)
    return log, zipfile.ZipFile(wheel)


def package_files(source):
    return {path.relative_to(source).as_posix() for path in (source / "movq_ext").rglob("*") if path.is_file()}


def test_wheel_holds_the_whole_package(source, native_wheel):
    _, wheel = native_wheel
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package_files(source) | {"movq_ext/_build_record.json"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_without_kernels_warns_once_and_records_why(native_wheel):
    log, wheel = native_wheel
    reason = "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found: looked in /nowhere"
    assert log.count("movq_ext is built without its CUDA kernels") == log.count(reason) == 1
    assert json.loads(wheel.read("movq_ext/_build_record.json")) == {"torch": None, "reason": reason}


def test_a_wheel_can_be_built_from_the_sdist(source, tmp_path):
    _, sdist = build("sdist", source, tmp_path / "sdist", **NOWHERE)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder in (".ci", "csrc", "docs", "examples", "movq_ext", "tests"):
        for path in (source / folder).rglob("*"):
            assert (unpacked / path.relative_to(source)).exists(), path
    documents = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff"}
    assert documents <= {path.name for path in unpacked.iterdir()}
    log, wheel = build("wheel", unpacked, tmp_path / "wheel", MOVQ_EXT_CUDA="0")
    assert log.count("movq_ext is built without its CUDA kernels: MOVQ_EXT_CUDA=0") == 1
    assert package_files(source) <= set(zipfile.ZipFile(wheel).namelist())


def test_an_editable_install_has_a_build_record(source, tmp_path):
    elsewhere = shutil.copytree(source, tmp_path / "source")
    build("editable", elsewhere, tmp_path / "out", MOVQ_EXT_CUDA="0")
    assert json.loads((elsewhere / "movq_ext/_build_record.json").read_text())["reason"] == "MOVQ_EXT_CUDA=0"


def test_other_settings_are_errors(source, tmp_path):
    status, log, _ = backend("build_wheel", source, tmp_path, MOVQ_EXT_CUDA="banana")
    assert status != 0 and "MOVQ_EXT_CUDA must be 0, 1 or unset, got 'banana'" in log


def required_build_error(source, out, **environment):
    """Return the reason why a build that requires the extension fails."""
    status, log, _ = backend("build_wheel", source, out, MOVQ_EXT_CUDA="1", **environment)
    assert status != 0 and not [*out.glob("*.whl")]
    (error,) = [line for line in log.splitlines() if "MOVQ_EXT_CUDA=1 requires the CUDA extension, but " in line]
    return error.split("extension, but ")[1]


def test_requiring_the_extension_without_nvcc_is_an_error(source, tmp_path):
    looked = "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found: looked in "
    assert required_build_error(source, tmp_path, **NOWHERE) == looked + "/nowhere"
    if not Path("/usr/local/cuda").exists():
        everywhere = "PATH and /usr/local/cuda; CUDA_HOME and CUDA_PATH are not set"
        assert required_build_error(source, tmp_path, PATH="/usr/bin:/bin") == looked + everywhere


def test_requiring_the_extension_with_another_torch_is_an_error(source, tmp_path, toolkit):
    cases = {
        "torch 2.14.1+cpu is a build without CUDA": ("2.14.1+cpu", None),
        "torch 2.11.0+cu126 needs an nvcc of CUDA 12.6, got 13.0": ("2.11.0+cu126", "12.6"),
        "torch 2.9.1+cu130 is older than 2.11": ("2.9.1+cu130", "13.0"),
    }
    for reason, (version, cuda) in cases.items():
        other = stand_in_for_torch(tmp_path / version, version, cuda)
        assert required_build_error(source, tmp_path, CUDA_HOME=str(toolkit), **other) == reason
        log, _ = build("wheel", source, tmp_path / f"{version}-out", CUDA_HOME=str(toolkit), **other)  # MOVQ_EXT_CUDA is unset
        assert log.count(f"movq_ext is built without its CUDA kernels: {reason}") == 1


def test_requiring_the_extension_without_pybind11_is_an_error(source, tmp_path, toolkit):
    torch = stand_in_for_torch(tmp_path / "torch", "2.14.1+cu130", "13.0")
    (tmp_path / "torch/sitecustomize.py").write_text("import sys\nsys.modules['pybind11'] = None\n")
    assert required_build_error(source, tmp_path, CUDA_HOME=str(toolkit), **torch) == "pybind11 is not installed"


@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        (None, "8.0 9.0a 10.0+PTX"),  # all that nvcc supports
        ("", "8.0 9.0a 10.0+PTX"),
        ("7.5;8.6", "7.5;8.6"),
        ("8.0 9.0", "8.0 9.0a"),  # 9.0a has Hopper's wgmma
        ("9.0;10.0+PTX", "9.0a;10.0+PTX"),
        ("9.0a", "9.0a"),
        ("8.0;9.0+PTX", "8.0;9.0a;9.0+PTX"),  # newer GPUs cannot compile PTX of 9.0a
        ("Hopper", "9.0a;9.0+PTX"),
    ],
)
def test_sources_and_architectures(source, tmp_path, toolkit, wanted, built):
    script = (
        "import json, runpy, setuptools; setuptools.setup = lambda **arguments: None; setup = runpy.run_path('setup.py');"
        "module = setup['extension']()['ext_modules'][0]; print(json.dumps([setup['record'], module['sources'],"
        "module['extra_compile_args']['cxx'], module['include_dirs']]))"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("MOVQ_EXT_CUDA", "TORCH_CUDA_ARCH_LIST")}
    environment = {**clean, "CUDA_HOME": str(toolkit), **stand_in_for_torch(tmp_path, "2.14.1+cu130", "13.0")}
    if wanted is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = wanted
    run = subprocess.run([sys.executable, "-c", script], cwd=source, env=environment, capture_output=True, text=True, check=True)
    record, sources, flags, include = json.loads(run.stdout)
    assert record == {"torch": "2.14.1+cu130", "minimum_torch": "2.11", "nvcc": "13.0", "arch_list": built}
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in flags  # 2.11: torch 2.14 would let us use what 2.11 lacks
    assert any(Path(path, "pybind11/pybind11.h").is_file() for path in include)  # torch 2.11's copy refuses that target version
    compiled = [*source.glob("csrc/*.cpp"), *source.glob("csrc/kernels/*.cu")]
    assert sources == sorted(path.relative_to(source).as_posix() for path in compiled) and len(sources) >= 2


def test_the_build_requires_torch_only_if_it_is_missing_and_an_extension_can_be_compiled(source, tmp_path, toolkit):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('hidden', name='torch')")
    hidden = {"PYTHONPATH": str(tmp_path)}
    for expected, environment in [
        (["torch>=2.11"], {"CUDA_HOME": str(toolkit), **hidden}),
        (["torch>=2.11"], {"CUDA_HOME": str(toolkit), **hidden, "MOVQ_EXT_CUDA": "1"}),
        ([], {**NOWHERE, **hidden}),
        ([], {"CUDA_HOME": str(toolkit), **hidden, "MOVQ_EXT_CUDA": "0"}),
        ([], {"CUDA_HOME": str(toolkit), "MOVQ_EXT_CUDA": ""}),
    ]:
        status, log, requires = backend("get_requires_for_build_wheel", source, **environment)
        assert status == 0, log
        assert requires == expected, environment
    assert required_build_error(source, tmp_path, CUDA_HOME=str(toolkit), **hidden) == "torch is not installed"


def test_an_isolated_build_finds_the_torch_beside_the_interpreter(source, tmp_path, toolkit):
    """pip hides the installed packages with a sitecustomize.py. A build that required torch would get another than the user's."""
    hide = "import sys\nsys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    for package in [*Path(setuptools.__file__).parents[1].glob("setuptools*")]:
        (tmp_path / package.name).symlink_to(package)
    isolated = {"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1", "CUDA_HOME": str(toolkit)}
    hidden = subprocess.run(
        [sys.executable, "-c", "import torch"], env={**os.environ, **isolated}, capture_output=True, text=True
    )
    assert "No module named 'torch'" in hidden.stderr
    status, log, requires = backend("get_requires_for_build_wheel", source, **isolated)
    assert (status, requires) == (0, []), log


def test_a_damaged_extension_gives_one_warning_and_the_native_path(native_wheel, tmp_path):
    """Runs in a separate process, with garbage in place of the library."""
    _, wheel = native_wheel
    wheel.extractall(tmp_path)
    record = {"torch": "2.11.0+cu130", "minimum_torch": "2.11", "nvcc": "13.0", "arch_list": "8.0"}
    (tmp_path / "movq_ext/_build_record.json").write_text(json.dumps(record))
    (tmp_path / f"movq_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
    script = "import torch; torch.version.cuda = '13.0'; import movq_ext; print(movq_ext.build_info()['extension'])"
    script += "; print(movq_ext.GroupNorm(2, 4)(torch.zeros(1, 4, 2, 2)).shape)"
    run = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout.startswith("movq_ext._C cannot be loaded: ") and "torch.Size([1, 4, 2, 2])" in run.stdout
    assert run.stderr.count("RuntimeWarning: movq_ext._C cannot be loaded: ") == 1


def start_python_in(folder, **environment):
    """Import movq_ext as a REPL in this folder would, which searches the folder first. Return (package's folder, stderr)."""
    script = "import movq_ext; print(movq_ext.__file__)"
    unsafe = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, env={**unsafe, **environment},
                         capture_output=True, text=True, check=True)  # fmt: skip
    return Path(run.stdout.strip()).resolve().parent, run.stderr


def test_a_source_folder_that_hides_an_installed_copy_warns_once_with_both_paths(source, tmp_path):
    source, (installed, log) = source.resolve(), start_python_in(tmp_path)
    assert installed == Path(movq_ext.__file__).resolve().parent and "RuntimeWarning" not in log
    imported, log = start_python_in(source)
    assert imported == source / "movq_ext"
    message = f"imported from its source folder, {imported}, which hides the installed copy, {installed}."
    assert log.count("RuntimeWarning") == log.count(message) == 1
    imported, log = start_python_in(source, PYTHONSAFEPATH="1")
    assert imported == installed and "RuntimeWarning" not in log


def test_the_required_extension_is_loaded():
    if os.environ.get("MOVQ_EXT_CUDA") != "1":
        pytest.skip("MOVQ_EXT_CUDA is not 1")
    assert build_info()["extension"] == "loaded"
