"""Loading of the compiled extension, and what the package knows of its own build."""

import json
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


def test_another_torch_gives_one_warning_with_both_versions(monkeypatch):
    def never(name):
        raise AssertionError("a library of another torch was loaded")

    monkeypatch.setattr(extension, "import_module", never)
    for other in ("2.9.0+cu130", torch.__version__ + "x"):
        loaded, reason, messages = load_quietly({"torch": other})
        assert loaded is None and messages == [f"{reason}. The native path is used instead."]
        assert reason == (
            f"movq_ext._C was compiled against torch {other}, but torch {torch.__version__} is running; "
            "reinstall movq_ext to compile it against the running torch"
        )


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
    assert (info["built_with_torch"] == torch.__version__) == COMPILED == extension.extension_available()
    assert (extension.extension_reason() is None) == COMPILED
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
def test_device_support():
    from movq_ext import _C

    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        support = _C.device_support(index)
        assert support["device_capability"] == 10 * major + minor
        assert 0 < support["binary_version"] <= 10 * major + minor
    with pytest.raises(RuntimeError, match=r"probe_device: cuda.*: "):
        _C.device_support(torch.cuda.device_count())
