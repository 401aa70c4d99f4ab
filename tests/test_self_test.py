"""The self test of the kernels, with right and wrong ones planted in place of those for a GPU."""

import re
import warnings

import emulator
import pytest
import torch
from kernels import usable
from kernels.spatial_norm import Clip, Emulator
from operators import needs_extension, needs_gpu
from pretend_gpu import RIGHT, Kernels, PretendGpu
from tolerances import assert_close
from torch._subclasses import FakeTensorMode

import movq_ext
from movq_ext.ops import attention_backends, extension, paths, self_test
from movq_ext.ops.self_test import CALLS, self_test_failure

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = list(self_test.TOLERANCES)
OPERATOR_OF = {  # the others belong to upsampling
    name: next((op for op in sorted(CALLS, key=len, reverse=True) if op in name.replace("shared_kv_", "")), "upsample_conv")
    for name in RIGHT
}
SHARED_KV = {"shared_kv_attention_forward", "shared_kv_attention_backward"}


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(self_test, "_results", {})
    for module in (paths, attention_backends):
        monkeypatch.setattr(module, "device_reason", lambda index: None)
    monkeypatch.delenv(self_test.VARIABLE, raising=False)
    extension.warn_once.cache_clear()
    return Kernels(monkeypatch)


def attention_inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 5, 16, generator=generator).as_subclass(PretendGpu) for _ in range(3)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CALLS)
def test_right_kernels_pass_and_are_tested_once(kernels, operator, dtype, channels_last):
    assert self_test_failure(operator, CPU, dtype, channels_last) is None
    called = dict(kernels.calls)
    names = {name for name, op in OPERATOR_OF.items() if op == operator}
    assert {name for name, count in called.items() if count} == (SHARED_KV if operator == "hopper_attention" else names)
    assert self_test_failure(operator, CPU, dtype, channels_last) is None and kernels.calls == called
    self_test_failure(operator, CPU, next(other for other in DTYPES if other != dtype), channels_last)
    assert kernels.calls != called


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_wrong_kernel_is_described_with_both_figures(kernels, name, dtype):
    kernels.plant_error_of(name, lambda result: result.mul_(1.5))
    failure = self_test_failure(OPERATOR_OF[name], CPU, dtype, True)
    assert failure.startswith(f"the self test of {name} on cpu in {str(dtype)[6:]}")
    assert "found relative error 0.5 in result 0, expected at most" in failure and "norm" in failure
    assert ("channels_last" in failure) == ("attention" not in name)


def test_one_wrong_element_in_the_last_result_is_found(kernels):
    kernels.plant_error_of("attention_backward", lambda result: result[..., -1, -1].add_(2))
    assert "attention_backward" in self_test_failure("attention", CPU, torch.bfloat16, False)


def test_nan_is_a_failure(kernels):
    kernels.plant_error_of("add_bias_residual_", lambda result: result[0, 0, 0, 0].fill_(float("nan")))
    assert "relative error nan" in self_test_failure("add_bias_residual_", CPU, torch.float32, False)


def test_an_error_of_a_kernel_is_a_failure(kernels):
    def fails(*arguments):
        raise RuntimeError("CUDA error: misaligned address\nCompile with `TORCH_USE_CUDA_DSA`")

    kernels.plant("spatial_norm_backward", fails)
    failure = self_test_failure("spatial_norm", CPU, torch.float16, False)
    expected = "the self test of spatial_norm_backward on cpu in float16, NCHW failed: CUDA error: misaligned address"
    assert failure == expected


def test_an_error_that_appears_when_the_results_are_read_is_a_failure(kernels):
    """Launches are asynchronous."""

    class Unreadable(torch.Tensor):
        def cpu(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    kernels.plant("attention_forward", lambda *arguments: [torch.zeros(1).as_subclass(Unreadable)])
    assert self_test_failure("attention", CPU, torch.float32, False).endswith(
        "failed: CUDA error: an illegal memory access was encountered"
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])  # PyTorch's operators raise one, ours the other
def test_running_out_of_memory_is_no_failure(kernels, error):
    """It says nothing about the kernels: the next call tests them."""

    def fails(*arguments):
        raise error("CUDA out of memory")

    kernels.plant("attention_forward", fails)
    assert self_test_failure("attention", CPU, torch.float32, False) is None and not self_test._results
    kernels.plant_error_of("attention_forward", lambda result: result.add_(1))
    assert "attention_forward" in self_test_failure("attention", CPU, torch.float32, False)


