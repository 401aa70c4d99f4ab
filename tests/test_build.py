"""Building, and what the package knows of its own build."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import movq_ext
from movq_ext import _extension, build_info

SOURCE = Path(__file__).resolve().parents[1]
COMPILED = build_info()["extension"] == "loaded"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a clone holds, away from the checkout, which a build would litter."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_record.json")
    return Path(shutil.copytree(SOURCE, folder / "movq_ext", ignore=ignore))


def build(source, out, what, **environment):
    """Run setuptools' backend as pip does without isolation; returns (exit status, log, the file built)."""
    script = f"import sys, setuptools.build_meta as backend; backend.build_{what}(sys.argv[1])"
    clean = {key: value for key, value in os.environ.items() if key not in ("MOVQ_EXT_CUDA", "CUDA_HOME", "CUDA_PATH")}
    run = subprocess.run([sys.executable, "-c", script, str(out)], cwd=source, env={**clean, **environment},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    return run.returncode, run.stdout, next(iter(Path(out).glob("*")), None)


@pytest.fixture(scope="module")
def native_wheel(source, tmp_path_factory):
    status, log, wheel = build(source, tmp_path_factory.mktemp("wheel"), "wheel", MOVQ_EXT_CUDA="0")
    assert status == 0, log
    return log, zipfile.ZipFile(wheel)


def package_files():
    ours = (SOURCE / "movq_ext").rglob("*")
    return {f"movq_ext/{path.relative_to(SOURCE / 'movq_ext').as_posix()}" for path in ours
            if path.is_file() and path.suffix not in (".pyc", ".so") and path.name != "_build_record.json"}  # fmt: skip


def test_wheel_holds_the_whole_package(native_wheel):
    _, wheel = native_wheel
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package_files() | {"movq_ext/_build_record.json"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_without_kernels_says_so_once_and_remembers(native_wheel):
    log, wheel = native_wheel
    assert log.count("movq_ext is installed without its CUDA kernels: MOVQ_EXT_CUDA=0") == 1
    assert json.loads(wheel.read("movq_ext/_build_record.json")) == {"torch": None, "reason": "MOVQ_EXT_CUDA=0"}
    assert not any("_C" in name for name in wheel.namelist())


def test_sdist_can_be_built_from(source, tmp_path):
    status, log, sdist = build(source, tmp_path / "sdist", "sdist", MOVQ_EXT_CUDA="0")
    assert status == 0, log
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder, suffixes in {"csrc": {".cpp", ".cu", ".h", ".cuh"}, "tests": {".py"}, "movq_ext": None}.items():
        for path in (source / folder).rglob("*"):
            if path.is_file() and (suffixes is None or path.suffix in suffixes):
                assert (unpacked / path.relative_to(source)).is_file(), path
    status, log, wheel = build(unpacked, tmp_path / "wheel", "wheel", MOVQ_EXT_CUDA="0")
    assert status == 0, log
    assert package_files() <= set(zipfile.ZipFile(wheel).namelist())


def test_forcing_the_extension_without_nvcc_is_an_error(source, tmp_path):
    elsewhere = shutil.copytree(source, tmp_path / "source")
    setup = (elsewhere / "setup.py").read_text()
    assert setup.count('"/usr/local/cuda"') == 1
    (elsewhere / "setup.py").write_text(setup.replace('"/usr/local/cuda"', '"/nowhere"'))  # this machine may have one there
    status, log, wheel = build(elsewhere, tmp_path / "wheel", "wheel", MOVQ_EXT_CUDA="1", PATH="/usr/bin:/bin")
    assert status != 0 and wheel is None
    assert "MOVQ_EXT_CUDA=1 asks for the CUDA extension, but nvcc was not found (looked for a CUDA toolkit in CUDA_HOME" in log


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc")
def test_forcing_the_extension_with_a_cpu_torch_is_an_error(source, tmp_path):
    status, log, wheel = build(source, tmp_path, "wheel", MOVQ_EXT_CUDA="1")
    assert status != 0 and wheel is None
    assert f"MOVQ_EXT_CUDA=1 asks for the CUDA extension, but torch {torch.__version__} is a build without CUDA" in log


def test_other_wishes_are_errors(source, tmp_path):
    status, log, _ = build(source, tmp_path, "wheel", MOVQ_EXT_CUDA="banana")
    assert status != 0
    assert "MOVQ_EXT_CUDA must be 0 or 1 or unset, got 'banana'" in log


def load_quietly(record):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extension, reason = _extension.load(record)
    return extension, reason, [str(warning.message) for warning in caught]


def test_another_torch_gives_one_warning_with_both_versions():
    extension, reason, messages = load_quietly({"torch": "2.9.0+cu130"})
    assert extension is None and len(messages) == 1
    assert messages[0] == f"{reason}. The native path is used instead."
    assert reason == (
        f"movq_ext._C was compiled against torch 2.9.0+cu130, but torch {torch.__version__} is running; "
        "reinstall movq_ext to compile it against the running torch"
    )


def test_a_build_without_kernels_does_not_warn():
    assert load_quietly({"torch": None, "reason": "MOVQ_EXT_CUDA=0"}) == (None, "movq_ext was built without CUDA kernels: MOVQ_EXT_CUDA=0", [])


def test_a_damaged_extension_gives_one_warning_and_the_native_path(native_wheel, tmp_path):
    """Garbage in place of the library, in a process of its own."""
    _, wheel = native_wheel
    wheel.extractall(tmp_path)
    (tmp_path / "movq_ext/_build_record.json").write_text(json.dumps({"torch": torch.__version__}))
    (tmp_path / "movq_ext/_C.abi3.so").write_bytes(b"no library")
    script = "import movq_ext, torch; print(movq_ext.build_info()['extension']); print(movq_ext.GroupNorm(2, 4)(torch.zeros(1, 4, 2, 2)).shape)"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("movq_ext._C cannot be loaded: ") and "torch.Size([1, 4, 2, 2])" in run.stdout
    assert run.stderr.count("RuntimeWarning: movq_ext._C cannot be loaded: ") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_record_is_a_reason(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    record = _extension.read_record(tmp_path / "record.json")
    assert record["torch"] is None and str(tmp_path) in record["reason"]


def test_no_record_is_a_reason(tmp_path):
    assert "imported from its source folder" in _extension.read_record(tmp_path / "none.json")["reason"]


def test_build_info():
    info = build_info()
    assert info["version"] == movq_ext.__version__
    assert (info["torch"], info["torch_cuda"]) == (torch.__version__, torch.version.cuda)
    assert len(info["devices"]) == torch.cuda.device_count()
    assert (info["built_with_torch"] == torch.__version__) == COMPILED
    json.dumps(info)


def test_the_extension_is_there_where_it_was_insisted_on():
    if os.environ.get("MOVQ_EXT_CUDA") != "1":
        pytest.skip("MOVQ_EXT_CUDA is not 1")
    assert build_info()["extension"] == "loaded"


@pytest.mark.skipif(not COMPILED, reason="no compiled extension")
def test_device_support():
    from movq_ext import _C

    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        support = _C.device_support(index)
        assert support["device_capability"] == 10 * major + minor
        assert 0 < support["binary_version"] <= 10 * major + minor
    with pytest.raises(RuntimeError, match="probe_device: cuda.*: "):
        _C.device_support(torch.cuda.device_count())
