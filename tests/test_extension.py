"""Loading of the compiled extension, and what the package knows of its own build."""

import json
import re
import shutil
import subprocess
import warnings

import pytest
import torch

import movq_ext
from movq_ext import build_info
from movq_ext.ops import extension

COMPILED = build_info()["extension"] == "loaded"
needs_extension = pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")


def load_quietly(record):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded, reason = extension.load(record)
    return loaded, reason, [str(warning.message) for warning in caught]


RECORD = {"torch": "2.11.0+cu130", "minimum_torch": "2.11", "nvcc": "13.0", "arch_list": "8.0"}


def run_torch(monkeypatch, version, cuda):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    "version, cuda",
    [
        ("2.11.0+cu130", "13.0"),
        ("2.11.1", "13.2"),
        ("2.14.1+cu130", "13.0"),
        ("2.100.0", "13.9"),
        ("3.0", "13.0"),
        ("2.11.0a0+git1234", "13.0"),
        ("2.15.0.dev20261126+cu130", "13.0"),
    ],
)
def test_any_torch_from_the_minimum_on_loads_the_extension(monkeypatch, version, cuda):
    run_torch(monkeypatch, version, cuda)
    monkeypatch.setattr(extension, "import_module", lambda name: name)
    assert load_quietly(RECORD) == ("movq_ext._C", None, [])


def test_a_record_of_an_older_version_asks_to_reinstall(monkeypatch):
    run_torch(monkeypatch, "2.14.1+cu130", "13.0")
    record = {key: value for key, value in RECORD.items() if key != "minimum_torch"}
    reason = "movq_ext._C was compiled by an older movq_ext; reinstall movq_ext"
    assert load_quietly(record) == (None, reason, [f"{reason}. The native path is used instead."])


@pytest.mark.parametrize(
    "version, cuda, reason",
    [
        ("2.9.1+cu130", "13.0", "needs torch 2.11 or newer, but torch 2.9.1+cu130 is running"),
        ("2.2.0", "13.0", "needs torch 2.11 or newer, but torch 2.2.0 is running"),
        (
            "2.12.1+cu126",
            "12.6",
            "was compiled for CUDA 13, but torch 2.12.1+cu126 is running, a build for CUDA 12.6; "
            "reinstall movq_ext from source to compile it for that",
        ),
        (
            "2.15.0+cu140",
            "14.0",
            "was compiled for CUDA 13, but torch 2.15.0+cu140 is running, a build for CUDA 14.0; "
            "reinstall movq_ext from source to compile it for that",
        ),
        # Not worth a warning: that torch has no GPU tensors.
        ("2.13.0+cpu", None, "needs a torch for CUDA 13, but torch 2.13.0+cpu is running, a build without CUDA"),
    ],
)
def test_an_unsuitable_torch_gives_a_reason_and_loads_nothing(monkeypatch, version, cuda, reason):
    def never(name):
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(extension, "import_module", never)
    run_torch(monkeypatch, version, cuda)
    warned = [f"movq_ext._C {reason}. The native path is used instead."] if cuda else []
    assert load_quietly(RECORD) == (None, f"movq_ext._C {reason}", warned)


def test_a_build_without_kernels_does_not_warn():
    reason = "movq_ext was built without its CUDA kernels: MOVQ_EXT_CUDA=0"
    assert load_quietly({"torch": None, "reason": "MOVQ_EXT_CUDA=0"}) == (None, reason, [])


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_record_gives_a_reason(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    record = extension.read_record(tmp_path / "record.json")
    assert record["torch"] is None and str(tmp_path) in record["reason"]


def test_a_missing_record_gives_a_reason(tmp_path):
    assert "imported from its source folder" in extension.read_record(tmp_path / "none.json")["reason"]


def test_build_info():
    info = build_info()
    assert info["version"] == movq_ext.__version__
    assert (info["torch"], info["torch_cuda"]) == (torch.__version__, torch.version.cuda)
    assert len(info["devices"]) == torch.cuda.device_count()
    assert (extension.extension_reason() is None) == COMPILED == extension.extension_available()
    if COMPILED:
        assert info["minimum_torch"] == "2.11" and info["built_with_torch"] and info["arch_list"]
    json.dumps(info)


def test_a_device_without_code_is_named_with_the_compiled_architectures(monkeypatch):
    class Extension:
        def device_support(self, index):
            if index == 1:
                raise RuntimeError("busy")
            return {"device_capability": 75 + 15 * index, "binary_version": 80 if index else 0, "ptx_version": 0}

    extension.device_reason.cache_clear()
    monkeypatch.setattr(extension, "extension", Extension())
    monkeypatch.setattr(extension, "_record", {"arch_list": "8.0 9.0"})
    reason = "movq_ext._C was compiled for compute capability 8.0 9.0, but device 0 has 7.5"
    reason += "; reinstall movq_ext with TORCH_CUDA_ARCH_LIST=7.5"
    assert extension.device_reason(0) == reason
    assert extension.device_reason(1) == "device 1 cannot be queried: busy"
    assert extension.device_reason(2) is None
    extension.device_reason.cache_clear()


@needs_extension
def test_the_record_matches_the_extension():
    from movq_ext import _C

    compiled, info = _C.build_info(), build_info()
    assert compiled["torch"] == info["built_with_torch"].split("+")[0]
    assert f"{compiled['cuda'] // 1000}.{compiled['cuda'] % 1000 // 10}" == info["built_with_nvcc"]
    assert info["arch_list"]


@needs_extension
def test_the_extension_uses_only_the_stable_abi():
    """Symbols of libtorch's C++ interface work with one version of torch, those of the stable ABI with all later ones."""
    from movq_ext import _C

    if not (nm := shutil.which("nm")):
        pytest.skip("needs nm")
    table = subprocess.run([nm, "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in table.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.match(r"_Z.*(2at|3c10|5torch)", symbol)]


@needs_extension
def test_device_support():
    from movq_ext import _C

    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        support = _C.device_support(index)
        assert support["device_capability"] == 10 * major + minor
        assert 0 < support["binary_version"] <= 10 * major + minor
    with pytest.raises(RuntimeError, match=r"probe_device: cuda.*: "):
        _C.device_support(torch.cuda.device_count())