def test_a_wrong_kernel_is_replaced_by_the_native_path_with_one_warning(kernels):
    kernels.plant_error_of("attention_forward", lambda result: result.add_(1))
    q, k, v = attention_inputs()
    expected = (q.double() @ k.double().mT * 0.25).softmax(3) @ v.double()
    with pytest.warns(RuntimeWarning, match="movq_ext runs PyTorch's own operators: the self test of attention_forward") as seen:
        out = movq_ext.attention(q, k, v)
    assert len(seen) == 1
    assert_close(out, expected, slack=2)
    called = dict(kernels.calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        movq_ext.attention(q, k, v)
    assert kernels.calls == called
    assert movq_ext.explain(q, "attention").startswith("native: the self test of attention_forward on cpu in float32 found")


def test_a_right_kernel_runs(kernels):
    q, k, v = attention_inputs()
    assert self_test_failure("attention", CPU, torch.float32, False) is None
    called = kernels.calls["attention_forward"]
    movq_ext.attention(q, k, v)
    assert kernels.calls["attention_forward"] == called + 1


def test_the_variable_leaves_the_test_out(kernels, monkeypatch):
    monkeypatch.setenv("MOVQ_EXT_SELF_TEST", "0")
    kernels.plant_error_of("attention_forward", lambda result: result.add_(1))
    movq_ext.attention(*attention_inputs())
    assert kernels.calls["attention_forward"] == 1
    monkeypatch.setenv("MOVQ_EXT_SELF_TEST", "no")
    with pytest.raises(ValueError, match="MOVQ_EXT_SELF_TEST must be 0, 1 or unset, got 'no'"):
        movq_ext.attention(*attention_inputs())


def test_it_waits_for_the_end_of_a_capture(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(self_test, "_is_capturing", lambda: True)
    assert self_test_failure("attention", GPU, torch.float32, False) is None
    assert not self_test._results and not any(kernels.calls.values())


def test_a_program_may_be_traced_on_a_machine_without_the_gpu(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert self_test_failure("attention", GPU, torch.float32, False) is None and not self_test._results


def test_the_callers_modes_do_not_see_it(kernels):
    kernels.plant_error_of("add_bias_residual_", lambda result: result.add_(1))
    state = torch.get_rng_state()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        assert self_test_failure("attention", CPU, torch.float32, False) is None
        assert "add_bias_residual_" in self_test_failure("add_bias_residual_", CPU, torch.float32, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_programs_test_it_too(kernels):
    kernels.plant_error_of("attention_forward", lambda result: result.add_(1))
    torch._dynamo.reset()

    def failures(x):
        return x + (self_test_failure("attention", x.device, x.dtype, False) is not None)

    assert torch.compile(failures, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


def spatial_norm_kernels():
    """Return the names of all kernels that SpatialNorm's sources launch."""
    sources = [path.read_text() for path in emulator.KERNELS.glob("spatial_norm*.cu*")]
    return {name for source in sources for name in re.findall(r'"(spatial_norm \w+)"', source)}


@pytest.mark.skipif(not usable("emulator"), reason="needs Linux and a host C++ compiler")
def test_it_reaches_every_kernel_of_spatial_norm(kernels):
    """On the emulator, with accesses of 16 bytes and of one element."""
    device, reached = Emulator(), {"wide": set(), "single": set()}
    device.seeds = (0,)

    def run(method, own_arguments):  # the others are those of the clip
        def kernel(*arguments):
            results = method(*arguments[:own_arguments], clip=Clip(*arguments[own_arguments:]))
            f = arguments[0]
            row = f.shape[1] if f.stride(1) == 1 else f.shape[3]
            reached["single" if row * f.element_size() % 16 else "wide"].update(launch.kernel for launch in device.cost.launches)
            return [torch.empty(0) if result is None else result for result in results]

        return kernel

    kernels.plant("spatial_norm_forward", run(device.forward, 11))
    kernels.plant("spatial_norm_backward", run(device.backward, 10))
    for channels_last in (False, True):
        assert self_test_failure("spatial_norm", CPU, torch.bfloat16, channels_last) is None
    assert reached["wide"] == reached["single"] == spatial_norm_kernels()


@needs_extension
@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CALLS)
def test_the_kernels_pass_on_this_gpu(operator, dtype, channels_last):
    assert self_test_failure(operator, GPU, dtype, channels_last) is None
