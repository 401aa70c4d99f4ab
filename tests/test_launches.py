"""The kernels that a decode launches on a GPU, counted on meta tensors. With small images it waits for the host."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import movq_ext
from movq_ext.ops import attention_backends, extension, paths, registration, self_test

KANDINSKY = dict(
    ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3, resolution=256,
    z_channels=4, zq_ch=4,
)  # fmt: skip
# Kernels behind an operator of ours, at most. cuDNN may launch more than one for a convolution.
KERNELS = {
    "spatial_norm_forward": 3,
    "attention_forward": 2,
    "shared_kv_attention_forward": 2,
    "baddbmm": 2,  # PyTorch copies the biases into the result first
}
SIXTEEN_BITS = {
    "convolution": 37,
    "bias of a convolution": 2,  # conv_in and conv_out
    "spatial_norm_forward": 33,
    "add_bias_residual_": 21,  # 14 residual blocks, 4 of attention, 3 of upsampling
    "shared_kv_attention_forward": 4,
    "addmm": 10,  # attention's q and v, and the shortcuts, with their biases
    "mm": 4,  # attention's k
    "fold_upsampling": 3,
    "baddbmm": 3,  # conv_y and conv_b of all norms, by their channels
    "cat": 2,  # the weights and the biases of these
    "clone": 3,  # z and zq to channels_last, the image from it
}
FLOAT32 = {
    **{name: count for name, count in SIXTEEN_BITS.items() if name not in ("shared_kv_attention_forward", "addmm", "mm")},
    "convolution": 43,  # q, k and v of a block are one
    "bias of a convolution": 6,
    "attention_forward": 4,
    "add": 2,  # the shortcuts' biases to those of conv2
    "baddbmm": 4,  # their results may take 64 MB together
    "cat": 2 + 8,  # 8 for the weights and biases of q, k and v
}


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if not func.is_view and "empty" not in name:
            self.operators[name] += 1
        out = func(*args, **(kwargs or {}))
        if name == "convolution" and args[2] is not None:  # PyTorch adds it in a kernel of its own
            self.operators["bias of a convolution"] += 1
        if name == "convolution":  # on the meta device it is NCHW, on a GPU it has x's layout
            with _disable_current_modes():
                return out.contiguous(memory_format=torch._prims_common.suggest_memory_format(args[0]))
        return out

    def kernels(self):
        return sum(count * KERNELS.get(name, 1) for name, count in self.operators.items())


@pytest.fixture
def launches(monkeypatch):
    """Counts launches while entered. Meta tensors pass for a GPU's, with fake implementations of our kernels."""
    mode = Launches()

    def plant(name, fake):
        def kernel(*arguments):
            mode.operators[name] += 1
            with _disable_current_modes():
                return fake(*arguments)

        monkeypatch.setattr(torch.ops.movq_ext, name, kernel, raising=False)

    for name, fake in registration.FAKE_IMPLEMENTATIONS.items():
        plant(name, fake)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"), raising=False)
    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.setenv(self_test.VARIABLE, "0")
    for module in (paths, attention_backends):
        monkeypatch.setattr(module, "device_reason", lambda index: None)
    monkeypatch.setattr(attention_backends, "device_capability", lambda index: None)  # chooses the backend "tile"
    monkeypatch.delenv("MOVQ_EXT_ATTENTION", raising=False)
    extension.warn_once.cache_clear()
    return mode


def decode(launches, dtype, grid=(32, 32), **config):
    with torch.device("meta"), torch.no_grad():
        decoder = movq_ext.MOVQDecoder(**{**KANDINSKY, **config}).to(dtype).to(memory_format=torch.channels_last).eval()
        z, zq = (torch.empty(1, 4, *grid, dtype=dtype) for _ in range(2))
        with launches:
            image = decoder(z, zq)
    assert image.shape == (1, 3, 8 * grid[0], 8 * grid[1])
    return launches


@pytest.mark.parametrize(
    "dtype, expected, kernels", [(torch.bfloat16, SIXTEEN_BITS, 195), (torch.float32, FLOAT32, 203)], ids=["bf16", "f32"]
)
def test_kernels_of_a_256x256_decode(launches, dtype, expected, kernels):
    """The numbers in docs/export_and_graphs.md."""
    decode(launches, dtype)
    assert launches.operators == expected
    assert launches.kernels() == kernels


def test_larger_images_do_not_launch_many_more(launches):
    """A decode of 16 times the pixels: the products of conv_y and conv_b are larger, and so are made in more parts."""
    expected = {**SIXTEEN_BITS, "baddbmm": 14}
    assert decode(launches, torch.bfloat16, grid=(128, 128)).operators == expected
