"""The kernels that a decode launches on a GPU, counted on meta tensors. With small images it waits for the host."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import movq_ext

HOST_CODE = ("/movq_ext/", "/torch/nn/modules/", "/torch/autograd/")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KANDINSKY = dict(
    ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3, resolution=256,
    z_channels=4, zq_ch=4,
)  # fmt: skip
SIXTEEN_BITS = {
    "convolution": 37,
    "bias of a convolution": 2,  # conv_in and conv_out
    "spatial_norm_forward": 15,  # after conv_in, and the second norm of 14 residual blocks
    "norm with statistics": 18,
    "add_bias_residual_statistics_": 18,  # before these: 11 residual blocks, 4 of attention, 3 of upsampling
    "add_bias_residual_": 3,  # residual blocks before upsampling
    "shared_kv_attention_forward": 4,
    "addmm": 10,  # attention's q and v, and the shortcuts, with their biases
    "mm": 4,  # attention's k
    "fold_upsampling": 3,
    "bmm": 3,  # conv_y and conv_b of all norms, by their channels
    "cat": 3,  # the weights of these, the biases, and both
    "new_zeros": 1,  # beside them
    "constant_pad_nd": 1,  # zq, with ones for the biases
    "clone": 3,  # z and zq to channels_last, the image from it
}
ONLY_IN_16_BITS = ("shared_kv_attention_forward", "addmm", "mm", "bmm", "new_zeros", "constant_pad_nd")
FLOAT32 = {
    **{name: count for name, count in SIXTEEN_BITS.items() if name not in ONLY_IN_16_BITS},
    "convolution": 43,  # q, k and v of a block are one
    "bias of a convolution": 6,
    "attention_forward": 4,
    "add": 2,  # the shortcuts' biases to those of conv2
    "baddbmm": 4,  # their results may take 64 MB together
    "cat": 2 + 8,  # 8 for the weights and biases of q, k and v
}


@pytest.fixture
def launches(monkeypatch):
    """Counts launches while entered. Meta tensors pass for a GPU's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import meta_gpu

    counted = meta_gpu.Launches()
    with meta_gpu.meta_gpu(counted):
        yield counted
    sys.modules.pop("meta_gpu")


def decode(launches, dtype, grid=(32, 32), **config):
    with torch.device("meta"), torch.no_grad():
        decoder = movq_ext.MOVQDecoder(**{**KANDINSKY, **config}).to(dtype).to(memory_format=torch.channels_last).eval()
        z, zq = (torch.empty(1, 4, *grid, dtype=dtype) for _ in range(2))
        with launches:
            image = decoder(z, zq)
    assert image.shape == (1, 3, 8 * grid[0], 8 * grid[1])
    return launches


def host_calls(run):
    """Return how often run() calls each Python function of this package, torch.nn and torch.autograd.

    Not the functions of shapes, ours and torch's, which only meta tensors need.
    """
    calls = Counter()

    def count(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and any(part in path for part in HOST_CODE) and not path.endswith("registration.py"):
            calls[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def decoder_and_latent(dtype):
    with torch.device("meta"):
        decoder = movq_ext.MOVQDecoder(**KANDINSKY).to(dtype).to(memory_format=torch.channels_last)
        return decoder, torch.empty(1, 4, 32, 32, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_a_decode_takes_few_calls_of_python_functions(launches, dtype):
    """On an H200 a decode of 256x256 has 2.0 ms of kernels. It took 12.5 ms with 17000 calls: the GPU waited for Python."""
    decoder, z = decoder_and_latent(dtype)
    decoder.eval()(z, z)  # fills the caches
    calls = host_calls(lambda: decoder(z, z))
    assert 0 < calls.total() <= 5500, calls.most_common(30)
    assert calls["apply"] == 0  # of autograd functions, which nothing needs here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_a_training_step_takes_few_calls_of_python_functions(launches, dtype):
    decoder, z = decoder_and_latent(dtype)
    decoder(z, z).sum().backward()
    calls = host_calls(lambda: decoder(z, z).sum().backward())
    assert 0 < calls.total() <= 5000, calls.most_common(30)
    # torch inspects the signature there, which takes longer than launching a kernel. torch 2.13 uses the second name.
    assert calls["_bind_default_args"] == calls["bind_default_args"] == 0


@pytest.mark.parametrize(
    "dtype, expected, kernels", [(torch.bfloat16, SIXTEEN_BITS, 178), (torch.float32, FLOAT32, 185)], ids=["bf16", "f32"]
)
def test_kernels_of_a_256x256_decode(launches, dtype, expected, kernels):
    """The numbers in docs/export_and_graphs.md."""
    decode(launches, dtype)
    assert launches.operators == expected
    assert launches.kernels() == kernels


def test_larger_images_do_not_launch_many_more(launches):
    """A decode of 16 times the pixels: the products of conv_y and conv_b are larger, and so are made in more parts."""
    expected = {**SIXTEEN_BITS, "bmm": 14}
    assert decode(launches, torch.bfloat16, grid=(128, 128)).operators == expected


def test_dispatched_norms_with_statistics_are_counted_apart(launches):
    """As on a GPU, where the dispatcher sees the operator itself."""
    schema = "Tensor f, Tensor? y, Tensor? b, Tensor? weight, Tensor? bias, int groups, float eps, bool silu, Tensor? f_bias=None"
    with torch.library._scoped_library("dispatched", "DEF") as library:
        library.define(f"spatial_norm_forward({schema}, bool bordered=False, Tensor? statistics=None) -> Tensor")
        library.impl("spatial_norm_forward", lambda f, *others: f.clone(), "CompositeExplicitAutograd")
        x = torch.zeros(1)
        norm = x, None, None, None, None, 1, 1e-6, False, None, False
        with launches:
            torch.ops.dispatched.spatial_norm_forward(*norm)
            torch.ops.dispatched.spatial_norm_forward(*norm, None)
            torch.ops.dispatched.spatial_norm_forward(*norm, x)
    assert launches.operators == {"spatial_norm_forward": 2, "norm with statistics": 1}
    assert launches.kernels() == 2 * 3 + 2


def test_the_benchmark_of_the_host_writes_a_row_for_each_decoder(tmp_path):
    command = [sys.executable, BENCHMARKS / "host.py", "--quick", "--device", "cpu", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}  # conftest sets PYTHONSAFEPATH, which hides a script's folder
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    kernels = {(row["dtype"], row["decoder"]): row["kernels"] for row in rows}
    assert kernels["bfloat16", "movq_ext"] == 194  # of a model with fewer channels, and one shortcut
    for dtype in ("bfloat16", "float32"):
        ours, accelerated, diffusers = (kernels[dtype, name] for name in ("movq_ext", "diffusers, accelerated", "diffusers"))
        assert ours < accelerated < diffusers
    assert all(row["host us"] > 0 for row in rows)
    assert "without CUDA driver and cuDNN" in (tmp_path / "host.md").read_text()
